"""Splitting of pairs into those for training and those for validation."""

import array
from typing import Any

import numpy as np

from gemma_keras_tune.errors import PairsError
from gemma_keras_tune.pairs.reader import PairSource, read_pairs
from gemma_keras_tune.pairs.rows import (
    Pair,
)


def split_pairs(
    pairs: Any, fraction: float = 0.1, *, seed: int = 0
) -> tuple[PairSource, PairSource]:
    """Set a share of the pairs aside for validation.

    Rows that open with the same prompt stay on the same side, so that no validation row was seen in
    training. The same rows, fraction and seed give the same sides. A file or table is read once to
    count, and not held in memory; the pairs of any other source are.

    Args:
        pairs: Anything `read_pairs` takes.
        fraction: The share of rows for validation, over 0 and under 1. At least one row is on each
            side.
        seed: Seed of the choice.

    Returns:
        The pairs for training and those for validation, both with a length and their row numbers in
        the source. Rows left out by `on_error="skip"` are listed with the first.

    Raises:
        PairsError: The fraction is out of range, rows have problems, or there are fewer than two
            different prompts.
    """
    if isinstance(fraction, bool) or not 0 < fraction < 1:
        raise PairsError(f"`fraction` must be between 0 and 1. Received: {fraction!r}")
    source = read_pairs(pairs)
    held: list[Pair] | None = None if source._rows.stable else []
    places, openings = array.array("q"), array.array("q")
    for place, pair in enumerate(source):
        if held is not None:
            held.append(pair)
        places.append(place if held is not None else pair.row)
        openings.append(_opening(pair))
    source.raise_for_problems()
    chosen = _choose_rows(places, openings, fraction, seed)
    names = f"{source.name} [training]", f"{source.name} [validation]"
    if held is None:
        keeps = _masks(source, chosen)
        return source._subset(names[0], keeps[0]), source._subset(names[1], keeps[1])
    aside = set(chosen.tolist())
    sides = (
        read_pairs([pair for place, pair in enumerate(held) if place not in aside]),
        read_pairs([held[place] for place in sorted(aside)]),
    )
    for side, name in zip(sides, names, strict=True):
        side.name = name
    return sides


def _opening(pair: Pair) -> int:
    """Hash the messages before the first answer."""
    parts: list[str] = []
    for message in pair.messages:
        if message.role == "assistant":
            break
        parts += (message.role, message.written)
    return hash(tuple(parts))


def _choose_rows(
    places: "array.array[int]", openings: "array.array[int]", fraction: float, seed: int
) -> np.ndarray:
    """Choose places for validation: whole groups of one opening, in seeded order."""
    _, first, group, sizes = np.unique(
        np.frombuffer(openings, np.int64), return_index=True, return_inverse=True,
        return_counts=True,
    )  # fmt: skip
    if len(sizes) < 2:
        raise PairsError(
            "The pairs cannot be split: all rows open with the same prompt.",
            next_step="Pass validation pairs of your own.",
        )
    # Hashes differ from process to process, so the groups are put in the order of the rows.
    groups = np.argsort(first)
    wanted = min(max(1, round(fraction * len(places))), len(places) - 1)
    aside = np.zeros(len(sizes), bool)
    count = 0
    for index in groups[np.random.default_rng(seed).permutation(len(sizes))]:
        if count + sizes[index] <= wanted:
            aside[index] = True
            count += int(sizes[index])
        if count == wanted:
            break
    if not count:  # Every group is larger than the share.
        aside[groups[np.argmin(sizes[groups])]] = True
    return np.frombuffer(places, np.int64)[aside[group]]


def _masks(source: PairSource, chosen: np.ndarray) -> tuple[bytearray, bytearray]:
    """Make a mask of the rows of each side, one byte for each row number."""
    assert source._found is not None
    count = source._found.rows + 1
    training = bytearray(b"\0" + b"\1" * (count - 1))
    if source._keep is not None:
        training[:] = source._keep[:count]
    validation = bytearray(count)
    np.frombuffer(training, np.uint8)[chosen] = 0
    np.frombuffer(validation, np.uint8)[chosen] = 1
    return training, validation
