"""Quantizing in tests."""

import gc
from typing import Any


def quantize(layer: Any, mode: str, **options: Any) -> None:
    """What `layer.quantize(mode, …)` does, in a process that holds much.

    Keras collects garbage once for every variable, a quarter of a second where all tests' modules
    are imported. What is there before is spared that.
    """
    gc.freeze()
    try:
        layer.quantize(mode, **options)
    finally:
        gc.unfreeze()
