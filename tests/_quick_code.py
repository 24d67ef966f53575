"""The code generator of XLA that takes tiny models half the time of the usual one."""

import os
from unittest import mock

import jax


def quick_code_generation() -> None:
    """Choose it for this process, before anything is compiled, and not for those that it starts.

    With all optimizations on, as the real model is compiled, it takes longer.
    """
    flags = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
    with mock.patch.dict(os.environ, XLA_FLAGS=flags):
        jax.jit(lambda: 1.0)()
