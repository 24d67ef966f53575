"""Export of a tuned model; each format has a module of its own.

Each target is a module with `write(model, folder, *, dtype, progress, **options)`. The table below
names them all; a target is imported when it is asked for.
"""

import functools
import importlib
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import keras

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune._support.files import check_file, check_free, explained, new_folder
from gemma_keras_tune.adapters.active import ACTIVE, Active, use_adapter
from gemma_keras_tune.adapters.bases import write_metadata
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.exporting.receipts import (
    FILE_NAME,
    Checking,
    refuse_wrong_check,
)
from gemma_keras_tune.exporting.verifying import write_checked_receipt
from gemma_keras_tune.formats.weights import refuse_quantized, stored_dtype
from gemma_keras_tune.gemma.families import family_of

__all__ = ["FORMATS", "export"]

FORMATS: dict[str, str] = {
    "keras": "keras_preset",
    "safetensors": "hugging_face.writer",
    "gguf": "gguf.writer",
    "gguf_adapter": "gguf.adapter",
    "ollama": "gguf.ollama",
    "gemma_jax": "gemma_jax.writer",
    "litert": "litert",
}
# Arguments that only some formats take.
_TAKEN_BY = {"quantization": ("gguf", "ollama"), "shard_size": ("keras", "safetensors")}
_SHARD_SIZE = "5GB"
# The format of a file with this suffix.
_FILES = {
    ".gguf": "gguf",
    ".safetensors": "safetensors",
    ".keras": "keras",
    ".h5": "keras",
    ".tflite": "litert",
    ".litertlm": "litert",
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    adapter: str | Active | None = ACTIVE,
    dtype: str = "auto",
    quantization: str | None = None,
    shard_size: int | str | None = None,
    overwrite: bool = False,
    prompts: Iterable[str] | None = None,
    check: Checking = False,
    verbose: int = 1,
) -> pathlib.Path:
    """Write a model for another runtime, with the LoRA that is on merged in.

    The export appears under its name only when it is complete, with a receipt: the sizes and hashes
    of all files and, with `check`, the answers of the model to a few prompts. `verify` compares the
    export with its receipt. The active adapter is merged in; within `lora_disabled(model)`, or
    after `gkt.adapters.set(model, None)`, the base is written. The model in memory keeps its LoRA.
    The files are under the Gemma terms of use.

    Args:
        model: A KerasHub Gemma.
        path: The folder to make. For `"gguf"` and `"gguf_adapter"` a path that ends in `.gguf` is
            the file to make.
        format: `"keras"` (a KerasHub preset), `"safetensors"` (a Hugging Face folder), `"gguf"`
            (llama.cpp), `"gguf_adapter"` (the LoRA alone, for `llama.cpp --lora`), `"ollama"` (a
            GGUF file with its Modelfile), `"gemma_jax"` (an Orbax checkpoint for the Gemma library
            for JAX), `"litert"` (a file for LiteRT-LM), or `"auto"`: `"gguf"` where the path ends
            in `.gguf`, else `"safetensors"`.
        adapter: The adapter to merge in, or to write: one of `gkt.adapters.list(model)`, or
            `None` for the base. Defaults to the active one.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: the weights' own dtype, for
            GGUF float16 in place of float32. A preset always keeps the weights' own.
        quantization: For GGUF and Ollama, `"Q8_0"` or `"Q4_0"`; where llama.cpp's program
            `llama-quantize` is on the PATH, also its K-quants, such as `"Q4_K_M"`.
        shard_size: For `"keras"` and `"safetensors"`, bytes of weights in one file at most: a
            number, or a text such as `"5GB"`, the default.
        overwrite: Whether to replace an existing folder or file.
        prompts: Prompts to answer; needs `check`. Defaults to a few general ones.
        check: `False` does not run the model. `True` records its answers, so that `verify` can open
            the export and compare. `"run"` does both at once, before the export takes its name, and
            keeps it only if it answers as the model does. If the runtime is not installed, the
            export is kept, with a warning.
        verbose: 1 shows a progress bar, 0 nothing.

    Returns:
        The folder or file.

    Raises:
        BackendError: Keras does not run on JAX.
        AdapterError: There is no such adapter.
        ExportError: The name is taken, an argument is wrong, the format cannot hold this model, or
            the export does not answer as the model does. Nothing new stays on disk.
    """
    check_backend()
    refuse_wrong_check(check, prompts)
    target, format, module, options = resolve_export(path, format, dtype, quantization, shard_size)
    if format not in ("keras", "gguf_adapter"):
        refuse_quantized(model)
    finish = functools.partial(
        write_checked_receipt,
        model,
        format=format,
        dtype=_stored(model, format, dtype),
        quantization=options.get("quantization"),
        prompts=prompts,
        check=check,
    )
    with use_adapter(model, adapter):
        if target.suffix.lower() == ".gguf":
            _write_file(module, model, target, overwrite, verbose, options, finish)
            return target
        with (
            new_folder(target, overwrite=overwrite) as folder,
            _Progress(target, verbose) as progress,
        ):
            module.write(model, folder, progress=progress, **options)
            if format != "keras":  # `write_preset` writes the metadata itself.
                write_metadata(model, folder)
            finish(folder)
    return target


def resolve_export(
    path: str | os.PathLike[str],
    format: str,
    dtype: str,
    quantization: str | None,
    shard_size: int | str | None,
) -> tuple[pathlib.Path, str, ModuleType, dict[str, Any]]:
    """Resolve the arguments of `export` that need no model, and refuse those that are wrong.

    Returns:
        The folder or file to make, the format, the module that writes it, and its options.

    Raises:
        ExportError: An argument is wrong.
    """
    target = pathlib.Path(path).expanduser()
    format = _format(target, format)
    module = _module(format)
    return target, format, module, _options(format, dtype, quantization, shard_size)


def check_target(target: pathlib.Path, *, overwrite: bool) -> None:
    """Refuse a name that an export cannot have.

    Args:
        target: The folder or file to make.
        overwrite: Whether one that is there may be replaced.

    Raises:
        ExportError: The name is taken, or its place cannot be written to.
    """
    if target.suffix.lower() != ".gguf":
        check_free(target, overwrite=overwrite)
        return
    if target.exists() and not (overwrite and target.is_file()):
        raise ExportError(
            f"{target} already exists.",
            next_step="Choose another name, or pass `overwrite=True` to replace a file.",
        )
    check_file(target)


def _options(
    format: str, dtype: str, quantization: str | None, shard_size: int | str | None
) -> dict[str, Any]:
    """Collect the arguments of a format's `write`, and refuse those that it does not take."""
    options: dict[str, Any] = {"dtype": dtype}
    for name, value in (("quantization", quantization), ("shard_size", shard_size)):
        if value is not None and format not in _TAKEN_BY[name]:
            *known, last = map(repr, _TAKEN_BY[name])
            raise ExportError(
                f"`{name}` is for {', '.join(known)} and {last}. Received: {value!r} with format "
                f"{format!r}"
            )
    if quantization is not None:
        options["quantization"] = str(quantization).upper()
    if format in _TAKEN_BY["shard_size"]:
        options["shard_size"] = _bytes(_SHARD_SIZE if shard_size is None else shard_size)
    return options


def _format(target: pathlib.Path, format: str) -> str:
    """Resolve `"auto"`, and refuse a folder with the name of a file."""
    suffix = target.suffix.lower()
    chosen = _FILES.get(suffix, "safetensors") if format == "auto" else format
    single = suffix == ".gguf" and chosen in ("gguf", "gguf_adapter")
    if suffix in _FILES and not single and chosen in FORMATS:
        raise ExportError(
            f"The format {chosen!r} is a folder, and {target} has the name of a file.",
            next_step=f"Pass the name of a folder, such as {target.stem!r}, and "
            f"`format={chosen!r}`.",
        )
    return chosen


def _stored(model: keras.Model, format: str, dtype: str) -> str:
    """Resolve `"auto"` to the dtype that is written."""
    if dtype != "auto":
        return dtype
    if format in ("gguf_adapter", "litert"):
        return "float32"
    held = str(family_of(model).head(model).embedding.dtype)
    if format == "keras":
        return held
    if format in ("gguf", "ollama"):
        return "bfloat16" if held == "bfloat16" else "float16"
    return stored_dtype(model, dtype)


def _module(format: str) -> ModuleType:
    if format not in FORMATS:
        raise ExportError(
            f"`format` must be 'auto' or one of {tuple(FORMATS)}. Received: {format!r}"
        )
    return importlib.import_module(f"gemma_keras_tune.formats.{FORMATS[format]}")


def _write_file(
    module: ModuleType,
    model: keras.Model,
    target: pathlib.Path,
    overwrite: bool,
    verbose: int,
    options: dict[str, Any],
    finish: Callable[..., Any],
) -> None:
    check_target(target, overwrite=overwrite)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with (
        explained(target),
        tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", suffix=".part", dir=target.parent
        ) as folder,
        _Progress(target, verbose) as progress,
    ):
        part = pathlib.Path(folder)
        module.write(model, part, progress=progress, file_name=target.name, **options)
        receipt = f"{target.name}.{FILE_NAME}"
        finish(part, file_name=receipt)
        # A receipt without its file claims nothing; a file beside an old receipt would look broken.
        (part / receipt).replace(target.with_name(receipt))
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
    """A progress bar that is called with `(name, done, total)`."""

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
