"""A model's weights as they leave: merged, in float32, one at a time."""

from collections.abc import Iterator

import keras
import numpy as np

from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.families import Weight, broken_weights, family_of
from gemma_keras_tune.lora import kernel_update, lora_linears


def merged_weights(model: keras.Model) -> Iterator[tuple[Weight, np.ndarray]]:
    """The text tower's weights with LoRA added, whether it is switched on at the moment or not.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Yields:
        Each `Weight` of the table and its value, float32, in the variable's own shape.

    Raises:
        ExportError: Layers are quantized, or weights hold NaN or infinite values. All of them are
            named, before the first weight is given out.
    """
    weights = family_of(model).weights(model)
    _refuse_quantized(weights)
    _refuse_broken(model)
    linears = {f"{linear.hugging_face}.weight": linear for linear in lora_linears(model)}
    for weight in weights:
        value = np.asarray(weight.variable, "float32")
        linear = linears.get(weight.hugging_face)
        yield weight, value if linear is None else value + kernel_update(linear)


def _refuse_quantized(weights: tuple[Weight, ...]) -> None:
    quantized = [
        f"{weight.path}: {weight.variable.dtype}"
        for weight in weights
        if not keras.backend.is_float_dtype(weight.variable.dtype)
    ]
    if quantized:
        raise ExportError(
            "A quantized model cannot be exported: its codes are no weights.",
            quantized,
            "Save the adapter with `save_adapter`, load it onto the model before quantization, and "
            "export that; the target's own quantization then starts from full weights.",
        )


def _refuse_broken(model: keras.Model) -> None:
    broken = broken_weights(model)
    if broken:
        raise ExportError(
            "Weights hold NaN or infinite values.",
            broken,
            "Training has diverged, or the file was damaged: tune again with a lower "
            "`learning_rate`, or load the model afresh.",
        )
