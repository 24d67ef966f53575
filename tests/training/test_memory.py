"""The check of a compiled step against the memory that is free."""

import logging

import jax
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.training import memory


def trainer_and_data(**options):
    model = testing.tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, 2, verbose=0)
    trainer = gkt.TuningModel(model, **options)
    trainer.compile(gkt.make_optimizer(1e-3, steps=2))
    return trainer, gkt.make_dataset(model, testing.tiny_pairs(2), batch_size=2)


def test_a_step_that_does_not_fit_is_refused_and_the_model_is_left_whole(monkeypatch, caplog):
    trainer, data = trainer_and_data()
    before = [np.asarray(v) for v in trainer.trainable_variables]
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(gkt.errors.PlanError) as caught:
        trainer.fit(data, epochs=1, verbose=0)
    error = caught.value
    assert error.headline.startswith("A step of 2 x ")
    assert error.problems[0].startswith("XLA's analysis of the compiled step: 0.00 GB beyond")
    assert error.problems[1] == "free: 0.00 GB" and "helps most" in error.next_step
    for variable, value in zip(trainer.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    trainer.make_train_function(force=True)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        trainer.fit(data, epochs=2, verbose=0)
    compiled = [r for r in caplog.records if "XLA compilation of jit(train_step)" in r.message]
    assert len(compiled) <= 1  # the analysis costs no second compilation


def test_a_program_that_the_compiler_refuses_is_told_in_plain_words():
    class Step:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    step = memory.CheckedStep(Step(), lambda rows, length: f"{rows} {length}")
    with pytest.raises(gkt.errors.PlanError, match="RESOURCE_EXHAUSTED") as caught:
        step(None, ({"token_ids": np.ones((2, 8), "int32")},))
    assert caught.value.next_step == "2 8 helps most."


def test_what_is_no_setting_is_refused():
    with pytest.raises(gkt.errors.PlanError, match="`rematerialize` must be one of"):
        trainer_and_data(rematerialize="yes")


@pytest.mark.parametrize(("free", "again"), [(None, 0), (10**12, 0), (0, 2)])
def test_auto_asks_the_estimate(free, again, monkeypatch):
    monkeypatch.setattr("gemma_keras_tune.training.model.free_memory", lambda: free)
    model = testing.tiny_model("gemma3")
    assert len(gkt.TuningModel(model)._recomputed(2, 8)) == again
