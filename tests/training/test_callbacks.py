"""Callbacks that work with LoRA, and those that do not."""

import keras
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.training.callbacks import callback_problems


def refused(**settings):
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.tune("package://never_opened", [], verbose=0, **settings)
    return caught.value


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
    whole = keras.callbacks.ModelCheckpoint("x.keras")
    assert "save_weights_only=True" in refused(callbacks=[whole], method="full").problems[0]
    weights = keras.callbacks.ModelCheckpoint("x.weights.h5", save_weights_only=True)
    assert callback_problems([weights], "full") == []
    assert "Received: 3" in refused(callbacks=[3]).problems[0]


@pytest.mark.parametrize(
    "callback",
    [
        keras.callbacks.LearningRateScheduler(lambda epoch: 1e-3),
        keras.callbacks.ReduceLROnPlateau("loss"),
    ],
)
def test_callbacks_that_set_the_rate_need_an_optimizer_that_lets_them(callback):
    for optimizer in ("auto", "sgd", keras.optimizers.AdamW(make_schedule())):
        (problem,) = refused(callbacks=[callback], optimizer=optimizer).problems
        assert type(callback).__name__ in problem and "keras.optimizers.AdamW" in problem
    assert callback_problems([callback], "lora", keras.optimizers.AdamW(1e-3)) == []


def make_schedule():
    return keras.optimizers.schedules.CosineDecay(1e-3, 10)
