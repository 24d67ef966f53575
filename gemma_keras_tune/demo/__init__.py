"""The main job: a business e-mail assistant out of 56 pairs.

`pairs.jsonl` holds e-mails to bakeries, each with the order or inquiry in it as JSON. An `order`
lists the goods that are finally wanted. All other e-mails are an `inquiry`, which lists the goods
that are asked about; complaints, cancellations and advertisements ask about none. `held_out.jsonl`
holds e-mails of the same form that are never tuned on, and `plan.jsonl` the test plan: these are
its success cases. The model is tuned on the pairs and put to the plan with the adapter off and on:
with it off, its answers are those of the base model, bit for bit.
"""

import dataclasses
import importlib.resources
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from gemma_keras_tune._support.files import write_text
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.gemma.quantization import Quantization
from gemma_keras_tune.training.settings import Auto

MODEL = "package://gemma3_270m"
FOLDER = importlib.resources.files(__name__)
# The longest right answer takes 64, with its stop.
MAX_NEW_TOKENS = 68
# `tune` alone would take more, smaller steps. These answers repeat one structure and bear a higher
# rate, chosen by leaving pairs out of the first 24; the epochs were cut to spare time.
RECIPE: dict[str, Any] = {"rank": 8, "batch_size": 4, "epochs": 3, "learning_rate": 1e-3}


@dataclasses.dataclass(frozen=True)
class Graded:
    """One answer to a held-out e-mail.

    Attributes:
        answer: What the model wrote.
        valid_json: Whether the whole answer is one JSON object.
        type_right: Whether its `type` is the expected one.
        items_found: Expected items whose name is in it.
        items_expected: Expected items.
    """

    answer: str
    valid_json: bool
    type_right: bool
    items_found: int
    items_expected: int


def training_pairs() -> list[dict[str, Any]]:
    """The demo's training pairs.

    Returns:
        Dicts with `prompt`, an e-mail, and `response`, its content as JSON data.
    """
    return _records("pairs.jsonl")


def held_out() -> list[dict[str, Any]]:
    """The e-mails that are never tuned on, with their right answers.

    Returns:
        Dicts with `prompt` and `response`, as for `training_pairs`.
    """
    return _records("held_out.jsonl")


def grade(answer: str, expected: dict[str, Any]) -> Graded:
    """Compare an answer with the record it should give.

    Args:
        answer: What a model wrote.
        expected: The record: `type` and `items`, each with a `name`.

    Returns:
        What is right about it. Names are compared without regard to case.
    """
    try:
        record = json.loads(answer)
    except ValueError:
        record = None
    valid = isinstance(record, dict)
    found = _names(record["items"]) if valid and isinstance(record.get("items"), list) else set()
    wanted = _names(expected["items"])
    return Graded(
        answer=answer,
        valid_json=valid,
        type_right=valid and record.get("type") == expected["type"],
        items_found=len(wanted & found),
        items_expected=len(wanted),
    )


def test_plan() -> Any:
    """The demo's test plan.

    Returns:
        A `TestPlan`. Its cases with the tag `held-out` are the e-mails of `held_out()`.
    """
    from gemma_keras_tune.evaluation import TestPlan

    with importlib.resources.as_file(FOLDER / "plan.jsonl") as path:
        return dataclasses.replace(TestPlan.from_file(path), name="business e-mail assistant")


test_plan.__test__ = False  # type: ignore[attr-defined]  # for pytest


def process_started() -> float:
    """When this process began, imports included.

    Returns:
        Seconds since the epoch; now, where the system does not say (anywhere but on Linux).
    """
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks_after_boot = int(fields[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks_after_boot / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()
    return time.time() - age


def run_demo(
    out: str | os.PathLike[str] | None = None,
    *,
    model: Any = MODEL,
    verbose: int = 1,
    started: float | None = None,
    quantize: Quantization | None = None,
    rematerialize: bool | Auto = "auto",
) -> dict[str, Any]:
    """Tune Gemma 3 270M on the demo's pairs, save it, and put it to the demo's test plan.

    Args:
        out: Folder for the preset, the adapter, `report.html` and `demo.json`. Without it, all but
            the last go to a new temporary folder.
        model: Anything `load` takes, or a model.
        verbose: 1 prints what happens and the table; 0 is silent.
        started: Seconds since the epoch at which the clock began, by default now.
        quantize: As `load` takes it. On a quantized base the adapter alone is saved.
        rematerialize: As `tune` takes it.

    Returns:
        What is in `demo.json`: `seconds` from `started` to the saved preset and adapter, the two
        folders, and for each held-out e-mail `prompt`, `expected`, and for `base` and `tuned` the
        `answer`, `valid_json` and `type_right`.

    Raises:
        ExportError: `out` already holds a demo.
        LoadError: The model cannot be opened.
    """
    import gemma_keras_tune as gkt

    started = time.time() if started is None else started
    folder = _prepare(out)
    say = print if verbose else _silent
    gemma = gkt.load(model, quantize=quantize) if isinstance(model, str) else model
    pairs = training_pairs()
    result = gkt.tune(gemma, pairs, verbose=verbose, rematerialize=rematerialize, **RECIPE)
    merged = folder / "preset" if quantize is None else None
    if merged:
        gkt.save_preset(gemma, merged)
    gkt.save_adapter(gemma, folder / "adapter")
    seconds = time.time() - started
    plan = test_plan()
    say(f"Asking {len(plan)} e-mails it has not seen, adapter off (base) and on (tuned) …")
    report = gkt.evaluate(
        gemma,
        plan,
        pairs=pairs,
        result=result,
        few_shot=2,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=len(plan),
        verbose=verbose,
    )
    page = report.save(folder / "report.html")
    base, tuned = (_grades(report, variant) for variant in ("base", "tuned"))
    summary = {
        "seconds": round(seconds, 1),
        "preset": merged and str(merged),
        "adapter": str(folder / "adapter"),
        "held_out": [
            {
                "prompt": t["prompt"],
                "expected": t["response"],
                "base": _entry(b),
                "tuned": _entry(a),
            }
            for t, b, a in zip(held_out(), base, tuned, strict=True)
        ],
    }
    say(table([test["prompt"] for test in held_out()], base, tuned))
    say(f"\n{report}")
    say(f"\n{seconds:.0f} s from start to saved model")
    if out is not None:
        _write(folder / "demo.json", summary)
        say(f"  {folder / 'demo.json'}")
    say("".join(f"  {path}\n" for path in (merged, summary["adapter"], page) if path).rstrip())
    return summary


def _grades(report: Any, variant: str) -> list[Graded]:
    """Grade the answers of base or tuned model to the held-out e-mails."""
    tests = held_out()
    answers = _held_out_answers(report, variant, [test["prompt"] for test in tests])
    return [grade(a, test["response"]) for a, test in zip(answers, tests, strict=True)]


def _records(name: str) -> list[dict[str, Any]]:
    text = (FOLDER / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _held_out_answers(report: Any, variant: str, prompts: Sequence[str]) -> list[str]:
    answers = {case.case.text: case.variants[variant][0].text.strip() for case in report.cases}
    return [answers[prompt] for prompt in prompts]


def table(
    prompts: Sequence[str],
    base: Sequence[Graded],
    tuned: Sequence[Graded],
    *,
    of: str = "held-out e-mail",
) -> str:
    """The held-out e-mails, one a line, with what base and tuned made of them.

    Args:
        prompts: The e-mails.
        base: The answers before tuning.
        tuned: The answers after.
        of: The title of the first column.

    Returns:
        A table of text, with totals.
    """
    lines = [
        f"{'':46} {'base':^20}   {'tuned':^20}",
        f"{of:46} {'JSON':>4} {'type':>5} {'items':>7}   {'JSON':>4} {'type':>5} {'items':>7}",
    ]
    for prompt, b, t in zip(prompts, base, tuned, strict=True):
        short = " ".join(prompt.split())
        short = short if len(short) <= 46 else short[:45] + "…"
        lines.append(f"{short:46} {_cells(b)}   {_cells(t)}")
    lines.append(f"{'right':46} {_totals(base)}   {_totals(tuned)}")
    return "\n".join(lines)


def _cells(graded: Graded) -> str:
    items = f"{graded.items_found}/{graded.items_expected}"
    return f"{_mark(graded.valid_json):>4} {_mark(graded.type_right):>5} {items:>7}"


def _totals(graded: Sequence[Graded]) -> str:
    valid = sum(g.valid_json for g in graded)
    right = sum(g.type_right for g in graded)
    found, wanted = sum(g.items_found for g in graded), sum(g.items_expected for g in graded)
    return f"{valid:>4} {right:>5} {f'{found}/{wanted}':>7}"


def _mark(right: bool) -> str:
    return "yes" if right else "no"


def _names(items: list[Any]) -> set[str]:
    return {
        str(item["name"]).casefold() for item in items if isinstance(item, dict) and "name" in item
    }


def _entry(graded: Graded) -> dict[str, Any]:
    return {
        "answer": graded.answer,
        "valid_json": graded.valid_json,
        "type_right": graded.type_right,
    }


def _prepare(out: str | os.PathLike[str] | None) -> pathlib.Path:
    if out is None:
        return pathlib.Path(tempfile.mkdtemp(prefix="gemma_keras_tune_demo_"))
    folder = pathlib.Path(out)
    there = [
        name
        for name in ("preset", "adapter", "report.html", "demo.json")
        if (folder / name).exists()
    ]
    if there:
        raise ExportError(
            f"{folder} already holds a demo.",
            [f"{folder / name} exists" for name in there],
            "Give another folder, or remove these.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: pathlib.Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _silent(*_: Any) -> None:
    """Say nothing."""
