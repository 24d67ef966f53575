"""The one check of what Keras runs on, made before any work."""

import keras

from gemma_keras_tune.errors import BackendError


def check_backend() -> None:
    """Refuse what this library does not compute on.

    Raises:
        BackendError: Keras does not run on JAX, or keeps floats in half precision.
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
