"""The blockwise cross entropy against the plain one over full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_keras_tune.training.losses import token_cross_entropy


def plain(hidden, embedding, labels, soft_cap):
    logits = hidden @ embedding.T
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked, logits.argmax(-1) == labels


def case(positions=13, vocabulary=100, width=8, seed=0):
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.normal(size=(positions, width)), "float32")
    embedding = jnp.asarray(random.normal(size=(vocabulary, width)), "float32")
    labels = random.integers(0, vocabulary, positions)
    # Some labels are the most likely token, or accuracy would be all zeros.
    labels[::3] = np.asarray(hidden @ embedding.T).argmax(-1)[::3]
    weights = jnp.asarray(random.uniform(size=positions), "float32")
    return hidden, embedding, jnp.asarray(labels, "int32"), weights


@pytest.mark.slow
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("block_rows", [7, 20, 100, 4096])
def test_equals_the_plain_computation(soft_cap, block_rows):
    hidden, embedding, labels, weights = case()

    def ours(hidden, embedding):
        scores = token_cross_entropy(
            hidden, embedding, labels, soft_cap=soft_cap, block_rows=block_rows
        )
        return (scores.losses * weights).sum(), scores

    def theirs(hidden, embedding):
        losses, correct = plain(hidden, embedding, labels, soft_cap)
        return (losses * weights).sum(), (losses, correct)

    grad = dict(argnums=(0, 1), has_aux=True)
    (loss, scores), gradients = jax.value_and_grad(ours, **grad)(hidden, embedding)
    (expected, (losses, correct)), wanted = jax.value_and_grad(theirs, **grad)(hidden, embedding)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.losses, losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores.correct, correct)
    assert 0 < correct.sum() < len(correct)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_without_a_gradient_the_values_are_the_same():
    hidden, embedding, labels, _ = case()
    scores = token_cross_entropy(hidden, embedding, labels, block_rows=16)
    losses, correct = plain(hidden, embedding, labels, None)
    np.testing.assert_allclose(scores.losses, losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores.correct, correct)


@pytest.mark.slow
def test_a_frozen_embedding_gets_no_gradient_and_hidden_states_the_same_one():
    hidden, embedding, labels, weights = case()

    def loss(hidden, embedding, train_embedding):
        scores = token_cross_entropy(
            hidden, embedding, labels, block_rows=16, train_embedding=train_embedding
        )
        return (scores.losses * weights).sum()

    frozen = jax.grad(loss, argnums=(0, 1))(hidden, embedding, False)
    trained = jax.grad(loss, argnums=(0, 1))(hidden, embedding, True)
    np.testing.assert_array_equal(frozen[0], trained[0])
    np.testing.assert_array_equal(frozen[1], np.zeros_like(embedding))


@pytest.mark.slow
def test_extreme_logits_stay_finite():
    hidden, embedding, labels, _ = case()
    scores = token_cross_entropy(1e3 * hidden, 1e3 * embedding, labels, block_rows=16)
    assert np.isfinite(scores.losses).all()


@pytest.mark.slow
@pytest.mark.parametrize("train_embedding", [False, True])
def test_no_array_of_tokens_by_vocabulary_is_ever_made(train_embedding):
    positions, vocabulary, width, block = 24, 4096, 4, 64
    shapes = jax.ShapeDtypeStruct
    program = jax.jit(
        jax.grad(
            lambda h, e, y: token_cross_entropy(
                h, e, y, block_rows=block, soft_cap=5.0, train_embedding=train_embedding
            ).losses.sum(),
            argnums=(0, 1),
        )
    ).lower(
        shapes((positions, width), "float32"),
        shapes((vocabulary, width), "float32"),
        shapes((positions,), "int32"),
    )
    text = program.compile().as_text()
    assert f"[{positions},{vocabulary}]" not in text
    assert f"[{positions},{block}]" in text


@pytest.mark.slow
def test_half_precision_labels_keep_their_ids():
    hidden, embedding, _, _ = case(vocabulary=600)
    labels = jnp.asarray([599] * 13, "int32")
    scores = token_cross_entropy(hidden.astype("bfloat16"), embedding.astype("bfloat16"), labels)
    losses, _ = plain(hidden, embedding, labels, None)
    np.testing.assert_allclose(scores.losses, losses, atol=0.15)
