"""JAX's cache of compiled programs."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def compilation_cache() -> Iterator[None]:
    """Let JAX keep compiled programs on disk, so that the next process need not compile them again.

    They are kept in `gemma_keras_tune/jax` in the user's cache folder. A cache that the user has
    set up is used as it is; `JAX_ENABLE_COMPILATION_CACHE=false` keeps none. JAX's settings are put
    back at the end.
    """
    import jax
    import platformdirs
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(platformdirs.user_cache_path("gemma_keras_tune") / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    if before["jax_compilation_cache_dir"]:
        yield
        return
    _update(settings)
    try:
        yield
    finally:
        _update(before)
        reset_cache()  # JAX would go on using the folder that it has opened


def _update(settings: dict[str, Any]) -> None:
    import jax

    for name, value in settings.items():
        jax.config.update(name, value)
