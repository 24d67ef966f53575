"""Attention in plain operations, where the fused operation of Keras fails or forgets a soft cap.

KerasHub 0.32 asks the private method `_use_fused_attention_op` of an attention layer, and offers no
public way to answer. The two functions here answer in its place, on the layers of one model.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import keras

_ANSWER = "_use_fused_attention_op"


@contextlib.contextmanager
def plain_attention(model: keras.Model) -> Iterator[None]:
    """Trace attention in plain operations.

    JAX cannot batch cuDNN's attention over rows that have a place of their own each. Keras would
    log a traceback for every layer, and then compute in plain operations all the same.

    Args:
        model: A KerasHub Gemma `CausalLM`.

    Yields:
        Nothing.
    """
    changed = [layer for layer in _layers(model.backbone) if _ANSWER not in vars(layer)]
    for layer in changed:
        setattr(layer, _ANSWER, _no)
    try:
        yield
    finally:
        for layer in changed:
            delattr(layer, _ANSWER)


def keep_soft_cap(backbone: keras.Model) -> None:
    """Let a Gemma 2 on a TPU keep the soft cap of its attention.

    Keras 3.15 falls back from the fused operation wherever the mask is traced, as it is in every
    compiled program, and leaves out the cap there. On other devices nothing is changed.

    Args:
        backbone: A KerasHub Gemma backbone.
    """
    if jax.devices()[0].platform != "tpu":
        return
    for layer in _layers(backbone):
        if getattr(layer, "logit_soft_cap", None) is not None:
            setattr(layer, _ANSWER, _no)


def _layers(backbone: keras.Model) -> list[Any]:
    """Return the attention layers that may use the fused operation."""
    found = (getattr(layer, "attention", None) for layer in backbone.layers)
    return [layer for layer in found if hasattr(layer, _ANSWER)]


def _no() -> bool:
    return False
