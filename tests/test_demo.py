"""The demo: its pairs, its held-out e-mails, its marks, and the whole of it on the real model."""

import difflib
import json
import pathlib
import re
import subprocess
import sys

import pytest

from gemma_keras_tune import demo
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.evaluation.leakage import find_leaks
from gemma_keras_tune.pairs.reader import read_pairs

OFFICIAL = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "business_email"
EXPECTED = {"type": "order", "items": [{"name": "rolls", "quantity": 4}, {"name": "torte"}]}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def item_words(records: list[dict]) -> set[str]:
    return {w for r in records for item in r["response"]["items"] for w in words(item["name"])}


def test_held_out_records_are_the_official_ones() -> None:
    files = sorted(OFFICIAL.glob("*.json"))
    assert len(files) == 8, f"the official records are missing from {OFFICIAL}"
    assert demo.held_out() == [json.loads(f.read_text(encoding="utf-8")) for f in files]


def test_pairs_have_the_structure_of_the_records() -> None:
    def shapes(records: list[dict]) -> set[tuple[str, ...]]:
        return {tuple(item) for record in records for item in record["response"]["items"]}

    pairs, official = demo.training_pairs(), demo.held_out()
    assert 20 <= len(pairs) <= 24
    assert all(list(pair) == ["prompt", "response"] for pair in pairs)
    assert all(list(pair["response"]) == ["type", "items"] for pair in pairs)
    assert shapes(pairs) == shapes(official)
    assert {p["response"]["type"] for p in pairs} == {r["response"]["type"] for r in official}


def test_no_pair_comes_from_a_held_out_record() -> None:
    pairs, official = demo.training_pairs(), demo.held_out()
    # "cake" alone: the structure has no other word for what has filling, frosting and flavor.
    assert item_words(pairs) & item_words(official) <= {"cake"}
    for pair in pairs:
        for record in official:
            shared = runs(pair["prompt"], 4) & runs(record["prompt"], 4)
            assert not shared, (pair["prompt"], record["prompt"])
            alike = difflib.SequenceMatcher(
                None, words(pair["prompt"]), words(record["prompt"])
            ).ratio()
            assert alike < 0.5, (alike, pair["prompt"], record["prompt"])


@pytest.mark.parametrize(
    ("answer", "valid", "right", "found"),
    [
        (json.dumps(EXPECTED), True, True, 2),
        ('{"type": "order", "items": [{"name": "Rolls"}]}', True, True, 1),
        ('{"type": "inquiry", "items": []}', True, False, 0),
        ('{"type": "order", "items": "rolls"}', True, True, 0),
        ('{"type": "order", "items": ["rolls", {"quantity": 4}]}', True, True, 0),
        ('{"type": "order"', False, False, 0),
        (json.dumps(EXPECTED) + " Thanks!", False, False, 0),
        ('["order"]', False, False, 0),
        ("7", False, False, 0),
        ("", False, False, 0),
    ],
)
def test_grade(answer: str, valid: bool, right: bool, found: int) -> None:
    graded = demo.grade(answer, EXPECTED)
    assert (graded.valid_json, graded.type_right, graded.items_found) == (valid, right, found)
    assert graded.items_expected == 2


def test_plan_has_all_kinds_and_the_held_out_records() -> None:
    plan = demo.test_plan()
    kinds = [case.kind for case in plan]
    assert len(plan) >= 24 and min(kinds.count(kind) for kind in set(kinds)) >= 8
    held_out = [case.prompt for case in plan if "held-out" in case.tags]
    assert held_out == [record["prompt"] for record in demo.held_out()]
    assert len(set(kinds)) == 3


def test_plan_was_not_trained_on() -> None:
    assert not find_leaks(demo.test_plan(), read_pairs(demo.training_pairs()), threshold=0.4)


def test_table_counts_what_is_right() -> None:
    good = demo.grade(json.dumps(EXPECTED), EXPECTED)
    bad = demo.grade("no", EXPECTED)
    text = demo.table(["one\nline", "x" * 80], [bad, bad], [good, bad])
    *_, first, second, totals = text.splitlines()
    assert first.split() == ["one", "line", "no", "no", "0/2", "yes", "yes", "2/2"]
    assert "…" in second
    assert totals.split() == ["right", "0", "0", "0/4", "1", "1", "2/4"]


@pytest.mark.slow
def test_the_clock_starts_with_the_process() -> None:
    code = (
        "import time; t = time.time(); from gemma_keras_tune import demo; "
        "print(t - demo.process_started())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 <= float(done.stdout) < 2


def test_an_old_demo_is_not_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(ExportError, match=r"already holds a demo"):
        demo.run_demo(tmp_path, model="never loaded", verbose=0)


@pytest.mark.real
def test_the_demo_reaches_its_figures(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "gemma_keras_tune", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert set(result) == {"seconds", "preset", "adapter", "held_out"}
    assert [set(entry) for entry in result["held_out"]] == [
        {"prompt", "expected", "base", "tuned"}
    ] * 8
    tuned = [entry["tuned"] for entry in result["held_out"]]
    assert sum(entry["valid_json"] for entry in tuned) == 8
    assert sum(entry["type_right"] for entry in tuned) >= 7
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "business e-mail assistant" in page and "injected-answer" in page
    assert pathlib.Path(result["preset"], "config.json").is_file()
    assert pathlib.Path(result["adapter"], "adapter_model.safetensors").is_file()
