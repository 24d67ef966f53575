"""Every special and every added token is one token in text, or the tokenizer is refused by name."""

import json

import numpy as np
import pytest
from _hostile_texts import HOSTILE
from sentencepiece import SentencePieceProcessor

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.formats.hugging_face.tokenizer import merge_rules
from gemma_keras_tune.gemma.encoding import known_tokens
from gemma_keras_tune.gemma.vocabularies import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    folder_vocabulary,
    repair_marks,
    scores_of_merges,
    sentencepiece_messages,
    sentencepiece_model,
)
from gemma_keras_tune.testing import tiny_tokenizer, tiny_tokenizer_proto

MARKS = ("<start_of_turn>", "<end_of_turn>", "<turn|>", "[multimodal]")


def changed(proto, **types):
    """A tokenizer whose marks, or other pieces, have another type."""
    model = sentencepiece_messages().ModelProto.FromString(proto)
    for piece in model.pieces:
        piece.type = types.get(piece.piece, piece.type)
    return model.SerializeToString()


def ids(proto, text):
    return SentencePieceProcessor(model_proto=proto).encode(text)


@pytest.mark.parametrize("kind", [NORMAL, CONTROL])
def test_marks_of_a_wrong_type_are_repaired_and_named(kind):
    right = tiny_tokenizer_proto()
    wrong = changed(right, **dict.fromkeys(MARKS, kind))
    text = "".join(MARKS)
    assert ids(wrong, text) != ids(right, text)
    with pytest.warns(UserWarning, match="'<start_of_turn>', '<end_of_turn>'.*spelled out") as told:
        repaired = repair_marks(wrong, "a file")
    assert len(told) == 1
    assert ids(repaired, text) == ids(right, text)
    assert len(ids(repaired, text)) == len(MARKS)


def test_a_sound_tokenizer_is_left_as_it_is(recwarn):
    proto = tiny_tokenizer_proto()
    assert repair_marks(proto, "a file") is proto
    assert not recwarn


def test_a_token_that_cannot_be_one_is_refused():
    model = sentencepiece_messages().ModelProto.FromString(tiny_tokenizer_proto())
    model.pieces.add(piece="<two words>", score=0.0, type=USER_DEFINED)  # a space is spelled ▁
    with pytest.raises(LoadError, match=r"'<two words>' is token \d+, and is read as \["):
        repair_marks(model.SerializeToString(), "a file")


def test_rows_without_a_token_are_told():
    tokenizer = tiny_tokenizer("gemma3")
    size = tokenizer.vocabulary_size()
    assert known_tokens(tokenizer, size) is None
    assert known_tokens(tokenizer, size - 10) is None
    known = known_tokens(tokenizer, size + 3)
    assert known.sum() == size and not known[size:].any()
    model = sentencepiece_messages().ModelProto.FromString(tiny_tokenizer_proto())
    model.pieces[400].type = UNUSED
    tokenizer.set_proto(model.SerializeToString())
    assert np.flatnonzero(~known_tokens(tokenizer, size)).tolist() == [400]


def test_merges_alone_give_the_same_ids():
    assert_merges_do(tiny_tokenizer_proto(), ("a  b   c", "Grüße 😀 你好\n\n\n", " part number 12"))


@pytest.mark.real
def test_real_merges_alone_give_the_same_ids():
    from gemma_keras_tune.formats.gguf.reader import read_header, tokenizer_proto
    from gemma_keras_tune.loading import package

    assert_merges_do(tokenizer_proto(read_header(package.package_file())), HOSTILE)


def assert_merges_do(proto, texts):
    pieces = sentencepiece_messages().ModelProto.FromString(proto).pieces
    names = [piece.piece for piece in pieces]
    scores = scores_of_merges(names, merge_rules(pieces))
    made = sentencepiece_model(names, scores, [piece.type for piece in pieces])
    for text in texts:
        assert ids(made, text) == ids(proto, text), text


# Hugging Face's files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer_proto())
    return tmp_path


def add(folder, **tokens):
    (folder / "added_tokens.json").write_text(json.dumps(tokens))


def test_added_tokens_of_a_wrong_type_are_put_right(folder):
    right = tiny_tokenizer_proto()
    number = ids(right, "<end_of_turn>")[0]
    wrong = changed(right, **{"<end_of_turn>": NORMAL})
    (folder / "tokenizer.model").write_bytes(wrong)
    add(folder, **{"<end_of_turn>": number})
    assert ids(folder_vocabulary(folder, 700), "<end_of_turn>") == [number]


def test_ids_that_no_token_has_are_left_out(folder):
    """As in Gemma 3n: `<image_soft_token>` is 262145, `<audio_soft_token>` 262273."""
    size = tiny_tokenizer("gemma3").vocabulary_size()
    add(folder, **{"<late>": size + 9})
    proto = folder_vocabulary(folder, size + 20)
    assert ids(proto, "<late>") == [size + 9]
    assert SentencePieceProcessor(model_proto=proto).is_unused(size + 8)
    with pytest.raises(LoadError, match=rf"'<late>' is token {size + 9}, and the embedding has"):
        folder_vocabulary(folder, size + 9)
    add(folder, **{"<audio_soft_token_2>": size + 9})  # of media, and has no row: no text needs it
    assert folder_vocabulary(folder, size) == tiny_tokenizer_proto()


def test_a_token_does_not_take_the_place_of_text(folder):
    pieces = sentencepiece_messages().ModelProto.FromString(tiny_tokenizer_proto()).pieces
    number, piece = next((n, p.piece) for n, p in enumerate(pieces) if p.type == NORMAL)
    add(folder, **{"<new>": number})
    with pytest.raises(LoadError) as caught:
        folder_vocabulary(folder, 700)
    assert caught.value.problems == (f"'<new>' is token {number}, {piece!r} in it",)
