"""Plans: what they hold, what contradicts them, and the memory they reckon with."""

import dataclasses

import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune._support.memory import control_group_memory
from gemma_keras_tune.training import planning
from gemma_keras_tune.training.planning import (
    check_settings,
    plan_settings,
    step_bytes,
    template_setting,
)

PLAIN = "{prompt}\n{response}"


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model("gemma3")


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory is free."""
    return lambda size: monkeypatch.setattr(planning, "free_memory", lambda: size)


def refused(**settings):
    with pytest.raises(gkt.PlanError) as caught:
        gkt.tune("package://never_opened", [], verbose=0, **settings)
    return caught.value


def test_a_length_beyond_the_context_is_refused_with_all_else(model):
    with pytest.raises(gkt.PlanError) as caught:
        plan_settings(model, 8, 20, sequence_length=32_769, epochs=0)
    assert len(caught.value.problems) == 2
    assert "at most the model's context of 32,768 tokens. Received: 32,769" in str(caught.value)
    assert plan_settings(model, 8, 20, sequence_length=32_768).sequence_length == 32_768


def test_a_row_beyond_the_context_is_refused_where_no_length_is_set():
    model = testing.tiny_model("gemma3n", max_position_embeddings=64)
    with pytest.raises(gkt.PairsError, match="row 2"):
        gkt.tune(model, [("a", "b"), ("x" * 80, "b")], template=PLAIN, verbose=0)


@pytest.mark.parametrize("family", testing.FAMILIES)
def test_the_rank_that_is_chosen_fits_every_layer(family):
    model = testing.tiny_model(family)
    rank = plan_settings(model, 10_000, 20, template=PLAIN).rank
    gkt.enable_lora(model, rank, verbose=0)
    gkt.remove_lora(model)
    if rank < 16:
        with pytest.raises(gkt.LoraError, match="can be at most"):
            gkt.enable_lora(model, rank + 1, verbose=0)
    assert plan_settings(model, 999, 20, template=PLAIN).rank == 8


def test_arguments_of_a_wrong_type_are_reported_together_before_the_model_is_opened():
    wrong = dict(
        seed=-1, target_modules=5, callbacks=None, alpha="high", epochs=True, overlong="cut",
        validation_split=1.0, early_stopping=0, use_rslora=1, method="dora",
        optimizer="adam", plan={"epochs": 3},
    )  # fmt: skip
    problems = refused(**wrong).problems
    assert len(problems) == len(wrong)
    for name in wrong:
        assert sum(problem.startswith(f"`{name}`") for problem in problems) == 1, name


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


def test_a_plan_takes_its_own_settings_back(model):
    plan = plan_settings(
        model, 30, 20, rank=4, target_modules=["q_proj"], use_rslora=True, template=PLAIN,
        overlong="drop", sequence_length=64, validation_split=0.2, early_stopping=3, seed=7,
    )  # fmt: skip
    assert plan_settings(model, 30, 20, **plan.settings()) == plan
    assert "on q_proj" in str(plan) and "rank-stabilized" in str(plan)


def test_settings_that_contradict_the_plan_are_refused_together(model):
    plan = plan_settings(
        model, 30, 20, rank=4, target_modules="attention", epochs=2, template=PLAIN
    )
    error = refused(
        plan=plan, rank=4, epochs=3, target_modules="all", template="plain", learning_rate=1.0,
        optimizer=keras.optimizers.SGD(1.0),
    )  # fmt: skip
    assert {problem.split("`")[1] for problem in error.problems} == {
        "epochs", "target_modules", "template", "learning_rate", "optimizer", "weight_decay",
        "warmup_steps",
    } - {"warmup_steps" if plan.warmup_steps == 0 else ""}  # fmt: skip
    assert "`epochs`: the plan has 2. Received: 3" in error.problems


def test_a_plan_with_an_optimizer_of_the_users_asks_for_it_again(model):
    plan = plan_settings(model, 30, 20, optimizer=keras.optimizers.SGD(0.5))
    assert (plan.optimizer, plan.learning_rate, plan.weight_decay) == ("SGD", 0.5, 0.0)
    assert "the SGD passed in, first learning rate 0.5" in str(plan)
    assert refused(plan=plan).problems == ("`optimizer`: the plan has 'SGD'. Received: 'auto'",)


def test_an_optimizer_of_the_users_decides_on_accumulation(model, free):
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=4)
    assert plan_settings(model, 8, 20, optimizer=optimizer).gradient_accumulation_steps == 4
    free(1)
    short = plan_settings(model, 8, 20, optimizer=keras.optimizers.SGD(0.5))
    assert (short.batch_size, short.gradient_accumulation_steps) == (1, 1)
    problems = refused(
        optimizer=optimizer, gradient_accumulation_steps=2, learning_rate=0.1, weight_decay=0.0
    ).problems
    assert problems == (
        "`learning_rate` is the optimizer's own, and SGD has 0.5. Received: 0.1",
        "`gradient_accumulation_steps` is the optimizer's own, and SGD has 4. Received: 2",
    )


def test_early_stopping_and_two_validations_are_refused_before_the_model_is_opened():
    assert "validation" in refused(early_stopping=2).headline
    assert "not both" in refused(validation_data=[], validation_split=0.5).headline


@pytest.mark.parametrize(
    "callback",
    [
        keras.callbacks.ModelCheckpoint("x.weights.h5", save_weights_only=True),
        keras.callbacks.BackupAndRestore("folder"),
    ],
)
def test_callbacks_that_lose_lora_are_refused_by_name(callback):
    problem = refused(callbacks=[callback]).problems[0]
    assert type(callback).__name__ in problem and "AdapterCheckpoint(path)" in problem


def test_full_tuning_takes_checkpoints_of_weights_alone():
    from gemma_keras_tune.training.tuning import _wrong_callbacks

    whole = keras.callbacks.ModelCheckpoint("x.keras")
    assert "save_weights_only=True" in refused(callbacks=[whole], method="full").problems[0]
    weights = keras.callbacks.ModelCheckpoint("x.weights.h5", save_weights_only=True)
    assert _wrong_callbacks([weights], "full") == []
    assert "Received: 3" in refused(callbacks=[3]).problems[0]


def test_a_batch_is_cut_to_the_memory_that_is_free(model, free):
    free(None)
    assert plan_settings(model, 100, 50).batch_size == 8
    for rows in (8, 4, 2, 1):
        free(step_bytes(model, rows, 50))
        plan = plan_settings(model, 100, 50)
        assert (plan.batch_size, plan.gradient_accumulation_steps) == (rows, 8 // rows)
        assert "GB are free" not in str(plan)
    free(step_bytes(model, 1, 50) - 1)
    assert "a step may need" in str(plan_settings(model, 100, 50))
    assert plan_settings(model, 100, 50, batch_size=16).batch_size == 16


def test_full_tuning_reckons_with_gradients_moments_and_what_is_accumulated(model, free):
    weights = 4 * model.count_params()
    lora, full = (step_bytes(model, 4, 50, method=method) for method in ("lora", "full"))
    assert full - lora == 3 * weights
    assert step_bytes(model, 4, 50, method="full", accumulates=True) - lora == 4 * weights
    free(step_bytes(model, 8, 50))
    assert plan_settings(model, 100, 50).batch_size == 8
    assert plan_settings(model, 100, 50, method="full").batch_size < 8


def control_groups(root, own, files):
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(own)
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_the_tightest_limit_on_the_way_up_counts_in_control_groups_of_version_2(tmp_path):
    control_groups(
        tmp_path,
        "0::/outer/inner\n",
        {
            "outer/inner/memory.max": "max\n",
            "outer/inner/memory.current": "100\n",
            "outer/memory.max": "1000\n",
            "outer/memory.current": "300\n",
            "outer/memory.stat": "anon 200\ninactive_file 50\n",
        },
    )
    assert control_group_memory(tmp_path) == 1000 - 300 + 50


def test_a_container_sees_its_control_group_of_version_1_from_inside(tmp_path):
    control_groups(
        tmp_path,
        "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        {
            "memory/memory.limit_in_bytes": "5000\n",
            "memory/memory.usage_in_bytes": "4000\n",
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
        },
    )
    assert control_group_memory(tmp_path) == 1500


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert control_group_memory(tmp_path) is None
    control_groups(tmp_path, "0::/\n", {"memory.max": "max\n"})
    assert control_group_memory(tmp_path) is None


def test_a_plan_tells_of_validation_and_of_rows_left_out(model):
    plan = plan_settings(model, 30, 20, early_stopping=1, validation_split=0.5)
    filled = dataclasses.replace(
        plan, dropped=(3, 4), validation_pairs=5, validation_dropped=(7,), validation_truncated=(9,)
    )
    text = str(filled)
    assert "validated on 5 other pairs after every epoch; stops after 1 epoch without" in text
    assert "2 rows left out as asked: 3, 4" in text
    assert "1 validation rows left out as asked: 7" in text
    assert "1 validation rows cut as asked: 9" in text


def test_all_rows_are_reckoned_as_long_as_they_are_padded(model, free):
    free(10**12)
    short = plan_settings(model, 100, 20, template=PLAIN)
    padded = plan_settings(model, 100, 20, sequence_length=64, template=PLAIN)
    assert padded.memory_needed == plan_settings(model, 100, 64, template=PLAIN).memory_needed
    assert padded.memory_needed > short.memory_needed
