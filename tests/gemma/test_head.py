"""The output head computes the logits of the model itself, for every family."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from gemma_keras_tune.gemma.families import FAMILIES, backbone_inputs, family_of
from gemma_keras_tune.gemma.head import soft_capped, soft_capped_and_slope
from gemma_keras_tune.testing import tiny_model

IDS = np.array([[2, 40, 41, 42, 43, 44]], "int32")


@pytest.fixture(params=[*FAMILIES, "gemma4 capped by the task"])
def model(request):
    family, _, by_task = request.param.partition(" ")
    if not by_task:
        return tiny_model(family)
    tiny = tiny_model(family, final_logit_soft_cap=None)
    return keras_hub.models.Gemma4CausalLM(
        backbone=tiny.backbone, preprocessor=tiny.preprocessor, final_logit_cap=3.0
    )


def test_logits_are_those_of_the_model(model):
    family = family_of(model)
    head = family.head(model)
    mask = ops.ones(IDS.shape, "int32")
    hidden = model.backbone(backbone_inputs(model.backbone, IDS, mask))
    logits = np.asarray(head.logits(hidden))
    if "padding_mask" in model.call_with_cache.__code__.co_varnames:
        cache = family.empty_cache(model, 1, IDS.shape[1])
        expected = model.call_with_cache(IDS, cache, 0, padding_mask=mask)[0]
    else:
        expected = model.call_with_cache(IDS, ops.stack(family.empty_cache(model, 1, 6), 1), 0)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    flat = hidden[0]
    few = head.token_logits(flat, np.array([7, 40]))
    np.testing.assert_allclose(few, logits[0][:, [7, 40]], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(head.largest(flat), logits[0].argmax(-1))


def test_logits_of_a_quantized_embedding_are_those_of_its_layer():
    model = tiny_model("gemma2")
    head = family_of(model).head(model)
    hidden = keras.random.normal((3, 16), seed=1)
    exact = np.asarray(head.logits(hidden))
    model.backbone.token_embedding.quantize("int8")
    rounded = np.asarray(family_of(model).head(model).logits(hidden))
    assert 0 < np.abs(rounded - exact).max() < 0.2


def test_the_slope_is_the_derivative_of_the_cap():
    import jax

    logits = ops.convert_to_tensor([-40.0, -1.0, 0.0, 5.0])
    capped, slope = soft_capped_and_slope(logits, 30.0)
    np.testing.assert_array_equal(capped, soft_capped(logits, 30.0))
    expected = jax.vmap(jax.grad(lambda x: soft_capped(x, 30.0)))(logits)
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    assert soft_capped_and_slope(logits, None) == (logits, None)
