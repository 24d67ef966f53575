"""The examples run, on a small part of their data."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import pytest
from _shared_data import shared_data

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.generation.answers import Answer

ROOT = pathlib.Path(__file__).parent.parent
EMOJI = "emoji/text_to_emoji.csv"


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def emoji_plan():
    return gkt.TestPlan.from_file(ROOT / "examples" / "emoji_plan.jsonl")


def test_the_emoji_plan_has_every_kind(emoji_plan):
    assert {case.kind for case in emoji_plan} == {"success", "failure", "boundary"}


@pytest.mark.parametrize(
    ("id", "text", "passes"),
    [
        ("bop", "🎶🎧🔥", True),
        ("bop", "🎶🎧💃", True),
        ("bop", "🎶 what a song", False),
        ("bop", "🍕", False),
        ("fall-colors", "🍂🍁🧡❤️", True),
        ("italy", "🇮🇹👨‍👩‍👧", True),
        ("self-harm", "❤️🫂", True),
        ("self-harm", "🔪", False),
        ("question", "Paris", True),
        ("question", "🇫🇷", True),
        ("question", "Let me explain", False),
        ("long", "🌧️🏃☕😂", True),
        ("long", "🌧️" * 20, False),
    ],
)
def test_several_answers_are_right(emoji_plan, id, text, passes):
    case = next(case for case in emoji_plan if case.id == id)
    answer = Answer(text, [], stopped=True)
    assert all(check.check(case.text, answer).passed for check in case.checks) == passes


def test_the_data_answers_its_own_phrases(emoji_plan):
    with shared_data(EMOJI).open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["emoji"]) for row in csv.DictReader(file)]
    cases = {case.text: case for case in emoji_plan if "two answers in the data" in case.tags}
    answers = [(cases[text], emoji) for text, emoji in rows if text in cases]
    assert len(answers) == 2 * len(cases)
    for case, emoji in answers:
        outcomes = [c.check(case.text, Answer(emoji, [], stopped=True)) for c in case.checks]
        assert all(o.passed for o in outcomes), (case.id, emoji, outcomes)


@pytest.mark.slow
def test_emoji_on_a_tiny_model(tmp_path):
    data = shared_data(EMOJI)
    gkt.save_preset(testing.tiny_model(), tmp_path / "tiny")
    report = tmp_path / "report.json"
    options = ("--model", tmp_path / "tiny", "--rows", 8, "--epochs", 1, "--quick")
    said = run("examples/emoji.py", data, *options, "--report", report)
    assert "success" in said and "boundary" in said
    assert len(json.loads(report.read_text(encoding="utf-8"))["cases"]) == 21


@pytest.mark.real
def test_banking77_on_a_small_part(tmp_path):
    shared_data("banking77")
    figures = tmp_path / "figures.json"
    small = ("--rows-a-class", 1, "--test-rows", 24, "--epochs", 1)
    said = run("tests/benchmarks/banking77.py", "--json", figures, *small)
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["rows"] == 24 and found["training_rows"] == 77 and "of 24 right" in said
    assert 0 <= found["interval"][0] <= found["accuracy"] <= found["interval"][1] <= 1
    assert found["seconds"] > 0


@pytest.mark.real
def test_business_email_reaches_its_figures(tmp_path):
    shared_data("business_email")
    figures = tmp_path / "figures.json"
    said = run("tests/benchmarks/business_email.py", "--json", figures)
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["rows"] == 8 and "official e-mail" in said
    assert found["tuned"]["valid_json"] == 8 and found["tuned"]["type_right"] >= 7
    assert found["items"] == 11 and found["tuned"]["items_found"] >= found["base"]["items_found"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["banking77", "business_email"])
def test_a_benchmark_names_the_data_it_misses(name, tmp_path):
    copy = tmp_path / "checkout" / "tests" / "benchmarks"
    copy.mkdir(parents=True)
    for file in ("_bench.py", f"{name}.py"):
        (copy / file).write_bytes((ROOT / "tests" / "benchmarks" / file).read_bytes())
    done = subprocess.run(
        [sys.executable, str(copy / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    missing = tmp_path / "shared" / "data" / name
    assert done.returncode == 1 and f"There is no {missing}." in done.stderr
    assert "Traceback" not in done.stderr
