"""A report as Markdown, as for a pull request or a model card."""

import re

from gemma_keras_tune.evaluation.reporting import repeating, texts
from gemma_keras_tune.evaluation.results import CaseResult, Results

MAX_FAILING = 50
MAX_LENGTH = 600


def render(report: Results) -> str:
    """Write a report as Markdown, with prompts and responses as code, which is no markup."""
    parts = [f"# {_inline(report.plan_name)}: {report.verdict}", _verdicts(report)]
    parts += [_inline(sentence) for sentence in report.left_out]
    parts.append(_tags(report))
    if report.few_shot:
        parts.append(f"**Is tuning needed?** {report.few_shot.words}")
    if report.retention:
        parts.append(f"**What was forgotten?** {report.retention.words}")
    leaked = [found for found in report.cases if found.leak]
    if leaked:
        listed = ", ".join(_code(found.case.id) for found in leaked[:MAX_FAILING])
        parts.append(f"**Trained on, and scored apart:** {listed}")
    parts += _failing(report)
    if report.tuning:
        parts.append("## How it was tuned\n\n" + _block(report.tuning.plan_text))
    parts.append("## How to repeat it\n\n" + _block(repeating.call(report)))
    parts.append(_settings(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdicts(report: Results) -> str:
    lines = ["| kind | verdict | passed | base | what it shows |", "|---|---|---|---|---|"]
    weighted = report.is_weighted
    for v in report.verdicts:
        base = "–" if v.base_passed is None else f"{v.base_passed} of {v.cases}"
        words = f"{v.words} {v.base_words}".strip()
        if weighted:
            words += f" Counted by weight, {texts.percent(v.weighted_rate)} passed."
        lines.append(f"| {v.kind} | **{v.verdict}** | {v.passed} of {v.cases} | {base} | {words} |")
    return "\n".join(lines)


def _tags(report: Results) -> str:
    rows = report.by_tag()
    lines = ["| tag | tuned | base |", "|---|---|---|"]
    for row in rows:
        base = "–" if row.base_passed is None else f"{row.base_passed} of {row.cases}"
        lines.append(f"| {_inline(row.tag)} | {row.passed} of {row.cases} | {base} |")
    return "\n".join(lines) if rows else ""


def _failing(report: Results) -> list[str]:
    failing = [found for found in report.fair if not found.passed()]
    if not failing:
        return []
    parts = [f"## Failing cases ({len(failing)})"]
    parts += [_case(found) for found in failing[:MAX_FAILING]]
    if len(failing) > MAX_FAILING:
        parts.append(f"… and {len(failing) - MAX_FAILING} more, which the JSON has.")
    return parts


def _case(found: CaseResult) -> str:
    sample = next(s for s in found.variants["tuned"] if not s.passed)
    reasons = [f"- {_inline(c)}: {_inline(reason or 'no')}" for c, reason in found.failures(sample)]
    tags = [_inline(tag) for tag in found.case.tags]
    parts = [
        f"### {_inline(found.case.id)} ({', '.join((found.case.kind, *tags))})",
        _inline(found.case.notes),
        _block(found.case.text),
        "answered:",
        _block(sample.text or "(nothing)"),
        "\n".join(reasons),
    ]
    return "\n\n".join(part for part in parts if part)


def _settings(report: Results) -> str:
    rows = [*report.settings.items(), ("seed", report.seed), *report.versions.items()]
    return "\n".join(f"- {_inline(str(name))}: {_code(str(value))}" for name, value in rows)


def _inline(text: str) -> str:
    """Text on one line in which no sign is markup."""
    line = texts.visible(texts.one_line(text, 300))
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", line)


def _code(text: str) -> str:
    line = texts.visible(texts.one_line(text, 300)).replace("|", "¦")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def _block(text: str) -> str:
    kept, left_out = texts.shorten(text, MAX_LENGTH)
    kept = texts.visible(kept) + (f" … {left_out} more characters" if left_out else "")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", kept)), default=0))
    return f"{fence}text\n{kept}\n{fence}"
