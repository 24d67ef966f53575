"""Handing a tuned model over, in one file for each format.

Each target is a module with `write(model, folder, *, dtype, shard_size, progress, **options)`. The
table below names them all; a target is imported when it is asked for.
"""

import importlib
import os
import pathlib
import re
import tempfile
from types import ModuleType
from typing import Any

import keras

from gemma_keras_tune._files import new_folder
from gemma_keras_tune.adapters import write_record
from gemma_keras_tune.errors import ExportError

__all__ = ["FORMATS", "export"]

FORMATS: dict[str, str] = {
    "keras": "keras_preset",
    "safetensors": "safetensors_folder",
    "gguf": "gguf_file",
    "gguf_adapter": "gguf_adapter",
    "ollama": "ollama",
    "gemma_jax": "gemma_jax",
}
_INSTEAD = {
    "litert": "This library writes no LiteRT file itself. Export 'safetensors' and convert the "
    "folder with `pip install litert-torch tensorflow` and "
    "`litert_torch.generative.export_hf.export.export(folder, output_dir)`, which makes a "
    ".litertlm file.",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    dtype: str = "auto",
    quantization: str | None = None,
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    verbose: int = 1,
) -> pathlib.Path:
    """Write a model for another runtime, LoRA merged in.

    What is written appears under its name only when it is whole. The model in memory keeps its
    LoRA. The files are under the Gemma terms of use.

    Args:
        model: A KerasHub Gemma.
        path: The folder to make. For `"gguf"` and `"gguf_adapter"` a path that ends in `.gguf` is
            the file to make.
        format: `"keras"` (a KerasHub preset), `"safetensors"` (a Hugging Face folder), `"gguf"`
            (llama.cpp), `"gguf_adapter"` (the LoRA alone, for `llama.cpp --lora`), `"ollama"` (a
            GGUF file with its Modelfile), `"gemma_jax"` (an Orbax checkpoint for the Gemma library
            for JAX), or `"auto"`: `"gguf"` where the path ends in `.gguf`, else `"safetensors"`.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: the weights' own dtype, for
            GGUF float16 in place of float32. A preset always keeps the weights' own.
        quantization: For GGUF and Ollama, `"Q8_0"` or `"Q4_0"`.
        shard_size: Bytes of weights in one safetensors file at most: a number, or such as `"5GB"`.
        overwrite: Whether to replace what is there.
        verbose: 1 shows a progress bar, 0 nothing.

    Returns:
        The folder or file.

    Raises:
        ExportError: The name is taken, an argument is unknown, or the target cannot carry this
            model. Nothing stays on disk.
    """
    target = pathlib.Path(path)
    single = target.suffix == ".gguf"
    if format == "auto":
        format = "gguf" if single else "safetensors"
    module = _module(format)
    options: dict[str, Any] = {"dtype": dtype, "shard_size": _bytes(shard_size)}
    if quantization is not None:
        if format not in ("gguf", "ollama"):
            raise ExportError(
                f"`quantization` is for 'gguf' and 'ollama'. Received: {quantization!r} with "
                f"format {format!r}"
            )
        options["quantization"] = quantization
    if single and format in ("gguf", "gguf_adapter"):
        _write_file(module, model, target, overwrite, verbose, options)
        return target
    with new_folder(target, overwrite=overwrite) as folder, _Progress(target, verbose) as progress:
        module.write(model, folder, progress=progress, **options)
        if format != "keras":  # A preset brings its record.
            write_record(model, folder)
    return target


def _module(format: str) -> ModuleType:
    if format in _INSTEAD:
        raise ExportError(f"There is no export to {format!r}.", next_step=_INSTEAD[format])
    if format not in FORMATS:
        raise ExportError(
            f"`format` must be 'auto' or one of {tuple(FORMATS)}. Received: {format!r}"
        )
    return importlib.import_module(f"{__name__}.{FORMATS[format]}")


def _write_file(
    module: ModuleType,
    model: keras.Model,
    target: pathlib.Path,
    overwrite: bool,
    verbose: int,
    options: dict[str, Any],
) -> None:
    if target.exists() and not (overwrite and target.is_file()):
        raise ExportError(
            f"{target} already exists.",
            next_step="Choose another name, or pass `overwrite=True` to replace a file.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", suffix=".part", dir=target.parent
        ) as folder,
        _Progress(target, verbose) as progress,
    ):
        part = pathlib.Path(folder)
        module.write(model, part, progress=progress, file_name=target.name, **options)
        (part / target.name).replace(target)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        number, unit = str(size), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)?\s*", size, re.IGNORECASE)
        number, unit = (match[1], (match[2] or "").upper()) if match else ("0", "")
    count = int(float(number) * _UNITS[unit])
    if count < 1:
        raise ExportError(
            f"`shard_size` must be a number of bytes or such as '5GB'. Received: {size!r}"
        )
    return count


class _Progress:
    """A bar that takes `(name, done, total)`."""

    def __init__(self, target: pathlib.Path, verbose: int) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(desc=f"writing {target.name}", unit="weight", disable=not verbose)

    def __enter__(self) -> "_Progress":
        return self

    def __call__(self, name: str, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *args: object) -> None:
        self._bar.close()
