"""Pairs to token ids: masks, limits, and memory that stays small."""

import gc
import json
import tracemalloc

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.training import tokenizing
from gemma_keras_tune.training.pipeline import make_batcher
from gemma_keras_tune.training.tokenizing import tokenize_pairs

PLAIN = "{prompt}\n{response}"
BYTES_A_ROW = 100


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model()


def test_the_last_label_is_the_stop_token_and_the_prompt_carries_none(model):
    tokens = tokenize_pairs(model, [("part number", "yes")], template=PLAIN)
    ids, trained = tokens.row(0)
    tokenizer = model.preprocessor.tokenizer
    assert ids[0] == tokenizer.start_token_id
    assert trained[-1] and tokenizer.id_to_token(int(ids[-1])) == "<eos>"
    text = "".join(tokenizer.id_to_token(int(i)) for i in ids[trained][:-1])
    assert text == "yes"
    assert not trained[: len(ids) - int(trained.sum())].any()


def test_long_rows_are_reported_dropped_or_cut(model):
    pairs = [("a", "yes"), ("b" * 50, "no"), ("c", "d" * 50)]
    with pytest.raises(gkt.errors.PairsError) as caught:
        gkt.make_dataset(model, pairs, template=PLAIN, sequence_length=20)
    assert [p.split(":")[0] for p in caught.value.problems] == ["row 2", "row 3"]
    limits = {"template": PLAIN, "max_length": 20}
    with pytest.warns(gkt.errors.PairsWarning) as told:
        dropped = tokenize_pairs(model, pairs, overlong="drop", **limits)
    assert dropped.dropped == (2, 3) and len(dropped) == 1
    assert dropped.response_lengths.tolist() == [3]
    assert str(told[0].message).splitlines() == [
        "The list: 2 of 3 rows are longer than 20 tokens and left out.",
        "  - row 2: 54 tokens",
        "  - row 3: 28 tokens",
    ]
    with pytest.raises(
        gkt.errors.PairsError, match="1 of 3 rows is cut before the answer"
    ) as caught:
        tokenize_pairs(model, pairs, overlong="truncate", **limits)
    assert "row 2: the prompt alone fills 20 tokens" in caught.value.problems[0]
    with pytest.warns(
        gkt.errors.PairsWarning, match="1 of 2 rows is longer than 20 tokens and cut"
    ):
        cut = tokenize_pairs(model, [pairs[0], pairs[2]], overlong="truncate", **limits)
    assert cut.truncated == (2,) and cut.lengths.max() == 20
    assert cut.response_lengths.tolist() == [int(cut.row(i)[1].sum()) for i in range(2)]
    with pytest.raises(gkt.errors.PairsError, match="none is left"):
        tokenize_pairs(model, pairs[1:], overlong="drop", **limits)
    with pytest.warns(gkt.errors.PairsWarning, match="left out"):
        gkt.make_dataset(model, pairs, template=PLAIN, sequence_length=20, overlong="drop")
    with pytest.raises(gkt.errors.PairsError, match="'error', 'drop' or 'truncate'"):
        tokenize_pairs(model, pairs, overlong="cut", **limits)


def test_all_bad_rows_are_reported_before_any_work(model):
    with pytest.raises(gkt.errors.PairsError) as caught:
        gkt.make_dataset(model, [("a", "b"), ("c", ""), ("d", None)], template=PLAIN)
    assert "row 2" in str(caught.value) and "row 3" in str(caught.value)


def test_problems_of_every_kind_are_reported_at_once(model, tmp_path):
    rows = [("a", "b"), ("", "x"), ("q" * 60, "y")]
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in rows]
    (tmp_path / "1.jsonl").write_text("\n\n".join(lines))
    (tmp_path / "2.json").write_text('{"prompt": ')
    with pytest.raises(gkt.errors.PairsError) as caught:
        gkt.make_dataset(model, tmp_path, template=PLAIN, sequence_length=20)
    empty, broken, long = caught.value.problems
    assert empty == "row 2 (1.jsonl, line 3): `prompt` is empty"
    assert broken.startswith("row 4 (2.json): the file is not JSON")
    assert long == "row 3 (1.jsonl, line 5): 63 tokens"
    assert "2 rows cannot be trained on. 1 of 2 rows is longer than 20 tokens" in str(caught.value)
    assert "sequence_length" in str(caught.value) and "on_error='skip'" in str(caught.value)


def test_large_sets_are_spooled_to_disk(model, monkeypatch):
    pairs = testing.tiny_pairs(50)
    held = tokenize_pairs(model, pairs, template=PLAIN)
    monkeypatch.setattr(tokenizing, "SPOOL_BYTES", 100)
    monkeypatch.setattr(tokenizing, "_ROWS_AT_ONCE", 8)
    spooled = tokenize_pairs(model, pairs, template=PLAIN)
    assert isinstance(spooled.ids, np.memmap) and not isinstance(held.ids, np.memmap)
    for index in range(50):
        for got, want in zip(spooled.row(index), held.row(index), strict=True):
            np.testing.assert_array_equal(got, want)
    first = next(make_batcher(model, spooled).arrays(0))
    np.testing.assert_array_equal(first[1], next(make_batcher(model, held).arrays(0))[1])


@pytest.mark.filterwarnings("ignore::gemma_keras_tune.errors.PairsWarning")
@pytest.mark.parametrize(("overlong", "kept"), [("drop", 34), ("truncate", 50)])
def test_limits_hold_while_a_large_set_streams_to_disk(model, monkeypatch, overlong, kept):
    pairs = [(f"{i} roll", "yes" * (9 if i % 3 == 2 else 1)) for i in range(50)]
    limits = {"template": PLAIN, "max_length": 20, "overlong": overlong}
    held = tokenize_pairs(model, pairs, **limits)
    monkeypatch.setattr(tokenizing, "SPOOL_BYTES", 100)
    monkeypatch.setattr(tokenizing, "_ROWS_AT_ONCE", 8)
    spooled = tokenize_pairs(model, pairs, **limits)
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
    checks = gkt.pairs.PairChecks(["<eos>"])
    gc.collect()
    tracemalloc.start()
    try:
        tokens = tokenize_pairs(model, path, template=PLAIN, on_pair=checks.add, **options)
        checks.findings()
        for _ in make_batcher(model, tokens, batch_size=8).arrays(0):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gemma_keras_tune.errors.PairsWarning")
def test_a_row_takes_few_bytes_of_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "SPOOL_BYTES", 2**14)
    monkeypatch.setattr(tokenizing, "_ROWS_AT_ONCE", 64)
    few, many = 200, 800
    limits = {"max_length": 60, "overlong": "truncate"}
    peaks = [
        peak_of_an_epoch(write_rows(tmp_path / f"{count}.jsonl", count), model, **limits)
        for count in (few, many)
    ]
    assert (peaks[1] - peaks[0]) / (many - few) < BYTES_A_ROW
