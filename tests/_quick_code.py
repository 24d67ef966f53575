"""The code generator of XLA that takes tiny models half the time of the usual one."""

import os
from unittest import mock

import jax

QUICK_CODE = "--xla_cpu_use_fusion_emitters=false"


def quick_code_generation() -> None:
    """Choose it for this process, before anything is compiled.

    With all optimizations on, as the real model is compiled, it takes longer.
    """
    flags = f"{QUICK_CODE} {os.environ.get('XLA_FLAGS', '')}"
    with mock.patch.dict(os.environ, XLA_FLAGS=flags):
        jax.jit(lambda: 1.0)()
