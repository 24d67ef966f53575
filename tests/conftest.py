"""Shared fixtures. The backend is chosen before anything imports Keras."""

import os
from collections.abc import Iterator

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """Tiny models take seconds to compile and milliseconds to run.

    The real model, and every process that a test starts, is compiled as users' are.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def full_compilation_of_the_real_model(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("real") is None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
