"""A report as JUnit XML, which CI services read."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from gemma_keras_tune.evaluation.reporting import texts
from gemma_keras_tune.evaluation.results import CaseResult, Results


def render(report: Results) -> str:
    """Write a report as JUnit XML: a suite for each kind, a test for each case.

    A case that was trained on is a skipped test, as it is not in the verdicts.
    """
    root = ElementTree.Element("testsuites", name=texts.visible(report.plan_name))
    for kind in dict.fromkeys(found.case.kind for found in report.cases):
        own = [found for found in report.cases if found.case.kind == kind]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"{texts.visible(report.plan_name)}.{kind}",
            tests=str(len(own)),
            failures=str(sum(not found.leak and not found.passed() for found in own)),
            errors="0",
            skipped=str(sum(found.leak is not None for found in own)),
        )
        words = [verdict.words for verdict in report.verdicts if verdict.kind == kind]
        _add_properties(suite, [("verdict", text) for text in words])
        for found in own:
            _add(suite, report.plan_name, found)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_properties(element: ElementTree.Element, about: Sequence[tuple[str, str]]) -> None:
    if about:
        properties = ElementTree.SubElement(element, "properties")
        for name, value in about:
            ElementTree.SubElement(properties, "property", name=name, value=value)


def _add(suite: ElementTree.Element, plan: str, found: CaseResult) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=f"{texts.visible(plan)}.{found.case.kind}",
        name=texts.visible(found.case.id),
    )
    about = {"tags": " ".join(found.case.tags), "notes": found.case.notes}
    if found.case.weight != 1:
        about["weight"] = f"{found.case.weight:g}"
    _add_properties(case, [(name, texts.visible(text)) for name, text in about.items() if text])
    if found.leak is not None:
        message = f"in the training pairs, row {found.leak.rows_text}"
        ElementTree.SubElement(case, "skipped", message=message)
        return
    if found.passed():
        return
    sample = next(s for s in found.variants["tuned"] if not s.passed)
    reasons = [f"{check}: {reason or 'no'}" for check, reason in found.failures(sample)]
    message = texts.visible(texts.one_line("; ".join(reasons), 500))
    failure = ElementTree.SubElement(case, "failure", message=message)
    failure.text = texts.visible(f"{found.case.text}\n\nanswered:\n{sample.text}")
