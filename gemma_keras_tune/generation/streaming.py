"""An answer piece by piece, while it is being written.

The same program as `generate` runs for one prompt, called again after every few tokens. Between two
calls the key/value cache stays on the device.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
import numpy as np

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune._support.memory import kept_memory
from gemma_keras_tune.adapters.active import ACTIVE, Active, use_adapter
from gemma_keras_tune.gemma.state import model_lock
from gemma_keras_tune.gemma.templates import TemplateSpec, get_template
from gemma_keras_tune.generation import answers
from gemma_keras_tune.generation.answers import Prompt
from gemma_keras_tune.generation.samplers import resolve_sampler


def stream(
    model: keras.Model,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    sampler: str | keras_hub.samplers.Sampler = "auto",
    temperature: float | None = None,
    seed: int | None = None,
    every: int = 4,
    adapter: str | Active | None = ACTIVE,
    template: TemplateSpec = "auto",
    tools: answers.Tools | None = None,
) -> Iterator[str]:
    """Answer one prompt, and give the answer while it is written.

    The weights are taken when the first piece is asked for: an adapter that is switched later does
    not change an answer that has begun.

    Args:
        model: A KerasHub Gemma `CausalLM` with its preprocessor, tuned or not.
        prompt: A user's text, or a conversation, as for `generate`.
        max_new_tokens: Longest answer, in tokens.
        sampler: As for `generate`.
        temperature: As for `generate`.
        seed: As for `generate`.
        every: Tokens in a piece, at least 1. Fewer come sooner, more cost less.
        adapter: As for `generate`. Others may be switched on while the answer is written.
        template: As for `generate`.
        tools: As for `generate`. Calls come as the model writes them.

    Yields:
        Pieces of text. Together they are what `generate` gives with `strip=False`: without the
        stop token, and no piece ends within a character.

    Raises:
        TemplateError: The prompt is no conversation, or the template does not fit the model.
        AdapterError: There is no such adapter.
        GenerationError: A number is out of range, there is no such sampler, or the prompt does not
            fit into the context.
    """
    check_backend()
    tokenizer: Any = answers.tokenizer_of(model)
    with use_adapter(model, adapter):
        resolved = get_template(model, template)
    row = answers.encode_prompts([prompt], resolved, tokenizer, tools)[0]
    answers.check_numbers([row], max_new_tokens=max_new_tokens, every=every)
    answers.check_context(model, [row], max_new_tokens)
    stops = resolved.stop_token_ids(tokenizer)
    chosen = resolve_sampler(sampler, temperature)
    written = _written(model, row, stops, max_new_tokens, chosen, seed, every, adapter)
    return _one_at_a_time(model, _pieces(written, tokenizer))


def _one_at_a_time(model: keras.Model, pieces: Iterator[str]) -> Iterator[str]:
    """Hold the model while a piece is computed, and not while the user has it.

    With the first one the weights are taken and all programs traced, so what is switched, loaded or
    removed later does not matter.
    """
    while True:
        with model_lock(model):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _pieces(answers: Iterator[np.ndarray], tokenizer: Any) -> Iterator[str]:
    """Yield the new part of each answer, which grows from one to the next."""
    given = ""
    text = ""
    for ids in answers:
        text = str(tokenizer.detokenize(ids))
        # The last bytes of a character may still be to come.
        if text.startswith(given) and not text.endswith("\ufffd") and len(text) > len(given):
            yield text[len(given) :]
            given = text
    if len(text) > len(given):
        yield text[len(given) :]


def _written(
    model: keras.Model,
    row: np.ndarray,
    stop_token_ids: Any,
    max_new_tokens: int,
    sampler: keras_hub.samplers.Sampler,
    seed: int | None,
    every: int,
    adapter: str | Active | None,
) -> Iterator[np.ndarray]:
    """The answer so far, after each few tokens."""
    stops = tuple(sorted({int(i) for i in stop_token_ids}))
    state = answers.SamplerState(sampler, seed, 1)
    calls = [([len(row)], max_new_tokens)]
    shapes = answers.choose_programs(model, calls, state.sampler, 1)
    batch = answers.batches([row], shapes, max_new_tokens)[0]
    with use_adapter(model, adapter):
        weights = answers.weights_of(model)
    with contextlib.closing(state), kept_memory():
        for (written,) in answers.write_batch(
            model, weights, [row], batch, stops, state, every=every
        ):
            ids, stopped = answers.cut(written, stops)
            yield ids
            if stopped:
                break
