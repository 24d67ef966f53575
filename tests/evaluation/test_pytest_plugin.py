"""Test plans under pytest: each case a test, one model for all, JUnit XML from pytest itself."""

import json
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree

import pytest

import gemma_keras_tune as gkt
import gemma_keras_tune_pytest
from gemma_keras_tune import testing
from gemma_keras_tune.evaluation import pytest_plugin

pytest_plugins = ["pytester"]
PLUGIN = "gemma_keras_tune_pytest"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model as a preset, and what it says to "hi" in four tokens."""
    model = testing.tiny_model()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    gkt.save_preset(model, folder)
    said = gkt.generate(gkt.load(str(folder)), "hi", max_new_tokens=4, strip=False)
    return str(folder), said


@pytest.fixture
def run(pytester, model):
    """pytest with the plugin, on the tiny model, in a folder of its own."""
    folder, _ = model

    def run(*arguments):
        plugin = [] if PLUGIN in sys.modules and _installed() else ["-p", PLUGIN]
        return pytester.runpytest_inprocess(
            *plugin, "--gemma-max-new-tokens", "4", *arguments, "-p", "no:cacheprovider"
        )

    run.model = folder
    return run


def _installed():
    from importlib.metadata import entry_points

    return any(entry.value == PLUGIN for entry in entry_points(group="pytest11"))


def write(pytester, *cases, name="plan"):
    lines = [json.dumps({"kind": "success", "prompt": "hi", **case}) for case in cases]
    return pytester.makefile(".jsonl", **{name: "\n".join(lines)})


@pytest.mark.slow
def test_each_case_is_a_test(run, pytester, model):
    _, said = model
    write(
        pytester,
        {"id": "right", "checks": [{"exact": {"text": said, "space": "keep"}}], "tags": ["a"]},
        {"id": "wrong", "checks": [{"exact": "never said"}, {"length": {"min": 999}}]},
        {"id": "several", "kind": "boundary", "checks": [{"length": 0}], "samples": 3,
         "required": 0.5},
    )  # fmt: skip
    result = run("--gemma-model", run.model, "plan.jsonl", "--junitxml=report.xml", "-v")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "plan.jsonl::right PASSED*",
            "plan.jsonl::wrong FAILED*",
            "success case wrong: hi",
            "answer: *",
            '  is "never said": it is not "never said"',
            "  has at least 999 characters: it has * characters",
            "boundary case several: hi",
            "0 of 3 answers pass, and 50% must.",
        ]
    )
    assert "Traceback" not in result.stdout.str() and "pytest_plugin.py" not in result.stdout.str()
    suite = ElementTree.parse(pytester.path / "report.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "0")
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == ["right", "wrong", "several"]
    properties = {p.get("name"): p.get("value") for p in cases["right"].iter("property")}
    assert properties == {"kind": "success", "tags": "a"}


@pytest.mark.slow
def test_only_what_is_selected_is_asked_and_the_model_is_opened_once(run, pytester, monkeypatch):
    asked, opened = [], []
    evaluate, load = pytest_plugin.evaluate, pytest_plugin.load
    monkeypatch.setattr(
        pytest_plugin, "evaluate", lambda m, p, **k: asked.append(len(p)) or evaluate(m, p, **k)
    )
    monkeypatch.setattr(pytest_plugin, "load", lambda m: opened.append(m) or load(m))
    good = {"checks": [{"length": 10**6}]}
    write(pytester, *({"id": f"a{i}", **good} for i in range(3)), {"id": "b", **good})
    write(pytester, {"id": "a-other", **good}, name="other")
    result = run("--gemma-model", run.model, "plan.jsonl", "other.jsonl", "-k", "a0 or a1 or other")
    result.assert_outcomes(passed=3, deselected=2)
    assert asked == [2, 1] and opened == [run.model]


@pytest.mark.slow
def test_other_files_are_left_alone(run, pytester):
    write(pytester, {"id": "x", "checks": [{"stops": True}]})
    pytester.makefile(".jsonl", pairs='{"input": "a", "output": "b"}')
    pytester.makepyfile("def test_one(): pass")
    # Plans that were not named, and plans without a model.
    run("--gemma-model", run.model).assert_outcomes(passed=1)
    run().assert_outcomes(passed=1)
    assert run("plan.jsonl").ret != 0


@pytest.mark.slow
def test_a_plan_that_is_none_is_an_error_of_collection(run, pytester):
    pytester.makefile(".jsonl", plan='{"kind": "success"}\n{"prompt": "x", "kind": "y"}')
    result = run("--gemma-model", run.model, "plan.jsonl")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*plan.jsonl is no test plan.", "*row 1: `prompt` is missing"])
    assert "Traceback" not in result.stdout.str()


@pytest.mark.slow
def test_a_model_that_cannot_be_opened_is_an_error_of_every_case(run, pytester, monkeypatch):
    opened, load = [], pytest_plugin.load
    monkeypatch.setattr(pytest_plugin, "load", lambda m: opened.append(m) or load(m))
    write(pytester, *({"id": i, "checks": [{"stops": True}]} for i in "ab"))
    write(pytester, {"id": "c", "checks": [{"stops": True}]}, name="other")
    own = str(pytester.makepyfile("def test_of_the_users_own(): pass"))
    nothing = str(pytester.path / "nothing")
    result = run("--gemma-model", nothing, "plan.jsonl", "other.jsonl", own)
    result.assert_outcomes(errors=3, passed=1)
    assert "nothing" in result.stdout.str() and "Traceback" not in result.stdout.str()
    assert "(as for the case before)" in result.stdout.str()
    assert opened == [nothing], "it is not tried again for every plan"


@pytest.mark.slow
def test_safe_checks_need_a_policy(run, pytester):
    write(pytester, {"id": "a", "checks": [{"safe": True}]})
    result = run("--gemma-model", run.model, "plan.jsonl")
    result.assert_outcomes(errors=1)
    assert "`policy` must judge the `safe` check" in result.stdout.str()


@pytest.mark.slow
def test_cases_that_were_trained_on_are_skipped(run, pytester):
    write(pytester, {"id": "a", "checks": [{"length": 10**6}]},
          {"id": "b", "prompt": "something else", "checks": [{"length": 10**6}]})  # fmt: skip
    pytester.makefile(".jsonl", pairs='{"input": "Hi!", "output": "Hello"}')
    result = run("--gemma-model", run.model, "--gemma-pairs", "pairs.jsonl", "plan.jsonl", "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*in the training pairs, row 1*"])


@pytest.mark.slow
@pytest.mark.parametrize(("dist", "batches"), [("load", [1, 1, 1]), ("loadfile", [3])])
def test_a_worker_asks_no_case_that_another_may_get(run, pytester, monkeypatch, dist, batches):
    asked, evaluate = [], pytest_plugin.evaluate
    monkeypatch.setattr(
        pytest_plugin, "evaluate", lambda m, p, **k: asked.append(len(p)) or evaluate(m, p, **k)
    )
    node = types.SimpleNamespace(workerinput={}, config=types.SimpleNamespace())
    node.config.getoption = lambda name, usual: dist
    gemma_keras_tune_pytest.pytest_configure_node(node)
    pytester.makeconftest(
        "import pytest\n@pytest.hookimpl(trylast=True)\n"
        f"def pytest_collection_finish(session): session.config.workerinput = {node.workerinput}"
    )
    write(pytester, *({"id": i, "checks": [{"length": 10**6}]} for i in "abc"))
    run("--gemma-model", run.model, "plan.jsonl").assert_outcomes(passed=3)
    assert asked == batches


def test_without_a_plan_nothing_is_imported():
    code = (
        "import sys, pytest, gemma_keras_tune_pytest; "
        "print(sorted({'keras', 'jax', 'gemma_keras_tune'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
