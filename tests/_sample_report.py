"""A report as `evaluate` gives it, built by hand, for the tests of the writers."""

import random
from collections.abc import Sequence
from typing import Any

from gemma_keras_tune.evaluation.checks import (
    Check,
    Contains,
    JsonFields,
    Length,
    Outcome,
    Refuses,
    Stops,
)
from gemma_keras_tune.evaluation.judging import judge_kinds
from gemma_keras_tune.evaluation.plans import Case
from gemma_keras_tune.evaluation.report import Report
from gemma_keras_tune.evaluation.results import CaseResult, FewShot, Leak, SampleResult, Tuning
from gemma_keras_tune.evaluation.retention import Retention, RetentionItem, RetentionScore
from gemma_keras_tune.generation.answers import Answer

HOSTILE = (
    "</pre></script><script>document.title = 'run'; window.broken = true</script>"
    '<img src=x onerror="window.broken = true"> {{ 7 * 7 }} {% raw %} & &amp; \x00\x1b[31m '
    "\u202egnp.exe ]]> `code` ```fence``` | pipe"
)
HALF = HOSTILE + " \ud800"  # which no plan may have, and no file can hold


def sample_report(cases: int = 32, *, hostile: bool = True, words: int = 12) -> Report:
    """A report with all its parts.

    Args:
        cases: How many cases.
        hostile: Whether prompts, answers and names try to break the page.
        words: Length of answers.
    """
    draw = random.Random(0)
    found = [_case(draw, number, words) for number in range(cases)]
    if hostile:
        found[1] = _result(
            Case(f"evil {HOSTILE}", HOSTILE, "failure", Refuses(), tags=HOSTILE, notes=HOSTILE),
            {"base": HALF, "few_shot": HALF + "!", "tuned": HALF + " more"},
        )
    fair = [case for case in found if not case.leak]
    items = [
        RetentionItem(f"item {n}", "en", "facts", "text", f"{n} + 1 =", f" {n + 1}")
        for n in range(12)
    ]
    scores = tuple(
        RetentionScore(item, 1.0 + n / 10, 1.1 + n / 9, item.answer, item.answer if n else " no")
        for n, item in enumerate(items)
    )
    return Report(
        plan_name=f"bakery {HOSTILE if hostile else ''}".strip(),
        cases=tuple(found),
        verdicts=judge_kinds(fair, dict.fromkeys(("success", "failure", "boundary"), 0.9), 0.95),
        retention=Retention(scores),
        few_shot=_few_shot(fair),
        leaks=judge_kinds([c for c in found if c.leak], {"success": 0.9}, 0.95),  # type: ignore[arg-type]
        tuning=Tuning(
            plan={"rank": 8},
            plan_text="Plan: LoRA rank 8, alpha 16, 4 epochs over 24 pairs",
            history={"loss": (3.0, 1.2, 0.6, 0.4), "val_loss": (3.1, 1.6, 1.1, 1.0)},
            timings={"train": 60.0},
            learning_rates=tuple(1e-3 * min(1, i / 4) * (1 - i / 30) for i in range(24)),
            token_lengths=((31, 2), (40, 9), (55, 8), (90, 5)),
        ),
        settings={
            "baseline": "base",
            "few_shot": 2,
            "retention": "auto",
            "target": {"success": 0.9, "failure": 0.9, "boundary": 0.9},
            "confidence": 0.95,
            "template": "gemma3",
            "sampler": "auto",
            "max_new_tokens": 64,
            "batch_size": 16,
            "policy": None,
            "pairs": 24,
        },
        versions={"gemma_keras_tune": "0.1.0", "keras": "3.15.1", "jax": "0.10.2"},
        seed=7,
        seconds=41.5,
    )


def _few_shot(cases: Sequence[CaseResult]) -> FewShot:
    passed = {name: sum(c.passed(name) for c in cases) for name in ("few_shot", "base", "tuned")}
    return FewShot(
        rows=(1, 4),
        cases=len(cases),
        passed=passed["few_shot"],
        base_passed=passed["base"],
        tuned_passed=passed["tuned"],
        low=0.0,
        high=0.5,
        p_value=0.01,
        words="Tuning does better.",
    )


def _case(draw: random.Random, number: int, words: int) -> CaseResult:
    kind: Any = ("success", "success", "failure", "boundary")[number % 4]
    checks: list[Check] = {
        "success": [JsonFields({"type": "order"}), Stops()],
        "failure": [Refuses()],
        "boundary": [Length(max=400), Contains("order")],
    }[kind]
    vocabulary = ["bread", "rolls", "cake", "with", "two", "of", "and", "please"]
    filler = " ".join(draw.choice(vocabulary) for _ in range(words))
    good = '{"type": "order", "items": [{"name": "' + filler + '", "quantity": 4}]}'
    tuned = good if draw.random() < 0.8 or kind == "boundary" else f"Here you are: {filler}"
    if kind == "failure" and draw.random() < 0.6:
        tuned = "I'm sorry, but I can't help with that."
    case = Case(
        f"{kind}-{number}",
        f"Four {filler}, please ({number}).",
        kind,
        tuple(checks),
        samples=3 if number % 8 == 3 else 1,
        required=0.6,
        tags=("bread", "held-out") if number % 3 == 0 else (),
        weight=2.0 if kind == "failure" else 1.0,
        notes="An order." if number % 5 == 0 else "",
    )
    leak = Leak((3, 9), 0.93, False) if number == 4 else None
    variants = {
        "base": f"What is the order? {filler}",
        "few_shot": f'{{"type": "{filler}',
        "tuned": tuned,
    }
    return _result(case, variants, leak)


def _result(case: Case, texts: dict[str, str], leak: Leak | None = None) -> CaseResult:
    variants = {}
    for name, text in texts.items():
        several = [text, f"{text} And a cake.", "Which order?"][: case.samples]
        variants[name] = tuple(_sample(case, one, stopped=name != "base") for one in several)
    return CaseResult(case, variants, leak)


def _sample(case: Case, text: str, *, stopped: bool) -> SampleResult:
    answer = Answer(text, list(range(len(text.split()))), stopped)  # type: ignore[arg-type]
    outcomes = tuple(_outcome(check, case, answer) for check in case.checks)
    return SampleResult(text, stopped, len(answer.ids), outcomes)


def _outcome(check: Check, case: Case, answer: Answer) -> Outcome:
    return check.check(case.text, answer)
