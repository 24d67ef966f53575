"""`evaluate`: put a test plan to the base and to the tuned model, and judge the answers."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import keras_hub
import numpy as np

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks import Check, Outcome, Safe
from gemma_keras_tune.evaluation.leakage import find_leaks
from gemma_keras_tune.evaluation.plans import KINDS, Case, Kind, TestPlan
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
from gemma_keras_tune.evaluation.retention import RetentionItem, measure_retention, retention_items
from gemma_keras_tune.evaluation.safety import PolicyCheck
from gemma_keras_tune.evaluation.statistics import compare, judge, mcnemar
from gemma_keras_tune.families import fingerprint
from gemma_keras_tune.generation import Answer, generate_ids
from gemma_keras_tune.loading import load
from gemma_keras_tune.lora import get_factors, lora_active, lora_disabled, lora_linears
from gemma_keras_tune.pairs import Message, Pair, PairSource, read_pairs
from gemma_keras_tune.pipeline import Encoder
from gemma_keras_tune.templates import Template, TemplateSpec, get_template
from gemma_keras_tune.tuning import TuneResult

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
    retention: bool | Sequence[RetentionItem] | Auto = "auto",
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
        retention: Whether to measure what was forgotten, or the items to do it with. `"auto"` does
            where an adapter is on and is compared with its base.
        target: Pass rate that each kind of case has to have, or one for each kind.
        confidence: Confidence level of verdicts, intervals and comparisons.
        policy: A `ShieldGemma`, or a function of prompt and answer that gives how likely the answer
            violates a policy. It judges `safe` checks, and every answer to a failure or boundary
            case.
        template: The prompts' format. `"auto"` is the one the model was tuned with.
        sampler: A KerasHub sampler or its name, for cases of several samples. `"auto"` is
            top-p 0.95 of the 64 likeliest tokens, as Google advises for Gemma.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts that run at once.
        seed: Seed of samples and of the choice of few-shot pairs.
        resume: A file that keeps every answer as it comes. When a run was interrupted, the same
            call goes on where it stopped.
        verbose: 1 shows a progress bar, 0 nothing.

    Returns:
        A `Report`.

    Raises:
        EvaluationError: The plan is no plan, an argument is out of range, there is no base to
            compare with, or `resume` belongs to another evaluation.
        TemplateError: Prompts that the template cannot carry; all are named.
        PairsError: `pairs` cannot be read.
    """
    begin = time.perf_counter()
    plan = _plan(plan)
    targets = _targets(target)
    _check(few_shot, confidence, plan, policy)
    model = load(model) if isinstance(model, str) else model
    other = _other(model, baseline)
    resolved = get_template(template, model)
    source = None if pairs is None else _source(pairs)
    leaks = find_leaks(plan, source) if source is not None else {}
    asked = _Asked(model, resolved, plan, seed)
    questions = asked.questions("tuned")
    examples: tuple[Pair, ...] = ()
    if other is not None:
        questions += asked.questions("base")
        examples = _examples(asked, source, few_shot, leaks, seed)
        questions += asked.questions("few_shot", examples) if examples else []
    items = _items(retention, model, other)
    settings = {
        "baseline": _name(baseline, other), "few_shot": few_shot, "target": targets,
        "confidence": confidence, "template": resolved.name, "sampler": str(sampler),
        "max_new_tokens": max_new_tokens, "batch_size": batch_size,
        "policy": type(policy).__name__ if policy is not None else None,
    }  # fmt: skip
    log = AnswerLog(resume, _identity(model, other, settings, seed))
    with _bar(len(questions) + 2 * len(items), verbose) as progress:
        answers = log.known(questions, progress)
        # The longest prompts first, so that what is compiled for them serves the others too.
        for variant, used in (("few_shot", other), ("base", other), ("tuned", model)):
            left = [q for q in questions if q.variant == variant and q.key not in answers]
            if not left:
                continue
            stops = set(resolved.stop_token_ids(used.preprocessor.tokenizer))
            if variant == "few_shot":
                stops |= line_break_ids(used.preprocessor.tokenizer, examples)
            off = lora_disabled(model) if used is model and variant != "tuned" else None
            with off or contextlib.nullcontext():
                answers |= _ask(
                    used, left, stops, sampler, max_new_tokens, batch_size, log, progress
                )
        remembered = None
        if items:
            remembered = measure_retention(
                model, items, batch_size=batch_size, confidence=confidence, progress=progress
            )
    written = [
        first_answer(answers[q.key], examples) if q.variant == "few_shot" else answers[q.key]
        for q in questions
    ]
    cases = _judged(plan, questions, written, leaks, policy)
    return Report(
        plan_name=plan.name,
        cases=cases,
        verdicts=_verdicts([c for c in cases if not c.leak], targets, confidence),
        retention=remembered,
        few_shot=judge_few_shot(cases, examples, confidence) if examples else None,
        leaks=_verdicts([c for c in cases if c.leak], targets, confidence),
        tuning=None if result is None else tuning_of(result),
        settings={**settings, "fingerprint": fingerprint(model), "machine": _machine()},
        versions=_versions(),
        seed=seed,
        seconds=time.perf_counter() - begin,
    )


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt to put to one variant of the model, once.

    Attributes:
        variant: `"base"`, `"tuned"` or `"few_shot"`.
        case: The case's place in the plan.
        ids: `[tokens]` int32, the prompt.
        seed: The sample's seed; `None` for a greedy answer.
    """

    variant: str
    case: int
    ids: np.ndarray
    seed: int | None

    @property
    def runs_on(self) -> str:
        """`"base"` or `"tuned"`."""
        return "tuned" if self.variant == "tuned" else "base"

    @property
    def key(self) -> str:
        """What the answer depends on, beside the model and the settings of the evaluation."""
        about = f"{self.runs_on} {self.seed} ".encode()
        return hashlib.sha256(about + self.ids.astype(np.int32).tobytes()).hexdigest()[:32]


class _Asked:
    """Makes the questions of a plan."""

    def __init__(self, model: Any, template: Template, plan: TestPlan, seed: int) -> None:
        self.encoder = Encoder(model.preprocessor.tokenizer)
        self.template = template
        self.plan = plan
        self.seed = seed

    def questions(self, variant: str, examples: Sequence[Pair] = ()) -> list[Question]:
        """One for each sample of each case.

        Raises:
            EvaluationError: Prompts that the template cannot carry; all are named.
        """
        found: list[Question] = []
        problems: list[str] = []
        for place, case in enumerate(self.plan):
            try:
                ids = self._ids(with_examples(examples, case.messages))
            except ValueError as error:
                problems.append(f"case {case.id}: {getattr(error, 'headline', error)}")
                continue
            found += [Question(variant, place, ids, s) for s in _seeds(case, self.seed)]
        if problems:
            raise EvaluationError("Some cases cannot be asked.", problems)
        return found

    def _ids(self, messages: Sequence[Message]) -> np.ndarray:
        segments = self.template.segments(messages, generation_prompt=True)
        return np.asarray(self.encoder.encode(segments)[0], np.int32)


def _seeds(case: Case, seed: int) -> list[int | None]:
    if case.samples == 1:
        return [None]
    names = (f"{seed}/{case.id}/{number}" for number in range(case.samples))
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1 for name in names]


def _ask(
    model: Any,
    questions: Sequence[Question],
    stops: Collection[int],
    sampler: Any,
    max_new_tokens: int,
    batch_size: int,
    log: AnswerLog,
    progress: Callable[[int], None],
) -> dict[str, Answer]:
    """Answers to the questions, by their keys."""
    found: dict[str, Answer] = {}
    tokenizer = model.preprocessor.tokenizer
    drawn = keras_hub.samplers.TopPSampler(p=0.95, k=64) if sampler == "auto" else sampler
    unique = {question.key: question for question in questions}
    for greedy in (True, False):
        group = [q for q in unique.values() if (q.seed is None) == greedy]
        if not group:
            continue

        def keep(written: list[tuple[int, np.ndarray, bool]], group: Any = group) -> None:
            new = {
                group[place].key: Answer(str(tokenizer.detokenize(ids)), ids, stopped)
                for place, ids, stopped in written
            }
            log.add(new)
            found.update(new)

        generate_ids(
            model,
            [q.ids for q in group],
            stop_token_ids=stops,
            max_new_tokens=max_new_tokens,
            sampler="greedy" if greedy else drawn,
            seed=None if greedy else [int(q.seed or 0) for q in group],
            batch_size=batch_size,
            progress=progress,
            on_batch=keep,
        )
    progress(len(questions) - len(unique))
    return found


# Judging.


def _judged(
    plan: TestPlan,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    leaks: Mapping[str, Leak],
    policy: PolicyCheck | None,
) -> tuple[CaseResult, ...]:
    cases = [_with_policy(case, policy) for case in plan]
    texts = [
        (cases[question.case].text, answer.text)
        for question, answer in zip(questions, answers, strict=True)
        if _is_safe(cases[question.case])
    ]
    scores = _scores(policy, texts)
    variants: list[dict[str, list[SampleResult]]] = [{} for _ in cases]
    for question, answer in zip(questions, answers, strict=True):
        case = cases[question.case]
        outcomes = tuple(_outcome(check, case.text, answer, scores) for check in case.checks)
        sample = SampleResult(answer.text, answer.stopped, len(answer.ids), outcomes)
        variants[question.case].setdefault(question.variant, []).append(sample)
    return tuple(
        CaseResult(case, {name: tuple(s) for name, s in found.items()}, leaks.get(case.id))
        for case, found in zip(cases, variants, strict=True)
    )


def _with_policy(case: Case, policy: PolicyCheck | None) -> Case:
    """The case, judged by the policy too where it asks for what a model should be careful with."""
    if policy is None or case.kind == "success" or _is_safe(case):
        return case
    threshold = float(getattr(policy, "threshold", 0.5))
    return dataclasses.replace(case, checks=(*case.checks, Safe(threshold=threshold)))


def _is_safe(case: Case) -> bool:
    return any(isinstance(check, Safe) for check in case.checks)


def _scores(
    policy: PolicyCheck | None, texts: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], float]:
    """The policy's score of every prompt and answer, each once, in batches where it can."""
    if policy is None or not texts:
        return {}
    unique = list(dict.fromkeys(texts))
    in_batches = getattr(policy, "scores", None)
    if in_batches is not None:
        found = in_batches([prompt for prompt, _ in unique], [answer for _, answer in unique])
        return {key: float(row.max()) for key, row in zip(unique, np.asarray(found), strict=True)}
    return {key: float(policy(*key)) for key in unique}


def _outcome(
    check: Check, prompt: str, answer: Answer, scores: Mapping[tuple[str, str], float]
) -> Outcome:
    if isinstance(check, Safe) and check.policy is None:
        check = dataclasses.replace(check, policy=lambda p, a: scores[p, a])
    return check.check(prompt, answer)


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


def _check(few_shot: Any, confidence: Any, plan: TestPlan, policy: Any) -> None:
    problems = []
    whole = isinstance(few_shot, int) and not isinstance(few_shot, bool) and few_shot >= 0
    if few_shot != "auto" and not whole:
        problems.append(f"`few_shot` must be 'auto' or a whole number from 0, got {few_shot!r}")
    if not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        problems.append(f"`confidence` must be between 0 and 1, got {confidence!r}")
    if policy is not None and not callable(policy):
        problems.append(f"`policy` must be a function of prompt and answer, got {policy!r:.80}")
    bare = [c.id for c in plan if any(isinstance(k, Safe) and k.policy is None for k in c.checks)]
    if policy is None and bare:
        problems.append(f"`policy` must judge the `safe` checks of {', '.join(bare[:10])}")
    if problems:
        raise EvaluationError("The evaluation cannot begin.", problems)


def _other(model: Any, baseline: Any) -> Any:
    """The model that is the base: the same one, with its adapter off, or another."""
    if baseline == "auto":
        return model if lora_active(model) else None
    if baseline is None or not isinstance(baseline, str):
        return baseline
    if baseline != "base":
        return load(baseline)
    if not lora_active(model):
        raise EvaluationError(
            "`baseline='base'` is the model with its adapter off, and no adapter is on.",
            next_step="Evaluate before `merge_lora`, or pass the base: `baseline=load(…)`.",
        )
    return model


def _name(baseline: Any, other: Any) -> str | None:
    if other is None:
        return None
    return "base" if baseline == "auto" else str(getattr(baseline, "name", baseline))


def _examples(
    asked: _Asked,
    source: PairSource | None,
    few_shot: int | Auto,
    leaks: Mapping[str, Leak],
    seed: int,
) -> tuple[Pair, ...]:
    if few_shot == 0 or (source is None and few_shot == "auto"):
        return ()
    if source is None:
        raise EvaluationError(
            f"`few_shot={few_shot}` takes training pairs, and there are none.",
            next_step="Pass `pairs`, as `tune` got them.",
        )
    count = {} if few_shot == "auto" else {"count": int(few_shot), "tokens": 10**9}
    return choose_examples(
        source,
        asked.encoder,
        asked.template,
        leave_out=[row for leak in leaks.values() for row in leak.rows],
        seed=seed,
        **count,
    )


def _items(retention: Any, model: Any, other: Any) -> Sequence[RetentionItem]:
    if retention is False or (retention == "auto" and other is not model):
        return ()
    return retention_items() if retention in (True, "auto") else tuple(retention)


# What an evaluation is, and where it ran.


def _identity(model: Any, other: Any, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What must be the same for answers to be the same."""
    names = ("template", "sampler", "max_new_tokens")
    return {
        "model": fingerprint(model),
        "adapter": _adapter_hash(model),
        "baseline": None if other is None or other is model else fingerprint(other),
        "seed": seed,
        **{name: settings[name] for name in names},
    }


def _adapter_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for linear in lora_linears(model):
        a, b, scale = get_factors(linear)
        for part in (linear.path.encode(), a.tobytes(), b.tobytes(), repr(scale).encode()):
            digest.update(part)
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _machine() -> str:
    import jax

    device = jax.devices()[0]
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {device.device_kind}"


@contextlib.contextmanager
def _bar(total: int, verbose: int) -> Iterator[Callable[[int], None]]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="evaluating", unit="answer", disable=not verbose) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
