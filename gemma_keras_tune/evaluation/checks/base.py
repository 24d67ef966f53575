"""The base of all checks, what a check finds, and how both are written in words."""

import abc
import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import regex  # type: ignore[import-untyped]

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.values import Text, problem, shown
from gemma_keras_tune.generation.answers import Answer

PATTERN_SECONDS = 1.0
MAX_VALUES = 100_000
MAX_SHOWN = 300


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of one check on one response.

    Attributes:
        passed: True if the response is as it must be.
        reason: Explanation in words; empty if there is nothing to say.
        score: The number behind it, if there is one.
    """

    passed: bool
    reason: str = ""
    score: float | None = None

    def __post_init__(self) -> None:
        """Leave out what files cannot hold: a response can contain anything."""
        if self.score is not None:
            score = float(self.score) if math.isfinite(self.score) else None
            object.__setattr__(self, "score", score)
        # JSON may name lone surrogates, which UTF-8 cannot hold.
        plain = self.reason.encode("utf-8", "replace").decode("utf-8")
        object.__setattr__(self, "reason", plain)


class Check(abc.ABC):
    """One condition that a response must fulfil. Subclasses are frozen dataclasses.

    Every field whose type has a description, as those in `values` have, is tested when a check is
    made.
    """

    name: ClassVar[str]
    # The field that a file may give alone, without a dictionary of options.
    main: ClassVar[str]

    def __post_init__(self) -> None:
        """Test the fields against their types; the first wrong one raises an `EvaluationError`."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if text := problem(field.name, value, field.type):
                hint = unquoted(value) if field.type is Text else ""
                raise EvaluationError(f"{self.name}: {text.replace(', got ', f'{hint}, got ', 1)}")

    @abc.abstractmethod
    def describe(self) -> str:
        """Write the check in words."""

    @abc.abstractmethod
    def check(self, prompt: str, response: Answer) -> Outcome:
        """Judge the response to `prompt`, the user's last message."""

    def to_config(self) -> dict[str, Any]:
        """Convert the check to JSON data, as in a plan's file. Default values are left out."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {f.name: getattr(self, f.name) for f in fields}
        defaults = {f.name: f.default for f in fields}
        given = {k: v for k, v in values.items() if k == self.main or v != defaults[k]}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        value = plain[self.main]
        # A dictionary that could be taken for one of options is written within one.
        options = set(plain) != {self.main} or (isinstance(value, Mapping) and self.main in value)
        return {self.name: plain if options else value}

    def _require(self, field: str, good: bool, what: str) -> None:
        if not good:
            raise EvaluationError(
                f"{self.name}: `{field}` must be {what}, got {shown(getattr(self, field))}"
            )

    def _read_texts(self, field: str, what: str) -> tuple[str, ...]:
        """Make a field a tuple of texts that are not empty; a text alone is one of them."""
        value = getattr(self, field)
        texts = (value,) if isinstance(value, str) else value
        good = isinstance(texts, Sequence) and all(isinstance(t, str) and t for t in texts)
        self._require(field, good, what)
        object.__setattr__(self, field, tuple(texts))
        return tuple(texts)


def found_within(pattern: str, text: str, *, full: bool = False, ignore_case: bool = False) -> bool:
    """Search for a regular expression in the syntax of the `regex` package.

    Raises:
        TimeoutError: The search took longer than `PATTERN_SECONDS`.
    """
    compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    search = compiled.fullmatch if full else compiled.search
    return search(text, timeout=PATTERN_SECONDS) is not None


def unquoted(*values: Any) -> str:
    """Give a hint where a file's reader took a text for a number, a truth value or a date."""
    plain = (bool, int, float, datetime.date)
    return " (put it in quotes)" if any(isinstance(value, plain) for value in values) else ""


def quoted(text: str) -> str:
    """Write a text in quotes, shortened to 80 characters."""
    short = text if len(text) <= 80 else text[:79] + "…"
    return json.dumps(short, ensure_ascii=False)


def listed(texts: Iterable[str]) -> str:
    """Write texts in quotes, separated by commas."""
    return ", ".join(map(quoted, texts))
