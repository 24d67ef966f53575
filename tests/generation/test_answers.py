"""Generation: the same tokens as KerasHub's own `generate`, from few compiled programs."""

import gc
import weakref

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np
import pytest
from _quantized import quantize

from gemma_keras_tune.adapters.lora import enable_lora, lora_disabled, lora_linears, merge_lora
from gemma_keras_tune.errors import EvaluationError, GenerationError, LoadError, TemplateError
from gemma_keras_tune.evaluation.requests import ModelPair, Request, run_requests
from gemma_keras_tune.evaluation.response_log import ResponseLog
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.families import context_length
from gemma_keras_tune.gemma.state import state_of
from gemma_keras_tune.gemma.templates import TEMPLATES, Segment, TextTemplate, attach_template
from gemma_keras_tune.generation import answers, decoding
from gemma_keras_tune.generation.answers import (
    compiled_programs,
    generate,
    generate_answers,
    generate_ids,
)
from gemma_keras_tune.generation.streaming import stream
from gemma_keras_tune.pairs import Message
from gemma_keras_tune.testing import FAMILIES, tiny_model

# Long enough to cross the tiny models' sliding window of 8 tokens.
NEW_TOKENS = 14


def rows_of_lengths(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [np.append(2, random.integers(60, 500, n - 1)).astype("int32") for n in lengths]


def stock_ids(model, row, new_tokens=NEW_TOKENS, length=48):
    """What KerasHub writes after one row, by its own compiled function, greedy by default."""
    tokens, mask = np.zeros((1, length), "int32"), np.arange(length)[None] < len(row)
    tokens[0, : len(row)] = row
    inputs = {"token_ids": tokens, "padding_mask": mask}
    outputs = model.make_generate_function()(inputs, stop_token_ids=None)
    return np.asarray(outputs["token_ids"])[0, len(row) : len(row) + new_tokens]


def ids(model, rows, **kwargs):
    kwargs = {"stop_token_ids": (), "max_new_tokens": NEW_TOKENS, **kwargs}
    return [written for written, _ in generate_ids(model, rows, **kwargs)]


def assert_like_stock(model, monkeypatch, lengths):
    monkeypatch.setattr(answers, "SHORT_CHUNK", 8)
    monkeypatch.setattr(decoding, "MIN_ROOM", 0)
    rows = rows_of_lengths(*lengths)
    for row, written in zip(rows, ids(model, rows), strict=True):
        np.testing.assert_array_equal(written, stock_ids(model, row))
    assert compiled_programs(model) == 1


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma3", num_layers=1)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_kerashub(monkeypatch):
    assert_like_stock(tiny_model("gemma3", num_layers=1), monkeypatch, (5, 23))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_kerashub_in_every_generation(family, monkeypatch):
    assert_like_stock(tiny_model(family), monkeypatch, (2, 9, 17, 31))


@pytest.mark.slow
def test_greedy_tokens_with_experts(monkeypatch):
    assert_like_stock(tiny_model("gemma4", moe=True), monkeypatch, (5, 20))


@pytest.mark.slow
def test_greedy_tokens_in_bfloat16(monkeypatch):
    assert_like_stock(tiny_model("gemma3", dtype="bfloat16"), monkeypatch, (5, 20))


@pytest.mark.slow
def test_one_program_for_all_lengths_and_weights(model):
    before = compiled_programs(model)
    rows = rows_of_lengths(1, 3, 20, 30, 33)
    first = ids(model, rows, batch_size=4)
    again = ids(model, rows[::-1], batch_size=4, max_new_tokens=5)
    for long, short in zip(first, again[::-1], strict=True):
        np.testing.assert_array_equal(long[:5], short)
    kernel = model.backbone.transformer_layers[0].ffw_linear.kernel
    kept = np.asarray(kernel)
    kernel.assign(-5 * kept)
    changed = ids(model, rows, batch_size=4)
    kernel.assign(kept)
    ids(model, rows, batch_size=4, stop_token_ids=range(1000, 1033))  # every run of line breaks
    assert any(not np.array_equal(a, b) for a, b in zip(first, changed, strict=True))
    assert compiled_programs(model) == before + 1


def test_many_lengths_take_few_programs(model, monkeypatch):
    rows = rows_of_lengths(*range(2, 402, 2))
    made = set()

    def run(model, weights, rows, batch, stops, state):
        made.add((batch.size, batch.chunk, batch.buffer))
        assert batch.chunks * batch.chunk + 1 + batch.new_tokens <= batch.buffer
        assert all(len(row) <= batch.chunks * batch.chunk + 1 for row in rows)
        return [row[-1:] for row in rows]

    monkeypatch.setattr(answers, "_run_batch", run)
    written = ids(model, rows, batch_size=8)
    assert [w[0] for w in written] == [row[-1] for row in rows]
    assert 1 < len(made) <= 3
    made.clear()
    ids(model, rows[::40], batch_size=1)
    assert len(made) == 1


@pytest.mark.slow
def test_a_row_ends_at_a_stop_token_and_says_so(model):
    rows = rows_of_lengths(6, 11)
    free = ids(model, rows)
    stop = int(free[0][4])
    place = int(np.flatnonzero(free[0] == stop)[0])
    (written, stopped), (other, other_stopped) = generate_ids(
        model, rows, stop_token_ids=(stop, 1), max_new_tokens=NEW_TOKENS
    )
    np.testing.assert_array_equal(written, free[0][:place])
    assert stopped
    assert other_stopped == (stop in free[1])
    np.testing.assert_array_equal(other, free[1][: len(other)])


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes that programs compiled from now on make to write."""
    made = []
    choose = decoding._choose

    def counted(*args):
        jax.debug.callback(lambda: made.append(1))
        return choose(*args)

    monkeypatch.setattr(decoding, "_choose", counted)
    return made


def test_writing_ends_when_all_rows_have_stopped(passes):
    model = tiny_model("gemma3", num_layers=1)
    rows = rows_of_lengths(6, 6)
    free = ids(model, rows)
    stops = {int(written[5]) for written in free}
    lengths = [int(np.flatnonzero(np.isin(written, list(stops)))[0]) for written in free]
    passes.clear()
    written = generate_ids(model, rows, stop_token_ids=stops, max_new_tokens=NEW_TOKENS)
    assert [(len(w), stopped) for w, stopped in written] == [(n, True) for n in lengths]
    jax.effects_barrier()
    assert len(passes) == max(lengths) + 1 < NEW_TOKENS


def test_guesses_are_what_followed_before():
    def guessed(text, start=0, count=3):
        row = np.asarray([*text, *[9] * 5])[None]
        asked = decoding._last_and_guessed(
            jnp.asarray(row), jnp.asarray([len(text) - 1]), jnp.asarray([start]), count
        )
        return np.asarray(asked)[0].tolist()

    assert guessed([1, 2, 3, 4, 5, 1, 2]) == [2, 3, 4, 5]
    assert guessed([1, 2, 3, 8, 2, 4, 6, 1, 2]) == [2, 3, 8, 2]  # two tokens count before one
    assert guessed([1, 2, 3, 8, 1, 2, 4, 7, 7, 1, 2]) == [2, 4, 7, 7]  # the latest of them
    assert guessed([5, 2, 3, 8, 2, 4, 6, 1, 2]) == [2, 4, 6, 1]
    assert guessed([3, 1, 2, 1, 2]) == [2, 1, 2, 1]  # a loop goes on
    assert guessed([3, 7, 7]) == [7, 7, 7, 7]
    assert guessed([7, 7, 5, 7], start=1)[:2] == [7, 5]
    assert guessed([7, 5, 7], start=2)[0] == 7  # padding is not looked at
    assert guessed([1, 2, 1], count=0) == [1]


def test_fewer_guesses_for_more_rows_none_for_short_texts_or_a_sampler():
    counts = [decoding.guesses(None, rows, 128) for rows in (1, 8, 9, 16, 32, 33, 64, 500)]
    assert counts == [7, 7, 6, 3, 1, 0, 0, 0]
    assert decoding.guesses(None, 1, 96) == 0
    assert decoding.guesses(keras_hub.samplers.RandomSampler(), 1, 128) == 0


def test_what_is_right_ends_at_the_first_wrong_guess_and_at_a_stop():
    asked = jnp.asarray([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    chosen = jnp.asarray([[2, 3, 4, 5], [9, 3, 4, 5], [2, 7, 4, 5], [2, 3, 4, 8]])
    right, to_stop = decoding._right_and_to_stop(asked, chosen, jnp.asarray([7, 8, -1]))
    assert right.tolist() == [4, 1, 2, 4]
    assert to_stop.tolist() == [5, 5, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_save_passes_and_change_nothing(family, monkeypatch, passes):
    monkeypatch.setattr(decoding, "MIN_ROOM", 0)
    model = tiny_model(family)
    period = [70, 81, 92]
    rows = [np.asarray([2, *period * n]) for n in (2, 5, 9)] + rows_of_lengths(4, 17, 30)
    stop = int(ids(model, rows, max_new_tokens=40)[1][25])
    taken = {}
    for count in (0, 3):
        monkeypatch.setattr(decoding, "MAX_GUESSES", count)
        state_of(model).programs.clear()
        passes.clear()
        taken[count] = generate_ids(
            model, rows, stop_token_ids=[stop], max_new_tokens=40, batch_size=4
        )
        jax.effects_barrier()
        taken[count, "passes"] = len(passes)
    for (alone, ended), (guessed, ended_too) in zip(taken[0], taken[3], strict=True):
        np.testing.assert_array_equal(alone, guessed)
        assert ended == ended_too
    assert taken[3, "passes"] < taken[0, "passes"]


@pytest.mark.slow
def test_text_in_text_out_order_kept(model):
    prompts = ["Paris", "What is the capital of Italy? Rome. What is the capital of France?", "box"]
    together = generate(model, prompts, max_new_tokens=5, batch_size=2, template="plain")
    assert isinstance(together, list) and len(together) == 3
    alone = generate(model, prompts[1], max_new_tokens=5, batch_size=2, template="plain")
    assert alone == together[1]
    assert generate(model, [], template="plain") == []
    turns = [{"role": "user", "content": prompts[1]}]
    assert generate(model, turns, max_new_tokens=5, template="plain") == alone
    turns = [[Message("user", prompt)] for prompt in prompts]
    assert generate(model, turns, max_new_tokens=5, batch_size=2, template="plain") == together


def test_answers_carry_ids_text_and_end(model):
    seen = []
    answers = generate_answers(
        model,
        ["a", "b", "c"],
        max_new_tokens=4,
        batch_size=2,
        template="plain",
        progress=seen.append,
    )
    tokenizer = model.preprocessor.tokenizer
    for answer in answers:
        assert answer.text == tokenizer.detokenize(answer.ids)
        assert answer.stopped == (len(answer.ids) < 4)
    assert seen == [2, 1]


def test_the_attached_template_is_applied(model, monkeypatch):
    asked = []

    def spy(model, rows, **kwargs):
        asked.append((rows, kwargs["stop_token_ids"]))
        return [(np.zeros(0, "int32"), True)] * len(rows)

    monkeypatch.setattr(answers, "generate_ids", spy)
    attach_template(model, TextTemplate("{prompt} =>{response}<turn|>"))
    try:
        assert generate(model, "box") == ""
    finally:
        attach_template(model, None)
    tokenizer = model.preprocessor.tokenizer
    (row,), stops = asked[0]
    assert tokenizer.detokenize(row[1:]) == "box =>" and row[0] == 2
    assert stops == (tokenizer.token_to_id("<turn|>"), 1)


def test_stop_token_is_not_part_of_the_answer(model, monkeypatch):
    tokenizer = model.preprocessor.tokenizer
    end = tokenizer.token_to_id("<end_of_turn>")
    words = list(np.asarray(tokenizer("two boxes")))
    row = np.asarray([*words, end, *words], "int32")
    monkeypatch.setattr(
        answers, "_run_batch", lambda model, weights, rows, *rest: [row] * len(rows)
    )
    assert generate(model, "box", template=TEMPLATES["gemma3"]) == "two boxes"


@pytest.fixture(scope="module")
def short_model():
    return tiny_model("gemma3n", max_position_embeddings=64)


@pytest.mark.parametrize("answers", [generate, generate_answers])
def test_prompts_beyond_the_context_are_refused_all_at_once(short_model, answers):
    prompts = ["x" * 70, "fine", "y" * 90]
    with pytest.raises(GenerationError) as caught:
        answers(short_model, prompts, max_new_tokens=40, template="plain")
    assert [p.partition(" tokens")[0].split()[1] for p in caught.value.problems] == ["1:", "3:"]
    assert caught.value.problems[0].endswith(
        " tokens and `max_new_tokens=40` are more than the model's context of 64 tokens"
    )
    assert compiled_programs(short_model) == 0
    with pytest.raises(GenerationError, match=r"prompt 1: .* context of 64 tokens"):
        stream(short_model, prompts[0], max_new_tokens=40, template="plain")


def test_a_prompt_may_fill_the_context(short_model):
    row = rows_of_lengths(60)
    assert len(generate_ids(short_model, row, stop_token_ids=[], max_new_tokens=4)[0][0]) == 4
    with pytest.raises(GenerationError, match="60 tokens and `max_new_tokens=5`"):
        generate_ids(short_model, row, stop_token_ids=[], max_new_tokens=5)


def test_questions_beyond_the_context_are_refused_before_any_is_asked(short_model):
    rows = rows_of_lengths(70, 5, 80)
    requests = [Request("tuned", "cases", i, row, frozenset(), 4) for i, row in enumerate(rows)]
    log = ResponseLog(None, {})
    with pytest.raises(EvaluationError) as caught:
        run_requests(ModelPair(short_model), requests, log=log, progress=lambda _: None)
    assert [p.partition(" and ")[0] for p in caught.value.problems] == [
        "case 1, tuned model: 70 tokens", "case 3, tuned model: 80 tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        (dict(family="gemma"), 8192),
        (dict(family="gemma2"), 8192),
        (dict(family="gemma3"), 32_768),
        (dict(family="gemma3", global_rope_scaling_factor=8.0), 131_072),
        (dict(family="gemma3n", max_position_embeddings=4096), 4096),
        (dict(family="gemma4"), 131_072),
        (dict(family="gemma4", moe=True), 262_144),
    ],
)
def test_the_context_of_every_generation(model, tokens):
    assert context_length(tiny_model(**model)) == tokens


def test_broken_prompts_are_all_reported(model):
    prompts = ["fine", [{"role": "user"}], [{"role": "assistant", "content": "x"}], 7, []]
    with pytest.raises(TemplateError) as caught:
        generate(model, prompts, template="plain")
    problems = caught.value.problems
    assert [problem.split(":")[0] for problem in problems] == [f"prompt {i}" for i in range(2, 6)]
    with pytest.raises(TemplateError, match="a dict is neither text nor a list of messages"):
        generate(model, {"role": "user", "content": "x"}, template="plain")
    with pytest.raises(GenerationError, match="`max_new_tokens` must be an integer of at least 1"):
        generate(model, "x", max_new_tokens=0, template="plain")
    with pytest.raises(GenerationError, match="Empty rows"):
        ids(model, [[]])


@pytest.mark.slow
def test_random_sampler_repeats_with_a_seed_and_moves_without(model):
    rows = rows_of_lengths(6, 6, 6)
    sampler = keras_hub.samplers.TopKSampler(k=20, seed=1, temperature=3.0)
    state = np.asarray(sampler.variables[0])
    one, two, three = (np.stack(ids(model, rows, sampler=sampler, seed=seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()
    np.testing.assert_array_equal(np.asarray(sampler.variables[0]), state)
    before = compiled_programs(model)
    other = keras_hub.samplers.TopKSampler(k=20, seed=2, temperature=3.0)
    moved = [np.stack(ids(model, rows, sampler=other)) for _ in range(2)]
    assert (moved[0] != moved[1]).any()
    assert compiled_programs(model) == before


@pytest.mark.slow
def test_a_seed_for_each_row_makes_it_independent_of_the_others(model):
    rows = rows_of_lengths(6, 9, 6, 7, 12)
    sampler = keras_hub.samplers.TopPSampler(p=0.9, temperature=3.0)
    seeds = [5, 5, 6, 7, 8]
    seen = []
    together = generate_ids(
        model, rows, stop_token_ids=(), max_new_tokens=NEW_TOKENS, sampler=sampler, seed=seeds,
        batch_size=4, on_batch=seen.extend,
    )  # fmt: skip
    order = [3, 0, 4, 2, 1]
    others = ids(
        model, [rows[i] for i in order], sampler=sampler, seed=[seeds[i] for i in order],
        batch_size=2,
    )  # fmt: skip
    for place, written in zip(order, others, strict=True):
        np.testing.assert_array_equal(written, together[place][0])
    assert not np.array_equal(together[2][0], together[3][0])
    for index, written, stopped in seen:
        assert written is together[index][0] and stopped == together[index][1]
    assert sorted(entry[0] for entry in seen) == list(range(5))
    with pytest.raises(GenerationError, match="2 seeds for 5 rows"):
        ids(model, rows, sampler=sampler, seed=[1, 2])


def test_a_search_is_left_to_kerashub(model):
    with pytest.raises(GenerationError, match="must choose token by token"):
        ids(model, rows_of_lengths(4), sampler="beam")


def lora_model():
    model = tiny_model("gemma3", num_layers=1)
    enable_lora(model, 2, verbose=0)
    for linear in lora_linears(model):
        shape = linear.layer.lora_kernel_b.shape
        linear.layer.lora_kernel_b.assign(np.random.default_rng(0).normal(size=shape))
    return model


@pytest.mark.slow
def test_lora_on_and_off_share_a_program(model):
    rows = rows_of_lengths(5, 12)
    tuned = lora_model()
    with lora_disabled(tuned):
        off = ids(tuned, rows)
    on = ids(tuned, rows)
    assert compiled_programs(tuned) == 1
    np.testing.assert_array_equal(off, ids(model, rows))
    assert not np.array_equal(on, off)
    assert all(linear.layer.lora_enabled for linear in lora_linears(tuned))


@pytest.mark.slow
def test_lora_writes_as_kerashub_and_as_merged():
    model = lora_model()
    rows = rows_of_lengths(5, 12)
    on = ids(model, rows)
    for row, written in zip(rows, on, strict=True):
        np.testing.assert_array_equal(written, stock_ids(model, row))
    merge_lora(model)
    np.testing.assert_array_equal(ids(model, rows), on)


@pytest.mark.slow
def test_a_few_rows_asked_once_run_in_a_program_for_more():
    model = tiny_model("gemma3", num_layers=1)
    ids(model, rows_of_lengths(3, 4, 5, 6, 7), batch_size=8)
    row = rows_of_lengths(6)
    before = compiled_programs(model)
    (shared,) = ids(model, row, share_programs=True)
    assert compiled_programs(model) == before
    (own,) = ids(model, row)
    assert compiled_programs(model) == before + 1
    np.testing.assert_array_equal(shared, own)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_backbone(mode):
    model = tiny_model("gemma3", hidden_dim=32, intermediate_dim=64, num_layers=1)
    quantize(model.backbone, mode)
    rows = rows_of_lengths(5, 12)
    for row, written in zip(rows, ids(model, rows), strict=True):
        np.testing.assert_array_equal(written[:4], stock_ids(model, row)[:4])


@pytest.mark.slow
def test_programs_do_not_keep_a_model_alive():
    model = tiny_model("gemma3", num_layers=1)
    ids(model, rows_of_lengths(4), max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert gone() is None


@pytest.mark.real
def test_real_model_writes_as_kerashub():
    from gemma_keras_tune.loading.loader import load

    model = load("package://gemma3_270m")
    prompts = [
        "The capital of France is",
        "def add(a, b):",
        "Once upon a time there was a small village by the sea. In it lived a fisherman who",
        "1, 2, 3, 4,",
    ]
    encoder = RowTokenizer(model.preprocessor.tokenizer)
    rows = [encoder.encode([Segment(prompt, False)])[0] for prompt in prompts]
    for row, written in zip(rows, ids(model, rows, max_new_tokens=24), strict=True):
        np.testing.assert_array_equal(written, stock_ids(model, row, new_tokens=24))
    answer = generate(model, prompts[3], max_new_tokens=6, template="{prompt}{response}")
    assert "5" in answer


@pytest.mark.slow
def test_prompts_may_come_from_a_generator_or_a_column():
    model = tiny_model()
    prompts = ["one", "two", "three"]
    expected = generate(model, prompts, max_new_tokens=4)
    assert generate(model, (p for p in prompts), max_new_tokens=4) == expected
    assert generate(model, np.array(prompts), max_new_tokens=4) == expected


@pytest.mark.slow
def test_seeds_of_numpy_are_seeds():
    model = tiny_model()
    drawn = [
        generate(model, "one", max_new_tokens=8, sampler="top_p", seed=seed)
        for seed in (7, np.int64(7), np.int32(7), 8)
    ]
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]
    with pytest.raises(GenerationError, match="`seed` must be an integer"):
        generate(model, "one", max_new_tokens=8, sampler="top_p", seed=1.5)


@pytest.mark.slow
def test_a_temperature_draws_and_zero_does_not(model):
    def ask(**options):
        return generate(model, "Hello", max_new_tokens=8, template="plain", strip=False, **options)

    greedy = ask()
    assert ask(temperature=0) == ask(temperature=0.0, sampler="greedy") == greedy
    hot = ask(temperature=5.0, seed=1)
    stock = keras_hub.samplers.TopPSampler(p=0.95, k=64, temperature=5.0)
    assert hot == ask(sampler=stock, seed=1) != greedy
    streamed = stream(model, "Hello", max_new_tokens=8, template="plain", temperature=5.0, seed=1)
    assert "".join(streamed) == hot
    named = keras_hub.samplers.TopKSampler(temperature=5.0)
    assert ask(sampler="top_k", temperature=5.0, seed=1) == ask(sampler=named, seed=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(sampler="topk"), "Do you mean 'top_k'"),
        (dict(sampler=3), "Received: 3"),
        (dict(temperature=-1), "`temperature` must be"),
        (dict(temperature=float("nan")), "`temperature` must be"),
        (dict(temperature="hot"), "`temperature` must be"),
        (dict(temperature=True), "`temperature` must be"),
        (dict(sampler="greedy", temperature=1.0), "contradict"),
        (dict(sampler="top_k", temperature=0), "contradict"),
        (dict(sampler=keras_hub.samplers.TopKSampler(), temperature=0.5), "its own temperature"),
        (dict(seed=-1), "`seed` must be an integer from 0"),
        (dict(seed=2**40), "`seed` must be an integer from 0"),
    ],
)
def test_samplers_that_are_none_are_told_by_name(model, options, words):
    for ask in (generate, lambda *args, **kwargs: list(stream(*args, **kwargs))):
        with pytest.raises(GenerationError, match=words):
            ask(model, "Hello", template="plain", **options)


def test_what_is_no_prompt_or_no_model_is_told_in_words(model):
    for nothing in (None, 5, b"bytes"):
        with pytest.raises(TemplateError, match="`prompts` must be a text, a conversation, or a"):
            generate(model, nothing)
        with pytest.raises(TemplateError, match="prompt 1: a"):
            stream(model, nothing)
    for ask in (generate, stream):
        for wrong in (None, "package://gemma3_270m"):
            with pytest.raises(LoadError, match=r"`model` must be a KerasHub Gemma.*\n.*load"):
                ask(wrong, "Hello")
        for half in ("Hello \ud83d", [{"role": "user", "content": "Hello \ud83d"}]):
            with pytest.raises(TemplateError, match="half a surrogate pair at character 7"):
                ask(model, half)
