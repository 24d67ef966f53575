"""Beside older or other packages, as notebooks have them, what does not fit is told."""

import pathlib
import sys
import types

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.gemma.vocabularies import sentencepiece_messages
from gemma_keras_tune.generation.answers import Answer


def test_a_sentencepiece_for_a_newer_protobuf_is_named(monkeypatch):
    import sentencepiece
    from google.protobuf import runtime_version

    made = pathlib.Path(sentencepiece_messages().__file__).read_text(encoding="utf-8")
    if "ValidateProtobufRuntimeVersion" not in made:
        pytest.skip("this version of sentencepiece does not compare the versions")
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2")
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2")
    monkeypatch.setattr(runtime_version, "MAJOR", 4)
    with pytest.raises(gkt.GemmaTuneError, match=r'pip install "sentencepiece<0.2.3"'):
        sentencepiece_messages()


def test_a_tfds_that_is_an_empty_module_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", types.ModuleType("empty"))
    with pytest.raises(
        gkt.errors.PairsError, match=r"is not a file, and .*\n.*tensorflow-metadata<1.18"
    ):
        gkt.read_pairs("no_such_data_anywhere")
    (tmp_path / "features.json").write_text("{}")
    with pytest.raises(gkt.errors.PairsError, match=r"tensorflow-metadata<1.18"):
        gkt.read_pairs(tmp_path)


def test_answers_are_compared_by_the_values_of_their_ids():
    def answer(*ids):
        return Answer("text", np.array(ids, np.int32), True)

    assert answer(1, 2) == answer(1, 2)
    assert answer(1, 2) != answer(1, 3)
    assert answer(1, 2) != answer(1, 2, 3)
    assert answer(1) != "text"
