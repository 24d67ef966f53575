"""Checks of responses that are JSON and nothing else."""

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, ClassVar

import regex  # type: ignore[import-untyped]

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks import base
from gemma_keras_tune.evaluation.checks.base import Check, Outcome, unquoted
from gemma_keras_tune.evaluation.values import Flag, Real, fits, shown
from gemma_keras_tune.generation.answers import Answer

# Values of JSON Schema's `format` that are checked; these need no further package.
FORMATS = ("date", "date-time", "email", "ipv4", "ipv6", "regex", "uuid")
MAX_CHARACTERS = 500_000


@dataclasses.dataclass(frozen=True)
class JsonCheck(Check):
    """A check of a response that is JSON and nothing else.

    Attributes:
        fenced: True to accept JSON within a Markdown code fence, too.
    """

    fenced: Flag = dataclasses.field(default=False, kw_only=True)

    def _parse(self, text: str) -> Any:
        text = text.strip()
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
        fence = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL)
        if self.fenced and fence:
            text = fence[1]
        return json.loads(text, parse_constant=_no_constant)


@dataclasses.dataclass(frozen=True)
class JsonSchema(JsonCheck):
    """The response is JSON that is valid against a JSON schema.

    A `pattern` that takes longer than a second on a text fails; those of `patternProperties` have
    no time limit.

    Attributes:
        schema: The schema, draft 2020-12 unless its `$schema` names another. References may point
            within it alone: nothing is fetched. Of `format`s, those in `FORMATS` are checked, and
            others refused.
    """

    schema: Mapping[str, Any] | bool = True
    name: ClassVar[str] = "json_schema"
    main: ClassVar[str] = "schema"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("schema", isinstance(self.schema, (Mapping, bool)), "a JSON schema")
        if problem := not_json(self.schema) or _schema_problem(self.schema):
            raise EvaluationError(f"json_schema: this is no JSON schema: {problem}")

    def problem(self, value: Any) -> str:
        """Explain why a value is not valid; empty if it is."""
        from referencing.exceptions import Unresolvable

        try:
            errors = list(self._validator().iter_errors(value))
        except (ValueError, OverflowError, RecursionError) as error:
            return f"it is not JSON: {error}"
        except Unresolvable as error:
            return f"the schema refers to {error.ref!r}, which is not in it"
        except TimeoutError:
            return f"a pattern of the schema took over {base.PATTERN_SECONDS:g} s"
        except (regex.error, re.error) as error:
            return f"a pattern of the schema cannot be used: {error}"
        return "; ".join(f"{e.json_path}: {e.message}"[: base.MAX_SHOWN] for e in errors[:5])

    def _validator(self) -> Any:
        from jsonschema.validators import extend
        from referencing import Registry

        kind = extend(_draft(self.schema), {"pattern": _pattern, "multipleOf": _multiple_of})
        return kind(self.schema, registry=Registry(), format_checker=_format_checker())

    def describe(self) -> str:
        """Write the check in words."""
        if self.schema is True:
            return "is JSON"
        return f"is JSON that fits the schema {json.dumps(self.schema, ensure_ascii=False)}"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Validate the response against the schema."""
        try:
            value = self._parse(response.text)
        except (ValueError, RecursionError) as error:
            return Outcome(False, f"it is not JSON: {error}")
        problem = self.problem(value)
        return Outcome(not problem, problem)


@dataclasses.dataclass(frozen=True)
class JsonFields(JsonCheck):
    """The response is JSON with these values at these places.

    Attributes:
        fields: Value at each dotted path: `{"type": "order", "items.0.name": "bread"}`.
        ignore_case: True to ignore the case of letters in texts.
    """

    fields: Mapping[str, Any]
    ignore_case: Flag = False
    name: ClassVar[str] = "json_fields"
    main: ClassVar[str] = "fields"

    def __post_init__(self) -> None:
        good = isinstance(self.fields, Mapping) and all(isinstance(k, str) for k in self.fields)
        self._require("fields", good and bool(self.fields), "a dictionary of paths and values")
        if problem := not_json(self.fields):
            raise EvaluationError(f"json_fields: `fields` is no JSON: {problem}")
        super().__post_init__()

    def describe(self) -> str:
        """Write the check in words."""
        wanted = ", ".join(f"{k} = {json_text(v)}" for k, v in self.fields.items())
        return f"is JSON with {wanted}{' (case ignored)' if self.ignore_case else ''}"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Compare the value at each path; the score is the share that is right."""
        try:
            value = self._parse(response.text)
        except (ValueError, RecursionError) as error:
            return Outcome(False, f"it is not JSON: {error}", 0.0)
        problems = [text for item in self.fields.items() if (text := self._problem(value, *item))]
        return Outcome(not problems, "; ".join(problems), 1 - len(problems) / len(self.fields))

    def _problem(self, value: Any, path: str, wanted: Any) -> str:
        try:
            found = _value_at(value, path)
            if canonical(found, self.ignore_case) == canonical(wanted, self.ignore_case):
                return ""
            return f"{path} is {json_text(found)}, not {json_text(wanted)}"
        except LookupError:
            return f"{path} is missing"
        except RecursionError:
            return f"{path} is nested too deeply"


def json_text(value: Any) -> str:
    """Write a value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= base.MAX_SHOWN else text[: base.MAX_SHOWN - 1] + "…"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def not_json(value: Any) -> str:
    """Explain why a value, such as one of YAML, is no JSON; empty if it is."""
    left, count = [value], 0
    while left:
        item = left.pop()
        count += 1
        if count > base.MAX_VALUES:  # also where a list is within itself
            return f"it has more than {base.MAX_VALUES:,} values"
        if isinstance(item, Mapping):
            if key := next((key for key in item if not isinstance(key, str)), None):
                return f"the key {shown(key)} is no text (put it in quotes)"
            left += item.values()
        elif isinstance(item, (list, tuple)):
            left += item
        elif not (item is None or isinstance(item, (bool, int, str)) or fits(item, Real)):
            return f"{shown(item)} is in it{unquoted(item)}"
    return ""


def _value_at(value: Any, path: str) -> Any:
    """Find the value at a dotted path. A key that contains a dot is tried as a whole first."""
    if isinstance(value, dict) and path in value:
        return value[path]
    key, dot, rest = path.partition(".")
    if isinstance(value, dict):
        found = value[key]
    elif isinstance(value, list) and key.isdecimal():
        found = value[int(key)]
    else:
        raise LookupError(path)
    return _value_at(found, rest) if dot else found


def canonical(value: Any, ignore_case: bool) -> Any:
    """Make equal JSON equal in Python: 1 equals 1.0, but true is no number."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, str):
        return value.casefold() if ignore_case else value
    if isinstance(value, Mapping):
        return {k: canonical(v, ignore_case) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(v, ignore_case) for v in value]
    return value


# JSON schemas.


def _draft(schema: Any) -> Any:
    """Choose the validator of the draft that a schema names, or of the newest."""
    from jsonschema.validators import Draft202012Validator, validator_for

    named = isinstance(schema, Mapping) and "$schema" in schema
    return validator_for(schema, default=None) if named else Draft202012Validator


def _schema_problem(schema: Any) -> str:
    """Describe what is wrong with a schema, or cannot be checked here; empty if nothing is."""
    from jsonschema.exceptions import SchemaError

    named = schema.get("$schema", "") if isinstance(schema, Mapping) else ""
    if not isinstance(named, str) or _draft(schema) is None:
        return f"`$schema` is {shown(named)}, which is no known draft"
    try:
        _draft(schema).check_schema(schema)
    except SchemaError as error:
        return str(error.message)
    unknown = [name for name in _formats(schema) if name not in FORMATS]
    if not unknown:
        return ""
    return (
        f"the format {shown(unknown[0])} cannot be checked; formats are {', '.join(FORMATS)}; "
        "for another, use `pattern`"
    )


def _formats(schema: Any) -> Iterator[str]:
    """Yield every `format` of a schema, but not those within values that are only compared."""
    left = [schema]
    while left:
        item = left.pop()
        if isinstance(item, Mapping):
            if isinstance(name := item.get("format"), str):
                yield name
            left += [v for k, v in item.items() if k not in ("const", "enum", "default")]
        elif isinstance(item, list):
            left += item


def _format_checker() -> Any:
    from jsonschema import FormatChecker

    checker = FormatChecker([name for name in FORMATS if name != "date-time"])
    checker.checks("date-time", raises=ValueError)(_is_date_time)
    return checker


def _is_date_time(value: Any) -> bool:
    """Test for RFC 3339: `2026-01-31T12:00:00Z`. jsonschema needs another package for it."""
    if not isinstance(value, str):
        return True
    form = r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[-+]\d\d:\d\d)"
    return bool(re.fullmatch(form, value) and datetime.datetime.fromisoformat(value.upper()))


def _multiple_of(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[Any]:
    """Compare as decimals: 19.99 is a multiple of 0.01, but not as binary fractions."""
    from jsonschema.exceptions import ValidationError

    if not validator.is_type(value, "number"):
        return
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or Fraction(repr(value)) % Fraction(repr(step)):
        yield ValidationError(f"{value!r:.80} is not a multiple of {step}")


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if validator.is_type(value, "string") and not base.found_within(pattern, value):
        yield ValidationError(f"{value!r:.80} does not match {pattern!r}")
