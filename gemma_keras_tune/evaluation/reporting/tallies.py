"""Counts of a report that its writers show and that are not in its verdicts."""

import dataclasses

from gemma_keras_tune.evaluation.reporting import texts
from gemma_keras_tune.evaluation.results import Results


@dataclasses.dataclass(frozen=True)
class Tagged:
    """The cases of one tag. Those that were trained on are not among them.

    Attributes:
        tag: The tag.
        cases: How many cases have it.
        passed: How many of them the tuned model passed.
        base_passed: How many the base passed, where it was asked.
    """

    tag: str
    cases: int
    passed: int
    base_passed: int | None


def by_tag(report: Results) -> list[Tagged]:
    """The pass rates of each tag.

    Args:
        report: A report.

    Returns:
        The tags in the order in which the plan has them.
    """
    fair = [found for found in report.cases if not found.leak]
    base = "base" in report.variants
    rows = []
    for tag in dict.fromkeys(tag for found in fair for tag in found.case.tags):
        own = [found for found in fair if tag in found.case.tags]
        before = sum(found.passed("base") for found in own) if base else None
        passed = sum(found.passed() for found in own)
        rows.append(Tagged(texts.visible(tag), len(own), passed, before))
    return rows


def is_weighted(report: Results) -> bool:
    """Whether some cases count more than others.

    Args:
        report: A report.

    Returns:
        Whether weights differ, so that the weighted rates say something of their own.
    """
    return len({found.case.weight for found in report.cases}) > 1
