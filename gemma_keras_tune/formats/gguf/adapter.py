"""The adapter of a model that is on, as a GGUF adapter for `llama.cpp --lora`.

Written after llama.cpp's `convert_lora_to_gguf.py`. llama.cpp scales by `alpha / rank`, so what is
written as `alpha` is the model's scale times the rank, also where it was divided by a square root.
"""

import pathlib
from typing import Any

import gguf
import keras
import numpy as np

from gemma_keras_tune.adapters.active import adapter_factors, adapter_strength
from gemma_keras_tune.adapters.lora import is_lora_on, lora_linears
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.formats.gguf.writer import (
    DTYPES,
    encode,
    put,
)
from gemma_keras_tune.formats.weights import Progress, refuse_broken
from gemma_keras_tune.gemma.families import family_of

FILE_NAME = "adapter.gguf"


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    progress: Progress = lambda name, done, total: None,
    file_name: str = FILE_NAME,
) -> None:
    """Write the adapter that is on as a GGUF adapter, at its own rank.

    Its strength, where that is not 1, is multiplied into `B`. Open it with
    `open_runtime(base, adapter=file)`, where `base` is the base model's GGUF file.

    Args:
        model: A KerasHub `CausalLM` with LoRA on.
        folder: An existing folder.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; `"auto"` is float32, as the factors are.
        progress: Called with the layer's name, how many are written, and how many there are.
        file_name: Name of the file.

    Raises:
        ExportError: LoRA is not on, or is switched off; its values are not finite; or the model
            is a Gemma 3n.
    """
    family = family_of(model)
    if not family.gguf.adapters:
        raise ExportError(
            f"llama.cpp computes something else with an adapter of {family.title} than the model "
            "does.",
            next_step="Export the merged model with `format='gguf'`.",
        )
    kind = _kind(dtype)
    if not is_lora_on(model):
        raise ExportError(
            "There is no adapter to write: LoRA is not on this model, or is switched off.",
            next_step="Tune with `method='lora'`, switch to one with `gkt.adapters.set`, or "
            "write the whole model with `format='gguf'`.",
        )
    refuse_broken(model)
    config, factors = adapter_factors(model)
    strength = np.float32(adapter_strength(model))
    linears = [linear for linear in lora_linears(model) if linear.hugging_face in factors]
    writer = gguf.GGUFWriter(folder / file_name, family.name)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_string("general.license", "gemma")
        writer.add_float32("adapter.lora.alpha", config.scale * config.rank)
        for done, linear in enumerate(linears, 1):
            a, b = factors[linear.hugging_face]
            for name, factor in (("lora_a", a), ("lora_b", strength * b)):
                full = f"{linear.gguf}.weight.{name}"
                writer.add_tensor(full, encode(full, factor, {full: kind}), raw_dtype=kind)
            progress(linear.gguf, done, len(linears))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for info in writer.tensors[0].values():
            put(writer, info.tensor)
    finally:
        writer.close()


def _kind(dtype: Any) -> gguf.GGMLQuantizationType:
    name = "float32" if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ExportError(f"`dtype` must be 'auto' or one of {tuple(DTYPES)}. Received: {dtype!r}")
    return gguf.GGMLQuantizationType[DTYPES[name]]
