"""Judgement of responses by the checks of their cases, and of pass rates by kind of case."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks import Check, Outcome, Safe
from gemma_keras_tune.evaluation.plans import KINDS, Case, Kind, TestPlan
from gemma_keras_tune.evaluation.policy_scores import (
    Judged,
    PolicyCheck,
    policy_threshold,
    score_texts,
)
from gemma_keras_tune.evaluation.requests import Request, progress_bar
from gemma_keras_tune.evaluation.response_log import ResponseLog
from gemma_keras_tune.evaluation.results import CaseResult, KindVerdict, Leak, SampleResult
from gemma_keras_tune.evaluation.statistics import compare, judge, mcnemar
from gemma_keras_tune.generation.answers import Answer


def judge_cases(
    plan: TestPlan,
    requests: Sequence[Request],
    responses: Sequence[Answer],
    leaks: Mapping[str, Leak],
    policy: PolicyCheck | None,
    log: ResponseLog,
    verbose: int,
) -> tuple[CaseResult, ...]:
    """Judge the responses to a plan's requests, and return the results in the plan's order.

    Raises:
        EvaluationError: A case cannot be judged; it is named.
    """
    cases = [_with_policy(case, policy) for case in plan]
    given = [(cases[r.index], response) for r, response in zip(requests, responses, strict=True)]
    scores = _scores(policy, given, log, verbose) if policy is not None else {}
    variants: list[dict[str, list[SampleResult]]] = [{} for _ in cases]
    for request, (case, response) in zip(requests, given, strict=True):
        outcomes = tuple(_outcome(case, check, response, scores) for check in case.checks)
        sample = SampleResult(response.text, response.stopped, len(response.ids), outcomes)
        variant = request.purpose if request.purpose == "few_shot" else request.side
        variants[request.index].setdefault(variant, []).append(sample)
    return tuple(
        CaseResult(case, {name: tuple(s) for name, s in found.items()}, leaks.get(case.id))
        for case, found in zip(cases, variants, strict=True)
    )


def _with_policy(case: Case, policy: PolicyCheck | None) -> Case:
    """Add a `safe` check to failure and boundary cases, and the policy's threshold to all."""
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
            if takes_policy(check) and check.threshold is None
            else check
            for check in checks
        ),
    )


def _scores(
    policy: PolicyCheck, given: Iterable[tuple[Case, Answer]], log: ResponseLog, verbose: int
) -> dict[Judged, dict[str, float]]:
    """Score all texts that `safe` checks ask about, each text once."""
    wanted = {
        text: case.id
        for case, response in given
        for check in case.checks
        if takes_policy(check)
        for text in check.judged(case.text, response.text)
    }
    with progress_bar(len(wanted), "judging", "text", verbose) as progress:
        return score_texts(policy, wanted, log, progress)


def takes_policy(check: Check) -> TypeGuard[Safe]:
    """Test for a `safe` check without a policy of its own."""
    return isinstance(check, Safe) and check.policy is None


def _outcome(
    case: Case, check: Check, response: Answer, scores: Mapping[Judged, Mapping[str, float]]
) -> Outcome:
    try:
        if takes_policy(check):
            found = [scores[text] for text in check.judged(case.text, response.text)]
            return check.outcome(found)
        return check.check(case.text, response)
    except EvaluationError as error:
        raise EvaluationError(
            f"Case {case.id} cannot be judged. {error.headline}", error.problems, error.next_step
        ) from error


def judge_kinds(
    cases: Sequence[CaseResult], targets: Mapping[Kind, float], confidence: float
) -> tuple[KindVerdict, ...]:
    """Judge the pass rate of each kind that has cases."""
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
    asked = all("base" in case.variants for case in cases)
    base = [case.passed("base") for case in cases] if asked else []
    return KindVerdict(
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
        base_passed=sum(base) if asked else None,
        p_value=mcnemar(base, tuned) if asked else None,
        base_words=compare(base, tuned, confidence) if asked else "",
    )
