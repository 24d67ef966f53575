"""Any source of pairs to checked `Pair` records, one at a time.

A row that cannot be trained on is never dropped in silence and never stops the reading: it is
noted with its row and line number, and all such rows are reported together.
"""

import collections
import itertools
from collections.abc import Iterator
from typing import Any, Literal, NoReturn

from gemma_keras_tune.errors import PairsError, warn_of_pairs
from gemma_keras_tune.pairs.problems import Findings, PairsErrors, Problem
from gemma_keras_tune.pairs.rows import (
    SCHEMAS,
    Message,
    Pair,
    RowError,
    RowReader,
    Schema,
    known_schemas,
)
from gemma_keras_tune.pairs.sources import Broken, Keys, Rows, at_start, open_source

__all__ = [
    "SCHEMAS",
    "Findings",
    "Message",
    "Pair",
    "PairSource",
    "PairsErrors",
    "Problem",
    "Schema",
    "known_schemas",
    "read_pairs",
]

OnError = Literal["raise", "skip"]


# Sources.


def read_pairs(
    source: Any,
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    system_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    on_error: OnError = "raise",
) -> "PairSource":
    """Open a source of pairs. Rows are read when it is iterated, a bounded number at a time.

    ```python
    source = read_pairs([{"prompt": "2 + 2", "response": "4"}])
    [pair.response for pair in source]  # ['4']
    source.raise_for_problems()
    ```

    Args:
        source: A list of `(prompt, response)` tuples or of dictionaries (their keys: `SCHEMAS`); a
            dictionary of columns; a pandas DataFrame, or another table that speaks Arrow; a path to
            a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, the text ones also with `.gz`,
            or to a folder of such files; a `tf.data.Dataset`; a TFDS name or builder; a Hugging
            Face `Dataset`; any iterable, or a function that returns one.
        prompt_column: Your own name of the prompt's key. Without `response_column`, that of a
            list of messages.
        response_column: Your own name of the answer's key.
        system_column: The key of a system message for each row.
        split: Which part to read of a source with several, such as `"test"`. By default
            `"train"`, or the only one.
        limit: Read only this many rows, from the first.
        on_error: `"raise"`: `raise_for_problems` raises. `"skip"`: rows with a problem are left
            out, counted and listed in `PairSource.skipped`, and one warning tells of them.

    Returns:
        A `PairSource`. One that is passed in is returned as it is.

    Raises:
        PairsError: The source cannot be opened, its columns make no pair, or an argument is wrong.
    """
    columns = dict(
        prompt_column=prompt_column, response_column=response_column, system_column=system_column
    )
    _check_arguments(columns, limit, on_error)
    reader = RowReader(**columns)
    if isinstance(source, PairSource):
        if (prompt_column, system_column, split, limit, on_error) != (None,) * 4 + ("raise",):
            raise PairsError(
                "These pairs have been opened already, and options no longer apply.",
                next_step="Pass the options to the first `read_pairs`.",
            )
        return source
    rows = open_source(source, split)
    return PairSource(rows, reader, _used_columns(rows, reader), limit, on_error)


def _check_arguments(columns: dict[str, Any], limit: int | None, on_error: str) -> None:
    problems = [
        f"`{name}` must be a name, a string. Received: {column!r}"
        for name, column in columns.items()
        if not (column is None or isinstance(column, str))
    ]
    if columns["response_column"] is not None and columns["prompt_column"] is None:
        problems.append("`response_column` needs `prompt_column` beside it")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        problems.append(f"`limit` must be an integer of at least 1. Received: {limit!r}")
    if on_error not in ("raise", "skip"):
        problems.append(f"`on_error` must be 'raise' or 'skip'. Received: {on_error!r}")
    if problems:
        raise PairsError("The pairs cannot be read as asked.", problems)


def _used_columns(rows: Rows, reader: RowReader) -> Keys:
    if not rows.columns:
        return None
    try:
        used = reader.used_columns(rows.columns)
    except RowError as error:
        raise PairsError(
            f"The columns of {rows.name} make no pair.", error.problems, _schema_help()
        ) from None
    twice = [key for key in used if rows.columns.count(key) > 1]
    if twice:
        raise PairsError(
            f"{at_start(rows.name)} has more than one column named {', '.join(map(repr, twice))}."
        )
    return used


def _schema_help() -> str:
    return (
        f"Known schemas:\n{known_schemas()}\n"
        "Or name your own: read_pairs(source, prompt_column=…, response_column=…)."
    )


class _Reading(Findings):
    """What one reading found."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.finished = False
        self.fatal = False
        self.schema = False


class PairSource:
    """Pairs of one source, read while it is iterated. Made by `read_pairs`.

    Iterating gives the rows that are valid, in order, and collects what is wrong with the others.
    Call `raise_for_problems` afterwards: what was read is complete only if it does not raise. A
    source can be iterated again, unless it is a generator or another iterator.

    Attributes:
        name: How messages call the source.
        on_error: `"raise"` or `"skip"`.
    """

    def __init__(
        self,
        rows: Rows,
        reader: RowReader,
        keys: Keys,
        limit: int | None,
        on_error: OnError,
        keep: bytearray | None = None,
    ) -> None:
        self.name = rows.name
        self.on_error = on_error
        self._rows = rows
        self._reader = reader
        self._keys = keys
        self._limit = limit
        self._keep = keep
        self._found: _Reading | None = None

    def __iter__(self) -> Iterator[Pair]:
        if self._found is not None and not self._rows.repeatable:
            raise PairsError(
                f"{at_start(self.name)} gives its rows once, and they have been read already.",
                next_step="Pass a list, or a function that returns a fresh iterator each time: "
                "`read_pairs(make_rows)`, not `read_pairs(make_rows())`.",
            )
        self._found = _Reading()
        return self._read(self._found)

    def _read(self, found: _Reading) -> Iterator[Pair]:
        keep = self._keep
        read = self._reader.read
        row = 0
        try:
            for file, line, record in itertools.islice(self._rows.records(self._keys), self._limit):
                row += 1
                if keep is not None and not (row < len(keep) and keep[row]):
                    continue
                try:
                    messages = read(record)
                except RowError as error:
                    found.add(row, line, file, error.problems)
                    found.schema |= error.schema
                    found.fatal |= isinstance(record, Broken) and record.fatal
                    continue
                yield record if isinstance(record, Pair) else Pair(messages, row, line, file)
            found.finished = True
        finally:
            found.rows = row

    def _subset(self, name: str, keep: bytearray) -> "PairSource":
        source = PairSource(
            self._rows, self._reader, self._keys, self._limit, self.on_error, keep=keep
        )
        source.name = name
        return source

    def __len__(self) -> int:
        """Number of rows, those with a problem included; a TypeError where nobody knows it yet."""
        if self._keep is not None:
            return self._keep.count(1)
        if self._found is not None and self._found.finished:
            return self._found.rows
        if self._rows.length is None:
            raise TypeError(f"how many rows {self.name} has is known only once it has been read")
        return min(self._rows.length, self._limit or self._rows.length)

    def __bool__(self) -> bool:
        """Always true: whether there are rows shows when they are read."""
        return True

    def __repr__(self) -> str:
        try:
            return f"<PairSource {self.name}: {len(self):,} rows>"
        except TypeError:
            return f"<PairSource {self.name}>"

    @property
    def repeatable(self) -> bool:
        """Whether it can be read more than once."""
        return self._rows.repeatable

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What the latest reading found wrong, in the order of rows."""
        return self._found.problems() if self._found is not None else ()

    @property
    def skipped(self) -> tuple[Problem, ...]:
        """The problems of the rows that were left out because of `on_error="skip"`."""
        return self.problems if self.on_error == "skip" else ()

    def raise_for_problems(self) -> None:
        """Report everything the latest reading found wrong, all at once.

        A source that has not been read yet is read first, if it can be read again afterwards.

        Raises:
            PairsError: Rows have problems and `on_error` is `"raise"`; the source was read to its
                end and gave no pair; or a file could not be read to its end.

        Warns:
            PairsWarning: Rows were left out, as `on_error="skip"` asks.
        """
        if self._found is None and self._rows.repeatable:
            collections.deque(self, maxlen=0)
        found = self._found
        if found is None:
            return
        if found.finished and found.rows == 0:
            self._raise_empty()
        if not found.places:
            return
        bad = len(found.row_numbers())
        none_left = found.finished and bad >= len(self)
        if self.on_error == "skip" and not found.fatal and not none_left:
            headline = f"{at_start(self.name)}: {bad:,} of {found.rows:,} rows are left out."
            warn_of_pairs(headline, found.lines(), "PairSource.skipped")
            return
        step = "Correct these rows, or leave them out with `read_pairs(…, on_error='skip')`."
        if found.schema:
            step = _schema_help()
        elif found.fatal:
            step = "Correct the file: what comes after such a row in it was not read."
        what = "No row can" if none_left else f"{bad:,} row{'s' * (bad > 1)} cannot"
        raise PairsError(f"{at_start(self.name)}: {what} be trained on.", found.lines(), step)

    def _raise_empty(self) -> NoReturn:
        step = "Pass at least one pair."
        if not self._rows.repeatable:
            step += " An iterator gives its rows once: was this one used before?"
        raise PairsError(f"{at_start(self.name)} has no rows.", next_step=step)
