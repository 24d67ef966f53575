"""Checks of numbers in a response, and of its length."""

import dataclasses
import re
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from gemma_keras_tune.evaluation.checks.base import Check, Outcome
from gemma_keras_tune.evaluation.values import Count, NonNegative, Real
from gemma_keras_tune.generation.answers import Answer

# Thousands in groups of three between spaces or apostrophes; or digits with points and commas.
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+−]?)"
    r"(?P<digits>\d{1,3}(?:[ \u00a0\u2009\u202f'’]\d{3})+(?!\d)(?:[.,]\d+)?"
    r"|\d+(?:[.,]\d+)*|\.\d+)(?P<power>[eE][-+]?\d+)?"
)


@dataclasses.dataclass(frozen=True)
class Number(Check):
    """The response contains a number, and it is this one.

    Numbers are read as people write them: `1,234.5`, `1.234,5`, `1 234,5` and `1'234.5` are all
    1234.5, and `3,5` is 3.5. Only one separator with three digits after it can be read in two ways;
    `decimal` decides. A sign before a number and an exponent (`1.5e6`) count, a unit or a percent
    sign does not; `4/5`, `10:30` and `3-5` are two numbers each, `1,2,3` is three, and `1.2.3` and
    `24.12.2026` are none.

    Attributes:
        value: The number.
        tolerance: Largest absolute difference.
        relative: Largest difference as a share of `value`. The wider of the two counts.
        which: `"last"` or `"first"` number of the response, or `"only"` if there must be no other.
        decimal: Decimal sign: with `"."`, `1.234` is a little over one and `1,234` is over a
            thousand; with `","` it is the other way round.
    """

    value: Real
    tolerance: NonNegative = 0.0
    relative: NonNegative = 0.0
    which: Annotated[Literal["last", "first", "only"], Meta(description="last, first or only")] = (
        "last"
    )
    decimal: Annotated[Literal[".", ","], Meta(description="'.' or ','")] = "."
    name: ClassVar[str] = "number"
    main: ClassVar[str] = "value"

    def describe(self) -> str:
        """Write the check in words."""
        within = f" within {self._off:g}" if self._off else ""
        return f"its {self.which} number is {self.value:g}{within}"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Compare the number with the one in the response, which is the score."""
        numbers = [n for m in _NUMBER.finditer(response.text) for n in _read(m, self.decimal)]
        if not numbers:
            return Outcome(False, "there is no number in it")
        if self.which == "only" and len(numbers) > 1:
            return Outcome(False, f"there are {len(numbers)} numbers in it")
        found = numbers[0 if self.which == "first" else -1]
        # A tolerance of 0.1 shall take 1.1 for 1, though in binary 1.1 - 1 > 0.1.
        near = abs(found - self.value) <= self._off + 1e-12 * max(1.0, abs(self.value))
        return Outcome(near, "" if near else f"it is {found:g}, not {self.value:g}", found)

    @property
    def _off(self) -> float:
        return max(self.tolerance, self.relative * abs(self.value))


@dataclasses.dataclass(frozen=True)
class Length(Check):
    """The response's length is within limits, both included.

    Attributes:
        max: Longest length.
        min: Shortest length.
        unit: `"characters"`, `"words"` or `"tokens"`. White space around the response counts for
            tokens alone.
    """

    max: Annotated[Count | None, Meta(description="a whole number from 0")] = None
    min: Count = 0
    unit: Annotated[
        Literal["characters", "words", "tokens"], Meta(description="characters, words, tokens")
    ] = "characters"
    name: ClassVar[str] = "length"
    main: ClassVar[str] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        limited = self.max is not None or self.min > 0
        self._require("max", limited, "a limit: `max`, `min` or both")
        self._require("min", self.max is None or self.min <= self.max, "no more than `max`")

    def describe(self) -> str:
        """Write the check in words."""
        most = "" if self.max is None else f"at most {self.max}"
        least = f"at least {self.min}" if self.min else ""
        return f"has {' and '.join(filter(None, (least, most)))} {self.unit}"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Compare the length with the limits; the score is the length."""
        text = response.text.strip()
        lengths = {"characters": len(text), "words": len(text.split()), "tokens": len(response.ids)}
        found = lengths[self.unit]
        good = self.min <= found and (self.max is None or found <= self.max)
        return Outcome(good, "" if good else f"it has {found} {self.unit}", found)


def _read(match: re.Match[str], decimal: str) -> list[float]:
    """Read the numbers in a match of `_NUMBER`: one, except for lists and for what is no number."""
    digits = re.sub(r"[^\d.,]", "", match["digits"])
    grouped = digits != match["digits"]
    sign = match["sign"].replace("−", "-")
    power = match["power"] or ""
    return [float(sign + n + power) for n in _plain_digits(digits, decimal, grouped)]


def _plain_digits(digits: str, decimal: str, grouped: bool) -> list[str]:
    """Write digits with points and commas as Python writes these numbers."""
    marks = re.findall("[.,]", digits)
    if len(set(marks)) == 2:
        head, last, tail = digits.rpartition(marks[-1])
        if last not in head and _in_thousands(head):
            return [f"{re.sub('[.,]', '', head)}.{tail}"]
        return [n for part in digits.split(",") for n in _plain_digits(part, decimal, grouped)]
    if len(marks) > 1:
        if _in_thousands(digits):
            return [re.sub("[.,]", "", digits)]
        return digits.split(",") if marks[0] == "," else []
    if marks and not grouped and marks[0] != decimal and _in_thousands(digits):
        return [digits.replace(marks[0], "")]
    return [digits.replace(",", ".")]


def _in_thousands(digits: str) -> bool:
    return re.fullmatch(r"[1-9]\d{0,2}(?:[.,]\d{3})+", digits) is not None
