"""Memory: the amount that is free for a training step, and the reuse of what a step has freed.

XLA on the CPU allocates the temporary arrays of every operation with `malloc`. glibc returns large
ones to the kernel as soon as they are freed, and the kernel clears each page again for the next
array: half of the time of a training step of Gemma 3 270M on two cores.
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
# The defaults of glibc, with the thresholds that its own adjustment would reach.
_DEFAULTS = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_lock = threading.Lock()
_users = 0


def share_arena() -> None:
    """Let threads that start later allocate in the arenas that are there.

    glibc would give each of them another one, which keeps what is freed in it: a checkpoint of a
    few hundred MB, written by several threads, takes a third more memory. It cannot be undone. If
    the user has set `MALLOC_ARENA_MAX`, or JAX has a plugin for an accelerator, nothing is changed.
    """
    plugins = [name for name in ("jax_plugins", "libtpu") if importlib.util.find_spec(name)]
    if _has_glibc() and not plugins and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def compute_on_the_calling_thread() -> None:
    """Let JAX run programs on the CPU in the thread that calls them, not in one of its own.

    glibc gives each thread but the first an arena that holds nothing above 64 MB: there the larger
    arrays of a training step come from the kernel and return to it, whatever `kept_memory` sets.
    JAX reads the setting when it starts on the CPU, so this must precede the first array. If the
    user has set `JAX_CPU_ENABLE_ASYNC_DISPATCH`, nothing is changed.
    """
    import jax

    if _has_glibc() and "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let `malloc` keep freed memory, and return it to the kernel at the end.

    Does nothing if arrays are on an accelerator, or without glibc.
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
    """Return the bytes free for a training step on the first accelerator, or else on the host.

    On the host the limits of the process's control groups count too: containers have them.

    Returns:
        Bytes, or `None` if they are unknown.
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
    """Return the bytes left under the limits of this process's control groups, of either version.

    The limit of a group holds for all groups in it, so every group on the way up counts. In a
    container the groups are seen from inside, and the path that the kernel names may not exist.

    Args:
        root: The folder in which `proc` and `sys` are mounted.

    Returns:
        Bytes, or `None` without a limit.
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
    """Return the bytes left in a control group: its limit minus the memory that it cannot drop."""
    for limit, used, file_cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            dropped = _fields((folder / "memory.stat").read_text()).get(file_cache, 0)
            return [max(most - taken + dropped, 0)]
    return []


def _fields(text: str) -> dict[str, int]:
    """Read lines of a name and a number."""
    return {name: int(number) for name, number, *_ in map(str.split, text.splitlines())}
