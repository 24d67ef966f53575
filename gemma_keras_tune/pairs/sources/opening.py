"""Opening of any source of rows. Other libraries are imported only for a source that needs them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from gemma_keras_tune.pairs.sources.files import open_path
from gemma_keras_tune.pairs.sources.objects import is_instance_of, open_mapping, open_object
from gemma_keras_tune.pairs.sources.rows import Rows, choose_split, no_splits
from gemma_keras_tune.pairs.sources.tensorflow import open_tfds


def open_source(source: Any, split: str | None = None) -> Rows:
    """Find out what a source is, and open it.

    Args:
        source: Anything `gemma_keras_tune.read_pairs` takes.
        split: Which part to read, of a source that has several.

    Returns:
        The opened source. No row has been read yet.

    Raises:
        PairsError: It cannot be opened, or is nothing that rows can be read from.
    """
    if isinstance(source, (str, os.PathLike)):
        return open_path(source, split)
    if is_instance_of(source, "tensorflow_datasets", "core.DatasetBuilder"):
        return open_tfds(source, split)
    if is_instance_of(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        chosen = choose_split(list(source), split, "the DatasetDict")
        return dataclasses.replace(open_source(source[chosen]), name=f"dataset [{chosen}]")
    if isinstance(source, Mapping):
        return open_mapping(source, split, "the dictionary")
    if split is not None:
        no_splits(f"a {type(source).__name__}", split)
    return open_object(source)
