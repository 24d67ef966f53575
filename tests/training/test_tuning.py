"""`tune` on tiny models: what it learns, tells and repeats."""

import contextlib
import dataclasses
import io
import signal
import warnings
from contextlib import nullcontext

import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import get_factors, lora_linears
from gemma_keras_tune.training import tuning
from gemma_keras_tune.training.model import TuningModel

FAMILY_NAMES = ["gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4 moe"]
PLAIN = "{prompt}\n{response}"
VALIDATION = [("roll", "20-07"), ("cake", "21-08"), ("cake", "21-08"), ("b" * 60, "no")]


def tiny(name, **sizes):
    family, _, moe = name.partition(" ")
    return testing.tiny_model(family, moe=bool(moe), **sizes)


@pytest.fixture(scope="module")
def accumulated():
    """The same eight pairs in steps of eight rows, taken at once and one by one."""
    pairs = [(f"roll {i}", "x" * (1 + 3 * i)) for i in range(8)]  # answers of unlike lengths
    runs = []
    for rows, steps in ((8, 1), (1, 8)):
        result = gkt.tune(
            tiny("gemma3"), pairs, template=PLAIN, rank=2, epochs=6, learning_rate=5e-3,
            warmup_steps=2, batch_size=rows, gradient_accumulation_steps=steps,
            sequence_length=40, verbose=0,
        )  # fmt: skip
        factors = [get_factors(n)[1].ravel() for n in lora_linears(result.model)]
        runs.append((result, np.concatenate(factors)))
    return runs


@pytest.mark.slow
def test_accumulating_eight_single_rows_equals_one_batch_of_eight(accumulated):
    (one, factors), (eight, others) = accumulated
    assert one.plan.steps == eight.plan.steps == 6
    np.testing.assert_allclose(eight.history["loss"], one.history["loss"], rtol=1e-5)
    assert np.abs(factors).max() > 1e-2
    np.testing.assert_allclose(others, factors, atol=1e-5)


@pytest.mark.slow
def test_the_learning_rates_told_are_those_of_the_steps(accumulated):
    (one, _), (eight, _) = accumulated
    np.testing.assert_allclose(one.learning_rates, eight.learning_rates, rtol=1e-6)
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    np.testing.assert_allclose(one.learning_rates, 5e-3 * np.array([1 / 3, 2 / 3, *cosine]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tune_learns_by_heart_and_generate_says_it(family):
    model = tiny(family)
    pairs = [("part number for roll", "yes"), ("part number for cake", "no")]
    result = gkt.tune(
        model,
        pairs * 30,  # an epoch takes Keras longer than its steps
        method="full",
        epochs=4,
        batch_size=2,
        learning_rate=1e-2,
        template=PLAIN,
        verbose=0,
    )
    assert result.history["loss"][-1] < 0.5 * result.history["loss"][0]
    assert result.history["accuracy"][-1] > 0.9
    assert gkt.generate(model, [p for p, _ in pairs], max_new_tokens=6) == ["yes", "no"]


@pytest.mark.slow
def test_tune_resolves_prints_and_repeats_a_plan(capsys):
    chosen = dict(target_modules="attention", use_rslora=True, alpha=3, seed=5)
    result = gkt.tune(tiny("gemma3"), testing.tiny_pairs(20), template=PLAIN, **chosen)
    plan = result.plan
    assert plan.steps == plan.batches == 60 and plan.epochs == 12 and plan.batch_size == 4
    assert "60 steps" in capsys.readouterr().out
    again = gkt.tune(tiny("gemma3"), testing.tiny_pairs(20), plan=plan, verbose=0)
    assert again.plan == plan
    assert gkt.lora_config(again.model) == gkt.lora_config(result.model)
    assert gkt.template_of(again.model) == gkt.template_of(result.model)
    np.testing.assert_allclose(again.history["loss"], result.history["loss"], rtol=1e-4)
    assert capsys.readouterr().out == ""


class Recorder(keras.callbacks.Callback):
    """Notes what Keras calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append("batch")

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append("epoch")


@dataclasses.dataclass
class Watched:
    result: gkt.TuneResult
    calls: list[str]
    printed: str
    caches: int
    warned: list[str]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """One run with all that can be watched, towards a loss that soon gets worse."""
    recorder, caches, printed = Recorder(), [], io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(printed),
        contextlib.redirect_stdout(printed),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        patch.setattr(tuning, "compilation_cache", lambda: caches.append(1) or nullcontext())
        result = gkt.tune(
            tiny("gemma3"), testing.tiny_pairs(16), validation_data=VALIDATION, early_stopping=1,
            sequence_length=40, overlong="drop", template=PLAIN, learning_rate=0.3, epochs=30,
            callbacks=[recorder],
        )  # fmt: skip
    told = [str(w.message) for w in warned if issubclass(w.category, gkt.errors.PairsWarning)]
    return Watched(result, recorder.calls, printed.getvalue(), len(caches), told)


@pytest.mark.slow
def test_early_stopping_goes_back_to_the_best_weights(watched):
    losses = watched.result.history["val_loss"]
    assert 1 < len(losses) < 30 and min(losses) < losses[-1]
    data = gkt.make_dataset(
        watched.result.model, VALIDATION[:3], template=PLAIN, sequence_length=40, batch_size=4
    )
    trainer = TuningModel(watched.result.model)
    trainer.compile(jit_compile=True)
    loss = trainer.evaluate(data, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.slow
def test_validation_rows_are_counted_listed_and_checked(watched):
    plan = watched.result.plan
    assert plan.pairs == 16 and plan.dropped == ()
    assert plan.validation_pairs == 3 and plan.validation_dropped == (4,)
    assert "validated on 3 other pairs" in watched.printed
    assert "validation rows left out as asked: 4" in watched.printed
    assert any("rows 2-3 are exact duplicates" in text for text in watched.warned)


@pytest.mark.slow
def test_progress_callbacks_timings_and_the_cache(watched):
    result, plan = watched.result, watched.result.plan
    epochs = len(result.history["loss"])
    assert watched.calls == ["batch"] * 4 + ["epoch"] + (["batch"] * 4 + ["epoch"]) * (epochs - 1)
    assert watched.caches == 1
    assert len(result.learning_rates) == 4 * epochs < plan.steps
    assert "loss " in watched.printed and "tokens/s" in watched.printed
    assert f"/{plan.batches} " in watched.printed
    timings = result.timings
    assert 0 < timings["first_batch"] < timings["train"] and timings["prepare"] > 0
    steady = timings["train"] - timings["first_batch"]
    rate = plan.tokens / 4 * (len(watched.calls) - epochs - 1) / steady
    assert timings["tokens_per_second"] == pytest.approx(rate, rel=1e-6)
    assert timings["pairs_per_second"] == pytest.approx(rate * plan.pairs / plan.tokens, rel=1e-6)


@pytest.mark.slow
def test_an_optimizer_of_the_users_makes_the_steps_that_the_plan_tells(tmp_path):
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    folder = tmp_path / "adapter"
    model = tiny("gemma3")
    result = gkt.tune(
        model, testing.tiny_pairs(16), optimizer=optimizer, epochs=2, template=PLAIN, verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda epoch: (0.5, 0.25)[epoch]),
            gkt.callbacks.AdapterCheckpoint(folder, steps=3),
        ],
    )  # fmt: skip
    assert result.plan.gradient_accumulation_steps == 2
    assert result.plan.steps == int(optimizer.iterations) == 4
    assert result.learning_rates == (0.5, 0.5, 0.25, 0.25)
    last = [get_factors(n)[1] for n in lora_linears(model)]
    saved = tiny("gemma3")
    gkt.load_adapter(saved, folder)  # as it was after the third of four steps
    third = [get_factors(n)[1] for n in lora_linears(saved)]
    assert max(np.abs(b).max() for b in third) > 0
    assert max(np.abs(b - c).max() for b, c in zip(last, third, strict=True)) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    with pytest.raises(gkt.errors.ExportError, match="already exists"):
        gkt.callbacks.AdapterCheckpoint(folder)


def test_a_checkpoint_of_an_adapter_asks_for_one():
    with pytest.raises(gkt.errors.PlanError, match="Received: 0"):
        gkt.callbacks.AdapterCheckpoint("folder", steps=0)


def test_bad_settings_are_reported_together():
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.tune(
            tiny("gemma3"),
            testing.tiny_pairs(4),
            epochs=0,
            batch_size=1.5,
            learning_rate=-1.0,
            verbose=0,
        )
    assert len(caught.value.problems) == 3


@pytest.mark.slow
def test_tuning_further_goes_on_with_the_lora_that_is_on(capsys):
    model = tiny("gemma3")
    gkt.enable_lora(model, 2, alpha=4, target_modules="attention", verbose=0)
    result = gkt.tune(
        model, testing.tiny_pairs(4), epochs=1, template=PLAIN, target_modules="attention"
    )
    assert (result.plan.rank, result.plan.alpha) == (2, 4)
    assert result.plan.target_modules == gkt.lora_config(model).target_modules
    assert "Going on with the LoRA that is on this model: LoRA rank 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_named_optimizer_follows_a_schedule_and_a_plan_file_repeats_it(tmp_path):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.01, 0.02, 0.005])
    chosen = dict(optimizer="Lion", learning_rate=schedule, gradient_accumulation_steps=2)
    pairs = testing.tiny_pairs(8)
    result = gkt.tune(
        tiny("gemma3"), pairs, template=PLAIN, batch_size=2, epochs=3, verbose=0, **chosen
    )
    plan = result.plan
    assert (plan.optimizer, plan.steps, plan.warmup_steps) == ("lion", 6, 0)
    np.testing.assert_allclose(result.learning_rates, [0.01] * 2 + [0.02] * 2 + [0.005] * 2, 1e-6)
    assert "lion, learning rate by PiecewiseConstantDecay, 0 of warm-up" in str(plan)
    path = plan.save(tmp_path / "plan.json")
    again = gkt.tune(tiny("gemma3"), pairs, plan=path, verbose=0)
    assert again.plan == plan
    np.testing.assert_allclose(again.history["loss"], result.history["loss"], rtol=1e-4)


@pytest.mark.slow
def test_an_interrupt_leaves_the_weights_of_whole_steps(monkeypatch, request):
    """It comes where Keras has given the old weights away and has not yet got the new ones."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    model = testing.tiny_model("gemma3", num_layers=1)
    options = dict(epochs=3, batch_size=2, verbose=0)
    steps = []

    def interrupt_third_step(trainer, force=False):
        make(trainer, force)
        step = trainer.train_function

        def run(*arguments):
            found = step(*arguments)
            steps.append(1)
            if len(steps) == 3:
                signal.raise_signal(signal.SIGINT)
            return found

        trainer.train_function = run

    class Factors(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.jax_state_sync()
            seen.append(np.asarray(lora_linears(model)[0].layer.lora_kernel_a))

    seen = []
    with monkeypatch.context() as patched:
        make = gkt.TuningModel.make_train_function
        patched.setattr(gkt.TuningModel, "make_train_function", interrupt_third_step)
        with pytest.raises(KeyboardInterrupt):
            gkt.tune(model, testing.tiny_pairs(8), callbacks=[Factors()], **options)
    assert len(steps) == len(seen) == 3
    np.testing.assert_array_equal(lora_linears(model)[0].layer.lora_kernel_a, seen[-1])
    assert not np.array_equal(seen[-1], seen[0])
    assert gkt.adapters.active(model) == "default"
    assert isinstance(gkt.generate(model, "Hello", max_new_tokens=4), str)
    assert gkt.tune(model, testing.tiny_pairs(8), **options).plan.steps == 12
