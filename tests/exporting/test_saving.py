"""Presets and adapters: what is saved loads, fits, and is refused where it does not."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from _quantized import quantize
from safetensors.numpy import load_file, save_file

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.bases import base_record, wrong_base
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.gemma.families import backbone_inputs
from gemma_keras_tune.gemma.state import mark_origin
from gemma_keras_tune.gemma.templates import attach_template, get_template, template_of

IDS = np.arange(4, 20).reshape(2, 8)


def hidden(model):
    inputs = backbone_inputs(model.backbone, IDS, np.ones_like(IDS))
    return np.asarray(model.backbone(inputs))


def tuned(family="gemma3", rank=2, **options):
    model = testing.tiny_model(family)
    gkt.enable_lora(model, rank, verbose=0, **options)
    random = np.random.default_rng(0)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, random.normal(0, 0.3, a.shape), random.normal(0, 0.3, b.shape))
    attach_template(model, get_template(model, "Q: {prompt}\nA: {response}"))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved adapter, to be copied before it is changed."""
    return gkt.save_adapter(tuned(), tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture(scope="module")
def tiny():
    """A model without LoRA, for adapters that are refused."""
    return testing.tiny_model()


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=pytest.mark.slow) for family in testing.FAMILIES],
)
def test_an_adapter_comes_back_exactly(family, tmp_path):
    model = tuned(family, alpha=6, use_rslora=True)
    folder = gkt.save_adapter(model, tmp_path / "adapter")
    fresh = testing.tiny_model(family)
    config = gkt.load_adapter(fresh, folder)
    np.testing.assert_array_equal(hidden(fresh), hidden(model))
    assert config == gkt.lora_config(model)
    assert template_of(fresh).to_config() == template_of(model).to_config()


def test_the_layout_is_peft_at_the_rank_asked_for(tmp_path):
    folder = gkt.save_adapter(tuned(rank=3), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (3, 16)
    assert tensors[name.format("B")].shape == (32, 3)
    assert len(tensors) == 2 * 7 * 2
    record = json.loads((folder / "gemma_keras_tune.json").read_text())
    assert record["family"] == "gemma3" and record["stop_tokens"]


@pytest.mark.slow
def test_a_preset_loads_without_this_library_and_answers_the_same(tmp_path):
    model = tuned()
    prompt = "part number for cake"
    expected = model.generate(prompt, max_length=24)
    before = hidden(model)
    folder = gkt.save_preset(model, tmp_path / "preset")
    np.testing.assert_array_equal(hidden(model), before)
    assert gkt.lora_config(model) is not None
    code = (
        "import sys, keras_hub\n"
        f"model = keras_hub.models.CausalLM.from_preset({str(folder)!r})\n"
        "assert 'gemma_keras_tune' not in sys.modules\n"
        f"print(repr(model.generate({prompt!r}, max_length=24)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == repr(expected)


def refused(folder, model):
    def state():
        return {weight.path: np.array(weight) for weight in model.weights}

    before = state()
    with pytest.raises(gkt.errors.AdapterError) as caught:
        gkt.load_adapter(model, folder)
    np.testing.assert_equal(state(), before)
    return str(caught.value)


@pytest.mark.slow
def test_every_mismatch_is_listed_and_nothing_changes(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    other = testing.tiny_model("gemma3", seed=1)
    message = refused(folder, other)
    assert "its base has other weights" in message and "check_base=False" in message
    assert gkt.load_adapter(other, folder, check_base=False).rank == 2
    message = refused(folder, testing.tiny_model("gemma2"))
    assert "trained on gemma3, this is gemma2" in message and "other weights" in message
    model = testing.tiny_model("gemma3", num_query_heads=2)
    gkt.enable_lora(model, 4, verbose=0)
    message = refused(folder, model)
    assert message.count("q_proj.lora_B") == 2 and message.count("o_proj.lora_A") == 2
    assert "weights" in message and "remove_lora" in message


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes"), [("gemma3", {"num_layers": 1}), ("gemma3n", {})])
def test_a_base_is_known_in_every_dtype_and_quantization(family, sizes, tmp_path):
    trained_on = testing.tiny_model(family, **sizes)
    record = base_record(trained_on)
    others = {}
    for kind in ("bfloat16", "float16", "mixed_bfloat16", "int8", "int4"):
        quantized = kind.startswith("int")
        others[kind] = testing.tiny_model(family, dtype=None if quantized else kind, **sizes)
        if quantized:
            quantize(others[kind].backbone, kind)
        assert wrong_base(others[kind], record) is None, kind
        assert wrong_base(trained_on, base_record(others[kind])) is None, kind
    for kind in ("float32", "bfloat16"):
        other = testing.tiny_model(family, seed=1, dtype=kind, **sizes)
        assert "other weights" in wrong_base(other, record)
        assert "other weights" in wrong_base(other, base_record(others["int4"]))
    gkt.enable_lora(trained_on, 2, verbose=0)
    for linear in lora_linears(trained_on):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, np.ones_like(b))
    assert base_record(trained_on) == record
    folder = gkt.save_adapter(trained_on, tmp_path / "adapter")
    for kind in ("bfloat16", "int8"):
        assert gkt.load_adapter(others[kind], folder).rank == 2


@pytest.mark.parametrize("key", ["base_sample", "base_tolerance"])
@pytest.mark.parametrize("value", [None, 3, "", "AAAA", "????", float("nan"), 1e9, [], {"a": 1}])
def test_a_broken_sample_opens_no_door(tiny, key, value):
    record = base_record(testing.tiny_model(seed=1)) | {key: value}
    assert wrong_base(tiny, record) is not None


def test_a_record_of_the_first_version_is_still_read(saved, tiny, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    path = folder / "gemma_keras_tune.json"
    record = json.loads(path.read_text())
    del record["base_sample"], record["base_tolerance"]
    path.write_text(json.dumps(record))
    assert gkt.load_adapter(testing.tiny_model(), folder).rank == 2
    path.write_text(json.dumps(record | {"base_fingerprint": "0" * 16}))
    assert "fingerprint" in refused(folder, tiny)


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_is_known_in_both_dtypes():
    record = base_record(gkt.load("package://gemma3_270m", dtype="float32"))
    bfloat16 = gkt.load("package://gemma3_270m", dtype="bfloat16")
    assert bfloat16.dtype == "bfloat16" and wrong_base(bfloat16, record) is None


def test_another_name_of_a_base_is_warned_of_and_ours_is_one_peft_can_open(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    (folder / "gemma_keras_tune.json").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["base_model_name_or_path"] is None
    path.write_text(json.dumps(config | {"base_model_name_or_path": "unsloth/gemma-3-270m"}))
    model = testing.tiny_model()
    mark_origin(model, "hf://google/gemma-3-270m", None)
    gkt.load_adapter(model, folder)
    mark_origin(model, "hf://google/gemma-3-270m-it", None)
    with pytest.warns(UserWarning, match=r"names unsloth/gemma-3-270m .*came from google/"):
        gkt.load_adapter(model, folder)
    for source, name in {"hf://google/gemma-3-270m-it": "google/gemma-3-270m-it",
                         "package://gemma3_270m": None, "gemma3_270m": None}.items():  # fmt: skip
        mark_origin(model, source, None)
        again = gkt.save_adapter(model, tmp_path / "again", overwrite=True)
        config = json.loads((again / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("modules_to_save", ["embed_tokens"]),
        ("bias", "all"),
        ("peft_type", "IA3"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(saved, tiny, tmp_path, key, value):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert key in refused(folder, tiny)


def test_broken_files_are_refused(saved, tiny, tmp_path):
    model = tiny
    assert "is missing" in refused(tmp_path, model)
    folder = shutil.copytree(saved, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, weights)
    assert name in refused(folder, model)
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    assert "only one of its two factors" in refused(folder, model)
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be read" in refused(folder, model)
    (folder / "adapter_config.json").write_text("[]")
    assert "adapter_config.json cannot be read" in refused(folder, model)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"base_fingerprint": {"a": 1}}', None])
def test_a_broken_record_is_refused(saved, tiny, tmp_path, text):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    record = folder / "gemma_keras_tune.json"
    if text is None:
        record.unlink()
        record.mkdir()
    else:
        record.write_text(text)
    refused(folder, tiny)
    assert gkt.adapters.list(tiny) == ()


@pytest.mark.parametrize(
    "template",
    [3, {"kind": []}, {"kind": "text", "text": 3}, {"kind": "function", "function": "f"}],
)
def test_a_template_that_cannot_be_used_is_left_out(saved, tmp_path, template):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    (folder / "gemma_keras_tune.json").write_text(json.dumps({"template": template}))
    model = testing.tiny_model()
    with pytest.warns(UserWarning, match="its template is left out"):
        gkt.load_adapter(model, folder)
    assert template_of(model) is None


def test_without_lora_there_is_nothing_to_save(tmp_path):
    with pytest.raises(gkt.errors.AdapterError, match="LoRA is not on"):
        gkt.save_adapter(testing.tiny_model(), tmp_path / "adapter")


def test_an_existing_folder_is_kept_unless_asked_and_whole_after_a_failure(tmp_path, monkeypatch):
    model = tuned()
    folder = gkt.save_adapter(model, tmp_path / "adapter")
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(gkt.errors.ExportError, match="already exists"):
        gkt.save_adapter(model, folder)
    monkeypatch.setattr(
        pathlib.Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(gkt.errors.ExportError, match="the disk is full"):
        gkt.save_adapter(model, folder, overwrite=True)
    monkeypatch.undo()
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    gkt.save_adapter(tuned(rank=3), folder, overwrite=True)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
