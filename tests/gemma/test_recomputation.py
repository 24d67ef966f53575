"""Recomputed blocks: the same loss and gradients with less memory, and the model left as it was."""

import jax
import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import lora_linears
from gemma_keras_tune.gemma.families import backbone_inputs, decoder_blocks
from gemma_keras_tune.gemma.recomputation import recomputed

FAMILIES = ["gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4 moe"]


def with_lora(name, **sizes):
    family, _, moe = name.partition(" ")
    model = testing.tiny_model(family, moe=bool(moe), **sizes)
    gkt.enable_lora(model, 2, verbose=0)
    for linear in lora_linears(model):  # B at zero would hide half of the gradients
        b = linear.layer.lora_kernel_b
        b.assign(np.random.default_rng(1).normal(0, 0.3, b.shape))
    return model


def program(model, length=16, *, again):
    """Compiled: the trainable and the other values in; loss, gradients and the others out."""
    ids = np.random.default_rng(0).integers(4, 500, (2, length), "int32")
    inputs = backbone_inputs(model.backbone, ids, np.ones_like(ids))

    def loss(trainable, others):
        layers = decoder_blocks(model) if again else []
        with recomputed(layers):
            hidden, others = model.backbone.stateless_call(trainable, others, inputs, training=True)
        return (hidden**2 * np.linspace(0, 1, hidden.shape[-1])).mean(), others

    values = [[v.value for v in group] for group in groups(model)]
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*values).compile()
    return compiled, values


def groups(model):
    return model.backbone.trainable_variables, model.backbone.non_trainable_variables


def assert_same(result, expected):
    (loss, others), gradients = result
    (expected_loss, expected_others), wanted = expected
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    whole = np.sqrt(sum(float((g**2).sum()) for g in wanted))
    gaps = [float(abs(a - b).max()) for a, b in zip(gradients, wanted, strict=True)]
    assert whole > 0 and max(gaps) <= 2e-6 * whole
    for state, wanted_state in zip(others, expected_others, strict=True):
        np.testing.assert_array_equal(state, wanted_state)


@pytest.mark.slow
def test_a_step_draws_the_same_noise_and_takes_less_memory():
    model = with_lora("gemma3", num_layers=5, dropout=0.4)
    plain, values = program(model, 128, again=False)
    again, _ = program(model, 128, again=True)
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (plain, again)]
    assert sizes[1] < 0.6 * sizes[0]
    first = plain(*values)
    assert_same(again(*values), first)
    (_, others), _ = first
    seeds = [old for old, v in zip(values[1], groups(model)[1], strict=True) if "seed" in v.path]
    assert len(seeds) >= 10
    (second, _), _ = again(values[0], others)
    assert abs(float(second) - float(first[0][0])) > 1e-4  # other noise in the next step


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_gradients(family):
    model = with_lora(family)
    model.trainable = True  # both of LoRA and of all that is below it
    plain, values = program(model, again=False)
    again, _ = program(model, again=True)
    assert_same(again(*values), plain(*values))


def test_blocks_are_left_as_they_were_also_after_an_error():
    blocks = decoder_blocks(testing.tiny_model("gemma3"))
    before = [type(block) for block in blocks]
    with pytest.raises(KeyboardInterrupt), recomputed(blocks):
        assert all(issubclass(type(b), k) for b, k in zip(blocks, before, strict=True))
        assert not set(map(type, blocks)) & set(before)
        raise KeyboardInterrupt
    assert [type(block) for block in blocks] == before


def test_flags_and_numbers_are_not_traced():
    class Flagged(keras.layers.Layer):
        def call(self, x, scale=1, training=False):
            return x * scale if training else x

    layer = Flagged()
    with recomputed([layer]):
        slope = jax.grad(lambda x: layer(x, scale=3, training=True).sum())(np.ones(2, "float32"))
    np.testing.assert_array_equal(slope, [3.0, 3.0])
