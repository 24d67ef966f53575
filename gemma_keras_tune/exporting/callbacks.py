"""Callbacks that save while a model trains."""

import os
import pathlib
from typing import Any

import keras

from gemma_keras_tune._support.files import check_free
from gemma_keras_tune._support.numbers import integer
from gemma_keras_tune.adapters.active import (
    chosen_adapter,
)
from gemma_keras_tune.errors import PlanError
from gemma_keras_tune.exporting.saving import save_adapter
from gemma_keras_tune.training.optimizer import batches_per_step

__all__ = ["AdapterCheckpoint"]


class AdapterCheckpoint(keras.callbacks.Callback):
    """Save the adapter during training, in place of the one saved before.

    Each time the new folder is written aside and renamed, so a run that is cut off leaves a whole
    adapter. `load_adapter` puts it on the base again, and `tune` goes on with it.

    Args:
        path: The folder, as `save_adapter` writes it.
        steps: Save after this many steps (updates of the weights); `None` saves after every epoch.
        overwrite: Whether a folder that is there before the run may be replaced.

    Attributes:
        epochs: Whole epochs that the last adapter saved has been trained for; 0 before the first.

    Raises:
        PlanError: `steps` is not a positive integer.
        ExportError: The folder exists.
        AdapterError: When training begins: LoRA is not on the model.

    Example:
    ```python
    gkt.tune(model, pairs, callbacks=[gkt.callbacks.AdapterCheckpoint("part_numbers_adapter")])
    ```
    """

    def __init__(
        self, path: str | os.PathLike[str], *, steps: int | None = None, overwrite: bool = False
    ) -> None:
        super().__init__()
        if problem := integer(1).problem("steps", steps, None):
            raise PlanError(problem)
        check_free(path, overwrite=overwrite)
        self.path = pathlib.Path(path)
        self.steps = steps
        self._overwrite = overwrite
        self._batches = 0
        self._epoch = 0
        self.epochs = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refuse a model without an adapter, before anything is trained."""
        trainer = self.model
        chosen_adapter(trainer.gemma)
        self._every = (self.steps or 0) * batches_per_step(trainer.optimizer)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Save after every `updates` updates."""
        self._batches += 1
        if self._every and self._batches % self._every == 0:
            self._save()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Save, unless `steps` is set."""
        self._epoch = epoch + 1
        if not self._every:
            self._save()

    def _save(self) -> None:
        save_adapter(self.model.gemma, self.path, overwrite=self._overwrite)
        self._overwrite = True  # what this run has written
        self.epochs = self._epoch
