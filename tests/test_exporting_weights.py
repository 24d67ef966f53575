"""What leaves is the merged weight, whole numbers only, and never a code."""

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.exporting._weights import merged_weights
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


def test_quantized_layers_are_refused():
    model = testing.tiny_model("gemma3")
    model.backbone.transformer_layers[0].gating_ffw.quantize("int8")
    with pytest.raises(gkt.ExportError, match="int8"):
        next(merged_weights(model))
