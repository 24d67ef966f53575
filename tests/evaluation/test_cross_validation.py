"""Cross-validation: every pair held out once, by models tuned as `tune` tunes, in one program."""

import dataclasses
import json

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.errors import EvaluationError, LoraError, PairsError, PlanError
from gemma_keras_tune.evaluation import cross_validation
from gemma_keras_tune.evaluation.checks import Contains, Exact, JsonSchema, Length
from gemma_keras_tune.evaluation.cross_validation import assign_folds, cross_validate
from gemma_keras_tune.evaluation.statistics import mcnemar, wilson_interval
from gemma_keras_tune.generation.answers import compiled_programs
from gemma_keras_tune.training import model as model_module
from gemma_keras_tune.training import planning
from gemma_keras_tune.training.planning import resolve_settings

# The same answer every time: what was learnt from some pairs holds for the others.
PAIRS = [(f"part number for roll {i}", "yes") for i in range(10)]
SETTINGS = dict(
    method="full", epochs=12, batch_size=4, learning_rate=1e-2, template="{prompt}\n{response}"
)


def plan_settings(model, pairs, longest, **given):
    return planning.plan_settings(model, pairs, longest, resolve_settings(given))


def weights(model):
    return [np.asarray(v).copy() for v in model.variables]


@pytest.fixture(scope="module")
def done():
    """A run in three parts, and all that is to be seen of it from outside."""
    model = testing.tiny_model()
    before = weights(model)
    flags = [v.trainable for v in model.variables]
    traces = []
    patch = pytest.MonkeyPatch()
    real = model_module.token_cross_entropy
    patch.setattr(
        model_module, "token_cross_entropy", lambda *a, **k: traces.append(1) or real(*a, **k)
    )
    try:
        result = cross_validate(model, PAIRS, folds=3, verbose=0, seed=1, **SETTINGS)
    finally:
        patch.undo()
    return model, before, flags, len(traces), result


@pytest.mark.slow
def test_every_pair_is_held_out_once(done):
    result = done[-1]
    assert [row.row for row in result.rows] == list(range(1, 11))
    assert [row.prompt for row in result.rows] == [p for p, _ in PAIRS]
    assert {row.expected for row in result.rows} == {"yes"}
    assert sorted(np.bincount([row.fold for row in result.rows])) == [3, 3, 4]
    assert result.folds == 3 and len(result.losses) == len(result.base_losses) == 3


@pytest.mark.slow
def test_what_was_learnt_from_the_others_holds(done):
    result = done[-1]
    assert result.passed == 10 and result.base_passed == 0
    assert all(row.tuned.text == "yes" and row.tuned.stopped for row in result.rows)
    assert max(result.losses) < 2 < 5 < min(result.base_losses)
    assert result.interval == wilson_interval(10, 10)
    assert result.p_value == mcnemar([False] * 10, [True] * 10)


@pytest.mark.slow
def test_the_model_is_left_as_it_came(done):
    model, before, flags, _, _ = done
    assert gkt.lora_config(model) is None and gkt.template_of(model) is None
    assert [v.trainable for v in model.variables] == flags
    for old, new in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_one_program_serves_all_parts(done):
    model, _, _, traces, result = done
    assert len(result.plan.shapes) == 1
    assert traces == 2, "one to train, one to measure the loss"
    assert compiled_programs(model) == 1, "one to ask base and tuned with"


@pytest.mark.slow
def test_the_plan_is_that_of_the_largest_rest(done):
    plan = done[-1].plan
    assert (plan.pairs, plan.epochs, plan.batch_size, plan.method) == (7, 12, 4, "full")
    assert plan.steps == 2 * 12 and plan.seed == 1 and plan.template == "{prompt}\n{response}"


@pytest.mark.slow
def test_told_in_words_and_as_data(done):
    result = done[-1]
    words = str(result)
    assert "10 of 10 held-out pairs pass: 100 % (95 % interval 72 to 100 %)" in words
    assert "tuned 3 times on the others" in words
    assert "The base passes 0 of them (p = 0.002)" in words
    data = json.loads(json.dumps(result.to_dict()))
    assert data["passed"] == 10 and data["low"] == result.interval[0] and len(data["rows"]) == 10
    assert data["rows"][0]["tuned"]["text"] == "yes" and data["plan"]["epochs"] == 12


@pytest.mark.slow
def test_each_part_is_tuned_as_tune_tunes():
    """The losses are those of `tune` on the others, with the same plan."""
    model = testing.tiny_model()
    before = weights(model)
    settings = dict(
        rank=4, target_modules="attention", use_rslora=True, epochs=3, batch_size=4,
        learning_rate=1e-2, template="{prompt}\n{response}",
    )  # fmt: skip
    plan = plan_settings(model, len(PAIRS), 64, seed=1, **settings)
    result = cross_validate(model, PAIRS, folds=2, seed=1, verbose=0, baseline=False, plan=plan)
    assert result.plan.settings() == plan.settings()
    for part in range(2):
        rest = [PAIRS[r.row - 1] for r in result.rows if r.fold != part]
        held = [PAIRS[r.row - 1] for r in result.rows if r.fold == part]
        tuned = testing.tiny_model()
        gkt.tune(tuned, rest, verbose=0, plan=plan)
        trainer = gkt.TuningModel(tuned)
        trainer.compile("sgd")
        data = gkt.make_dataset(tuned, held, batch_size=4, shuffle=False)
        loss = trainer.evaluate(data, verbose=0, return_dict=True)["loss"]
        np.testing.assert_allclose(result.losses[part], loss, rtol=1e-4)
    assert gkt.lora_config(model) is None
    for old, new in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(old, new)


class _Planned(Exception):
    """Nothing is to be compiled."""


@pytest.fixture
def printed(monkeypatch, capsys):
    """The plan as it is printed, without tuning after it."""

    def stop(*args, **options):
        raise _Planned

    monkeypatch.setattr(cross_validation, "generate_answers", stop)

    def plan(model, pairs=PAIRS, **options):
        with pytest.raises(_Planned):
            cross_validate(model, pairs, folds=2, **options)
        return capsys.readouterr().out

    return plan


@pytest.mark.filterwarnings("ignore::gemma_keras_tune.errors.PairsWarning")
def test_settings_of_a_plan_hold_as_in_tune(printed):
    model = testing.tiny_model()
    long = [*PAIRS, ("a question that is longer than all the others by far, and then some", "yes")]
    plan = plan_settings(
        model, 10, 64, rank=3, target_modules=("v_proj", "q_proj"), use_rslora=True,
        epochs=2, template="{prompt} -> {response}", overlong="drop", sequence_length=24,
        validation_split=0.1,
    )  # fmt: skip
    text = printed(model, long, plan=plan)
    assert "LoRA rank 3, alpha 3, rank-stabilized on v_proj, q_proj, 2 epochs over 5" in text
    assert "template '{prompt} -> {response}'" in text and "1 rows left out as asked: 11" in text
    # Settings that are left to be chosen are those of the plan, as `tune` has it.
    assert printed(model, long, plan=plan, target_modules="auto", overlong="drop") == text
    assert "alpha 8 on all" in printed(model, target_modules="auto", use_rslora="auto")
    with pytest.raises(PlanError, match="contradict the plan") as caught:
        cross_validate(model, long, plan=plan, rank=4, template="chatml", overlong="error")
    assert len(caught.value.problems) == 3
    with pytest.raises(PlanError, match="stops early"):
        cross_validate(model, long, plan=dataclasses.replace(plan, early_stopping=2))
    with pytest.raises(PlanError, match="must be a `Plan`"):
        cross_validate(model, long, plan={"rank": 3})
    with pytest.raises(PairsError, match="11"):
        cross_validate(model, long, sequence_length=24, verbose=0)


@pytest.mark.slow
def test_full_tuning_leaves_one_out_and_puts_the_weights_back():
    model = testing.tiny_model()
    before = weights(model)
    pairs = [("a", "yes"), ("b", "yes"), ("A ", "yes"), ("c", "yes")]
    result = cross_validate(
        model, pairs, folds="leave-one-out", method="full", epochs=15, learning_rate=1e-2,
        batch_size=2, baseline=False, verbose=0,
    )  # fmt: skip
    assert result.folds == 3, "two pairs have the same prompt, and are held out together"
    assert result.rows[0].fold == result.rows[2].fold
    assert result.passed == 4 and result.base_passed is None and result.p_value is None
    assert all(row.base is None for row in result.rows) and "base" not in result.words
    for old, new in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_checks_of_ones_own_and_a_model_by_its_parts():
    model = testing.tiny_model()
    pairs = [("a", '{"x": 1}'), ("b", '{"x": 2}'), ("c", "plain")]
    seen = []

    def checks(pair):
        seen.append(pair.row)
        return [Contains("never said"), Length(1000)]

    quick = dict(folds=3, epochs=1, batch_size=2, verbose=0, max_new_tokens=4)
    result = cross_validate(model, pairs, checks=checks, **quick)
    assert seen == [1, 2, 3] and result.passed == 0
    assert [len(row.tuned.outcomes) for row in result.rows] == [2, 2, 2]
    assert "✗ row 1: missing" in str(result)
    result = cross_validate(model, pairs, checks=Length(1000), confidence=0.9, **quick)
    assert result.passed == 3 and result.interval == wilson_interval(3, 3, 0.9)
    result = cross_validate(model, pairs, baseline=False, **quick)
    assert "it is not JSON" in result.rows[0].tuned.outcomes[0].reason
    assert 'it is not "plain"' in result.rows[2].tuned.outcomes[0].reason


def test_answers_that_are_data_are_compared_as_data():
    from gemma_keras_tune.evaluation.cross_validation import _checks_of

    def check(output):
        found = _checks_of(next(iter(gkt.read_pairs([("p", output)]))), "auto")
        return found[0]

    assert check('{"a": [1]}') == JsonSchema({"const": {"a": [1]}})
    assert check("42") == Exact("42") and check("word") == Exact("word")


@pytest.mark.parametrize(("rows", "folds"), [(10, 3), (20, 5), (7, 7), (100, 10)])
def test_parts_are_of_about_the_same_size(rows, folds):
    parts = assign_folds(list(range(rows)), folds, seed=0)
    sizes = np.bincount(parts, minlength=folds)
    assert sizes.sum() == rows and sizes.max() - sizes.min() <= 1
    assert (parts == assign_folds(list(range(rows)), folds, seed=0)).all()
    if folds < rows:
        assert (parts != assign_folds(list(range(rows)), folds, seed=1)).any()


def test_rows_with_the_same_key_stay_together():
    keys = ["a", "b", "a", "c", "d", "a", "b", "e", "f"]
    for seed in range(5):
        parts = assign_folds(keys, 3, seed=seed)
        for key in set(keys):
            assert len({p for p, k in zip(parts, keys, strict=True) if k == key}) == 1
        assert np.bincount(parts).tolist() == [3, 3, 3]
    assert len(set(assign_folds(keys, "leave-one-out"))) == 6


@pytest.mark.parametrize("folds", [1, 0, -1, 4, True, 2.0, "all", None])
def test_parts_there_cannot_be(folds):
    with pytest.raises(EvaluationError, match="from 2 to 3, the number of different prompts"):
        assign_folds(["a", "b", "c", "a"], folds)


def test_what_cannot_be_validated_is_refused_before_any_work():
    model = testing.tiny_model()
    with pytest.raises(EvaluationError, match="cannot be passed on") as caught:
        cross_validate(model, PAIRS, callbacks=[], validation_split=0.1)
    assert caught.value.problems == ("callbacks", "validation_split")
    with pytest.raises(EvaluationError, match="cannot begin") as caught:
        cross_validate(model, PAIRS, checks=["x"], max_new_tokens=0, confidence=95, seed=-1)
    names = [problem.split("`")[1] for problem in caught.value.problems]
    assert names == ["checks", "max_new_tokens", "confidence", "seed"]
    for checks, words in (
        (lambda pair: "x", "row 1: it gave 'x'"),
        (lambda pair: 1 / 0, "row 10: it raised ZeroDivisionError"),
        (lambda pair: [], "row 2: it gave []"),
    ):
        with pytest.raises(EvaluationError, match="checks for every pair") as caught:
            cross_validate(model, PAIRS, checks=checks, verbose=0)
        assert len(caught.value.problems) == 10 and words in str(caught.value)
    with pytest.raises(EvaluationError, match="from 2 to 2"):
        cross_validate(model, PAIRS[:2], verbose=0)
    with pytest.raises(PairsError):
        cross_validate(model, [("a", "b"), ("c", "")], folds=2, verbose=0)
    with pytest.raises(PlanError, match="epochs"):
        cross_validate(model, PAIRS, epochs=0, verbose=0)
    gkt.enable_lora(model, 2, verbose=0)
    with pytest.raises(LoraError, match="may have been tuned on the pairs"):
        cross_validate(model, PAIRS)
