"""Rows exactly as they would be trained."""

import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing

PLAIN = "{prompt}\n{response}"


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model()


def test_preview_reads_no_rows_that_training_would_miss(model):
    with pytest.raises(gkt.errors.PairsError, match="gives its rows once"):
        gkt.preview(model, iter(testing.tiny_pairs(4)), template=PLAIN)
    pairs = testing.tiny_pairs(4)
    shown = gkt.preview(model, lambda: iter(pairs), template=PLAIN, rows=1)
    assert len(shown.rows) == 1


def test_preview_shows_characters_for_byte_tokens(model):
    row = gkt.preview(model, [("ż", "日本")], template=PLAIN).rows[0]
    assert "".join(row.pieces) == "<bos>ż\n日本<eos>"
    assert "" in row.pieces  # no piece of its own, so several byte tokens


def test_preview_shows_ids_and_what_is_trained(model):
    shown = gkt.preview(model, [("a", "yes")], template=PLAIN)
    row = shown.rows[0]
    assert "«yes<eos>»" in str(shown)
    assert row.trained[-1] and not row.trained[0]
    assert "<script>" not in gkt.preview(model, [("<script>", "y")], template=PLAIN)._repr_html_()


@pytest.mark.parametrize("rows", [0, -1, "3", None])
def test_a_number_of_rows_that_is_none_is_refused(model, rows):
    with pytest.raises(gkt.errors.PairsError, match="`rows` must be an integer of at least 1"):
        gkt.preview(model, [("a", "b")], rows=rows)
