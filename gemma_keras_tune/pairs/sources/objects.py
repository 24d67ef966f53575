"""Rows from Python objects: lists, iterators, functions, and dictionaries of them."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, NoReturn

from gemma_keras_tune.errors import PairsError
from gemma_keras_tune.pairs.conversations import is_message
from gemma_keras_tune.pairs.sources.rows import (
    SPLITS,
    SUFFIXES,
    Rows,
    choose_split,
    no_splits,
    plain_records,
)
from gemma_keras_tune.pairs.sources.tables import (
    open_arrow,
    open_columns,
    open_frame,
    open_hugging_face,
)
from gemma_keras_tune.pairs.sources.tensorflow import open_tf


def open_object(source: Any) -> Rows:
    """Open a table, a dataset, an iterable or a function that returns one."""
    if is_instance_of(source, "pandas", "DataFrame"):
        return open_frame(source)
    if is_instance_of(source, "datasets", "Dataset"):
        return open_hugging_face(source)
    if is_instance_of(source, "tensorflow", "data.Dataset"):
        return open_tf(source, "the tf.data.Dataset")
    if hasattr(source, "__arrow_c_stream__") and isinstance(source, Sized):
        return open_arrow(source)
    kind = type(source).__name__
    length = len(source) if isinstance(source, Sized) else None
    if isinstance(source, (bytes, bytearray)):
        _not_a_source(source)
    if isinstance(source, Iterator):
        return Rows(f"the {kind}", lambda _: plain_records(source), repeatable=False)
    if isinstance(source, Iterable):
        return Rows(f"the {kind}", lambda _: plain_records(source), length=length)
    if length is not None and hasattr(source, "__getitem__"):
        size = length
        return Rows(
            f"the {kind}",
            lambda _: plain_records(source[index] for index in range(size)),
            length=length,
        )
    if callable(source):
        return Rows(f"the rows of {_name_of(source)}", lambda _: plain_records(source()))
    _not_a_source(source)


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}()"


def is_instance_of(source: Any, package: str, *classes: str) -> bool:
    """Tell if it is an instance of a class of a package, without importing the package."""
    module = sys.modules.get(package)
    if module is None:
        return False
    for path in classes:
        found: Any = module
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and isinstance(source, found):
            return True
    return False


def _not_a_source(source: Any) -> NoReturn:
    raise PairsError(
        f"Pairs cannot be read from a {type(source).__name__}: {source!r:.80}.",
        next_step="Pass a list of (prompt, response) tuples or of dictionaries, a DataFrame, a "
        f"path to a {', '.join(SUFFIXES)} file or a folder of them, a tf.data.Dataset, a TFDS name "
        "or builder, a Hugging Face Dataset, or any iterable of rows.",
    )


def open_mapping(source: Mapping[Any, Any], split: str | None, name: str) -> Rows:
    """Open a dictionary of columns, of splits or of one list of records; or one record."""
    lists = all(_is_column(value) for value in source.values())
    if source and lists and all(str(key).lower() in SPLITS for key in source):
        chosen = choose_split(list(source), split, name)
        return dataclasses.replace(open_object(source[chosen]), name=f"{name} [{chosen}]")
    if split is not None:
        no_splits(name, split)
    if source and lists:
        values = list(source.values())
        if len(values) == 1 and isinstance(_first(values[0]), Mapping):
            return dataclasses.replace(open_object(values[0]), name=name)
        return open_columns(source, name)
    return Rows(name, lambda _: plain_records([source]), length=1)


def _is_column(value: Any) -> bool:
    """Tell if a value is a list of values, and not text, a record or one conversation."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__getitem__"):
        return False
    return hasattr(value, "__len__") and not is_message(_first(value))


def _first(values: Any) -> Any:
    """Return the first of some values, or `None`; pandas would look for one labelled 0."""
    return next(iter(values), None)
