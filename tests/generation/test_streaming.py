"""An answer in pieces is the answer."""

from typing import Any

import jax
import keras_hub
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.generation.answers import compiled_programs
from gemma_keras_tune.generation.streaming import _pieces
from gemma_keras_tune.testing import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, 2, verbose=0)
    return model


def whole(model: Any, prompt: str, **options: Any) -> str:
    found = gkt.generate(model, prompt, strip=False, max_new_tokens=13, **options)
    assert isinstance(found, str)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4, 50])
def test_pieces_are_the_answer(model: Any, every: int) -> None:
    pieces = list(gkt.stream(model, "Hello there", max_new_tokens=13, every=every))
    assert "".join(pieces) == whole(model, "Hello there")
    assert len(pieces) > 1 or every == 50


@pytest.mark.slow
def test_drawn_answers_are_the_same_too(model: Any) -> None:
    options: dict[str, Any] = dict(sampler="top_k", seed=3)
    pieces = gkt.stream(model, "Hello there", max_new_tokens=13, **options)
    assert "".join(pieces) == whole(model, "Hello there", **options)


@pytest.mark.slow
def test_it_ends_at_the_stop_token_and_does_not_print_it(model: Any) -> None:
    answer = gkt.generate_answers(model, "Hello there", max_new_tokens=13)[0]
    tokenizer = model.preprocessor.tokenizer
    stop = tokenizer.id_to_token(int(answer.ids[5]))
    first = next(i for i, token in enumerate(answer.ids) if token == answer.ids[5])
    template = gkt.get_template(model)
    ids = template.stop_token_ids(tokenizer)

    class Stopping(type(template)):  # type: ignore[misc]
        def stop_token_ids(self, tokenizer: Any) -> Any:
            return [*ids, int(answer.ids[5])]

    stopping = object.__new__(Stopping)
    for name in template.__dataclass_fields__:
        object.__setattr__(stopping, name, getattr(template, name))
    pieces = gkt.stream(model, "Hello there", max_new_tokens=13, every=2, template=stopping)
    assert "".join(pieces) == str(tokenizer.detokenize(answer.ids[:first])), stop


def programs_made(caplog: pytest.LogCaptureFixture, call: Any) -> list[str]:
    """Every program, however small, that JAX compiles in a call."""
    caplog.clear()
    with jax.log_compiles():
        call()
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling ")]


@pytest.mark.slow
def test_one_program_serves_generate_and_stream_all_prompts_and_both_adapters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, 2, verbose=0)

    def stream(prompt: str, **options: Any) -> str:
        return "".join(gkt.stream(model, prompt, max_new_tokens=13, **options))

    assert programs_made(caplog, lambda: whole(model, "one"))
    with gkt.lora_disabled(model):
        expected = whole(model, "another and longer prompt")
    assert compiled_programs(model) == 1
    assert not programs_made(caplog, lambda: stream("one"))
    with gkt.lora_disabled(model):
        base = stream("another and longer prompt")
    assert base == expected
    # Named, it is on for this answer alone, whatever is switched while it is written.
    named = gkt.stream(model, "another and longer prompt", max_new_tokens=13, adapter=None)
    assert next(named) + "".join(named) == base
    assert gkt.adapters.active(model) == "default" and compiled_programs(model) == 1
    with pytest.raises(gkt.errors.AdapterError, match="'other'"):
        gkt.stream(model, "one", adapter="other")


class _Bytes:
    """A tokenizer of single bytes."""

    def detokenize(self, ids: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


def test_no_piece_ends_within_a_character() -> None:
    text = "a€😀b"
    data = np.frombuffer(text.encode(), np.uint8)
    pieces = list(_pieces((data[: n + 1] for n in range(len(data))), _Bytes()))
    assert pieces == list(text)
    assert list(_pieces(iter([data[:2]]), _Bytes())) == ["a\ufffd"]


def test_numbers_out_of_range_are_refused_before_work(model: Any) -> None:
    with pytest.raises(gkt.errors.GenerationError, match="`every`"):
        gkt.stream(model, "x", every=0)
    with pytest.raises(gkt.errors.TemplateError):
        gkt.stream(model, [{"role": "user"}])


@pytest.mark.slow
def test_an_answer_that_is_given_up_leaves_the_sampler_whole():
    model = tiny_model()
    sampler = keras_hub.samplers.TopKSampler(k=5)
    first, second = (gkt.stream(model, "one", sampler=sampler, every=1) for _ in range(2))
    next(first)
    next(second)
    gkt.generate(model, "one", max_new_tokens=4, sampler=sampler)
    next(first)
    first.close()
    assert "".join(gkt.stream(model, "one", sampler=sampler, max_new_tokens=4))


@pytest.mark.parametrize("count", [0, -5, 1.5, True])
def test_numbers_out_of_range_are_refused(count):
    with pytest.raises(gkt.errors.GenerationError, match="`max_new_tokens` must be"):
        gkt.stream(tiny_model(), "one", max_new_tokens=count)
