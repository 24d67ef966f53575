"""`evaluate`: put a test plan to the base and to the tuned model, and judge the answers."""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, TypeGuard

import keras
import keras_hub
import numpy as np

from gemma_keras_tune._support.packages import installed_versions
from gemma_keras_tune.adapters.lora import get_factors, is_lora_on, lora_linears
from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.asking import (
    Question,
    Side,
    Sides,
    ask,
    is_share,
    is_whole,
    progress_bar,
    resolve_sampler,
    sampler_config,
)
from gemma_keras_tune.evaluation.checks import Check, Outcome, Safe
from gemma_keras_tune.evaluation.leakage import find_leaks
from gemma_keras_tune.evaluation.plans import KINDS, Case, Kind, TestPlan
from gemma_keras_tune.evaluation.policies import (
    Judged,
    PolicyCheck,
    policy_names,
    policy_threshold,
    score_texts,
)
from gemma_keras_tune.evaluation.prompting import (
    choose_examples,
    first_answer,
    judge_few_shot,
    line_break_ids,
    with_examples,
)
from gemma_keras_tune.evaluation.results import (
    CaseResult,
    KindVerdict,
    Leak,
    Report,
    SampleResult,
    Tuning,
)
from gemma_keras_tune.evaluation.resuming import AnswerLog
from gemma_keras_tune.evaluation.retention import (
    RetentionItem,
    RetentionTest,
    read_items,
    retention_items,
)
from gemma_keras_tune.evaluation.statistics import compare, judge, mcnemar
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.families import family_of, fingerprint
from gemma_keras_tune.gemma.templates import Template, TemplateSpec, get_template
from gemma_keras_tune.generation.answers import Answer, SamplerState
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.pairs.reader import Message, Pair, PairSource, read_pairs
from gemma_keras_tune.training.tuning import TuneResult

Auto = Literal["auto"]
TARGET = 0.9
PACKAGES = ("gemma_keras_tune", "keras", "keras-hub", "jax", "numpy", "scipy")


def evaluate(
    model: keras.Model | str,
    plan: TestPlan | Sequence[Case] | str | os.PathLike[str],
    *,
    baseline: keras.Model | Literal["auto", "base"] | None = "auto",
    pairs: Any = None,
    result: TuneResult | None = None,
    few_shot: int | Auto = "auto",
    retention: bool | Sequence[RetentionItem | Mapping[str, Any]] | Auto = "auto",
    target: float | Mapping[Kind, float] = TARGET,
    confidence: float = 0.95,
    policy: PolicyCheck | None = None,
    template: TemplateSpec = "auto",
    sampler: str | keras_hub.samplers.Sampler = "auto",
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    verbose: int = 1,
) -> Report:
    """Put a test plan to a tuned model and to its base.

    Base and tuned are one model in memory: its adapter off, and on. Cases of one sample are
    answered greedily. Those of several are drawn at random, each sample with a seed of its own, so
    that the answers depend neither on the batch nor on the other cases.

    Args:
        model: A tuned KerasHub Gemma, or anything `load` takes.
        plan: A `TestPlan`, its cases, or the path of its file.
        baseline: `"base"` is the model with its adapter off; a model is another one, such as that
            before `tune(method="full")`; `None` asks the tuned model alone. `"auto"` is `"base"`
            where an adapter is on, else `None`.
        pairs: The training pairs, as `tune` got them: anything `read_pairs` takes. Cases that are
            among them are listed and scored apart, and some are put into the base's prompt.
        result: What `tune` returned, for the report.
        few_shot: Training pairs in the base's prompt; 0 leaves that out. `"auto"` is up to five,
            where there are `pairs` and a base.
        retention: Whether to measure what was forgotten, or the items to do it with, each a
            dictionary with `prompt` and `answer`. `"auto"` does where there is a base.
        target: Pass rate that each kind of case has to have, or one for each kind.
        confidence: Confidence level of verdicts, intervals and comparisons.
        policy: A `ShieldGemma`, or a function of prompt and answer that gives how likely the answer
            violates a policy, or that for each of several policies by name. It judges `safe`
            checks, and every answer to a failure or boundary case. Where a check judges the prompt,
            the function is given `None` for the answer.
        template: The prompts' format. `"auto"` is the one the model was tuned with.
        sampler: A KerasHub sampler or its name, for cases of several samples. `"auto"` is
            top-p 0.95 of the 64 likeliest tokens, as Google advises for Gemma.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts that run at once.
        seed: Seed of samples and of the choice of few-shot pairs.
        resume: A file that keeps every answer as it comes, and the scores of a policy that has an
            `identity`, as `ShieldGemma` has. When a run was interrupted, the same call goes on
            where it stopped.
        verbose: 1 shows a progress bar, 0 nothing.

    Returns:
        A `Report`.

    Raises:
        EvaluationError: The plan is no plan, an argument is out of range, there is no base to
            compare with, `resume` belongs to another evaluation, or `policy` fails; it is named
            with the case.
        TemplateError: Prompts that the template cannot carry; all are named.
        PairsError: `pairs` cannot be read.
    """
    begin = time.perf_counter()
    plan = _plan(plan)
    targets = _targets(target)
    _check(
        plan, few_shot=few_shot, confidence=confidence, policy=policy, sampler=sampler,
        max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, result=result,
        resume=resume, pairs=pairs,
    )  # fmt: skip
    model = load(model)
    sides = Sides(model, _other(model, baseline))
    items = _items(retention, sides)
    resolved = get_template(model, template)
    source = None if pairs is None else _source(pairs)
    leaks, pair_count = ({}, None) if source is None else _leaks(plan, source)
    asked = _Asked(sides, resolved, plan, seed, max_new_tokens)
    examples = _examples(asked, source, few_shot, leaks, seed) if sides.base is not None else ()
    questions = asked.questions("tuned")
    if sides.base is not None:
        questions += asked.questions("base")
    if examples:
        questions += asked.questions("base", examples)
    general = RetentionTest(sides, items, resolved) if items else None
    settings = {
        "baseline": _name(baseline, sides), "few_shot": few_shot,
        "retention": retention if isinstance(retention, (bool, str)) else len(items),
        "target": targets, "confidence": confidence, "template": resolved.name,
        "sampler": sampler_config(sampler), "max_new_tokens": max_new_tokens,
        "batch_size": batch_size, "policy": _policy_name(policy),
        "pairs": pair_count,
    }  # fmt: skip
    log = AnswerLog(resume, _identity(sides, settings, seed) if resume else {})
    everything = [*questions, *(general.questions if general else ())]
    with progress_bar(len(everything), "evaluating", "answer", verbose) as progress:
        answers = ask(
            sides, everything, sampler=sampler, batch_size=batch_size, log=log, progress=progress
        )
    written = [
        first_answer(answers[q.key], examples) if q.what == "few_shot" else answers[q.key]
        for q in questions
    ]
    remembered = None
    if general:
        remembered = general.judge(answers, batch_size=batch_size, confidence=confidence, log=log)
    cases = _judged(plan, questions, written, leaks, policy, log, verbose)
    return Report(
        plan_name=plan.name,
        cases=cases,
        verdicts=_verdicts([c for c in cases if not c.leak], targets, confidence),
        retention=remembered,
        few_shot=judge_few_shot(cases, examples, confidence) if examples else None,
        leaks=_verdicts([c for c in cases if c.leak], targets, confidence),
        tuning=None if result is None else tuning_of(result),
        settings={
            **settings,
            "fingerprint": fingerprint(model),
            "adapter": _adapter_hash(model),
            "machine": _machine(),
        },
        versions={"python": platform.python_version()} | installed_versions(PACKAGES),
        seed=seed,
        seconds=time.perf_counter() - begin,
    )


class _Asked:
    """Makes the questions of a plan."""

    def __init__(
        self, sides: Sides, template: Template, plan: TestPlan, seed: int, max_new_tokens: int
    ) -> None:
        self.encoder = RowTokenizer(sides.tuned.preprocessor.tokenizer)
        self.sides = sides
        self.template = template
        self.plan = plan
        self.seed = seed
        self.max_new_tokens = max_new_tokens

    def questions(self, side: Side, examples: Sequence[Pair] = ()) -> list[Question]:
        """One for each sample of each case.

        Raises:
            EvaluationError: Prompts that the template cannot carry; all are named.
        """
        found: list[Question] = []
        problems: list[str] = []
        stops = self._stops(side, examples)
        for place, case in enumerate(self.plan):
            try:
                ids = self._ids(with_examples(examples, case.messages))
            except ValueError as error:
                problems.append(f"case {case.id}: {getattr(error, 'headline', error)}")
                continue
            what: Literal["few_shot", "cases"] = "few_shot" if examples else "cases"
            about = (side, what, place, ids, stops, self.max_new_tokens)
            found += [Question(*about, seed) for seed in _seeds(case, self.seed)]
        if problems:
            raise EvaluationError("Some cases cannot be asked.", problems)
        return found

    def _stops(self, side: Side, examples: Sequence[Pair]) -> frozenset[int]:
        tokenizer = self.sides.model(side).preprocessor.tokenizer
        stops = {int(i) for i in self.template.stop_token_ids(tokenizer)}
        return frozenset(stops | line_break_ids(tokenizer, examples) if examples else stops)

    def _ids(self, messages: Sequence[Message]) -> np.ndarray:
        segments = self.template.segments(messages, generation_prompt=True)
        return np.asarray(self.encoder.encode(segments)[0], np.int32)


def _seeds(case: Case, seed: int) -> list[int | None]:
    if case.samples == 1:
        return [None]
    names = (f"{seed}/{case.id}/{number}" for number in range(case.samples))
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1 for name in names]


# Judging.


def _judged(
    plan: TestPlan,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    leaks: Mapping[str, Leak],
    policy: PolicyCheck | None,
    log: AnswerLog,
    verbose: int,
) -> tuple[CaseResult, ...]:
    cases = [_with_policy(case, policy) for case in plan]
    said = [(cases[q.place], answer) for q, answer in zip(questions, answers, strict=True)]
    scores = _scores(policy, said, log, verbose) if policy is not None else {}
    variants: list[dict[str, list[SampleResult]]] = [{} for _ in cases]
    for question, (case, answer) in zip(questions, said, strict=True):
        outcomes = tuple(_outcome(case, check, answer, scores) for check in case.checks)
        sample = SampleResult(answer.text, answer.stopped, len(answer.ids), outcomes)
        variant = question.what if question.what == "few_shot" else question.side
        variants[question.place].setdefault(variant, []).append(sample)
    return tuple(
        CaseResult(case, {name: tuple(s) for name, s in found.items()}, leaks.get(case.id))
        for case, found in zip(cases, variants, strict=True)
    )


def _with_policy(case: Case, policy: PolicyCheck | None) -> Case:
    """The case with the policy's threshold in its checks, and one where it has to be careful."""
    if policy is None:
        return case
    checks = list(case.checks)
    judged = any(isinstance(check, Safe) and check.of != "prompt" for check in checks)
    if case.kind != "success" and not judged:
        checks.append(Safe())
    own = policy_threshold(policy)
    return dataclasses.replace(
        case,
        checks=tuple(
            dataclasses.replace(check, threshold=own)
            if _takes_policy(check) and check.threshold is None
            else check
            for check in checks
        ),
    )


def _scores(
    policy: PolicyCheck, said: Iterable[tuple[Case, Answer]], log: AnswerLog, verbose: int
) -> dict[Judged, dict[str, float]]:
    """What the policy says of all that `safe` checks ask about, each text once."""
    wanted = {
        text: case.id
        for case, answer in said
        for check in case.checks
        if _takes_policy(check)
        for text in check.judged(case.text, answer.text)
    }
    with progress_bar(len(wanted), "judging", "text", verbose) as progress:
        return score_texts(policy, wanted, log, progress)


def _takes_policy(check: Check) -> TypeGuard[Safe]:
    return isinstance(check, Safe) and check.policy is None


def _outcome(
    case: Case, check: Check, answer: Answer, scores: Mapping[Judged, Mapping[str, float]]
) -> Outcome:
    try:
        if _takes_policy(check):
            found = [scores[text] for text in check.judged(case.text, answer.text)]
            return check.outcome(found)
        return check.check(case.text, answer)
    except EvaluationError as error:
        raise EvaluationError(
            f"Case {case.id} cannot be judged. {error.headline}", error.problems, error.next_step
        ) from error


def _verdicts(
    cases: Sequence[CaseResult], targets: Mapping[Kind, float], confidence: float
) -> tuple[KindVerdict, ...]:
    found = []
    for kind in KINDS:
        own = [case for case in cases if case.case.kind == kind]
        if own:
            found.append(_verdict(kind, own, targets[kind], confidence))
    return tuple(found)


def _verdict(
    kind: Kind, cases: Sequence[CaseResult], target: float, confidence: float
) -> KindVerdict:
    tuned = [case.passed("tuned") for case in cases]
    weights = [case.case.weight for case in cases]
    judged = judge(sum(tuned), len(tuned), target, confidence)
    verdict = KindVerdict(
        kind=kind,
        cases=len(tuned),
        passed=sum(tuned),
        target=target,
        rate=sum(tuned) / len(tuned),
        low=judged.low,
        high=judged.high,
        confidence=confidence,
        verdict=judged.verdict,
        words=judged.words,
        weighted_rate=sum(w for w, good in zip(weights, tuned, strict=True) if good) / sum(weights),
    )
    if not all("base" in case.variants for case in cases):
        return verdict
    base = [case.passed("base") for case in cases]
    return dataclasses.replace(
        verdict,
        base_passed=sum(base),
        p_value=mcnemar(base, tuned),
        base_words=compare(base, tuned, confidence),
    )


def tuning_of(result: TuneResult) -> Tuning:
    """What a report says of how the model was tuned.

    Args:
        result: What `tune` returned.

    Returns:
        A `Tuning`.
    """
    return Tuning(
        plan=json.loads(json.dumps(dataclasses.asdict(result.plan), default=str)),
        plan_text=str(result.plan),
        history={name: tuple(map(float, values)) for name, values in result.history.items()},
        timings={name: float(value) for name, value in result.timings.items()},
        learning_rates=tuple(result.learning_rates),
        token_lengths=tuple(result.token_lengths),
    )


# Arguments.


def _plan(plan: Any) -> TestPlan:
    if isinstance(plan, TestPlan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return TestPlan.from_file(plan)
    return TestPlan(plan)


def _source(pairs: Any) -> PairSource:
    return pairs if isinstance(pairs, PairSource) else read_pairs(pairs)


def _targets(target: Any) -> dict[Kind, float]:
    given = dict(target) if isinstance(target, Mapping) else dict.fromkeys(KINDS, target)
    problems = [f"there is no kind {kind!r}" for kind in given if kind not in KINDS]
    problems += [
        f"{kind}: a pass rate is over 0 and up to 1, got {rate!r}"
        for kind, rate in given.items()
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1
    ]
    if problems:
        raise EvaluationError(
            "`target` is no pass rate.",
            problems,
            f"Pass one number, or one for each of {', '.join(KINDS)}.",
        )
    return {kind: float(given.get(kind, TARGET)) for kind in KINDS}


def _check(plan: TestPlan, **given: Any) -> None:
    """All that is wrong with the arguments, before any work is done."""
    problems = [
        f"`{name}` must be {what}, got {given[name]!r:.80}"
        for name, what, good in (
            (
                "few_shot",
                "'auto' or a whole number from 0",
                is_whole(given["few_shot"], 0, "auto"),
            ),
            ("confidence", "between 0 and 1", is_share(given["confidence"])),
            ("max_new_tokens", "a whole number from 1", is_whole(given["max_new_tokens"], 1)),
            ("batch_size", "a whole number from 1", is_whole(given["batch_size"], 1)),
            ("seed", "a whole number", is_whole(given["seed"])),
            ("result", "what `tune` returned", isinstance(given["result"], (TuneResult, NoneType))),
            ("resume", "a file's path", isinstance(given["resume"], (str, os.PathLike, NoneType))),
            (
                "policy",
                "a function of prompt and answer",
                given["policy"] is None or callable(given["policy"]),
            ),
        )
        if not good
    ]
    problems += _sampler_problems(given["sampler"])
    problems += _policy_problems(plan, given["policy"])
    if is_whole(given["few_shot"], 1) and given["pairs"] is None:
        problems.append("`few_shot` takes training pairs, and there are none: pass `pairs`")
    if problems:
        raise EvaluationError("The evaluation cannot begin.", problems)


def _sampler_problems(sampler: Any) -> list[str]:
    try:
        SamplerState(resolve_sampler(sampler), None, 0)
    except (ValueError, TypeError, AttributeError) as error:
        return [f"`sampler` is none that can be used: {error}"]
    return []


def _policy_problems(plan: TestPlan, policy: PolicyCheck | None) -> list[str]:
    """`safe` checks that no policy can judge."""
    problems = []
    names = () if policy is None else policy_names(policy)
    for case in plan:
        for check in case.checks:
            if not _takes_policy(check):
                continue
            unknown = [name for name in check.policies if names and name not in names]
            if policy is None:
                problems.append(f"`policy` must judge the `safe` check of case {case.id}")
            elif unknown:
                problems.append(
                    f"case {case.id}: `policy` has no {', '.join(unknown)}; it has "
                    f"{', '.join(names)}"
                )
    return problems


def _other(model: Any, baseline: Any) -> Any:
    """The model that is the base: the same one, with its adapter off, or another."""
    if baseline is None or (isinstance(baseline, str) and baseline == "auto"):
        return model if baseline and is_lora_on(model) else None
    if not isinstance(baseline, str) or baseline != "base":
        other = load(baseline)
        sizes = [m.preprocessor.tokenizer.vocabulary_size() for m in (model, other)]
        if sizes[0] != sizes[1]:
            raise EvaluationError(
                f"`baseline` has another tokenizer: {sizes[1]:,} tokens, not {sizes[0]:,}.",
                next_step="Pass the model that was tuned, as it was before.",
            )
        return other
    if not is_lora_on(model):
        raise EvaluationError(
            "`baseline='base'` is the model with its adapter off, and no adapter is on.",
            next_step="Evaluate before `merge_lora`, or pass the base: `baseline=load(…)`.",
        )
    return model


def _name(baseline: Any, sides: Sides) -> str | None:
    if sides.base is None:
        return None
    if sides.base is sides.tuned:
        return "base"
    return baseline if isinstance(baseline, str) else str(sides.base.name)


def _policy_name(policy: PolicyCheck | None) -> str | None:
    if policy is None:
        return None
    return str(getattr(policy, "__qualname__", type(policy).__name__))


def _leaks(plan: TestPlan, source: PairSource) -> tuple[dict[str, Leak], int]:
    """The cases that are among the training pairs, and how many pairs there are."""
    count = itertools.count()
    leaks = find_leaks(plan, (pair for pair in source if next(count) >= 0))
    source.raise_for_problems()
    return leaks, next(count)


def _examples(
    asked: _Asked,
    source: PairSource | None,
    few_shot: int | Auto,
    leaks: Mapping[str, Leak],
    seed: int,
) -> tuple[Pair, ...]:
    if few_shot == 0 or source is None:
        return ()
    count = {} if few_shot == "auto" else {"count": int(few_shot), "tokens": 10**9}
    return choose_examples(
        source,
        asked.encoder,
        asked.template,
        leave_out=[row for leak in leaks.values() for row in leak.rows],
        seed=seed,
        **count,
    )


def _items(retention: Any, sides: Sides) -> tuple[RetentionItem, ...]:
    """What is asked to see what was forgotten; nothing where there is no base and `"auto"`."""
    if retention is False or (retention == "auto" and sides.base is None):
        return ()
    if sides.base is None:
        raise EvaluationError(
            "What was forgotten is measured against the base, and there is none.",
            next_step="Pass the model before tuning, `baseline=load(…)`, or `retention=False`.",
        )
    if retention is True or retention == "auto":
        return retention_items()
    if isinstance(retention, (str, Mapping)) or not isinstance(retention, Iterable):
        raise EvaluationError(
            f"`retention` must be 'auto', true, false or items. Received: {retention!r:.80}"
        )
    return read_items(retention)


# What an evaluation is, and where it ran.


def _identity(sides: Sides, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What must be the same for answers to be the same."""
    other = sides.base is not None and sides.base is not sides.tuned
    return {
        "model": _weights_hash(sides.tuned),
        "adapter": _adapter_hash(sides.tuned),
        "baseline": _weights_hash(sides.base) if other else None,
        "seed": seed,
        **{name: settings[name] for name in ("template", "sampler")},
    }


def _weights_hash(model: Any) -> str:
    """A hash of some values of every weight, to the last bit: full tuning moves all a little."""
    digest = hashlib.sha256(fingerprint(model).encode())
    for weight in family_of(model).weights(model):
        values = np.asarray(weight.variable).reshape(-1)
        digest.update(np.ascontiguousarray(values[:: max(1, values.size // 1024)]).tobytes())
    return digest.hexdigest()[:16]


def _adapter_hash(model: Any) -> str | None:
    """A hash of the adapter that is on."""
    if not is_lora_on(model):
        return None
    digest = hashlib.sha256()
    for linear in lora_linears(model):
        a, b, scale = get_factors(linear)
        for part in (linear.path.encode(), a.tobytes(), b.tobytes(), repr(scale).encode()):
            digest.update(part)
    return digest.hexdigest()[:16]


def _machine() -> str:
    import jax

    device = jax.devices()[0]
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {device.device_kind}"
