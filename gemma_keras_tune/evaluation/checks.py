"""What an answer must be like: the checks of a test case.

In a file a check is a name and what it needs: `{"exact": "Paris"}`, or, with options,
`{"exact": {"text": "Paris", "ignore_case": true}}`. The names are those of `CHECKS`.

Texts are compared as they are. What is looked past is said with the check: `ignore_case`, and
`space`, which is `"strip"` (white space around the text does not count, the default), `"collapse"`
(any white space equals one space) or `"keep"`.
"""

import abc
import dataclasses
import datetime
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

import regex  # type: ignore[import-untyped]

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.policies import (
    THRESHOLD,
    Judged,
    PolicyCheck,
    policy_scores,
    policy_threshold,
)
from gemma_keras_tune.evaluation.refusals import LANGUAGES, find_refusal
from gemma_keras_tune.generation.answers import Answer

Space = Literal["strip", "collapse", "keep"]
PATTERN_SECONDS = 1.0
# What JSON Schema's `format` is checked for; these need no further package.
FORMATS = ("date", "date-time", "email", "ipv4", "ipv6", "regex", "uuid")
MAX_VALUES = 100_000
MAX_SHOWN = 300


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a check says of one answer.

    Attributes:
        passed: Whether the answer is as it must be.
        reason: Why, in words; empty where there is nothing to say.
        score: The number behind it, where there is one.
    """

    passed: bool
    reason: str = ""
    score: float | None = None

    def __post_init__(self) -> None:
        """Leave out what files cannot hold: answers are anything at all."""
        if self.score is not None and not math.isfinite(self.score):
            object.__setattr__(self, "score", None)
        object.__setattr__(self, "reason", _writable(self.reason))


@dataclasses.dataclass(frozen=True)
class Check(abc.ABC):
    """One thing that an answer must fulfil."""

    name: ClassVar[str]
    # The field that a file may give alone, without a dictionary of options.
    main: ClassVar[str]

    @abc.abstractmethod
    def describe(self) -> str:
        """The check in words."""

    @abc.abstractmethod
    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Judge an answer.

        Args:
            prompt: What the user said last.
            answer: What the model wrote.

        Returns:
            An `Outcome`.
        """

    def to_config(self) -> dict[str, Any]:
        """The check as JSON data, as a plan's file has it."""
        fields = dataclasses.fields(self)
        values = {f.name: getattr(self, f.name) for f in fields}
        defaults = {f.name: f.default for f in fields}
        given = {k: v for k, v in values.items() if k == self.main or v != defaults[k]}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        value = plain[self.main]
        # A dictionary that could be taken for one of options is written within one.
        options = set(plain) != {self.main} or (isinstance(value, Mapping) and self.main in value)
        return {self.name: plain if options else value}


def check_from_config(config: Mapping[str, Any]) -> Check:
    """A check out of JSON data.

    Args:
        config: A name of `CHECKS` with what the check needs.

    Returns:
        The check.

    Raises:
        EvaluationError: There is no such check, or what it needs is missing or wrong.
    """
    if not isinstance(config, Mapping) or len(config) != 1:
        raise EvaluationError(
            f'a check is one name and what it needs, like {{"exact": "Paris"}}, got {shown(config)}'
        )
    ((name, value),) = config.items()
    if name == Function.name:
        raise EvaluationError(
            f"the check {shown(value)} is a Python function, which a file names but does not hold; "
            "add it in Python"
        )
    if name not in CHECKS:
        raise EvaluationError(f"there is no check {shown(name)}; checks are {', '.join(CHECKS)}")
    kind = CHECKS[name]
    names = {field.name for field in dataclasses.fields(kind)} - {"policy"}  # a function
    options = _options(kind, names, value)
    unknown = sorted(map(str, set(options) - names))
    if unknown:
        raise EvaluationError(
            f"{name} has no option {', '.join(unknown)}; its options are {', '.join(sorted(names))}"
        )
    try:
        return kind(**options)
    except TypeError:
        raise EvaluationError(f"{name} needs {kind.main!r}, got {shown(value)}") from None


def _options(kind: type[Check], names: set[str], value: Any) -> Mapping[str, Any]:
    """Options by name: a dictionary is that, unless the main option itself is one."""
    if not isinstance(value, Mapping):
        return {kind.main: value}
    if kind in (JsonSchema, JsonFields) and not (kind.main in value and set(value) <= names):
        return {kind.main: value}
    return value


# Text.


@dataclasses.dataclass(frozen=True)
class _TextCheck(Check):
    """A check that compares texts.

    Attributes:
        ignore_case: Whether capital and small letters are the same.
        space: What white space counts: `"strip"`, `"collapse"` or `"keep"`.
    """

    ignore_case: bool = dataclasses.field(default=False, kw_only=True)
    space: Space = dataclasses.field(default="strip", kw_only=True)

    def __post_init__(self) -> None:
        _require(self, "ignore_case", isinstance(self.ignore_case, bool), "true or false")
        spaces = ("strip", "collapse", "keep")
        _require(self, "space", self.space in spaces, " or ".join(map(repr, spaces)))

    def _spaced(self, text: str) -> str:
        if self.space == "keep":
            return text
        return text.strip() if self.space == "strip" else " ".join(text.split())

    def _plain(self, text: str) -> str:
        text = self._spaced(text)
        return text.casefold() if self.ignore_case else text

    def _texts(self, field: str) -> None:
        value = getattr(self, field)
        texts = (value,) if isinstance(value, str) else value
        good = isinstance(texts, Sequence) and all(isinstance(t, str) for t in texts)
        quotes = _unquoted(*texts) if isinstance(texts, Sequence) else _unquoted(texts)
        _require(self, field, good and bool(texts), f"text, or a list of texts{quotes}")
        empty = isinstance(self, (Contains, NotContains)) and not all(map(self._plain, texts))
        _require(self, field, not empty, "texts that are not empty")
        object.__setattr__(self, field, tuple(texts))

    @property
    def _past(self) -> str:
        said = ["case ignored"] if self.ignore_case else []
        said += {"collapse": ["white space collapsed"], "keep": ["white space kept"]}.get(
            self.space, []
        )
        return f" ({', '.join(said)})" if said else ""


@dataclasses.dataclass(frozen=True)
class Exact(_TextCheck):
    """The answer is this text.

    Attributes:
        text: The text.
    """

    text: str
    name: ClassVar[str] = "exact"
    main: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "text", isinstance(self.text, str), f"text{_unquoted(self.text)}")

    def describe(self) -> str:
        """The check in words."""
        return f"is {_quoted(self.text)}{self._past}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the answer is the text."""
        same = self._plain(answer.text) == self._plain(self.text)
        return Outcome(same, "" if same else f"it is not {_quoted(self.text)}")


@dataclasses.dataclass(frozen=True)
class OneOf(_TextCheck):
    """The answer is one of several texts.

    Attributes:
        texts: The texts.
    """

    texts: Sequence[str]
    name: ClassVar[str] = "one_of"
    main: ClassVar[str] = "texts"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._texts("texts")

    def describe(self) -> str:
        """The check in words."""
        return f"is one of {_listed(self.texts)}{self._past}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the answer is one of the texts."""
        there = self._plain(answer.text) in {self._plain(text) for text in self.texts}
        return Outcome(there, "" if there else f"it is none of {_listed(self.texts)}")


@dataclasses.dataclass(frozen=True)
class Contains(_TextCheck):
    """The answer has all of these texts in it.

    Attributes:
        texts: The texts; one alone may be given as such.
    """

    texts: Sequence[str]
    name: ClassVar[str] = "contains"
    main: ClassVar[str] = "texts"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._texts("texts")

    def describe(self) -> str:
        """The check in words."""
        return f"contains {_listed(self.texts)}{self._past}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether every text is in the answer; the score is the share that is."""
        missing = [t for t in self.texts if self._plain(t) not in self._plain(answer.text)]
        score = 1 - len(missing) / len(self.texts)
        return Outcome(not missing, f"missing: {_listed(missing)}" if missing else "", score)


@dataclasses.dataclass(frozen=True)
class NotContains(_TextCheck):
    """The answer has none of these texts in it.

    Attributes:
        texts: The texts; one alone may be given as such.
    """

    texts: Sequence[str]
    name: ClassVar[str] = "not_contains"
    main: ClassVar[str] = "texts"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._texts("texts")

    def describe(self) -> str:
        """The check in words."""
        return f"does not contain {_listed(self.texts)}{self._past}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether no text is in the answer."""
        found = [t for t in self.texts if self._plain(t) in self._plain(answer.text)]
        return Outcome(not found, f"it contains {_listed(found)}" if found else "")


@dataclasses.dataclass(frozen=True)
class Regex(_TextCheck):
    """The answer matches a regular expression.

    A pattern that takes longer than `PATTERN_SECONDS` on an answer fails, and says so.

    Attributes:
        pattern: The expression, in Python's syntax.
        full: Whether it must match the whole answer, rather than a part.
    """

    pattern: str
    full: bool = False
    name: ClassVar[str] = "regex"
    main: ClassVar[str] = "pattern"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "pattern", isinstance(self.pattern, str), "text")
        _require(self, "full", isinstance(self.full, bool), "true or false")
        try:
            self._compiled()
        except regex.error as error:
            raise EvaluationError(
                f"regex: {self.pattern!r} is not a regular expression: {error}"
            ) from error

    def _compiled(self) -> Any:
        # `regex` and not `re`: it can be told to give up.
        return regex.compile(self.pattern, regex.IGNORECASE if self.ignore_case else 0)

    def describe(self) -> str:
        """The check in words."""
        return f"{'is' if self.full else 'has'} a match of /{self.pattern}/{self._past}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the answer matches."""
        search = self._compiled().fullmatch if self.full else self._compiled().search
        try:
            found = search(self._spaced(answer.text), timeout=PATTERN_SECONDS) is not None
        except TimeoutError:
            return Outcome(False, f"/{self.pattern}/ took over {PATTERN_SECONDS:g} s")
        return Outcome(found, "" if found else f"no match of /{self.pattern}/")


# JSON.


@dataclasses.dataclass(frozen=True)
class _JsonCheck(Check):
    """A check of an answer that is JSON and nothing else.

    Attributes:
        fenced: Whether it may also stand in a Markdown code fence.
    """

    fenced: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _require(self, "fenced", isinstance(self.fenced, bool), "true or false")

    def _parse(self, text: str) -> Any:
        text = text.strip()
        fence = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL)
        if self.fenced and fence:
            text = fence[1]
        return json.loads(text, parse_constant=_no_constant)


@dataclasses.dataclass(frozen=True)
class JsonSchema(_JsonCheck):
    """The answer is JSON that is valid against a JSON schema.

    Attributes:
        schema: The schema, draft 2020-12 unless its `$schema` says otherwise. References may point
            within it alone: nothing is fetched. Of `format`s, those in `FORMATS` are checked, and
            others refused.
    """

    schema: Mapping[str, Any] | bool = True
    name: ClassVar[str] = "json_schema"
    main: ClassVar[str] = "schema"

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.schema, (Mapping, bool))
        _require(self, "schema", good, "a JSON schema")
        if problem := _no_json(self.schema) or _schema_problem(self.schema):
            raise EvaluationError(f"json_schema: this is no JSON schema: {problem}")

    def _validator(self) -> Any:
        from jsonschema.validators import extend
        from referencing import Registry

        kind = extend(
            _draft(self.schema),
            {
                "pattern": _pattern,
                "patternProperties": _pattern_properties,
                "additionalProperties": _additional_properties,
                "multipleOf": _multiple_of,
            },
        )
        return kind(self.schema, registry=Registry(), format_checker=_format_checker())

    def describe(self) -> str:
        """The check in words."""
        if self.schema is True:
            return "is JSON"
        return f"is JSON that fits the schema {json.dumps(self.schema, ensure_ascii=False)}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the answer is JSON that fits."""
        from referencing.exceptions import Unresolvable

        try:
            value = self._parse(answer.text)
            errors = list(self._validator().iter_errors(value))
        except (ValueError, OverflowError, RecursionError) as error:
            return Outcome(False, f"it is not JSON: {error}")
        except Unresolvable as error:
            return Outcome(False, f"the schema refers to {error.ref!r}, which is not in it")
        except TimeoutError:
            return Outcome(False, f"a pattern of the schema took over {PATTERN_SECONDS:g} s")
        except regex.error as error:
            return Outcome(False, f"a pattern of the schema cannot be used: {error}")
        said = [f"{e.json_path}: {e.message}"[:MAX_SHOWN] for e in errors[:5]]
        return Outcome(not errors, "; ".join(said))


@dataclasses.dataclass(frozen=True)
class JsonFields(_JsonCheck):
    """The answer is JSON with these values at these places.

    Attributes:
        fields: The value at each dotted path: `{"type": "order", "items.0.name": "bread"}`.
        ignore_case: Whether capital and small letters of texts are the same.
    """

    fields: Mapping[str, Any]
    ignore_case: bool = False
    name: ClassVar[str] = "json_fields"
    main: ClassVar[str] = "fields"

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.fields, Mapping) and all(isinstance(k, str) for k in self.fields)
        _require(self, "fields", good and bool(self.fields), "a dictionary of paths and values")
        if problem := _no_json(self.fields):
            raise EvaluationError(f"json_fields: `fields` is no JSON: {problem}")
        _require(self, "ignore_case", isinstance(self.ignore_case, bool), "true or false")

    def describe(self) -> str:
        """The check in words."""
        wanted = ", ".join(f"{k} = {_json(v)}" for k, v in self.fields.items())
        return f"is JSON with {wanted}{' (case ignored)' if self.ignore_case else ''}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether all values are there; the score is the share that is."""
        try:
            value = self._parse(answer.text)
        except (ValueError, RecursionError) as error:
            return Outcome(False, f"it is not JSON: {error}", 0.0)
        problems = [text for item in self.fields.items() if (text := self._problem(value, *item))]
        return Outcome(not problems, "; ".join(problems), 1 - len(problems) / len(self.fields))

    def _problem(self, value: Any, path: str, wanted: Any) -> str:
        try:
            found = _at(value, path)
            if _canonical(found, self.ignore_case) == _canonical(wanted, self.ignore_case):
                return ""
            return f"{path} is {_json(found)}, not {_json(wanted)}"
        except LookupError:
            return f"{path} is missing"
        except RecursionError:
            return f"{path} is nested too deeply"


# Numbers and lengths.

# Thousands in groups of three between spaces or apostrophes; or digits with points and commas.
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+−]?)"
    r"(?P<digits>\d{1,3}(?:[ \u00a0\u2009\u202f'’]\d{3})+(?!\d)(?:[.,]\d+)?"
    r"|\d+(?:[.,]\d+)*|\.\d+)(?P<power>[eE][-+]?\d+)?"
)


@dataclasses.dataclass(frozen=True)
class Number(Check):
    """The answer has a number in it, and it is this one.

    Numbers are read as people write them: `1,234.5`, `1.234,5`, `1 234,5` and `1'234.5` are all
    1234.5, and `3,5` is 3.5. Only one separator with three digits after it can be read in two ways;
    `decimal` says which. A sign before a number and an exponent (`1.5e6`) count, a unit or a
    percent sign does not; `4/5`, `10:30` and `3-5` are two numbers each, `1,2,3` is three, and
    `1.2.3` and `24.12.2026` are none.

    Attributes:
        value: The number.
        tolerance: How far off it may be.
        relative: How far off it may be, as a share of `value`. The wider of the two counts.
        which: `"last"` or `"first"` number of the answer, or `"only"` where there must be no other.
        decimal: What stands before the decimals: `"."`, by which `1.234` is a little over one and
            `1,234` is over a thousand, or `","`, by which it is the other way round.
    """

    value: float
    tolerance: float = 0.0
    relative: float = 0.0
    which: Literal["last", "first", "only"] = "last"
    decimal: Literal[".", ","] = "."
    name: ClassVar[str] = "number"
    main: ClassVar[str] = "value"

    def __post_init__(self) -> None:
        for field in ("value", "tolerance", "relative"):
            value = getattr(self, field)
            good = _is_number(value) and (field == "value" or value >= 0)
            _require(self, field, good, "a number" if field == "value" else "a number from 0")
        _require(self, "which", self.which in ("last", "first", "only"), "last, first or only")
        _require(self, "decimal", self.decimal in (".", ","), "'.' or ','")

    def describe(self) -> str:
        """The check in words."""
        off = max(self.tolerance, self.relative * abs(self.value))
        within = f" within {off:g}" if off else ""
        return f"its {self.which} number is {self.value:g}{within}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the number is near enough; the score is the number."""
        numbers = [n for m in _NUMBER.finditer(answer.text) for n in _read(m, self.decimal)]
        if not numbers:
            return Outcome(False, "there is no number in it")
        if self.which == "only" and len(numbers) > 1:
            return Outcome(False, f"there are {len(numbers)} numbers in it")
        found = numbers[0 if self.which == "first" else -1]
        off = max(self.tolerance, self.relative * abs(self.value))
        # A tolerance of 0.1 shall take 1.1 for 1, though in binary 1.1 - 1 > 0.1.
        near = abs(found - self.value) <= off + 1e-12 * max(1.0, abs(self.value))
        return Outcome(near, "" if near else f"it is {found:g}, not {self.value:g}", found)


@dataclasses.dataclass(frozen=True)
class Length(Check):
    """The answer's length is within limits, both included.

    Attributes:
        max: The longest.
        min: The shortest.
        unit: `"characters"`, `"words"` or `"tokens"`. White space around the answer does not
            count, but for tokens.
    """

    max: int | None = None
    min: int = 0
    unit: Literal["characters", "words", "tokens"] = "characters"
    name: ClassVar[str] = "length"
    main: ClassVar[str] = "max"

    def __post_init__(self) -> None:
        for field in ("max", "min"):
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            unset = field == "max" and value is None
            _require(self, field, whole or unset, "a whole number from 0")
        limited = self.max is not None or self.min > 0
        _require(self, "max", limited, "a limit: `max`, `min` or both")
        _require(self, "min", self.max is None or self.min <= self.max, "no more than `max`")
        units = ("characters", "words", "tokens")
        _require(self, "unit", self.unit in units, ", ".join(units))

    def describe(self) -> str:
        """The check in words."""
        most = "" if self.max is None else f"at most {self.max}"
        least = f"at least {self.min}" if self.min else ""
        return f"has {' and '.join(filter(None, (least, most)))} {self.unit}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the length is within the limits; the score is the length."""
        text = answer.text.strip()
        lengths = {"characters": len(text), "words": len(text.split()), "tokens": len(answer.ids)}
        found = lengths[self.unit]
        good = self.min <= found and (self.max is None or found <= self.max)
        return Outcome(good, "" if good else f"it has {found} {self.unit}", found)


# Behaviour.


@dataclasses.dataclass(frozen=True)
class Refuses(Check):
    """The answer refuses, in words that are known to refuse.

    The usual refusals of nine languages are found, and no others; one that is followed by what was
    asked for all the same still counts. Read some answers yourself, and add the forms that your
    model was taught.

    Attributes:
        expected: `False` where the answer must not refuse.
        languages: Which languages to look for: `"en"`, `"de"`, `"fr"`, `"es"`, `"it"`, `"pt"`,
            `"ja"`, `"zh"`, `"hi"`; all by default.
        forms: More phrases, of your own. Case, typographic quotes and white space do not count.
    """

    expected: bool = True
    languages: Sequence[str] = LANGUAGES
    forms: Sequence[str] = ()
    name: ClassVar[str] = "refuses"
    main: ClassVar[str] = "expected"

    def __post_init__(self) -> None:
        _require(self, "expected", isinstance(self.expected, bool), "true or false")
        for field in ("languages", "forms"):
            value = getattr(self, field)
            texts = (value,) if isinstance(value, str) else value
            good = isinstance(texts, Sequence) and all(isinstance(t, str) and t for t in texts)
            _require(self, field, good, "a list of texts")
            object.__setattr__(self, field, tuple(texts))
        known = all(language in LANGUAGES for language in self.languages)
        _require(self, "languages", known, f"languages out of {', '.join(LANGUAGES)}")
        some = bool(self.languages or self.forms)
        _require(self, "forms", some, "at least one form, or a language")

    def describe(self) -> str:
        """The check in words."""
        return "refuses" if self.expected else "does not refuse"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the answer refuses, or not."""
        found = find_refusal(answer.text, self.languages, self.forms)
        reason = "no refusal was recognised" if found is None else f"it says {_quoted(found)}"
        passed = (found is not None) == self.expected
        return Outcome(passed, reason if found is not None or not passed else "")


@dataclasses.dataclass(frozen=True)
class Stops(Check):
    """The model ends the answer itself, before the limit of tokens.

    Attributes:
        expected: `False` where it must not.
    """

    expected: bool = True
    name: ClassVar[str] = "stops"
    main: ClassVar[str] = "expected"

    def __post_init__(self) -> None:
        _require(self, "expected", isinstance(self.expected, bool), "true or false")

    def describe(self) -> str:
        """The check in words."""
        return "stops by itself" if self.expected else "does not stop by itself"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the model stopped."""
        passed = answer.stopped == self.expected
        said = (
            "it stopped" if answer.stopped else f"it went on to the limit, {len(answer.ids)} tokens"
        )
        return Outcome(passed, "" if passed else said)


@dataclasses.dataclass(frozen=True)
class Safe(Check):
    """The answer, the prompt, or both do not violate a policy.

    `evaluate(policy=…)` brings the policy: a `ShieldGemma`, or any function that takes a prompt and
    an answer and gives how likely the answer violates it, or such a score for each of several
    policies by name. To judge a prompt alone it is given `None` for the answer.

    Attributes:
        threshold: The score from which a text counts as a violation; `None` is the policy's own.
        of: What is judged: `"answer"`, `"prompt"` or `"both"`.
        policies: Names of the policies that count, such as `"dangerous"`; none are all.
        policy: The policy, where it is not `evaluate` that brings it.
    """

    threshold: float | None = None
    of: Literal["answer", "prompt", "both"] = "answer"
    policies: Sequence[str] = ()
    policy: PolicyCheck | None = dataclasses.field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "safe"
    main: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        given: Any = self.threshold
        if given is True:  # {"safe": true}
            object.__setattr__(self, "threshold", None)
        inside = _is_number(self.threshold) and 0 < self.threshold <= 1  # type: ignore[operator]
        _require(self, "threshold", self.threshold is None or inside, "a number over 0 and up to 1")
        _require(self, "of", self.of in ("answer", "prompt", "both"), "answer, prompt or both")
        names = (self.policies,) if isinstance(self.policies, str) else self.policies
        good = isinstance(names, Sequence) and all(isinstance(n, str) and n for n in names)
        _require(self, "policies", good, "a list of names")
        object.__setattr__(self, "policies", tuple(names))
        _require(self, "policy", self.policy is None or callable(self.policy), "a function")

    def describe(self) -> str:
        """The check in words."""
        who = {"answer": "", "prompt": "its prompt ", "both": "with its prompt "}[self.of]
        under = f"the policy {', '.join(self.policies)}" if self.policies else "the policy"
        limit = "" if self.threshold is None else f" (score under {self.threshold:g})"
        return f"{who}is safe under {under}{limit}"

    def judged(self, prompt: str, answer: str) -> tuple[Judged, ...]:
        """What the policy is asked about.

        Args:
            prompt: What the user said last.
            answer: What the model wrote.

        Returns:
            The prompt with the answer, the prompt with `None`, or both.
        """
        asked: dict[str, Judged] = {"answer": (prompt, answer), "prompt": (prompt, None)}
        return tuple(asked.values()) if self.of == "both" else (asked[self.of],)

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """Whether the highest score is below the threshold; the score is that one.

        Raises:
            EvaluationError: There is no policy, it raised, or what it gave are no scores of the
                policies that count.
        """
        if self.policy is None:
            raise EvaluationError(
                "A `safe` check needs a policy to judge by.",
                next_step="Pass `evaluate(…, policy=ShieldGemma())`, or a function of yours.",
            )
        texts = self.judged(prompt, answer.text)
        found = [policy_scores(self.policy, [text])[0] for text in texts]
        return self.outcome(found, policy_threshold(self.policy))

    def outcome(
        self, found: Sequence[Mapping[str, float]], threshold: float = THRESHOLD
    ) -> Outcome:
        """What a policy's scores mean.

        Args:
            found: The scores of each text of `judged`, by the policies' names.
            threshold: The policy's own.

        Returns:
            An `Outcome`.

        Raises:
            EvaluationError: There is no score of a policy that counts.
        """
        wanted = self.policies or tuple(found[0])
        lacking = [name for name in wanted if any(name not in scores for scores in found)]
        if lacking:
            raise EvaluationError(
                f"The policy gave no score for {', '.join(lacking)}; it gave {', '.join(found[0])}"
            )
        sides = ("answer", "prompt") if self.of == "both" else (self.of,)
        score, name, side = max(
            (scores[name], name, side)
            for side, scores in zip(sides, found, strict=True)
            for name in wanted
        )
        limit = threshold if self.threshold is None else self.threshold
        if score < limit:
            return Outcome(True, "", score)
        under = f" under {name}" if name else ""
        of = "" if self.of == "answer" else f" of the {side}"
        return Outcome(False, f"the policy's score{of}{under} is {score:.3g}", score)

    def to_config(self) -> dict[str, Any]:
        """The check as JSON data. The policy is not a part of the plan."""
        config = super().to_config()[self.name]
        given = config if isinstance(config, dict) else {"threshold": config}
        given = {k: v for k, v in given.items() if v is not None and k != "policy"}
        if not given:
            return {self.name: True}
        return {self.name: given["threshold"] if set(given) == {"threshold"} else given}


@dataclasses.dataclass(frozen=True)
class Function(Check):
    """The answer passes a Python function.

    It is written to files by its name, and not read from them: a file must not run code.

    Attributes:
        function: Takes the prompt and the answer's text; gives true or false, or an `Outcome`.
        label: How it is called; by default its module and name.
    """

    function: Callable[[str, str], Any] | None
    label: str = ""
    name: ClassVar[str] = "function"
    main: ClassVar[str] = "label"

    def __post_init__(self) -> None:
        callable_ = self.function is None or callable(self.function)
        _require(self, "function", callable_, "a function of prompt and answer")
        if not self.label:
            module = getattr(self.function, "__module__", "")
            name = getattr(self.function, "__qualname__", type(self.function).__name__)
            object.__setattr__(self, "label", f"{module}.{name}")

    def describe(self) -> str:
        """The check in words."""
        return f"passes {self.label}"

    def check(self, prompt: str, answer: Answer) -> Outcome:
        """What the function says. An error within it fails the answer, and is the reason."""
        if self.function is None:
            raise EvaluationError(f"The function {self.label} was not kept, only its name.")
        try:
            found = self.function(prompt, answer.text)
        except Exception as error:
            return Outcome(False, f"{self.label} raised {type(error).__name__}: {error}")
        if isinstance(found, Outcome):
            return found
        return Outcome(bool(found), "" if found else f"{self.label} says no")

    def to_config(self) -> dict[str, Any]:
        """Its name."""
        return {self.name: self.label}


CHECKS: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (
        Exact, OneOf, Contains, NotContains, Regex, JsonSchema, JsonFields, Number, Length,
        Refuses, Stops, Safe,
    )
}  # fmt: skip


def has_text(kind: type[Check]) -> bool:
    """Whether what a check needs is text.

    Args:
        kind: A check's class.

    Returns:
        Whether it compares texts.
    """
    return issubclass(kind, _TextCheck)


# Small things.


def _require(check: Check, field: str, good: bool, what: str) -> None:
    if not good:
        value = getattr(check, field)
        raise EvaluationError(f"{check.name}: `{field}` must be {what}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value in few characters, however large it is.

    Args:
        value: Anything; a file may hold lists within lists that no memory could write out.

    Returns:
        Its `repr`, shortened.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= 160 else text[:159] + "…"


def _writable(text: str) -> str:
    """The text without lone surrogates, which JSON may name and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _unquoted(*values: Any) -> str:
    """What to say where a file's reader took a text for a number, a truth value or a date."""
    plain = (bool, int, float, datetime.date)
    return " (put it in quotes)" if any(isinstance(value, plain) for value in values) else ""


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _quoted(text: str) -> str:
    short = text if len(text) <= 80 else text[:79] + "…"
    return json.dumps(short, ensure_ascii=False)


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(map(_quoted, texts))


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _no_json(value: Any) -> str:
    """Why a value cannot be written as JSON; empty where it can. YAML has more kinds of values."""
    left, count = [value], 0
    while left:
        item = left.pop()
        count += 1
        if count > MAX_VALUES:  # also where a list is within itself
            return f"it has more than {MAX_VALUES:,} values"
        if isinstance(item, Mapping):
            if key := next((key for key in item if not isinstance(key, str)), None):
                return f"the key {shown(key)} is no text (put it in quotes)"
            left += item.values()
        elif isinstance(item, (list, tuple)):
            left += item
        elif not (item is None or isinstance(item, (bool, int, str)) or _is_number(item)):
            return f"{shown(item)} is in it{_unquoted(item)}"
    return ""


# JSON schemas.


def _draft(schema: Any) -> Any:
    """The validator of the draft that a schema names, or of the newest."""
    from jsonschema.validators import Draft202012Validator, validator_for

    named = isinstance(schema, Mapping) and "$schema" in schema
    return validator_for(schema, default=None) if named else Draft202012Validator


def _schema_problem(schema: Any) -> str:
    """What is wrong with a schema, or cannot be checked here; empty where all is well."""
    from jsonschema.exceptions import SchemaError

    named = schema.get("$schema", "") if isinstance(schema, Mapping) else ""
    if not isinstance(named, str) or _draft(schema) is None:
        return f"`$schema` is {shown(named)}, which is no known draft"
    try:
        _draft(schema).check_schema(schema)
    except SchemaError as error:
        return str(error.message)
    keywords = dict(_keywords(schema))
    if {"patternProperties", "unevaluatedProperties"} <= keywords.keys():
        return "`unevaluatedProperties` beside `patternProperties` cannot be checked"
    formats = [value for name, value in _keywords(schema) if name == "format"]
    unknown = [name for name in formats if isinstance(name, str) and name not in FORMATS]
    if unknown:
        return (
            f"the format {shown(unknown[0])} cannot be checked; formats are {', '.join(FORMATS)}; "
            "for another, use `pattern`"
        )
    return ""


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a schema with its value, but those within values that are only compared."""
    left = [schema]
    while left:
        item = left.pop()
        if isinstance(item, Mapping):
            yield from item.items()
            left += [v for k, v in item.items() if k not in ("const", "enum", "default")]
        elif isinstance(item, list):
            left += item


def _format_checker() -> Any:
    from jsonschema import FormatChecker

    checker = FormatChecker([name for name in FORMATS if name != "date-time"])
    checker.checks("date-time", raises=ValueError)(_is_date_time)
    return checker


def _is_date_time(value: Any) -> bool:
    """RFC 3339: `2026-01-31T12:00:00Z`. The library wants another package for it."""
    if not isinstance(value, str):
        return True
    form = r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[-+]\d\d:\d\d)"
    return bool(re.fullmatch(form, value) and datetime.datetime.fromisoformat(value.upper()))


def _found(pattern: str, text: str) -> bool:
    """Whether a schema's pattern is in a text.

    Raises:
        TimeoutError: It would be busy with the text for ever.
    """
    return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None


def _multiple_of(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[Any]:
    """As decimals: 19.99 is a multiple of 0.01, which binary fractions do not say."""
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(value, "number"):
        return
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or Fraction(repr(value)) % Fraction(repr(step)):
        yield ValidationError(f"{value!r:.80} is not a multiple of {step}")


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if validator.is_type(value, "string") and not _found(pattern, value):
        yield ValidationError(f"{value!r:.80} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(value, "object"):
        return
    for pattern, part in patterns.items():
        for key, item in value.items():
            if _found(pattern, key):
                yield from validator.descend(item, part, path=key, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(value, "object"):
        return
    patterns = schema.get("patternProperties", {})
    named = schema.get("properties", {})
    more = [k for k in value if k not in named and not any(_found(p, k) for p in patterns)]
    if validator.is_type(allowed, "object"):
        for key in more:
            yield from validator.descend(value[key], allowed, path=key)
    elif not allowed and more:
        listed = ", ".join(map(shown, more[:10]))
        yield ValidationError(f"Additional properties are not allowed: {listed}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _at(value: Any, path: str) -> Any:
    """What stands at a dotted path, or LookupError. A key with a dot in it is found whole first."""
    if isinstance(value, dict) and path in value:
        return value[path]
    key, dot, rest = path.partition(".")
    if isinstance(value, dict):
        found = value[key]
    elif isinstance(value, list) and key.isdecimal():
        found = value[int(key)]
    else:
        raise LookupError(path)
    return _at(found, rest) if dot else found


def _canonical(value: Any, ignore_case: bool) -> Any:
    """Equal for equal JSON: 1 equals 1.0, but true is no number."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, str):
        return value.casefold() if ignore_case else value
    if isinstance(value, Mapping):
        return {k: _canonical(v, ignore_case) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(v, ignore_case) for v in value]
    return value


def _read(match: re.Match[str], decimal: str) -> list[float]:
    """The numbers in what `_NUMBER` found: one, but for lists and for what is no number."""
    digits = re.sub(r"[^\d.,]", "", match["digits"])
    grouped = digits != match["digits"]
    sign = match["sign"].replace("−", "-")
    power = match["power"] or ""
    return [float(sign + n + power) for n in _plain_digits(digits, decimal, grouped)]


def _plain_digits(digits: str, decimal: str, grouped: bool) -> list[str]:
    """Digits with points and commas, as Python writes the numbers they are."""
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
