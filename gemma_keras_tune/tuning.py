"""`tune`: plan, then the public steps in order."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np

from gemma_keras_tune._pictures import history_figure
from gemma_keras_tune.errors import LoraError, PlanError
from gemma_keras_tune.loading import load
from gemma_keras_tune.lora import Targets, enable_lora, lora_active, lora_config
from gemma_keras_tune.pairs import PairChecks, PairSource, read_pairs, split_pairs
from gemma_keras_tune.pipeline import (
    Batcher,
    Overlong,
    TokenizedPairs,
    make_batcher,
    tokenize_pairs,
)
from gemma_keras_tune.planning import Method, Plan, check_updates, plan_settings
from gemma_keras_tune.switching import adapter_config
from gemma_keras_tune.templates import Template, attach_template, get_template
from gemma_keras_tune.training import TuningModel, TuningProgress, make_optimizer

Auto = Literal["auto"]


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """What a run leaves behind.

    Attributes:
        model: The tuned KerasHub Gemma, the same object that was passed in.
        plan: Every setting, resolved; `tune(model, pairs, plan=result.plan)` runs it again.
        history: Keras's history: `loss` and `accuracy` of every epoch, over trained tokens, and
            `val_loss` and `val_accuracy` where there are validation pairs.
        timings: Seconds: `prepare` (reading, tokenizing, planning), `first_batch` (compiling
            included), `train`; and `tokens_per_second`, `pairs_per_second` after the first batch.
        learning_rates: The learning rate of every update; empty for an optimizer without a
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


def tune(
    model: keras.Model | str,
    pairs: Any,
    *,
    method: Method = "lora",
    rank: int | Auto = "auto",
    alpha: float | Auto = "auto",
    targets: Targets = "all",
    rank_stabilized: bool = False,
    epochs: int | Auto = "auto",
    batch_size: int | Auto = "auto",
    gradient_accumulation_steps: int | Auto = "auto",
    learning_rate: float | Auto = "auto",
    warmup_updates: int | Auto = "auto",
    weight_decay: float | Auto = "auto",
    sequence_length: int | Auto = "auto",
    overlong: Overlong = "error",
    template: str | Template | Callable[..., Any] = "auto",
    optimizer: keras.optimizers.Optimizer | Auto = "auto",
    callbacks: Sequence[keras.callbacks.Callback] = (),
    validation_data: Any = None,
    validation_split: float = 0.0,
    early_stopping: int | None = None,
    seed: int = 0,
    plan: Plan | None = None,
    compilation_cache: bool = True,
    verbose: int = 1,
    input_column: str | Sequence[str] | None = None,
    output_column: str | None = None,
    system_column: str | None = None,
) -> TuneResult:
    """Tune a Gemma on pairs of inputs and outputs.

    Every default is `"auto"`, resolved from the number of pairs, their lengths and the machine
    into a `Plan` that is printed and returned. The steps are public: `load`, `enable_lora`,
    `make_dataset`, `TuningModel`, `make_optimizer`, `save_preset`.

    The loss is the cross entropy of the answers' tokens alone, the stop token among them; the
    learning rate rises linearly, then falls along a cosine; the optimizer is AdamW.

    Args:
        model: A KerasHub Gemma `CausalLM`, or anything `load` takes. It is tuned in place.
        pairs: Anything `read_pairs` takes.
        method: `"lora"` trains low-rank factors, `"full"` every weight.
        rank: LoRA's rank.
        alpha: LoRA's alpha: the update is scaled by `alpha / rank`.
        targets: `"all"` linear layers, `"attention"`, or names; see `enable_lora`.
        rank_stabilized: Scale by `alpha / sqrt(rank)` instead.
        epochs: Passes over the pairs.
        batch_size: Rows in a batch.
        gradient_accumulation_steps: Batches that make one update; their mean is over all their
            trained tokens, so `1 x 8` gives what `8 x 1` gives.
        learning_rate: Peak learning rate.
        warmup_updates: Updates over which it rises.
        weight_decay: Decoupled weight decay; norms and biases are left alone.
        sequence_length: `"auto"` never cuts a row; a number is a limit in tokens.
        overlong: What to do with longer rows: `"error"`, `"drop"` or `"truncate"`.
        template: `"auto"`, a name, a string with `{input}` and `{output}`, or a callable.
        optimizer: `"auto"`, or any Keras optimizer, which then brings its own learning rate.
        callbacks: Keras callbacks.
        validation_data: More pairs, to watch the loss on.
        validation_split: Share of `pairs` to hold out for that, grouped so that no prompt is on
            both sides.
        early_stopping: Stop after this many epochs without a better validation loss, and go back
            to the best weights.
        seed: Seed of shuffling and of LoRA's start.
        plan: The plan of an earlier run; its settings take the place of those above.
        compilation_cache: Whether JAX keeps compiled programs in the user's cache folder, so that
            the next run starts faster.
        verbose: 1 prints the plan and a progress bar, 0 nothing.
        input_column: Own name of the input column, where the pairs have columns.
        output_column: Own name of the output column.
        system_column: Own name of the column of system messages.

    Returns:
        A `TuneResult`.

    Raises:
        PairsError: Rows that cannot be trained on, all at once, before any work.
        PlanError: Settings out of range, or a plan that would train nothing.
        LoraError: LoRA that fits no layer, or other LoRA already on.
        LoadError: The model cannot be opened.
    """
    begin = time.perf_counter()
    settings: dict[str, Any] = dict(
        method=method, rank=rank, alpha=alpha, epochs=epochs, batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, learning_rate=learning_rate,
        warmup_updates=warmup_updates, weight_decay=weight_decay,
        sequence_length=sequence_length, seed=seed,
    )  # fmt: skip
    if plan is not None:
        settings = plan.settings()
    model = load(model)
    settings = _going_on(model, settings)
    chosen = get_template(template, model)
    columns = dict(
        input_column=input_column, output_column=output_column, system_column=system_column
    )
    training, validation = _read(pairs, validation_data, validation_split, seed, columns)
    if early_stopping is not None and validation is None:
        raise PlanError(
            "`early_stopping` watches the validation loss, and there are no validation pairs.",
            next_step="Pass `validation_data` or `validation_split`.",
        )
    tokens, held_out = _tokenize(model, training, validation, chosen, settings, overlong)
    draft = plan_settings(model, len(tokens), int(tokens.lengths.max()), **settings)
    batcher, check = _batchers(model, tokens, held_out, draft)
    plan = _fill_in(draft, tokens, batcher, chosen)
    if verbose:
        print(plan)
    _prepare_weights(model, plan, targets, rank_stabilized, verbose)
    attach_template(model, chosen)
    if compilation_cache:
        use_compilation_cache()
    prepared = time.perf_counter() - begin
    trainer = TuningModel(model)
    trainer.compile(
        optimizer=_optimizer(plan) if optimizer == "auto" else optimizer, jit_compile=True
    )
    progress = TuningProgress(plan.batches, plan.tokens * plan.epochs, disable=not verbose)
    watchers: list[keras.callbacks.Callback] = [progress, *callbacks]
    if early_stopping is not None:
        watchers += [
            BestWeights(),
            keras.callbacks.EarlyStopping("val_loss", patience=early_stopping),
        ]
    history = trainer.fit(
        batcher.to_dataset(),
        epochs=plan.epochs,
        validation_data=check.to_dataset() if check else None,
        callbacks=watchers,
        shuffle=False,  # the dataset does, and Keras would warn that it does not
        verbose=0,
    )
    return TuneResult(
        model,
        plan,
        history.history,
        _timings(progress, plan, prepared),
        _learning_rates(trainer.optimizer, plan),
        tuple(sorted(Counter(tokens.lengths.tolist()).items())),
    )


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


def use_compilation_cache(folder: str | None = None) -> str:
    """Let JAX keep compiled programs on disk, so that the next process need not compile again.

    A cache that the user has set up is left as it is.

    Args:
        folder: Where to keep them. Defaults to `gemma_keras_tune/jax` in the user's cache folder.

    Returns:
        The folder in use.
    """
    import jax
    import platformdirs

    there: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if folder is None and there:
        return there
    folder = folder or str(platformdirs.user_cache_path("gemma_keras_tune") / "jax")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def _going_on(model: keras.Model, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with rank and alpha of the adapter that is on the model already."""
    there = adapter_config(model)
    if there is None or settings["method"] != "lora":
        return settings
    own = {"rank": there.rank, "alpha": there.alpha}
    wrong = [
        f"`{name}`: the model has {value:g}. Received: {settings[name]!r}"
        for name, value in own.items()
        if settings[name] not in ("auto", None, value)
    ]
    if wrong:
        raise LoraError(
            f"Other LoRA is on this model already: {there}",
            wrong,
            "Leave these out to go on with it, or call `merge_lora(model)` or "
            "`remove_lora(model)` first.",
        )
    return {**settings, **own}


def _read(
    pairs: Any, validation_data: Any, split: float, seed: int, columns: dict[str, Any]
) -> tuple[PairSource, PairSource | None]:
    if validation_data is not None and split:
        raise PlanError("Pass `validation_data` or `validation_split`, not both.")
    source = pairs if isinstance(pairs, PairSource) else read_pairs(pairs, **columns)
    if split:
        return split_pairs(source, split, seed=seed)
    if validation_data is None:
        return source, None
    if isinstance(validation_data, PairSource):
        return source, validation_data
    return source, read_pairs(validation_data, **columns)


def _tokenize(
    model: keras.Model,
    training: PairSource,
    validation: PairSource | None,
    template: Template,
    settings: dict[str, Any],
    overlong: Overlong,
) -> tuple[TokenizedPairs, TokenizedPairs | None]:
    length = settings["sequence_length"]
    limits: dict[str, Any] = dict(
        template=template, max_length=None if length == "auto" else length, overlong=overlong
    )
    checks = PairChecks(model.preprocessor.tokenizer.special_tokens + list(template.stop_tokens))
    tokens = tokenize_pairs(training, model, on_pair=checks.add, **limits)
    checks.warn()
    if validation is None:
        return tokens, None
    return tokens, tokenize_pairs(validation, model, **limits)


def _batchers(
    model: keras.Model, tokens: TokenizedPairs, held_out: TokenizedPairs | None, plan: Plan
) -> tuple[Batcher, Batcher | None]:
    same: dict[str, Any] = dict(
        batch_size=plan.batch_size, sequence_length=plan.sequence_length, seed=plan.seed
    )
    batcher = make_batcher(
        tokens, model, gradient_accumulation_steps=plan.gradient_accumulation_steps, **same
    )
    check = make_batcher(held_out, model, shuffle=False, **same) if held_out else None
    return batcher, check


def _fill_in(plan: Plan, tokens: TokenizedPairs, batcher: Batcher, template: Template) -> Plan:
    batches = batcher.batches_per_epoch * plan.epochs
    fed = sum(shape.batch_size * shape.length for shape, _ in batcher.epoch(0))
    used = int(tokens.lengths.sum())
    filled = dataclasses.replace(
        plan,
        pairs=len(tokens),
        tokens=used,
        response_tokens=int(tokens.response_lengths.sum()),
        padding=1 - used / fed,
        shapes=batcher.shapes,
        batches=batches,
        updates=batches // plan.gradient_accumulation_steps,
        template=template.name,
        dropped=tokens.dropped,
        truncated=tokens.truncated,
    )
    check_updates(filled)
    return filled


def _prepare_weights(
    model: keras.Model, plan: Plan, targets: Targets, rank_stabilized: bool, verbose: int
) -> None:
    there = lora_config(model)
    if plan.method == "full":
        if there is not None:
            raise LoraError(
                f"`method='full'` trains every weight, but LoRA is on this model: {there}",
                next_step="Call `merge_lora(model)` or `remove_lora(model)` first.",
            )
        model.trainable = True
    elif there is None:
        assert plan.rank is not None
        enable_lora(
            model, plan.rank, alpha=plan.alpha, targets=targets, rank_stabilized=rank_stabilized,
            seed=plan.seed, verbose=verbose,
        )  # fmt: skip
    elif not lora_active(model):
        raise LoraError(
            "The adapter of this model is switched off, so nothing would be trained.",
            next_step="Call `set_adapter(model, name)` to go on with one, or `remove_lora(model)`.",
        )
    elif verbose:
        print(f"Going on with the LoRA that is on this model: {adapter_config(model)}")


def _optimizer(plan: Plan) -> keras.optimizers.Optimizer:
    return make_optimizer(
        plan.learning_rate,
        updates=plan.updates,
        warmup_updates=plan.warmup_updates,
        weight_decay=plan.weight_decay,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
    )


def _learning_rates(optimizer: keras.optimizers.Optimizer, plan: Plan) -> tuple[float, ...]:
    """The rate of every update, worked out from the optimizer's schedule."""
    config = optimizer.get_config()["learning_rate"]
    if isinstance(config, (int, float)):
        return (float(config),) * plan.updates
    try:
        schedule = keras.optimizers.schedules.deserialize(config)
    except (TypeError, ValueError):
        return ()
    steps = np.arange(plan.updates) * plan.gradient_accumulation_steps
    return tuple(np.asarray(keras.ops.vectorized_map(schedule, steps), float).tolist())


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
