"""Cross entropy at response positions that never holds a `[tokens, vocabulary]` array.

The vocabulary is walked in blocks, as attention walks its keys in FlashAttention (Dao et al., 2022,
arXiv:2205.14135): a running maximum, a running sum of exponentials, and, when a gradient is wanted,
a running sum of `probability x embedding row`. That last sum is the gradient with respect to the
hidden states, so the backward pass has no logits to recompute. Cut Cross-Entropy (Wijmans et al.,
2024, arXiv:2411.09009) is the same idea with the logits recomputed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_keras_tune.gemma.head import soft_capped_and_slope

__all__ = ["token_cross_entropy"]

Array = jax.Array

# Blocks of about this many vocabulary rows keep the matmuls large and the logits small.
BLOCK_ROWS = 4096


class TokenScores(NamedTuple):
    """Scores of each position.

    Attributes:
        losses: `[positions]` float32, negative log-likelihood of the label in nats.
        correct: `[positions]` bool, whether the label has the highest logit.
    """

    losses: Array
    correct: Array


def token_cross_entropy(
    hidden: Array,
    embedding: Array,
    labels: Array,
    *,
    soft_cap: float | None = None,
    block_rows: int = BLOCK_ROWS,
    train_embedding: bool = True,
) -> TokenScores:
    """Cross entropy of each position against its label, by blocks of the vocabulary.

    Equal to `logits = cap(hidden @ embedding.T)` followed by a sparse softmax cross entropy, with
    logits and sums in float32.

    Args:
        hidden: `[positions, width]` final hidden states, any float dtype.
        embedding: `[vocabulary, width]` output embedding.
        labels: `[positions]` integer token ids. Ids must lie inside the vocabulary.
        soft_cap: Logits become `soft_cap * tanh(logits / soft_cap)`, as in Gemma 2
            (arXiv:2408.00118, section 2). `None` leaves them as they are.
        block_rows: Vocabulary rows in one block. Temporary memory is
            `positions x block_rows` floats.
        train_embedding: Whether a gradient with respect to `embedding` is wanted. `False` saves
            the work and makes that gradient zero.

    Returns:
        `TokenScores`, one entry for each position.
    """
    return TokenScores(
        *_scores(
            hidden,
            embedding,
            labels,
            soft_cap,
            min(block_rows, embedding.shape[0]),
            train_embedding,
        )
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _scores(
    hidden: Array,
    embedding: Array,
    labels: Array,
    soft_cap: float | None,
    block_rows: int,
    train_embedding: bool,
) -> tuple[Array, Array]:
    maximum, log_sum, _ = _walk(hidden, embedding, soft_cap, block_rows, want_gradient=False)
    return _finish(maximum, log_sum, _label_logits(hidden, embedding, labels, soft_cap)[0])


def _scores_forward(
    hidden: Array,
    embedding: Array,
    labels: Array,
    soft_cap: float | None,
    block_rows: int,
    train_embedding: bool,
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    maximum, log_sum, pull = _walk(hidden, embedding, soft_cap, block_rows, want_gradient=True)
    label_logits, slope, rows = _label_logits(hidden, embedding, labels, soft_cap)
    hidden_gradient = (pull - slope[:, None] * rows.astype(jnp.float32)).astype(hidden.dtype)
    kept = (hidden, embedding, labels, log_sum) if train_embedding else None
    return _finish(maximum, log_sum, label_logits), (hidden_gradient, kept)


def _scores_backward(
    soft_cap: float | None,
    block_rows: int,
    train_embedding: bool,
    residuals: tuple[Any, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array | None, None]:
    hidden_gradient, kept = residuals
    weights = cotangents[0]
    to_hidden = weights[:, None].astype(hidden_gradient.dtype) * hidden_gradient
    if kept is None:
        return to_hidden, None, None
    hidden, embedding, labels, log_sum = kept
    to_embedding = _embedding_gradient(
        hidden, embedding, labels, log_sum, weights, soft_cap, block_rows
    )
    return to_hidden, to_embedding, None


_scores.defvjp(_scores_forward, _scores_backward)


def _finish(maximum: Array, log_sum: Array, label_logits: Array) -> tuple[Array, Array]:
    # The label's logit is computed by a second, differently rounded dot product.
    slack = 1e-6 * jnp.maximum(1.0, jnp.abs(maximum))
    return log_sum - label_logits, label_logits >= maximum - slack


def _logits(hidden: Array, rows: Array, soft_cap: float | None) -> tuple[Array, Array | None]:
    """Capped logits in float32 and the slope of the cap at each."""
    logits = jnp.einsum("pd,vd->pv", hidden, rows, preferred_element_type=jnp.float32)
    return soft_capped_and_slope(logits, soft_cap)


def _label_logits(
    hidden: Array, embedding: Array, labels: Array, soft_cap: float | None
) -> tuple[Array, Array, Array]:
    rows = jnp.take(embedding, labels, axis=0)
    logits = jnp.einsum("pd,pd->p", hidden, rows, preferred_element_type=jnp.float32)
    capped, slope = soft_capped_and_slope(logits, soft_cap)
    return capped, jnp.ones_like(logits) if slope is None else slope, rows


def _blocks(embedding: Array, block_rows: int) -> tuple[Array, Array | None]:
    """Cut the embedding into `[blocks, block_rows, width]`, and the rows that fill no block."""
    vocabulary, width = embedding.shape
    whole = vocabulary // block_rows
    rest = vocabulary - whole * block_rows
    body = embedding[: whole * block_rows].reshape(whole, block_rows, width)
    return body, embedding[-rest:] if rest else None


def _walk(
    hidden: Array,
    embedding: Array,
    soft_cap: float | None,
    block_rows: int,
    *,
    want_gradient: bool,
) -> tuple[Array, Array, Array]:
    """Maximum logit, log of the sum of exponentials, and expected embedding row by softmax."""
    positions, width = hidden.shape
    start = (
        jnp.full((positions,), -jnp.inf, jnp.float32),
        jnp.zeros((positions,), jnp.float32),
        jnp.zeros((positions, width if want_gradient else 0), jnp.float32),
    )

    def step(carry: tuple[Array, Array, Array], rows: Array) -> tuple[Any, None]:
        maximum, total, pull = carry
        logits, slope = _logits(hidden, rows, soft_cap)
        higher = jnp.maximum(maximum, logits.max(axis=-1))
        shrink = jnp.exp(maximum - higher)
        mass = jnp.exp(logits - higher[:, None])
        total = total * shrink + mass.sum(axis=-1)
        if want_gradient:
            steep = mass if slope is None else mass * slope
            pulled = jnp.einsum(
                "pv,vd->pd", steep.astype(rows.dtype), rows, preferred_element_type=jnp.float32
            )
            pull = pull * shrink[:, None] + pulled
        return (higher, total, pull), None

    body, rest = _blocks(embedding, block_rows)
    carry, _ = jax.lax.scan(step, start, body)
    if rest is not None:
        carry, _ = step(carry, rest)
    maximum, total, pull = carry
    return maximum, maximum + jnp.log(total), pull / total[:, None]


def _embedding_gradient(
    hidden: Array,
    embedding: Array,
    labels: Array,
    log_sum: Array,
    weights: Array,
    soft_cap: float | None,
    block_rows: int,
) -> Array:
    """Gradient with respect to the embedding, block by block from recomputed logits."""

    def of_rows(rows: Array, first: Array) -> Array:
        logits, slope = _logits(hidden, rows, soft_cap)
        here = labels[:, None] == first + jnp.arange(rows.shape[0])[None, :]
        error = (jnp.exp(logits - log_sum[:, None]) - here) * weights[:, None]
        if slope is not None:
            error = error * slope
        return jnp.einsum(
            "pv,pd->vd", error.astype(hidden.dtype), hidden, preferred_element_type=jnp.float32
        ).astype(embedding.dtype)

    body, rest = _blocks(embedding, block_rows)
    firsts = jnp.arange(body.shape[0]) * body.shape[1]
    _, parts = jax.lax.scan(lambda _, x: (None, of_rows(*x)), None, (body, firsts))
    gradient = parts.reshape(-1, embedding.shape[1])
    if rest is not None:
        last = of_rows(rest, jnp.asarray(gradient.shape[0]))
        gradient = jnp.concatenate([gradient, last])
    return gradient
