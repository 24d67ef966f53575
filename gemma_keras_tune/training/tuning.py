"""`tune`: plan, then the public steps in order."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any, Unpack

import keras
import numpy as np

from gemma_keras_tune._support.compilation import compilation_cache
from gemma_keras_tune._support.interrupts import held_interrupts
from gemma_keras_tune._support.pictures import history_figure
from gemma_keras_tune.adapters.active import adapter_config
from gemma_keras_tune.adapters.lora import (
    enable_lora,
    lora_config,
)
from gemma_keras_tune.gemma.templates import attach_template
from gemma_keras_tune.training.callbacks import BestWeights, TuningProgress
from gemma_keras_tune.training.model import TuningModel
from gemma_keras_tune.training.optimizer import (
    batches_per_step,
    inner_optimizer,
    make_optimizer,
    schedule_from_config,
)
from gemma_keras_tune.training.planning import Plan, resolve_settings
from gemma_keras_tune.training.preparing import Run, open_model, prepare_run
from gemma_keras_tune.training.settings import Settings, takes_settings


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """Result of a run.

    Attributes:
        model: The tuned KerasHub Gemma, the same object that was passed in.
        plan: Every setting, resolved; `tune(model, pairs, plan=result.plan)` runs it again.
        history: Keras's history: `loss` and `accuracy` of every epoch, over trained tokens, and
            `val_loss` and `val_accuracy` where there are validation pairs.
        timings: In seconds: `prepare` (reading, tokenizing, planning), `first_batch` (compiling
            included), `train`; and `tokens_per_second`, `pairs_per_second` after the first batch.
        learning_rates: The learning rate of every step; empty for an optimizer without a
            serializable schedule.
        token_lengths: `(tokens, pairs of that length)`, ascending.
    """

    model: keras.Model
    plan: Plan
    history: dict[str, list[float]]
    timings: dict[str, float]
    learning_rates: tuple[float, ...] = ()
    token_lengths: tuple[tuple[int, int], ...] = ()

    def plot(self) -> Any:
        """Loss and accuracy by epoch.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        return history_figure(self.history)


@takes_settings
def tune(
    model: keras.Model | str,
    pairs: Any,
    *,
    validation_data: Any = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    plan: Plan | str | os.PathLike[str] | None = None,
    verbose: int = 1,
    **settings: Unpack[Settings],
) -> TuneResult:
    """Tune a Gemma on pairs of inputs and outputs.

    Every `"auto"` is resolved from the number of pairs, their lengths and the machine into a `Plan`
    that is printed and returned; `make_plan` makes it without training. The steps are public:
    `load`, `enable_lora`, `make_dataset`, `TuningModel`, `make_optimizer`, `save_preset`.

    The loss is the cross entropy of the responses' tokens alone, the stop token among them; the
    learning rate rises linearly, then falls along a cosine; the optimizer is AdamW.

    A model that has an adapter, from `load_adapter` or an earlier run, is tuned further with it. A
    Ctrl-C, or the stop button of a notebook, ends the run after the step that is running, and the
    model keeps what it learned until then, with LoRA on.

    Args:
        model: A KerasHub Gemma `CausalLM`, or anything `load` takes. It is tuned in place.
        pairs: Anything `read_pairs` takes.
        validation_data: More pairs, to watch the loss on.
        callbacks: Keras callbacks. Those that save or load the whole model as Keras does, which
            knows nothing of LoRA, are refused; see `AdapterCheckpoint`.
        plan: The plan of an earlier run or of `make_plan`, or the file of one, to carry out. An
            argument that contradicts it is an error.
        verbose: 1 prints the plan and a progress bar, 0 nothing.
        **settings: The settings of the run; the page "Settings" of the documentation has a table.

    Returns:
        A `TuneResult`.

    Raises:
        PairsError: Rows that cannot be trained on, all at once, before any work.
        PlanError: Settings that are not valid or contradict `plan` or `optimizer`, a callback that
            cannot work, or a plan that would train nothing.
        LoraError: LoRA that fits no layer, or other LoRA already on.
        LoadError: The model cannot be opened.
    """
    begin = time.perf_counter()
    resolved = resolve_settings(
        settings, plan, callbacks=callbacks, validation_data=validation_data
    )
    model = open_model(model, resolved)
    run = prepare_run(model, pairs, validation_data, resolved)
    if verbose:
        print(run.plan)
    with held_interrupts():
        prepare_weights(model, run.plan, verbose)
        attach_template(model, run.template)
    prepared = time.perf_counter() - begin
    progress = TuningProgress(
        run.plan.batches, run.plan.tokens * run.plan.epochs, disable=not verbose
    )
    with contextlib.closing(progress), compilation_cache():
        trainer = _train(
            model, run, settings.get("optimizer", "auto"),
            [progress, *callbacks, *_stopping(run.plan)],
        )  # fmt: skip
    lengths, counts = np.unique(run.batcher.tokens.lengths, return_counts=True)
    return TuneResult(
        model,
        run.plan,
        trainer.history.history,
        _timings(progress, run.plan, prepared),
        _learning_rates(trainer.optimizer, progress),
        tuple(zip(lengths.tolist(), counts.tolist(), strict=True)),
    )


def _train(
    model: keras.Model,
    run: Run,
    optimizer: Any,
    callbacks: Sequence[keras.callbacks.Callback],
) -> TuningModel:
    trainer = TuningModel(model, rematerialize=run.plan.rematerialize)
    trainer.compile(run_optimizer(run.plan, optimizer), jit_compile=True)
    trainer.fit(
        run.batcher.to_dataset(),
        epochs=run.plan.epochs,
        validation_data=run.held_out.to_dataset() if run.held_out else None,
        callbacks=callbacks,
        shuffle=False,  # the dataset does, and Keras would warn that it does not
        verbose=0,
    )
    return trainer


def prepare_weights(model: keras.Model, plan: Plan, verbose: int) -> None:
    """Make trainable what a plan trains: every weight, or LoRA, put on where there is none.

    Args:
        model: A KerasHub Gemma.
        plan: The plan.
        verbose: 1 prints what LoRA is on, 0 nothing.
    """
    if plan.method == "full":
        model.trainable = True
    elif lora_config(model) is None:
        assert plan.rank is not None and plan.target_modules is not None
        enable_lora(
            model, plan.rank, alpha=plan.alpha, target_modules=plan.target_modules,
            use_rslora=plan.use_rslora, seed=plan.seed, verbose=verbose,
        )  # fmt: skip
    elif verbose:
        print(f"Going on with the LoRA that is on this model: {adapter_config(model)}")


def run_optimizer(plan: Plan, optimizer: Any = "auto") -> keras.optimizers.Optimizer:
    """Give the optimizer of a run.

    Args:
        plan: The plan, filled in.
        optimizer: As `tune` takes it.

    Returns:
        The user's optimizer, or the one that the plan names, with the plan's schedule.
    """
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return optimizer
    rate = plan.learning_rate
    return make_optimizer(
        schedule_from_config(rate) if isinstance(rate, dict) else rate,
        steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        name=plan.optimizer,
    )


def _stopping(plan: Plan) -> list[keras.callbacks.Callback]:
    if plan.early_stopping is None:
        return []
    stop = keras.callbacks.EarlyStopping("val_loss", patience=plan.early_stopping)
    return [BestWeights(), stop]


def _learning_rates(
    optimizer: keras.optimizers.Optimizer, progress: TuningProgress
) -> tuple[float, ...]:
    """Give the learning rate of every step that was made."""
    batches = batches_per_step(optimizer)
    config = inner_optimizer(optimizer).get_config()["learning_rate"]
    if isinstance(config, (int, float)):  # a number, which callbacks may change between epochs
        return tuple(rate for rate, done in progress.rates for _ in range(done // batches))
    try:
        schedule = keras.optimizers.schedules.deserialize(config)
    except (TypeError, ValueError):
        return ()
    # Keras asks the schedule with the number of the batch that completes the step.
    last = np.arange(1, progress.done // batches + 1) * batches - 1
    return tuple(np.asarray(keras.ops.vectorized_map(schedule, last), float).tolist())


def _timings(progress: TuningProgress, plan: Plan, prepared: float) -> dict[str, float]:
    steady = max(progress.seconds - progress.seconds_first_batch, 1e-9)
    share = max(progress.done - 1, 0) / max(plan.batches, 1)
    return {
        "prepare": prepared,
        "first_batch": progress.seconds_first_batch,
        "train": progress.seconds,
        "tokens_per_second": plan.tokens * plan.epochs * share / steady,
        "pairs_per_second": plan.pairs * plan.epochs * share / steady,
    }
