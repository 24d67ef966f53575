"""The declarations of settings, and all that comes from them."""

import dataclasses
import inspect
import pathlib
import typing

import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.training import planning
from gemma_keras_tune.training.planning import resolve_settings
from gemma_keras_tune.training.settings import (
    DEFAULTS,
    SETTINGS,
    Settings,
    TrainingSettings,
    check_settings,
    template_setting,
)

PLAIN = "{prompt}\n{response}"


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model()


def refused(**settings):
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.tune("package://never_opened", [], verbose=0, **settings)
    return caught.value


def plan_settings(model, pairs, longest, **given):
    return planning.plan_settings(model, pairs, longest, resolve_settings(given))


def test_arguments_of_a_wrong_type_are_reported_together_before_the_model_is_opened():
    wrong = dict(
        seed=-1, target_modules=5, callbacks=None, alpha="high", epochs=True, overlong="cut",
        validation_split=1.0, early_stopping=0, use_rslora=1, method="dora",
        optimizer="adamm", plan={"epochs": 3},
    )  # fmt: skip
    problems = refused(**wrong).problems
    assert len(problems) == len(wrong)
    for name in wrong:
        assert sum(problem.startswith(f"`{name}`") for problem in problems) == 1, name


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"target_modules", "template"}))
@pytest.mark.parametrize("value", [{}, {"class_name": "CosineDecay"}, object(), b"1", [1]])
def test_values_of_no_sense_are_refused(name, value):
    with pytest.raises(gkt.errors.PlanError, match=f"`{name}`"):
        check_settings({name: value})


def test_numbers_of_numpy_are_numbers(model):
    plan = plan_settings(
        model, 8, 20, epochs=np.int64(2), learning_rate=np.float32(0.5), seed=np.int32(3)
    )
    assert (plan.epochs, plan.learning_rate, plan.seed) == (2, 0.5, 3)
    assert type(plan.epochs) is type(plan.seed) is int and type(plan.learning_rate) is float


def test_names_of_targets_may_come_from_any_iterable():
    assert check_settings({"target_modules": iter(["q_proj", "v_proj"])})["target_modules"] == (
        "q_proj",
        "v_proj",
    )


def by_function(messages):
    return messages[-1].content + "\n"


def test_a_template_is_kept_by_name_or_text_where_it_has_one(model):
    named = {"gemma3": "gemma3", "plain": "plain", PLAIN: PLAIN}
    for spec, kept in named.items():
        assert template_setting(gkt.get_template(model, spec)) == kept
    function = template_setting(gkt.get_template(model, by_function))
    assert isinstance(function, gkt.Template)
    assert template_setting(function) == function == template_setting(by_function)


TAKERS = (gkt.tune, gkt.make_plan, gkt.cross_validate)


@pytest.mark.parametrize("function", TAKERS)
def test_every_setting_is_in_the_signature_and_the_docstring(function):
    parameters = inspect.signature(function).parameters
    names = TrainingSettings if function is gkt.cross_validate else Settings
    for name in names.__annotations__:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == SETTINGS[name].default
        text = " ".join(inspect.getdoc(function).split())
        assert f"{name}: {SETTINGS[name].text}" in text
    assert "settings" not in parameters


def test_a_plan_has_every_setting_and_its_type_checkers_know_them():
    fields = {field.name: field.default for field in dataclasses.fields(gkt.Plan)}
    assert {name: fields[name] for name in SETTINGS} == DEFAULTS
    assert set(Settings.__annotations__) == set(SETTINGS)
    for function in TAKERS:
        (hint,) = (v for k, v in function.__annotations__.items() if k == "settings")
        assert typing.get_origin(hint) is typing.Unpack


def test_a_name_that_is_no_setting_is_told_with_the_nearest():
    problems = refused(epoch=3, prompt_column="x", epochs=0).problems
    assert problems == (
        "`epoch` is not a setting: `epochs` is",
        "`prompt_column` is not a setting",
        "`epochs` must be 'auto' or an integer of at least 1. Received: 0",
    )


def test_the_table_of_the_documentation_is_that_of_the_declarations():
    page = (pathlib.Path(__file__).parents[2] / "docs/settings.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{name}` | {setting.help} | {setting.auto or f'`{setting.default!r}`'} |"
        for name, setting in SETTINGS.items()
    ]


def test_a_schedule_has_its_own_warm_up():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    settings = check_settings({"learning_rate": schedule})
    assert settings["warmup_steps"] == 0
    assert settings["learning_rate"]["class_name"] == "CosineDecay"
    problem = refused(learning_rate=schedule, warmup_steps=3).problems[0]
    assert problem.startswith("`warmup_steps` must be 'auto' or 0 where `learning_rate` is a")


def test_a_schedule_that_cannot_be_written_down_is_refused():
    class Own(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

    (problem,) = refused(learning_rate=Own()).problems
    assert problem.startswith("`learning_rate`: a schedule needs `get_config`")
