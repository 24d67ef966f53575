"""Pairs to `tf.data`: tokenize once, group by length, batch, pad, shuffle, prefetch.

Every row is tokenized once, in text pieces: prompt and answer apart, so that a prompt has the same
ids here as when it is served. The ids are kept as one flat array, in memory or, past `SPOOL_BYTES`,
in an unnamed temporary file that is mapped into memory; so a million rows cost a few bytes each.
Whatever goes through all of them works by the chunk, or on numbers of 4 bytes a row.

A batch carries, beside the padded ids, the flat positions whose hidden states predict a trained
token, their labels and their weights. The loss looks at nothing else. Lengths and position counts
are rounded to a few static shapes, because each new shape is a compilation.
"""

import dataclasses
import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import keras
import numpy as np

from gemma_keras_tune.errors import PairsError, PlanError, warn_of_pairs
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.templates import (
    Segment,
    Template,
    attach_template,
    get_template,
)
from gemma_keras_tune.pairs.reader import Findings, Pair, PairsErrors, read_pairs
from gemma_keras_tune.pairs.sources import at_start

SPOOL_BYTES = 64 * 2**20
MAX_SHAPES = 4
LENGTH_STEP = 8
# One more shape must spare at least this share of the padded tokens, or it is not worth compiling.
MIN_SAVING = 0.08
_ROWS_AT_ONCE = 1024

Overlong = Literal["error", "drop", "truncate"]


class TokenizedPairs:
    """Token ids of all rows, flat, with the mask of trained tokens.

    Attributes:
        ids: `[tokens]` int32, all rows one after the other, each beginning with `<bos>`.
        trained: `[tokens]` bool, tokens the model is taught to produce.
        offsets: `[rows + 1]` int64, where each row begins.
        rows: `[rows]` integers, row numbers in the source, from 1.
        response_lengths: `[rows]` int32, trained tokens of each row; counted where left out.
        dropped: Row numbers left out because the user asked for it.
        truncated: Row numbers cut because the user asked for it.
    """

    def __init__(
        self,
        ids: np.ndarray,
        trained: np.ndarray,
        offsets: np.ndarray,
        rows: np.ndarray,
        *,
        response_lengths: np.ndarray | None = None,
        dropped: tuple[int, ...] = (),
        truncated: tuple[int, ...] = (),
    ) -> None:
        self.ids = ids
        self.trained = trained
        self.offsets = offsets
        self.rows = rows
        if response_lengths is None:
            response_lengths = _count_trained(trained, offsets[:-1])
        self.response_lengths = response_lengths
        self.dropped = dropped
        self.truncated = truncated

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """`[rows]` int32, tokens each row feeds into the model: all but its last one."""
        return (np.diff(self.offsets) - 1).astype(np.int32)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and trained mask of one row, by its place (from 0) among the kept rows."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return np.asarray(self.ids[span]), np.asarray(self.trained[span])


def _count_trained(trained: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """`[rows]` int32, trained tokens of each row; takes 4 bytes a token."""
    return (
        np.add.reduceat(trained, starts, dtype=np.int32) if len(starts) else np.zeros(0, np.int32)
    )


def tokenize_pairs(
    pairs: Any,
    model: keras.Model,
    *,
    template: Any = "auto",
    max_length: int | None = None,
    overlong: Overlong = "error",
    on_pair: Callable[[Pair], None] | None = None,
) -> TokenizedPairs:
    """Read, check, render and tokenize all pairs, once.

    Args:
        pairs: Anything `read_pairs` takes.
        model: A KerasHub Gemma with its preprocessor.
        template: Anything `get_template` takes.
        max_length: Longest row in tokens, or `None` for no limit.
        overlong: What to do with a longer row: `"error"` reports all of them, `"drop"` leaves
            them out, `"truncate"` cuts the end (the cut row then has no stop token to learn).
        on_pair: Called with every valid pair, for example to collect warnings.

    Returns:
        `TokenizedPairs`.

    Raises:
        PairsError: Rows with problems, overlong ones among them, all at once with their row
            numbers; or no row at all.

    Warns:
        PairsWarning: Rows were left out or cut, as `overlong` asks.
    """
    source = read_pairs(pairs)
    template = get_template(model, template)
    encoder = RowTokenizer(model.preprocessor.tokenizer)
    limit = _Limit(max_length, overlong)
    spool = _Spool()
    pairs = iter(source)
    while True:
        places = _Places()
        segments = _segments(itertools.islice(pairs, _ROWS_AT_ONCE), template, places, on_pair)
        encoded = encoder.encode_rows(segments)
        if not places.rows:
            break
        spool.append(*limit.apply(places, *encoded))
    errors = PairsErrors()
    with errors.collect():
        source.raise_for_problems()
    with errors.collect():
        limit.raise_for_problems()
    errors.raise_all()
    limit.warn(source.name)
    return spool.finish(limit)


@dataclasses.dataclass
class _Places:
    """Where some rows stand: the row, line and file of each.

    In three lists and not in an object a row: Python's garbage collector goes through all that a
    process holds, a quarter of a second, once so many objects have lived for a while.
    """

    rows: list[int] = dataclasses.field(default_factory=list)
    lines: list[int | None] = dataclasses.field(default_factory=list)
    files: list[str | None] = dataclasses.field(default_factory=list)

    def add(self, pair: Pair) -> None:
        self.rows.append(pair.row)
        self.lines.append(pair.line)
        self.files.append(pair.file)

    def __getitem__(self, index: int) -> tuple[int, int | None, str | None]:
        return self.rows[index], self.lines[index], self.files[index]


def _segments(
    pairs: Iterable[Pair],
    template: Template,
    places: _Places,
    on_pair: Callable[[Pair], None] | None,
) -> Iterator[Sequence[Segment]]:
    """The segments of each pair, its place noted."""
    for pair in pairs:
        if on_pair:
            on_pair(pair)
        places.add(pair)
        yield template.segments(pair.messages)


class _Spool:
    """Grows flat arrays, in memory first and in a temporary file when they get large."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._response_lengths: list[np.ndarray] = []
        self._held = 0
        self._files: list[Any] | None = None

    def append(
        self, ids: np.ndarray, trained: np.ndarray, counts: np.ndarray, rows: np.ndarray
    ) -> None:
        self._counts.append(counts)
        self._rows.append(rows)
        self._response_lengths.append(_count_trained(trained, np.cumsum(counts) - counts))
        self._ids.append(ids)
        self._trained.append(trained)
        self._held += ids.nbytes + trained.nbytes
        if self._files is not None or self._held > SPOOL_BYTES:
            self._spill()

    def _spill(self) -> None:
        if self._files is None:
            # Unnamed files: the system takes them back even if the process is killed.
            self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        for file, arrays in zip(self._files, (self._ids, self._trained), strict=True):
            for array in arrays:
                file.write(array.tobytes())
            arrays.clear()

    def finish(self, limit: "_Limit") -> TokenizedPairs:
        if self._files is None:
            ids, trained = np.concatenate(self._ids), np.concatenate(self._trained)
        else:
            for file in self._files:
                file.flush()
            ids = np.memmap(self._files[0], np.int32, "r")
            trained = np.memmap(self._files[1], bool, "r")
        offsets = np.zeros(1 + sum(map(len, self._counts)), np.int64)
        np.cumsum(np.concatenate(self._counts), out=offsets[1:])
        return TokenizedPairs(
            ids,
            trained,
            offsets,
            np.concatenate(self._rows),
            response_lengths=np.concatenate(self._response_lengths),
            dropped=limit.long.row_numbers() if limit.overlong == "drop" else (),
            truncated=limit.long.row_numbers() if limit.overlong == "truncate" else (),
        )


class _Limit:
    """Holds rows to a length while they stream by, and remembers those that are longer.

    Args:
        length: Most tokens a row may feed into the model, or `None` for no limit.
        overlong: What to do with a longer row.

    Raises:
        PairsError: `overlong` is none of the three.
    """

    def __init__(self, length: int | None, overlong: Overlong) -> None:
        if overlong not in ("error", "drop", "truncate"):
            raise PairsError(
                f"`overlong` must be 'error', 'drop' or 'truncate'. Received: {overlong!r}"
            )
        self.length = length
        self.overlong = overlong
        self.long = Findings()
        self._bare = Findings()
        self._longest = 0
        self._rows = self._kept = 0

    def apply(
        self, places: _Places, ids: np.ndarray, trained: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The arrays of some rows, without what is over the limit, and their row numbers."""
        rows = np.asarray(places.rows, np.int32)
        if self.length is not None:
            most = self.length + 1  # the last token is not fed
            long = counts > most
            self._note(places, counts - 1, long)
            if self.overlong != "error" and long.any():
                kept = np.where(long, 0 if self.overlong == "drop" else most, counts)
                inside = _places_within(counts) < np.repeat(kept, counts)
                ids, trained = ids[inside], trained[inside]
                counts, rows = kept[kept > 0], rows[kept > 0]
                if self.overlong == "truncate":
                    self._note_bare(places, _count_trained(trained, np.cumsum(counts) - counts))
        self._rows += len(places.rows)
        self._kept += len(rows)
        return ids, trained, counts, rows

    def _note(self, places: _Places, lengths: np.ndarray, long: np.ndarray) -> None:
        for index in np.flatnonzero(long).tolist():
            length = int(lengths[index])
            self.long.add(*places[index], [f"{length:,} tokens"])
            self._longest = max(self._longest, length)

    def _note_bare(self, places: _Places, response_lengths: np.ndarray) -> None:
        for index in np.flatnonzero(response_lengths == 0).tolist():
            text = f"the prompt alone fills {self.length:,} tokens, and no answer is left to learn"
            self._bare.add(*places[index], [text])

    def raise_for_problems(self) -> None:
        """Report rows over the limit, unless they were to be dropped or cut and can be."""
        long = len(self.long.row_numbers())
        if long and self.overlong == "error":
            raise PairsError(
                f"{self._so_many(long)} longer than {self.length:,} tokens.",
                self.long.lines(),
                f"Raise `sequence_length` (to {self._longest} for all rows), shorten the rows, or "
                "pass `overlong='drop'` or `overlong='truncate'`.",
            )
        bare = len(self._bare.row_numbers())
        if bare:
            raise PairsError(
                f"{self._so_many(bare)} cut before the answer.",
                self._bare.lines(),
                "Raise `sequence_length` or drop these rows with `overlong='drop'`.",
            )
        if long and not self._kept:
            raise PairsError("Every row is over the length limit: none is left to train on.")

    def warn(self, name: str) -> None:
        """Tell of the rows that were dropped or cut, if there are any."""
        if long := len(self.long.row_numbers()):
            done = "left out" if self.overlong == "drop" else "cut"
            warn_of_pairs(
                f"{at_start(name)}: {self._so_many(long)} longer than {self.length:,} tokens and "
                f"{done}.",
                self.long.lines(),
                stacklevel=4,
            )

    def _so_many(self, count: int) -> str:
        return f"{count:,} of {self._rows:,} rows {'is' if count == 1 else 'are'}"


def _places_within(counts: np.ndarray) -> np.ndarray:
    """For rows laid one after the other: the place of each token in its row, from 0."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A static shape, and so one compiled program.

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
) -> tuple[Shape, ...]:
    """The few static shapes that waste the least on padding.

    Row lengths are cut into at most `max_shapes` groups by dynamic programming over the rounded
    lengths. A further group has to spare `MIN_SAVING` of all padded tokens. The positions of a
    group hold any batch that `Batcher` can draw from it.

    Args:
        lengths: `[rows]` tokens of each row.
        response_lengths: `[rows]` trained tokens of each row.
        batch_size: Rows in a batch.
        max_shapes: Most shapes to use.
        sequence_length: Use this one length for all rows, instead of choosing.

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
        rows = min(batch_size, len(inside)) if len(bounds) == 1 else batch_size
        strata = _strata(inside, response_lengths, rows)
        positions = int(np.where(strata >= 0, response_lengths[strata], 0).max(axis=1).sum())
        shapes.append(Shape(rows, int(length), _round_up(positions, LENGTH_STEP)))
    return tuple(shapes)


def _strata(rows: np.ndarray, response_lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows by answer length, cut into `batch_size` strata from which each batch draws one row.

    So every batch, however the strata are shuffled, has at most the sum of their longest answers:
    a bound close to the average, and the number of batches is the same in every epoch.

    Returns:
        `[batch_size, batches]` int32 rows, -1 where there is none.
    """
    batches = math.ceil(len(rows) / batch_size)
    slots = np.full(batches * batch_size, -1, np.int32)
    slots[len(slots) - len(rows) :] = rows[np.argsort(response_lengths[rows], kind="stable")]
    return slots.reshape(batch_size, batches)


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
    """For 1, 2, … `most` groups: padded tokens and the group bounds that make them fewest."""
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


class Batches(Sequence[tuple[Shape, np.ndarray]]):
    """The batches of one epoch, each as its shape and its row places; 4 bytes a row.

    Args:
        shapes: Static shapes.
        tables: For each shape `[batches, batch_size]` row places, -1 where there is none.
        order: `[batches]` places in the tables, laid one after the other; -1 for an empty batch.
    """

    def __init__(
        self, shapes: Sequence[Shape], tables: Sequence[np.ndarray], order: np.ndarray
    ) -> None:
        self._shapes = shapes
        self._tables = tables
        self._order = order
        self._ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> tuple[Shape, np.ndarray]: ...

    @overload
    def __getitem__(self, index: slice) -> "Batches": ...

    def __getitem__(self, index: int | slice) -> "tuple[Shape, np.ndarray] | Batches":
        if isinstance(index, slice):
            return Batches(self._shapes, self._tables, self._order[index])
        place = self._order[index]
        if place < 0:
            return self._shapes[0], np.zeros(0, np.int64)
        group = int(np.searchsorted(self._ends, place, "right"))
        rows = self._tables[group][place - self._ends[group]]
        return self._shapes[group], rows[rows >= 0]


Arrays = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


class Batcher:
    """Decides which rows go together, epoch by epoch, and builds the arrays.

    Args:
        tokens: The rows.
        shapes: Static shapes, in order of length.
        pad_id: Token id that fills short rows.
        shuffle: Whether rows and batches change order from epoch to epoch.
        seed: Seed of that order.
        gradient_accumulation_steps: Batches whose gradients make one update. The weights of their
            positions are scaled so that Keras's mean over the batches is the mean over all their
            trained tokens.
    """

    def __init__(
        self,
        tokens: TokenizedPairs,
        shapes: Sequence[Shape],
        pad_id: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        gradient_accumulation_steps: int = 1,
    ) -> None:
        self.tokens = tokens
        self.shapes = tuple(shapes)
        self.pad_id = pad_id
        self.shuffle = shuffle
        self.seed = seed
        self.gradient_accumulation_steps = gradient_accumulation_steps
        bounds = np.asarray([shape.length for shape in self.shapes], np.int32)
        self._group = np.searchsorted(bounds, tokens.lengths).astype(np.int8)
        self._epochs: dict[int, Batches] = {}

    def epoch(self, epoch: int) -> "Batches":
        """The batches of one epoch: every row once, as its shape and its row places.

        A multiple of `gradient_accumulation_steps` of them: empty batches complete the last update.
        """
        random = np.random.default_rng([self.seed, epoch])
        tables = []
        for index, shape in enumerate(self.shapes):
            rows = np.flatnonzero(self._group == index)
            strata = _strata(rows, self.tokens.response_lengths, shape.batch_size)
            if self.shuffle:
                strata = random.permuted(strata, axis=1)
            tables.append(strata.T)
        count = sum(map(len, tables))
        order = random.permutation(count) if self.shuffle else np.arange(count)
        missing = -count % self.gradient_accumulation_steps
        return Batches(self.shapes, tables, np.concatenate([order, np.full(missing, -1)]))

    @property
    def batches_per_epoch(self) -> int:
        """Batches of every epoch, those that only complete the last update among them."""
        counts = np.bincount(self._group, minlength=len(self.shapes))
        batches = sum(math.ceil(n / s.batch_size) for n, s in zip(counts, self.shapes, strict=True))
        return batches + -batches % self.gradient_accumulation_steps

    def arrays(self, epoch: int) -> Iterator[Arrays]:
        """The arrays of one epoch, batch by batch, as `(x, y, sample_weight)`."""
        return (self.batch(epoch, index) for index in range(self.batches_per_epoch))

    def batch(self, epoch: int, index: int) -> Arrays:
        """The arrays of one batch of an epoch, both counted from 0."""
        batches, steps = self._batches_of(epoch), self.gradient_accumulation_steps
        first = index - index % steps
        update = batches[first : first + steps]
        trained = sum(int(self.tokens.response_lengths[rows].sum()) for _, rows in update)
        return self._pad(*batches[index], steps / trained)

    def _batches_of(self, epoch: int) -> "Batches":
        """What `epoch` returns, made once for an iterator, and for two that run side by side."""
        found = self._epochs.get(epoch)  # several threads come here
        if found is None:
            found = self.epoch(epoch)
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: found}
        return found

    def _pad(self, shape: Shape, rows: np.ndarray, weight: float) -> Arrays:
        token_ids = np.full((shape.batch_size, shape.length), self.pad_id, np.int32)
        padding_mask = np.zeros((shape.batch_size, shape.length), np.int32)
        # A row of padding alone would leave attention nothing to look at.
        padding_mask[len(rows) :, 0] = 1
        positions = np.zeros(shape.positions, np.int32)
        labels = np.zeros(shape.positions, np.int32)
        weights = np.zeros(shape.positions, np.float32)
        if len(rows):
            counts = self.tokens.lengths[rows]
            # Where each token of these rows stands in the flat arrays, and where in the batch.
            within = _places_within(counts)
            source = np.repeat(self.tokens.offsets[rows], counts) + within
            target = np.repeat(np.arange(len(rows)) * shape.length, counts) + within
            token_ids.reshape(-1)[target] = self.tokens.ids[source]
            padding_mask.reshape(-1)[target] = 1
            taught = np.flatnonzero(self.tokens.trained[source + 1])
            positions[: len(taught)] = target[taught]
            labels[: len(taught)] = self.tokens.ids[source[taught] + 1]
            weights[: len(taught)] = weight
        x = {"token_ids": token_ids, "padding_mask": padding_mask, "positions": positions}
        return x, labels, weights

    def to_dataset(self, *, first_epoch: int = 0) -> Any:
        """A `tf.data.Dataset` over one epoch; each time it is iterated, the next epoch."""
        import tensorflow as tf

        epochs = itertools.count(first_epoch)
        count = self.batches_per_epoch

        def flat(epoch: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, ...]:
            x, y, sample_weight = self.batch(int(epoch), int(index))
            return x["token_ids"], x["padding_mask"], x["positions"], y, sample_weight

        def batch(epoch: Any, index: Any) -> Any:
            kinds = [tf.int32] * 4 + [tf.float32]
            arrays = tf.numpy_function(flat, [epoch, index], kinds)
            for array, axes in zip(arrays, (2, 2, 1, 1, 1), strict=True):
                array.set_shape([None] * axes)
            x = dict(zip(("token_ids", "padding_mask", "positions"), arrays, strict=False))
            return x, *arrays[3:]

        # Each iterator draws the number of its epoch. A generator of batches would take longer.
        dataset = (
            tf.data.Dataset.range(1)
            .map(lambda _: tf.numpy_function(lambda: np.int64(next(epochs)), [], tf.int64))
            .flat_map(lambda epoch: tf.data.Dataset.range(count).map(lambda i: batch(epoch, i)))
        )
        counted = dataset.apply(tf.data.experimental.assert_cardinality(count))
        # With nothing to tune, TensorFlow's tuning thread only holds up the end of an epoch: it
        # sleeps in ever longer naps, and an iterator is not let go before its thread wakes up.
        options = tf.data.Options()
        options.autotune.enabled = False
        return counted.prefetch(2).with_options(options)


def make_batcher(
    tokens: TokenizedPairs,
    model: keras.Model,
    *,
    batch_size: int = 8,
    sequence_length: int | Literal["auto"] = "auto",
    shuffle: bool = True,
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
) -> Batcher:
    """Choose static shapes for tokenized rows and make their `Batcher`.

    Args:
        tokens: The rows.
        model: A KerasHub Gemma; only its tokenizer is used.
        batch_size: Rows in a batch.
        sequence_length: `"auto"` chooses up to four lengths; a number pads all rows to it.
        shuffle: Whether the order changes from epoch to epoch.
        seed: Seed of that order.
        gradient_accumulation_steps: Batches that make one update.

    Returns:
        A `Batcher`.

    Raises:
        PlanError: A size is not a positive integer.
    """
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps}
    if sequence_length != "auto":
        sizes["sequence_length"] = sequence_length
    wrong = [
        f"`{k}` must be an integer of at least 1. Received: {v!r}"
        for k, v in sizes.items()
        if isinstance(v, bool) or not isinstance(v, (int, np.integer)) or v < 1
    ]
    if wrong:
        raise PlanError("The batches cannot be built.", wrong)
    shapes = choose_shapes(
        tokens.lengths,
        tokens.response_lengths,
        batch_size,
        sequence_length=None if sequence_length == "auto" else sequence_length,
    )
    return Batcher(
        tokens,
        shapes,
        int(model.preprocessor.tokenizer.pad_token_id),
        shuffle=shuffle,
        seed=seed,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )


def make_dataset(
    pairs: Any,
    model: keras.Model,
    *,
    template: str | Template | Callable[..., Any] = "auto",
    batch_size: int = 8,
    sequence_length: int | Literal["auto"] = "auto",
    overlong: Overlong = "error",
    shuffle: bool = True,
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
    prompt_column: str | None = None,
    response_column: str | None = None,
    system_column: str | None = None,
) -> Any:
    """A `tf.data.Dataset` that a `TuningModel` can `fit`.

    Each element is `(x, y, sample_weight)`: `x` holds `token_ids` and `padding_mask`
    `[batch, length]` int32 and `positions` `[positions]` int32, indices into the flattened
    `[batch * length]` tokens whose hidden state predicts a trained token; `y` `[positions]` int32
    are those tokens; `sample_weight` `[positions]` float32 is 1 over the number of trained tokens
    in the batch (over all accumulated batches), and 0 where a position only fills the shape.

    The template is attached to the model (`attach_template`), so that `generate` and `save_preset`
    use the one it is trained with.

    Args:
        pairs: Anything `read_pairs` takes.
        model: A KerasHub Gemma with its preprocessor.
        template: Anything `get_template` takes.
        batch_size: Rows in a batch. The last, short batch is kept and filled with empty rows.
        sequence_length: `"auto"` pads to up to four lengths chosen from the data, and never cuts a
            row. A number pads all rows to it; longer rows are handled as `overlong` says.
        overlong: `"error"`, `"drop"` or `"truncate"`, for rows over `sequence_length`.
        shuffle: Whether rows and batches change order, each time the dataset is iterated.
        seed: Seed of that order.
        gradient_accumulation_steps: Batches whose gradients Keras's optimizer averages before one
            update; the weights make that average the mean over all their trained tokens.
        prompt_column: Own name of the input column, where the pairs have columns.
        response_column: Own name of the output column.
        system_column: Own name of the column of system messages.

    Returns:
        A `tf.data.Dataset` over one epoch.

    Raises:
        PairsError: Rows with problems, all at once.
        PlanError: A size is not a positive integer.

    Warns:
        PairsWarning: Rows were left out or cut, as `overlong` asks.
    """
    source = read_pairs(
        pairs,
        prompt_column=prompt_column,
        response_column=response_column,
        system_column=system_column,
    )
    chosen = get_template(model, template)
    tokens = tokenize_pairs(
        source,
        model,
        template=chosen,
        max_length=None if sequence_length == "auto" else sequence_length,
        overlong=overlong,
    )
    batcher = make_batcher(
        tokens,
        model,
        batch_size=batch_size,
        sequence_length=sequence_length,
        shuffle=shuffle,
        seed=seed,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    attach_template(model, chosen)
    return batcher.to_dataset()
