"""A model's weights as they leave: merged, in float32, one at a time."""

import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np

from gemma_keras_tune.adapters.lora import get_factors, kernel_update, lora_linears
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.gemma.families import (
    Linear,
    Weight,
    broken_weights,
    family_of,
    quantizations,
    to_matrix,
)

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


# Called with a tensor's name, how many are done, and how many there are.
Progress = Callable[[str, int, int], None]
Shape = tuple[int, ...]


def shape_problems(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], idle: Container[str] = ()
) -> list[str]:
    """Compare the tensors a file holds with those a model is made of.

    Args:
        expected: Shapes of the model's tensors by name.
        found: Shapes of the file's.
        idle: Names of more tensors that a file may hold, and that are never computed with.

    Returns:
        What is missing, of another shape, or unknown: a line for each.
    """
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name] != shape:
            problems.append(f"{name} has shape {found[name]}, expected {shape}")
    unknown = (name for name in found if name not in expected and name not in idle)
    return problems + [f"{name} is no weight of this model" for name in unknown]


def warn_of_media(model: Any, made: str, hint: str) -> None:
    """Warn that a model sees or hears, and what is written does not.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        made: A name for what is written, such as `"folder"`.
        hint: A sentence on what to do instead.
    """
    towers = [
        word
        for word, name in (("see images", "vision_encoder"), ("hear", "audio_encoder"))
        if getattr(model.backbone, name, None) is not None
    ]
    if towers:
        warnings.warn(
            f"The {made} holds the text tower alone: it will not {' or '.join(towers)}. {hint}",
            UserWarning,
            stacklevel=4,
        )


def stored_dtype(model: keras.Model, dtype: str) -> str:
    """The dtype to write a model in.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: that of the weights, float32 for
            quantized ones.

    Returns:
        A key of `DTYPES`.

    Raises:
        ExportError: It is none of them.
    """
    if dtype == "auto":
        held = str(family_of(model).head(model).embedding.dtype)
        return held if held in DTYPES else "float32"
    if dtype not in DTYPES:
        raise ExportError(f"`dtype` must be 'auto' or one of {tuple(DTYPES)}. Received: {dtype!r}")
    return dtype


def rounded(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """A value in the dtype it is written in.

    Args:
        name: Its name, for the message.
        value: Finite values.
        dtype: A key of `DTYPES`.

    Returns:
        A contiguous array.

    Raises:
        ExportError: The largest value is beyond the dtype.
    """
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(value).astype(DTYPES[dtype], copy=False)
    if stored.dtype != value.dtype and not np.isfinite(stored).all():
        raise ExportError(
            f"{name} holds values up to {float(np.abs(value).max()):g}, beyond {dtype}.",
            next_step="Export with `dtype='bfloat16'` or 'float32'.",
        )
    return stored


def merged_weights(model: keras.Model) -> Iterator[tuple[Weight, np.ndarray]]:
    """The text tower's weights, with the LoRA that is on added.

    Weights that Keras quantized to int8 are given as the floats they stand for.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Yields:
        Each `Weight` of the table and its value in the variable's own shape: float32, or half
        precision where the variable is in it and no LoRA is added.

    Raises:
        ExportError: Layers are quantized otherwise, or weights hold NaN or infinite values. All of
            them are named, before the first weight is given out.
    """
    refuse_quantized(model)
    refuse_broken(model)
    linears = {
        f"{linear.hugging_face}.weight": linear
        for linear in lora_linears(model)
        if linear.layer.lora_enabled
    }
    for weight in family_of(model).weights(model):
        # Whoever lets the value go while it waits here frees it.
        yield weight, _merged(weight, linears.get(weight.hugging_face))


def _merged(weight: Weight, linear: Linear | None) -> np.ndarray:
    if linear is None and not _has_codes(weight):
        return np.asarray(weight.variable)  # not a copy
    value = _float32(weight)
    return value if linear is None else value + kernel_update(linear)


def _float32(weight: Weight) -> np.ndarray:
    value = np.asarray(weight.variable, "float32")
    if not _has_codes(weight):
        return value
    # Keras multiplied each output, or each token, by its own number, and rounded.
    if weight.spec.kind == "embedding":
        return value / np.asarray(weight.layer.embeddings_scale, "float32")[:, None]
    scale = np.asarray(weight.layer.kernel_scale, "float32").reshape(-1, 1)
    matrix = to_matrix(value, weight.output_axes, weight.input_axes) / scale
    return weight.from_matrix(matrix)


def _has_codes(weight: Weight) -> bool:
    return not keras.backend.is_float_dtype(weight.variable.dtype)


def refuse_quantized(model: keras.Model) -> None:
    """Refuse a quantized model whose floats cannot be told.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Raises:
        ExportError: Layers are quantized to something else than Keras's int8; all are named.
    """
    modes = quantizations(model)
    unknown = [f"{path}: {mode}" for path, mode in modes.items() if mode != "int8"]
    if unknown:
        raise ExportError(
            "Of quantized models only those in Keras's 'int8' can be exported.",
            unknown,
            "Save the adapter with `save_adapter`, load it onto the model before quantization, and "
            "export that; the target's own quantization then starts from full weights.",
        )


def refuse_broken(model: keras.Model) -> None:
    """Refuse a model with NaN or infinite values in its weights or its LoRA.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Raises:
        ExportError: It has some; all are named.
    """
    broken = broken_weights(model)
    for linear in lora_linears(model):
        if not all(np.isfinite(factor).all() for factor in get_factors(linear)):
            broken.append(f"{linear.path}: its LoRA")
    if broken:
        raise ExportError(
            "Weights hold NaN or infinite values.",
            broken,
            "Training has diverged, or the file was damaged: tune again with a lower "
            "`learning_rate`, or load the model afresh.",
        )
