"""Training on tiny models of every family against plain Keras and plain JAX."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from _quantized import quantize

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import lora_linears
from gemma_keras_tune.gemma.families import backbone_inputs
from gemma_keras_tune.training import model as model_module
from gemma_keras_tune.training.losses import token_cross_entropy
from gemma_keras_tune.training.model import TuningModel
from gemma_keras_tune.training.pipeline import make_batcher
from gemma_keras_tune.training.tokenizing import tokenize_pairs

FAMILY_NAMES = ["gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4 moe"]
PLAIN = "{prompt}\n{response}"


def refused(**settings):
    with pytest.raises(gkt.errors.PlanError) as caught:
        gkt.tune("package://never_opened", [], verbose=0, **settings)
    return caught.value


def tiny(name, **sizes):
    family, _, moe = name.partition(" ")
    return testing.tiny_model(family, moe=bool(moe), **sizes)


def exact(function):
    """Compiled with sums in the order that rounds less."""
    return jax.jit(function, compiler_options={"xla_cpu_use_fusion_emitters": True})


def one_batch(model, pairs, **options):
    tokens = tokenize_pairs(model, pairs, template=PLAIN)
    batcher = make_batcher(model, tokens, batch_size=len(pairs), shuffle=False, **options)
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
    tokens = tokenize_pairs(model, pairs, template=PLAIN)
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


def test_a_thawed_base_under_lora_is_refused():
    model = tiny("gemma3")
    gkt.enable_lora(model, 2, verbose=0)
    model.trainable = True
    with pytest.raises(gkt.errors.LoraError, match="base weights train too"):
        TuningModel(model)


def test_a_model_with_nothing_to_train_is_refused():
    model = tiny("gemma3")
    model.trainable = False
    with pytest.raises(gkt.errors.LoraError, match="No variable of this model trains"):
        TuningModel(model)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_base_whose_embedding_is_quantized_is_refused(mode):
    model = tiny("gemma3", num_layers=1)
    quantize(model.backbone, mode)
    gkt.enable_lora(model, 2, verbose=0)
    with pytest.raises(
        gkt.errors.LoraError, match=r"quantized \(int8\)\nLoad .* without its embedding"
    ):
        TuningModel(model)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_base_quantized_without_its_embedding_trains_on_kerashubs_own_loss(mode):
    model, pairs = tiny("gemma3", num_layers=1), testing.tiny_pairs(4)
    quantize(model.backbone, mode, filters=lambda layer: "embedding" not in layer.name)
    gkt.enable_lora(model, 2, verbose=0)
    trainer = TuningModel(model)
    trainer.compile(gkt.make_optimizer(1e-3, steps=2))
    dataset = gkt.make_dataset(model, pairs, template=PLAIN, batch_size=4, shuffle=False)
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
    dataset = gkt.make_dataset(model, testing.tiny_pairs(8), batch_size=4, shuffle=False)
    batches = itertools.count()

    def weighted():
        for x, y, share in dataset:
            yield x, y, share * (dict(weights).get(next(batches), 1.0))

    data = tf.data.Dataset.from_generator(weighted, output_signature=dataset.element_spec)
    try:
        trainer.fit(data, epochs=3, verbose=0, callbacks=callbacks)
    except gkt.errors.TrainingError as error:
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
    with pytest.raises(gkt.errors.TrainingError, match="in step 2 of epoch 1"):
        gkt.tune(model, testing.tiny_pairs(8), template=PLAIN, **plan)


def test_half_precision_floatx_is_refused():
    model = tiny("gemma3")
    keras.config.set_floatx("bfloat16")
    try:
        with pytest.raises(gkt.errors.BackendError, match="set_floatx"):
            TuningModel(model)
    finally:
        keras.config.set_floatx("float32")


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
    trainer.compile(gkt.make_optimizer(1e-3, steps=2))
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


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_first_batch_that_fails_leaves_the_weights(epoch):
    import tensorflow as tf

    model = testing.tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, 2, verbose=0)
    trainer = TuningModel(model)
    trainer.compile(gkt.make_optimizer(1e-3, steps=10))
    good = gkt.make_dataset(model, testing.tiny_pairs(8), batch_size=4)
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


def test_what_would_be_ignored_is_refused():
    model = testing.tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, 2, verbose=0)
    trainer = TuningModel(model)
    with pytest.raises(gkt.errors.PlanError, match="would be ignored") as caught:
        trainer.compile("sgd", loss="mse", metrics=["accuracy"], weighted_metrics=["mae"])
    assert [p.split("`")[1] for p in caught.value.problems] == [
        "loss", "metrics", "weighted_metrics"
    ]  # fmt: skip
    with pytest.raises(gkt.GemmaTuneError, match="does not predict"):
        trainer.predict(gkt.make_dataset(model, testing.tiny_pairs(2)))
    with pytest.raises(gkt.GemmaTuneError, match="generate"):
        trainer.predict_on_batch({})


def test_optimizers_are_taken_by_name():
    model = testing.tiny_model("gemma3", num_layers=1)
    trainer = TuningModel(model)
    trainer.compile("lion")
    assert type(trainer.optimizer) is keras.optimizers.Lion
    trainer.compile()
    assert type(trainer.optimizer) is keras.optimizers.AdamW and trainer.jit_compile
    assert float(trainer.optimizer.learning_rate) == pytest.approx(5e-5)
    gkt.enable_lora(model, 2, verbose=0)
    trainer = TuningModel(model)
    trainer.compile("auto", jit_compile=True)
    assert float(trainer.optimizer.learning_rate) == pytest.approx(5e-4)
    assert trainer.gemma is model
    assert {v.path for v in trainer.variables} == {v.path for v in model.variables}
