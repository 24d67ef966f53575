"""Files for LiteRT: what is refused, and what LiteRT-LM itself answers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from _litert_stub import LAY_DOWN
from _paths import RUNTIMES

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.exporting.receipts import read_receipt
from gemma_keras_tune.formats.litert import writer as litert_writer
from gemma_keras_tune.formats.weights import merged_weights

# The converter and the runtime may stand in an environment of their own: name its Python here.
PYTHON = os.environ.get(litert_writer.PYTHON_VARIABLE, sys.executable)
PROBE = "import litert_lm, litert_torch"


def test_what_cannot_be_converted_is_refused(tmp_path, monkeypatch):
    model = testing.tiny_model("gemma3", num_layers=1)
    with pytest.raises(gkt.ExportError, match=r"float32\. Received: dtype='bfloat16'"):
        gkt.export(model, tmp_path / "x", format="litert", dtype="bfloat16", verbose=0, check=False)
    with pytest.raises(gkt.ExportError, match="Gemma 2 is not written for LiteRT"):
        gkt.export(
            testing.tiny_model("gemma2"), tmp_path / "x", format="litert", verbose=0, check=False
        )
    monkeypatch.setenv(litert_writer.PYTHON_VARIABLE, str(tmp_path / "no-python"))
    with pytest.raises(gkt.ExportError, match="no-python cannot be run"):
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
    monkeypatch.setattr(litert_writer, "_CONVERT", code)
    monkeypatch.delenv(litert_writer.PYTHON_VARIABLE, raising=False)
    model = testing.tiny_model("gemma3", num_layers=1)
    with pytest.raises(gkt.ExportError, match=message):
        gkt.export(model, tmp_path / "x", format="litert", verbose=0, check=False)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def laid_down(tmp_path, monkeypatch):
    monkeypatch.setattr(litert_writer, "_CONVERT", LAY_DOWN)
    monkeypatch.delenv(litert_writer.PYTHON_VARIABLE, raising=False)
    model = testing.tiny_model("gemma3", num_layers=2)
    gkt.enable_lora(model, rank=2)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, np.random.default_rng(0).normal(size=b.shape).astype("float32"))
    folder = gkt.export(model, tmp_path / "out", format="litert", verbose=0, check=False)
    return model, folder


def assert_same(again, model):
    theirs = {weight.path: value for weight, value in merged_weights(again)}
    for weight, value in merged_weights(model):
        np.testing.assert_array_equal(theirs.pop(weight.path), value, err_msg=weight.path)
    assert not theirs


def test_what_was_written_loads_again(laid_down):
    model, folder = laid_down
    places = json.loads((folder / "gemma_keras_tune.json").read_text())["litert_weights"]
    assert len(places) == 2 * 7 + 1
    again = gkt.load(folder, dtype="float32")
    assert_same(again, model)
    assert gkt.template_of(again) == gkt.template_of(model)


def test_a_record_that_lies_is_refused(laid_down):
    _, folder = laid_down
    file = folder / "gemma_keras_tune.json"
    record = json.loads(file.read_text())

    def error(change):
        lie = json.loads(json.dumps(record))
        change(lie)
        file.write_text(json.dumps(lie))
        with pytest.raises(gkt.LoadError) as caught:
            gkt.load(folder)
        return str(caught.value)

    assert "10000000 layers" in error(lambda lie: lie["backbone"].update(num_layers=10_000_000))
    assert "beyond the end" in error(lambda lie: lie["backbone"].update(hidden_dim=2**24))
    name = "model.layers.1.mlp.up_proj.weight"
    assert "beyond the end" in error(lambda lie: lie["litert_weights"].update({name: 10**15}))
    assert "is missing" in error(lambda lie: lie["litert_weights"].update({name: -1}))
    assert f"{name} is missing" in error(lambda lie: lie["litert_weights"].pop(name))
    assert "x is no weight" in error(lambda lie: lie["litert_weights"].update(x=1))
    assert "is missing" in error(lambda lie: lie.pop("litert_weights"))
    file.write_text(json.dumps(record))
    (folder / "aside.safetensors").write_bytes(b"broken")
    with pytest.raises(gkt.LoadError, match="cannot be read back"):
        gkt.load(folder)
    (folder / "aside.safetensors").unlink()
    with pytest.raises(gkt.LoadError, match=r"aside\.safetensors is missing"):
        gkt.load(folder)


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
    command = [PYTHON, script, folder / litert_writer.FILE_NAME, tmp_path / "asked.json"]
    subprocess.run([*command, tmp_path / "found.json"], check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    tokenizer = model.preprocessor.tokenizer
    assert found["bos"] == 2
    for stop in (1, *template.stop_token_ids(tokenizer)):
        assert [stop] in found["stops"]
    assert found["ids"] == [np.asarray(tokenizer(prompt)).tolist() for prompt in prompts]
    assert found["texts"] == gkt.generate(model, [question for question, _ in pairs])

    assert_same(gkt.load(folder), model)
    assert read_receipt(folder).dtype == "float32"
    verdict = gkt.verify(folder)
    assert verdict.passed and "LiteRT-LM" in str(verdict), str(verdict)
    receipt = json.loads((folder / "receipt.json").read_text())
    recorded = receipt["recordings"][1]
    recorded |= {"answer": "something else", "answer_ids": [7] * len(recorded["answer_ids"])}
    (folder / "receipt.json").write_text(json.dumps(receipt))
    assert not gkt.verify(folder).passed
