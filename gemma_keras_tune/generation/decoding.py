"""Compiled decoding: reading prompts into a key/value cache, and writing from there.

Greedy answers are written several tokens at a time where text repeats itself, by prompt lookup
decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). It is speculative
decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192) without a second model: what
followed the last words where they stood before is guessed to follow again. One pass computes what
really comes after each guess, and what was right is kept, so the answer is the one that single
tokens would give. A pass over a few tokens takes little longer than over one, since reading the
weights takes most of its time. Every row goes on at its own pace.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from gemma_keras_tune.gemma.attention import keep_soft_cap, plain_attention
from gemma_keras_tune.gemma.encoding import known_tokens
from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.gemma.packing import axes_of, unpack

# The most tokens guessed for a row in one pass.
MAX_GUESSES = 7
# The most tokens of all rows in one pass: on a CPU, more take longer than they save.
TOKENS_AT_ONCE = 64
# The shortest cache with guesses, in tokens: shorter texts repeat little.
MIN_ROOM = 128

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]


def bound(model: keras.Model, weights: list[Any]) -> keras.StatelessScope:
    """Bind packed weights to the variables of a model.

    Loops enter it in their body: unpacked outside, a kernel would be packed anew in every turn.
    """
    values = unpack(weights, axes_of(model.variables, model))
    return keras.StatelessScope(state_mapping=list(zip(model.variables, values, strict=True)))


def guesses(sampler: Any, rows: int, room: int) -> int:
    """Return the tokens to guess for each row in a pass; 0 for short texts and for samplers."""
    if sampler is not None or room < MIN_ROOM:
        return 0
    return max(0, min(TOKENS_AT_ONCE // rows - 1, MAX_GUESSES))


def write(
    model: keras.Model,
    weights: list[Any],
    sampler: Any,
    chunk: int,
    cache: Any,
    random_state: Any,
    tokens: Any,
    starts: Any,
    at: Any,
    done: Any,
    chunks: Any,
    end: Any,
    stops: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    """Read what is left of the prompts, then write until every row has stopped, or to a place.

    Called once it writes whole answers; called again with what it returned, it writes on.

    Args:
        model: The model, its variables bound to traced values.
        weights: The same values, packed.
        sampler: A sampler, or `None` for greedy.
        chunk: Tokens read at once.
        cache: The key/value cache, which at first is `empty_cache`.
        random_state: Values of the sampler's variables.
        tokens: `[batch, buffer]` int32, every prompt ending at one place, its last token. The
            buffer has room for the answers and `MAX_GUESSES` tokens more.
        starts: `[batch]` int32, where each prompt begins.
        at: `[batch]` int32, the place of each row's last token.
        done: `[batch]` bool, rows that have stopped or only fill the batch.
        chunks: `[2]` int32, the first chunk to read and the one after the last.
        end: Scalar, the place of the last token to write.
        stops: `[stops]` int32.

    Returns:
        Cache, random state, tokens, `at` and `done`, as they are now. Tokens after the last one
        of a row mean nothing.
    """
    cache = _read_prompts(model, weights, chunk, cache, tokens, starts, chunks)
    state = at, tokens, cache, done, random_state
    at, tokens, cache, done, random_state = _write_on(
        model, weights, sampler, state, starts, end, stops
    )
    return cache, random_state, tokens, at, done


def empty_cache(model: keras.Model, rows: int, buffer: int) -> Any:
    """Make the key/value cache of rows of which nothing has been read."""
    return family_of(model).empty_cache(model, rows, buffer)


def _read_prompts(
    model: keras.Model,
    weights: list[Any],
    chunk: int,
    cache: Any,
    tokens: Any,
    starts: Any,
    chunks: Any,
) -> Any:
    """Read all but the last token of the prompts into a cache. Arguments as in `write`."""
    import jax

    rows, buffer = tokens.shape
    step = _step(model)
    mask = ops.arange(buffer)[None, :] >= starts[:, None]

    def read(index: Any, cache: Any) -> Any:
        part = jax.lax.dynamic_slice(tokens, (0, index * chunk), (rows, chunk))
        with bound(model, weights):
            return step(part, cache, index * chunk, mask)[-1]

    return jax.lax.fori_loop(chunks[0], chunks[1], read, cache)


def _write_on(
    model: keras.Model,
    weights: list[Any],
    sampler: Any,
    state: Any,
    starts: Any,
    end: Any,
    stops: Any,
) -> Any:
    """Write as `write` does; the state is `at`, tokens, cache, `done` and random state."""
    import jax

    rows, buffer = state[1].shape
    step = _row_by_row(_step(model))
    mask = ops.arange(buffer)[None, :] >= starts[:, None]
    ahead = ops.arange(guesses(sampler, rows, buffer) + 1)

    def go_on(state: Any) -> Any:
        at, _, _, done, _ = state
        return ((at < end) & ~done).any()

    def one_pass(state: Any) -> Any:
        at, tokens, cache, done, random_state = state
        asked = _last_and_guessed(tokens, at, starts, len(ahead) - 1)
        with bound(model, weights), plain_attention(model):
            logits, hidden, cache = step(asked, cache, at, mask)
            chosen, random_state = _choose(model, sampler, logits, hidden, random_state)
        places = at[:, None] + 1 + ahead
        tokens = tokens.at[ops.arange(rows)[:, None], places].set(chosen, mode="drop")
        right, to_stop = _right_and_to_stop(asked, chosen, stops)
        new = ops.where(done, 0, ops.minimum(ops.minimum(right, to_stop), end - at))
        return at + new, tokens, cache, done | (to_stop <= new), random_state

    # A batch of one for each row, made here, so that every pass writes into the cache in place.
    at, tokens, cache, done, random_state = state
    state = at, tokens, jax.tree.map(lambda part: part[:, None], cache), done, random_state
    at, tokens, cache, done, random_state = jax.lax.while_loop(go_on, one_pass, state)
    return at, tokens, jax.tree.map(lambda part: part[:, 0], cache), done, random_state


def _last_and_guessed(tokens: Any, at: Any, starts: Any, count: int) -> Any:
    """Return the last token of each row, and guesses that follow: `[batch, 1 + count]` int32.

    They are what followed where the last two tokens, or the last, stood for the last time. If that
    runs into the end of the text, it is repeated from there.

    Args:
        tokens: `[batch, buffer]` int32.
        at: `[batch]` int32, the place of the last token.
        starts: `[batch]` int32, where each text begins.
        count: Tokens to guess.
    """
    last = ops.take_along_axis(tokens, at[:, None], axis=1)
    if not count:
        return last
    before = ops.take_along_axis(tokens, ops.maximum(at - 1, 0)[:, None], axis=1)
    places = ops.arange(tokens.shape[1])[None, :]
    one = (tokens == last) & (places >= starts[:, None]) & (places < at[:, None])
    two = one & (ops.roll(tokens, 1, axis=1) == before) & (places > starts[:, None])
    rank = (ops.cast(one, "int32") + two) * tokens.shape[1] + places  # two tokens, then the latest
    found = ops.cast(ops.argmax(ops.where(one, rank, 0), axis=1), "int32")
    period = ops.maximum(at - found, 1)
    follow = found[:, None] + 1 + ops.arange(count)[None, :] % period[:, None]
    return ops.concatenate([last, ops.take_along_axis(tokens, follow, axis=1)], axis=1)


def _right_and_to_stop(asked: Any, chosen: Any, stops: Any) -> tuple[Any, Any]:
    """Count the right tokens of each row, and the tokens up to a stop: each `[batch]`.

    A token is right if all guesses before it were. Without a stop it is more than there are.

    Args:
        asked: `[batch, tokens]`, the last token and the guesses.
        chosen: `[batch, tokens]`, what comes after each.
        stops: `[stops]`.
    """
    guessed = ops.cast(chosen[:, :-1] == asked[:, 1:], "int32")
    right = 1 + ops.sum(ops.cumprod(guessed, axis=1), axis=1)
    stop = (chosen[:, :, None] == stops[None, None, :]).any(axis=-1)
    to_stop = 1 + ops.where(stop.any(axis=1), ops.argmax(stop, axis=1), chosen.shape[1])
    return right, to_stop


def _row_by_row(step: Step) -> Step:
    """Turn a step into one where each row has its own place, and a cache for a batch of one.

    Rows share the weights, so XLA makes the same matrix products of it.
    """
    import jax

    def one(ids: Any, cache: Any, index: Any, mask: Any) -> Any:
        logits, hidden, cache = step(ids[None], cache, index, mask[None])
        return logits[0], hidden[0], cache

    return jax.vmap(one)


def _choose(
    model: keras.Model, sampler: Any, logits: Any, hidden: Any, random_state: Any
) -> tuple[Any, Any]:
    """Choose the token after each token, `[batch, tokens]` int32, and give the sampler's new state.

    Args:
        model: The model, its variables bound to traced values.
        sampler: A sampler, for a single token of each row; or `None` for greedy.
        logits: `[batch, tokens, vocabulary]`.
        hidden: `[batch, tokens, width]`, what the logits come from.
        random_state: Values of the sampler's variables.
    """
    head = family_of(model).head(model)
    known = _known(model, head.embedding.shape[0])
    if known is not None:
        logits = ops.where(known, logits, -math.inf)
    if sampler is not None:
        chosen, random_state = _drawn(sampler, logits[:, 0], random_state)
        return chosen[:, None], random_state
    if keras.backend.is_float_dtype(head.embedding.dtype):
        flat = head.largest(ops.reshape(hidden, (-1, hidden.shape[-1])), known)
        return ops.reshape(flat, hidden.shape[:2]), random_state
    return ops.cast(ops.argmax(logits, axis=-1), "int32"), random_state


def _known(model: keras.Model, rows: int) -> Any:
    """Return the tokens an answer may hold: a model can have more rows than its tokenizer tokens.

    Returns:
        `[rows]` bool, or `None`: all.
    """
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    return None if tokenizer is None else known_tokens(tokenizer, rows)


def _drawn(sampler: Any, logits: Any, random_state: Any) -> tuple[Any, Any]:
    """Draw a token for each row, `[batch]` int32; logits are `[batch, vocabulary]`."""
    kept_apart = [len(v.shape) for v in sampler.variables] != [len(v.shape) for v in random_state]
    if kept_apart:  # every row draws with its own state
        import jax

        chosen, kept = jax.vmap(functools.partial(_draw, sampler))(logits[:, None], random_state)
        return chosen[:, 0], kept
    return _draw(sampler, logits, random_state)


def _draw(sampler: Any, logits: Any, random_state: Any) -> tuple[Any, Any]:
    mapping = list(zip(sampler.variables, random_state, strict=True))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        chosen = sampler.get_next_token(sampler.compute_probabilities(logits))
    values = [scope.get_current_value(v) for v in sampler.variables]
    kept = [old if new is None else new for new, old in zip(values, random_state, strict=True)]
    return ops.cast(chosen, "int32"), kept


def _step(model: keras.Model) -> Step:
    """Return a forward pass over a key/value cache.

    It takes token ids `[batch, length]`, the cache, the first token's place and the mask of real
    tokens `[batch, buffer]`; it returns logits `[batch, length, vocabulary]`, hidden states
    `[batch, length, hidden]` and the cache. Logits that are not used are never computed: XLA leaves
    them out.
    """
    keep_soft_cap(model.backbone)
    forward: Any = model.call_with_cache
    if "padding_mask" not in inspect.signature(forward).parameters:
        return _gemma_step(model.backbone)

    def step(ids: Any, cache: Any, index: Any, mask: Any) -> tuple[Any, Any, Any]:
        return forward(token_ids=ids, cache=cache, cache_update_index=index, padding_mask=mask)

    return step


def _gemma_step(backbone: Any) -> Step:
    """Return `GemmaCausalLM.call_with_cache` with a padding mask, which it does not take."""

    def step(ids: Any, cache: Any, index: Any, mask: Any) -> tuple[Any, Any, Any]:
        x = backbone.token_embedding(ids)
        x = x * ops.cast(ops.sqrt(backbone.hidden_dim), x.dtype)
        caches = []
        for layer, held in zip(backbone.transformer_layers, cache, strict=True):
            x, held = layer(x, padding_mask=mask, cache=held, cache_update_index=index)
            caches.append(held)
        hidden = backbone.layer_norm(x)
        return backbone.token_embedding(hidden, reverse=True), hidden, tuple(caches)

    return step
