"""Plans: what they hold, what contradicts them, and the memory they reckon with."""

import dataclasses
import json

import keras
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.training import planning
from gemma_keras_tune.training.planning import resolve_settings, step_bytes
from gemma_keras_tune.training.shapes import Shape

PLAIN = "{prompt}\n{response}"


def plan_settings(model, pairs, longest, **given):
    return planning.plan_settings(model, pairs, longest, resolve_settings(given))


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model("gemma3")


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory is free."""
    return lambda size: monkeypatch.setattr(planning, "free_memory", lambda: size)


def refused(**settings):
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.tune("package://never_opened", [], verbose=0, **settings)
    return caught.value


@pytest.mark.parametrize("family", testing.FAMILIES)
def test_the_rank_that_is_chosen_fits_every_layer(family):
    model = testing.tiny_model(family)
    rank = plan_settings(model, 10_000, 20, template=PLAIN).rank
    gkt.enable_lora(model, rank, verbose=0)
    gkt.remove_lora(model)
    if rank < 16:
        with pytest.raises(gkt.errors.LoraError, match="can be at most"):
            gkt.enable_lora(model, rank + 1, verbose=0)
    assert plan_settings(model, 999, 20, template=PLAIN).rank == 8


def test_a_plan_takes_its_own_settings_back(model):
    plan = plan_settings(
        model, 30, 20, rank=4, target_modules=["q_proj"], use_rslora=True, template=PLAIN,
        overlong="drop", sequence_length=64, validation_split=0.2, early_stopping=3, seed=7,
    )  # fmt: skip
    assert plan_settings(model, 30, 20, **plan.settings()) == plan
    assert "on q_proj" in str(plan) and "rank-stabilized" in str(plan)


def test_arguments_that_equal_a_default_contradict_a_plan_too(model):
    plan = plan_settings(
        model, 30, 20, method="full", seed=3, overlong="drop", validation_split=0.5,
        early_stopping=2, sequence_length=40,
    )  # fmt: skip
    error = refused(
        plan=plan, method="lora", seed=0, overlong="error", validation_split=0.0,
        early_stopping=None, sequence_length="auto", epochs="auto",
    )  # fmt: skip
    assert sorted(problem.split("`")[1] for problem in error.problems) == [
        "early_stopping", "method", "overlong", "seed", "validation_split"
    ]  # fmt: skip
    assert "`seed`: the plan has 3. Received: 0" in error.problems
    assert resolve_settings({"seed": 3, "method": "full", "epochs": "auto"}, plan) == (
        plan.settings()
    )


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


def test_a_batch_is_cut_to_the_memory_that_is_free(model, free):
    free(None)
    assert plan_settings(model, 100, 50).batch_size == 8
    for rows in (8, 4, 2, 1):
        free(step_bytes(model, rows, 50))
        plan = plan_settings(model, 100, 50)
        assert (plan.batch_size, plan.gradient_accumulation_steps) == (rows, 8 // rows)
        assert "helps most" not in str(plan)
    free(step_bytes(model, 1, 50) - 1)
    assert "helps most" in str(plan_settings(model, 100, 50))
    assert plan_settings(model, 100, 50, batch_size=16).batch_size == 16


def test_full_tuning_reckons_with_gradients_moments_and_what_is_accumulated(model, free):
    weights = 4 * model.count_params()
    lora, full = (step_bytes(model, 4, 50, method=method) for method in ("lora", "full"))
    assert full - lora == 3 * weights
    assert step_bytes(model, 4, 50, method="full", accumulates=True) - lora == 4 * weights
    free(step_bytes(model, 8, 50))
    assert plan_settings(model, 100, 50).batch_size == 8
    assert plan_settings(model, 100, 50, method="full").batch_size < 8


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


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "full", "optimizer": "lion", "early_stopping": 2, "validation_split": 0.5},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "sequence_length": 30},
        {"learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 10)},
        {"optimizer": keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)},
    ],
)
def test_a_plan_is_read_back_as_it_was_saved(model, tmp_path, chosen):
    plan = plan_settings(model, 30, 20, template=PLAIN, **chosen)
    plan = dataclasses.replace(
        plan, shapes=(Shape(4, 24, 40),), steps=7, dropped=(3, 5), padding=0.25, pairs=30
    )
    path = plan.save(tmp_path / "folder" / "plan.json")
    loaded = gkt.Plan.load(str(path))
    assert loaded == plan and loaded.memory_needed == plan.memory_needed
    assert type(loaded.target_modules) is type(plan.target_modules)
    assert json.loads(path.read_text())["schema"] == 1
    assert path.read_bytes() == loaded.save(path).read_bytes()


def by_function(messages):
    return messages[-1].content


def test_a_template_that_is_a_function_cannot_be_saved(model, tmp_path):
    plan = plan_settings(model, 30, 20, template=by_function)
    with pytest.raises(gkt.errors.PlanError, match=r"cannot be saved: .*by_function"):
        plan.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(model, tmp_path):
    """A plan's file, changed and read back."""
    path = plan_settings(model, 30, 20, template=PLAIN).save(tmp_path / "plan.json")
    data = json.loads(path.read_text())

    def problems(change):
        other = json.loads(json.dumps(data))
        change(other)
        path.write_text(json.dumps(other))
        with pytest.raises(gkt.errors.PlanError, match=r"plan\.json") as caught:
            gkt.tune("package://never_opened", [], plan=path)
        return caught.value

    return problems


def test_all_that_is_wrong_with_a_plan_file_is_told_at_once(saved):
    def change(data):
        data["extra"] = 1
        data["settings"] |= {
            "epochs": "auto",
            "rank": 0,
            "dropout": 0.1,
            "optimizer": 3,
            "template": 4,
        }
        data["figures"] |= {"steps": "many", "shapes": [{"batch_size": 1}]}
        del data["settings"]["seed"], data["figures"]["tokens"]

    assert saved(change).problems == (
        "`dropout` is unknown",
        "`epochs` must be resolved. Received: 'auto'",
        "`extra` is unknown",
        "`optimizer` must be 'auto', a Keras optimizer or the name of one. Received: 3",
        "`rank` must be 'auto' or an integer of at least 1. Received: 0",
        "`seed` is missing",
        "`shapes`: Object missing required field `length` - at `$[0]`",
        "`steps`: Expected `int`, got `str`",
        "`template` must be a name or a text. Received: 4",
        "`tokens` is missing",
    )


def test_files_that_are_no_plans_are_refused(saved, tmp_path):
    assert "of version 2, and version 1 is known" in saved(lambda d: d.update(schema=2)).headline
    assert "is not a plan" in saved(lambda d: d.pop("figures")).headline
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(gkt.errors.PlanError, match=r"broken\.json cannot be read as a plan"):
        gkt.Plan.load(tmp_path / "broken.json")
    with pytest.raises(gkt.errors.PlanError, match=r"none\.json cannot be read"):
        gkt.Plan.load(tmp_path / "none.json")


def test_a_plan_file_imports_nothing(saved):
    """A schedule's description names a module and a class."""
    for module, config in (("os", {}), (None, {}), ("keras.optimizers.schedules", {"a": [{}]})):
        schedule = {"module": module, "class_name": "CosineDecay", "config": config}

        def change(data, schedule=schedule):
            data["settings"]["learning_rate"] = schedule

        (problem,) = saved(change).problems
        assert problem.startswith("`learning_rate` must be a number or a schedule of Keras")


def test_a_length_beyond_the_context_is_refused(model):
    with pytest.raises(gkt.errors.PlanError) as caught:
        plan_settings(model, 8, 20, sequence_length=32_769)
    assert "at most the model's context of 32,768 tokens. Received: 32,769" in str(caught.value)
    assert plan_settings(model, 8, 20, sequence_length=32_768).sequence_length == 32_768


def test_a_row_beyond_the_context_is_refused_where_no_length_is_set():
    model = testing.tiny_model("gemma3n", max_position_embeddings=64)
    with pytest.raises(gkt.errors.PairsError, match="row 2"):
        gkt.tune(model, [("a", "b"), ("x" * 80, "b")], template=PLAIN, verbose=0)
