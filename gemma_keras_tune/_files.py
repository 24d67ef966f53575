"""Folders that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from gemma_keras_tune.errors import ExportError


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
        ExportError: The name is taken.
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
