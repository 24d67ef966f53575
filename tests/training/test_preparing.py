"""From settings and pairs to a run: what is read, refused and warned of before any work."""

import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing

PLAIN = "{prompt}\n{response}"


def tiny(name, **sizes):
    family, _, moe = name.partition(" ")
    return testing.tiny_model(family, moe=bool(moe), **sizes)


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model()


def refused(**settings):
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.tune("package://never_opened", [], verbose=0, **settings)
    return caught.value


def test_other_lora_than_the_one_that_is_on_is_refused():
    model = tiny("gemma3")
    gkt.enable_lora(model, 2, alpha=4, verbose=0)
    other = dict(rank=4, alpha=8, target_modules="attention", use_rslora=True)
    with pytest.raises(gkt.errors.LoraError, match=r"LoRA rank 2, alpha 4 ") as caught:
        gkt.tune(model, testing.tiny_pairs(4), verbose=0, **other)
    names = ", ".join(gkt.lora_config(model).target_modules)
    assert caught.value.problems == (
        "`rank`: the model has 2. Received: 4",
        "`alpha`: the model has 4. Received: 8",
        f"`target_modules`: the model has {names}. Received: 'attention'",
        "`use_rslora`: the model has False. Received: True",
    )


@pytest.mark.parametrize("stock", [False, True])
def test_full_tuning_refuses_lora(stock):
    model = tiny("gemma3")
    model.backbone.enable_lora(2) if stock else gkt.enable_lora(model, 2, verbose=0)
    with pytest.raises(gkt.errors.LoraError, match="Keras's own LoRA" if stock else "LoRA rank 2"):
        gkt.tune(model, testing.tiny_pairs(4), method="full", verbose=0)


def test_a_plan_that_is_all_warm_up_is_refused():
    with pytest.raises(gkt.errors.PlanError, match="would train nothing"):
        gkt.tune(
            tiny("gemma3"),
            testing.tiny_pairs(4),
            epochs=1,
            batch_size=4,
            warmup_steps=1,
            verbose=0,
        )


def test_problems_of_training_and_validation_pairs_are_reported_at_once(model):
    with pytest.raises(gkt.errors.PairsError) as caught:
        gkt.tune(
            model,
            [("a", "b"), ("", "x")],
            validation_data=[("q" * 60, "y"), ("a", None)],
            template=PLAIN,
            sequence_length=20,
        )
    assert caught.value.problems == (
        "training, row 2: the prompt is empty",
        "validation, row 2: the response is missing (its value is None)",
        "validation, row 1: 63 tokens",
    )
    rows = [("a", "b"), ("", "x"), ("q" * 60, "y")]
    with pytest.raises(gkt.errors.PairsError) as split:
        gkt.tune(model, rows, validation_split=0.5, template=PLAIN, sequence_length=20)
    assert split.value.problems == ("row 2: the prompt is empty", "row 3: 63 tokens")
    assert caught.value.headline.startswith("Training: The list: 1 row cannot be trained on. Valid")


def test_warnings_say_whether_training_or_validation_pairs_are_meant(model):
    class Enough(Exception):
        pass

    class Stop(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise Enough

    with pytest.warns(gkt.errors.PairsWarning) as caught, pytest.raises(Enough):
        gkt.tune(
            model,
            [("a", "b"), ("a", "b")],
            validation_data=[("c", "d"), ("c", "e")],
            method="full",
            epochs=1,
            verbose=0,
            callbacks=[Stop()],
        )
    assert [str(warning.message).splitlines()[0] for warning in caught] == [
        "Some training pairs look wrong.",
        "Some validation pairs look wrong.",
    ]


def test_own_column_names_belong_to_read_pairs(model):
    frame = {"text": ["a", "b"], "label": ["yes", "no"], "rules": ["r", "s"]}
    names = {"prompt_column": "text", "response_column": "label", "system_column": "rules"}
    pairs = gkt.read_pairs(frame, **names)
    shown = gkt.preview(model, pairs, template=PLAIN)
    assert "".join(shown.rows[0].pieces) == "<bos>r\n\na\nyes<eos>"
    dataset = gkt.make_dataset(model, pairs, template=PLAIN, shuffle=False)
    assert int(dataset.cardinality()) == 1
    assert gkt.make_plan(model, pairs, template=PLAIN, validation_data=pairs).validation_pairs == 2
    with pytest.raises(gkt.errors.PlanError, match="`prompt_column` is not a setting"):
        gkt.tune(model, frame, prompt_column="text")


def test_a_plan_is_made_without_training():
    model = testing.tiny_model()
    before = {v.path: np.asarray(v).copy() for v in model.variables}
    pairs = [(f"part number {i}", "yes" * (1 + i % 3)) for i in range(30)]
    plan = gkt.make_plan(model, pairs, template=PLAIN, validation_split=0.2, epochs=2, seed=5)
    assert (plan.pairs, plan.validation_pairs) == (24, 6)
    assert plan.steps == plan.batches == 2 * 6 and plan.batch_size == 4
    assert plan.tokens > plan.response_tokens > 0 and 0 < plan.padding < 1
    assert [shape.batch_size for shape in plan.shapes] == [4]
    assert plan.memory_needed > 0
    assert gkt.lora_config(model) is None and gkt.template_of(model) is None
    assert set(before) == {v.path for v in model.variables}
    for variable in model.variables:
        np.testing.assert_array_equal(variable, before[variable.path])
    with pytest.raises(gkt.errors.PlanError, match="would train nothing"):
        gkt.make_plan(model, pairs, template=PLAIN, epochs=1, batch_size=30, warmup_steps=1)
    with pytest.raises(gkt.errors.PairsError, match="row 2"):
        gkt.make_plan(model, [("a", "b"), ("", "c")])
