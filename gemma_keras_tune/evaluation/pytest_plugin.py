"""The cases of a test plan as pytest tests, collected by `gemma_keras_tune_pytest`.

The plan's cases that pytest has selected run together, in batches, when the first of them runs.
`evaluate` gives verdicts over all cases, with their intervals; here a case passes or fails on its
own, and one that was trained on is skipped.

Under pytest-xdist a worker does not know its cases in advance, unless it gets whole files. There
each case runs by itself, so that none runs twice.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from gemma_keras_tune.adapters.reading import load_adapter
from gemma_keras_tune.errors import EvaluationError, GemmaTuneError
from gemma_keras_tune.evaluation.plan_files import SUFFIXES
from gemma_keras_tune.evaluation.plans import Case, TestPlan
from gemma_keras_tune.evaluation.results import CaseResult
from gemma_keras_tune.evaluation.running import evaluate
from gemma_keras_tune.evaluation.safety import ShieldGemma
from gemma_keras_tune.loading.loader import load

_MODELS = pytest.StashKey[tuple[Any, Any]]()
_FAILURE = pytest.StashKey[GemmaTuneError]()
# Modes of xdist in which all cases of a plan run in one process; `None` is without xdist.
_WHOLE_FILES = (None, "no", "each", "loadfile", "loadscope")


def collect(path: pathlib.Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Make the collector of a plan; `None` if the suffix is none of a plan."""
    if path.suffix not in SUFFIXES:
        return None
    return PlanFile.from_parent(parent, path=path)


class PlanFile(pytest.File):
    """A test plan."""

    results: dict[str, CaseResult] | None = None
    failure: GemmaTuneError | None = None

    def collect(self) -> Iterator[pytest.Item]:
        """Make a test for each case."""
        try:
            plan = TestPlan.from_file(self.path)
        except EvaluationError as error:
            raise self.CollectError(str(error)) from None
        self.results = {}
        for case in plan:
            yield CaseItem.from_parent(self, name=case.id, case=case)

    def result(self, case: Case) -> CaseResult:
        """Return the result of a case; the first call runs all cases that will be needed."""
        assert self.results is not None
        if self.failure is not None:
            raise PlanFailed(f"{self.failure.headline} (as for the case before)")
        if case.id not in self.results:
            try:
                self.results |= _results(self.config, TestPlan(self._cases(case), self.path.stem))
            except GemmaTuneError as error:
                self.failure = error
                raise PlanFailed(str(error)) from None
        return self.results[case.id]

    def _cases(self, case: Case) -> list[Case]:
        worker = getattr(self.config, "workerinput", {})
        if worker.get("gemma_dist") not in _WHOLE_FILES:
            return [case]
        items = [item for item in self.session.items if item.parent is self]
        return [item.case for item in items if isinstance(item, CaseItem)]


class PlanFailed(Exception):
    """The plan cannot run at all."""


class CaseFailed(Exception):
    """Too few of the model's responses pass."""


class CaseItem(pytest.Item):
    """A case."""

    def __init__(self, *, case: Case, **about: Any) -> None:
        super().__init__(**about)
        self.case = case
        for name, value in (("kind", case.kind), ("tags", " ".join(case.tags))):
            self.user_properties.append((name, value))

    def setup(self) -> None:
        """Run the model. A problem here is an error of the test and not a failing case."""
        assert isinstance(self.parent, PlanFile)
        self.parent.result(self.case)

    def runtest(self) -> None:
        """Fail if too few of the model's responses pass."""
        assert isinstance(self.parent, PlanFile)
        result = self.parent.result(self.case)
        if result.leak:
            pytest.skip(f"in the training pairs, row {result.leak.rows_text}")
        if not result.passed("tuned"):
            raise CaseFailed(_words(result))

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """Write the responses and their failing checks, without a traceback."""
        if isinstance(excinfo.value, (CaseFailed, PlanFailed)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[pathlib.Path, int | None, str]:
        """Return the case's file and name."""
        return self.path, None, f"{self.case.kind} case {self.case.id}"


def _results(config: pytest.Config, plan: TestPlan) -> dict[str, CaseResult]:
    model, policy = _models(config)
    report = evaluate(
        model, plan, baseline=None, few_shot=0, retention=False, policy=policy,
        pairs=config.getoption("gemma_pairs"),
        max_new_tokens=config.getoption("gemma_max_new_tokens"), verbose=0,
    )  # fmt: skip
    return {found.case.id: found for found in report.cases}


def _models(config: pytest.Config) -> tuple[Any, Any]:
    """Open the model and the policy once for all plans."""
    if _FAILURE in config.stash:
        raise config.stash[_FAILURE]
    if _MODELS not in config.stash:
        try:
            config.stash[_MODELS] = _open_models(config)
        except GemmaTuneError as error:
            config.stash[_FAILURE] = error
            raise
    return config.stash[_MODELS]


def _open_models(config: pytest.Config) -> tuple[Any, Any]:
    model = load(config.getoption("gemma_model"))
    if adapter := config.getoption("gemma_adapter"):
        load_adapter(model, adapter)
    policy = config.getoption("gemma_policy")
    return model, ShieldGemma(policy) if policy else None


def _words(result: CaseResult) -> str:
    case = result.case
    samples = result.variants["tuned"]
    passed = sum(sample.passed for sample in samples)
    lines = [f"{case.kind} case {case.id}: {case.text}"]
    if len(samples) > 1:
        lines.append(f"{passed} of {len(samples)} answers pass, and {case.required:.0%} must.")
    for sample in samples:
        if not sample.passed:
            lines.append(f"answer: {sample.text}")
            lines += [f"  {check}: {reason or 'no'}" for check, reason in result.failures(sample)]
    return "\n".join(lines)
