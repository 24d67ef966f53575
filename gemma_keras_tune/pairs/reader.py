"""Any source of pairs to checked `Pair` records, one at a time.

A row that cannot be trained on is never dropped in silence and never stops the reading: it is
noted with its row and line number, and all such rows are reported together.
"""

import array
import collections
import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NoReturn

import numpy as np

from gemma_keras_tune.errors import PairsError, warn_of_pairs
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
    "Message",
    "Pair",
    "PairChecks",
    "PairSource",
    "Problem",
    "Schema",
    "known_schemas",
    "read_pairs",
    "split_pairs",
]

OnError = Literal["raise", "skip"]


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be trained on.

    Attributes:
        row: The row's number in its source, from 1.
        line: The line it begins on, from 1, where the source is a file of lines.
        text: What is wrong.
        file: The file's name, where the source is a folder.
    """

    row: int
    line: int | None
    text: str
    file: str | None = None

    def __str__(self) -> str:
        line = None if self.line is None else f"line {self.line}"
        place = ", ".join(part for part in (self.file, line) if part)
        return f"row {self.row}{f' ({place})' if place else ''}: {self.text}"


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


class Findings:
    """What was found in rows. Row and line numbers are kept by text, a few bytes for each."""

    def __init__(self) -> None:
        self.places: dict[tuple[str | None, str], array.array[int]] = collections.defaultdict(
            lambda: array.array("q")
        )

    def add(self, row: int, line: int | None, file: str | None, texts: Sequence[str]) -> None:
        """Note what was found in one row."""
        for text in texts:
            self.places[file, text].extend((row, line or 0))

    def row_numbers(self) -> tuple[int, ...]:
        """The rows in which anything was found."""
        return tuple(sorted({row for places in self.places.values() for row in places[::2]}))

    def problems(self) -> tuple[Problem, ...]:
        """All that was found, in the order of rows."""
        found = [
            Problem(row, line or None, text, file)
            for (file, text), places in self.places.items()
            for row, line in zip(places[::2], places[1::2], strict=True)
        ]
        return tuple(sorted(found, key=lambda problem: problem.row))

    def lines(self) -> list[str]:
        """One line for each problem; for one that many rows share, one line for all of them."""
        found: list[tuple[int, str]] = []
        for (file, text), places in self.places.items():
            rows, lines = places[::2], places[1::2]
            if len(rows) > _LISTED_ONE_BY_ONE:
                where = [file] if file else []
                where += [f"lines {_ranges(lines)}"] if lines[0] else []
                place = f" ({', '.join(where)})" if where else ""
                found.append((rows[0], f"{len(rows):,} rows, {_ranges(rows)}{place}: {text}"))
                continue
            for row, line in zip(rows, lines, strict=True):
                found.append((row, str(Problem(row, line or None, text, file))))
        return [text for _, text in sorted(found, key=lambda entry: entry[0])]


class _Reading(Findings):
    """What one reading found."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.finished = False
        self.fatal = False
        self.schema = False


_LISTED_ONE_BY_ONE = 20


def _ranges(numbers: Iterable[int], most: int = 20) -> str:
    """Ascending numbers, short: `1-3, 7`."""
    ranges: list[list[int]] = []
    hidden = 0
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        elif len(ranges) < most:
            ranges.append([number, number])
        else:
            hidden += 1
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    return f"{shown} and {hidden:,} more" if hidden else shown


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


class PairsErrors:
    """Collects the errors of several steps, to raise all they found as one."""

    def __init__(self) -> None:
        self._found: list[tuple[str, PairsError]] = []

    @contextlib.contextmanager
    def collect(self, part: str = "") -> Iterator[None]:
        """Keep a `PairsError` raised inside for later.

        Args:
            part: What the step is about, such as `"validation"`, where there are several.
        """
        try:
            yield
        except PairsError as error:
            self._found.append((part, error))

    def raise_all(self) -> None:
        """Raise what was collected, if anything was.

        Raises:
            PairsError: The headlines, problems and next steps of all of them.
        """
        if not self._found:
            return
        steps = (error.next_step for _, error in self._found)
        raise PairsError(
            " ".join(f"{part.title()}{': ' * bool(part)}{e.headline}" for part, e in self._found),
            [
                f"{part}{', ' * bool(part)}{problem}"
                for part, error in self._found
                for problem in error.problems
            ],
            "\n".join(dict.fromkeys(step for step in steps if step)) or None,
        )


# Warnings.


class PairChecks:
    """Collects what looks wrong in pairs that can be trained on, one pair after the other.

    Only hashes are kept, 16 bytes for each answer.

    ```python
    checks = PairChecks(special_tokens=["<start_of_turn>", "<end_of_turn>"])
    for pair in source:
        checks.add(pair)
    checks.warn()
    ```

    Args:
        special_tokens: The model's special tokens as text. They are control signs to it, so in the
            text of a row they are most likely left over from another tool.
    """

    def __init__(self, special_tokens: Iterable[str] = ()) -> None:
        tokens = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        self._gate = sorted({token[0] for token in tokens})
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._prompts = array.array("q")
        # The lowest bit says whether the answer is the row's last.
        self._answers = array.array("I")
        self._rows = array.array("I")
        self._special: dict[str, array.array[int]] = collections.defaultdict(
            lambda: array.array("I")
        )

    def add(self, pair: Pair) -> None:
        """Look at one more pair."""
        messages = pair.messages
        # Every answer is learned, so each is one case: what comes before it, and the answer.
        seen = 0
        last = len(messages) - 1
        for place, message in enumerate(messages):
            content = message.content
            if message.role == "assistant":
                self._prompts.append(seen)
                self._answers.append((hash(content) & 0xFFFFFFFE) | (place == last))
                self._rows.append(pair.row)
            seen = hash((seen, message.role, content))
            for character in self._gate:  # Far faster than the pattern, and mostly enough.
                if character in content:
                    self._find_special(content, message.role, pair.row)
                    break

    def _find_special(self, content: str, role: str, row: int) -> None:
        assert self._pattern is not None
        for token in dict.fromkeys(self._pattern.findall(content)):
            self._special[f"{token!r} stands in {role} text"].append(row)

    @property
    def duplicates(self) -> tuple[tuple[int, ...], ...]:
        """Groups of row numbers whose whole conversation is the same."""
        return tuple(self._groups(same_answer=True))

    @property
    def contradictions(self) -> tuple[tuple[int, ...], ...]:
        """Groups of row numbers that answer the same prompt differently, at any of their turns."""
        return tuple(self._groups(same_answer=False))

    @property
    def special_tokens(self) -> dict[str, tuple[int, ...]]:
        """What was found of special tokens in text, to the row numbers."""
        return {text: tuple(rows) for text, rows in self._special.items()}

    def _groups(self, *, same_answer: bool) -> Iterator[tuple[int, ...]]:
        prompts = np.frombuffer(self._prompts, np.int64)
        answers = np.frombuffer(self._answers, np.uint32)
        rows = np.frombuffer(self._rows, np.uint32)
        if same_answer:
            final = (answers & 1).astype(bool)
            prompts, answers, rows = prompts[final], answers[final], rows[final]
        # The answer without its mark: a turn within one row may be the last of another.
        said = answers >> 1
        order = np.lexsort((rows, said, prompts))
        new_prompt = np.diff(prompts[order]) != 0
        new_answer = new_prompt | (np.diff(said[order]) != 0)
        bounds = np.flatnonzero(new_answer if same_answer else new_prompt) + 1
        edges = np.concatenate([[0], bounds, [len(order)]])
        sizes = np.diff(edges)
        groups = []
        for index in np.flatnonzero(sizes > 1):
            group = order[edges[index] : edges[index + 1]]
            if same_answer or said[group[0]] != said[group[-1]]:
                groups.append(tuple(sorted({int(row) for row in rows[group]})))
        yield from sorted(groups)

    def findings(self) -> tuple[str, ...]:
        """Everything found, one line each, with row numbers."""
        lines = [f"rows {_ranges(rows)} are exact duplicates" for rows in self.duplicates]
        lines += [
            f"rows {_ranges(rows)} answer the same prompt differently"
            for rows in self.contradictions
        ]
        for text, rows in self.special_tokens.items():
            lines.append(f"row{'s' * (len(rows) > 1)} {_ranges(rows)}: {text}")
        return tuple(lines)

    def warn(self, part: str = "") -> None:
        """Tell of everything found in one `PairsWarning`, if there is anything.

        Args:
            part: Which pairs they are, such as `"validation"`, where there are several kinds.
        """
        if lines := self.findings():
            which = f"{part} pairs".lstrip()
            warn_of_pairs(f"Some {which} look wrong.", lines, "PairChecks.findings()")


# Splitting.


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
    """A hash of what stands before the first answer."""
    parts: list[str] = []
    for message in pair.messages:
        if message.role == "assistant":
            break
        parts += (message.role, message.content)
    return hash(tuple(parts))


def _choose_rows(
    places: "array.array[int]", openings: "array.array[int]", fraction: float, seed: int
) -> np.ndarray:
    """Places for validation: whole groups of one opening, in seeded order, up to the share."""
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
    """For each side, one byte for each row number: whether the row is on it."""
    assert source._found is not None
    count = source._found.rows + 1
    training = bytearray(b"\0" + b"\1" * (count - 1))
    if source._keep is not None:
        training[:] = source._keep[:count]
    validation = bytearray(count)
    np.frombuffer(training, np.uint8)[chosen] = 0
    np.frombuffer(validation, np.uint8)[chosen] = 1
    return training, validation
