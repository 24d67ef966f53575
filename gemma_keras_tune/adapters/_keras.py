"""The private parts of Keras that LoRA needs, all in one place.

Keras has no public way to choose LoRA's factorisation, nor to replace a layer inside a built model.
So a layer's class becomes a subclass of itself, and its tracker is unlocked to take two weights, as
`EinsumDense.enable_lora` does. `tests/adapters/test_keras.py` notices when these parts move.
"""

from typing import Any


def add_factor_weights(
    layer: Any, carrier: type, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    """Give a built layer zeros for both factors, and turn it into `carrier`, a subclass of its own.

    Args:
        layer: A Keras `Dense` or `EinsumDense`.
        carrier: A subclass of its class with the same attributes.
        a_shape: Shape of `lora_kernel_a`.
        b_shape: Shape of `lora_kernel_b`.
    """
    layer._tracker.unlock()
    try:
        for name, shape in (("lora_kernel_a", a_shape), ("lora_kernel_b", b_shape)):
            weight = layer.add_weight(name=name, shape=shape, initializer="zeros", dtype="float32")
            setattr(layer, name, weight)
    finally:
        layer._tracker.lock()
    layer.__class__ = carrier


def remove_factor_weights(layer: Any, stock: type) -> None:
    """Undo `add_factor_weights`.

    Args:
        layer: The layer.
        stock: Its class before.
    """
    layer.__class__ = stock
    for name in ("lora_kernel_a", "lora_kernel_b"):
        layer._untrack_variable(getattr(layer, name))
        setattr(layer, name, None)


def layers_with_weights(backbone: Any) -> list[Any]:
    """Return the layers in the order in which `save_lora_weights` of KerasHub numbers them."""
    return [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]
