"""Freed memory stays with the process while a model trains on the CPU, and not after."""

import ctypes
import os
import resource
import subprocess
import sys

import jax
import pytest

from gemma_keras_tune._support.memory import control_group_memory, kept_memory

SIZE = 64 << 20


def faults_of_a_second_use():
    """Page faults of writing to a block that was taken and freed just before."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(SIZE)
        ctypes.memset(block, 1, SIZE)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or jax.default_backend() != "cpu",
    reason="malloc is left as it is elsewhere",
)
def test_freed_memory_is_kept_inside_and_given_back_outside():
    outside = faults_of_a_second_use()
    with kept_memory():
        with kept_memory():
            assert faults_of_a_second_use() < outside / 10
        assert faults_of_a_second_use() < outside / 10
    assert faults_of_a_second_use() > outside / 2


THREADS = """
import resource
import jax
import gemma_keras_tune
from gemma_keras_tune._support.memory import kept_memory
from gemma_keras_tune._support.backend import check_backend

check_backend()  # as all work begins

more = jax.jit(lambda x: x + 1)
x = jax.numpy.ones((4096, 4096))
faults = []
with kept_memory():
    for _ in range(30):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        more(x).block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[15])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or jax.default_backend() != "cpu",
    reason="malloc is left as it is elsewhere",
)
def test_what_jax_frees_is_kept_too():
    def faults(**environment):
        done = subprocess.run(
            [sys.executable, "-c", THREADS],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert faults() < (faults(JAX_CPU_ENABLE_ASYNC_DISPATCH="1", MALLOC_ARENA_MAX="8") / 10)


def control_groups(root, own, files):
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(own)
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_the_tightest_limit_on_the_way_up_counts_in_control_groups_of_version_2(tmp_path):
    control_groups(
        tmp_path,
        "0::/outer/inner\n",
        {
            "outer/inner/memory.max": "max\n",
            "outer/inner/memory.current": "100\n",
            "outer/memory.max": "1000\n",
            "outer/memory.current": "300\n",
            "outer/memory.stat": "anon 200\ninactive_file 50\n",
        },
    )
    assert control_group_memory(tmp_path) == 1000 - 300 + 50


def test_a_container_sees_its_control_group_of_version_1_from_inside(tmp_path):
    control_groups(
        tmp_path,
        "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        {
            "memory/memory.limit_in_bytes": "5000\n",
            "memory/memory.usage_in_bytes": "4000\n",
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
        },
    )
    assert control_group_memory(tmp_path) == 1500


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert control_group_memory(tmp_path) is None
    control_groups(tmp_path, "0::/\n", {"memory.max": "max\n"})
    assert control_group_memory(tmp_path) is None
