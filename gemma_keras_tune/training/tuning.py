"""`tune`: plan, then the public steps in order."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune._support.compilation import use_compilation_cache
from gemma_keras_tune._support.pictures import history_figure
from gemma_keras_tune.adapters.active import adapter_config
from gemma_keras_tune.adapters.lora import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    LoraConfig,
    TargetModules,
    enable_lora,
    is_lora_on,
    lora_config,
)
from gemma_keras_tune.errors import LoraError, PairsError, PlanError
from gemma_keras_tune.gemma.families import context_length, family_of
from gemma_keras_tune.gemma.state import locked
from gemma_keras_tune.gemma.templates import Template, attach_template, get_template, special_tokens
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.pairs import PairChecks, PairSource, read_pairs, split_pairs
from gemma_keras_tune.pairs.problems import PairsErrors
from gemma_keras_tune.training.callbacks import BestWeights
from gemma_keras_tune.training.model import (
    TuningModel,
    TuningProgress,
    batches_per_update,
    inner_optimizer,
    make_optimizer,
)
from gemma_keras_tune.training.pipeline import (
    Batcher,
    Overlong,
    TokenizedPairs,
    make_batcher,
    tokenize_pairs,
)
from gemma_keras_tune.training.planning import (
    Auto,
    Method,
    Plan,
    check_settings,
    check_updates,
    plan_settings,
    template_setting,
)

# Keras's callbacks that save the model, or load it, in Keras's own way.
_SAVING = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)


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
    target_modules: TargetModules | Auto = "auto",
    use_rslora: bool | Auto = "auto",
    epochs: int | Auto = "auto",
    batch_size: int | Auto = "auto",
    gradient_accumulation_steps: int | Auto = "auto",
    learning_rate: float | Auto = "auto",
    warmup_steps: int | Auto = "auto",
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
    prompt_column: str | None = None,
    response_column: str | None = None,
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
        target_modules: `"all"` linear layers (the default), `"attention"`, or names; see
            `enable_lora`.
        use_rslora: Whether to scale by `alpha / sqrt(rank)` instead.
        epochs: Passes over the pairs.
        batch_size: Rows in a batch.
        gradient_accumulation_steps: Batches that make one update; their mean is over all their
            trained tokens, so `1 x 8` gives what `8 x 1` gives.
        learning_rate: Peak learning rate.
        warmup_steps: Updates over which it rises.
        weight_decay: Decoupled weight decay; norms and biases are left alone.
        sequence_length: `"auto"` is limited by the model's context alone; a number is a limit in
            tokens.
        overlong: What to do with longer rows: `"error"`, `"drop"` or `"truncate"`.
        template: `"auto"`, a name, a string with `{prompt}` and `{response}`, or a callable.
        optimizer: `"auto"`, or any Keras optimizer, which then brings its own learning rate, weight
            decay and gradient accumulation.
        callbacks: Keras callbacks. Those that save or load the whole model as Keras does, which
            knows nothing of LoRA, are refused; see `AdapterCheckpoint`.
        validation_data: More pairs, to watch the loss on.
        validation_split: Share of `pairs` to hold out for that, grouped so that no prompt is on
            both sides.
        early_stopping: Stop after this many epochs without a better validation loss, and go back
            to the best weights.
        seed: Seed of shuffling and of LoRA's start.
        plan: The plan of an earlier run, to run the same again.
        compilation_cache: Whether JAX keeps compiled programs in the user's cache folder, so that
            the next run starts faster.
        verbose: 1 prints the plan and a progress bar, 0 nothing.
        prompt_column: Own name of the input column, where the pairs have columns.
        response_column: Own name of the output column.
        system_column: Own name of the column of system messages.

    Returns:
        A `TuneResult`.

    Raises:
        PairsError: Rows that cannot be trained on, all at once, before any work.
        PlanError: Settings out of range or against those of `plan` or `optimizer`, a callback that
            cannot work, or a plan that would train nothing.
        LoraError: LoRA that fits no layer, or other LoRA already on; or a base whose embedding is
            quantized.
        TrainingError: A loss or gradient was not finite; the weights are those before that step.
        LoadError: The model cannot be opened.
    """
    begin = time.perf_counter()
    settings: dict[str, Any] = dict(
        method=method, rank=rank, alpha=alpha, target_modules=target_modules, use_rslora=use_rslora,
        epochs=epochs, batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, learning_rate=learning_rate,
        warmup_steps=warmup_steps, weight_decay=weight_decay,
        sequence_length=sequence_length, overlong=overlong, template=template,
        validation_split=validation_split, early_stopping=early_stopping, optimizer=optimizer,
        seed=seed,
    )  # fmt: skip
    settings = settle(settings, plan, callbacks, validation_data)
    columns = dict(
        prompt_column=prompt_column, response_column=response_column, system_column=system_column
    )
    model = load(model)
    settings = _going_on(model, settings)
    run = _prepare(model, pairs, validation_data, columns, settings)
    if verbose:
        print(run.plan)
    prepare_weights(model, run.plan, verbose)
    attach_template(model, run.template)
    if compilation_cache:
        use_compilation_cache()
    prepared = time.perf_counter() - begin
    trainer = TuningModel(model)
    plan = run.plan
    trainer.compile(planned_optimizer(plan) if optimizer == "auto" else optimizer, jit_compile=True)
    progress = TuningProgress(plan.batches, plan.tokens * plan.epochs, disable=not verbose)
    history = trainer.fit(
        run.batcher.to_dataset(),
        epochs=plan.epochs,
        validation_data=run.held_out.to_dataset() if run.held_out else None,
        callbacks=[progress, *callbacks, *_stopping(plan)],
        shuffle=False,  # the dataset does, and Keras would warn that it does not
        verbose=0,
    )
    lengths, counts = np.unique(run.batcher.tokens.lengths, return_counts=True)
    return TuneResult(
        model,
        plan,
        history.history,
        _timings(progress, plan, prepared),
        _learning_rates(trainer.optimizer, progress),
        tuple(zip(lengths.tolist(), counts.tolist(), strict=True)),
    )


def settle(
    settings: dict[str, Any], plan: Any, callbacks: Any = (), validation_data: Any = None
) -> dict[str, Any]:
    """The settings checked, and those of the plan in their place where there is one.

    Args:
        settings: Every setting of `Plan.settings`, as `tune` takes them.
        plan: The plan of an earlier run, or `None`.
        callbacks: As `tune` takes them.
        validation_data: As `tune` takes it.

    Returns:
        The settings by name, those of the plan where there is one.

    Raises:
        PlanError: Settings out of range, or against those of the plan.
    """
    method = plan.method if isinstance(plan, Plan) else settings["method"]
    problems = _wrong_callbacks(callbacks, method)
    if plan is not None and not isinstance(plan, Plan):
        problems.append(f"`plan` must be a `Plan`, such as `result.plan`. Received: {plan!r}")
    optimizer = settings["optimizer"]
    if isinstance(optimizer, str) and optimizer != "auto":
        problems.append(f"`optimizer` must be 'auto' or a Keras optimizer. Received: {optimizer!r}")
    given = check_settings(settings, problems)
    if plan is not None:
        given = _as_planned(given, plan)
    split, stop = given["validation_split"], given["early_stopping"]
    if validation_data is not None and split:
        raise PlanError("Pass `validation_data` or `validation_split`, not both.")
    if stop is not None and validation_data is None and not split:
        raise PlanError(
            "`early_stopping` watches the validation loss, and there are no validation pairs.",
            next_step="Pass `validation_data` or `validation_split`.",
        )
    return given


def _as_planned(given: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The plan's settings. A setting left at its default counts as not given."""
    planned = plan.settings()
    defaults = tune.__kwdefaults__ or {}
    wrong = [
        f"`{name}`: the plan has {planned[name]!r}. Received: {value!r}"
        for name, value in given.items()
        if value != planned[name] and (value != defaults[name] or name == "optimizer")
    ]
    if wrong:
        raise PlanError(
            "These arguments contradict the plan.",
            wrong,
            "Leave them out to run the plan again, with the optimizer it names if that is not "
            "'auto'; or change the plan: `dataclasses.replace(plan, …)`.",
        )
    return planned


def _wrong_callbacks(callbacks: Any, method: str) -> list[str]:
    """Callbacks that cannot work, because of how they save and load the model."""
    if not isinstance(callbacks, Sequence):
        return [f"`callbacks` must be a list of Keras callbacks. Received: {callbacks!r}"]
    problems = []
    for callback in callbacks:
        name = type(callback).__name__
        if not isinstance(callback, keras.callbacks.Callback):
            problems.append(f"`callbacks` must hold Keras callbacks. Received: {callback!r}")
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


@locked
def _going_on(model: keras.Model, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with those of the adapter that is on the model and is tuned further."""
    there = adapter_config(model)
    if settings["method"] == "full":
        _check_bare(model, there)
    if there is None or settings["method"] == "full":
        return settings
    if not is_lora_on(model):
        raise LoraError(
            "The adapter of this model is switched off, so nothing would be trained.",
            next_step="Go on with one: `gkt.adapters.set(model, name)`; or `remove_lora(model)`.",
        )
    own = {name: getattr(there, name) for name in ("rank", "alpha", "target_modules", "use_rslora")}
    wrong = [
        f"`{name}`: the model has {_shown(value)}. Received: {settings[name]!r}"
        for name, value in own.items()
        if settings[name] not in ("auto", None, value)
        and not (name == "target_modules" and _targeted(model, settings[name]) == set(value))
    ]
    if wrong:
        raise LoraError(
            f"Other LoRA is on this model already: {there}",
            wrong,
            "Leave these out to go on with it, or call `merge_lora(model)` or "
            "`remove_lora(model)` first.",
        )
    return {**settings, **own}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _targeted(model: keras.Model, target_modules: Any) -> set[str]:
    """Which linear layers of a model `target_modules` names."""
    groups = {"all": ALL_TARGETS, "attention": ATTENTION_TARGETS}
    names = (
        groups.get(target_modules, (target_modules,))
        if isinstance(target_modules, str)
        else target_modules
    )
    linears = family_of(model).linears(model)
    return {n.target for n in linears if n.target in names or n.layer.name in names}


def _check_bare(model: keras.Model, there: LoraConfig | None) -> None:
    """Full tuning trains kernels, which LoRA on them would hide."""
    stock = any(linear.layer.lora_enabled for linear in family_of(model).linears(model))
    if there is None and not stock:
        return
    raise LoraError(
        "`method='full'` trains every weight, but "
        + (f"LoRA is on this model: {there}" if there else "Keras's own LoRA is on this model."),
        next_step="Call `merge_lora(model)` or `remove_lora(model)` first."
        if there
        else "Load the model anew, without `enable_lora` of Keras or KerasHub.",
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is known before the first weight changes."""

    plan: Plan
    template: Template
    batcher: Batcher
    held_out: Batcher | None


def _prepare(
    model: keras.Model,
    pairs: Any,
    validation_data: Any,
    columns: dict[str, Any],
    settings: dict[str, Any],
) -> _Run:
    """Read and tokenize the pairs, resolve the plan, and choose the batches."""
    template = get_template(settings["template"], model)
    settings = {**settings, "template": template_setting(template)}
    split, seed = settings["validation_split"], settings["seed"]
    sources = _read(pairs, validation_data, split, seed, columns)
    tokens, held_out = _tokenize(model, *sources, template, settings)
    draft = plan_settings(model, len(tokens), int(tokens.lengths.max()), **settings)
    batcher, check = _batchers(model, tokens, held_out, draft)
    return _Run(_fill_in(draft, batcher, check), template, batcher, check)


def _read(
    pairs: Any, validation_data: Any, split: float, seed: int, columns: dict[str, Any]
) -> tuple[PairSource, PairSource | None]:
    # The columns are those of what is still to be opened; where nothing is, they are refused.
    columns_of_pairs = {} if _is_open(pairs) and not _is_open(validation_data) else columns
    source = read_pairs(pairs, **columns_of_pairs)
    if split:
        try:
            return split_pairs(source, split, seed=seed)
        except PairsError:
            if source.on_error == "skip" or not (source.problems and source.repeatable):
                raise
            return source, None  # to be reported together with rows that are too long
    if _is_open(validation_data):
        return source, validation_data
    return source, read_pairs(validation_data, **columns)


def _is_open(pairs: Any) -> bool:
    return pairs is None or isinstance(pairs, PairSource)


def _tokenize(
    model: keras.Model,
    training: PairSource,
    validation: PairSource | None,
    template: Template,
    settings: dict[str, Any],
) -> tuple[TokenizedPairs, TokenizedPairs | None]:
    length = settings["sequence_length"]
    limit = context_length(model) if length == "auto" else length
    special = {*special_tokens(model.preprocessor.tokenizer), *template.stop_tokens}
    errors = PairsErrors()

    def tokenized(source: PairSource, part: str) -> TokenizedPairs | None:
        checks = PairChecks(special)
        found = None
        with errors.collect(part):
            found = tokenize_pairs(
                source, model, template=template, max_length=limit, overlong=settings["overlong"],
                on_pair=checks.add,
            )  # fmt: skip
        checks.warn(part)
        return found

    tokens = tokenized(training, "" if validation is None else "training")
    held_out = None if validation is None else tokenized(validation, "validation")
    errors.raise_all()
    assert tokens is not None
    return tokens, held_out


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


def _fill_in(plan: Plan, batcher: Batcher, held_out: Batcher | None) -> Plan:
    tokens = batcher.tokens
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
        dropped=tokens.dropped,
        truncated=tokens.truncated,
    )
    if held_out:
        filled = dataclasses.replace(
            filled,
            validation_pairs=len(held_out.tokens),
            validation_dropped=held_out.tokens.dropped,
            validation_truncated=held_out.tokens.truncated,
        )
    check_updates(filled)
    return filled


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


def planned_optimizer(plan: Plan) -> keras.optimizers.Optimizer:
    """The optimizer of a plan that names none of the user's.

    Args:
        plan: The plan, filled in.

    Returns:
        AdamW with the plan's schedule.
    """
    return make_optimizer(
        plan.learning_rate,
        updates=plan.updates,
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
    )


def _stopping(plan: Plan) -> list[keras.callbacks.Callback]:
    if plan.early_stopping is None:
        return []
    stop = keras.callbacks.EarlyStopping("val_loss", patience=plan.early_stopping)
    return [BestWeights(), stop]


def _learning_rates(
    optimizer: keras.optimizers.Optimizer, progress: TuningProgress
) -> tuple[float, ...]:
    """The rate of every update that was made."""
    steps = batches_per_update(optimizer)
    config = inner_optimizer(optimizer).get_config()["learning_rate"]
    if isinstance(config, (int, float)):  # a number, which callbacks may change between epochs
        return tuple(rate for rate, batches in progress.rates for _ in range(batches // steps))
    try:
        schedule = keras.optimizers.schedules.deserialize(config)
    except (TypeError, ValueError):
        return ()
    # Keras asks the schedule with the number of the batch that completes the update.
    batches = np.arange(1, progress.done // steps + 1) * steps - 1
    return tuple(np.asarray(keras.ops.vectorized_map(schedule, batches), float).tolist())


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
