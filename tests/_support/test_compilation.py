"""JAX's cache of compiled programs: ours within a run, the user's always, and put back."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import platformdirs
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from gemma_keras_tune._support.compilation import compilation_cache

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def settings():
    return {name: getattr(jax.config, name) for name in NAMES}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    before = settings()
    jax.config.update(NAMES[0], None)
    jax.config.update(NAMES[1], 0.0)
    reset_cache()  # one of the environment's may be open
    yield tmp_path / "gemma_keras_tune" / "jax"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_the_settings_of_the_process_are_put_back(folder):
    before = settings()
    with pytest.raises(KeyboardInterrupt), compilation_cache():
        assert jax.config.jax_compilation_cache_dir == str(folder)
        jax.config.update(NAMES[1], 0.0)
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0))
        raise KeyboardInterrupt
    assert settings() == before
    entries = sorted(folder.iterdir())
    assert entries
    jax.jit(lambda x: x * 5 + 2)(jnp.arange(7.0))  # after it, nothing is kept
    assert sorted(folder.iterdir()) == entries


def test_a_cache_of_the_users_is_left_alone(folder, tmp_path):
    jax.config.update(NAMES[0], str(tmp_path / "own"))
    before = settings()
    with compilation_cache():
        assert settings() == before
    assert settings() == before


SCRIPT = """
import jax, jax.numpy as jnp, platformdirs, pathlib
from gemma_keras_tune._support.compilation import compilation_cache

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
platformdirs.user_cache_path = lambda name: pathlib.Path("cache")
jnp.arange(3.0) * 2  # compiled before, without a cache
with compilation_cache():
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


@pytest.mark.slow
def test_the_next_process_finds_the_programs(tmp_path):
    import os

    import gemma_keras_tune

    root = os.path.dirname(os.path.dirname(gemma_keras_tune.__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    counts = [
        int(
            subprocess.run(
                [sys.executable, "-c", SCRIPT],
                cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
            ).stdout.split()[-1]
        )
        for _ in range(2)
    ]  # fmt: skip
    assert counts[0] == 0 < counts[1]
