"""The private parts of Keras that LoRA needs are where they were: these fail when they move."""

import keras
import numpy as np
import pytest

from gemma_keras_tune import testing
from gemma_keras_tune.adapters import _keras
from gemma_keras_tune.gemma.families import stored_kernel


class _Einsum(keras.layers.EinsumDense):
    pass


class _Dense(keras.layers.Dense):
    pass


STOCK = {
    keras.layers.EinsumDense: (
        _Einsum,
        lambda: keras.layers.EinsumDense("btd,nkd->btnk", (None, 2, 3)),
    ),
    keras.layers.Dense: (_Dense, lambda: keras.layers.Dense(3)),
}


@pytest.mark.parametrize("stock", STOCK)
def test_a_built_layer_takes_factors_and_is_again_as_it_was(stock):
    carrier, make = STOCK[stock]
    layer = make()
    layer.build((1, 2, 4))
    before, kernel = [v.path for v in layer.variables], np.asarray(layer.kernel)
    _keras.add_factor_weights(layer, carrier, (4, 1), (1, 3))
    assert type(layer) is carrier and layer.lora_kernel_b.shape == (1, 3)
    factors = [v for v in layer.trainable_variables if v.path not in before]
    assert {id(v) for v in factors} == {id(layer.lora_kernel_a), id(layer.lora_kernel_b)}
    with pytest.raises(ValueError, match="cannot add"):
        layer.more = layer.add_weight(name="more", shape=(1,))
    np.testing.assert_array_equal(np.asarray(stored_kernel(layer)), kernel)
    _keras.remove_factor_weights(layer, stock)
    assert type(layer) is stock and [v.path for v in layer.variables] == before
    assert layer.lora_kernel_a is None and layer.lora_kernel_b is None


@pytest.mark.parametrize("stock", STOCK)
def test_keras_keeps_its_own_lora_under_these_names(stock):
    layer = STOCK[stock][1]()
    layer.build((1, 2, 4))
    assert (layer.lora_enabled, layer.lora_rank) == (False, None)
    layer.enable_lora(1, lora_alpha=2)
    assert layer.lora_enabled and (layer.lora_rank, layer.lora_alpha) == (1, 2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    merged, kernel = np.asarray(layer.kernel), np.asarray(stored_kernel(layer))
    assert np.abs(merged - kernel).max() > 0


def test_the_layers_of_a_backbone_are_counted_as_keras_hub_counts_them(tmp_path):
    import h5py

    model = testing.tiny_model("gemma3")
    layers = _keras.layers_with_weights(model.backbone)
    model.backbone.enable_lora(2)
    model.backbone.save_lora_weights(str(tmp_path / "sample.lora.h5"))
    with h5py.File(tmp_path / "sample.lora.h5") as file:
        numbers = [int(number) for number in file["lora"] if number != "vars"]
    assert numbers and all(layers[number].lora_enabled for number in numbers)
