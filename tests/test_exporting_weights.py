"""What leaves is the merged weight, whole numbers only, and never a code."""

import json

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.exporting._weights import DTYPES, merged_weights
from gemma_keras_tune.families import family_of
from gemma_keras_tune.lora import get_factors, lora_linears, set_factors


def test_lora_is_added_on_or_off_and_merged_alike():
    model = testing.tiny_model("gemma3")
    gkt.enable_lora(model, rank=2)
    draw = np.random.default_rng(0)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, draw.normal(size=b.shape).astype("float32"))
    on = {weight.path: value for weight, value in merged_weights(model)}
    with gkt.lora_disabled(model):
        off = {weight.path: value for weight, value in merged_weights(model)}
    gkt.merge_lora(model)
    merged = {weight.path: value for weight, value in merged_weights(model)}
    plain = {w.path: v for w, v in merged_weights(testing.tiny_model("gemma3"))}
    changed = [path for path in plain if np.abs(on[path] - plain[path]).max() > 0]
    assert len(changed) == 7 * len(model.backbone.transformer_layers)
    for path, value in merged.items():
        np.testing.assert_array_equal(on[path], value)
        np.testing.assert_array_equal(off[path], value)


def test_broken_weights_are_all_named():
    model = testing.tiny_model("gemma3")
    for index in (0, 1):
        scale = model.backbone.transformer_layers[index].pre_ffw_norm.scale
        scale.assign(np.full(scale.shape, np.nan))
    with pytest.raises(gkt.ExportError) as caught:
        next(merged_weights(model))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "format", ["keras", "safetensors", "gguf", "gguf_adapter", "ollama", "gemma_jax"]
)
def test_no_target_takes_nan(format, tmp_path):
    if format == "gemma_jax":
        pytest.importorskip("orbax.checkpoint")
    model = testing.tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, rank=2, targets=["q_proj"])
    (linear,) = lora_linears(model)
    a, b, _ = get_factors(linear)
    set_factors(linear, a, np.full_like(b, np.nan))
    with pytest.raises(gkt.ExportError, match="attention/query: its LoRA"):
        gkt.export(model, tmp_path / "out", format=format, check=False, verbose=0)
    set_factors(linear, a, b)
    scale = model.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, np.inf))
    with pytest.raises(gkt.ExportError, match="NaN or infinite values\\.\n  - layer_norm"):
        gkt.export(model, tmp_path / "out", format=format, check=False, verbose=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gemma3n"])
def test_int8_leaves_as_the_floats_it_stands_for(family):
    model = testing.tiny_model(family)
    before = {weight.path: value for weight, value in merged_weights(model)}
    # `model.backbone.quantize` does this for every layer, and builds the graph again.
    layers = {weight.path: weight.layer for weight in family_of(model).weights(model)}
    for path, layer in layers.items():
        if path.startswith("decoder_block_0") and hasattr(layer, "kernel_initializer"):
            layer.quantize("int8")
    changed = 0
    for weight, value in merged_weights(model):
        original = weight.to_matrix(before[weight.path])
        if "int8" not in str(weight.variable.dtype):
            np.testing.assert_array_equal(value, before[weight.path])
            continue
        step = np.abs(original).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(weight.to_matrix(value) - original) <= 0.51 * step), weight.path
        changed += 1
    assert changed >= {"gemma3": 7, "gemma3n": 14}[family]


@pytest.mark.slow
def test_an_int8_model_is_exported_in_floats(tmp_path):
    model = testing.tiny_model("gemma3", num_layers=1)
    block = model.backbone.transformer_layers[0]
    block.gating_ffw.quantize("int8")
    model.backbone.token_embedding.quantize("int8")
    values = {weight.path: value for weight, value in merged_weights(model)}
    for name in ("hf", "x.gguf", "jax"):
        options = {"format": "gemma_jax"} if name == "jax" else {}
        gkt.export(model, tmp_path / name, dtype="float32", check=False, verbose=0, **options)
        for weight, value in merged_weights(gkt.load(str(tmp_path / name))):
            np.testing.assert_allclose(value, values[weight.path], atol=1e-6)


@pytest.mark.slow
def test_other_quantizations_are_refused():
    model = testing.tiny_model("gemma3", num_layers=1)
    model.backbone.transformer_layers[0].gating_ffw.quantize("int4")
    with pytest.raises(gkt.ExportError, match="decoder_block_0/gating_ffw: int4"):
        next(merged_weights(model))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_half_precision_policies_export_what_they_hold(policy, tmp_path):
    import keras

    keras.config.set_dtype_policy(policy)
    try:
        model = testing.tiny_model("gemma3", num_layers=1)
    finally:
        keras.config.set_dtype_policy("float32")
    gkt.enable_lora(model, rank=2, targets="attention")
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, np.full(b.shape, 0.1, "float32"))
    held = {"mixed_bfloat16": "float32", "bfloat16": "bfloat16"}[policy]
    values = {weight.path: value for weight, value in merged_weights(model)}
    for name, tolerance in {"hf": 0, "x.gguf": 1e-2}.items():
        gkt.export(model, tmp_path / name, check=False, verbose=0)
        for weight, value in merged_weights(gkt.load(str(tmp_path / name), dtype="float32")):
            expected = np.asarray(values[weight.path]).astype(DTYPES[held]).astype("float32")
            np.testing.assert_allclose(value, expected, atol=tolerance, err_msg=weight.path)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == held
