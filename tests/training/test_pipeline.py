"""Pairs to batches: token ids, masks, shapes, order, limits."""

import gc
import itertools
import json
import tracemalloc

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.training import pipeline
from gemma_keras_tune.training.pipeline import (
    Batcher,
    TokenizedPairs,
    choose_shapes,
    make_batcher,
    tokenize_pairs,
)

PLAIN = "{prompt}\n{response}"
BYTES_A_ROW = 100


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model()


def rows(lengths, responses):
    """Rows of ids 10, 11, …, whose last tokens are trained."""
    ids, trained = [], []
    for length, response in zip(lengths, responses, strict=True):
        ids += list(range(10, 11 + length))
        trained += [False] * (length + 1 - response) + [True] * response
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths) + 1)])
    return TokenizedPairs(
        np.asarray(ids, np.int32), np.asarray(trained), offsets, np.arange(1, 1 + len(lengths))
    )


def test_a_row_in_aligned_columns():
    tokens = rows([4, 2], [2, 1])
    batcher = Batcher(tokens, choose_shapes(tokens.lengths, tokens.response_lengths, 2), 0)
    batcher.shuffle = False
    x, labels, weights = next(batcher.arrays(0))
    by_length = np.argsort(-x["padding_mask"].sum(axis=1))
    # inputs  10 11 12 13      10 11
    # labels  .  .  13 14      .  12
    assert x["token_ids"][by_length].tolist() == [
        [10, 11, 12, 13, 0, 0, 0, 0],
        [10, 11, 0, 0, 0, 0, 0, 0],
    ]
    assert x["padding_mask"][by_length].sum(axis=1).tolist() == [4, 2]
    live = weights > 0
    seen = x["token_ids"].reshape(-1)[x["positions"][live]]
    pairs = sorted(zip(seen.tolist(), labels[live].tolist(), strict=True))
    assert pairs == [(11, 12), (12, 13), (13, 14)]
    np.testing.assert_allclose(weights[live], 1 / 3)


def test_the_last_label_is_the_stop_token_and_the_prompt_carries_none(model):
    tokens = tokenize_pairs([("part number", "yes")], model, template=PLAIN)
    ids, trained = tokens.row(0)
    tokenizer = model.preprocessor.tokenizer
    assert ids[0] == tokenizer.start_token_id
    assert trained[-1] and tokenizer.id_to_token(int(ids[-1])) == "<eos>"
    text = "".join(tokenizer.id_to_token(int(i)) for i in ids[trained][:-1])
    assert text == "yes"
    assert not trained[: len(ids) - int(trained.sum())].any()


lengths_and_answers = st.lists(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    min_size=1,
    max_size=80,
)


@settings(max_examples=60, deadline=None)
@given(lengths_and_answers, st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_every_row_comes_once_an_epoch_and_every_batch_fits(sizes, batch_size, steps, shuffle):
    lengths, responses = zip(*sizes, strict=True)
    tokens = rows(lengths, responses)
    shapes = choose_shapes(tokens.lengths, tokens.response_lengths, batch_size)
    assert 1 <= len(shapes) <= pipeline.MAX_SHAPES
    batcher = Batcher(tokens, shapes, 0, shuffle=shuffle, gradient_accumulation_steps=steps)
    for epoch in range(2):
        batches = batcher.epoch(epoch)
        assert len(batches) == batcher.batches_per_epoch and len(batches) % steps == 0
        seen = np.concatenate([b for _, b in batches])
        assert sorted(seen.tolist()) == list(range(len(tokens)))
        for shape, batch in batches:
            assert len(batch) <= shape.batch_size
            assert (tokens.lengths[batch] <= shape.length).all()
            assert tokens.response_lengths[batch].sum() <= shape.positions
        weights = [w for _, _, w in batcher.arrays(epoch)]
        for start in range(0, len(weights), steps):
            total = sum(w.sum() for w in weights[start : start + steps]) / steps
            assert total == pytest.approx(1.0, rel=1e-5)


def test_order_is_seeded_and_changes_with_the_epoch():
    tokens = rows([8] * 64, [3] * 64)
    shapes = choose_shapes(tokens.lengths, tokens.response_lengths, 8)

    def order(seed, epoch):
        return np.concatenate([b for _, b in Batcher(tokens, shapes, 0, seed=seed).epoch(epoch)])

    assert order(0, 0).tolist() == order(0, 0).tolist()
    assert order(0, 0).tolist() != order(0, 1).tolist()
    assert order(0, 0).tolist() != order(1, 0).tolist()


def test_a_thousand_mixed_rows_make_at_most_four_programs_and_little_padding():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4, 0.6, 1000), 8, 400).astype(int)
    tokens = rows(lengths, np.maximum(1, lengths // 3))
    shapes = choose_shapes(tokens.lengths, tokens.response_lengths, 8)
    assert 2 <= len(shapes) <= 4
    batcher = Batcher(tokens, shapes, 0)
    fed = sum(s.batch_size * s.length for s, _ in batcher.epoch(0))
    assert tokens.lengths.sum() / fed > 0.65
    assert tokens.lengths.mean() / tokens.lengths.max() < 0.2  # what one shape would give


def test_the_dataset_gives_the_next_epoch_each_time(model):
    dataset = gkt.make_dataset(testing.tiny_pairs(40), model, template=PLAIN, batch_size=4)
    first, second = ([y.numpy().tolist() for _, y, _ in dataset] for _ in range(2))
    assert len(first) == len(second) == int(dataset.cardinality())
    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))


def test_iterators_side_by_side_read_an_epoch_each(model):
    tokens = tokenize_pairs(testing.tiny_pairs(40), model, template=PLAIN)
    batcher = make_batcher(tokens, model, batch_size=3, gradient_accumulation_steps=4)
    dataset = batcher.to_dataset(first_epoch=5)
    iterators = [iter(dataset) for _ in range(3)]
    found = list(zip(*iterators, strict=True))
    assert len(found) == batcher.batches_per_epoch
    for epoch, batches in enumerate(zip(*found, strict=True), 5):
        for (x, y, weights), expected in zip(batches, batcher.arrays(epoch), strict=True):
            for name, array in expected[0].items():
                np.testing.assert_array_equal(x[name], array)
            np.testing.assert_array_equal(y, expected[1])
            np.testing.assert_array_equal(weights, expected[2])


def test_long_rows_are_reported_dropped_or_cut(model):
    pairs = [("a", "yes"), ("b" * 50, "no"), ("c", "d" * 50)]
    with pytest.raises(gkt.PairsError) as caught:
        gkt.make_dataset(pairs, model, template=PLAIN, sequence_length=20)
    assert [p.split(":")[0] for p in caught.value.problems] == ["row 2", "row 3"]
    limits = {"template": PLAIN, "max_length": 20}
    with pytest.warns(gkt.PairsWarning) as told:
        dropped = tokenize_pairs(pairs, model, overlong="drop", **limits)
    assert dropped.dropped == (2, 3) and len(dropped) == 1
    assert dropped.response_lengths.tolist() == [3]
    assert str(told[0].message).splitlines() == [
        "The list: 2 of 3 rows are longer than 20 tokens and left out.",
        "  - row 2: 54 tokens",
        "  - row 3: 28 tokens",
    ]
    with pytest.raises(gkt.PairsError, match="1 of 3 rows is cut before the answer") as caught:
        tokenize_pairs(pairs, model, overlong="truncate", **limits)
    assert "row 2: the prompt alone fills 20 tokens" in caught.value.problems[0]
    with pytest.warns(gkt.PairsWarning, match="1 of 2 rows is longer than 20 tokens and cut"):
        cut = tokenize_pairs([pairs[0], pairs[2]], model, overlong="truncate", **limits)
    assert cut.truncated == (2,) and cut.lengths.max() == 20
    assert cut.response_lengths.tolist() == [int(cut.row(i)[1].sum()) for i in range(2)]
    with pytest.raises(gkt.PairsError, match="none is left"):
        tokenize_pairs(pairs[1:], model, overlong="drop", **limits)
    with pytest.warns(gkt.PairsWarning, match="left out"):
        gkt.make_dataset(pairs, model, template=PLAIN, sequence_length=20, overlong="drop")
    with pytest.raises(gkt.PairsError, match="'error', 'drop' or 'truncate'"):
        tokenize_pairs(pairs, model, overlong="cut", **limits)


def test_all_bad_rows_are_reported_before_any_work(model):
    with pytest.raises(gkt.PairsError) as caught:
        gkt.make_dataset([("a", "b"), ("c", ""), ("d", None)], model, template=PLAIN)
    assert "row 2" in str(caught.value) and "row 3" in str(caught.value)


def test_problems_of_every_kind_are_reported_at_once(model, tmp_path):
    rows = [("a", "b"), ("", "x"), ("q" * 60, "y")]
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in rows]
    (tmp_path / "1.jsonl").write_text("\n\n".join(lines))
    (tmp_path / "2.json").write_text('{"prompt": ')
    with pytest.raises(gkt.PairsError) as caught:
        gkt.make_dataset(tmp_path, model, template=PLAIN, sequence_length=20)
    empty, broken, long = caught.value.problems
    assert empty == "row 2 (1.jsonl, line 3): `prompt` is empty"
    assert broken.startswith("row 4 (2.json): the file is not JSON")
    assert long == "row 3 (1.jsonl, line 5): 63 tokens"
    assert "2 rows cannot be trained on. 1 of 2 rows is longer than 20 tokens" in str(caught.value)
    assert "sequence_length" in str(caught.value) and "on_error='skip'" in str(caught.value)


def test_problems_of_training_and_validation_pairs_are_reported_at_once(model):
    with pytest.raises(gkt.PairsError) as caught:
        gkt.tune(
            model,
            [("a", "b"), ("", "x")],
            validation_data=[("q" * 60, "y"), ("a", None)],
            template=PLAIN,
            sequence_length=20,
        )
    assert caught.value.problems == (
        "training, row 2: the prompt is empty",
        "validation, row 2: the response is missing (its value is None)",
        "validation, row 1: 63 tokens",
    )
    rows = [("a", "b"), ("", "x"), ("q" * 60, "y")]
    with pytest.raises(gkt.PairsError) as split:
        gkt.tune(model, rows, validation_split=0.5, template=PLAIN, sequence_length=20)
    assert split.value.problems == ("row 2: the prompt is empty", "row 3: 63 tokens")
    assert caught.value.headline.startswith("Training: The list: 1 row cannot be trained on. Valid")


def test_columns_of_pairs_that_are_open_already_are_refused(model):
    opened = gkt.read_pairs({"prompt": ["a"], "response": ["b"]})
    names = {"prompt_column": "text", "response_column": "label"}
    for validation in (None, opened):
        with pytest.raises(gkt.PairsError, match="have been opened already"):
            gkt.tune(model, opened, validation_data=validation, verbose=0, **names)
    # They are those of the validation pairs, where these are still to be opened.
    with pytest.raises(gkt.PairsError) as caught:
        gkt.tune(model, opened, validation_data=[{"text": "a", "label": ""}], verbose=0, **names)
    assert caught.value.problems == ("validation, row 1: `label` is empty",)


def test_warnings_say_whether_training_or_validation_pairs_are_meant(model):
    class Enough(Exception):
        pass

    class Stop(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise Enough

    with pytest.warns(gkt.PairsWarning) as caught, pytest.raises(Enough):
        gkt.tune(
            model,
            [("a", "b"), ("a", "b")],
            validation_data=[("c", "d"), ("c", "e")],
            method="full",
            epochs=1,
            verbose=0,
            callbacks=[Stop()],
        )
    assert [str(warning.message).splitlines()[0] for warning in caught] == [
        "Some training pairs look wrong.",
        "Some validation pairs look wrong.",
    ]


def test_own_column_names_are_taken_at_every_step(model):
    frame = {"text": ["a", "b"], "label": ["yes", "no"], "rules": ["r", "s"]}
    names = {"prompt_column": "text", "response_column": "label", "system_column": "rules"}
    shown = gkt.preview(frame, model, template=PLAIN, **names)
    assert "".join(shown.rows[0].pieces) == "<bos>r\n\na\nyes<eos>"
    dataset = gkt.make_dataset(frame, model, template=PLAIN, shuffle=False, **names)
    assert int(dataset.cardinality()) == 1
    for step, args in ((gkt.make_dataset, (frame, model)), (gkt.preview, (frame, model)),
                       (gkt.tune, (model, frame))):  # fmt: skip
        with pytest.raises(gkt.PairsError, match="`prompt_column` must be a name, a string"):
            step(*args, prompt_column=["text"])


def test_make_dataset_attaches_its_template():
    model = testing.tiny_model()
    gkt.make_dataset(testing.tiny_pairs(2), model, template="Q: {prompt}\nA: {response}")
    assert gkt.template_of(model) == gkt.get_template(model, "Q: {prompt}\nA: {response}")
    assert gkt.get_template(model) == gkt.template_of(model)


def test_sizes_that_are_no_sizes_are_refused(model):
    tokens = tokenize_pairs(testing.tiny_pairs(2), model, template=PLAIN)
    with pytest.raises(gkt.PlanError) as caught:
        make_batcher(tokens, model, batch_size=0, sequence_length=2.5)
    assert len(caught.value.problems) == 2


def test_large_sets_are_spooled_to_disk(model, monkeypatch):
    pairs = testing.tiny_pairs(50)
    held = tokenize_pairs(pairs, model, template=PLAIN)
    monkeypatch.setattr(pipeline, "SPOOL_BYTES", 100)
    monkeypatch.setattr(pipeline, "_ROWS_AT_ONCE", 8)
    spooled = tokenize_pairs(pairs, model, template=PLAIN)
    assert isinstance(spooled.ids, np.memmap) and not isinstance(held.ids, np.memmap)
    for index in range(50):
        for got, want in zip(spooled.row(index), held.row(index), strict=True):
            np.testing.assert_array_equal(got, want)
    first = next(make_batcher(spooled, model).arrays(0))
    np.testing.assert_array_equal(first[1], next(make_batcher(held, model).arrays(0))[1])


@pytest.mark.filterwarnings("ignore::gemma_keras_tune.PairsWarning")
@pytest.mark.parametrize(("overlong", "kept"), [("drop", 34), ("truncate", 50)])
def test_limits_hold_while_a_large_set_streams_to_disk(model, monkeypatch, overlong, kept):
    pairs = [(f"{i} roll", "yes" * (9 if i % 3 == 2 else 1)) for i in range(50)]
    limits = {"template": PLAIN, "max_length": 20, "overlong": overlong}
    held = tokenize_pairs(pairs, model, **limits)
    monkeypatch.setattr(pipeline, "SPOOL_BYTES", 100)
    monkeypatch.setattr(pipeline, "_ROWS_AT_ONCE", 8)
    spooled = tokenize_pairs(pairs, model, **limits)
    assert isinstance(spooled.ids, np.memmap) and isinstance(spooled.trained, np.memmap)
    assert len(spooled) == kept and spooled.lengths.max() <= 20
    changed = tuple(range(3, 51, 3))
    assert (spooled.dropped or spooled.truncated) == changed == (held.dropped or held.truncated)
    for name in ("ids", "trained", "offsets", "rows", "response_lengths"):
        np.testing.assert_array_equal(getattr(spooled, name), getattr(held, name))


def write_rows(path, count):
    with open(path, "w") as file:
        for i in range(count):
            row = {"prompt": f"part number {i} " * 5, "response": f"{i} " * 3}
            file.write(json.dumps(row) + "\n")
    return path


def peak_of_an_epoch(path, model, **options):
    """Most bytes in use while a file is tokenized, checked and batched once."""
    checks = gkt.PairChecks(["<eos>"])
    gc.collect()
    tracemalloc.start()
    try:
        tokens = tokenize_pairs(path, model, template=PLAIN, on_pair=checks.add, **options)
        checks.findings()
        for _ in make_batcher(tokens, model, batch_size=8).arrays(0):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gemma_keras_tune.PairsWarning")
def test_a_row_takes_few_bytes_of_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SPOOL_BYTES", 2**14)
    monkeypatch.setattr(pipeline, "_ROWS_AT_ONCE", 64)
    few, many = 200, 800
    limits = {"max_length": 60, "overlong": "truncate"}
    peaks = [
        peak_of_an_epoch(write_rows(tmp_path / f"{count}.jsonl", count), model, **limits)
        for count in (few, many)
    ]
    assert (peaks[1] - peaks[0]) / (many - few) < BYTES_A_ROW


def test_preview_reads_no_rows_that_training_would_miss(model):
    with pytest.raises(gkt.PairsError, match="gives its rows once"):
        gkt.preview(iter(testing.tiny_pairs(4)), model, template=PLAIN)
    pairs = testing.tiny_pairs(4)
    shown = gkt.preview(lambda: iter(pairs), model, template=PLAIN, rows=1)
    assert len(shown.rows) == 1


def test_preview_shows_characters_for_byte_tokens(model):
    row = gkt.preview([("ż", "日本")], model, template=PLAIN).rows[0]
    assert "".join(row.pieces) == "<bos>ż\n日本<eos>"
    assert "" in row.pieces  # no piece of its own, so several byte tokens


def test_preview_shows_ids_and_what_is_trained(model):
    shown = gkt.preview([("a", "yes")], model, template=PLAIN)
    row = shown.rows[0]
    assert "«yes<eos>»" in str(shown)
    assert row.trained[-1] and not row.trained[0]
    assert "<script>" not in gkt.preview([("<script>", "y")], model, template=PLAIN)._repr_html_()
