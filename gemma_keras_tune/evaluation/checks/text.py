"""Checks that compare texts.

Texts are compared as they are. Each check has options for what to ignore: `ignore_case`, and
`space`, which is `"strip"` (ignore white space around the text, the default), `"collapse"` (any
white space equals one space) or `"keep"`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import regex  # type: ignore[import-untyped]
from msgspec import Meta

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks import base
from gemma_keras_tune.evaluation.checks.base import Check, Outcome, listed, quoted, unquoted
from gemma_keras_tune.evaluation.values import Flag, Text
from gemma_keras_tune.generation.answers import Answer

Space = Annotated[
    Literal["strip", "collapse", "keep"], Meta(description="'strip' or 'collapse' or 'keep'")
]


@dataclasses.dataclass(frozen=True)
class TextCheck(Check):
    """A check that compares texts.

    Attributes:
        ignore_case: True to ignore the case of letters.
        space: Treatment of white space: `"strip"`, `"collapse"` or `"keep"`.
    """

    ignore_case: Flag = dataclasses.field(default=False, kw_only=True)
    space: Space = dataclasses.field(default="strip", kw_only=True)

    def _spaced(self, text: str) -> str:
        if self.space == "keep":
            return text
        return text.strip() if self.space == "strip" else " ".join(text.split())

    def _plain(self, text: str) -> str:
        text = self._spaced(text)
        return text.casefold() if self.ignore_case else text

    @property
    def _ignored(self) -> str:
        said = ["case ignored"] if self.ignore_case else []
        said += {"collapse": ["white space collapsed"], "keep": ["white space kept"]}.get(
            self.space, []
        )
        return f" ({', '.join(said)})" if said else ""


@dataclasses.dataclass(frozen=True)
class Exact(TextCheck):
    """The response is this text.

    Attributes:
        text: The text.
    """

    text: Text
    name: ClassVar[str] = "exact"
    main: ClassVar[str] = "text"

    def describe(self) -> str:
        """Write the check in words."""
        return f"is {quoted(self.text)}{self._ignored}"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Compare the response with the text."""
        same = self._plain(response.text) == self._plain(self.text)
        return Outcome(same, "" if same else f"it is not {quoted(self.text)}")


@dataclasses.dataclass(frozen=True)
class _TextsCheck(TextCheck):
    """A check with a list of texts; one alone may be given as a text."""

    texts: Sequence[str]
    main: ClassVar[str] = "texts"
    verb: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        texts = (self.texts,) if isinstance(self.texts, str) else self.texts
        good = isinstance(texts, Sequence) and all(isinstance(t, str) for t in texts)
        quotes = unquoted(*texts) if isinstance(texts, Sequence) else unquoted(texts)
        self._require("texts", good and bool(texts), f"text, or a list of texts{quotes}")
        object.__setattr__(self, "texts", tuple(texts))

    def describe(self) -> str:
        """Write the check in words."""
        return f"{self.verb} {listed(self.texts)}{self._ignored}"

    def _texts_in(self, response: Answer) -> list[str]:
        said = self._plain(response.text)
        return [text for text in self.texts if self._plain(text) in said]

    def _require_some(self) -> None:
        self._require("texts", all(map(self._plain, self.texts)), "texts that are not empty")


@dataclasses.dataclass(frozen=True)
class OneOf(_TextsCheck):
    """The response is one of several texts.

    Attributes:
        texts: The texts.
    """

    name: ClassVar[str] = "one_of"
    verb: ClassVar[str] = "is one of"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Compare the response with each of the texts."""
        there = self._plain(response.text) in {self._plain(text) for text in self.texts}
        return Outcome(there, "" if there else f"it is none of {listed(self.texts)}")


@dataclasses.dataclass(frozen=True)
class Contains(_TextsCheck):
    """The response contains all of these texts.

    Attributes:
        texts: The texts; one alone may be given as a text.
    """

    name: ClassVar[str] = "contains"
    verb: ClassVar[str] = "contains"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_some()

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Look for every text; the score is the share that is there."""
        found = self._texts_in(response)
        missing = [text for text in self.texts if text not in found]
        score = 1 - len(missing) / len(self.texts)
        return Outcome(not missing, f"missing: {listed(missing)}" if missing else "", score)


@dataclasses.dataclass(frozen=True)
class NotContains(_TextsCheck):
    """The response contains none of these texts.

    Attributes:
        texts: The texts; one alone may be given as a text.
    """

    name: ClassVar[str] = "not_contains"
    verb: ClassVar[str] = "does not contain"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_some()

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Look for each of the texts."""
        found = self._texts_in(response)
        return Outcome(not found, f"it contains {listed(found)}" if found else "")


@dataclasses.dataclass(frozen=True)
class Regex(TextCheck):
    """The response matches a regular expression.

    A pattern that takes longer than a second on a response fails, and the reason says so.

    Attributes:
        pattern: The expression, in Python's syntax.
        full: True if it must match the whole response, rather than a part.
    """

    pattern: Text
    full: Flag = False
    name: ClassVar[str] = "regex"
    main: ClassVar[str] = "pattern"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise EvaluationError(
                f"regex: {self.pattern!r} is not a regular expression: {error}"
            ) from error

    def describe(self) -> str:
        """Write the check in words."""
        return f"{'is' if self.full else 'has'} a match of /{self.pattern}/{self._ignored}"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Search the response for the pattern."""
        text = self._spaced(response.text)
        try:
            found = base.found_within(
                self.pattern, text, full=self.full, ignore_case=self.ignore_case
            )
        except TimeoutError:
            return Outcome(False, f"/{self.pattern}/ took over {base.PATTERN_SECONDS:g} s")
        return Outcome(found, "" if found else f"no match of /{self.pattern}/")
