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


@pytest.mark.slow
def test_export_writes_what_its_name_says(preset, tmp_path, capsys):
    assert main(["export", preset, str(tmp_path / "m.gguf"), "--quiet"]) == 0
    assert (tmp_path / "m.gguf").is_file()
    folder = tmp_path / "hf"
    assert main(["export", preset, str(folder), "--dtype", "bfloat16", "--quiet"]) == 0
    assert (folder / "model.safetensors").is_file()
    assert capsys.readouterr().out.split() == [str(tmp_path / "m.gguf"), str(folder)]


@pytest.mark.slow
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


@pytest.mark.slow
def test_test_says_by_its_exit_code_whether_the_plan_is_met(preset, tmp_path, capsys):
    plan = tmp_path / "plan.jsonl"
    case = '{"prompt": "Hello?", "kind": "success", "checks": [{"%s": %s}]}\n'
    plan.write_text(case % ("length", '{"max": 3, "unit": "tokens"}'))
    report = tmp_path / "report.json"
    arguments = ["test", preset, str(plan), "--quiet", "--max-new-tokens", "3"]
    assert main([*arguments, "--report", str(report)]) == 0
    assert "success  cannot tell" in capsys.readouterr().out
    assert gkt.Report.load(report).verdict == "cannot tell"
    assert main([*arguments, "--strict"]) == 1
    capsys.readouterr()
    plan.write_text(case % ("contains", '"no such words"') * 1 + case % ("exact", '"neither"'))
    assert main([*arguments, "--target", "1"]) == 1
    out, err = capsys.readouterr()
    assert "fail" in out and "success case 1" in err and "Traceback" not in err
    plan.write_text('{"prompt": "Hello?"}\n')
    assert main(arguments) == 1
    assert "row 1: `kind` is missing" in capsys.readouterr().err
