"""The command line calls the public functions, and tells of errors without a traceback."""

import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.__main__ import main


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "preset"
    gkt.save_preset(testing.tiny_model("gemma3"), path)
    return str(path)


def test_export_writes_what_its_name_says(preset, tmp_path, capsys):
    assert main(["export", preset, str(tmp_path / "m.gguf"), "--quiet"]) == 0
    assert (tmp_path / "m.gguf").is_file()
    folder = tmp_path / "hf"
    assert main(["export", preset, str(folder), "--dtype", "bfloat16", "--quiet"]) == 0
    assert (folder / "model.safetensors").is_file()
    assert capsys.readouterr().out.split() == [str(tmp_path / "m.gguf"), str(folder)]


def test_export_merges_an_adapter(preset, tmp_path):
    import numpy as np

    from gemma_keras_tune.exporting._weights import merged_weights
    from gemma_keras_tune.lora import get_factors, lora_linears, set_factors

    model = gkt.load(preset)
    gkt.enable_lora(model, rank=2)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, np.ones_like(b))
    gkt.save_adapter(model, tmp_path / "adapter")
    arguments = ["export", preset, str(tmp_path / "hf"), "--adapter", str(tmp_path / "adapter")]
    assert main([*arguments, "--quiet"]) == 0
    written = {w.path: value for w, value in merged_weights(gkt.load(str(tmp_path / "hf")))}
    for weight, value in merged_weights(model):
        np.testing.assert_array_equal(written[weight.path], value)


def test_an_error_is_printed_without_a_traceback(preset, tmp_path, capsys):
    assert main(["export", preset, str(tmp_path / "x"), "--format", "onnx", "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("error: `format` must be")
    assert main(["generate", str(tmp_path / "nothing"), "hello"]) == 1
    assert "nothing" in capsys.readouterr().err
