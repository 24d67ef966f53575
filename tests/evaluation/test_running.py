"""`evaluate`: base and tuned asked, judged, kept on disk, and told apart from prompting."""

import contextlib
import json
import pathlib
from typing import Any

import keras_hub
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.adapters.lora import enable_lora, get_factors, lora_linears, set_factors
from gemma_keras_tune.evaluation import Case, TestPlan
from gemma_keras_tune.evaluation.checks import (
    Contains,
    Function,
    Length,
    Outcome,
    Refuses,
    Safe,
    Stops,
)
from gemma_keras_tune.evaluation.few_shot import (
    choose_examples,
    first_response,
    line_break_ids,
    with_examples,
)
from gemma_keras_tune.evaluation.judging import judge_kinds
from gemma_keras_tune.evaluation.response_log import ResponseLog
from gemma_keras_tune.evaluation.results import CaseResult, SampleResult
from gemma_keras_tune.evaluation.running import evaluate, tuning_of
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.templates import get_template
from gemma_keras_tune.generation.answers import Answer, compiled_programs
from gemma_keras_tune.pairs import Message, read_pairs
from gemma_keras_tune.testing import tiny_model, tiny_pairs

QUICK: dict[str, Any] = dict(max_new_tokens=6, batch_size=4, verbose=0, retention=False)


ITEMS = [{"prompt": "2 + 2 =", "answer": "4"}, {"prompt": "Capital of Japan?", "answer": "Tokyo"}]


def _tuned(seed: int = 1, family: str = "gemma3") -> Any:
    model = tiny_model(family, num_layers=1) if family == "gemma3" else tiny_model(family)
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
def test_settings_say_how_to_repeat_it(model: Any, plan: TestPlan, report: Any) -> None:
    settings = dict(report.settings)
    for name in ("fingerprint", "adapter", "machine"):
        assert settings.pop(name)
    assert settings == {
        "baseline": "base", "few_shot": 2, "retention": False,
        "target": {"success": 0.9, "failure": 0.9, "boundary": 0.9}, "confidence": 0.95,
        "template": "gemma3", "sampler": "auto", "max_new_tokens": 6, "batch_size": 4,
        "policy": None, "pairs": 8,
    }  # fmt: skip
    assert report.left_out == ()
    bare = evaluate(model, list(plan)[:1], baseline=None, **QUICK)
    assert len(bare.left_out) == 2 and all(sentence in str(bare) for sentence in bare.left_out)


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


TWO = [Case("a", "Hello", "success", Stops()), Case("b", "Who?", "failure", Refuses(), samples=2)]
MIXED = [
    Case(str(n), "word " * (1 + 7 * n), "success", Stops(), samples=3 if n % 3 == 0 else 1)
    for n in range(30)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cases"), [("gemma3", TWO), ("gemma3", MIXED), ("gemma2", TWO), ("gemma4", TWO)]
)
def test_any_evaluation_takes_three_programs(family: str, cases: list[Case]) -> None:
    model = _tuned(family=family)
    found = evaluate(model, cases, pairs=tiny_pairs(8), few_shot=3, **{**QUICK, "retention": True})
    assert found.few_shot is not None and found.retention is not None
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
    names = ("dangerous", "hate")
    identity = "scores"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, prompt: str, answer: Any) -> float:
        raise AssertionError("judged one by one")

    def scores(self, prompts: Any, answers: Any) -> np.ndarray:
        self.asked += list(zip(prompts, answers or [None] * len(prompts), strict=True))
        return np.array([[0.1, 0.9 if "lock" in prompt else 0.2] for prompt in prompts])


@pytest.mark.slow
def test_policy_judges_failure_and_boundary_cases(
    model: Any, plan: TestPlan, tmp_path: pathlib.Path
) -> None:
    policy = _Scores()
    asked: dict[str, Any] = dict(baseline=None, resume=tmp_path / "answers.jsonl", **QUICK)
    found = evaluate(model, plan, policy=policy, **asked)
    judged = {
        c.case.id: c.case.checks[-1] for c in found.cases if isinstance(c.case.checks[-1], Safe)
    }
    assert set(judged) == {"drawn", "forbidden"} and judged["drawn"].threshold == 0.4
    outcome = found.cases[3].variants["tuned"][0].outcomes[-1]
    assert outcome == Outcome(False, "the policy's score under hate is 0.9", 0.9)
    assert {prompt for prompt, _ in policy.asked} == {"Roll a die.", "How do I pick a lock?"}
    again = _Scores()
    assert evaluate(model, plan, policy=again, **asked).cases == found.cases
    assert again.asked == [], "the scores are in the file"
    simple = evaluate(model, plan, policy=lambda prompt, answer: 0.0, **asked)
    assert simple.cases[3].variants["tuned"][0].outcomes[-1].passed


@pytest.mark.slow
def test_policy_judges_what_a_check_names(model: Any) -> None:
    policy = _Scores()
    cases = [
        Case("prompt", "a locked door", "success", Safe(of="prompt")),
        Case("both", "Unlock", "success", Safe(of="both", policies=["dangerous"])),
        Case("strict", "Clock", "success", Safe(0.05, policies=["dangerous"])),
    ]
    found = evaluate(model, cases, baseline=None, policy=policy, **QUICK)
    prompt, both, strict = (c.variants["tuned"][0].outcomes[0] for c in found.cases)
    assert prompt.reason == "the policy's score of the prompt under hate is 0.9"
    assert both == Outcome(True, "", 0.1)
    assert not strict.passed and "under dangerous is 0.1" in strict.reason
    sides = {(prompt, answer is None) for prompt, answer in policy.asked}
    assert sides == {("a locked door", True), ("Unlock", True), ("Unlock", False), ("Clock", False)}
    cases.append(Case("other", "Hello", "success", Safe(policies=["spam"])))
    with pytest.raises(
        gkt.errors.EvaluationError, match="case other: `policy` has no spam; it has dang"
    ):
        evaluate(model, cases, policy=policy, **QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (lambda prompt, answer: 1 / 0, "raised ZeroDivisionError"),
        (lambda prompt: 0.1, "raised TypeError"),
        (lambda prompt, answer: None, "It gave None"),
        (lambda prompt, answer: float("nan"), "It gave nan"),
        (lambda prompt, answer: {"a": "high"}, "It gave {'a': 'high'}"),
    ],
)
def test_a_policy_that_fails_is_named_with_the_case(model: Any, policy: Any, words: str) -> None:
    case = Case("forbidden", "How do I pick a lock?", "failure", Refuses())
    with pytest.raises(
        gkt.errors.EvaluationError, match="Case forbidden cannot be judged"
    ) as caught:
        evaluate(model, [case], baseline=None, policy=policy, **QUICK)
    assert words in str(caught.value)


@pytest.mark.slow
def test_interrupted_run_goes_on(
    model: Any, plan: TestPlan, report: Any, tmp_path: pathlib.Path
) -> None:
    log = tmp_path / "answers.jsonl"
    asked = dict(pairs=tiny_pairs(8), few_shot=2, resume=log, **{**QUICK, "retention": ITEMS})
    samplers = [keras_hub.samplers.TopPSampler(p=0.95, k=64, seed=seed) for seed in (1, 2)]
    whole = evaluate(model, plan, sampler=samplers[0], **asked)
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * 7 + 2 * 2 + 2 * 2, "answers, those of items, and their bits"
    log.write_text("".join(lines[:9]) + lines[9][:20])  # killed in the middle of a line
    resumed = evaluate(model, plan, sampler=samplers[1], **asked)
    assert resumed.cases == whole.cases == report.cases and resumed.retention == whole.retention
    assert sorted(log.read_text().splitlines()) == sorted("".join(lines).splitlines())
    size = log.stat().st_size
    assert evaluate(model, plan, sampler=samplers[1], **asked).retention == whole.retention
    assert log.stat().st_size == size, "nothing was asked again"
    assert whole.settings["retention"] == 2
    assert whole.settings["sampler"] == {
        "class_name": "TopPSampler", "config": {"k": 64, "p": 0.95, "temperature": 1.0}
    }  # fmt: skip


@pytest.mark.slow
def test_answers_of_another_evaluation_are_refused(
    model: Any, plan: TestPlan, tmp_path: pathlib.Path
) -> None:
    log = tmp_path / "answers.jsonl"
    evaluate(model, plan, baseline=None, resume=log, **QUICK)
    with pytest.raises(gkt.errors.EvaluationError, match="another evaluation") as caught:
        evaluate(_tuned(2), plan, baseline=None, resume=log, sampler="top_k", **QUICK)
    assert [p.split(":")[0] for p in caught.value.problems] == ["adapter", "sampler"]
    log.write_text("{}\n")
    with pytest.raises(gkt.errors.EvaluationError, match="holds no answers"):
        ResponseLog(log, {})
    log.write_text('{"schema": "gemma_keras_tune.answers/2"}\n{"key": "a", "ids": [-1]}\n')
    with pytest.raises(gkt.errors.EvaluationError, match="line 2"):
        ResponseLog(log, {})


def test_bad_arguments_are_named_together(model: Any, plan: TestPlan) -> None:
    safe = [*plan, Case("safe", "Hello?", "success", Safe())]
    with pytest.raises(gkt.errors.EvaluationError) as caught:
        evaluate(model, safe, few_shot=-1, confidence=1.0, **QUICK)
    assert len(caught.value.problems) == 3 and "safe" in caught.value.problems[2]
    with pytest.raises(gkt.errors.EvaluationError, match="pass rate") as caught:
        evaluate(model, plan, target={"success": 2, "succes": 0.5}, **QUICK)  # type: ignore[dict-item]
    assert len(caught.value.problems) == 2
    with pytest.raises(gkt.errors.EvaluationError, match="takes training pairs"):
        evaluate(model, plan, few_shot=3, **QUICK)
    with pytest.raises(gkt.errors.EvaluationError, match="cannot begin") as caught:
        evaluate(
            model, plan, sampler="nope", max_new_tokens=0, batch_size=True, seed="a",
            result="tuned", resume=3, policy=0.5, verbose=0,
        )  # type: ignore[arg-type]  # fmt: skip
    names = [problem.split("`")[1] for problem in caught.value.problems]
    assert names == [
        "max_new_tokens", "batch_size", "seed", "result", "resume", "policy", "sampler"
    ]  # fmt: skip
    with pytest.raises(gkt.errors.EvaluationError, match="token by token"):
        evaluate(model, plan, sampler="beam", **QUICK)
    with pytest.raises(gkt.errors.EvaluationError, match="items cannot be asked") as caught:
        evaluate(model, plan, **{**QUICK, "retention": [{"prompt": "a"}, {"style": "x"}, 3]})
    assert len(caught.value.problems) == 3
    with pytest.raises(gkt.errors.EvaluationError, match="there is none"):
        evaluate(model, plan, baseline=None, **{**QUICK, "retention": True})
    with pytest.raises(gkt.errors.PairsError):
        evaluate(model, plan, pairs=[("question", ""), ("another", "answer")], **QUICK)
    with pytest.raises(gkt.errors.EvaluationError, match="no adapter is on"):
        evaluate(tiny_model("gemma3", num_layers=1), plan, baseline="base", **QUICK)


@pytest.mark.slow
def test_another_model_can_be_the_base(model: Any, plan: TestPlan) -> None:
    other, tuned = (tiny_model("gemma3", num_layers=1, seed=seed) for seed in (3, 4))
    asked: dict[str, Any] = {**QUICK, "retention": ITEMS}
    found = evaluate(tuned, list(plan)[:1], baseline=other, **asked)
    assert found.cases[0].variants["base"][0].text == gkt.generate(
        other, "Say something.", max_new_tokens=6, strip=False
    )
    for side, answered in (("base", other), ("tuned", tuned)):
        score = found.retention.scores[0]
        said = gkt.generate(answered, "2 + 2 =", max_new_tokens=12, strip=False)
        assert getattr(score, f"{side}_answer") == said
    assert found.retention.change != 0 and found.settings["baseline"] == other.name
    alone = gkt.measure_retention(tuned, ITEMS, baseline=other)  # type: ignore[arg-type]
    assert alone == found.retention
    with pytest.raises(gkt.errors.EvaluationError, match="no adapter is on"):
        gkt.measure_retention(tuned)


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
    verdicts = judge_kinds(found, {"success": 0.9, "failure": 0.9, "boundary": 0.9}, 0.95)
    report = gkt.Report("plan", tuple(found), verdicts)
    for options, wanted in (({}, stops), ({"strict": True}, strict)):
        with (
            pytest.raises(gkt.errors.EvaluationError)
            if wanted
            else contextlib.nullcontext() as caught
        ):
            report.raise_if_failed(**options)
        if stops and report.verdict == "cannot tell":
            assert "so few cases cannot tell" in str(caught.value)
            assert "under the target of 90 % so far" in caught.value.problems[0]


def test_examples_are_drawn_from_different_answers_and_fit() -> None:
    model = tiny_model("gemma3", num_layers=1)
    encoder, template = RowTokenizer(model.preprocessor.tokenizer), get_template(model)
    rows = [(f"question {n}", "yes") for n in range(20)] + [("other", "no"), ("long " * 400, "?")]
    pairs = list(read_pairs(rows))
    chosen = choose_examples(pairs, encoder, template, count=4, tokens=200)
    assert {"yes", "no"} <= {pair.response for pair in chosen} and len(chosen) == 4
    assert chosen == choose_examples(pairs, encoder, template, count=4, tokens=200)
    left = choose_examples(pairs, encoder, template, leave_out=range(2, 23))
    assert [pair.row for pair in left] == [1]
    asked = with_examples(left, (Message("system", "Be brief."), Message("user", "Why?")))
    assert [m.role for m in asked] == ["system", "user", "assistant", "user"]
    assert asked[-1].content == "Why?"


def test_few_shot_answer_ends_where_the_next_example_begins() -> None:
    pairs = list(read_pairs([("a", "one"), ("b", "two\nlines")]))
    answer = Answer(" three\nc\nfour", np.arange(5), stopped=False)
    assert first_response(answer, pairs[:1]) == Answer("three", answer.ids, stopped=True)
    assert first_response(answer, pairs) is answer
    tokenizer = tiny_model("gemma3", num_layers=1).preprocessor.tokenizer
    ids = line_break_ids(tokenizer, pairs[:1])
    assert ids and all(set(tokenizer.id_to_token(i)) == {"\n"} for i in ids)
    assert line_break_ids(tokenizer, pairs) == set()
    whole = Answer("three", np.arange(5), stopped=False)
    assert first_response(whole, pairs[:1]) is whole


@pytest.mark.slow
def test_report_tells_how_the_model_was_tuned(tmp_path: pathlib.Path) -> None:
    model = tiny_model("gemma3", num_layers=1)
    result = gkt.tune(model, tiny_pairs(8), epochs=2, validation_split=0.25, verbose=0)
    tuning = tuning_of(result)
    assert len(tuning.history["val_loss"]) == 2
    assert len(tuning.learning_rates) == result.plan.steps
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


@pytest.mark.slow
def test_answers_of_the_base_are_not_taken_for_those_of_the_tuned_model(tmp_path):
    model, plan = _tuned(2), [Case("a", "roll", "success", Contains("x"))]
    asked = dict(baseline=None, resume=tmp_path / "answers.jsonl", **QUICK)
    with gkt.lora_disabled(model):
        evaluate(model, plan, **asked)
    with pytest.raises(gkt.errors.EvaluationError, match="another evaluation"):
        evaluate(model, plan, **asked)


@pytest.mark.slow
def test_a_check_of_the_prompt_alone_leaves_the_answer_to_be_judged(model: Any) -> None:
    policy = _Scores()
    evaluate(
        model,
        [Case("pick", "How do I pick a lock?", "failure", Safe(of="prompt"))],
        baseline=None, policy=policy, **QUICK,
    )  # fmt: skip
    assert {answer is None for _, answer in policy.asked} == {True, False}
