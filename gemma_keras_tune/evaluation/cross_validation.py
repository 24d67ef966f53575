"""Cross-validation: every pair is held out once, to measure the result on pairs not trained on.

With twenty pairs there are none to spare for a test set. Cross-validation tunes several times, each
time on all pairs but one fold, and runs the model on the fold it has not seen. One training program
is compiled for all of it: the folds share their shapes, and between them the weights and the
optimizer are put back to their start.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

import keras
import numpy as np

from gemma_keras_tune._support.compilation import compilation_cache
from gemma_keras_tune.adapters.lora import lora_config, remove_lora
from gemma_keras_tune.errors import EvaluationError, LoraError, PlanError
from gemma_keras_tune.evaluation.checks import CallsTool, Check, Exact, JsonSchema
from gemma_keras_tune.evaluation.requests import progress_bar
from gemma_keras_tune.evaluation.results import SampleResult
from gemma_keras_tune.evaluation.statistics import mcnemar, wilson_interval
from gemma_keras_tune.evaluation.values import AutoPositiveInt, Confidence, Count, problem, shown
from gemma_keras_tune.gemma.templates import Template, get_template
from gemma_keras_tune.generation.answers import generate_answers
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.pairs import Pair
from gemma_keras_tune.training.callbacks import Snapshot
from gemma_keras_tune.training.model import TuningModel
from gemma_keras_tune.training.pipeline import Batcher
from gemma_keras_tune.training.planning import Plan, as_plan, plan_settings, resolve_settings
from gemma_keras_tune.training.preparing import fill_plan
from gemma_keras_tune.training.settings import (
    TrainingSettings,
    takes_settings,
    template_setting,
)
from gemma_keras_tune.training.shapes import Shape, choose_shapes
from gemma_keras_tune.training.tokenizing import TokenizedPairs, tokenize_pairs
from gemma_keras_tune.training.tuning import prepare_weights, run_optimizer

MAX_ROWS = 8  # prompts that run at once

Checks = Check | Sequence[Check] | Callable[[Pair], Check | Sequence[Check]] | Literal["auto"]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One pair, and the response of a model that was tuned on others.

    Attributes:
        row: Its row number in the source.
        fold: Its fold, from 0.
        prompt: The user's last message.
        expected: The pair's response.
        tuned: The response of the model tuned on the other folds.
        base: The base's response, if it was asked.
    """

    row: int
    fold: int
    prompt: str
    expected: str
    tuned: SampleResult
    base: SampleResult | None = None


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """Results of the held-out pairs.

    Attributes:
        plan: The plan of each tuning; its figures are those of the largest training set.
        rows: Every pair, in the order of the source.
        folds: Number of folds.
        losses: Mean loss over the held-out responses' tokens of each fold, in nats.
        base_losses: The same before tuning.
        confidence: Confidence level of the interval.
        seconds: Time that it took.
    """

    plan: Plan
    rows: tuple[HeldOut, ...]
    folds: int
    losses: tuple[float, ...]
    base_losses: tuple[float, ...]
    confidence: float
    seconds: float

    @property
    def passed(self) -> int:
        """Number of held-out pairs whose response passed."""
        return sum(row.tuned.passed for row in self.rows)

    @property
    def base_passed(self) -> int | None:
        """Number of pairs that the base passed, if it was asked."""
        return None if self._base is None else sum(self._base)

    @property
    def rate(self) -> float:
        """Share of held-out pairs that passed."""
        return self.passed / len(self.rows)

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of that share.

        It assumes independent pairs. The models share most of their training pairs, so that the
        true interval is somewhat wider.
        """
        return wilson_interval(self.passed, len(self.rows), self.confidence)

    @functools.cached_property
    def p_value(self) -> float | None:
        """Exact McNemar test of base against tuned, if the base was asked."""
        if self._base is None:
            return None
        return mcnemar(self._base, [row.tuned.passed for row in self.rows])

    @property
    def _base(self) -> list[bool] | None:
        base = [row.base.passed for row in self.rows if row.base]
        return base if len(base) == len(self.rows) else None

    @property
    def words(self) -> str:
        """The result in words."""
        low, high = self.interval
        text = (
            f"{self.passed} of {len(self.rows)} held-out pairs pass: {100 * self.rate:.0f} % "
            f"({100 * self.confidence:g} % interval {100 * low:.0f} to {100 * high:.0f} %), tuned "
            f"{self.folds} times on the others."
        )
        if self.base_passed is not None:
            text += f" The base passes {self.base_passed} of them (p = {self.p_value:.2g})."
        text += (
            f" Loss on held-out answers: {np.mean(self.base_losses):.2f} nats a token before, "
            f"{np.mean(self.losses):.2f} after."
        )
        return text

    def __str__(self) -> str:
        lines = [self.words]
        for row in self.rows:
            if not row.tuned.passed:
                reason = next(o.reason for o in row.tuned.outcomes if not o.passed)
                lines.append(f"  ✗ row {row.row}: {reason}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert everything to JSON data."""
        low, high = self.interval
        return {
            "words": self.words,
            "passed": self.passed,
            "rate": self.rate,
            "low": low,
            "high": high,
            "base_passed": self.base_passed,
            "p_value": self.p_value,
            **dataclasses.asdict(self),
            "plan": self.plan.settings(),
        }


@takes_settings
@compilation_cache()
def cross_validate(
    model: keras.Model | str,
    pairs: Any,
    *,
    folds: int | Literal["leave-one-out"] = 5,
    checks: Checks = "auto",
    baseline: bool = True,
    max_new_tokens: int | Literal["auto"] = "auto",
    confidence: float = 0.95,
    seed: int = 0,
    verbose: int = 1,
    plan: Plan | str | os.PathLike[str] | None = None,
    **settings: Unpack[TrainingSettings],
) -> CrossValidation:
    """Hold out every pair once: tune on the others, and run the model on it.

    Pairs with the same prompt (apart from case and white space) stay in one fold, so that no prompt
    is on both sides. The model is left unchanged.

    Args:
        model: A KerasHub Gemma `CausalLM` without LoRA, or anything `load` takes.
        pairs: Anything `read_pairs` takes. They are held in memory.
        folds: Number of folds, at least 2; `"leave-one-out"` makes every prompt a fold.
        checks: Conditions for a response: one check or several for all pairs, or a function from a
            `Pair` to its own. `"auto"`: the pair's own response; as data, if that is JSON.
        baseline: True to run the base, too.
        max_new_tokens: Longest response; `"auto"` is one and a half times the longest of the pairs.
        confidence: Confidence level of the interval.
        seed: Seed of the folds, of shuffling and of LoRA's start.
        verbose: 1 prints the plan and a progress bar, 0 nothing.
        plan: A plan, or the file of one, as `tune` takes it. All its settings are used, except the
            seed and the validation split.
        **settings: The settings of `tune`, except those about validation.

    Returns:
        A `CrossValidation`.

    Raises:
        EvaluationError: Too few prompts for the folds, an option that `tune` does not have, an
            argument out of range, or wrong `checks`.
        LoraError: LoRA is on the model already.
        PairsError: Rows that cannot be trained on.
        PlanError: Settings out of range or against those of the plan, or a plan that stops early.
    """
    begin = time.perf_counter()
    _check_options(settings)
    _check_arguments(checks, max_new_tokens, confidence, seed)
    optimizer = settings.get("optimizer", "auto")
    resolved = _settings(settings, plan, seed)
    model = load(model)
    if lora_config(model) is not None:
        raise LoraError(
            "The model has LoRA on it, and may have been tuned on the pairs to be held out.",
            next_step="Call `remove_lora(model)`, or load the base anew.",
        )
    template = get_template(model, resolved["template"])
    resolved["template"] = template_setting(template)
    pairs, tokens = _read(model, pairs, template, resolved)
    judged = _checks(pairs, checks)
    split = _split(model, pairs, tokens, folds, resolved, seed)
    if verbose:
        print(f"{split.folds} parts, each held out once.\n{split.plan}")
    if max_new_tokens == "auto":
        max_new_tokens = int(1.5 * tokens.response_lengths.max()) + 8
    respond = functools.partial(
        _respond, model, template=template, max_new_tokens=max_new_tokens,
        batch_size=split.rows_at_once,
    )  # fmt: skip
    base = respond(pairs, judged) if baseline else [None] * len(pairs)
    found: dict[int, HeldOut] = {}
    losses, base_losses = [], []
    with progress_bar(split.folds, "cross-validation", "part", verbose) as advance:
        for fold, (before, after) in enumerate(_tune_folds(model, split, optimizer)):
            base_losses.append(before)
            losses.append(after)
            rows = np.flatnonzero(split.parts == fold).tolist()
            responses = respond([pairs[i] for i in rows], [judged[i] for i in rows])
            for row, tuned in zip(rows, responses, strict=True):
                pair = pairs[row]
                prompt, expected = pair.prompt, pair.response
                found[row] = HeldOut(pair.row, fold, prompt, expected, tuned, base[row])
            advance(1)
    return CrossValidation(
        plan=split.plan,
        rows=tuple(found[row] for row in range(len(pairs))),
        folds=split.folds,
        losses=tuple(losses),
        base_losses=tuple(base_losses),
        confidence=confidence,
        seconds=time.perf_counter() - begin,
    )


@dataclasses.dataclass(frozen=True)
class _Split:
    """The folds, and the batches of each.

    Attributes:
        plan: The plan of each tuning.
        parts: `[rows]` int64, the fold of each row, from 0.
        rest: For each fold, the batches of all other rows.
        held: For each fold, its own batches.
    """

    plan: Plan
    parts: np.ndarray
    rest: list[Batcher]
    held: list[Batcher]

    @property
    def folds(self) -> int:
        return len(self.held)

    @property
    def rows_at_once(self) -> int:
        """Prompts that run at once, so that folds of any size and the base share one program."""
        return int(min(MAX_ROWS, 2 ** math.ceil(math.log2(np.bincount(self.parts).max()))))


def _split(
    model: keras.Model,
    pairs: Sequence[Pair],
    tokens: TokenizedPairs,
    folds: int | Literal["leave-one-out"],
    settings: dict[str, Any],
    seed: int,
) -> _Split:
    parts = assign_folds([_prompt_key(pair) for pair in pairs], folds, seed=seed)
    largest = len(parts) - int(np.bincount(parts).min())
    plan = plan_settings(model, largest, int(tokens.lengths.max()), settings)
    shapes = _shared_shapes(tokens, parts, plan)
    batch = functools.partial(
        Batcher, shapes=shapes, pad_id=int(model.preprocessor.tokenizer.pad_token_id),
        seed=plan.seed, gradient_accumulation_steps=plan.gradient_accumulation_steps,
    )  # fmt: skip
    numbers = range(int(parts.max()) + 1)
    rest = [batch(_take(tokens, np.flatnonzero(parts != part))) for part in numbers]
    held = [batch(_take(tokens, np.flatnonzero(parts == part)), shuffle=False) for part in numbers]
    return _Split(_fill_in(plan, rest, tokens), parts, rest, held)


def _tune_folds(model: keras.Model, split: _Split, optimizer: Any) -> Iterator[tuple[float, float]]:
    """Tune on the rest of each fold; yield the fold's loss before and after, the model tuned.

    The weights are put back for every fold, and at the end.
    """
    with _trainable(model, split.plan):
        trainer = TuningModel(model, rematerialize=split.plan.rematerialize)
        trainer.compile(run_optimizer(split.plan, optimizer), jit_compile=True)
        trainer.optimizer.build(trainer.trainable_variables)
        start = Snapshot([*trainer.trainable_variables, *trainer.optimizer.variables])
        try:
            for rest, held in zip(split.rest, split.held, strict=True):
                start.restore()
                before = _loss(trainer, held)
                trainer.fit(rest.to_dataset(), epochs=split.plan.epochs, shuffle=False, verbose=0)
                yield before, _loss(trainer, held)
        finally:
            start.restore()


def assign_folds(
    keys: Sequence[Any], folds: int | Literal["leave-one-out"], *, seed: int = 0
) -> np.ndarray:
    """Assign rows to folds of about the same size; rows with the same key share a fold.

    Args:
        keys: One for each row, hashable.
        folds: Number of folds; `"leave-one-out"` makes every key one.
        seed: Seed of the choice.

    Returns:
        `[rows]` int64, the fold of each row, from 0.

    Raises:
        EvaluationError: There are fewer keys than folds, or fewer than two folds.
    """
    groups: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    wanted = len(groups) if folds == "leave-one-out" else folds
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 2 <= wanted <= len(groups):
        raise EvaluationError(
            f"`folds` must be 'leave-one-out' or an integer from 2 to {len(groups)}, the number of "
            f"different prompts. Received: {folds!r}"
        )
    parts = np.zeros(len(keys), np.int64)
    sizes = np.zeros(wanted, np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    members = list(groups.values())
    # The largest groups first, each into the smallest fold.
    for group in sorted((members[i] for i in shuffled), key=len, reverse=True):
        smallest = int(sizes.argmin())
        parts[group] = smallest
        sizes[smallest] += len(group)
    return parts


def _check_options(settings: Mapping[str, Any]) -> None:
    known = TrainingSettings.__annotations__
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise EvaluationError(
            "These cannot be passed on to `tune` here.", unknown, f"Settings are {tuple(known)}."
        )


def _check_arguments(checks: Any, max_new_tokens: Any, confidence: Any, seed: Any) -> None:
    judges = isinstance(checks, Check) or callable(checks) or _are_checks(checks)
    found = [
        "" if judges or checks == "auto"
        else f"`checks` must be 'auto', checks, or a function, got {shown(checks)}",
        problem("max_new_tokens", max_new_tokens, AutoPositiveInt),
        problem("confidence", confidence, Confidence),
        problem("seed", seed, Count),
    ]  # fmt: skip
    if problems := [text for text in found if text]:
        raise EvaluationError("The cross-validation cannot begin.", problems)


def _settings(given: Mapping[str, Any], plan: Any, seed: int) -> dict[str, Any]:
    """Resolve the settings of `tune`, from the plan where there is one."""
    plan = as_plan(plan)
    if plan is not None:
        if plan.early_stopping is not None:
            raise PlanError(
                "The plan stops early, on validation pairs; here every pair is trained on or held "
                "out.",
                next_step="Pass `plan=dataclasses.replace(plan, early_stopping=None)`.",
            )
        plan = dataclasses.replace(plan, validation_split=0.0, seed=seed)
    return resolve_settings({**given, "seed": seed}, plan)


def _read(
    model: keras.Model,
    pairs: Any,
    template: Template,
    settings: dict[str, Any],
) -> tuple[list[Pair], TokenizedPairs]:
    by_row: dict[int, Pair] = {}
    length = settings["sequence_length"]
    tokens = tokenize_pairs(
        model,
        pairs,
        template=template,
        max_length=None if length == "auto" else length,
        overlong=settings["overlong"],
        on_pair=lambda pair: by_row.__setitem__(pair.row, pair),
    )
    return [by_row[int(row)] for row in tokens.rows], tokens


def _prompt_key(pair: Pair) -> tuple[str, ...]:
    """Make a key of all before the first response, apart from case and white space."""
    first = next(i for i, message in enumerate(pair.messages) if message.role == "assistant")
    return tuple(" ".join(m.written.casefold().split()) for m in pair.messages[:first])


def _shared_shapes(tokens: TokenizedPairs, parts: np.ndarray, plan: Plan) -> tuple[Shape, ...]:
    """Choose static shapes for every batch of every fold, and of the rest of each."""
    fixed = None if plan.sequence_length == "auto" else plan.sequence_length
    lengths, responses = tokens.lengths, tokens.response_lengths
    bounds = [
        shape.length
        for shape in choose_shapes(lengths, responses, plan.batch_size, sequence_length=fixed)
    ]
    group = np.searchsorted(bounds, lengths)
    shapes = []
    for index, bound in enumerate(bounds):
        sides = [s for part in set(parts) for s in (parts == part, parts != part)]
        inside = [side & (group == index) for side in sides]
        needs = [
            choose_shapes(lengths[rows], responses[rows], plan.batch_size, sequence_length=bound)[0]
            for rows in inside
            if rows.any()
        ]
        size = max(need.batch_size for need in needs)
        shapes.append(Shape(size, bound, max(need.positions for need in needs)))
    return tuple(shapes)


def _take(tokens: TokenizedPairs, indices: np.ndarray) -> TokenizedPairs:
    """Select some of the rows."""
    rows = [tokens.row(int(index)) for index in indices]
    return TokenizedPairs(
        np.concatenate([ids for ids, _ in rows]),
        np.concatenate([trained for _, trained in rows]),
        np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64),
        tokens.rows[indices],
    )


def _fill_in(plan: Plan, rest: Sequence[Batcher], tokens: TokenizedPairs) -> Plan:
    largest = max(rest, key=lambda batcher: (batcher.batches_per_epoch, len(batcher.tokens)))
    filled = fill_plan(plan, largest)
    return dataclasses.replace(filled, dropped=tokens.dropped, truncated=tokens.truncated)


@contextlib.contextmanager
def _trainable(model: keras.Model, plan: Plan) -> Iterator[None]:
    """Make trainable what the plan trains, within the context."""
    flags = [(variable, variable.trainable) for variable in model.variables]
    prepare_weights(model, plan, verbose=0)
    try:
        yield
    finally:
        if plan.method == "lora":
            remove_lora(model)
        for variable, trainable in flags:
            variable.trainable = trainable


def _loss(trainer: TuningModel, batcher: Batcher) -> float:
    figures = trainer.evaluate(batcher.to_dataset(), verbose=0, return_dict=True)
    return float(figures["loss"])


def _respond(
    model: keras.Model,
    pairs: Sequence[Pair],
    checks: Sequence[Sequence[Check]],
    *,
    template: Template,
    max_new_tokens: int,
    batch_size: int,
) -> list[SampleResult]:
    """Run the model on prompts, and judge the responses."""
    prompts = [pair.prompt_messages for pair in pairs]
    # Few prompts run in a smaller program: one that would have to be compiled.
    prompts += [prompts[0]] * (batch_size - len(prompts))
    responses = generate_answers(
        model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, template=template
    )
    results = []
    for pair, own, found in zip(pairs, checks, responses, strict=False):
        outcomes = tuple(check.check(pair.prompt, found) for check in own)
        results.append(SampleResult(found.text, found.stopped, len(found.ids), outcomes))
    return results


def _checks(pairs: Sequence[Pair], checks: Checks) -> list[tuple[Check, ...]]:
    """Find the checks of each pair."""
    found: list[tuple[Check, ...]] = []
    problems: list[str] = []
    for pair in pairs:
        try:
            given: Any = _checks_of(pair, checks)
        except Exception as error:
            problems.append(f"row {pair.row}: it raised {type(error).__name__}: {error}")
            continue
        own = (given,) if isinstance(given, Check) else given
        if not _are_checks(own):
            problems.append(f"row {pair.row}: it gave {own!r:.80}")
            continue
        found.append(tuple(own))
    if problems:
        raise EvaluationError("`checks` must give checks for every pair.", problems)
    return found


def _are_checks(given: Any) -> bool:
    some = isinstance(given, Sequence) and not isinstance(given, str) and bool(given)
    return some and all(isinstance(check, Check) for check in given)


def _checks_of(pair: Pair, checks: Checks) -> Check | Sequence[Check]:
    if isinstance(checks, Check):
        return checks
    if not isinstance(checks, str):
        return checks(pair) if callable(checks) else checks
    if calls := pair.messages[-1].tool_calls:
        return tuple(CallsTool(call.name, call.arguments) for call in calls)
    try:
        value = json.loads(pair.response)
    except ValueError:
        value = None
    if isinstance(value, (dict, list)):
        return (JsonSchema({"const": value}),)
    return (Exact(pair.response),)
