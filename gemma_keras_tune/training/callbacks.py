"""Callbacks of a run."""

from typing import Any

import keras
import numpy as np


class BestWeights(keras.callbacks.Callback):
    """Keeps the trainable weights of the epoch with the lowest validation loss, and restores them.

    Keras's own `restore_best_weights` copies the frozen base model too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.best = np.inf
        self._kept: list[np.ndarray] | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keep the weights if this epoch is the best so far."""
        loss = (logs or {}).get("val_loss")
        if loss is not None and loss < self.best:
            self.best = float(loss)
            # A copy: the next step takes the arrays back and writes over them.
            self._kept = [np.asarray(v).copy() for v in self.model.trainable_variables]

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Go back to the best weights."""
        if self._kept is not None:
            for variable, value in zip(self.model.trainable_variables, self._kept, strict=True):
                variable.assign(value)
