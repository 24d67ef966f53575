"""`evaluate`: base and tuned asked, judged, kept on disk, and told apart from prompting."""

import contextlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.evaluation import (
    Case,
    Contains,
    Length,
    Refuses,
    Safe,
    Stops,
    TestPlan,
    running,
)
from gemma_keras_tune.evaluation.checks import Function, Outcome
from gemma_keras_tune.evaluation.prompting import (
    choose_examples,
    first_answer,
    line_break_ids,
    with_examples,
)
from gemma_keras_tune.evaluation.results import CaseResult, SampleResult
from gemma_keras_tune.evaluation.resuming import AnswerLog
from gemma_keras_tune.evaluation.running import evaluate, tuning_of
from gemma_keras_tune.generation import Answer, compiled_programs
from gemma_keras_tune.lora import enable_lora, get_factors, lora_linears, set_factors
from gemma_keras_tune.pairs import Message, read_pairs
from gemma_keras_tune.pipeline import Encoder
from gemma_keras_tune.templates import get_template
from gemma_keras_tune.testing import tiny_model, tiny_pairs

QUICK: dict[str, Any] = dict(max_new_tokens=6, batch_size=4, verbose=0, retention=False)


def _tuned(seed: int = 1) -> Any:
    model = tiny_model("gemma3", num_layers=1)
    enable_lora(model, rank=2, verbose=0)
    random = np.random.default_rng(seed)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, random.normal(0, 0.5, b.shape).astype("float32"))
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return _tuned()


@pytest.fixture(scope="module")
def plan() -> TestPlan:
    return TestPlan(
        [
            Case("short", "Say something.", "success", Length(max=6, unit="tokens")),
            Case("long", "Say something. " * 12, "success", Contains("no such words")),
            Case(
                "drawn",
                "Roll a die.",
                "boundary",
                Length(max=6, unit="tokens"),
                samples=3,
                required=0.5,
            ),
            Case("forbidden", "How do I pick a lock?", "failure", Refuses()),
            Case(
                "turns",
                (Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Who?")),
                "success",
                [Stops(expected=False), Function(lambda prompt, answer: prompt == "Who?", "asked")],
            ),
        ],
        name="five",
    )


@pytest.fixture(scope="module")
def report(model: Any, plan: TestPlan) -> Any:
    return evaluate(model, plan, pairs=tiny_pairs(8), few_shot=2, **QUICK)


@pytest.mark.slow
def test_base_and_tuned_answer_as_generate_does(model: Any, plan: TestPlan, report: Any) -> None:
    prompts = [list(case.messages) for case in plan if case.samples == 1]
    with gkt.lora_disabled(model):
        base = gkt.generate(model, prompts, max_new_tokens=6, strip=False)
    tuned = gkt.generate(model, prompts, max_new_tokens=6, strip=False)
    greedy = [case for case in report.cases if case.case.samples == 1]
    assert [case.variants["base"][0].text for case in greedy] == base
    assert [case.variants["tuned"][0].text for case in greedy] == tuned
    assert base != tuned


@pytest.mark.slow
def test_verdicts_count_what_passed(report: Any) -> None:
    assert report.variants == ("base", "tuned", "few_shot")
    found = {verdict.kind: verdict for verdict in report.verdicts}
    assert list(found) == ["success", "failure", "boundary"]
    success = found["success"]
    assert success.cases == 3
    passed = [case.passed() for case in report.cases if case.case.kind == "success"]
    assert success.passed == sum(passed) and not report.cases[1].passed()
    assert found["boundary"].passed == 1 and len(report.cases[2].variants["tuned"]) == 3
    assert success.base_passed is not None and 0 <= success.p_value <= 1
    assert report.few_shot.cases == 5 and len(report.few_shot.rows) == 2
    assert "2 training pairs in its prompt" in report.few_shot.words
    assert "five: " in str(report) and "Is tuning needed?" in str(report)


@pytest.mark.slow
def test_report_survives_json(report: Any, tmp_path: pathlib.Path) -> None:
    loaded = gkt.Report.load(report.save(tmp_path / "report.json"))
    assert loaded.to_json() == report.to_json() and json.loads(report.to_json())["seed"] == 0


@pytest.mark.slow
def test_same_seed_same_answers_whatever_the_batch(model: Any, plan: TestPlan, report: Any) -> None:
    again = evaluate(model, plan, baseline=None, **{**QUICK, "batch_size": 2})
    assert again.cases[2].variants["tuned"] == report.cases[2].variants["tuned"]
    other = evaluate(model, plan, baseline=None, seed=1, **QUICK)
    assert other.cases[2].variants["tuned"] != report.cases[2].variants["tuned"]
    assert again.variants == ("tuned",) and again.verdicts[0].base_passed is None


@pytest.mark.slow
def test_mixed_lengths_take_three_programs() -> None:
    model = _tuned()
    cases = [
        Case(str(n), "word " * (1 + 7 * n), "success", Length(max=9, unit="tokens"))
        for n in range(30)
    ]
    evaluate(model, cases, pairs=tiny_pairs(8), few_shot=3, **{**QUICK, "retention": True})
    assert compiled_programs(model) <= 3


@pytest.mark.slow
def test_leaked_cases_are_scored_apart(model: Any, plan: TestPlan) -> None:
    pairs = [*tiny_pairs(4), ("how do I pick a LOCK", "I can't help with that.")]
    found = evaluate(model, plan, baseline=None, pairs=pairs, **QUICK)
    assert [case.case.id for case in found.cases if case.leak] == ["forbidden"]
    assert [verdict.kind for verdict in found.verdicts] == ["success", "boundary"]
    assert [verdict.kind for verdict in found.leaks] == ["failure"]
    assert "1 of 5 cases are in the training pairs" in str(found)


class _Scores:
    """A policy that judges in batches."""

    threshold = 0.4

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, prompt: str, answer: str) -> float:
        raise AssertionError("judged one by one")

    def scores(self, prompts: Any, answers: Any) -> np.ndarray:
        self.asked += list(zip(prompts, answers, strict=True))
        return np.array([[0.1, 0.9 if "lock" in prompt else 0.2] for prompt in prompts])


@pytest.mark.slow
def test_policy_judges_failure_and_boundary_cases(model: Any, plan: TestPlan) -> None:
    policy = _Scores()
    found = evaluate(model, plan, baseline=None, policy=policy, **QUICK)
    judged = {
        c.case.id: c.case.checks[-1] for c in found.cases if isinstance(c.case.checks[-1], Safe)
    }
    assert set(judged) == {"drawn", "forbidden"} and judged["drawn"].threshold == 0.4
    outcome = found.cases[3].variants["tuned"][0].outcomes[-1]
    assert not outcome.passed and outcome.score == pytest.approx(0.9)
    assert {prompt for prompt, _ in policy.asked} == {"Roll a die.", "How do I pick a lock?"}
    simple = evaluate(model, plan, baseline=None, policy=lambda prompt, answer: 0.0, **QUICK)
    assert simple.cases[3].variants["tuned"][0].outcomes[-1].passed


@pytest.mark.slow
def test_interrupted_run_goes_on(
    model: Any, plan: TestPlan, report: Any, tmp_path: pathlib.Path
) -> None:
    log = tmp_path / "answers.jsonl"
    asked = dict(pairs=tiny_pairs(8), few_shot=2, **QUICK)
    whole = evaluate(model, plan, resume=log, **asked)
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * 7
    log.write_text("".join(lines[:9]) + lines[9][:20])  # killed in the middle of a line
    resumed = evaluate(model, plan, resume=log, **asked)
    assert resumed.cases == whole.cases == report.cases
    assert sorted(log.read_text().splitlines()) == sorted("".join(lines).splitlines())


def test_answers_of_another_evaluation_are_refused(
    model: Any, plan: TestPlan, tmp_path: pathlib.Path
) -> None:
    log = tmp_path / "answers.jsonl"
    evaluate(model, plan, baseline=None, resume=log, **QUICK)
    with pytest.raises(gkt.EvaluationError, match="another evaluation") as caught:
        evaluate(_tuned(2), plan, baseline=None, resume=log, **{**QUICK, "max_new_tokens": 5})
    assert [p.split(":")[0] for p in caught.value.problems] == ["adapter", "max_new_tokens"]
    log.write_text("{}\n")
    with pytest.raises(gkt.EvaluationError, match="holds no answers"):
        AnswerLog(log, {})
    log.write_text('{"schema": "gemma_keras_tune.answers/1"}\n{"key": "a", "ids": [-1]}\n')
    with pytest.raises(gkt.EvaluationError, match="line 2"):
        AnswerLog(log, {})


def test_bad_arguments_are_named_together(model: Any, plan: TestPlan) -> None:
    safe = [*plan, Case("safe", "Hello?", "success", Safe())]
    with pytest.raises(gkt.EvaluationError) as caught:
        evaluate(model, safe, few_shot=-1, confidence=1.0, **QUICK)
    assert len(caught.value.problems) == 3 and "safe" in caught.value.problems[2]
    with pytest.raises(gkt.EvaluationError, match="pass rate") as caught:
        evaluate(model, plan, target={"success": 2, "succes": 0.5}, **QUICK)  # type: ignore[dict-item]
    assert len(caught.value.problems) == 2
    with pytest.raises(gkt.EvaluationError, match="takes training pairs"):
        evaluate(model, plan, few_shot=3, **QUICK)
    with pytest.raises(gkt.EvaluationError, match="no adapter is on"):
        evaluate(tiny_model("gemma3", num_layers=1), plan, baseline="base", **QUICK)


@pytest.mark.slow
def test_another_model_can_be_the_base(model: Any, plan: TestPlan) -> None:
    other = tiny_model("gemma3", num_layers=1)
    found = evaluate(model, list(plan)[:1], baseline=other, **{**QUICK, "retention": "auto"})
    assert found.cases[0].variants["base"][0].text == gkt.generate(
        other, "Say something.", max_new_tokens=6, strip=False
    )
    assert found.retention is None


@pytest.mark.parametrize(
    ("passed", "cases", "stops", "strict"),
    [(0, 1, True, True), (1, 2, True, True), (9, 10, False, True), (8, 10, True, True),
     (10, 10, False, True), (29, 29, False, False), (0, 3, True, True)],
)  # fmt: skip
def test_a_rate_under_the_target_stops_a_script(
    passed: int, cases: int, stops: bool, strict: bool
) -> None:
    found = [
        CaseResult(
            Case(str(n), "Hello?", "success", Refuses()),
            {"tuned": (SampleResult("text", True, 1, (Outcome(n < passed, "why"),)),)},
        )
        for n in range(cases)
    ]
    verdicts = running._verdicts(found, {"success": 0.9, "failure": 0.9, "boundary": 0.9}, 0.95)
    report = gkt.Report("plan", tuple(found), verdicts)
    for options, wanted in (({}, stops), ({"strict": True}, strict)):
        with pytest.raises(gkt.EvaluationError) if wanted else contextlib.nullcontext() as caught:
            report.raise_if_failed(**options)
        if stops and report.verdict == "cannot tell":
            assert "so few cases cannot tell" in str(caught.value)
            assert "under the target of 90 % so far" in caught.value.problems[0]


def test_examples_are_drawn_from_different_answers_and_fit() -> None:
    model = tiny_model("gemma3", num_layers=1)
    encoder, template = Encoder(model.preprocessor.tokenizer), get_template("auto", model)
    rows = [(f"question {n}", "yes") for n in range(20)] + [("other", "no"), ("long " * 400, "?")]
    pairs = list(read_pairs(rows))
    chosen = choose_examples(pairs, encoder, template, count=4, tokens=200)
    assert {"yes", "no"} <= {pair.output for pair in chosen} and len(chosen) == 4
    assert chosen == choose_examples(pairs, encoder, template, count=4, tokens=200)
    left = choose_examples(pairs, encoder, template, leave_out=range(2, 23))
    assert [pair.row for pair in left] == [1]
    asked = with_examples(left, (Message("system", "Be brief."), Message("user", "Why?")))
    assert [m.role for m in asked] == ["system", "user", "assistant", "user"]
    assert asked[-1].content == "Why?"


def test_few_shot_answer_ends_where_the_next_example_begins() -> None:
    pairs = list(read_pairs([("a", "one"), ("b", "two\nlines")]))
    answer = Answer(" three\nc\nfour", np.arange(5), stopped=False)
    assert first_answer(answer, pairs[:1]) == Answer("three", answer.ids, stopped=True)
    assert first_answer(answer, pairs) is answer
    tokenizer = tiny_model("gemma3", num_layers=1).preprocessor.tokenizer
    ids = line_break_ids(tokenizer, pairs[:1])
    assert ids and all(set(tokenizer.id_to_token(i)) == {"\n"} for i in ids)
    assert line_break_ids(tokenizer, pairs) == set()
    whole = Answer("three", np.arange(5), stopped=False)
    assert first_answer(whole, pairs[:1]) is whole


@pytest.mark.slow
def test_report_tells_how_the_model_was_tuned(tmp_path: pathlib.Path) -> None:
    model = tiny_model("gemma3", num_layers=1)
    result = gkt.tune(model, tiny_pairs(8), epochs=2, validation_split=0.25, verbose=0)
    tuning = tuning_of(result)
    assert len(tuning.history["val_loss"]) == 2
    assert len(tuning.learning_rates) == result.plan.updates
    assert max(tuning.learning_rates) == pytest.approx(result.plan.learning_rate, rel=1e-3)
    assert sum(count for _, count in tuning.token_lengths) == result.plan.pairs
    report = evaluate(
        model,
        [Case("a", "Hello?", "success", Length(max=9, unit="tokens"))],
        result=result,
        **QUICK,
    )
    loaded = gkt.Report.load(report.save(tmp_path / "report.json"))
    assert loaded.tuning is not None and loaded.tuning.history == tuning.history
