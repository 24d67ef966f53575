"""What an evaluation found: answers, verdicts and the report, as plain data."""

import dataclasses
import html
import importlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gemma_keras_tune._support.files import write_text
from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks import Function, Outcome, check_from_config
from gemma_keras_tune.evaluation.plans import Case, Kind
from gemma_keras_tune.evaluation.retention import Retention
from gemma_keras_tune.evaluation.statistics import Verdict
from gemma_keras_tune.pairs.reader import Message

Variant = Literal["base", "tuned", "few_shot"]
VARIANTS: tuple[Variant, ...] = ("base", "tuned", "few_shot")
SCHEMA = "gemma_keras_tune.report/1"


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """One answer and what the checks say of it.

    Attributes:
        text: What the model wrote, without its stop token.
        stopped: Whether it ended the answer itself.
        tokens: Length of the answer, in tokens.
        outcomes: What each check of the case says, in their order.
    """

    text: str
    stopped: bool
    tokens: int
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(outcome.passed for outcome in self.outcomes)


@dataclasses.dataclass(frozen=True)
class Leak:
    """A case whose prompt was trained on, or nearly.

    Attributes:
        rows: Rows of the training pairs with that prompt, the most alike first; at most ten.
        similarity: How alike the most alike one is, 0 to 1.
        exact: Whether they are equal, apart from case, punctuation and white space.
    """

    rows: tuple[int, ...]
    similarity: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One case and the answers to it.

    Attributes:
        case: The case.
        variants: The answers of `"base"`, `"tuned"` and `"few_shot"`, as far as they were asked.
        leak: Where the training pairs have the case's prompt. Such cases are scored apart.
    """

    case: Case
    variants: Mapping[str, tuple[SampleResult, ...]]
    leak: Leak | None = None

    def share(self, variant: str) -> float:
        """The share of a variant's answers that passed."""
        samples = self.variants[variant]
        return sum(sample.passed for sample in samples) / len(samples)

    def passed(self, variant: str = "tuned") -> bool:
        """Whether enough of a variant's answers passed."""
        return self.share(variant) >= self.case.required - 1e-9


@dataclasses.dataclass(frozen=True)
class KindVerdict:
    """What the cases of one kind show. Leaked cases are not among them.

    Attributes:
        kind: The kind of the cases.
        cases: How many there are.
        passed: How many of them the tuned model passed.
        target: The pass rate it has to have.
        rate: `passed / cases`.
        low: Lower end of the rate's Wilson interval.
        high: Upper end.
        confidence: Confidence level of the interval and of the verdict.
        verdict: `"pass"`: the true rate is at least the target. `"fail"`: it is below.
            `"cannot tell"`: these cases do not show either at that confidence.
        words: The verdict in words, and what so many cases can show.
        weighted_rate: The pass rate with each case counted by its weight.
        base_passed: How many the base passed, where it was asked.
        p_value: Exact McNemar test of base against tuned, where the base was asked.
        base_words: That comparison in words; empty where the base was not asked.
    """

    kind: Kind
    cases: int
    passed: int
    target: float
    rate: float
    low: float
    high: float
    confidence: float
    verdict: Verdict
    words: str
    weighted_rate: float
    base_passed: int | None = None
    p_value: float | None = None
    base_words: str = ""

    @property
    def missed(self) -> bool:
        """Whether the rate seen is under the target, even where so few cases cannot tell."""
        return self.rate < self.target - 1e-9


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Is tuning needed? The base with training pairs in its prompt, over all cases not leaked.

    Attributes:
        rows: Rows of the training pairs that were in the prompt.
        cases: How many cases there are.
        passed: How many the base passed with the pairs in its prompt.
        base_passed: How many it passed without.
        tuned_passed: How many the tuned model passed.
        low: Lower end of the few-shot rate's Wilson interval.
        high: Upper end.
        p_value: Exact McNemar test of few-shot against tuned.
        words: All this in words.
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
    """How the model was tuned.

    Attributes:
        plan: The settings of `tune`, as JSON data.
        plan_text: The same as `tune` prints them.
        history: Loss and accuracy of every epoch, under Keras's names.
        timings: Seconds and rates, as in `TuneResult`.
        learning_rates: Learning rate of every step.
        token_lengths: `(tokens, pairs of that length)`, ascending; empty where the pairs are not
            known.
    """

    plan: Mapping[str, Any]
    plan_text: str
    history: Mapping[str, tuple[float, ...]]
    timings: Mapping[str, float]
    learning_rates: tuple[float, ...] = ()
    token_lengths: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        plan_name: Name of the test plan.
        cases: Every case and its answers, in the plan's order.
        verdicts: One for each kind that the plan has cases of, leaked ones left out.
        retention: What was forgotten, where it was measured.
        few_shot: Whether tuning was needed, where it was tried.
        leaks: What the verdicts would be on the leaked cases alone.
        tuning: How the model was tuned, where that is known.
        settings: Arguments of `evaluate` and what they were used on, as JSON data:

            - `baseline`: `"base"` where the adapter was switched off, a model's name or path, or
              null;
            - `few_shot`: the number given, or `"auto"`;
            - `retention`: true, false or `"auto"`, or how many items of one's own there were;
            - `target`: the pass rate that each kind has to have;
            - `confidence`, `max_new_tokens`, `batch_size`: as given;
            - `template`: the template's name, `"custom"` for one of one's own;
            - `sampler`: its name, or `class_name` and `config`;
            - `policy`: the name of its class or function, or null;
            - `pairs`: how many training pairs there were, or null where none were passed;
            - `fingerprint` and `adapter`: hashes of the model and of the adapter that was on;
            - `machine`: where it ran.
        versions: Versions of the packages in use.
        seed: The seed.
        seconds: How long it took.
    """

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
    def verdict(self) -> Verdict:
        """`"fail"` where a kind fails; else `"pass"` where all pass; else `"cannot tell"`."""
        found = {verdict.verdict for verdict in self.verdicts}
        if "fail" in found:
            return "fail"
        return "pass" if found == {"pass"} else "cannot tell"

    @property
    def passed(self) -> bool:
        """Whether every kind is shown to meet its target."""
        return self.verdict == "pass"

    @property
    def variants(self) -> tuple[str, ...]:
        """What was asked: of `"base"`, `"tuned"` and `"few_shot"`."""
        return tuple(name for name in VARIANTS if any(name in c.variants for c in self.cases))

    @property
    def left_out(self) -> tuple[str, ...]:
        """What was not looked at for want of an argument, in sentences."""
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

    def raise_if_failed(self, *, strict: bool = False) -> None:
        """Stop a script or a CI job whose model is not good enough.

        A kind is not good enough where it is shown to fail, and where the pass rate seen is under
        its target, though there may be too few cases to tell whether the true rate is.

        Args:
            strict: Whether "cannot tell" counts as a failure even where the rate seen meets the
                target. A small plan cannot show a high rate, however well the model does.

        Raises:
            EvaluationError: Each such kind is named with its verdict and failing cases.
        """
        bad = [
            v
            for v in self.verdicts
            if v.verdict == "fail" or v.missed or (strict and v.verdict != "pass")
        ]
        if not bad and not (strict and not self.verdicts):
            return
        problems = [f"{v.kind}: {v.words}" for v in bad]
        for verdict in bad:
            for found in self.cases:
                if found.case.kind == verdict.kind and not found.leak and not found.passed():
                    problems.append(f"{verdict.kind} case {found.case.id}: {_first_reason(found)}")
        raise EvaluationError(
            f"{self.plan_name}: {_headline(bad)}.",
            problems or ["every case has been trained on, so there is nothing to judge by"],
            "The answers are in the report: `report.save('report.html')`.",
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> pathlib.Path:
        """Write the report.

        Args:
            path: A file that ends in `.html` (a page that stands alone), `.json`, `.md` (Markdown)
                or `.xml` (JUnit).
            overwrite: Whether it may replace an existing file.

        Returns:
            The path.

        Raises:
            EvaluationError: The name ends otherwise, or the file exists and `overwrite` is false.
        """
        path = check_report_path(path)
        if path.exists() and not overwrite:
            raise EvaluationError(f"{path} already exists.")
        text = self.to_json() if path.suffix == ".json" else _render(self, _WRITERS[path.suffix])
        return write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """Read a report that was saved as JSON.

        Args:
            path: The file.

        Returns:
            The report. Checks that are Python functions are there by name alone.

        Raises:
            EvaluationError: It is no such file.
        """
        try:
            return cls.from_dict(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise EvaluationError(f"{path} is no report: {error}") from error

    def to_json(self) -> str:
        """The report as JSON text."""
        data = _finite(self.to_dict())
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data; `docs/reports.md` describes it."""
        return {
            "schema": SCHEMA,
            "plan_name": self.plan_name,
            "verdict": self.verdict,
            "verdicts": [dataclasses.asdict(verdict) for verdict in self.verdicts],
            "few_shot": dataclasses.asdict(self.few_shot) if self.few_shot else None,
            "retention": self.retention.to_dict() if self.retention else None,
            "leaks": [dataclasses.asdict(verdict) for verdict in self.leaks],
            "cases": [_case_to_dict(case) for case in self.cases],
            "tuning": dataclasses.asdict(self.tuning) if self.tuning else None,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "seed": self.seed,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The inverse of `to_dict`.

        Args:
            data: What `to_dict` gave.

        Returns:
            The report.

        Raises:
            EvaluationError: The data are no report, or one of another version.
        """
        if data.get("schema") != SCHEMA:
            raise EvaluationError(
                f"Expected a report of the schema {SCHEMA!r}. Received: {data.get('schema')!r}"
            )
        few_shot, tuning, retention = data["few_shot"], data["tuning"], data["retention"]
        return cls(
            plan_name=data["plan_name"],
            cases=tuple(_case_from_dict(case) for case in data["cases"]),
            verdicts=tuple(KindVerdict(**verdict) for verdict in data["verdicts"]),
            retention=Retention.from_dict(retention) if retention else None,
            few_shot=FewShot(**{**few_shot, "rows": tuple(few_shot["rows"])}) if few_shot else None,
            leaks=tuple(KindVerdict(**verdict) for verdict in data["leaks"]),
            tuning=_tuning_from_dict(tuning) if tuning else None,
            settings=data["settings"],
            versions=data["versions"],
            seed=data["seed"],
            seconds=data["seconds"],
        )

    def __str__(self) -> str:
        leaked = [case.case.id for case in self.cases if case.leak]
        lines = [f"{self.plan_name}: {self.verdict}"]
        for verdict in self.verdicts:
            lines.append(f"  {verdict.kind:8} {verdict.verdict:11} {verdict.words}")
            if verdict.base_words:
                lines.append(f"{'':23}{verdict.base_words}")
        if self.few_shot:
            lines.append(f"  Is tuning needed? {self.few_shot.words}")
        if self.retention:
            lines.append(f"  What was forgotten? {self.retention.words}")
        if leaked:
            lines.append(
                f"  Leakage: {len(leaked)} of {len(self.cases)} cases are in the training pairs "
                f"and scored apart: {', '.join(leaked[:10])}{' …' * (len(leaked) > 10)}"
            )
        lines += [f"  {sentence}" for sentence in self.left_out]
        failing = [case for case in self.cases if not case.leak and not case.passed()]
        lines += [f"  ✗ {c.case.kind} {c.case.id}: {_first_reason(c)}" for c in failing[:20]]
        if len(failing) > 20:
            lines.append(f"  … and {len(failing) - 20} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        try:
            return _render(self, "notebook")
        except ImportError:
            return f"<pre>{html.escape(str(self))}</pre>"


# Modules of `reporting`, each with `render(report: Report) -> str`.
_WRITERS = {".html": "html", ".json": "json", ".md": "markdown", ".xml": "junit"}


def check_report_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Whether a report can be written under a name, before there is one.

    Args:
        path: The file.

    Returns:
        The path.

    Raises:
        EvaluationError: The name ends in none of the forms that a report can have.
    """
    path = pathlib.Path(path)
    if path.suffix not in _WRITERS:
        raise EvaluationError(
            f"A report's file ends in {', '.join(_WRITERS)}. Received: {path.name!r}"
        )
    return path


def _render(report: Report, writer: str) -> str:
    module = importlib.import_module(f"{__package__}.reporting.{writer}")
    return str(module.render(report))


def _headline(bad: Sequence[KindVerdict]) -> str:
    """What is wrong, in a few words."""
    if any(verdict.verdict == "fail" for verdict in bad):
        return "fail"
    if any(verdict.missed for verdict in bad):
        return "the pass rate is under its target, though so few cases cannot tell"
    return "cannot tell"


def _first_reason(found: CaseResult) -> str:
    """Why a case did not pass, by its first failing answer."""
    for sample in found.variants["tuned"]:
        for check, outcome in zip(found.case.checks, sample.outcomes, strict=True):
            if not outcome.passed:
                return outcome.reason or f"not so: {check.describe()}"
    return ""


def _finite(value: Any) -> Any:
    """JSON data with null for numbers that JSON does not have, such as the loss of a lost run."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _case_to_dict(found: CaseResult) -> dict[str, Any]:
    return {
        **found.case.to_config(),
        "row": found.case.row,
        "describe": [check.describe() for check in found.case.checks],
        "leak": dataclasses.asdict(found.leak) if found.leak else None,
        "variants": {
            variant: {
                "passed": found.passed(variant),
                "samples": [
                    {**dataclasses.asdict(sample), "passed": sample.passed} for sample in samples
                ],
            }
            for variant, samples in found.variants.items()
        },
    }


def _case_from_dict(data: Mapping[str, Any]) -> CaseResult:
    fields = {f.name: data[f.name] for f in dataclasses.fields(Case) if f.name in data}
    if not isinstance(fields["prompt"], str):
        fields["prompt"] = tuple(Message(**message) for message in fields["prompt"])
    fields["checks"] = tuple(
        Function(None, check["function"]) if "function" in check else check_from_config(check)
        for check in data["checks"]
    )
    leak = data["leak"]
    variants = {
        variant: tuple(
            SampleResult(
                sample["text"],
                sample["stopped"],
                sample["tokens"],
                tuple(Outcome(**outcome) for outcome in sample["outcomes"]),
            )
            for sample in found["samples"]
        )
        for variant, found in data["variants"].items()
    }
    return CaseResult(
        Case(**fields),
        variants,
        Leak(**{**leak, "rows": tuple(leak["rows"])}) if leak else None,
    )


def _tuning_from_dict(data: Mapping[str, Any]) -> Tuning:
    return Tuning(
        plan=data["plan"],
        plan_text=data["plan_text"],
        history={
            name: tuple(math.nan if value is None else value for value in values)
            for name, values in data["history"].items()
        },
        timings=data["timings"],
        learning_rates=tuple(data["learning_rates"]),
        token_lengths=tuple((length, count) for length, count in data["token_lengths"]),
    )
