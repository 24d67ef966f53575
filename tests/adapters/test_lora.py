"""LoRA on every family: shapes, switching, merging, refusals."""

import jax
import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import (
    ALL_TARGETS,
    get_factors,
    kernel_update,
    lora_linears,
    set_factors,
)
from gemma_keras_tune.gemma.families import backbone_inputs, family_of, fingerprint, to_matrix

IDS = np.arange(4, 20).reshape(2, 8)


def hidden(model):
    inputs = backbone_inputs(model.backbone, IDS, np.ones_like(IDS))
    return np.asarray(model.backbone(inputs))


def fill(model, seed=0):
    random = np.random.default_rng(seed)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, random.normal(0, 0.3, a.shape), random.normal(0, 0.3, b.shape))


@pytest.mark.slow
@pytest.mark.parametrize("family", testing.FAMILIES)
def test_on_off_merged_on_every_generation(family):
    model = testing.tiny_model(family)
    before, base = hidden(model), fingerprint(model)
    config = gkt.enable_lora(model, 3, alpha=6, verbose=0)
    assert set(config.target_modules) == set(ALL_TARGETS)
    assert config.parameters == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    np.testing.assert_array_equal(hidden(model), before)  # B is zero
    fill(model)
    tuned = hidden(model)
    assert np.abs(tuned - before).max() > 1e-2
    assert fingerprint(model) == base
    with gkt.lora_disabled(model):
        np.testing.assert_array_equal(hidden(model), before)
    np.testing.assert_array_equal(hidden(model), tuned)
    for linear in lora_linears(model):
        a, b, scale = get_factors(linear)
        assert a.shape[0] == b.shape[1] == 3 and scale == 2.0
        matrix = to_matrix(kernel_update(linear), linear.output_axes, linear.input_axes)
        np.testing.assert_allclose(matrix, scale * b @ a, atol=1e-5)
    gkt.merge_lora(model)
    np.testing.assert_allclose(hidden(model), tuned, atol=2e-4)
    assert gkt.lora_config(model) is None and len(model.trainable_variables) > 10


@pytest.mark.slow
@pytest.mark.parametrize("family", testing.FAMILIES)
def test_gradients_are_those_of_the_merged_kernel(family):
    model = testing.tiny_model(family)
    gkt.enable_lora(model, 3, alpha=6, verbose=0)
    fill(model)
    for linear in {linear.target: linear for linear in lora_linears(model)}.values():
        layer = linear.layer
        einsum = getattr(layer, "equation", "btx,xy->bty")
        source, kernel = einsum.split("->")[0].split(",")
        sizes = {"b": 2, "t": 3, "s": 3} | dict(zip(kernel, layer._kernel.shape, strict=True))
        x = np.random.default_rng(0).normal(size=[sizes[axis] for axis in source])

        def adapted(x, a, b, layer=layer):
            mapping = [(layer.lora_kernel_a, a), (layer.lora_kernel_b, b)]
            with keras.StatelessScope(state_mapping=mapping):
                return keras.ops.sum(keras.ops.sin(layer(x)))

        def merged(x, a, b, layer=layer, einsum=einsum):
            outputs = keras.ops.einsum(einsum, x, layer._kernel + 2.0 * keras.ops.matmul(a, b))
            return keras.ops.sum(keras.ops.sin(outputs))

        given = x.astype("float32"), layer.lora_kernel_a.value, layer.lora_kernel_b.value
        found = jax.grad(adapted, (0, 1, 2))(*given)
        for one, other in zip(found, jax.grad(merged, (0, 1, 2))(*given), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_remove_gives_the_base_back_and_lora_can_go_on_again():
    model = testing.tiny_model()
    before, trainable = hidden(model), len(model.trainable_variables)
    gkt.enable_lora(model, 2, verbose=0)
    fill(model)
    gkt.remove_lora(model)
    np.testing.assert_array_equal(hidden(model), before)
    assert len(model.trainable_variables) == trainable
    gkt.enable_lora(model, 4, target_modules=["query", "v_proj"], verbose=0)
    assert gkt.lora_config(model).target_modules == ("q_proj", "v_proj")


def test_keras_sees_the_merged_kernel():
    """The one place that leans on Keras's own names: this notices when they move."""
    model = testing.tiny_model()
    linear = family_of(model).linears(model)[0]
    kernel = np.asarray(linear.layer.kernel)
    gkt.enable_lora(model, 2, verbose=0)
    fill(model)
    assert isinstance(linear.layer, keras.layers.EinsumDense)
    merged = np.asarray(linear.layer.kernel)
    np.testing.assert_allclose(merged, kernel + kernel_update(lora_linears(model)[0]), atol=1e-6)
    store: dict[str, object] = {}
    linear.layer.save_own_variables(store)
    np.testing.assert_allclose(np.asarray(store["0"]), merged, atol=1e-6)


def test_rank_stabilized_scale():
    model = testing.tiny_model()
    config = gkt.enable_lora(model, 4, alpha=8, use_rslora=True, verbose=0)
    assert config.scale == 4.0
    assert get_factors(lora_linears(model)[0])[2] == pytest.approx(4.0)


def test_the_start_is_seeded():
    starts = []
    for seed in (0, 0, 1):
        model = testing.tiny_model()
        gkt.enable_lora(model, 2, seed=seed, verbose=0)
        starts.append(get_factors(lora_linears(model)[0])[0])
    np.testing.assert_array_equal(starts[0], starts[1])
    assert np.abs(starts[0] - starts[2]).max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "at least 1"),
        (dict(rank=2.0), "at least 1"),
        (dict(rank=True), "at least 1"),
        (dict(rank=2, alpha=-1), "positive"),
        (dict(rank=9999), "at most 8"),
        (dict(rank=2, target_modules=["q_proj", "nothing"]), "'nothing'"),
        (dict(rank=2, alpha="auto"), "positive"),
        (dict(rank=2, target_modules=[]), "empty"),
        (dict(rank=2, target_modules=5), "names of layers"),
        (dict(rank=2, target_modules=["q_proj", 5]), "names of layers"),
    ],
)
def test_settings_that_fit_nothing_are_refused(options, message):
    model = testing.tiny_model()
    with pytest.raises(gkt.errors.LoraError, match=message):
        gkt.enable_lora(model, verbose=0, **options)
    assert gkt.lora_config(model) is None
    assert all(v.trainable for v in family_of(model).linears(model)[0].layer.trainable_variables)


def test_groups_may_stand_among_names_and_numbers_may_be_numpy_ones():
    model = testing.tiny_model()
    config = gkt.enable_lora(
        model,
        np.int64(2),
        alpha=np.float32(4),
        target_modules=["attention", "gate_proj"],
        verbose=0,
    )
    assert config.target_modules == ("gate_proj", "k_proj", "o_proj", "q_proj", "v_proj")
    assert (config.rank, config.scale) == (2, 2.0)


def test_the_lora_of_keras_is_not_replaced():
    model = testing.tiny_model()
    model.backbone.enable_lora(2)
    factors = [v for v in model.trainable_variables if "lora" in v.name]
    for variable in factors:
        variable.assign(np.ones(variable.shape))
    with pytest.raises(
        gkt.errors.LoraError, match=r"(?s)Keras's own.*block_0/.*query.*block_1/.*anew"
    ):
        gkt.enable_lora(model, 2, target_modules=["o_proj"], verbose=0)
    assert factors and all((np.asarray(variable) == 1).all() for variable in factors)


def test_twice_is_refused_and_off_without_on_too():
    model = testing.tiny_model()
    with pytest.raises(gkt.errors.LoraError, match="not on this model"):
        gkt.merge_lora(model)
    gkt.enable_lora(model, 2, verbose=0)
    with pytest.raises(gkt.errors.LoraError, match="already on"):
        gkt.enable_lora(model, 2, verbose=0)


def test_what_trains_is_printed(capsys):
    gkt.enable_lora(testing.tiny_model(), 2)
    assert "parameters train" in capsys.readouterr().out
