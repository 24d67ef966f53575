"""Reading of pairs: any source becomes checked `Pair` records, one at a time.

A row that cannot be trained on is never dropped in silence and never stops the reading: it is
noted with its row and line number, and all such rows are reported together.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal, NoReturn

from gemma_keras_tune.errors import PairsError, warn_of_pairs
from gemma_keras_tune.pairs.conversations import Message, Reasoning
from gemma_keras_tune.pairs.problems import Findings, PairsErrors, Problem
from gemma_keras_tune.pairs.rows import Pair, RowOptions, RowReader
from gemma_keras_tune.pairs.schemas import SCHEMAS, Schema, known_schemas
from gemma_keras_tune.pairs.sources import Broken, Keys, Rows, at_start, open_source
from gemma_keras_tune.pairs.unused import Unused
from gemma_keras_tune.pairs.values import ReadingError

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
COLUMN_OPTIONS = ("prompt_column", "response_column", "system_column")


# Sources.


def read_pairs(
    source: Any,
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    system_column: str | None = None,
    preference: Literal["chosen"] | None = None,
    reasoning: Reasoning = "refuse",
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
        preference: `"chosen"` trains the preferred answer of rows that have a `chosen` and a
            `rejected` one, and counts those it leaves out.
        reasoning: What to do with reasoning that is kept apart from the answer
            (`reasoning_content`, parts of type `thinking`): `"refuse"` makes it a problem, `"keep"`
            puts it in front of the answer with an empty line between, `"drop"` leaves it out and
            counts it.
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
    options = RowOptions(prompt_column, response_column, system_column, preference, reasoning)
    _check_arguments(options, limit, on_error)
    if isinstance(source, PairSource):
        given = dataclasses.replace(options, response_column=None)
        if (given, split, limit, on_error) != (RowOptions(), None, None, "raise"):
            raise PairsError(
                "These pairs have been opened already, and options no longer apply.",
                next_step="Pass the options to the first `read_pairs`.",
            )
        return source
    reader = RowReader(options)
    rows = open_source(source, split)
    return PairSource(rows, reader, _used_columns(rows, reader), limit, on_error)


def _check_arguments(options: RowOptions, limit: int | None, on_error: str) -> None:
    columns = {name: getattr(options, name) for name in COLUMN_OPTIONS}
    problems = [
        f"`{name}` must be a name, a string. Received: {column!r}"
        for name, column in columns.items()
        if not (column is None or isinstance(column, str))
    ]
    if options.response_column is not None and options.prompt_column is None:
        problems.append("`response_column` needs `prompt_column` beside it")
    if options.preference not in (None, "chosen"):
        problems.append(f"`preference` must be None or 'chosen'. Received: {options.preference!r}")
    if options.preference is not None and options.response_column is not None:
        problems.append("`preference` and `response_column` both name the answer; pass one of them")
    if options.reasoning not in ("refuse", "keep", "drop"):
        problems.append(
            f"`reasoning` must be 'refuse', 'keep' or 'drop'. Received: {options.reasoning!r}"
        )
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
    except ReadingError as error:
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
    """Findings of one reading."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.finished = False
        self.fatal = False
        self.schema = False
        self.unused = Unused()


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
        self._told_unused = False

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
        unused = found.unused
        row = 0
        try:
            for file, line, record in itertools.islice(self._rows.records(self._keys), self._limit):
                row += 1
                if keep is not None and not (row < len(keep) and keep[row]):
                    continue
                try:
                    unused.row = row
                    messages = read(record, unused)
                except ReadingError as error:
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
        source._told_unused = True  # by the source that was split
        return source

    def __len__(self) -> int:
        """Count the rows, also those with a problem; a TypeError if the number is not known yet."""
        if self._keep is not None:
            return self._keep.count(1)
        if self._found is not None and self._found.finished:
            return self._found.rows
        if self._rows.length is None:
            raise TypeError(f"how many rows {self.name} has is known only once it has been read")
        return min(self._rows.length, self._limit or self._rows.length)

    def __bool__(self) -> bool:
        """Return true: if there are rows is known only when they are read."""
        return True

    def __repr__(self) -> str:
        try:
            return f"<PairSource {self.name}: {len(self):,} rows>"
        except TypeError:
            return f"<PairSource {self.name}>"

    @property
    def repeatable(self) -> bool:
        """True if it can be read more than once."""
        return self._rows.repeatable

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Problems that the latest reading found, in the order of rows."""
        return self._found.problems() if self._found is not None else ()

    @property
    def skipped(self) -> tuple[Problem, ...]:
        """Problems of the rows that were left out because of `on_error="skip"`."""
        return self.problems if self.on_error == "skip" else ()

    @property
    def unused(self) -> dict[str, int]:
        """Keys that hold something and are not used, with the number of times, so far as read."""
        return dict(self._count_unused().counts) if self._found is not None else {}

    def _count_unused(self) -> Unused:
        """Count also the columns of a table that were not read."""
        assert self._found is not None
        unused = self._found.unused
        if self._rows.filled is not None and self._keys is not None:
            for column in self._rows.columns or ():
                if column not in self._keys and f"`{column}`" not in unused.counts:
                    count = min(self._rows.filled(column), self._found.rows)
                    unused.add_column(f"`{column}`", count)
        return unused

    def raise_for_problems(self) -> None:
        """Report everything the latest reading found wrong, all at once.

        A source that has not been read yet is read first, if it can be read again afterwards.

        Raises:
            PairsError: Rows have problems and `on_error` is `"raise"`; the source was read to its
                end and gave no pair; or a file could not be read to its end.

        Warns:
            PairsWarning: Rows were left out, as `on_error="skip"` asks; or keys of rows or messages
                hold something and are not used, which is told once.
        """
        if self._found is None and self._rows.repeatable:
            collections.deque(self, maxlen=0)
        found = self._found
        if found is None:
            return
        if found.finished and found.rows == 0:
            self._raise_empty()
        if found.places:
            self._report(found)
        lines = [] if self._told_unused else self._count_unused().lines()
        self._told_unused = True
        if lines:
            headline = f"{at_start(self.name)} has keys that hold something and are not used."
            warn_of_pairs(headline, lines, "PairSource.unused")

    def _report(self, found: _Reading) -> None:
        bad = len(found.row_numbers())
        none_left = found.finished and bad >= len(self)
        if self.on_error == "skip" and not found.fatal and not none_left:
            headline = f"{at_start(self.name)}: {bad:,} of {found.rows:,} rows are left out."
            warn_of_pairs(headline, found.lines(), "PairSource.skipped", stacklevel=4)
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
