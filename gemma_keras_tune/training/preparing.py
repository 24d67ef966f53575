"""From settings and pairs to a run: tokens, plan and batches, before the first weight changes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import keras

from gemma_keras_tune.adapters.active import adapter_config
from gemma_keras_tune.adapters.lora import TARGET_GROUPS, LoraConfig, check_targets, is_lora_on
from gemma_keras_tune.errors import LoraError, PairsError, PlanError
from gemma_keras_tune.gemma.families import context_length, family_of
from gemma_keras_tune.gemma.state import locked
from gemma_keras_tune.gemma.templates import Template, get_template, special_tokens
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.pairs import PairChecks, PairSource, read_pairs, split_pairs
from gemma_keras_tune.pairs.problems import PairsErrors
from gemma_keras_tune.training.pipeline import Batcher, make_batcher
from gemma_keras_tune.training.planning import Plan, plan_settings, resolve_settings
from gemma_keras_tune.training.settings import Settings, takes_settings, template_setting
from gemma_keras_tune.training.tokenizing import TokenizedPairs, tokenize_pairs


@takes_settings
def make_plan(
    model: keras.Model | str,
    pairs: Any,
    *,
    validation_data: Any = None,
    **settings: Unpack[Settings],
) -> Plan:
    """Plan a run without training: read and tokenize the pairs, and resolve every setting.

    The model is left as it is. `tune(model, pairs, plan=plan)` carries the plan out.

    Args:
        model: A KerasHub Gemma `CausalLM`, or anything `load` takes.
        pairs: Anything `read_pairs` takes that can be read again.
        validation_data: More pairs, to watch the loss on.
        **settings: The settings of `tune`.

    Returns:
        The `Plan`, with its shapes, batches, steps, tokens and memory. Print it to read it.

    Raises:
        PairsError: Rows that cannot be trained on, all at once.
        PlanError: Settings that are not valid, or a plan that would train nothing.
        LoraError: Other LoRA is on the model already.
        LoadError: The model cannot be opened.
    """
    resolved = resolve_settings(settings, validation_data=validation_data)
    return prepare_run(open_model(model, resolved), pairs, validation_data, resolved).plan


def open_model(model: keras.Model | str, settings: Mapping[str, Any]) -> keras.Model:
    """Load a model by its name, after the names in the settings have been looked at.

    Args:
        model: A KerasHub Gemma, or anything `load` takes.
        settings: Every setting, as `resolve_settings` gives it.

    Returns:
        The model.

    Raises:
        TemplateError: As `check_names`.
        LoraError: As `check_names`.
        LoadError: The model cannot be opened.
    """
    if not isinstance(model, keras.Model):
        check_names(settings)
    return load(model)


def check_names(settings: Mapping[str, Any]) -> None:
    """Refuse names of templates and layers that no model has, before one is loaded.

    Args:
        settings: Every setting, as `resolve_settings` gives it.

    Raises:
        TemplateError: There is no such template, or its placeholders are wrong.
        LoraError: No Gemma has layers of such a name.
    """
    if isinstance(settings["template"], str) and settings["template"] != "auto":
        get_template(None, settings["template"])
    targets = settings["target_modules"]
    if settings["method"] == "lora" and targets not in ("auto", None):
        check_targets(targets)


@dataclasses.dataclass(frozen=True)
class Run:
    """Run that is prepared, before the first weight changes.

    Attributes:
        plan: Its plan.
        template: The template of its rows.
        batcher: The batches to train on.
        held_out: The batches to watch the loss on.
    """

    plan: Plan
    template: Template
    batcher: Batcher
    held_out: Batcher | None


def prepare_run(
    model: keras.Model, pairs: Any, validation_data: Any, settings: Mapping[str, Any]
) -> Run:
    """Read and tokenize the pairs, resolve the plan, and choose the batches.

    Args:
        model: A KerasHub Gemma.
        pairs: As `tune` takes them.
        validation_data: As `tune` takes it.
        settings: Every setting, as `resolve_settings` gives it.

    Returns:
        A `Run`.

    Raises:
        PairsError: Rows that cannot be trained on.
        PlanError: A plan that would train nothing.
        LoraError: Other LoRA is on the model already.
    """
    settings = _continue_adapter(model, settings)
    template = get_template(model, settings["template"])
    settings = {**settings, "template": template_setting(template)}
    sources = _read(pairs, validation_data, settings["validation_split"], settings["seed"])
    tokens, held_out = _tokenize(model, *sources, template, settings)
    draft = plan_settings(model, len(tokens), int(tokens.lengths.max()), settings)
    batcher, check = _batchers(model, tokens, held_out, draft)
    return Run(fill_plan(draft, batcher, check), template, batcher, check)


def fill_plan(plan: Plan, batcher: Batcher, held_out: Batcher | None = None) -> Plan:
    """Fill in the figures of a plan that come from its batches.

    Args:
        plan: The plan.
        batcher: The batches to train on.
        held_out: The batches to watch the loss on.

    Returns:
        The plan with its figures.

    Raises:
        PlanError: There are no steps, or all of them are warm-up.
    """
    tokens = batcher.tokens
    batches = batcher.batches_per_epoch * plan.epochs
    steps = batches // plan.gradient_accumulation_steps
    if steps < 1 or plan.warmup_steps >= steps:
        raise PlanError(
            f"The plan makes {steps} steps, {plan.warmup_steps} of them warm-up: it would train "
            "nothing.",
            next_step="Raise `epochs`, or lower `warmup_steps` or `batch_size`.",
        )
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
        steps=steps,
        dropped=tokens.dropped,
        truncated=tokens.truncated,
    )
    if held_out is None:
        return filled
    return dataclasses.replace(
        filled,
        validation_pairs=len(held_out.tokens),
        validation_dropped=held_out.tokens.dropped,
        validation_truncated=held_out.tokens.truncated,
    )


@locked
def _continue_adapter(model: keras.Model, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take over the settings of the adapter that is on the model, which is tuned further."""
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
    """List the linear layers of a model that `target_modules` names."""
    one = isinstance(target_modules, str)
    names = TARGET_GROUPS.get(target_modules, (target_modules,)) if one else target_modules
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


def _read(
    pairs: Any, validation_data: Any, split: float, seed: int
) -> tuple[PairSource, PairSource | None]:
    source = read_pairs(pairs)
    if split:
        try:
            return split_pairs(source, split, seed=seed)
        except PairsError:
            if source.on_error == "skip" or not (source.problems and source.repeatable):
                raise
            return source, None  # to be reported together with rows that are too long
    return source, None if validation_data is None else read_pairs(validation_data)


def _tokenize(
    model: keras.Model,
    training: PairSource,
    validation: PairSource | None,
    template: Template,
    settings: Mapping[str, Any],
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
                model, source, template=template, max_length=limit, overlong=settings["overlong"],
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
        model, tokens, gradient_accumulation_steps=plan.gradient_accumulation_steps, **same
    )
    check = make_batcher(model, held_out, shuffle=False, **same) if held_out else None
    return batcher, check
