"""The report of an evaluation: its results, with their files and their summary."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gemma_keras_tune._support.files import write_text
from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks import Check, Function, check_from_config
from gemma_keras_tune.evaluation.results import CaseResult, KindVerdict, Results

SCHEMA = "gemma_keras_tune.report/1"
SUFFIXES = (".html", ".json", ".md", ".xml")


@dataclasses.dataclass(frozen=True)
class Report(Results):
    """Results of an evaluation, with their files and their summary.

    Attributes:
        plan_name: Name of the test plan.
        cases: Every case and its responses, in the plan's order.
        verdicts: One for each kind of case in the plan, leaked cases left out.
        retention: Measure of forgetting, if there is one.
        few_shot: Comparison with examples in the base's prompt, if there is one.
        leaks: Verdicts on the leaked cases alone.
        tuning: Record of how the model was tuned, if that is known.
        settings: Arguments of `evaluate`, the model and the machine, as JSON data:

            - `baseline`: `"base"` if the adapter was switched off, a model's name or path, or null;
            - `few_shot`: the number given, or `"auto"`;
            - `retention`: true, false or `"auto"`, or the number of the user's own items;
            - `target`: the pass rate that each kind has to reach;
            - `confidence`, `max_new_tokens`, `batch_size`: as given;
            - `template`: the template's name, `"custom"` for the user's own;
            - `sampler`: its name, or `class_name` and `config`;
            - `policy`: the name of its class or function, or null;
            - `pairs`: the number of training pairs, or null if none were passed;
            - `fingerprint` and `adapter`: hashes of the model and of the adapter that was on;
            - `machine`: the machine it ran on.
        versions: Versions of the packages in use.
        seed: The seed.
        seconds: Time that it took.
    """

    def raise_if_failed(self, *, strict: bool = False) -> None:
        """Stop a script or a CI job whose model is not good enough.

        A kind is not good enough if it is shown to fail, or if the pass rate seen is under its
        target, though there may be too few cases to tell if the true rate is.

        Args:
            strict: True to count "cannot tell" as a failure even if the rate seen meets the target.
                A small plan cannot show a high rate, however well the model does.

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
            for found in self.fair:
                if found.case.kind == verdict.kind and not found.passed():
                    problems.append(f"{verdict.kind} case {found.case.id}: {_first_reason(found)}")
        raise EvaluationError(
            f"{self.plan_name}: {_headline(bad)}.",
            problems or ["every case has been trained on, so there is nothing to judge by"],
            "The answers are in the report: `report.save('report.html')`.",
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> pathlib.Path:
        """Write the report to a file.

        Args:
            path: A file that ends in `.html` (a page in one file), `.json`, `.md` (Markdown) or
                `.xml` (JUnit).
            overwrite: True to replace an existing file.

        Returns:
            The path.

        Raises:
            EvaluationError: The file has another suffix, or exists and `overwrite` is false.
        """
        path = check_report_path(path)
        if path.exists() and not overwrite:
            raise EvaluationError(f"{path} already exists.")
        text = self.to_json() if path.suffix == ".json" else _render(self, path.suffix)
        return write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Report":
        """Read a report that was saved as JSON.

        Args:
            path: The file.

        Returns:
            The report. Of checks that are Python functions there is the name alone.

        Raises:
            EvaluationError: The file is no report.
        """
        try:
            return cls.from_dict(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
        except EvaluationError:
            raise
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path} is no report: {error}") from error

    def to_json(self) -> str:
        """Convert the report to JSON text."""
        data = _finite(self.to_dict())
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to JSON data; `docs/reports.md` describes it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own = {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "retention": self.retention.to_dict() if self.retention else None,
            "cases": [_case_to_dict(case) for case in self.cases],
        }
        return own | {k: msgspec.to_builtins(v) for k, v in fields.items() if k not in own}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """Read the data that `to_dict` gives.

        Raises:
            EvaluationError: The data are no report, or one of another version.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise EvaluationError(
                f"Expected a report of the schema {SCHEMA!r}. Received: "
                f"{data.get('schema') if isinstance(data, Mapping) else data!r:.80}"
            )
        try:
            return msgspec.convert(_without_derived(data), cls, dec_hook=_read_check)
        except (LookupError, TypeError, AttributeError, msgspec.ValidationError) as error:
            raise EvaluationError(f"This is no report: {error}") from error

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
        failing = [case for case in self.fair if not case.passed()]
        lines += [f"  ✗ {c.case.kind} {c.case.id}: {_first_reason(c)}" for c in failing[:20]]
        if len(failing) > 20:
            lines.append(f"  … and {len(failing) - 20} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from gemma_keras_tune.evaluation.reporting import page

        return page.render_frame(self)


def check_report_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Check a report's suffix, before there is a report; another one is an `EvaluationError`."""
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise EvaluationError(
            f"A report's file ends in {', '.join(SUFFIXES)}. Received: {path.name!r}"
        )
    return path


def _render(report: Report, suffix: str) -> str:
    from gemma_keras_tune.evaluation.reporting import junit, markdown, page

    writers = {".html": page, ".md": markdown, ".xml": junit}
    return writers[suffix].render(report)


def _headline(bad: Sequence[KindVerdict]) -> str:
    """Summarize the failing verdicts in a few words."""
    if any(verdict.verdict == "fail" for verdict in bad):
        return "fail"
    if any(verdict.missed for verdict in bad):
        return "the pass rate is under its target, though so few cases cannot tell"
    return "cannot tell"


def _first_reason(found: CaseResult) -> str:
    """Explain why a case did not pass, by its first failing response."""
    sample = next(sample for sample in found.variants["tuned"] if not sample.passed)
    check, reason = found.failures(sample)[0]
    return reason or f"not so: {check}"


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have, such as the loss of a lost run, with null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _case_to_dict(found: CaseResult) -> dict[str, Any]:
    variants = {
        variant: {
            "passed": found.passed(variant),
            "samples": [{**msgspec.to_builtins(s), "passed": s.passed} for s in samples],
        }
        for variant, samples in found.variants.items()
    }
    return {
        **found.case.to_config(),
        "row": found.case.row,
        "describe": [check.describe() for check in found.case.checks],
        "leak": msgspec.to_builtins(found.leak),
        "variants": variants,
    }


def _without_derived(data: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a report's JSON data to the form of its fields."""
    cases = [
        {
            "case": case,
            "leak": case["leak"],
            "variants": {name: found["samples"] for name, found in case["variants"].items()},
        }
        for case in data["cases"]
    ]
    retention, tuning = data["retention"], data["tuning"]
    if retention:
        retention = {**retention, "scores": retention["items"]}
    if tuning:
        history = {
            name: [math.nan if value is None else value for value in values]
            for name, values in tuning["history"].items()
        }
        tuning = {**tuning, "history": history}
    return {**data, "cases": cases, "retention": retention, "tuning": tuning}


def _read_check(kind: type, value: Any) -> Check:
    if isinstance(value, Mapping) and set(value) == {Function.name}:
        return Function(None, str(value[Function.name]))
    return check_from_config(value)
