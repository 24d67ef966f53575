"""Files for LiteRT: what is refused, and what LiteRT-LM itself answers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from _paths import RUNTIMES

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.exporting.receipts import read_receipt
from gemma_keras_tune.formats import litert

# The converter and the runtime may stand in an environment of their own: name its Python here.
PYTHON = os.environ.get(litert.PYTHON_VARIABLE, sys.executable)
PROBE = "import litert_lm, litert_torch"


def test_what_cannot_be_converted_is_refused(tmp_path, monkeypatch):
    model = testing.tiny_model("gemma3", num_layers=1)
    with pytest.raises(gkt.errors.ExportError, match=r"float32\. Received: dtype='bfloat16'"):
        gkt.export(model, tmp_path / "x", format="litert", dtype="bfloat16", verbose=0, check=False)
    with pytest.raises(gkt.errors.ExportError, match="Gemma 2 is not written for LiteRT"):
        gkt.export(
            testing.tiny_model("gemma2"), tmp_path / "x", format="litert", verbose=0, check=False
        )
    monkeypatch.setenv(litert.PYTHON_VARIABLE, str(tmp_path / "no-python"))
    with pytest.raises(gkt.errors.ExportError, match="no-python cannot be run"):
        gkt.export(model, tmp_path / "x", format="litert", verbose=0, check=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('missing: litert_torch'); exit(3)", "missing: litert_torch(.|\n)*LITERT_PYTHON"),
        ("raise ValueError('no such op')", "failed(.|\n)*no such op"),
        ("pass", "made 0 .litertlm files"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(code, message, tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "_CONVERT", code)
    monkeypatch.delenv(litert.PYTHON_VARIABLE, raising=False)
    model = testing.tiny_model("gemma3", num_layers=1)
    with pytest.raises(gkt.errors.ExportError, match=message):
        gkt.export(model, tmp_path / "x", format="litert", verbose=0, check=False)
    assert list(tmp_path.iterdir()) == []


# In place of the converter: a file where it would lay one.
CONVERTED = "import pathlib, sys; (p := pathlib.Path(sys.argv[2])).mkdir(); "
CONVERTED += "(p / 'model.litertlm').write_bytes(b'LITERTLM')"


def test_what_was_converted_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "_CONVERT", CONVERTED)
    monkeypatch.delenv(litert.PYTHON_VARIABLE, raising=False)
    model = testing.tiny_model("gemma3", num_layers=1)
    folder = gkt.export(model, tmp_path / "out", format="litert", verbose=0, check=False)
    assert sorted(file.name for file in folder.iterdir()) == [
        "gemma_keras_tune.json", "model.litertlm", "receipt.json",
    ]  # fmt: skip
    (tmp_path / "other.tflite").write_bytes(b"TFL3")
    for path in (folder, folder / "model.litertlm", tmp_path / "other.tflite"):
        with pytest.raises(gkt.errors.LoadError, match="is made for LiteRT") as caught:
            gkt.load(path)
        assert "Load the model it was made of" in str(caught.value)


@pytest.mark.slow
def test_litert_lm_answers_as_the_model_in_memory(tmp_path):
    if subprocess.run([PYTHON, "-c", PROBE], capture_output=True, check=False).returncode:
        pytest.skip("litert-torch or litert-lm-api is missing; LITERT_PYTHON names another Python")
    model = testing.tiny_model("gemma3", num_layers=7)
    pairs = testing.tiny_pairs(4)
    gkt.tune(model, pairs, epochs=60, learning_rate=1e-2, verbose=0)
    asked = [question for question, _ in pairs]
    options = dict(check=True, prompts=asked, verbose=0)
    folder = gkt.export(model, tmp_path / "out", format="litert", **options)
    template = gkt.template_of(model)
    prompts = [
        "".join(
            s.text
            for s in template.segments([gkt.Message("user", question)], generation_prompt=True)
        )
        for question, _ in pairs
    ]
    (tmp_path / "asked.json").write_text(json.dumps({"texts": prompts}))
    script = RUNTIMES / "litert_twin.py"
    command = [PYTHON, script, folder / litert.FILE_NAME, tmp_path / "asked.json"]
    subprocess.run([*command, tmp_path / "found.json"], check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    tokenizer = model.preprocessor.tokenizer
    assert found["bos"] == 2
    for stop in (1, *template.stop_token_ids(tokenizer)):
        assert [stop] in found["stops"]
    assert found["ids"] == [np.asarray(tokenizer(prompt)).tolist() for prompt in prompts]
    assert found["texts"] == gkt.generate(model, [question for question, _ in pairs])

    assert read_receipt(folder).dtype == "float32"
    verdict = gkt.verify(folder)
    assert verdict.passed and "LiteRT-LM" in str(verdict), str(verdict)
    receipt = json.loads((folder / "receipt.json").read_text())
    recorded = receipt["recordings"][1]
    recorded |= {"answer": "something else", "answer_ids": [7] * len(recorded["answer_ids"])}
    (folder / "receipt.json").write_text(json.dumps(receipt))
    assert not gkt.verify(folder).passed
