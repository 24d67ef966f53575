"""Folders and text files that appear complete or not at all, and the hash of a file."""

import contextlib
import ctypes
import errno
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator

from gemma_keras_tune.errors import ExportError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of Linux's <fcntl.h> and <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What this process writes just now, and the name it is to have.
_unfinished: dict[pathlib.Path, pathlib.Path] = {}


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """Make a folder that takes its name only when the block ends without an error.

    The remains of a process that was killed are removed first: an old folder that had been moved
    aside gets its name back, and a half-written one is deleted.

    Args:
        path: The name of the folder. If it is a symbolic link, the folder it points to is meant.
        overwrite: Whether to replace an existing folder, which is deleted last.

    Yields:
        A new, empty folder beside it.

    Raises:
        ExportError: The name is taken, the disk is full, or the place cannot be written to.
    """
    target = _real(path)
    with explained(target):
        _tidy(target)
        check_free(target, overwrite=overwrite)
        made = _make_parents(target)
        try:
            part, held = _new_part(target)
            try:
                os.chmod(part, 0o755)
                yield part
                _put(part, target, overwrite=overwrite)
            except BaseException:
                _remove(part)
                raise
            finally:
                _unfinished.pop(part, None)
                if held is not None:
                    os.close(held)
        except BaseException:
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a name that a new folder cannot have, before any work is done.

    Args:
        path: The name.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        ExportError: The name is taken, its place cannot be written to, or it is, or holds, the
            working directory.
    """
    target = _real(path)
    if target.exists() and not (overwrite and target.is_dir()):
        raise ExportError(
            f"{target} already exists.",
            next_step="Choose another name, or pass `overwrite=True` to replace a folder.",
        )
    _check_writable(target)
    if pathlib.Path.cwd().is_relative_to(target.resolve()):
        raise ExportError(
            f"{target} is, or holds, the folder this process works in, which would be replaced.",
            next_step="Name a folder inside it.",
        )


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse a name that a new file cannot have, before any work is done.

    Args:
        path: The name. A file that is there is replaced.

    Raises:
        ExportError: It is a folder, or its place cannot be written to.
    """
    target = pathlib.Path(path).expanduser()
    if target.is_dir():
        raise ExportError(f"{target} is a folder.", next_step="Choose the name of a file.")
    _check_writable(target)


def _check_writable(target: pathlib.Path) -> None:
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "cannot be written to" if folder.is_dir() else "is a file"
        raise ExportError(
            f"{target} cannot be made: {folder} {why}.", next_step="Choose another name."
        )


def _real(path: str | os.PathLike[str]) -> pathlib.Path:
    target = pathlib.Path(path).expanduser()
    return target.resolve() if target.is_symlink() else target


def _make_parents(target: pathlib.Path) -> list[pathlib.Path]:
    """Make the parent folders, and return the new ones, the outermost first."""
    missing = [folder for folder in reversed(target.parents) if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _new_part(target: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Make a folder beside the target, locked while it is written."""
    while True:
        part = pathlib.Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        )
        _unfinished[part] = target
        try:
            held = _lock(part)
        except BlockingIOError:  # another process takes it for a stale one
            continue
        if part.exists():
            return part, held
        if held is not None:
            os.close(held)


def _lock(folder: pathlib.Path) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends.

    Returns:
        The descriptor, or `None` if the system has no such locks.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return held


def _tidy(target: pathlib.Path) -> None:
    """Remove half-written folders of killed processes, and put back those they had moved aside."""
    beside = re.compile(rf"\.{re.escape(target.name)}\.\w+\.(part|old)")
    found = [p for p in _entries(target.parent) if beside.fullmatch(p.name)]
    for part in (p for p in found if p.suffix == ".part"):
        with contextlib.suppress(OSError):
            held = _lock(part)
            if held is not None:
                shutil.rmtree(part, ignore_errors=True)
                os.close(held)
    for old in (p for p in found if p.suffix == ".old" and not p.with_suffix(".part").exists()):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _remove(folder: pathlib.Path) -> None:
    """Delete a folder in which threads of a library that failed may still be writing."""
    absent = 0
    for _ in range(100):
        absent = 0 if folder.exists() else absent + 1
        if absent == 3:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.03)


def _put(part: pathlib.Path, target: pathlib.Path, *, overwrite: bool) -> None:
    """Give a complete folder its name, and delete the folder that had it before."""
    if not overwrite or not target.exists():
        part.rename(target)  # fails if another has come in the meantime
    elif _exchange(part, target):
        shutil.rmtree(part)
    else:
        old = part.with_suffix(".old")
        target.rename(old)
        try:
            part.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old)


def _exchange(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Exchange the names of two folders in one step; return `False` if the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def write_text(path: pathlib.Path, text: str) -> pathlib.Path:
    """Write a UTF-8 text file, or replace one and keep its permissions.

    A reader sees the old text or the new one, also after a kill or a loss of power.

    Args:
        path: The file. Missing folders are made.
        text: The content. Half a character (a lone surrogate), which UTF-8 cannot hold, is written
            as its escape; within JSON that is the same text.

    Returns:
        The path.

    Raises:
        ExportError: The disk is full, or the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _unfinished[part] = path
    try:
        with explained(path):
            with part.open("wb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                part.chmod(path.stat().st_mode)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        _unfinished.pop(part, None)
    return path


def remove_unfinished() -> None:
    """Delete what this process has begun to write: it ends now, and will not do so itself."""
    for part, target in list(_unfinished.items()):
        part.unlink(missing_ok=True) if part.is_file() else _remove(part)
        _tidy(target)


@contextlib.contextmanager
def explained(target: pathlib.Path) -> Iterator[None]:
    """Turn errors of the system and of libraries while writing into errors in plain words.

    Args:
        target: The file or folder that is written.

    Yields:
        Nothing.

    Raises:
        ExportError: The disk is full, a file is larger than is allowed, or the system refuses.
    """
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        if _is_full(error):
            raise ExportError(
                f"{target} could not be written: the disk is full.",
                [str(error)],
                "Free some space, or choose a place with more. Nothing new was left behind.",
            ) from error
        if not isinstance(error, OSError) or error.errno is None:
            raise
        raise ExportError(
            f"{target} could not be written: {error.strerror}.",
            [str(error)],
            "Choose another place, or mend this one. Nothing new was left behind.",
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, means a full disk; HDF5 and safetensors use words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(os.strerror(number) in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def sha256(path: pathlib.Path) -> str:
    """Compute the SHA-256 of a file in hexadecimal, with little of the file in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
