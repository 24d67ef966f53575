"""Callbacks of a run."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune.errors import TrainingError
from gemma_keras_tune.training.optimizer import follows_schedule

# Keras's callbacks that save the model, or load it, in Keras's own way.
_SAVING = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
# Those that set the learning rate, which Keras refuses where it follows a schedule.
_SETTING_RATE = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)


def callback_problems(callbacks: Any, method: str, optimizer: Any = "auto") -> list[str]:
    """Name the callbacks that cannot work with LoRA, or with the optimizer of a run.

    Args:
        callbacks: As `tune` takes them.
        method: `"lora"` or `"full"`.
        optimizer: As `tune` takes it.

    Returns:
        One line for each.
    """
    if not isinstance(callbacks, Sequence):
        return [f"`callbacks` must be a list of Keras callbacks. Received: {callbacks!r}"]
    problems = []
    for callback in callbacks:
        name = type(callback).__name__
        if not isinstance(callback, keras.callbacks.Callback):
            problems.append(f"`callbacks` must hold Keras callbacks. Received: {callback!r}")
        elif isinstance(callback, _SETTING_RATE) and follows_schedule(optimizer):
            problems.append(
                f"`callbacks`: {name} sets the learning rate, and the optimizer follows a "
                "schedule. Pass `optimizer=keras.optimizers.AdamW(5e-4)`, whose rate it can set; "
                f"or leave {name} out, and pass a Keras schedule as `learning_rate`"
            )
        elif not isinstance(callback, _SAVING):
            continue
        elif method == "lora":
            problems.append(
                f"`callbacks`: {name} saves the model merged and sets LoRA to zero when it loads "
                "it. Pass `AdapterCheckpoint(path)` in its place"
            )
        elif not getattr(callback, "save_weights_only", True):
            problems.append(
                f"`callbacks`: {name} saves a model that Keras cannot build again. Pass "
                "`save_weights_only=True` to it, or call `save_preset(model, path)` at the end"
            )
    return problems


class Snapshot:
    """Copies of the values of variables, to go back to.

    Args:
        variables: The variables.
    """

    def __init__(self, variables: Iterable[keras.Variable]) -> None:
        # Copies: a training step takes the arrays and writes over them.
        self._values = [(variable, np.asarray(variable).copy()) for variable in variables]

    def restore(self) -> None:
        """Give the variables these values again."""
        for variable, value in self._values:
            variable.assign(value)


class BestWeights(keras.callbacks.Callback):
    """Keeps the trainable weights of the epoch with the lowest validation loss, and restores them.

    Keras's own `restore_best_weights` copies the frozen base model too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.best = np.inf
        self._kept: Snapshot | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Keep the weights if this epoch is the best so far."""
        loss = (logs or {}).get("val_loss")
        if loss is not None and loss < self.best:
            self.best = float(loss)
            self._kept = Snapshot(self.model.trainable_variables)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Go back to the best weights."""
        if self._kept is not None:
            self._kept.restore()


class HeldValues(keras.callbacks.Callback):
    """Holds the values of all variables, for `put_back` after a first batch that fails.

    Keras takes the values out of the variables before the first batch of an epoch, and puts back
    those of the last batch that went well. An interrupt while the step is compiled, or too little
    memory, would leave a model without weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: list[tuple[keras.Variable, Any]] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Hold the values."""
        variables = (*self.model.variables, *self.model.optimizer.variables)
        self._values = [(variable, variable.value) for variable in variables]

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Hold the values that the validation begins with."""
        self.on_epoch_begin(0)

    def put_back(self, error: BaseException) -> None:
        """Give the variables that are without a value the one held.

        Args:
            error: The reason; it gets a note where the values are lost.
        """
        # That a variable is without a value can be told by its private `_value` alone.
        empty = [
            (v, value) for v, value in self._values if v._value is None or v._value.is_deleted()
        ]
        for variable, value in empty:
            if not value.is_deleted():
                variable.assign(value)
        if any(value.is_deleted() for _, value in empty):
            error.add_note("The failed step has taken the model's weights: load it anew.")


class FiniteLoss(keras.callbacks.Callback):
    """Stops at the first step whose loss is not finite.

    The loss is the mean since the epoch began, so it stays not finite. Keras has read it already,
    maybe in threads, whose order is not certain.
    """

    async_safe = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the epoch."""
        self._epoch = epoch + 1
        self._failed = math.inf

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise where the loss is not finite."""
        if math.isfinite((logs or {})["loss"]):
            return
        self._failed = min(self._failed, batch + 1)
        several = self.model.steps_per_execution
        first = f"{self._failed - several + 1:,} to " if several > 1 else ""
        dtype = self.model.gemma.compute_dtype
        wider = {"float16": "'bfloat16' or 'float32'", "bfloat16": "'float32'"}.get(dtype)
        raise TrainingError(
            f"The loss or its gradient is not finite in step {first}{self._failed:,} of "
            f"epoch {self._epoch:,}. The model has the weights from before that step.",
            next_step="Load the model again and train it with a lower learning rate"
            + (f", or with `dtype` {wider} in place of {dtype}." if wider else "."),
        )


class Interruptible(keras.callbacks.Callback):
    """Raises a held interrupt between two steps, where the model has the weights of whole steps.

    Within a step it would lose them: Keras gives the old ones away, and has not yet got the new.

    Args:
        raise_held: As `held_interrupts` yields it.
    """

    def __init__(self, raise_held: Callable[[], None]) -> None:
        super().__init__()
        self._raise_held = raise_held

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Raise the interrupt, if there was one."""
        self._raise_held()

    on_test_batch_begin = on_train_batch_begin


class TuningProgress(keras.callbacks.Callback):
    """Draws a progress bar over the whole run: loss, tokens a second, time left.

    Args:
        batches: Batches in the whole run.
        tokens: Tokens fed in the whole run, padding left out.
        disable: Draw nothing, but measure all the same.

    Attributes:
        done: Batches so far.
        rates: The learning rate at the end of each epoch, and its batches.
        seconds: How long the run took.
        seconds_first_batch: How long the first batch took, compiling included.
    """

    def __init__(self, batches: int, tokens: int, *, disable: bool = False) -> None:
        super().__init__()
        self.batches = batches
        self.tokens = tokens
        self.disable = disable
        self.seconds_first_batch = 0.0
        self.seconds = 0.0
        self.done = 0
        self.rates: list[tuple[float, int]] = []
        self._bar: Any = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm

        self._begin = time.perf_counter()
        self._shown = 0.0
        self._bar = tqdm(
            total=self.batches, disable=self.disable, unit="batch", desc="Compiling", leave=True
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Advance the bar; read the loss a few times a second only, since reading waits for it."""
        self.done += 1
        now = time.perf_counter()
        if self.done == 1:
            self.seconds_first_batch = now - self._begin
            self._bar.set_description("Tuning")
        self._bar.update(1)
        if now - self._shown > 0.5 and logs:
            self._shown = now
            rate = self.tokens * self.done / self.batches / (now - self._begin)
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {rate:,.0f} tokens/s")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note the learning rate, which other callbacks may change now."""
        batches = self.done - sum(count for _, count in self.rates)
        self.rates.append((float(self.model.optimizer.learning_rate), batches))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Close the bar."""
        self.seconds = time.perf_counter() - self._begin
        self.close()

    def close(self) -> None:
        """Close the bar, where there is one."""
        if self._bar is not None:
            self._bar.close()
