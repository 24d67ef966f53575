"""Static shapes: few, because each new one is a compilation, and with little padding."""

import dataclasses
import math
from typing import Any

import numpy as np

from gemma_keras_tune._support.backend import replicas

MAX_SHAPES = 4
LENGTH_STEP = 8
# One more shape must save at least this share of the padded tokens, or it is not worth compiling.
MIN_SAVING = 0.08


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static shape, and so one compiled program.

    Attributes:
        batch_size: Rows in a batch.
        length: Tokens in a row.
        positions: Trained positions in a batch.
    """

    batch_size: int
    length: int
    positions: int


def choose_shapes(
    lengths: np.ndarray,
    response_lengths: np.ndarray,
    batch_size: int,
    *,
    max_shapes: int = MAX_SHAPES,
    sequence_length: int | None = None,
    parts: int = 1,
) -> tuple[Shape, ...]:
    """Choose the few static shapes that waste the least on padding.

    Row lengths are cut into at most `max_shapes` groups by dynamic programming over the rounded
    lengths. A further group has to spare `MIN_SAVING` of all padded tokens. The positions of a
    group hold any batch that `Batcher` can draw from it.

    Args:
        lengths: `[rows]` tokens of each row.
        response_lengths: `[rows]` trained tokens of each row.
        batch_size: Rows in a batch.
        max_shapes: Most shapes to use.
        sequence_length: Use this one length for all rows, instead of choosing.
        parts: Parts that every batch is split into, one for each replica of the model.

    Returns:
        Shapes in order of length; a row belongs to the first one long enough for it.
    """
    if sequence_length is not None:
        bounds = [sequence_length]
    else:
        bounds = _choose_lengths(lengths, max_shapes, batch_size)
    group = np.searchsorted(bounds, lengths)
    shapes = []
    for index, length in enumerate(bounds):
        inside = np.flatnonzero(group == index)
        if not len(inside):
            continue
        rows = min(batch_size, _round_up(len(inside), parts)) if len(bounds) == 1 else batch_size
        strata = stratify(inside, response_lengths, rows)
        positions = int(np.where(strata >= 0, response_lengths[strata], 0).max(axis=1).sum())
        shapes.append(Shape(rows, int(length), _round_up(positions, math.lcm(LENGTH_STEP, parts))))
    return tuple(shapes)


def stratify(rows: np.ndarray, response_lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Sort rows by response length, into `batch_size` strata from which each batch draws one row.

    So every batch, however the strata are shuffled, has at most the sum of their longest answers:
    a bound close to the average, and the number of batches is the same in every epoch.

    Returns:
        `[batch_size, batches]` int32 rows, -1 where there is none.
    """
    batches = math.ceil(len(rows) / batch_size)
    slots = np.full(batches * batch_size, -1, np.int32)
    slots[len(slots) - len(rows) :] = rows[np.argsort(response_lengths[rows], kind="stable")]
    return slots.reshape(batch_size, batches)


def indivisible(batch_size: Any) -> list[str]:
    """Describe a batch that the replicas of the model cannot share: a list of one text, or empty.

    Args:
        batch_size: Rows in a batch; other values than an integer are not judged.
    """
    parts = replicas()
    if not isinstance(batch_size, int) or batch_size % parts == 0:
        return []
    return [
        f"`batch_size` must be a multiple of {parts}, the devices or groups of devices that share "
        f"each batch. Received: {batch_size}"
    ]


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step


def _choose_lengths(lengths: np.ndarray, max_shapes: int, batch_size: int) -> list[int]:
    steps = np.bincount(-(-lengths // LENGTH_STEP))
    values = np.flatnonzero(steps)
    total = np.cumsum(steps[values])  # rows of that length or less
    if len(values) > 256:
        # Quantiles: enough candidates for any choice of four; keeps the table small.
        ranks = np.ceil(np.linspace(0, len(lengths) - 1, 257))
        edges = np.unique(np.searchsorted(total, ranks, "right"))
        values, total = values[edges], total[edges]
    values, counts = values * LENGTH_STEP, np.diff(total, prepend=0)
    best = _partition(values, counts, min(max_shapes, len(values)))
    # A compilation takes as long as several batches: a small set is not worth a second one.
    most = max(1, len(lengths) // (8 * batch_size))
    chosen = best[0]
    for candidate in best[1:most]:
        if candidate[0] <= (1.0 - MIN_SAVING) * chosen[0]:
            chosen = candidate
    return chosen[1]


def _partition(values: np.ndarray, counts: np.ndarray, most: int) -> list[tuple[float, list[int]]]:
    """Give, for 1, 2, … `most` groups, the fewest padded tokens and the bounds of the groups."""
    total = np.concatenate([[0], np.cumsum(counts)])
    size = len(values)
    cost = np.full((most + 1, size + 1), np.inf)
    cost[0, 0] = 0.0
    back = np.zeros((most + 1, size + 1), np.int64)
    for groups in range(1, most + 1):
        for end in range(1, size + 1):
            options = cost[groups - 1, :end] + (total[end] - total[:end]) * values[end - 1]
            back[groups, end] = int(np.argmin(options))
            cost[groups, end] = options[back[groups, end]]
    result = []
    for groups in range(1, most + 1):
        bounds: list[int] = []
        end = size
        for level in range(groups, 0, -1):
            bounds.append(int(values[end - 1]))
            end = int(back[level, end])
        result.append((float(cost[groups, size]), bounds[::-1]))
    return result
