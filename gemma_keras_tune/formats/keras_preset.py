"""A KerasHub preset, which `keras_hub.models.CausalLM.from_preset` opens."""

import pathlib
from collections.abc import Callable

import keras

from gemma_keras_tune.exporting.saving import write_preset
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.formats.weights import refuse_broken

FORMAT = "keras"
RUNTIME = "keras-hub"


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    shard_size: int = 5_000_000_000,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> None:
    """Write a KerasHub preset, with the LoRA that is on merged in, and this library's record.

    Args:
        model: A KerasHub Gemma.
        folder: An existing, empty folder.
        dtype: `"auto"`: a preset keeps the weights' own dtype.
        shard_size: Bytes of weights in one file at most.
        progress: Called once, at the end: KerasHub writes all weights in one call.

    Raises:
        ExportError: Another dtype was asked for, weights hold NaN or infinite values, or LoRA is on
            a quantized base.
    """
    if dtype != "auto":
        raise ExportError(
            f"A Keras preset keeps the dtype of the weights. Received: dtype={dtype!r}",
            next_step="Leave `dtype` out; `from_preset(path, dtype=...)` casts on loading.",
        )
    refuse_broken(model)
    write_preset(model, folder, shard_size=shard_size)
    progress("model", 1, 1)
