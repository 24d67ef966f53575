"""The code generator of XLA that takes tiny models half the time of the usual one."""

import os

import jax


def quick_code_generation() -> None:
    """Choose it for this process, before anything is compiled, and not for those that it starts.

    With all optimizations on, as the real model is compiled, it takes longer.
    """
    given = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {given or ''}"
    jax.jit(lambda: 1.0)()
    del os.environ["XLA_FLAGS"]
    if given is not None:
        os.environ["XLA_FLAGS"] = given
