"""Problems of rows: kept with their places, listed, raised together."""

import array
import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from gemma_keras_tune.errors import PairsError


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Reason for which a row cannot be trained on.

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


class Findings:
    """Findings in rows. Row and line numbers are kept by text, a few bytes for each."""

    def __init__(self) -> None:
        self.places: dict[tuple[str | None, str], array.array[int]] = collections.defaultdict(
            lambda: array.array("q")
        )

    def add(self, row: int, line: int | None, file: str | None, texts: Sequence[str]) -> None:
        """Note what was found in one row."""
        for text in texts:
            self.places[file, text].extend((row, line or 0))

    def row_numbers(self) -> tuple[int, ...]:
        """List the rows in which anything was found."""
        return tuple(sorted({row for places in self.places.values() for row in places[::2]}))

    def problems(self) -> tuple[Problem, ...]:
        """List everything that was found, in the order of rows."""
        found = [
            Problem(row, line or None, text, file)
            for (file, text), places in self.places.items()
            for row, line in zip(places[::2], places[1::2], strict=True)
        ]
        return tuple(sorted(found, key=lambda problem: problem.row))

    def lines(self) -> list[str]:
        """Write one line for each problem, and one for all rows that share a problem."""
        found: list[tuple[int, str]] = []
        for (file, text), places in self.places.items():
            rows, lines = places[::2], places[1::2]
            if len(rows) > _LISTED_ONE_BY_ONE:
                where = [file] if file else []
                where += [f"lines {ranges(lines)}"] if lines[0] else []
                place = f" ({', '.join(where)})" if where else ""
                found.append((rows[0], f"{len(rows):,} rows, {ranges(rows)}{place}: {text}"))
                continue
            for row, line in zip(rows, lines, strict=True):
                found.append((row, str(Problem(row, line or None, text, file))))
        return [text for _, text in sorted(found, key=lambda entry: entry[0])]


_LISTED_ONE_BY_ONE = 20


def ranges(numbers: Iterable[int], most: int = 20) -> str:
    """Write ascending numbers in short: `1-3, 7`."""
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
