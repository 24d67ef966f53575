"""Checks of a test case: conditions that a response must fulfil.

In a file a check is its name and its main option: `{"exact": "Paris"}`, or, with other options,
`{"exact": {"text": "Paris", "ignore_case": true}}`. The names are those of `CHECKS`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks.base import Check, Outcome
from gemma_keras_tune.evaluation.checks.behaviour import Function, Refuses, Safe, Stops
from gemma_keras_tune.evaluation.checks.numeric import Length, Number
from gemma_keras_tune.evaluation.checks.structured import JsonCheck, JsonFields, JsonSchema
from gemma_keras_tune.evaluation.checks.text import (
    Contains,
    Exact,
    NotContains,
    OneOf,
    Regex,
    TextCheck,
)
from gemma_keras_tune.evaluation.checks.tools import CallsNoTool, CallsTool
from gemma_keras_tune.evaluation.values import shown

__all__ = [
    "CallsNoTool",
    "CallsTool",
    "Check",
    "Contains",
    "Exact",
    "Function",
    "JsonFields",
    "JsonSchema",
    "Length",
    "NotContains",
    "Number",
    "OneOf",
    "Outcome",
    "Refuses",
    "Regex",
    "Safe",
    "Stops",
]

CHECKS: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (
        Exact, OneOf, Contains, NotContains, Regex, JsonSchema, JsonFields, Number, Length,
        Refuses, Stops, Safe, CallsTool, CallsNoTool,
    )
}  # fmt: skip


def check_from_config(config: Mapping[str, Any]) -> Check:
    """Make a check out of JSON data.

    Args:
        config: A name of `CHECKS` and the check's options.

    Returns:
        The check.

    Raises:
        EvaluationError: There is no such check, or an option is missing or wrong.
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
    """Read options by name: a dictionary is that, unless the main option itself is one."""
    if not isinstance(value, Mapping):
        return {kind.main: value}
    if issubclass(kind, JsonCheck) and not (kind.main in value and set(value) <= names):
        return {kind.main: value}
    return value


def compares_text(kind: type[Check]) -> bool:
    """Test for a check whose main option is a text."""
    return issubclass(kind, TextCheck)
