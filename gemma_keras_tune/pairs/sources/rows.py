"""Opened sources: a stream of raw rows, and the choice of one of several splits."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from gemma_keras_tune.errors import PairsError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")
CHUNK_ROWS = 1024
Keys = tuple[Any, ...] | None


# The file within a folder, the line within the file, and the raw row; `None` where there is none.
Record = tuple[str | None, int | None, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Broken:
    """A row that cannot be read at all.

    Attributes:
        text: What is wrong with it.
        fatal: Whether what comes after it is lost too.
    """

    text: str
    fatal: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
    """An opened source.

    Attributes:
        name: How messages call it.
        records: Begins to read. Takes the columns wanted, where `columns` is known.
        columns: The column names, where every row has the same.
        length: Number of rows, where it is known.
        repeatable: Whether the rows can be read more than once.
        stable: Whether every reading gives the same rows in the same order, from outside memory.
        filled: Counts the rows in which a column holds something, of a table of which only the
            columns wanted are read.
    """

    name: str
    records: Callable[[Keys], Iterator[Record]]
    columns: tuple[Any, ...] | None = None
    length: int | None = None
    repeatable: bool = True
    stable: bool = False
    filled: Callable[[Any], int] | None = None


def at_start(name: str) -> str:
    """Write the name of a source for the start of a sentence; file names keep their spelling."""
    return f"The {name[4:]}" if name.startswith("the ") else name


def plain_records(rows: Iterable[Any]) -> Iterator[Record]:
    """Give rows that have neither a file nor a line."""
    for row in rows:
        yield None, None, row


def choose_split(names: Sequence[str], wanted: str | None, what: str) -> str:
    """Choose the split to read: the one that is wanted, `"train"`, or the only one."""
    if wanted is None:
        if "train" in names:
            return "train"
        if len(names) == 1:
            return names[0]
    elif wanted in names:
        return wanted
    asked = "" if wanted is None else f" and none is named {wanted!r}"
    raise PairsError(
        f"{at_start(what)} has the splits {', '.join(map(repr, names))}{asked}.",
        next_step=f"Choose one, for example `split={names[0]!r}`." if names else None,
    )


def no_splits(what: str, split: str) -> NoReturn:
    """Raise the error of a split that was asked of a source without splits."""
    raise PairsError(
        f"`split={split!r}` was asked for, but {what} has no splits.",
        next_step="Leave `split` out.",
    )


def whole(records: Iterator[Record]) -> Iterator[Record]:
    """Pass on the records of a file; a file that cannot be read on gives a last, broken one."""
    line = None
    try:
        for file, line, record in records:
            yield file, line, record
    except (EOFError, OSError, zlib.error) as error:
        yield None, line, Broken(f"after this row the file cannot be read: {error}", fatal=True)
