"""Check of the backend that Keras and JAX run on, made before any work."""

import contextlib
import functools
import importlib.metadata
import os
import pkgutil
import re
import sys
import warnings

import jax
import jaxlib.version
import keras

from gemma_keras_tune._support.memory import compute_on_the_calling_thread, share_arena
from gemma_keras_tune.errors import BackendError

_PLUGIN = re.compile(r"jax_(?P<gpu>cuda|rocm)(?P<version>\d+)_plugin|libtpu")
# JAX's own default is 0.75. All of it would leave nothing for what cuDNN and others need.
_MEMORY_SHARE = "0.92"
_MEMORY_SETTINGS = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",  # the same, by its newer name
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
}
# Modules that a notebook may have loaded before pip replaced them.
_REPLACED_BY_PIP = ("jax", "jaxlib", "keras", "keras_hub", "numpy", "pyarrow", "tensorflow")


def check_backend() -> None:
    """Refuse a backend that is not supported, and tell what the process runs on unexpectedly.

    The first call prepares JAX, as far as it has not started: programs on the CPU run in the
    calling thread, an accelerator's memory is JAX's to 92 %, and TensorFlow is kept off it.

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
    _prepare()


@functools.cache
def _prepare() -> None:
    """Prepare JAX and TensorFlow, and warn of what a user would not expect; once in a process."""
    share_arena()
    compute_on_the_calling_thread()
    plugins = _plugins()
    if any(found["gpu"] for found in plugins.values()):
        _take_memory()
    _check_versions()
    _check_plugins(plugins)
    _check_devices()
    if jax.default_backend() != "cpu":
        _keep_tensorflow_off()


def _take_memory() -> None:
    """Let JAX take most of the memory of a GPU, unless the user has said how it allocates."""
    if not _MEMORY_SETTINGS & os.environ.keys():
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = _MEMORY_SHARE


def _plugins() -> dict[str, re.Match[str]]:
    """Return the installed plugins of JAX for accelerators, by the names of their modules."""
    return {
        module.name: found
        for module in pkgutil.iter_modules()
        if (found := _PLUGIN.fullmatch(module.name))
    }


def _keep_tensorflow_off() -> None:
    """Hide accelerators from TensorFlow, which only reads data here and would take memory."""
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        with contextlib.suppress(RuntimeError, ValueError):  # it has started already
            tf.config.set_visible_devices([], kind)


def _check_versions() -> None:
    """Warn if a module in memory is of another version than the installed one."""
    stale = []
    for name in _REPLACED_BY_PIP:
        loaded = getattr(sys.modules.get(name), "__version__", None)
        installed = _version(name)
        if loaded and installed and _release(loaded) != _release(installed):
            stale.append(f"{name} {loaded} is loaded, {installed} is installed")
    if stale:
        warnings.warn(
            f"This process holds modules that pip has replaced since: {'; '.join(stale)}. Restart "
            "it, in a notebook by “Restart session”, before anything else.",
            UserWarning,
            stacklevel=4,
        )


def _release(version: str) -> str:
    return re.split(r"[^\d.]", version)[0].rstrip(".")


def _check_devices() -> None:
    """Warn if JAX has several accelerators and only the first of them is used."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu" or len(devices) == 1 or keras.distribution.distribution():
        return
    warnings.warn(
        f"One of {len(devices)} devices ({devices[0].device_kind}) is used. To train on all of "
        "them, type before the model is loaded\n"
        "    keras.distribution.set_distribution(keras.distribution.DataParallel())\n"
        "To use one on purpose, make the others invisible, for example with "
        "CUDA_VISIBLE_DEVICES=0.",
        UserWarning,
        stacklevel=4,
    )


def _check_plugins(plugins: dict[str, re.Match[str]]) -> None:
    """Warn if JAX runs on the CPU although a plugin for an accelerator is installed."""
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not plugins or chosen or jax.default_backend() != "cpu":
        return
    installed = ", ".join(
        f"{name} {_version(name) or 'of unknown version'}" for name in sorted(plugins)
    )
    warnings.warn(
        f"JAX runs on the CPU, though a plugin for an accelerator is installed: {installed}, "
        f"beside jaxlib {jaxlib.version.__version__}. If this machine has the accelerator, type\n"
        f"    pip install {' '.join(_requirement(plugins[name]) for name in sorted(plugins))}\n"
        "and start again. To run on the CPU on purpose, set JAX_PLATFORMS=cpu.",
        UserWarning,
        stacklevel=4,
    )


def replicas() -> int:
    """Return the number of parts that Keras splits each batch into: one for a device or group."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return int(mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)])


def device_name() -> str:
    """Return the kind of the device that models run on, with the number of those used."""
    distribution = keras.distribution.distribution()
    used = 1 if distribution is None else int(distribution.device_mesh.devices.size)
    kind = jax.devices()[0].device_kind
    return kind if used == 1 else f"{used} x {kind}"


def _requirement(plugin: re.Match[str]) -> str:
    """Return the requirement of pip for the plugin that fits the installed JAX."""
    gpu, version = plugin["gpu"], plugin["version"]
    if gpu == "rocm":
        return " ".join(
            f"jax-rocm{version}-{p}=={jaxlib.version.__version__}" for p in ("plugin", "pjrt")
        )
    return f'"jax[{f"cuda{version}" if gpu else "tpu"}]=={jax.__version__}"'


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
