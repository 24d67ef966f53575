"""Exports held against their receipts, and opened in their own runtimes."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.__main__ import main
from gemma_keras_tune._support.files import sha256
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.exporting import verifying
from gemma_keras_tune.exporting.llama_cpp import NotRunError
from gemma_keras_tune.exporting.receipts import (
    FILE_NAME,
    NOT_CHECKED,
    FileRecord,
    Receipt,
    Recording,
    read_receipt,
    receipt_path,
)
from gemma_keras_tune.exporting.runtimes import Answered
from gemma_keras_tune.exporting.verifying import _compare, tolerance_of, verify


def tuned(family="gemma3", **sizes):
    model = testing.tiny_model(family, **sizes)
    gkt.enable_lora(model, rank=2, verbose=0)
    draw = np.random.default_rng(0)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, 0.3 * draw.normal(size=b.shape).astype("float32"))
    return model


@pytest.fixture(scope="module")
def model():
    return tuned(num_layers=1)


@pytest.fixture
def folder(model, tmp_path):
    """A Hugging Face folder of several shards, without recordings."""
    return gkt.export(model, tmp_path / "out", shard_size="20KB", check=False, verbose=0)


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# The files.


def test_what_was_written_passes(folder):
    verdict = verify(folder)
    assert verdict.passed and "as they were written" in str(verdict)
    assert any("no answers were recorded" in text for text in verdict.skipped)
    verdict.raise_if_failed()


def test_everything_that_changed_is_named_at_once(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 2
    flip(shards[0])
    shards[1].unlink()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "README.md").write_text("a model")
    verdict = verify(folder)
    found = {text.partition(":")[0]: text for text in verdict.problems}
    assert "its content changed" in found[shards[0].name]
    assert "it is missing" in found[shards[1].name]
    assert "2 bytes" in found["tokenizer.json"]
    assert "was not there" in found["pytorch_model.bin"]
    assert len(found) == 4
    with pytest.raises(gkt.errors.ExportError, match=shards[1].name):
        verdict.raise_if_failed()


def test_the_outcome_is_kept_in_the_receipt(folder):
    assert read_receipt(folder).verification == NOT_CHECKED
    verify(folder, update=False)
    assert read_receipt(folder).verification == NOT_CHECKED
    verify(folder)
    outcome = read_receipt(folder).verification
    assert outcome.status == "not run" and "as they were written" in outcome.checked[0]
    assert "no answers were recorded" in outcome.reasons[0]
    flip(folder / "config.json")
    verify(folder)
    failed = read_receipt(folder).verification
    assert failed.status == "failed" and failed.reasons[0].startswith("config.json: ")
    # What was found out is not replaced by what was not looked at.
    flip(folder / "config.json")
    verify(folder)
    assert read_receipt(folder).verification == failed
    assert not list(folder.glob(f".{FILE_NAME}*"))


def test_a_receipt_that_cannot_be_written_is_said(folder, monkeypatch):
    def refuse(*names):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(os, "replace", refuse)
    verdict = verify(folder)
    assert verdict.passed and "result was not written" in verdict.skipped[-1]
    assert not list(folder.glob(f".{FILE_NAME}*"))


def answers_of(receipt, **changes):
    return [
        Answered(
            **{"ids": one.ids, "answer_ids": one.answer_ids, "logits": one.top_logits} | changes
        )
        for one in receipt.recordings
    ]


@pytest.mark.slow
@pytest.mark.parametrize("save", [gkt.export, gkt.save_preset])
def test_a_check_at_once(save, model, tmp_path, monkeypatch):
    options = {"check": "run", "prompts": ["Hello!"]}
    if save is gkt.export:
        options |= {"verbose": 0, "shard_size": "20KB"}
    seen = []

    def answer(path, receipt, base=None):
        seen.append(path)
        return "a runtime 1.0", answers_of(receipt)

    monkeypatch.setattr(verifying, "ask", answer)
    outcome = read_receipt(save(model, tmp_path / "right", **options)).verification
    assert (outcome.status, outcome.runtime) == ("passed", "a runtime 1.0")
    # Before it takes its name.
    assert seen[0].name.startswith(".right.") and not seen[0].exists()

    monkeypatch.setattr(
        verifying, "ask", lambda path, receipt, base=None: ("x", answers_of(receipt, ids=(1,)))
    )
    with pytest.raises(gkt.errors.ExportError, match="token ids differ"):
        save(model, tmp_path / "wrong", **options)

    def nothing(path, receipt, base=None):
        raise NotRunError("transformers is not installed: pip install transformers torch")

    monkeypatch.setattr(verifying, "ask", nothing)
    with pytest.warns(UserWarning, match="pip install transformers torch"):
        kept = save(model, tmp_path / "kept", **options)
    assert read_receipt(kept).verification.status == "not run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "right"]


def test_checks_that_are_none(model, tmp_path):
    for save in (gkt.export, gkt.save_preset, gkt.save_adapter):
        with pytest.raises(gkt.errors.ExportError, match="`check` must be True, False or 'run'"):
            save(model, tmp_path / "out", check="yes")


def test_prompts_that_would_not_be_answered_are_refused(model, tmp_path):
    for save in (gkt.export, gkt.save_preset, gkt.save_adapter):
        with pytest.raises(gkt.errors.ExportError, match="`prompts` are answered only"):
            save(model, tmp_path / "out", prompts=["Hello!"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_adapter_is_checked_beside_itself(model, tmp_path):
    options = {"check": "run", "prompts": ["Hello!"]}
    path = gkt.save_adapter(model, tmp_path / "adapter", **options)
    outcome = read_receipt(path).verification
    assert outcome.status == "passed" and outcome.runtime.startswith("gemma_keras_tune")
    assert gkt.adapters.list(model) == ("default",) and gkt.adapters.active(model) == "default"


def test_a_lone_file(model, tmp_path):
    path = gkt.export(model, tmp_path / "x.gguf", check=False, verbose=0)
    assert verify(path).passed
    flip(path, 1000)
    assert verify(path).problems == ("x.gguf: its content changed",)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    config = folder / "config.json"
    (tmp_path / "outside.json").write_bytes(config.read_bytes())
    config.unlink()
    os.symlink(tmp_path / "outside.json", config)
    assert verify(folder).problems == ("config.json: it lies outside the folder",)


def test_the_command_line_returns_one_when_it_fails(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    assert "passed" in capsys.readouterr().out
    flip(folder / "config.json")
    assert main(["verify", str(folder), "--no-run"]) == 1
    assert "config.json: its content changed" in capsys.readouterr().err


# The answers.


def receipt_of(*recordings, **changes):
    file = FileRecord("x", 1, "0" * 64)
    receipt = Receipt(
        "safetensors", "float32", None, "float32", "gemma3", "", "", (), (), None, {}, (file,),
        recordings,
    )  # fmt: skip
    return dataclasses.replace(receipt, **changes)


ONE = Recording("a", (2, 9), (5, 6, 7), "x", False, (0.5, 1e-4, 0.5), (5, 8), (3.0, 2.5))


def compared(**changes):
    found = Answered(**{"ids": (2, 9), "answer_ids": (5, 6, 7), "logits": (3.0, 2.5)} | changes)
    return _compare(receipt_of(ONE), "a runtime", [found])[0]


def test_the_same_answers_pass():
    assert not compared()
    assert not compared(logits=(-1.0, -1.5))  # log-probabilities
    assert not compared(logits=None)


def test_other_answers_fail():
    assert "token ids differ from token 2 on: 9 recorded, 8 found" in compared(ids=(2, 8))[0]
    assert "logits differ by 0.01" in compared(logits=(3.0, 2.51))[0]
    assert "logits differ by inf" in compared(logits=(3.0, float("nan")))[0]
    assert "the answer's token ids differ from token 3 on" in compared(answer_ids=(5, 6, 1))[0]
    assert "nothing found" in compared(answer_ids=(5, 6))[0]


def test_two_tokens_as_good_as_each_other_may_be_exchanged():
    assert not compared(answer_ids=(5, 1, 1))


def test_the_coarsest_dtype_sets_the_tolerance():
    assert tolerance_of(receipt_of()) == 1e-3
    assert tolerance_of(receipt_of(compute_dtype="bfloat16")) == 0.5
    assert tolerance_of(receipt_of(quantization="Q4_0", format="gguf")) == 5
    assert tolerance_of(receipt_of(format="gguf")) == 0.05


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, options",
    [
        pytest.param("keras", {}),
        pytest.param("safetensors", {}, marks=needs("transformers", "torch")),
        pytest.param("gguf", {}, marks=needs("xllamacpp")),
        pytest.param("ollama", {"quantization": "Q8_0"}, marks=needs("xllamacpp")),
    ],
)
def test_the_runtime_answers_as_recorded(model, format, options, tmp_path):
    path = gkt.export(model, tmp_path / "out", format=format, check=True, verbose=0, **options)
    verdict = verify(path)
    assert verdict.passed, verdict
    assert not verdict.skipped and any("logits differ" in text for text in verdict.checks)


@pytest.mark.slow
@needs("xllamacpp")
def test_other_weights_under_a_true_receipt_are_found_out(model, tmp_path):
    path = gkt.export(model, tmp_path / "x.gguf", check=True, verbose=0)
    other = gkt.export(testing.tiny_model("gemma3", num_layers=1, seed=5), tmp_path / "y.gguf",
                       check=False, verbose=0)  # fmt: skip
    other.replace(path)
    receipt = tmp_path / f"x.gguf.{FILE_NAME}"
    data = json.loads(receipt.read_text())
    data["files"][0] |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    receipt.write_text(json.dumps(data))
    assert any("logits differ" in text for text in verify(path).problems)


@pytest.mark.slow
def test_an_adapter_is_put_on_its_base(model, tmp_path):
    path = gkt.save_adapter(model, tmp_path / "adapter", check=True)
    assert "pass the model it belongs on" in verify(path).skipped[0]
    base = testing.tiny_model("gemma3", num_layers=1)
    verdict = verify(path, base=base)
    assert verdict.passed and not verdict.skipped, verdict
    assert gkt.lora_config(base) is None and gkt.template_of(base) is None


def with_recording(path, **changes):
    """Let a receipt say that answers were recorded."""
    receipt = dataclasses.replace(read_receipt(path), recordings=(ONE,), **changes)
    receipt_path(path).write_text(receipt.to_json())
    return path


def test_a_base_that_cannot_be_one_is_told_apart_from_a_broken_adapter(model, tmp_path):
    path = with_recording(gkt.save_adapter(model, tmp_path / "adapter"))
    stock = testing.tiny_model("gemma3", num_layers=1)
    stock.backbone.enable_lora(2)
    (tmp_path / "gemma2").mkdir()
    (tmp_path / "gemma2" / "config.json").write_text('{"model_type": "gemma2"}')
    for base, words in (
        (tmp_path / "nowhere", "There is no file or folder"),
        (7, "must be a name"),
        (testing.tiny_model("gemma2", num_layers=1), "trained on gemma3. Received: gemma2"),
        (tmp_path / "gemma2", "trained on gemma3. Received: gemma2"),
        (testing.tiny_model("gemma3", num_layers=1, seed=3), "has other weights"),
        (stock, "Keras's own LoRA is on it"),
    ):
        with pytest.raises(gkt.errors.ExportError, match=r"^`base`: ") as caught:
            verify(path, base=base)
        assert words in str(caught.value)
    assert read_receipt(path).verification == NOT_CHECKED


@needs("xllamacpp")
def test_a_base_of_a_gguf_adapter_is_a_gguf_file_of_its_generation(model, tmp_path):
    options = {"check": False, "verbose": 0}
    path = gkt.export(model, tmp_path / "adapter", format="gguf_adapter", **options)
    with_recording(path)
    lone = with_recording(
        gkt.export(model, tmp_path / "lora.gguf", format="gguf_adapter", **options)
    )
    other = gkt.export(testing.tiny_model("gemma2"), tmp_path / "2.gguf", **options)
    (tmp_path / "text").write_text("no model")
    for base, words in (
        (tmp_path / "nowhere", "there is no file or folder"),
        (model, "is a GGUF file. Received: <Gemma3CausalLM"),
        (tmp_path, "must hold one .gguf file. Found: 2"),
        (tmp_path / "text", "not a sound GGUF file"),
        (lone, "holds no model, but: 'adapter'"),
        (other, "trained on gemma3. Received: gemma2"),
    ):
        for adapter in (path, lone):
            with pytest.raises(gkt.errors.ExportError, match=r"^`base`") as caught:
                verify(adapter, base=base)
            assert words in str(caught.value)
    assert read_receipt(path).verification == read_receipt(lone).verification == NOT_CHECKED


def test_receipts_of_what_was_not_written_are_refused(model, tmp_path):
    with pytest.raises(gkt.errors.ExportError, match=r"There is no file or folder .*nowhere"):
        verify(tmp_path / "nowhere")
    path = with_recording(gkt.save_adapter(model, tmp_path / "adapter"), format="nothing")
    with pytest.raises(
        gkt.errors.ExportError, match=r"format must be one of .* Received: 'nothing'"
    ):
        verify(path)
    with_recording(path, format="gguf_adapter")
    with pytest.raises(gkt.errors.ExportError, match=r"must name one \.gguf file\. Found: 0"):
        verify(path)


@pytest.mark.slow
def test_a_runtime_that_is_not_installed_is_named(model, tmp_path):
    path = gkt.export(model, tmp_path / "out", check=True, verbose=0)
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here', name='torch')")
    code = (
        "import sys, gemma_keras_tune as gkt\n"
        "from gemma_keras_tune.exporting.verifying import verify\n"
        "print(verify(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "pip install transformers torch" in done.stdout and "passed" in done.stdout
