"""The examples run, on a small part of their data."""

import csv
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jsonschema
import pytest
from _shared_data import shared_data

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.gemma.templates import TEMPLATES
from gemma_keras_tune.generation.answers import Answer

ROOT = pathlib.Path(__file__).parent.parent
EMOJI = "emoji/text_to_emoji.csv"
# Rows of the data, from 0, whose phrases mean about what the plan's cases of these ids do.
SAME_SENSE = {"tune": (2306, 2307), "leaves": (335, 336), "start": (1236, 1237), "year": (799, 800)}


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


def emoji_rows():
    with shared_data(EMOJI).open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["emoji"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def emoji_plan():
    return gkt.TestPlan.from_file(ROOT / "examples" / "emoji_plan.jsonl")


def test_the_emoji_plan_has_every_kind(emoji_plan):
    assert {case.kind for case in emoji_plan} == {"success", "failure", "boundary"}


@pytest.mark.parametrize(
    ("id", "text", "passes"),
    [
        ("tune", "🎶🎧🔥", True),
        ("tune", "🎶🎧💃", True),
        ("tune", "🎶 what a song", False),
        ("tune", "🍕", False),
        ("leaves", "🍂🍁🧡❤️", True),
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


def test_the_data_answers_phrases_of_the_same_sense(emoji_plan):
    rows = emoji_rows()
    cases = {case.id: case for case in emoji_plan if "answers in the data" in case.tags}
    assert cases.keys() == SAME_SENSE.keys()
    for id, numbers in SAME_SENSE.items():
        for _, emoji in (rows[number] for number in numbers):
            answer = Answer(emoji, [], stopped=True)
            outcomes = [check.check(cases[id].text, answer) for check in cases[id].checks]
            assert all(outcome.passed for outcome in outcomes), (id, emoji, outcomes)


def test_no_phrase_of_the_emoji_plan_is_from_the_data(emoji_plan):
    theirs = {text.casefold().strip() for text, _ in emoji_rows()}
    assert theirs.isdisjoint(case.text.casefold().strip() for case in emoji_plan)


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


@pytest.fixture(scope="module")
def tool_calls():
    place = ROOT / "examples" / "tool_calls.py"
    spec = importlib.util.spec_from_file_location("tool_calls", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_calls_of_the_example_fit_its_tools(tool_calls):
    schemas = {tool["name"]: tool["parameters"] for tool in tool_calls.TOOLS}
    pairs = list(gkt.read_pairs(tool_calls.training_pairs()))
    cases = list(tool_calls.plan())
    assert len(schemas) == 6 and len(pairs) >= 60 and len(cases) == 40
    calls = [call for pair in pairs for call in pair.messages[-1].tool_calls]
    made = [(call.name, call.arguments) for call in calls]
    wanted = [case.checks[0] for case in cases if isinstance(case.checks[0], gkt.checks.CallsTool)]
    asked = [(check.tool, check.arguments) for check in wanted]
    for name, arguments in made + asked:
        jsonschema.validate(arguments, {**schemas[name], "additionalProperties": False})
    for calls in (made, asked):
        assert {name for name, _ in calls} == set(schemas)
    assert not {pair.prompt for pair in pairs} & {case.text for case in cases}
    template = TEMPLATES["functiongemma"]
    assert all(template.segments(pair.messages)[-1].trained for pair in pairs)
