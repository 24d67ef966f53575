"""Quantized bases: the linear layers in int8 or int4, each as soon as its weights are there.

Weights alone are quantized, by Keras: activations stay floats. The embedding, which is the output
head too, stays in floats, and so do norms: a loss of quantized logits would be another loss.
"""

import contextlib
import contextvars
import gc
from collections.abc import Callable, Iterator
from typing import Any, Literal

import keras
import numpy as np

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma.families import all_finite, family_of

Quantization = Literal["int8", "int4"]
MODES = ("int8", "int4")
# Keras's own block of int4: so many inputs share a scale and a zero point.
BLOCK_SIZE = 128

_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("quantization", default=None)


@contextlib.contextmanager
def quantizing(mode: str | None) -> Iterator[None]:
    """Let the backbones that are built in a block of code be quantized while they are filled.

    Args:
        mode: One of `MODES`, or `None`.
    """
    if mode is None:
        yield
        return
    token = _mode.set(mode)
    # Keras collects garbage after every layer; what is there before is spared that.
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _mode.reset(token)


def is_quantizing() -> bool:
    """Tell if models are quantized while they are loaded, as within `quantizing`."""
    return _mode.get() is not None


def quantize_while_filled(backbone: keras.Model) -> None:
    """Quantize each linear layer as soon as its kernel is assigned, within `quantizing`.

    So the floats of one layer alone are in memory beside what is quantized.

    Args:
        backbone: A KerasHub Gemma backbone whose variables have no values yet.

    Raises:
        LoadError: KerasHub would compute wrongly with the family's quantized layers.
    """
    mode = _mode.get()
    if mode is not None:
        for path, layer in _layers(backbone):
            _when_assigned(layer.kernel, _Quantize(layer, path, mode))


def quantize_rest(model: keras.Model, mode: str) -> None:
    """Quantize the linear layers of a model that are not quantized yet.

    Args:
        model: A KerasHub Gemma.
        mode: One of `MODES`.

    Raises:
        LoadError: KerasHub would compute wrongly with the family's quantized layers.
    """
    for path, layer in _layers(model):
        _Quantize(layer, path, mode)(layer.kernel)


def _layers(model: keras.Model) -> list[tuple[str, Any]]:
    family = family_of(model)
    if not family.quantized_lora:
        raise LoadError(
            f"{family.title} cannot be quantized: KerasHub multiplies by the stored integers of "
            "its feed-forward layers, and takes no account of their scales.",
            next_step="Load it without `quantize`, with `dtype='bfloat16'`; `rematerialize=True` "
            "of `tune` saves more memory than quantizing does.",
        )
    linear = (weight for weight in family.weights(model) if weight.spec.kind == "linear")
    return [(w.path, w.layer) for w in linear if w.layer.quantization_mode is None]


class _Quantize:
    """Quantizes one layer whose kernel has come, and frees its floats at once."""

    def __init__(self, layer: Any, path: str, mode: str) -> None:
        self.layer = layer
        self.path = path
        self.mode = mode

    def __call__(self, kernel: keras.Variable) -> None:
        values = kernel.value
        if not all_finite(np.asarray(values)):
            raise LoadError(
                "The weights hold NaN or infinite values.",
                [self.path],
                "The training they come from has diverged, or the files are damaged.",
            )
        self.layer.quantize(config=_config(self.mode))
        values.delete()  # readers hold on to the variable


def _config(mode: str) -> Any:
    if mode == "int8":
        return keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    return keras.quantizers.Int4QuantizationConfig(block_size=BLOCK_SIZE)


def _when_assigned(variable: Any, then: Callable[[keras.Variable], None]) -> None:
    """Call a function once, after the next assignment of a variable."""
    kind: Any = type(variable)

    class Awaited(kind):
        def assign(self, value: Any) -> Any:
            self.__class__ = kind
            assigned = self.assign(value)
            then(self)
            return assigned

    variable.__class__ = Awaited
