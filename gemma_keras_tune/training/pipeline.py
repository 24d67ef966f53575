"""Token ids to `tf.data`: batch, pad, shuffle, prefetch.

A batch carries, beside the padded ids, the flat positions whose hidden states predict a trained
token, their labels and their weights. The loss looks at nothing else. Lengths and position counts
are rounded to a few static shapes, because each new shape is a compilation.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import keras
import numpy as np

from gemma_keras_tune._support.backend import replicas
from gemma_keras_tune._support.numbers import integer
from gemma_keras_tune.errors import PlanError
from gemma_keras_tune.gemma.templates import Template, attach_template, get_template
from gemma_keras_tune.training.settings import Overlong
from gemma_keras_tune.training.shapes import Shape, choose_shapes, indivisible, stratify
from gemma_keras_tune.training.tokenizing import TokenizedPairs, places_within, tokenize_pairs


class Batches(Sequence[tuple[Shape, np.ndarray]]):
    """Batches of one epoch, each as its shape and its row places; 4 bytes a row.

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
        gradient_accumulation_steps: Batches whose gradients make one step. The weights of their
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
        """Order the batches of one epoch: every row once, as its shape and its row places.

        A multiple of `gradient_accumulation_steps` of them: empty batches complete the last step.
        """
        random = np.random.default_rng([self.seed, epoch])
        tables = []
        for index, shape in enumerate(self.shapes):
            rows = np.flatnonzero(self._group == index)
            strata = stratify(rows, self.tokens.response_lengths, shape.batch_size)
            if self.shuffle:
                strata = random.permuted(strata, axis=1)
            tables.append(strata.T)
        count = sum(map(len, tables))
        order = random.permutation(count) if self.shuffle else np.arange(count)
        missing = -count % self.gradient_accumulation_steps
        return Batches(self.shapes, tables, np.concatenate([order, np.full(missing, -1)]))

    @property
    def batches_per_epoch(self) -> int:
        """Batches of every epoch, those that only complete the last step among them."""
        counts = np.bincount(self._group, minlength=len(self.shapes))
        batches = sum(math.ceil(n / s.batch_size) for n, s in zip(counts, self.shapes, strict=True))
        return batches + -batches % self.gradient_accumulation_steps

    def arrays(self, epoch: int) -> Iterator[Arrays]:
        """Yield the arrays of one epoch, batch by batch, as `(x, y, sample_weight)`."""
        return (self.batch(epoch, index) for index in range(self.batches_per_epoch))

    def batch(self, epoch: int, index: int) -> Arrays:
        """Build the arrays of one batch of an epoch, both counted from 0."""
        batches, steps = self._batches_of(epoch), self.gradient_accumulation_steps
        first = index - index % steps
        step = batches[first : first + steps]
        trained = sum(int(self.tokens.response_lengths[rows].sum()) for _, rows in step)
        return self._pad(*batches[index], steps / trained)

    def _batches_of(self, epoch: int) -> "Batches":
        """Call `epoch` once for an iterator, and for two that run side by side."""
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
            within = places_within(counts)
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
        """Make a `tf.data.Dataset` over one epoch; each time it is iterated, the next epoch."""
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
    model: keras.Model,
    tokens: TokenizedPairs,
    *,
    batch_size: int = 8,
    sequence_length: int | Literal["auto"] = "auto",
    shuffle: bool = True,
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
) -> Batcher:
    """Choose static shapes for tokenized rows and make their `Batcher`.

    Args:
        model: A KerasHub Gemma; only its tokenizer is used.
        tokens: The rows.
        batch_size: Rows in a batch.
        sequence_length: `"auto"` chooses up to four lengths; a number pads all rows to it.
        shuffle: Whether the order changes from epoch to epoch.
        seed: Seed of that order.
        gradient_accumulation_steps: Batches that make one step.

    Returns:
        A `Batcher`.

    Raises:
        PlanError: A size is not a positive integer.
    """
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps}
    if sequence_length != "auto":
        sizes["sequence_length"] = sequence_length
    checked = (integer(1).problem(name, size) for name, size in sizes.items())
    wrong = [problem for problem in checked if problem] or indivisible(batch_size)
    if wrong:
        raise PlanError("The batches cannot be built.", wrong)
    shapes = choose_shapes(
        tokens.lengths,
        tokens.response_lengths,
        batch_size,
        sequence_length=None if sequence_length == "auto" else sequence_length,
        parts=replicas(),
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
    model: keras.Model,
    pairs: Any,
    *,
    template: str | Template | Callable[..., Any] = "auto",
    batch_size: int = 8,
    sequence_length: int | Literal["auto"] = "auto",
    overlong: Overlong = "error",
    shuffle: bool = True,
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
) -> Any:
    """Make a `tf.data.Dataset` that a `TuningModel` can `fit`.

    Each element is `(x, y, sample_weight)`: `x` holds `token_ids` and `padding_mask`
    `[batch, length]` int32 and `positions` `[positions]` int32, indices into the flattened
    `[batch * length]` tokens whose hidden state predicts a trained token; `y` `[positions]` int32
    are those tokens; `sample_weight` `[positions]` float32 is 1 over the number of trained tokens
    in the batch (over all accumulated batches), and 0 where a position only fills the shape.

    The template is attached to the model (`attach_template`), so that `generate` and `save_preset`
    use the one it is trained with.

    Args:
        model: A KerasHub Gemma with its preprocessor.
        pairs: Anything `read_pairs` takes.
        template: Anything `get_template` takes.
        batch_size: Rows in a batch. The last, short batch is kept and filled with empty rows.
        sequence_length: `"auto"` pads to up to four lengths chosen from the data, and never cuts a
            row. A number pads all rows to it; longer rows are handled as `overlong` says.
        overlong: `"error"`, `"drop"` or `"truncate"`, for rows over `sequence_length`.
        shuffle: Whether rows and batches change order, each time the dataset is iterated.
        seed: Seed of that order.
        gradient_accumulation_steps: Batches whose gradients Keras's optimizer averages before one
            step; the weights make that average the mean over all their trained tokens.

    Returns:
        A `tf.data.Dataset` over one epoch.

    Raises:
        PairsError: Rows with problems, all at once.
        PlanError: A size is not a positive integer.

    Warns:
        PairsWarning: Rows were left out or cut, as `overlong` asks.
    """
    chosen = get_template(model, template)
    tokens = tokenize_pairs(
        model,
        pairs,
        template=chosen,
        max_length=None if sequence_length == "auto" else sequence_length,
        overlong=overlong,
    )
    batcher = make_batcher(
        model,
        tokens,
        batch_size=batch_size,
        sequence_length=sequence_length,
        shuffle=shuffle,
        seed=seed,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    attach_template(model, chosen)
    return batcher.to_dataset()
