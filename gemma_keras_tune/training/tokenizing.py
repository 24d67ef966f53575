"""Pairs to token ids, once, with the mask of the tokens that are trained.

Every row is tokenized in text pieces: prompt and response apart, so that a prompt has the same ids
here as when it is served. The ids are kept as one flat array, in memory or, past `SPOOL_BYTES`, in
an unnamed temporary file that is mapped into memory; so a million rows cost a few bytes each.
Whatever goes through all of them works by the chunk, or on numbers of 4 bytes a row.
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune.errors import PairsError, TemplateError, warn_of_pairs
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.templates import Segment, Template, get_template
from gemma_keras_tune.pairs import Pair, read_pairs
from gemma_keras_tune.pairs.problems import Findings, PairsErrors
from gemma_keras_tune.pairs.sources import at_start
from gemma_keras_tune.training.settings import Overlong

SPOOL_BYTES = 64 * 2**20
_ROWS_AT_ONCE = 1024


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
        """Tokens that each row feeds into the model, all but its last one: `[rows]` int32."""
        return (np.diff(self.offsets) - 1).astype(np.int32)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and trained mask of one row, by its place (from 0) among the kept rows."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return np.asarray(self.ids[span]), np.asarray(self.trained[span])


def _count_trained(trained: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Count the trained tokens of each row, `[rows]` int32; takes 4 bytes a token."""
    return (
        np.add.reduceat(trained, starts, dtype=np.int32) if len(starts) else np.zeros(0, np.int32)
    )


def tokenize_pairs(
    model: keras.Model,
    pairs: Any,
    *,
    template: Any = "auto",
    max_length: int | None = None,
    overlong: Overlong = "error",
    on_pair: Callable[[Pair], None] | None = None,
) -> TokenizedPairs:
    """Read, check, render and tokenize all pairs, once.

    Args:
        model: A KerasHub Gemma with its preprocessor.
        pairs: Anything `read_pairs` takes.
        template: Anything `get_template` takes.
        max_length: Longest row in tokens, or `None` for no limit.
        overlong: Handling of longer rows: `"error"` reports all of them, `"drop"` leaves
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
    refused = _Refused()
    pairs = refused.written(iter(source), template, on_pair)
    while True:
        places = _Places()
        segments = _segments(itertools.islice(pairs, _ROWS_AT_ONCE), places)
        encoded = encoder.encode_rows(segments)
        if not places.rows:
            break
        spool.append(*limit.apply(places, *encoded))
    errors = PairsErrors()
    with errors.collect():
        source.raise_for_problems()
    with errors.collect():
        refused.raise_for_problems(template)
    with errors.collect():
        limit.raise_for_problems()
    errors.raise_all()
    limit.warn(source.name)
    return spool.finish(limit)


@dataclasses.dataclass
class _Places:
    """Row, line and file of each of some rows.

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
    rows: Iterable[tuple[Pair, Sequence[Segment]]], places: _Places
) -> Iterator[Sequence[Segment]]:
    """Yield the segments of each pair, and note its place."""
    for pair, segments in rows:
        places.add(pair)
        yield segments


class _Refused:
    """Writes pairs with a template, and remembers those that it cannot write."""

    def __init__(self) -> None:
        self._found = Findings()
        self._next_steps: dict[str | None, None] = {}

    def written(
        self, pairs: Iterable[Pair], template: Template, on_pair: Callable[[Pair], None] | None
    ) -> Iterator[tuple[Pair, Sequence[Segment]]]:
        for pair in pairs:
            if on_pair:
                on_pair(pair)
            try:
                segments = template.segments(pair.messages)
            except TemplateError as error:
                texts = error.problems or (error.headline,)
                self._found.add(pair.row, pair.line, pair.file, texts)
                self._next_steps[error.next_step] = None
                continue
            yield pair, segments

    def raise_for_problems(self, template: Template) -> None:
        if rows := len(self._found.row_numbers()):
            raise PairsError(
                f"{rows:,} row{'s' * (rows > 1)} cannot be written with the template "
                f"{template.name!r}.",
                self._found.lines(),
                "\n".join(step for step in self._next_steps if step) or None,
            )


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
        overlong: Handling of longer rows.

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
        """Cut the arrays of some rows to the limit; returns them with their row numbers."""
        rows = np.asarray(places.rows, np.int32)
        if self.length is not None:
            most = self.length + 1  # the last token is not fed
            long = counts > most
            self._note(places, counts - 1, long)
            if self.overlong != "error" and long.any():
                kept = np.where(long, 0 if self.overlong == "drop" else most, counts)
                inside = places_within(counts) < np.repeat(kept, counts)
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


def places_within(counts: np.ndarray) -> np.ndarray:
    """Number the tokens of rows that lie one after the other: in each row, from 0."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
