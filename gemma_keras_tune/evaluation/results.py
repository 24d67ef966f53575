"""The results of an evaluation, as plain data."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from gemma_keras_tune.evaluation.checks import Outcome
from gemma_keras_tune.evaluation.plans import Case, Kind
from gemma_keras_tune.evaluation.retention import Retention
from gemma_keras_tune.evaluation.statistics import Conclusion

Variant = Literal["base", "tuned", "few_shot"]
VARIANTS: tuple[Variant, ...] = ("base", "tuned", "few_shot")


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """One response and the outcomes of its checks.

    Attributes:
        text: The response, without its stop token.
        stopped: True if the model ended the response itself.
        tokens: Length of the response, in tokens.
        outcomes: Outcome of each check of the case, in their order.
    """

    text: str
    stopped: bool
    tokens: int
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(outcome.passed for outcome in self.outcomes)


@dataclasses.dataclass(frozen=True)
class Leak:
    """A case whose prompt was trained on, or nearly.

    Attributes:
        rows: Rows of the training pairs with that prompt, the most alike first; at most ten.
        similarity: Similarity of the most alike one, 0 to 1.
        exact: True if they are equal, apart from case, punctuation and white space.
    """

    rows: tuple[int, ...]
    similarity: float
    exact: bool

    @property
    def rows_text(self) -> str:
        """The rows' numbers, separated by commas."""
        return ", ".join(map(str, self.rows))


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One case and the responses to it.

    Attributes:
        case: The case.
        variants: The responses of `"base"`, `"tuned"` and `"few_shot"`, of those that were asked.
        leak: The training pairs with the case's prompt, if there are any. Such cases are scored
            apart.
    """

    case: Case
    variants: Mapping[str, tuple[SampleResult, ...]]
    leak: Leak | None = None

    def failures(self, sample: SampleResult) -> list[tuple[str, str]]:
        """List the checks that a sample failed, in words, each with the reason or `""`."""
        pairs = zip(self.case.checks, sample.outcomes, strict=True)
        return [(check.describe(), o.reason) for check, o in pairs if not o.passed]

    def share(self, variant: str) -> float:
        """Compute the share of a variant's responses that passed."""
        samples = self.variants[variant]
        return sum(sample.passed for sample in samples) / len(samples)

    def passed(self, variant: str = "tuned") -> bool:
        """Test if enough of a variant's responses passed."""
        return self.share(variant) >= self.case.required - 1e-9


@dataclasses.dataclass(frozen=True)
class KindVerdict:
    """Verdict on the cases of one kind. Leaked cases are not among them.

    Attributes:
        kind: The kind of the cases.
        cases: Number of cases.
        passed: Number of cases that the tuned model passed.
        target: The pass rate to reach.
        rate: `passed / cases`.
        low: Lower end of the rate's Wilson interval.
        high: Upper end.
        confidence: Confidence level of the interval and of the verdict.
        verdict: `"pass"`: the true rate is at least the target. `"fail"`: it is below.
            `"cannot tell"`: these cases do not show either at that confidence.
        words: The verdict in words, with the number of cases that could show more.
        weighted_rate: The pass rate with each case counted by its weight.
        base_passed: Number of cases that the base passed, if it was asked.
        p_value: Exact McNemar test of base against tuned, if the base was asked.
        base_words: That comparison in words; empty if the base was not asked.
    """

    kind: Kind
    cases: int
    passed: int
    target: float
    rate: float
    low: float
    high: float
    confidence: float
    verdict: Conclusion
    words: str
    weighted_rate: float
    base_passed: int | None = None
    p_value: float | None = None
    base_words: str = ""

    @property
    def missed(self) -> bool:
        """True if the rate seen is under the target, even if so few cases cannot tell."""
        return self.rate < self.target - 1e-9


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Result of the base with training pairs in its prompt, over all cases that are not leaked.

    Attributes:
        rows: Rows of the training pairs in the prompt.
        cases: Number of cases.
        passed: Number of cases that the base passed with the pairs in its prompt.
        base_passed: Number of cases that it passed without them.
        tuned_passed: Number of cases that the tuned model passed.
        low: Lower end of the few-shot rate's Wilson interval.
        high: Upper end.
        p_value: Exact McNemar test of few-shot against tuned.
        words: The result in words.
    """

    rows: tuple[int, ...]
    cases: int
    passed: int
    base_passed: int
    tuned_passed: int
    low: float
    high: float
    p_value: float
    words: str


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Record of how the model was tuned.

    Attributes:
        plan: The settings of `tune`, as JSON data.
        plan_text: The same as `tune` prints them.
        history: Loss and accuracy of every epoch, under Keras's names.
        timings: Seconds and rates, as in `TuneResult`.
        learning_rates: Learning rate of every step.
        token_lengths: `(tokens, pairs of that length)`, ascending; empty if the pairs are not
            known.
    """

    plan: Mapping[str, Any]
    plan_text: str
    history: Mapping[str, tuple[float, ...]]
    timings: Mapping[str, float]
    learning_rates: tuple[float, ...] = ()
    token_lengths: tuple[tuple[int, int], ...] = ()


class TagCount(NamedTuple):
    """Cases of one tag, and how many of them passed; `None` if the base was not asked."""

    tag: str
    cases: int
    passed: int
    base_passed: int | None


@dataclasses.dataclass(frozen=True)
class Results:
    """Results of an evaluation; `Report` describes the fields."""

    plan_name: str
    cases: tuple[CaseResult, ...]
    verdicts: tuple[KindVerdict, ...]
    retention: Retention | None = None
    few_shot: FewShot | None = None
    leaks: tuple[KindVerdict, ...] = ()
    tuning: Tuning | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> Conclusion:
        """`"fail"` if a kind fails; else `"pass"` if all pass; else `"cannot tell"`."""
        found = {verdict.verdict for verdict in self.verdicts}
        if "fail" in found:
            return "fail"
        return "pass" if found == {"pass"} else "cannot tell"

    @property
    def passed(self) -> bool:
        """True if every kind is shown to meet its target."""
        return self.verdict == "pass"

    @property
    def variants(self) -> tuple[str, ...]:
        """Those of `"base"`, `"tuned"` and `"few_shot"` that were asked."""
        return tuple(name for name in VARIANTS if any(name in c.variants for c in self.cases))

    @property
    def fair(self) -> tuple[CaseResult, ...]:
        """Results of the cases that were not trained on."""
        return tuple(found for found in self.cases if not found.leak)

    @property
    def is_weighted(self) -> bool:
        """True if weights differ, so that the weighted rates differ from the others."""
        return len({found.case.weight for found in self.cases}) > 1

    def by_tag(self) -> list[TagCount]:
        """Count the cases of each tag, in the plan's order, without those trained on."""
        base = "base" in self.variants
        rows = []
        for tag in dict.fromkeys(tag for found in self.fair for tag in found.case.tags):
            own = [found for found in self.fair if tag in found.case.tags]
            before = sum(found.passed("base") for found in own) if base else None
            rows.append(TagCount(tag, len(own), sum(found.passed() for found in own), before))
        return rows

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sentences on all that was not measured for want of an argument."""
        found = []
        if "pairs" in self.settings and self.settings["pairs"] is None:
            found.append(
                "Leakage was not looked for, and the base was not tried with examples: the "
                "training pairs were not passed (`pairs=…`)."
            )
        if "baseline" in self.settings and self.settings["baseline"] is None:
            found.append(
                "What was gained and what was forgotten was not measured: there is no base to "
                "compare with (`baseline=…`)."
            )
        return tuple(found)
