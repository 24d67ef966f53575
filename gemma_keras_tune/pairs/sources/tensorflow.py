"""Rows from `tf.data` and TensorFlow Datasets."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from gemma_keras_tune.errors import PairsError
from gemma_keras_tune.pairs.sources.rows import (
    CHUNK_ROWS,
    Keys,
    Record,
    Rows,
    at_start,
    choose_split,
    plain_records,
)


def import_tfds() -> Any:
    """Import TFDS, which is an empty module beside a protobuf older than its metadata's."""
    import tensorflow_datasets as tfds

    if not hasattr(tfds, "builder"):
        raise PairsError(
            "TensorFlow Datasets cannot be imported: it finds tensorflow-metadata made for a newer "
            "protobuf.",
            next_step='Type: pip install "tensorflow-metadata<1.18", and start again.',
        )
    return tfds


def open_tfds(builder: Any, split: str | None) -> Rows:
    """Download and prepare a TFDS dataset where it is not there, and open it."""
    try:
        builder.download_and_prepare()
    except Exception as error:  # It passes on what any downloader and parser may raise.
        raise PairsError(
            f"The TFDS dataset {builder.name!r} cannot be downloaded or prepared: "
            f"{type(error).__name__}: {error}"
        ) from error
    base, bracket, rest = (split or "").partition("[")
    chosen = choose_split(list(builder.info.splits), base or None, f"TFDS {builder.name!r}")
    chosen += bracket + rest
    dataset = builder.as_dataset(split=chosen, shuffle_files=False)
    return dataclasses.replace(open_tf(dataset, f"{builder.name} [{chosen}]"), stable=True)


def open_tf(dataset: Any, name: str) -> Rows:
    """Open a `tf.data.Dataset`."""
    count = int(dataset.cardinality())
    if count == -1:
        raise PairsError(
            f"{at_start(name)} repeats forever.",
            next_step="Leave out `.repeat()`, or end it with `.take(rows)`.",
        )
    spec = dataset.element_spec
    if _ranks(spec) == {1}:  # Batched, as KerasHub's own `fit` wants it.
        dataset = dataset.unbatch()
        count = -2
    return Rows(
        name,
        lambda keys: _tf_records(dataset, keys),
        columns=tuple(spec) if isinstance(spec, dict) else None,
        length=count if count >= 0 else None,
        filled=lambda _: sys.maxsize,  # A tensor is there in every row.
    )


def _ranks(spec: Any) -> set[int | None]:
    """List the ranks of the tensors of one row; `None` for anything but a plain tensor."""
    parts = spec.values() if isinstance(spec, dict) else spec
    if not isinstance(spec, (dict, tuple)):
        parts = (spec,)
    return {part.shape.rank if type(part).__name__ == "TensorSpec" else None for part in parts}


def _tf_records(dataset: Any, keys: Keys) -> Iterator[Record]:
    if keys is not None:
        dataset = dataset.map(lambda row: {key: row[key] for key in keys})
    if _ranks(dataset.element_spec) != {0}:
        for row in dataset.as_numpy_iterator():
            yield None, None, _to_python(row)
        return
    # By the batch: a row at a time costs TensorFlow some 50 microseconds.
    for batch in dataset.batch(CHUNK_ROWS).as_numpy_iterator():
        if isinstance(batch, dict):
            for values in zip(*(column.tolist() for column in batch.values()), strict=True):
                yield None, None, dict(zip(batch, values, strict=True))
        elif isinstance(batch, tuple):
            for values in zip(*(column.tolist() for column in batch), strict=True):
                yield None, None, values
        else:
            yield from plain_records(batch.tolist())


def _to_python(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_python(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_to_python(part) for part in value)
    if hasattr(value, "to_list"):  # A ragged tensor.
        return value.to_list()
    return value.tolist() if hasattr(value, "tolist") else value
