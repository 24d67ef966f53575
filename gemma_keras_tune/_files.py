"""Folders that appear whole or not at all."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from gemma_keras_tune.errors import ExportError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A folder to write into that takes its real name only when all has gone well.

    Args:
        path: The name it shall have.
        overwrite: Whether it may take the place of an existing folder, which is moved aside first
            and deleted last.

    Yields:
        A new, empty folder beside it.

    Raises:
        ExportError: The name is taken, or the disk is full.
    """
    target = pathlib.Path(path)
    if target.exists() and not (overwrite and target.is_dir()):
        raise ExportError(
            f"{target} already exists.",
            next_step="Choose another name, or pass `overwrite=True` to replace a folder.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    )
    try:
        os.chmod(part, 0o755)
        with explained(target):
            yield part
        old = part.with_suffix(".old")
        if target.exists():
            target.rename(old)
            try:
                part.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def explained(target: pathlib.Path) -> Iterator[None]:
    """Say in plain words that the disk is full, whichever library ran into it.

    Args:
        target: What is being written.

    Yields:
        Nothing.

    Raises:
        ExportError: The disk is full, or a file larger than is allowed.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise ExportError(
            f"{target} could not be written: the disk is full.",
            [str(error)],
            "Free some space, or choose a place with more. Nothing new was left behind.",
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one it came from, says so: HDF5 and safetensors do in words alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(os.strerror(number) in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
