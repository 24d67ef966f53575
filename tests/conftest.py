"""Shared fixtures. The backend is chosen before anything imports Keras."""

import os
from collections.abc import Iterator

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest
from _quick_code import QUICK_CODE, quick_code_generation


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model first: what takes long must not begin last."""
    items.sort(key=lambda item: not is_real(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Before anything is compiled."""
    if any(is_real(item) for item in session.items):
        jax.jit(lambda: 1.0)()  # XLA reads its flags now, and not those for other processes later
    else:
        quick_code_generation()


def is_real(item: pytest.Item) -> bool:
    return item.get_closest_marker("real") is not None


QUICK = "jax_disable_most_optimizations"
FLAGS = os.environ.get("XLA_FLAGS", "")


def compile_quickly(quickly: bool) -> None:
    """In this process, and in those that it starts."""
    jax.config.update(QUICK, quickly)
    os.environ[QUICK.upper()] = str(quickly)
    os.environ["XLA_FLAGS"] = f"{QUICK_CODE} {FLAGS}" if quickly else FLAGS


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """Tiny models take seconds to compile and milliseconds to run."""
    compile_quickly(True)
    yield
    compile_quickly(False)


@pytest.fixture(autouse=True)
def full_compilation_of_the_real_model(request: pytest.FixtureRequest) -> Iterator[None]:
    """The real model is compiled as users' are."""
    compile_quickly(not is_real(request.node))
    yield
    compile_quickly(True)
