"""Optimizers: the schedule, weight decay, clipping, and Keras's others by name."""

import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing

FAMILY_NAMES = ["gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4 moe"]


def tiny(name, **sizes):
    family, _, moe = name.partition(" ")
    return testing.tiny_model(family, moe=bool(moe), **sizes)


def refused(**settings):
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.tune("package://never_opened", [], verbose=0, **settings)
    return caught.value


def test_the_schedule_of_accumulated_batches_is_saved_with_the_optimizer():
    optimizer = gkt.make_optimizer(1.0, steps=10, warmup_steps=2, gradient_accumulation_steps=4)
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    plain = gkt.make_optimizer(1.0, steps=10, warmup_steps=2)
    assert again.get_config()["learning_rate"] == optimizer.get_config()["learning_rate"]
    schedules = [
        keras.optimizers.schedules.deserialize(o.get_config()["learning_rate"])
        for o in (again, plain)
    ]
    for batch in (0, 3, 4, 11, 39):
        assert float(schedules[0](batch)) == float(schedules[1](batch // 4))


@pytest.mark.parametrize(("steps", "warmup"), [(0, 0), (5, 5), (3, 9)])
def test_an_optimizer_without_steps_is_refused(steps, warmup):
    with pytest.raises(gkt.errors.PlanError, match="train nothing"):
        gkt.make_optimizer(1e-3, steps=steps, warmup_steps=warmup)


def test_the_schedule_warms_up_and_falls_to_a_tenth():
    optimizer = gkt.make_optimizer(1.0, steps=100, warmup_steps=10)
    rate = [float(optimizer._learning_rate(step)) for step in (0, 10, 55, 100)]
    assert rate[0] < 0.2
    assert rate[1] == pytest.approx(1.0)
    assert 0.5 < rate[2] < 0.6
    assert rate[3] == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_weight_decay_leaves_norms_biases_and_scalars_alone(family):
    model = tiny(family)
    optimizer = gkt.make_optimizer(0.5, steps=2, weight_decay=0.5)
    variables = model.trainable_variables
    before = [np.asarray(v) for v in variables]
    optimizer.apply([np.zeros(v.shape, "float32") for v in variables], variables)
    for variable, old in zip(variables, before, strict=True):
        matrix = len([side for side in variable.shape if side > 1]) > 1
        decayed = not np.array_equal(np.asarray(variable), old)
        assert decayed == matrix, variable.path


@pytest.mark.slow
def test_the_whole_gradient_is_clipped_by_its_norm():
    def after(gradients, **options):
        variables = [keras.Variable([0.0, 0.0]), keras.Variable([0.0])]
        optimizer = gkt.make_optimizer(0.1, steps=2, **options)
        for a, b in gradients:
            optimizer.apply([np.asarray(a, "float32"), np.asarray([b], "float32")], variables)
        return np.concatenate([np.asarray(v) for v in variables])

    long, cut = (([300.0, 0.0], 400.0), ([0.6, 0.0], 0.8)), (([0.6, 0.0], 0.8),) * 2
    np.testing.assert_allclose(after(long), after(cut), rtol=1e-4)
    assert np.abs(after(long, clipnorm=None) - after(cut)).max() > 1e-3


def test_other_optimizers_of_keras_take_the_same_schedule():
    options = dict(steps=10, warmup_steps=2, weight_decay=0.1, gradient_accumulation_steps=3)
    for name in ("lion", "SGD", "adafactor"):
        optimizer = gkt.make_optimizer(0.5, name=name, **options)
        assert type(optimizer).__name__.lower() == name.lower()
        config = optimizer.get_config()
        assert (config["weight_decay"], config["gradient_accumulation_steps"]) == (0.1, 3)
        assert config["global_clipnorm"] == 1.0
        assert (
            config["learning_rate"]
            == (gkt.make_optimizer(0.5, **options).get_config()["learning_rate"])
        )
    with pytest.raises(gkt.errors.PlanError, match="Received: 'adamm'"):
        gkt.make_optimizer(0.5, steps=10, name="adamm")


def test_a_schedule_is_followed_as_it_is():
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.5)
    optimizer = gkt.make_optimizer(schedule, steps=10, gradient_accumulation_steps=4)
    assert float(optimizer._learning_rate(40)) == float(schedule(10))
    with pytest.raises(gkt.errors.PlanError, match="its own warm-up"):
        gkt.make_optimizer(schedule, steps=10, warmup_steps=1)


def test_numbers_that_are_none_are_all_named():
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.make_optimizer("1e-3", steps="10", warmup_steps=-1, gradient_accumulation_steps=0)
    names = [problem.split("`")[1] for problem in caught.value.problems]
    assert names == ["steps", "warmup_steps", "gradient_accumulation_steps", "learning_rate"]
