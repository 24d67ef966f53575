"""Samplers by their name, by a temperature, or as Google advises them for Gemma."""

import contextlib
import difflib
from typing import Any

import keras_hub

from gemma_keras_tune._support.numbers import NOT_NEGATIVE
from gemma_keras_tune.errors import GenerationError

NAMES = ("greedy", "top_k", "top_p", "random")


def advised_sampler(temperature: float = 1.0) -> keras_hub.samplers.Sampler:
    """Make the sampler that Google advises for Gemma, top-p among the 64 likeliest tokens."""
    return keras_hub.samplers.TopPSampler(p=0.95, k=64, temperature=temperature)


def resolve_sampler(
    sampler: str | keras_hub.samplers.Sampler, temperature: float | None = None
) -> keras_hub.samplers.Sampler:
    """Find the sampler that a user means.

    Args:
        sampler: A KerasHub sampler or its name. `"auto"` is `"greedy"`, and with a temperature
            above 0 `advised_sampler`.
        temperature: A number by which the logits are divided, for a sampler given by its name; 0
            is greedy. `None` leaves the sampler as it is.

    Returns:
        A KerasHub sampler.

    Raises:
        GenerationError: There is no such sampler, the temperature is out of range, or one
            contradicts the other.
    """
    if temperature is not None and (problem := NOT_NEGATIVE.problem("temperature", temperature)):
        raise GenerationError(problem)
    if sampler == "auto":
        return advised_sampler(float(temperature)) if temperature else _by_name("greedy")
    found = _by_name(sampler)
    if temperature is None:
        return found
    greedy = isinstance(found, keras_hub.samplers.GreedySampler)
    if temperature == 0 or greedy:
        if temperature or not greedy:
            raise GenerationError(
                f"`temperature={temperature!r}` and `sampler={sampler!r}` contradict each other: "
                "a temperature of 0 is greedy, and one above 0 draws at random.",
                next_step="Pass one of them.",
            )
        return found
    if found is sampler:
        raise GenerationError(
            f"`temperature={temperature!r}`: a sampler that is passed as an object has its own "
            f"temperature. Received: {sampler!r}",
            next_step="Pass its name, or pass the temperature to it.",
        )
    return type(found)(temperature=float(temperature))


def _by_name(sampler: Any) -> keras_hub.samplers.Sampler:
    found = None
    with contextlib.suppress(TypeError, ValueError):
        found = keras_hub.samplers.get(sampler)
    if isinstance(found, keras_hub.samplers.Sampler):
        return found
    near = difflib.get_close_matches(str(sampler), NAMES, 1, 0.4)
    raise GenerationError(
        f"`sampler` must be a KerasHub sampler or a name: {', '.join(map(repr, NAMES))}. "
        f"Received: {sampler!r}",
        next_step=f"Do you mean {near[0]!r}?" if near else None,
    )
