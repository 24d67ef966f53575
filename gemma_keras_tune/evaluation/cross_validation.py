"""How well would this go on pairs the model has not seen? Every pair is held out once.

With twenty pairs there are none to spare for a test set. Cross-validation tunes several times, each
time on all pairs but one part, and asks the model the part it has not seen. One training program is
compiled for all of it: the parts share their shapes, and between them the weights and the optimizer
are put back to where they began.
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
from gemma_keras_tune.evaluation.asking import is_share, is_whole, progress_bar
from gemma_keras_tune.evaluation.checks import Check, Exact, JsonSchema
from gemma_keras_tune.evaluation.results import SampleResult
from gemma_keras_tune.evaluation.statistics import mcnemar, wilson_interval
from gemma_keras_tune.gemma.templates import Template, get_template
from gemma_keras_tune.generation.answers import generate_answers
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.pairs.reader import Pair
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

MAX_ROWS = 8  # that are asked at once

Checks = Check | Sequence[Check] | Callable[[Pair], Check | Sequence[Check]] | Literal["auto"]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One pair, and what a model that was tuned on others made of it.

    Attributes:
        row: Its row number in the source.
        fold: The part it was in, from 0.
        prompt: What the user said last.
        expected: The pair's answer.
        tuned: The answer of the model tuned on the other parts.
        base: The base's answer, where it was asked.
    """

    row: int
    fold: int
    prompt: str
    expected: str
    tuned: SampleResult
    base: SampleResult | None = None


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """What the held-out pairs show.

    Attributes:
        plan: How each part was tuned; its figures are those of the largest part.
        rows: Every pair, in the order of the source.
        folds: How many parts there were.
        losses: Mean loss over the held-out answers' tokens of each part, in nats.
        base_losses: The same before tuning.
        confidence: Confidence level of the interval.
        seconds: How long it took.
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
        """Held-out pairs whose answer passed."""
        return sum(row.tuned.passed for row in self.rows)

    @property
    def base_passed(self) -> int | None:
        """How many of them the base passed, where it was asked."""
        if any(row.base is None for row in self.rows):
            return None
        return sum(row.base.passed for row in self.rows if row.base)

    @property
    def rate(self) -> float:
        """Share of held-out pairs that passed."""
        return self.passed / len(self.rows)

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of that share.

        It takes the pairs for independent. The models that answer them share most of their training
        pairs, so that the true interval is somewhat wider.
        """
        return wilson_interval(self.passed, len(self.rows), self.confidence)

    @functools.cached_property
    def p_value(self) -> float | None:
        """Exact McNemar test of base against tuned, where the base was asked."""
        asked = [row for row in self.rows if row.base is not None]
        if len(asked) < len(self.rows):
            return None
        base = [row.base is not None and row.base.passed for row in asked]
        return mcnemar(base, [row.tuned.passed for row in asked])

    @property
    def words(self) -> str:
        """All this in words."""
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
        """Everything as JSON data."""
        low, high = self.interval
        return {
            "words": self.words,
            "passed": self.passed,
            "rate": self.rate,
            "low": low,
            "high": high,
            "base_passed": self.base_passed,
            "p_value": self.p_value,
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.name not in ("plan", "rows")
            },
            "plan": self.plan.settings(),
            "rows": [dataclasses.asdict(row) for row in self.rows],
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
    """Hold every pair out once: tune on the others, and ask it.

    Pairs with the same prompt (apart from case and white space) stay in one part, so that no prompt
    is on both sides. The model is left as it came.

    Args:
        model: A KerasHub Gemma `CausalLM` without LoRA, or anything `load` takes.
        pairs: Anything `read_pairs` takes. They are held in memory.
        folds: In how many parts, at least 2; `"leave-one-out"` makes every prompt a part.
        checks: What an answer must be like: one check or several for all pairs, or a function from
            a `Pair` to its own. `"auto"`: the pair's own answer; as data, where that is JSON.
        baseline: Whether the base is asked too.
        max_new_tokens: Longest answer; `"auto"` is half as long again as the longest of the pairs.
        confidence: Confidence level of the interval.
        seed: Seed of the parts, of shuffling and of LoRA's start.
        verbose: 1 prints the plan and a progress bar, 0 nothing.
        plan: A plan, or the file of one, as `tune` takes it. All its settings but the seed and the
            validation split hold.
        **settings: The settings of `tune`, but for those about validation.

    Returns:
        A `CrossValidation`.

    Raises:
        EvaluationError: Too few prompts for the parts, an option that `tune` does not have, an
            argument out of range, or `checks` that are none.
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
    template = get_template(resolved["template"], model)
    resolved["template"] = template_setting(template)
    kept, tokens = _read(model, pairs, template, resolved)
    judged = _checks(kept, checks)
    parts = assign_folds([_prompt_key(pair) for pair in kept], folds, seed=seed)
    count = int(parts.max()) + 1
    largest = len(parts) - int(np.bincount(parts).min())
    draft = plan_settings(model, largest, int(tokens.lengths.max()), resolved)
    shapes = _shared_shapes(tokens, parts, draft)
    pad_id = int(model.preprocessor.tokenizer.pad_token_id)
    batch = functools.partial(
        Batcher, shapes=shapes, pad_id=pad_id, seed=draft.seed,
        gradient_accumulation_steps=draft.gradient_accumulation_steps,
    )  # fmt: skip
    rest = [batch(_take(tokens, np.flatnonzero(parts != part))) for part in range(count)]
    held = [
        batch(_take(tokens, np.flatnonzero(parts == part)), shuffle=False) for part in range(count)
    ]
    plan = _fill_in(draft, rest, tokens)
    if verbose:
        print(f"{count} parts, each held out once.\n{plan}")
    if max_new_tokens == "auto":
        max_new_tokens = int(1.5 * tokens.response_lengths.max()) + 8
    # Parts of any size are asked by the one program that the base is asked by.
    rows_at_once = min(MAX_ROWS, 2 ** math.ceil(math.log2(np.bincount(parts).max())))
    ask = functools.partial(
        _ask, model, template=template, max_new_tokens=max_new_tokens, batch_size=rows_at_once,
    )  # fmt: skip
    base = ask(kept, judged) if baseline else [None] * len(kept)
    bar = progress_bar(count, "cross-validation", "part", verbose)
    with _trainable(model, plan), bar as advance:
        trainer = TuningModel(model)
        trainer.compile(run_optimizer(plan, optimizer), jit_compile=True)
        trainer.optimizer.build(trainer.trainable_variables)
        start = Snapshot([*trainer.trainable_variables, *trainer.optimizer.variables])
        losses, base_losses = [], []
        found: dict[int, HeldOut] = {}
        try:
            for part in range(count):
                start.restore()
                base_losses.append(_loss(trainer, held[part]))
                trainer.fit(rest[part].to_dataset(), epochs=plan.epochs, shuffle=False, verbose=0)
                losses.append(_loss(trainer, held[part]))
                places = np.flatnonzero(parts == part).tolist()
                answered = ask([kept[i] for i in places], [judged[i] for i in places])
                for place, tuned in zip(places, answered, strict=True):
                    pair = kept[place]
                    prompt, output = pair.prompt_messages[-1].content, pair.response
                    found[place] = HeldOut(pair.row, part, prompt, output, tuned, base[place])
                advance(1)
        finally:
            start.restore()
    rows = tuple(found[index] for index in range(len(kept)))
    seconds = time.perf_counter() - begin
    return CrossValidation(
        plan, rows, count, tuple(losses), tuple(base_losses), confidence, seconds
    )


def assign_folds(
    keys: Sequence[Any], folds: int | Literal["leave-one-out"], *, seed: int = 0
) -> np.ndarray:
    """Parts of about the same size; rows with the same key are in the same part.

    Args:
        keys: One for each row, hashable.
        folds: How many parts; `"leave-one-out"` makes every key one.
        seed: Seed of the choice.

    Returns:
        `[rows]` int64, the part of each row, from 0.

    Raises:
        EvaluationError: There are fewer keys than parts, or fewer than two parts.
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
    # The largest groups first, each into the smallest part.
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
    problems = [
        f"`{name}` must be {what}, got {value!r:.80}"
        for name, what, value, good in (
            ("checks", "'auto', checks, or a function", checks, judges or checks == "auto"),
            ("max_new_tokens", "'auto' or a whole number from 1", max_new_tokens,
             is_whole(max_new_tokens, 1, "auto")),
            ("confidence", "between 0 and 1", confidence, is_share(confidence)),
            ("seed", "a whole number from 0", seed, is_whole(seed, 0)),
        )
        if not good
    ]  # fmt: skip
    if problems:
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
    """What stands before the first answer, apart from case and white space."""
    first = next(i for i, message in enumerate(pair.messages) if message.role == "assistant")
    return tuple(" ".join(m.content.casefold().split()) for m in pair.messages[:first])


def _shared_shapes(tokens: TokenizedPairs, parts: np.ndarray, plan: Plan) -> tuple[Shape, ...]:
    """Static shapes that hold every batch of every part, and of all others of it."""
    fixed = None if plan.sequence_length == "auto" else plan.sequence_length
    lengths, answers = tokens.lengths, tokens.response_lengths
    bounds = [
        shape.length
        for shape in choose_shapes(lengths, answers, plan.batch_size, sequence_length=fixed)
    ]
    group = np.searchsorted(bounds, lengths)
    shapes = []
    for index, bound in enumerate(bounds):
        sides = [s for part in set(parts) for s in (parts == part, parts != part)]
        inside = [side & (group == index) for side in sides]
        needs = [
            choose_shapes(lengths[rows], answers[rows], plan.batch_size, sequence_length=bound)[0]
            for rows in inside
            if rows.any()
        ]
        size = max(need.batch_size for need in needs)
        shapes.append(Shape(size, bound, max(need.positions for need in needs)))
    return tuple(shapes)


def _take(tokens: TokenizedPairs, indices: np.ndarray) -> TokenizedPairs:
    """Some of the rows."""
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
    """Within the context, what the plan trains is trainable."""
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


def _ask(
    model: keras.Model,
    pairs: Sequence[Pair],
    checks: Sequence[Sequence[Check]],
    *,
    template: Template,
    max_new_tokens: int,
    batch_size: int,
) -> list[SampleResult]:
    """The model's answers, judged."""
    prompts = [pair.prompt_messages for pair in pairs]
    # Few prompts run in a smaller program: one that would have to be compiled.
    prompts += [prompts[0]] * (batch_size - len(prompts))
    answers = generate_answers(
        model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, template=template
    )
    results = []
    for pair, own, answer in zip(pairs, checks, answers, strict=False):
        prompt = pair.prompt_messages[-1].content
        outcomes = tuple(check.check(prompt, answer) for check in own)
        results.append(SampleResult(answer.text, answer.stopped, len(answer.ids), outcomes))
    return results


def _checks(pairs: Sequence[Pair], checks: Checks) -> list[tuple[Check, ...]]:
    """What the answer to each pair must be like."""
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
    try:
        value = json.loads(pair.response)
    except ValueError:
        value = None
    if isinstance(value, (dict, list)):
        return (JsonSchema({"const": value}),)
    return (Exact(pair.response),)
