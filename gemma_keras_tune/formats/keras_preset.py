"""A KerasHub preset, which `keras_hub.models.CausalLM.from_preset` opens."""

import contextlib
import math
import pathlib
import warnings
from collections.abc import Iterator

import keras
import numpy as np

from gemma_keras_tune.adapters.bases import write_metadata
from gemma_keras_tune.adapters.lora import is_lora_on, lora_linears
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.formats.weights import Progress, refuse_broken
from gemma_keras_tune.gemma.building import scales_otherwise
from gemma_keras_tune.gemma.families import family_of, quantizations


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    shard_size: int = 5_000_000_000,
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Write a KerasHub preset, with the LoRA that is on merged in, and this library's record.

    Args:
        model: A KerasHub Gemma.
        folder: An existing, empty folder.
        dtype: `"auto"`: a preset keeps the weights' own dtype.
        shard_size: Bytes of weights in one file at most.
        progress: Called once, at the end: KerasHub writes all weights in one call.

    Raises:
        ExportError: Another dtype was asked for, weights hold NaN or infinite values, LoRA is on a
            quantized base, or its weights alone are in int8.
    """
    if dtype != "auto":
        raise ExportError(
            f"A Keras preset keeps the dtype of the weights. Received: dtype={dtype!r}",
            next_step="Leave `dtype` out; `from_preset(path, dtype=...)` casts on loading.",
        )
    refuse_broken(model)
    write_preset(model, folder, shard_size=shard_size)
    progress("model", 1, 1)


def write_preset(
    model: keras.Model, folder: pathlib.Path, *, shard_size: int = 5_000_000_000
) -> None:
    """Write the files of `save_preset` into an existing folder.

    Args:
        model: A KerasHub Gemma.
        folder: An existing, empty folder.
        shard_size: Bytes of weights in one file at most.

    Raises:
        ExportError: LoRA is on a quantized base, or its weights alone are in int8.
    """
    codes = quantizations(model) if is_lora_on(model) else {}
    if codes:
        raise ExportError(
            "LoRA cannot be merged into quantized kernels: Keras would round it away.",
            [f"{path}: {mode}" for path, mode in codes.items()],
            "Save the adapter with `save_adapter`, and the base within `lora_disabled(model)`. Or "
            "load the adapter onto the model before quantization, and save that.",
        )
    alone = _int8_of_weights_alone(model)
    if alone:
        raise ExportError(
            "A preset does not say that weights alone are in int8: KerasHub would round "
            "the activations too when it opens it.",
            alone,
            "Save the adapter with `save_adapter`, and keep the unquantized model as its base.",
        )
    if scales_otherwise(model.backbone):
        warnings.warn(
            "This model scales its queries by hidden size over heads, and KerasHub's decoder "
            "blocks take the head size whatever a preset says: opened by KerasHub alone it will "
            "compute something else. `load` opens the preset as it is; or export it to "
            "'safetensors' or 'gguf'.",
            UserWarning,
            stacklevel=3,
        )
    with _unmixed(model):
        shard_bytes = max(shard_size, largest_variable(model))
        # In GiB, and rounded up: Keras refuses a variable that is larger by a byte.
        model.save_to_preset(str(folder), max_shard_size=math.nextafter(shard_bytes / 2**30, 1e9))
    write_metadata(model, folder)


def largest_variable(model: keras.Model) -> int:
    """Compute the bytes of a model's largest variable, from its shape alone.

    KerasHub ends in an error where it is larger than a file of weights may be: such a variable gets
    a file of its size. In float32 the inputs of each layer of Gemma 3n are one table of 8 GB and
    more, and the embedding of the largest Gemma 3 has 5.6 GB.

    Args:
        model: A KerasHub Gemma.

    Returns:
        Bytes.
    """
    return max(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.backbone.variables)


def _int8_of_weights_alone(model: keras.Model) -> list[str]:
    linears = family_of(model).linears(model)
    int8 = (linear for linear in linears if linear.layer.quantization_mode == "int8")
    return [linear.path for linear in int8 if linear.layer.inputs_quantizer is None]


@contextlib.contextmanager
def _unmixed(model: keras.Model) -> Iterator[None]:
    """Give layers under a `mixed_*` policy the policy of their weights for a while.

    Keras rounds merged kernels to what a layer computes in, and KerasHub opens no preset that names
    a mixed policy.
    """
    layers = [model, model.backbone, *model.backbone.layers]
    layers += [linear.layer for linear in lora_linears(model)]
    mixed = [
        (layer, layer.dtype_policy)
        for layer in layers
        # Keras takes the name off a quantized layer's policy when it writes down the settings.
        if str(layer.dtype_policy.name).startswith("mixed_")
    ]
    for layer, policy in mixed:
        layer.dtype_policy = policy.variable_dtype
    try:
        yield
    finally:
        for layer, policy in mixed:
            layer.dtype_policy = policy
