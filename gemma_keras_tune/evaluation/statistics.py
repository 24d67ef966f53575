"""Intervals and tests of pass rates, and their results in words.

The case is the unit: several samples of one case are one case that passes or does not, as they are
not independent.

The verdict is an exact one-sided binomial test (Clopper and Pearson, 1934); the Wilson interval is
shown beside it. Near 0 and 1, where test plans are, a Wilson interval contains the true rate less
often than its level; the exact test is never wrong more often than its level,
for any number of cases and any true rate.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from gemma_keras_tune.errors import EvaluationError

Conclusion = Literal["pass", "fail", "cannot tell"]
MAX_CASES = 100_000


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Result of a test of the true pass rate.

    Attributes:
        verdict: `"pass"` if the rate is shown to be at least the target, `"fail"` if it is shown
            to be below, else `"cannot tell"`.
        low: Lower end of the Wilson interval.
        high: Upper end.
        words: The result in words.
    """

    verdict: Conclusion
    low: float
    high: float
    words: str


def wilson_interval(passed: int, cases: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of a pass rate, without continuity correction.

    `confidence` is that of both sides together. The interval is 0 to 1 if there are no cases.

    Raises:
        EvaluationError: The numbers are impossible.
    """
    _check(passed, cases, confidence)
    if cases == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    found = binomtest(passed, cases).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def exact_bounds(passed: int, cases: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Clopper and Pearson's bounds of a pass rate, each one-sided, at this confidence.

    Raises:
        EvaluationError: The numbers are impossible.
    """
    _check(passed, cases, confidence)
    if cases == 0:
        return 0.0, 1.0
    from scipy.stats import beta

    low = beta.ppf(1 - confidence, passed, cases - passed + 1) if passed else 0.0
    high = beta.ppf(confidence, passed + 1, cases - passed) if passed < cases else 1.0
    return float(low), float(high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Compute McNemar's exact test of two models on the same cases.

    Args:
        first: For each case, true if one model passed it.
        second: The same for the other model.

    Returns:
        The two-sided p-value; 1 if they differ on no case.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if not only_first + only_second:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second).pvalue)


def judge(passed: int, cases: int, target: float, confidence: float = 0.95) -> Judgement:
    """Judge by the number of passed cases if a model meets a pass rate.

    "Pass" is wrong in at most `1 - confidence` of all evaluations of models whose true rate is
    below the target, and "fail" in at most as many of those at or above it. The cases must be drawn
    independently of one another. At a target of 1, one failed case is a proof against it and no
    number of passed ones a proof for it.

    Raises:
        EvaluationError: The numbers are impossible.
    """
    if not 0 < target <= 1:
        raise EvaluationError(f"`target` must be over 0 and up to 1. Received: {target!r}")
    low, high = wilson_interval(passed, cases, confidence)
    verdict = _verdict(passed, cases, target, confidence)
    return Judgement(verdict, low, high, _words(verdict, passed, cases, target, confidence))


def cases_to_show(target: float, confidence: float = 0.95) -> int | None:
    """Compute the number of passed cases that show a rate; `None` if no number can."""
    if target >= 1:
        return None
    # The smallest n with target**n <= 1 - confidence, which rounding may miss by one.
    guess = max(1, math.ceil(math.log(1 - confidence) / math.log(target)) - 1)
    return next(n for n in range(guess, guess + 4) if target**n <= (1 - confidence) * (1 + 1e-12))


def compare(base: Sequence[bool], tuned: Sequence[bool], confidence: float = 0.95) -> str:
    """Compare base and tuned model on the same cases, in one or two sentences."""
    p = mcnemar(base, tuned)
    won = sum(t and not b for b, t in zip(base, tuned, strict=True))
    lost = sum(b and not t for b, t in zip(base, tuned, strict=True))
    facts = (
        f"The base passed {sum(base)} of {len(base)}, the tuned model {sum(tuned)}: {won} won, "
        f"{lost} lost (p = {p:.2g})."
    )
    if p <= 1 - confidence:
        return f"{facts} The tuned model is {'better' if won > lost else 'worse'}."
    if won + lost < _fewest_differences(confidence):
        return f"{facts} So few differences cannot show which is better."
    return f"{facts} Which is better cannot be told."


def _verdict(passed: int, cases: int, target: float, confidence: float) -> Conclusion:
    if cases == 0:
        return "cannot tell"
    from scipy.stats import binom

    wrong = 1 - confidence
    # How likely so many passes are, or so few, for a model that just meets the target.
    if binom.sf(passed - 1, cases, target) <= wrong:
        return "pass"
    return "fail" if binom.cdf(passed, cases, target) <= wrong else "cannot tell"


def _words(verdict: Conclusion, passed: int, cases: int, target: float, confidence: float) -> str:
    level = f"{100 * confidence:g} %"
    if cases == 0:
        return "There are no cases, so nothing is shown."
    low, high = exact_bounds(passed, cases, confidence)
    goal = f"the target of {_percent(target)}"
    if verdict == "pass":
        rate = f"the true rate is above {_down(low)} ({level} sure)"
        return f"{passed} of {cases}: {rate}, {goal} is met."
    if verdict == "fail" and target == 1:
        return f"{passed} of {cases}: not all, so {goal} is missed."
    if verdict == "fail":
        rate = f"the true rate is below {_up(high)} ({level} sure)"
        return f"{passed} of {cases}: {rate}, {goal} is missed."
    if passed == cases:
        start = f"{passed} of {cases}: the true rate is above {_down(low)} ({level} sure)"
        needed = cases_to_show(target, confidence)
        if needed is None:
            return f"{start}; no number of cases can show that it is 100 %."
        return f"{start}; to show {_percent(target)} takes {needed} cases without a miss."
    seen = f", under {goal} so far" if passed / cases < target - 1e-9 else ""
    start = (
        f"{passed} of {cases}{seen}: the true rate may be anything from {_down(low)} to "
        f"{_up(high)} ({level} sure of each end)"
    )
    needed = cases_at_rate(passed / cases, target, confidence)
    if needed is None:
        return f"{start}, on either side of {goal}."
    needs = f"at the rate seen it takes about {needed} cases to decide about {_percent(target)}"
    return f"{start}; {needs}."


def cases_at_rate(rate: float, target: float, confidence: float = 0.95) -> int | None:
    """Estimate the number of cases that decide about a target, if the pass rate stays the same.

    It is `None` if it is over 100,000, as for two equal rates.
    """
    low, high = 1, 1
    while _verdict(round(rate * high), high, target, confidence) == "cannot tell":
        low, high = high, high * 2
        if high > MAX_CASES:
            return None
    while low < high:  # the verdict flickers with rounding, so this is near the first, not it
        middle = (low + high) // 2
        if _verdict(round(rate * middle), middle, target, confidence) == "cannot tell":
            low = middle + 1
        else:
            high = middle
    return low


def _fewest_differences(confidence: float) -> int:
    """Compute the fewest differences, all one way, that McNemar's test can show anything with."""
    return math.ceil(1 - math.log2(1 - confidence))


def _check(passed: int, cases: int, confidence: float) -> None:
    if not 0 <= passed <= cases:
        raise EvaluationError(f"{passed} of {cases} cases cannot have passed.")
    if not 0 < confidence < 1:
        raise EvaluationError(f"`confidence` must be between 0 and 1. Received: {confidence!r}")


def _percent(rate: float) -> str:
    return f"{100 * rate:g} %"


# Rounded outwards, so that what is said stays true; to a tenth where a whole percent says little.


def _down(rate: float) -> str:
    digits = 0 if rate < 0.99 else 1
    return f"{math.floor(100 * rate * 10**digits) / 10**digits:.{digits}f} %"


def _up(rate: float) -> str:
    digits = 0 if rate > 0.01 else 1
    return f"{math.ceil(100 * rate * 10**digits) / 10**digits:.{digits}f} %"
