"""The demo: its pairs, its held-out e-mails, its marks, and the whole of it on the real model."""

import collections
import difflib
import itertools
import json
import pathlib
import re
import subprocess
import sys

import pytest
from _shared_data import shared_data

from gemma_keras_tune import demo
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.evaluation import Case
from gemma_keras_tune.evaluation.leakage import find_leaks
from gemma_keras_tune.generation.answers import Answer
from gemma_keras_tune.pairs import read_pairs

NO_ORDER = {"type": "inquiry", "items": []}
EXPECTED = {"type": "order", "items": [{"name": "rolls", "quantity": 4}, {"name": "torte"}]}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def item_words(records: list[dict]) -> set[str]:
    return {w for r in records for item in r["response"]["items"] for w in words(item["name"])}


def official_records() -> list[dict]:
    files = sorted(shared_data("business_email").glob("*.json"))
    assert len(files) == 8
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def shapes(records: list[dict]) -> set[tuple[str, ...]]:
    return {tuple(item) for record in records for item in record["response"]["items"]}


def assert_none_alike(texts: list[str], others: list[str]) -> None:
    for text, other in itertools.product(texts, others):
        assert not runs(text, 4) & runs(other, 4), (text, other)
        alike = difflib.SequenceMatcher(None, words(text), words(other)).ratio()
        assert alike < 0.5, (alike, text, other)


def prompts(records: list[dict]) -> list[str]:
    return [record["prompt"] for record in records]


def test_pairs_have_the_structure_of_the_held_out_records() -> None:
    pairs, held_out = demo.training_pairs(), demo.held_out()
    assert len(pairs) == 56 and len(held_out) >= 24
    assert all(list(record) == ["prompt", "response"] for record in pairs + held_out)
    assert all(list(record["response"]) == ["type", "items"] for record in pairs + held_out)
    assert shapes(pairs) == shapes(held_out)
    assert {p["response"]["type"] for p in pairs} == {r["response"]["type"] for r in held_out}


def test_some_pairs_order_nothing_and_ask_about_nothing() -> None:
    assert sum(pair["response"] == NO_ORDER for pair in demo.training_pairs()) >= 10


def test_no_pair_comes_from_a_held_out_record() -> None:
    pairs, held_out = demo.training_pairs(), demo.held_out()
    # "cake" alone: the structure has no other word for what has filling, frosting and flavor.
    assert item_words(pairs) & item_words(held_out) <= {"cake"}
    assert_none_alike(prompts(pairs), prompts(held_out))


def test_the_data_has_the_structure_of_the_official_records_and_none_of_their_texts() -> None:
    official = official_records()
    ours = demo.training_pairs() + demo.held_out()
    assert shapes(ours) == shapes(official)
    assert item_words(ours) & item_words(official) <= {"cake"}
    plan = [case.text for case in demo.test_plan()]
    assert_none_alike(prompts(ours) + plan, prompts(official))


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
    kinds = collections.Counter(case.kind for case in demo.test_plan())
    assert kinds["success"] >= 24 and kinds["failure"] >= 16 and kinds["boundary"] >= 15
    held_out = [case.prompt for case in demo.test_plan() if "held-out" in case.tags]
    assert held_out == prompts(demo.held_out()) and len(held_out) == kinds["success"]


def passes(case: Case, response: dict) -> bool:
    answer = Answer(json.dumps(response), [], stopped=True)
    return all(check.check(case.text, answer).passed for check in case.checks)


def test_right_answers_pass_and_wrong_ones_do_not() -> None:
    cases = [case for case in demo.test_plan() if case.kind == "success"]
    for case, record in zip(cases, demo.held_out(), strict=True):
        right = record["response"]
        assert passes(case, right), case.id
        other = "inquiry" if right["type"] == "order" else "order"
        assert not passes(case, {**right, "type": other}), case.id
        assert not passes(case, {**right, "items": [{"name": "x", "quantity": 99}]}), case.id


def test_what_must_be_refused_is_no_order_and_limits_leave_a_choice() -> None:
    gift = {"type": "order", "items": [{"name": "gift card", "quantity": 1000}]}
    for case in demo.test_plan():
        if case.kind != "success":
            assert passes(case, NO_ORDER), case.id
            assert passes(case, gift) == (case.kind == "boundary"), case.id


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
    ] * len(demo.held_out())
    tuned = [entry["tuned"] for entry in result["held_out"]]
    assert sum(entry["valid_json"] for entry in tuned) >= 7 / 8 * len(tuned)
    assert sum(entry["type_right"] for entry in tuned) >= 2 / 3 * len(tuned)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "business e-mail assistant" in page and "injected-answer" in page
    assert pathlib.Path(result["preset"], "config.json").is_file()
    assert pathlib.Path(result["adapter"], "adapter_model.safetensors").is_file()
