"""Optimizers: AdamW with warm-up and cosine decay, or another of Keras's by its name."""

from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from gemma_keras_tune._support.numbers import POSITIVE, integer
from gemma_keras_tune.adapters.lora import lora_config
from gemma_keras_tune.errors import PlanError

# Suffixes of the variables that weight decay leaves alone: norms, biases and Gemma 4's scalars.
NO_DECAY = ("bias", "scale", "layer_scalar")
# For models of up to `LARGE` parameters, and for larger ones.
LEARNING_RATES = {"lora": (5e-4, 2e-4), "full": (5e-5, 1e-5)}
LARGE = 1.5e9


@keras.saving.register_keras_serializable("gemma_keras_tune")
class PerStep(LearningRateSchedule):
    """A schedule over steps, for an optimizer that counts the batches it accumulates.

    Keras asks a schedule at every batch, and makes the step with the rate of the last of them.

    Args:
        schedule: A schedule by the number of the step, from 0.
        batches: Batches that make one step.
    """

    def __init__(self, schedule: LearningRateSchedule, batches: int) -> None:
        super().__init__()
        self.schedule = schedule
        self.batches = batches

    def __call__(self, step: Any) -> Any:
        """Give the learning rate at a batch.

        Args:
            step: Number of the batch, from 0.

        Returns:
            A float scalar.
        """
        return self.schedule(ops.floor_divide(step, self.batches))

    def get_config(self) -> dict[str, Any]:
        """Give the arguments as JSON data."""
        inner = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": inner, "batches": self.batches}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PerStep":
        """Make the schedule that `get_config` described."""
        inner = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(inner, config["batches"])


def make_optimizer(
    learning_rate: float | LearningRateSchedule,
    *,
    steps: int,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clipnorm: float | None = 1.0,
    beta_2: float | None = None,
    gradient_accumulation_steps: int = 1,
    name: str = "adamw",
) -> keras.optimizers.Optimizer:
    """Make AdamW (arXiv:1711.05101) with linear warm-up and cosine decay to a tenth.

    Weight decay leaves norms and biases alone; the whole gradient is clipped by its global norm.

    Args:
        learning_rate: Peak learning rate; or a schedule over the steps, which is followed as it is.
        steps: Steps in the whole run. A step is one update of the weights.
        warmup_steps: Steps over which the rate rises linearly from zero; fewer than `steps`, and 0
            with a schedule.
        weight_decay: Decoupled weight decay, as a share of the learning rate.
        clipnorm: Largest global gradient norm; `None` does not clip.
        beta_2: Decay of the second moment; `None` is the optimizer's default (0.999 for AdamW).
        gradient_accumulation_steps: Batches whose gradients make one step.
        name: Another optimizer of Keras, such as `"lion"`, with the same schedule.

    Returns:
        A `keras.optimizers.Optimizer`.

    Raises:
        PlanError: There are no steps, or all of them are warm-up; a number is out of range; or no
            such optimizer.
    """
    scheduled = isinstance(learning_rate, LearningRateSchedule)
    problems = (
        integer(0).problem("steps", steps),
        integer(0).problem("warmup_steps", warmup_steps),
        integer(1).problem("gradient_accumulation_steps", gradient_accumulation_steps),
        None if scheduled else POSITIVE.problem("learning_rate", learning_rate),
    )
    if found := [problem for problem in problems if problem]:
        raise PlanError("The optimizer cannot be made.", found)
    if steps < 1 or not 0 <= warmup_steps < steps:
        raise PlanError(
            "The run would train nothing: it needs at least one step after the warm-up. "
            f"Received: steps={steps}, warmup_steps={warmup_steps}"
        )
    if not isinstance(learning_rate, LearningRateSchedule):
        learning_rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=learning_rate / (warmup_steps + 1)
            if warmup_steps
            else learning_rate,
            decay_steps=steps - warmup_steps,
            alpha=0.1,
            warmup_target=learning_rate if warmup_steps else None,
            warmup_steps=warmup_steps,
        )
    elif warmup_steps:
        raise PlanError(
            "A schedule as `learning_rate` includes its own warm-up. "
            f"Received: warmup_steps={warmup_steps}"
        )
    batches = gradient_accumulation_steps
    return _without_decay_of_norms(
        optimizer_class(name)(
            PerStep(learning_rate, batches) if batches > 1 else learning_rate,
            weight_decay=weight_decay,
            global_clipnorm=clipnorm,
            gradient_accumulation_steps=batches if batches > 1 else None,
            **({} if beta_2 is None else {"beta_2": beta_2}),
        )
    )


def default_optimizer(model: keras.Model) -> keras.optimizers.Optimizer:
    """Make AdamW with a constant learning rate, for a run whose length is not known.

    Args:
        model: The model to be trained, with LoRA on or not.

    Returns:
        A `keras.optimizers.AdamW`.
    """
    rate = default_learning_rate(model, "full" if lora_config(model) is None else "lora")
    adamw = keras.optimizers.AdamW(rate, weight_decay=0.01, global_clipnorm=1.0)
    return _without_decay_of_norms(adamw)


def _without_decay_of_norms(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    optimizer.exclude_from_weight_decay(var_names=list(NO_DECAY))
    return optimizer


def default_learning_rate(model: keras.Model, method: str) -> float:
    """Choose a learning rate by the size of a model, for `"lora"` or `"full"` tuning."""
    return LEARNING_RATES[method][model.count_params() > LARGE]


def optimizer_class(name: str) -> type[keras.optimizers.Optimizer]:
    """Find one of Keras's optimizers.

    Args:
        name: Its name, such as `"adamw"`, in capital letters or not; `"auto"` is AdamW.

    Returns:
        The class.

    Raises:
        PlanError: Keras has no such optimizer.
    """
    try:
        return type(keras.optimizers.get("adamw" if name == "auto" else name.lower()))
    except (TypeError, ValueError) as error:
        raise PlanError(f"Keras has no optimizer of this name. Received: {name!r}") from error


def schedule_config(schedule: LearningRateSchedule) -> dict[str, Any]:
    """Describe a schedule as JSON data.

    Args:
        schedule: A schedule.

    Returns:
        What `schedule_from_config` takes.

    Raises:
        PlanError: Keras cannot make the schedule again from its `get_config`.
    """
    try:
        config = keras.optimizers.schedules.serialize(schedule)
    except Exception as error:  # whatever a `get_config` of the user's raises
        raise PlanError(_UNKNOWN_SCHEDULE + repr(schedule)) from error
    schedule_from_config(config)
    return config


_UNKNOWN_SCHEDULE = (
    "`learning_rate`: a schedule needs `get_config`, and `keras.saving.register_keras_serializable`"
    " where Keras does not have its class. Received: "
)


def schedule_from_config(config: dict[str, Any]) -> LearningRateSchedule:
    """Make the schedule that `schedule_config` described.

    Args:
        config: JSON data.

    Returns:
        The schedule.

    Raises:
        PlanError: Keras cannot make it.
    """
    try:
        schedule = keras.optimizers.schedules.deserialize(config)
    except Exception as error:  # whatever a `from_config` raises
        raise PlanError(_UNKNOWN_SCHEDULE + repr(config)) from error
    if not isinstance(schedule, LearningRateSchedule):
        raise PlanError(_UNKNOWN_SCHEDULE + repr(config))
    return schedule


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Give the optimizer itself, or the one inside that Keras only scales the loss for."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def follows_schedule(optimizer: Any) -> bool:
    """Tell if the learning rate of an optimizer, as `tune` takes it, follows a schedule."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return True  # `make_optimizer` makes it
    rate = inner_optimizer(optimizer).get_config()["learning_rate"]
    return not isinstance(rate, (int, float))


def batches_per_step(optimizer: keras.optimizers.Optimizer) -> int:
    """Count the batches whose gradients an optimizer accumulates for one step."""
    return inner_optimizer(optimizer).gradient_accumulation_steps or 1
