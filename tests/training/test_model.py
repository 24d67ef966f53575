"""Training on tiny models of every family against plain Keras and plain JAX."""

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from _quantized import quantize

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import get_factors, lora_linears
from gemma_keras_tune.gemma.families import backbone_inputs
from gemma_keras_tune.training import model as model_module
from gemma_keras_tune.training import tuning
from gemma_keras_tune.training.losses import token_cross_entropy
from gemma_keras_tune.training.model import TuningModel
from gemma_keras_tune.training.pipeline import make_batcher, tokenize_pairs

FAMILY_NAMES = ["gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4 moe"]
PLAIN = "{prompt}\n{response}"


def tiny(name, **sizes):
    family, _, moe = name.partition(" ")
    return testing.tiny_model(family, moe=bool(moe), **sizes)


def exact(function):
    """Compiled with sums in the order that rounds less."""
    return jax.jit(function, compiler_options={"xla_cpu_use_fusion_emitters": True})


def one_batch(model, pairs, **options):
    tokens = tokenize_pairs(pairs, model, template=PLAIN)
    batcher = make_batcher(tokens, model, batch_size=len(pairs), shuffle=False, **options)
    return next(batcher.arrays(0))


def step_gradients(trainer, batch):
    """Loss and gradients as Keras's own train step takes them."""
    x, y, weights = batch
    state = [
        [v.value for v in group]
        for group in (
            trainer.trainable_variables,
            trainer.non_trainable_variables,
            trainer.metrics_variables,
        )
    ]

    def loss(trainable):
        return trainer.compute_loss_and_updates(
            trainable, state[1], state[2], x, jnp.asarray(y), jnp.asarray(weights), training=False
        )[0]

    return exact(jax.value_and_grad(loss))(state[0])


def plain_gradients(model, pairs):
    """The same by hand: full logits of the task model, a softmax, and each row by itself."""
    tokens = tokenize_pairs(pairs, model, template=PLAIN)
    longest = int(tokens.lengths.max())
    ids = np.zeros((len(pairs), longest + 1), np.int32)
    trained = np.zeros((len(pairs), longest + 1), bool)
    mask = np.zeros((len(pairs), longest), np.int32)
    for i in range(len(pairs)):
        row, taught = tokens.row(i)
        ids[i, : len(row)], trained[i, : len(row)] = row, taught
        mask[i, : len(row) - 1] = 1
    inputs = backbone_inputs(model.backbone, ids[:, :-1], mask)
    others = [v.value for v in model.non_trainable_variables]

    def loss(trainable):
        if hasattr(model.backbone, "language_model"):
            # Gemma 3n's task model holds its head as a constant, taken when it was built.
            values = zip(model.trainable_variables, trainable, strict=True)
            with keras.StatelessScope(state_mapping=list(values)):
                states = model.backbone(inputs)
                logits = model.backbone.language_model.token_embedding(states, reverse=True)
        else:
            logits, _ = model.stateless_call(trainable, others, inputs)
        nll = -jax.nn.log_softmax(logits.astype("float32"))
        picked = jnp.take_along_axis(nll, ids[:, 1:, None], axis=-1)[..., 0]
        return (picked * trained[:, 1:]).sum() / trained[:, 1:].sum()

    return exact(jax.value_and_grad(loss))([v.value for v in model.trainable_variables])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_loss_and_gradients_equal_the_full_logits_computation(family, method):
    model = tiny(family)
    pairs = testing.tiny_pairs(3) + [("roll", "a longer answer about bread and cakes")]
    if method == "lora":
        gkt.enable_lora(model, 2, verbose=0)
        for linear in lora_linears(model):  # B at zero would hide half of the gradients
            b = linear.layer.lora_kernel_b
            b.assign(np.random.default_rng(1).normal(0, 0.3, b.shape))
    trainer = TuningModel(model)
    trainer.compile(keras.optimizers.SGD(1.0))
    loss, gradients = step_gradients(trainer, one_batch(model, pairs))
    expected, wanted = plain_gradients(model, pairs)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    by_path = dict(zip([v.path for v in model.trainable_variables], wanted, strict=True))
    assert len(gradients) == len(wanted)
    paths = [variable.path for variable in trainer.trainable_variables]
    wanted = [by_path[path] for path in paths]
    lengths = [float(jnp.linalg.norm(want)) for want in wanted]
    gaps = [float(jnp.linalg.norm(a - b)) for a, b in zip(gradients, wanted, strict=True)]
    whole = np.linalg.norm(lengths)
    assert whole > 0 and np.linalg.norm(gaps) <= 1e-4 * whole
    # Rounding alone moves a single variable's by up to 1.2e-4 on some machines.
    for path, gap, length in zip(paths, gaps, lengths, strict=True):
        assert gap <= 3e-4 * max(length, 1e-3 * whole), path


@pytest.fixture(scope="module")
def accumulated():
    """The same eight pairs in updates of eight rows, taken at once and one by one."""
    pairs = [(f"roll {i}", "x" * (1 + 3 * i)) for i in range(8)]  # answers of unlike lengths
    runs = []
    for rows, steps in ((8, 1), (1, 8)):
        result = gkt.tune(
            tiny("gemma3"), pairs, template=PLAIN, rank=2, epochs=6, learning_rate=5e-3,
            warmup_steps=2, batch_size=rows, gradient_accumulation_steps=steps,
            sequence_length=40, verbose=0, compilation_cache=False,
        )  # fmt: skip
        factors = [get_factors(n)[1].ravel() for n in lora_linears(result.model)]
        runs.append((result, np.concatenate(factors)))
    return runs


@pytest.mark.slow
def test_accumulating_eight_single_rows_equals_one_batch_of_eight(accumulated):
    (one, factors), (eight, others) = accumulated
    assert one.plan.updates == eight.plan.updates == 6
    np.testing.assert_allclose(eight.history["loss"], one.history["loss"], rtol=1e-5)
    assert np.abs(factors).max() > 1e-2
    np.testing.assert_allclose(others, factors, atol=1e-5)


@pytest.mark.slow
def test_the_learning_rates_told_are_those_of_the_updates(accumulated):
    (one, _), (eight, _) = accumulated
    np.testing.assert_allclose(one.learning_rates, eight.learning_rates, rtol=1e-6)
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    np.testing.assert_allclose(one.learning_rates, 5e-3 * np.array([1 / 3, 2 / 3, *cosine]), 1e-5)


def test_the_schedule_of_accumulated_batches_is_saved_with_the_optimizer():
    optimizer = gkt.make_optimizer(1.0, updates=10, warmup_steps=2, gradient_accumulation_steps=4)
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    plain = gkt.make_optimizer(1.0, updates=10, warmup_steps=2)
    assert again.get_config()["learning_rate"] == optimizer.get_config()["learning_rate"]
    schedules = [
        keras.optimizers.schedules.deserialize(o.get_config()["learning_rate"])
        for o in (again, plain)
    ]
    for batch in (0, 3, 4, 11, 39):
        assert float(schedules[0](batch)) == float(schedules[1](batch // 4))


def test_a_thawed_base_under_lora_is_refused():
    model = tiny("gemma3")
    gkt.enable_lora(model, 2, verbose=0)
    model.trainable = True
    with pytest.raises(gkt.LoraError, match="base weights train too"):
        TuningModel(model)


def test_a_model_with_nothing_to_train_is_refused():
    model = tiny("gemma3")
    model.trainable = False
    with pytest.raises(gkt.LoraError, match="No variable of this model trains"):
        TuningModel(model)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_base_whose_embedding_is_quantized_is_refused(mode):
    model = tiny("gemma3", num_layers=1)
    quantize(model.backbone, mode)
    gkt.enable_lora(model, 2, verbose=0)
    with pytest.raises(gkt.LoraError, match=r"quantized \(int8\)\nLoad .* without its embedding"):
        TuningModel(model)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_base_quantized_without_its_embedding_trains_on_kerashubs_own_loss(mode):
    model, pairs = tiny("gemma3", num_layers=1), testing.tiny_pairs(4)
    quantize(model.backbone, mode, filters=lambda layer: "embedding" not in layer.name)
    gkt.enable_lora(model, 2, verbose=0)
    trainer = TuningModel(model)
    trainer.compile(gkt.make_optimizer(1e-3, updates=2))
    dataset = gkt.make_dataset(pairs, model, template=PLAIN, batch_size=4, shuffle=False)
    for _ in range(2):
        own = float(plain_gradients(model, pairs)[0])
        history = trainer.fit(dataset, epochs=1, verbose=0).history
        assert history["loss"] == pytest.approx([own], rel=1e-4)


class Recorder(keras.callbacks.Callback):
    """Notes what Keras calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append("batch")

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append("epoch")


class StopAfter(keras.callbacks.Callback):
    """Ends training after so many batches."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        self.model.stop_training = self.left <= 0


class Explodes(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that ruins the weights at one batch."""

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, step):
        return keras.ops.where(step == self.batch, 1e25, 1e-3)


def fitted(callbacks, *, rate=1e-3, weights=(), dtype="float32", scaled=False, **options):
    """A trainer after three epochs of two batches, and the error it met; `weights` by batch."""
    import tensorflow as tf

    model = tiny("gemma3", num_layers=1, dtype=dtype)
    gkt.enable_lora(model, 2, verbose=0)
    trainer = TuningModel(model)
    optimizer = keras.optimizers.Adam(rate, **options)
    trainer.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer)
    dataset = gkt.make_dataset(testing.tiny_pairs(8), model, batch_size=4, shuffle=False)
    batches = itertools.count()

    def weighted():
        for x, y, share in dataset:
            yield x, y, share * (dict(weights).get(next(batches), 1.0))

    data = tf.data.Dataset.from_generator(weighted, output_signature=dataset.element_spec)
    try:
        trainer.fit(data, epochs=3, verbose=0, callbacks=callbacks)
    except gkt.TrainingError as error:
        return trainer, error
    return trainer, None


def values(trainer):
    variables = (*trainer.trainable_variables, *trainer.optimizer.variables)
    return [np.asarray(v).astype("float32") for v in variables]


@pytest.mark.parametrize("callbacks", [[], [Recorder()]], ids=["threads", "at once"])
def test_the_first_loss_that_is_not_finite_ends_training(callbacks):
    options = dict(rate=Explodes(2))
    expected, none = fitted([StopAfter(3)], **options)
    trainer, error = fitted(callbacks, **options)
    assert none is None
    assert "not finite in step 2 of epoch 2. " in str(error)
    assert "lower learning rate." in str(error)
    for value, before in zip(values(trainer), values(expected), strict=True):
        np.testing.assert_array_equal(value, before)


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_ends_training(steps, dtype):
    options = dict(dtype=dtype, gradient_accumulation_steps=steps)
    expected, _ = fitted([StopAfter(3)], **options)
    trainer, error = fitted([], weights={3: np.inf}, **options)
    assert "not finite in step 2 of epoch 2. " in str(error)
    assert ("`dtype` 'float32' in place of bfloat16" in str(error)) == (dtype == "bfloat16")
    for value, before in zip(values(trainer), values(expected), strict=True):
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value, before)


def test_an_optimizer_that_scales_the_loss_may_leave_out_updates():
    trainer, error = fitted([], scaled=True, weights={3: np.inf})
    assert error is None
    assert all(np.isfinite(value).all() for value in values(trainer))
    assert int(trainer.optimizer.inner_optimizer.iterations) == 5
    _, error = fitted([], scaled=True, rate=Explodes(0), dtype="mixed_float16")
    assert "not finite in step 2 of epoch 1. " in str(error)
    assert "`dtype` 'bfloat16' or 'float32' in place of float16" in str(error)


def test_tune_ends_with_the_loss_that_is_not_finite():
    model = tiny("gemma3", num_layers=1)
    plan = dict(learning_rate=1e25, warmup_steps=0, epochs=2, batch_size=4, verbose=0)
    with pytest.raises(gkt.TrainingError, match="in step 2 of epoch 1"):
        gkt.tune(model, testing.tiny_pairs(8), template=PLAIN, **plan)


def test_half_precision_floatx_is_refused():
    model = tiny("gemma3")
    keras.config.set_floatx("bfloat16")
    try:
        with pytest.raises(gkt.BackendError, match="set_floatx"):
            TuningModel(model)
    finally:
        keras.config.set_floatx("float32")


@pytest.mark.parametrize(("updates", "warmup"), [(0, 0), (5, 5), (3, 9)])
def test_an_optimizer_without_updates_is_refused(updates, warmup):
    with pytest.raises(gkt.PlanError, match="train nothing"):
        gkt.make_optimizer(1e-3, updates=updates, warmup_steps=warmup)


def test_the_schedule_warms_up_and_falls_to_a_tenth():
    optimizer = gkt.make_optimizer(1.0, updates=100, warmup_steps=10)
    rate = [float(optimizer._learning_rate(step)) for step in (0, 10, 55, 100)]
    assert rate[0] < 0.2
    assert rate[1] == pytest.approx(1.0)
    assert 0.5 < rate[2] < 0.6
    assert rate[3] == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tune_learns_by_heart_and_generate_says_it(family):
    model = tiny(family)
    pairs = [("part number for roll", "yes"), ("part number for cake", "no")]
    result = gkt.tune(
        model,
        pairs * 30,  # an epoch takes Keras longer than its updates
        method="full",
        epochs=4,
        batch_size=2,
        learning_rate=1e-2,
        template=PLAIN,
        verbose=0,
        compilation_cache=False,
    )
    assert result.history["loss"][-1] < 0.5 * result.history["loss"][0]
    assert result.history["accuracy"][-1] > 0.9
    assert gkt.generate(model, [p for p, _ in pairs], max_new_tokens=6) == ["yes", "no"]


@pytest.mark.slow
def test_tune_resolves_prints_and_repeats_a_plan(capsys):
    chosen = dict(target_modules="attention", use_rslora=True, alpha=3, seed=5)
    result = gkt.tune(
        tiny("gemma3"), testing.tiny_pairs(20), template=PLAIN, compilation_cache=False, **chosen
    )
    plan = result.plan
    assert plan.updates == plan.batches == 60 and plan.epochs == 12 and plan.batch_size == 4
    assert "60 updates" in capsys.readouterr().out
    again = gkt.tune(
        tiny("gemma3"), testing.tiny_pairs(20), plan=plan, verbose=0, compilation_cache=False
    )
    assert again.plan == plan
    assert gkt.lora_config(again.model) == gkt.lora_config(result.model)
    assert gkt.template_of(again.model) == gkt.template_of(result.model)
    np.testing.assert_allclose(again.history["loss"], result.history["loss"], rtol=1e-4)
    assert capsys.readouterr().out == ""


@dataclasses.dataclass
class Watched:
    result: gkt.TuneResult
    calls: list[str]
    printed: str
    caches: int
    warned: list[str]


VALIDATION = [("roll", "20-07"), ("cake", "21-08"), ("cake", "21-08"), ("b" * 60, "no")]


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
        patch.setattr(tuning, "use_compilation_cache", lambda: caches.append(1))
        result = gkt.tune(
            tiny("gemma3"), testing.tiny_pairs(16), validation_data=VALIDATION, early_stopping=1,
            sequence_length=40, overlong="drop", template=PLAIN, learning_rate=0.3, epochs=30,
            callbacks=[recorder],
        )  # fmt: skip
    told = [str(w.message) for w in warned if issubclass(w.category, gkt.PairsWarning)]
    return Watched(result, recorder.calls, printed.getvalue(), len(caches), told)


@pytest.mark.slow
def test_early_stopping_goes_back_to_the_best_weights(watched):
    losses = watched.result.history["val_loss"]
    assert 1 < len(losses) < 30 and min(losses) < losses[-1]
    data = gkt.make_dataset(
        VALIDATION[:3], watched.result.model, template=PLAIN, sequence_length=40, batch_size=4
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
    assert len(result.learning_rates) == 4 * epochs < plan.updates
    assert "loss " in watched.printed and "tokens/s" in watched.printed
    assert f"/{plan.batches} " in watched.printed
    timings = result.timings
    assert 0 < timings["first_batch"] < timings["train"] and timings["prepare"] > 0
    steady = timings["train"] - timings["first_batch"]
    rate = plan.tokens / 4 * (len(watched.calls) - epochs - 1) / steady
    assert timings["tokens_per_second"] == pytest.approx(rate, rel=1e-6)
    assert timings["pairs_per_second"] == pytest.approx(rate * plan.pairs / plan.tokens, rel=1e-6)


@pytest.mark.slow
def test_an_optimizer_of_the_users_makes_the_updates_that_the_plan_tells(tmp_path):
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    folder = tmp_path / "adapter"
    model = tiny("gemma3")
    result = gkt.tune(
        model, testing.tiny_pairs(16), optimizer=optimizer, epochs=2, template=PLAIN, verbose=0,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda epoch: (0.5, 0.25)[epoch]),
            gkt.AdapterCheckpoint(folder, updates=3),
        ],
        compilation_cache=False,
    )  # fmt: skip
    assert result.plan.gradient_accumulation_steps == 2
    assert result.plan.updates == int(optimizer.iterations) == 4
    assert result.learning_rates == (0.5, 0.5, 0.25, 0.25)
    last = [get_factors(n)[1] for n in lora_linears(model)]
    saved = tiny("gemma3")
    gkt.load_adapter(saved, folder)  # as it was after the third of four updates
    third = [get_factors(n)[1] for n in lora_linears(saved)]
    assert max(np.abs(b).max() for b in third) > 0
    assert max(np.abs(b - c).max() for b, c in zip(last, third, strict=True)) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    with pytest.raises(gkt.ExportError, match="already exists"):
        gkt.AdapterCheckpoint(folder)


def test_a_checkpoint_of_an_adapter_asks_for_one():
    with pytest.raises(gkt.PlanError, match="Received: 0"):
        gkt.AdapterCheckpoint("folder", updates=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_weight_decay_leaves_norms_biases_and_scalars_alone(family):
    model = tiny(family)
    optimizer = gkt.make_optimizer(0.5, updates=2, weight_decay=0.5)
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
        optimizer = gkt.make_optimizer(0.1, updates=2, **options)
        for a, b in gradients:
            optimizer.apply([np.asarray(a, "float32"), np.asarray([b], "float32")], variables)
        return np.concatenate([np.asarray(v) for v in variables])

    long, cut = (([300.0, 0.0], 400.0), ([0.6, 0.0], 0.8)), (([0.6, 0.0], 0.8),) * 2
    np.testing.assert_allclose(after(long), after(cut), rtol=1e-4)
    assert np.abs(after(long, clipnorm=None) - after(cut)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_step_of_training_holds_an_array_of_tokens_by_vocabulary(family, monkeypatch):
    block = 64
    monkeypatch.setattr(
        model_module,
        "token_cross_entropy",
        functools.partial(token_cross_entropy, block_rows=block),
    )
    model = tiny(family)
    trainer = TuningModel(model)
    trainer.compile(gkt.make_optimizer(1e-3, updates=2))
    trainer.optimizer.build(trainer.trainable_variables)
    batch = one_batch(model, testing.tiny_pairs(3))
    tokens, positions = batch[0]["token_ids"].size, len(batch[1])
    groups = (
        trainer.trainable_variables, trainer.non_trainable_variables,
        trainer.optimizer.variables, trainer.metrics_variables,
    )  # fmt: skip
    state = tuple([v.value for v in group] for group in groups)
    program = str(jax.make_jaxpr(trainer.train_step)(state, batch))
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[(\d+(?:,\d+)*)\]", program)}
    vocabulary = model.backbone.vocabulary_size if family != "gemma3n" else None
    vocabulary = vocabulary or model.preprocessor.tokenizer.vocabulary_size()
    sizes = {math.prod(shape) for shape in shapes if vocabulary in shape}
    assert sizes, "the embedding itself is in the program"
    assert (positions, block) in shapes
    assert not sizes & {tokens * vocabulary, positions * vocabulary}


def test_the_compilation_cache_is_the_users_or_in_the_users_folder(tmp_path, monkeypatch):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
        assert tuning.use_compilation_cache() == str(tmp_path / "own")
        jax.config.update("jax_compilation_cache_dir", None)
        ours = str(tmp_path / "gemma_keras_tune" / "jax")
        assert tuning.use_compilation_cache() == ours == jax.config.jax_compilation_cache_dir
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_bad_settings_are_reported_together():
    with pytest.raises(gkt.PlanError) as caught:
        gkt.tune(
            tiny("gemma3"),
            testing.tiny_pairs(4),
            epochs=0,
            batch_size=1.5,
            learning_rate=-1.0,
            verbose=0,
        )
    assert len(caught.value.problems) == 3


def test_other_lora_than_the_one_that_is_on_is_refused():
    model = tiny("gemma3")
    gkt.enable_lora(model, 2, alpha=4, verbose=0)
    other = dict(rank=4, alpha=8, target_modules="attention", use_rslora=True)
    with pytest.raises(gkt.LoraError, match=r"LoRA rank 2, alpha 4 ") as caught:
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
    with pytest.raises(gkt.LoraError, match="Keras's own LoRA" if stock else "LoRA rank 2"):
        gkt.tune(model, testing.tiny_pairs(4), method="full", verbose=0)


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


def test_a_plan_that_is_all_warm_up_is_refused():
    with pytest.raises(gkt.PlanError, match="would train nothing"):
        gkt.tune(
            tiny("gemma3"),
            testing.tiny_pairs(4),
            epochs=1,
            batch_size=4,
            warmup_steps=1,
            verbose=0,
        )


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_first_batch_that_fails_leaves_the_weights(epoch):
    import tensorflow as tf

    model = testing.tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, 2, verbose=0)
    trainer = TuningModel(model)
    trainer.compile(gkt.make_optimizer(1e-3, updates=10))
    good = gkt.make_dataset(testing.tiny_pairs(8), model, batch_size=4)
    opened = itertools.count()

    def batches():
        if next(opened) == epoch:
            raise KeyboardInterrupt("while it compiles")
        yield from good

    broken = tf.data.Dataset.from_generator(batches, output_signature=good.element_spec)
    before = {v.path: np.array(v) for v in model.variables}
    with pytest.raises(Exception, match="while it compiles"):
        trainer.fit(broken, epochs=2, verbose=0)
    for variable in model.variables:
        assert np.asarray(variable).shape == before[variable.path].shape
        if epoch == 0 or not variable.trainable:
            np.testing.assert_array_equal(variable, before[variable.path])
    trainer.fit(good, epochs=1, verbose=0)
