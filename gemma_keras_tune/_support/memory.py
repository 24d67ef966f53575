"""Memory: how much is free for a training step; and what is freed is kept for the next one.

XLA on the CPU takes the temporary arrays of every operation from `malloc`. glibc gives large ones
back to the kernel as soon as they are freed, and the kernel clears each page again when it is asked
for the next one: half of the time of a training step of Gemma 3 270M on two cores.
"""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import sys
import threading
from collections.abc import Iterator

# From <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
# What glibc starts with, its thresholds where its own adjustment would have taken them.
_DEFAULTS = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_lock = threading.Lock()
_users = 0


def share_arena() -> None:
    """Let threads that are yet to start take memory where `kept_memory` keeps it.

    glibc gives threads arenas of their own, which hold nothing above 64 MB: what is larger, as the
    temporary arrays of a training step are, comes from the kernel and goes back to it. In the main
    arena nothing is too large. A thread stays in the arena it begins with, so this comes before
    the first array, which starts JAX's threads: after it a step takes as long as without. It does
    what `MALLOC_ARENA_MAX=1` in the environment does; a setting of the user's own stands, and so
    does glibc's where JAX has a plugin for an accelerator. It cannot be taken back: glibc reads the
    limit once.
    """
    plugins = [name for name in ("jax_plugins", "libtpu") if importlib.util.find_spec(name)]
    if _has_glibc() and not plugins and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let `malloc` keep what is freed, and give it all back at the end.

    Does nothing where arrays live on an accelerator, or without glibc.
    """
    global _users
    libc = _glibc()
    if libc is None:
        yield
        return
    with _lock:
        _users += 1
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for option, value in _DEFAULTS.items():
                    libc.mallopt(option, value)
                libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    import jax

    return ctypes.CDLL(None) if _has_glibc() and jax.default_backend() == "cpu" else None


def _has_glibc() -> bool:
    on_linux = sys.platform.startswith("linux")
    return on_linux and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def free_memory() -> int | None:
    """Bytes free for a training step on the first accelerator, or on the host where there is none.

    On the host also the limits of the process's control groups count, as containers have them.

    Returns:
        Bytes, or `None` where nothing says.
    """
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else int(limit - stats.get("bytes_in_use", 0))
    said = [free for free in (_host_memory(), control_group_memory()) if free is not None]
    return min(said, default=None)


def _host_memory() -> int | None:
    try:
        fields = _fields(pathlib.Path("/proc/meminfo").read_text().replace(":", ""))
        return fields["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None


def control_group_memory(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes left under the limits of this process's control groups, of either version.

    A group's limit holds for all groups in it, so every group on the way up counts. In a container
    the groups are seen from inside, and the path that the kernel names may not be there.

    Args:
        root: Where `proc` and `sys` are mounted.

    Returns:
        Bytes, or `None` where there is no limit.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            left += _left_in_group(folder)
            if folder == top:
                break
    return min(left, default=None)


def _left_in_group(folder: pathlib.Path) -> list[int]:
    """Bytes left in a control group: its limit, less what is used and cannot be dropped."""
    for limit, used, file_cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            dropped = _fields((folder / "memory.stat").read_text()).get(file_cache, 0)
            return [max(most - taken + dropped, 0)]
    return []


def _fields(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    return {name: int(number) for name, number, *_ in map(str.split, text.splitlines())}
