"""A report as one HTML page in one file: no network, no script but its own.

Prompts and responses are untrusted. The template escapes every text, `texts` writes out hidden
characters, and the page's content security policy lets nothing load, and no script run but the one
whose hash it names.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from gemma_keras_tune.evaluation.plans import KINDS
from gemma_keras_tune.evaluation.reporting import charts, repeating, texts
from gemma_keras_tune.evaluation.results import (
    CaseResult,
    KindVerdict,
    Results,
    SampleResult,
    Tuning,
)
from gemma_keras_tune.evaluation.statistics import wilson_interval

# Of all prompts and responses together; longer ones are cut, the longest first.
MAX_CHARACTERS = 1_800_000
MAX_MARKED = 400  # cases whose differences are marked: marks take room, and time to find
FRAME_HEIGHT = 680
NAMES = {"base": "base", "tuned": "tuned", "few_shot": "base with examples"}


def render(report: Results) -> str:
    """Write a report as an HTML page."""
    style, script = (texts.resource(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    limit = texts.fitting_limit(_lengths(report), MAX_CHARACTERS)
    return texts.template("page.html.jinja").render(
        report=report,
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        summary=_summary(report),
        verdicts=[{"it": v, "picture": _rates(v)} for v in report.verdicts],
        leaks=report.leaks,
        leaked=[texts.visible(found.case.id) for found in report.cases if found.leak],
        tags=report.by_tag(),
        weighted=report.is_weighted,
        most_marked=MAX_MARKED if "base" in report.variants else len(report.cases),
        few_shot_picture=_few_shot(report),
        lost=report.retention.lost if report.retention else (),
        kinds=[kind for kind in KINDS if any(c.case.kind == kind for c in report.cases)],
        cases=[_case(report, place, case, limit) for place, case in enumerate(report.cases)],
        pictures=_tuning_charts(report.tuning) if report.tuning else [],
        settings=[(name, _plain(value)) for name, value in report.settings.items()],
        call=repeating.call(report),
    )


def render_frame(report: Results) -> str:
    """Write a report as an `iframe` element for a notebook's cell.

    The frame keeps the page's styles off the notebook, and the report's content away from it: only
    the page's own script can run.
    """
    return (
        f'<iframe sandbox="allow-scripts" title="Test report" srcdoc="{escape(render(report))}"'
        f' style="width: 100%; height: {FRAME_HEIGHT}px; border: 0; border-radius: 8px"></iframe>'
    )


def _summary(report: Results) -> str:
    fair = report.fair
    passed = sum(case.passed() for case in fair)
    text = f"The tuned model passed {passed} of {len(fair)} cases"
    if "base" in report.variants:
        text += f", its base {sum(case.passed('base') for case in fair)}"
    if leaked := len(report.cases) - len(fair):
        text += f"; {leaked} more {'was' if leaked == 1 else 'were'} trained on, and scored apart"
    conclusion = {
        "pass": "Every kind of case is shown to meet its target.",
        "fail": "At least one kind of case is shown to miss its target.",
        "cannot tell": "No kind is shown to miss its target, and not all are shown to meet it.",
    }[report.verdict]
    return f"{text}. {conclusion}"


# Charts.


def _rates(verdict: KindVerdict) -> Markup:
    rows = [_rate("tuned", verdict.passed, verdict.cases, verdict.confidence)]
    if verdict.base_passed is not None:
        rows.append(_rate("base", verdict.base_passed, verdict.cases, verdict.confidence))
    return charts.rates(rows, target=verdict.target)


def _few_shot(report: Results) -> Markup:
    found = report.few_shot
    if found is None:
        return Markup("")
    confidence = report.verdicts[0].confidence if report.verdicts else 0.95
    passed = {"tuned": found.tuned_passed, "few_shot": found.passed, "base": found.base_passed}
    return charts.rates([_rate(n, count, found.cases, confidence) for n, count in passed.items()])


def _rate(name: str, passed: int, cases: int, confidence: float) -> charts.Rate:
    low, high = wilson_interval(passed, cases, confidence)
    shown = {"few_shot": "examples"}.get(name, name)
    return charts.Rate(shown, name, passed, cases, low, high)


def _tuning_charts(tuning: Tuning) -> list[dict[str, Any]]:
    found = [
        (charts.history(tuning.history, name), f"{name.capitalize()} by epoch")
        for name in ("loss", "accuracy")
        if tuning.history.get(name)
    ]
    if tuning.learning_rates:
        found.append((charts.learning_rate(tuning.learning_rates), "Learning rate by step"))
    if tuning.token_lengths:
        found.append((charts.token_lengths(tuning.token_lengths), "Lengths of the pairs"))
    return [{"svg": svg, "caption": caption} for svg, caption in found]


# Cases.


def _lengths(report: Results) -> list[int]:
    lengths = [len(m.content) for found in report.cases for m in found.case.messages]
    responses = (s for found in report.cases for one in found.variants.values() for s in one)
    return lengths + [len(response.text) for response in responses]


def _case(report: Results, place: int, found: CaseResult, limit: int) -> dict[str, Any]:
    case = found.case
    several = len(case.messages) > 1
    return {
        "id": texts.visible(case.id),
        "kind": case.kind,
        "line": texts.visible(texts.one_line(case.text, 110)),
        "outcome": _outcome(found.passed()),
        "group": "leak" if found.leak else _outcome(found.passed()),
        "tags": [texts.visible(tag) for tag in case.tags],
        "weight": f"{case.weight:g}" if case.weight != 1 else "",
        "change": _change(found),
        "open": len(report.cases) <= 40 and not found.passed(),
        "leak": _leak(found),
        "notes": texts.visible(case.notes),
        "prompt": [(m.role if several else "", _shown(m.content, limit)) for m in case.messages],
        "responses": _responses(found, limit, marked=place < MAX_MARKED),
        "checks": [_check(found, number) for number in range(len(case.checks))],
    }


def _shown(text: str, limit: int) -> str:
    kept, left_out = texts.shorten(text, limit)
    return texts.visible(kept) + (f" … {left_out} more characters" if left_out else "")


def _change(found: CaseResult) -> str:
    if "base" not in found.variants or found.passed("base") == found.passed():
        return "same"
    return "won" if found.passed() else "lost"


def _leak(found: CaseResult) -> str:
    if found.leak is None:
        return ""
    like = "is" if found.leak.exact else f"is {texts.percent(found.leak.similarity)} like"
    return f"Its prompt {like} that of training row {found.leak.rows_text}, so it is scored apart."


def _responses(found: CaseResult, limit: int, *, marked: bool) -> list[dict[str, Any]]:
    runs = _marked_runs(found, limit) if marked else {}
    return [
        {
            "name": NAMES[variant],
            "outcome": _outcome(found.passed(variant)),
            "said": _said(found, variant),
            "samples": [
                _sample(sample, limit, runs.get((variant, number), ()))
                for number, sample in enumerate(found.variants[variant])
            ],
        }
        for variant in NAMES
        if variant in found.variants
    ]


def _marked_runs(found: CaseResult, limit: int) -> dict[tuple[str, int], list[texts.Run]]:
    """Mark the words that are in one model's response alone.

    Drawn responses are compared in their order: those of one number have the same seed.
    """
    marked: dict[tuple[str, int], list[texts.Run]] = {}
    both = zip(found.variants.get("base", ()), found.variants["tuned"], strict=False)
    for number, pair in enumerate(both):
        runs = texts.word_diff(*(texts.visible(sample.text[:limit]) for sample in pair))
        for name, kind in (("base", "gone"), ("tuned", "new")):
            marked[name, number] = [run for run in runs if run.kind in ("same", kind)]
    return marked


def _sample(sample: SampleResult, limit: int, runs: Sequence[texts.Run]) -> dict[str, Any]:
    kept, left_out = texts.shorten(sample.text, limit)
    return {
        "runs": runs or [texts.Run("same", texts.visible(kept))],
        "left_out": left_out,
        "stopped": sample.stopped,
        "empty": not sample.text,
        "outcome": _outcome(sample.passed),
    }


def _said(found: CaseResult, variant: str) -> str:
    samples = found.variants[variant]
    word = "passed" if found.passed(variant) else "failed"
    if len(samples) == 1:
        return word
    return f"{word}, {sum(s.passed for s in samples)} of {len(samples)} answers"


def _check(found: CaseResult, number: int) -> dict[str, Any]:
    told = []
    for variant in NAMES:
        if variant not in found.variants:
            continue
        outcomes = [sample.outcomes[number] for sample in found.variants[variant]]
        passed = sum(outcome.passed for outcome in outcomes)
        reason = next((o.reason for o in outcomes if not o.passed), "")
        mark = "✓" if passed == len(outcomes) else "✗"
        told.append(
            {
                "name": NAMES[variant],
                "outcome": _outcome(passed == len(outcomes)),
                "said": mark if len(outcomes) == 1 else f"{mark} {passed}/{len(outcomes)}",
                "reason": texts.visible(texts.one_line(reason, 160)),
            }
        )
    what = texts.one_line(found.case.checks[number].describe(), 160)
    return {"what": texts.visible(what), "told": told}


def _outcome(passed: bool) -> str:
    return "pass" if passed else "fail"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
