"""Check of the backend that Keras and JAX run on, made before any work."""

import functools
import importlib.metadata
import pkgutil
import re
import warnings

import jax
import jaxlib.version
import keras

from gemma_keras_tune._support.memory import compute_on_the_calling_thread
from gemma_keras_tune.errors import BackendError

_PLUGIN = re.compile(r"jax_(?P<gpu>cuda|rocm)(?P<version>\d+)_plugin|libtpu")


def check_backend() -> None:
    """Refuse a backend that is not supported, and warn of an accelerator that is not used.

    `compute_on_the_calling_thread` is called before JAX starts on the CPU.

    Raises:
        BackendError: Keras does not run on JAX, or its `floatx` is not float32.
    """
    backend = keras.config.backend()
    if backend != "jax":
        raise BackendError(
            f"Keras must run on JAX. It runs on {backend}.",
            next_step="Set KERAS_BACKEND=jax in the environment before Keras is imported, and "
            "start again.",
        )
    if keras.config.floatx() != "float32":
        raise BackendError(
            f"Keras keeps floats in {keras.config.floatx()}, where token ids are rounded.",
            next_step="Call `keras.config.set_floatx('float32')`, and pass `dtype` to `load` for "
            "smaller weights.",
        )
    compute_on_the_calling_thread()
    _check_devices()


@functools.cache
def _check_devices() -> None:
    """Warn once if JAX runs on the CPU although a plugin for an accelerator is installed."""
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if chosen or jax.default_backend() != "cpu":
        return
    plugins = {
        module.name: found
        for module in pkgutil.iter_modules()
        if (found := _PLUGIN.fullmatch(module.name))
    }
    if not plugins:
        return
    installed = ", ".join(f"{name} {_version(name)}" for name in sorted(plugins))
    warnings.warn(
        f"JAX runs on the CPU, though a plugin for an accelerator is installed: {installed}, "
        f"beside jaxlib {jaxlib.version.__version__}. If this machine has the accelerator, type\n"
        f"    pip install {' '.join(_requirement(plugins[name]) for name in sorted(plugins))}\n"
        "and start again. To run on the CPU on purpose, set JAX_PLATFORMS=cpu.",
        UserWarning,
        stacklevel=3,
    )


def _requirement(plugin: re.Match[str]) -> str:
    """Return the requirement of pip for the plugin that fits the installed JAX."""
    gpu, version = plugin["gpu"], plugin["version"]
    if gpu == "rocm":
        return " ".join(
            f"jax-rocm{version}-{p}=={jaxlib.version.__version__}" for p in ("plugin", "pjrt")
        )
    return f'"jax[{f"cuda{version}" if gpu else "tpu"}]=={jax.__version__}"'


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
