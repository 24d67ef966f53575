"""Training on tiny models of every generation against plain Keras and plain JAX."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.families import backbone_inputs
from gemma_keras_tune.lora import get_factors, lora_linears
from gemma_keras_tune.pipeline import make_batcher, tokenize_pairs
from gemma_keras_tune.training import TuningModel

GENERATIONS = ["gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4 moe"]
PLAIN = "{input}\n{output}"


def tiny(name, **sizes):
    family, _, moe = name.partition(" ")
    return testing.tiny_model(family, moe=bool(moe), **sizes)


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

    return jax.jit(jax.value_and_grad(loss))(state[0])


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

    return jax.jit(jax.value_and_grad(loss))([v.value for v in model.trainable_variables])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_loss_and_gradients_equal_the_full_logits_computation(generation, method):
    model = tiny(generation)
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
    largest = max(float(jnp.abs(w).max()) for w in wanted)
    assert largest > 0
    for variable, got in zip(trainer.trainable_variables, gradients, strict=True):
        want = by_path[variable.path]
        np.testing.assert_allclose(
            got,
            want,
            rtol=1e-4,
            atol=1e-4 * max(float(jnp.abs(want).max()), 1e-3 * largest),
            err_msg=variable.path,
        )


def losses_after_one_update(batch_size, steps):
    model = tiny("gemma3")
    gkt.enable_lora(model, 2, verbose=0)
    pairs = [(f"roll {i}", "x" * (1 + 3 * i)) for i in range(8)]  # answers of unlike lengths
    trainer = TuningModel(model)
    trainer.compile(
        keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps if steps > 1 else None)
    )
    dataset = gkt.make_dataset(
        pairs,
        model,
        template=PLAIN,
        batch_size=batch_size,
        shuffle=False,
        gradient_accumulation_steps=steps,
        sequence_length=40,
    )
    trainer.fit(dataset, epochs=1, shuffle=False, verbose=0)
    return np.concatenate([get_factors(n)[1].ravel() for n in lora_linears(model)])


@pytest.mark.slow
def test_accumulating_eight_single_rows_equals_one_batch_of_eight():
    one, eight = losses_after_one_update(8, 1), losses_after_one_update(1, 8)
    assert np.abs(one).max() > 1e-3
    np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-6)


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
        gkt.make_optimizer(1e-3, updates=updates, warmup_updates=warmup)


def test_the_schedule_warms_up_and_falls_to_a_tenth():
    optimizer = gkt.make_optimizer(1.0, updates=100, warmup_updates=10)
    rate = [float(optimizer._learning_rate(step)) for step in (0, 10, 55, 100)]
    assert rate[0] < 0.2
    assert rate[1] == pytest.approx(1.0)
    assert 0.5 < rate[2] < 0.6
    assert rate[3] == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_tune_learns_by_heart_and_generate_says_it(generation):
    model = tiny(generation)
    pairs = [("part number for roll", "yes"), ("part number for cake", "no")]
    result = gkt.tune(
        model,
        pairs,
        method="full",
        epochs=120,
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
    model = tiny("gemma3")
    result = gkt.tune(model, testing.tiny_pairs(20), template=PLAIN, compilation_cache=False)
    plan = result.plan
    assert plan.updates == plan.batches == 60 and plan.epochs == 12 and plan.batch_size == 4
    assert "60 updates" in capsys.readouterr().out
    again = gkt.tune(
        tiny("gemma3"),
        testing.tiny_pairs(20),
        template=PLAIN,
        plan=plan,
        verbose=0,
        compilation_cache=False,
    )
    assert again.plan == plan
    np.testing.assert_allclose(again.history["loss"], result.history["loss"], rtol=1e-4)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_validation_and_early_stopping_restore_the_best_epoch():
    result = gkt.tune(
        tiny("gemma3"),
        testing.tiny_pairs(20),
        validation_split=0.2,
        early_stopping=1,
        template=PLAIN,
        learning_rate=0.3,
        epochs=30,
        verbose=0,
        compilation_cache=False,
    )
    assert result.plan.pairs == 16
    losses = result.history["val_loss"]
    assert len(losses) < 30
    assert min(losses) < losses[-1]


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
    with pytest.raises(gkt.LoraError, match=r"LoRA rank 2, alpha 4 ") as caught:
        gkt.tune(model, testing.tiny_pairs(4), rank=4, alpha=8, verbose=0)
    assert caught.value.problems == (
        "`rank`: the model has 2. Received: 4",
        "`alpha`: the model has 4. Received: 8",
    )


@pytest.mark.slow
def test_tuning_further_goes_on_with_the_lora_that_is_on(capsys):
    model = tiny("gemma3")
    gkt.enable_lora(model, 2, alpha=4, targets="attention", verbose=0)
    result = gkt.tune(model, testing.tiny_pairs(4), epochs=1, template=PLAIN)
    assert (result.plan.rank, result.plan.alpha) == (2, 4)
    assert "Going on with the LoRA that is on this model: LoRA rank 2" in capsys.readouterr().out


def test_a_plan_that_is_all_warm_up_is_refused():
    with pytest.raises(gkt.PlanError, match="would train nothing"):
        gkt.tune(
            tiny("gemma3"),
            testing.tiny_pairs(4),
            epochs=1,
            batch_size=4,
            warmup_updates=1,
            verbose=0,
        )


def test_early_stopping_without_validation_is_refused():
    with pytest.raises(gkt.PlanError, match="validation"):
        gkt.tune(tiny("gemma3"), testing.tiny_pairs(4), early_stopping=2, verbose=0)
