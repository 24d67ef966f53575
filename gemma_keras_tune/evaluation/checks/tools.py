"""Checks of the tools that a response calls."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks.base import Check, Outcome, listed, quoted
from gemma_keras_tune.evaluation.checks.structured import (
    JsonSchema,
    canonical,
    json_text,
    not_json,
)
from gemma_keras_tune.evaluation.values import Flag, Text
from gemma_keras_tune.generation.answers import Answer

Match = Literal["equal", "subset", "schema"]


@dataclasses.dataclass(frozen=True)
class CallsTool(Check):
    """The response calls this tool with these arguments.

    Several calls may be in a response: one that fits is enough, unless `only` is set. A response
    with a malformed call fails.

    Attributes:
        tool: The tool's name.
        arguments: Values by parameter, or a JSON schema of them; `None` for any arguments.
        match: `"equal"`: these arguments and no others. `"subset"`: these, and maybe others, also
            in dictionaries within. `"schema"`: arguments that are valid against the schema.
        ignore_case: True to ignore the case of letters in texts.
        only: True if the response may make no other call.
    """

    tool: Text
    arguments: Mapping[str, Any] | None = None
    match: Annotated[Match, Meta(description="'equal', 'subset' or 'schema'")] = "equal"
    ignore_case: Flag = False
    only: Flag = False
    name: ClassVar[str] = "calls_tool"
    main: ClassVar[str] = "tool"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("tool", bool(self.tool), "the name of a tool")
        if self.arguments is None:
            return
        self._require("arguments", isinstance(self.arguments, Mapping), "a dictionary")
        if problem := not_json(self.arguments):
            raise EvaluationError(f"calls_tool: `arguments` is no JSON: {problem}")
        if self.match == "schema":
            JsonSchema(self.arguments)

    def describe(self) -> str:
        """Write the check in words."""
        words = {"equal": "with", "subset": "with at least", "schema": "with arguments that fit"}
        case = " (case ignored)" if self.ignore_case else ""
        text = "" if self.arguments is None else f" {words[self.match]} {json_text(self.arguments)}"
        return f"calls {quoted(self.tool)}{text}{case}{' and nothing else' if self.only else ''}"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Look for the call in the response."""
        if response.tool_problems:
            return Outcome(False, f"a malformed call: {response.tool_problems[0]}")
        calls = response.tool_calls
        if not calls:
            return Outcome(False, "it calls no tool")
        others = [call.name for call in calls if call.name != self.tool]
        if len(others) == len(calls):
            return Outcome(False, f"it calls {listed(others)}")
        found = [self._problem(call.arguments) for call in calls if call.name == self.tool]
        if all(found):
            return Outcome(False, found[0])
        if self.only and len(calls) > 1:
            return Outcome(False, f"it makes {len(calls)} calls")
        return Outcome(True)

    def _problem(self, given: Mapping[str, Any]) -> str:
        """Explain what is wrong with the arguments of a call; empty if nothing is."""
        if self.arguments is None:
            return ""
        if self.match == "schema":
            return JsonSchema(self.arguments).problem(given)
        wanted = canonical(self.arguments, self.ignore_case)
        found = canonical(given, self.ignore_case)
        fits = _contains(found, wanted) if self.match == "subset" else found == wanted
        return "" if fits else f"the arguments are {json_text(given)}"


@dataclasses.dataclass(frozen=True)
class CallsNoTool(Check):
    """The response calls no tool; a malformed call counts as one.

    Attributes:
        expected: False if it must call one, whichever.
    """

    expected: Flag = True
    name: ClassVar[str] = "calls_no_tool"
    main: ClassVar[str] = "expected"

    def describe(self) -> str:
        """Write the check in words."""
        return "calls no tool" if self.expected else "calls a tool"

    def check(self, prompt: str, response: Answer) -> Outcome:
        """Look for calls in the response."""
        calls = [call.name for call in response.tool_calls]
        malformed = response.tool_problems
        if not self.expected:
            reason = f"a malformed call: {malformed[0]}" if malformed else "it calls no tool"
            return Outcome(bool(calls) and not malformed, "" if calls and not malformed else reason)
        said = [f"it calls {listed(calls)}"] if calls else []
        said += [f"a malformed call: {malformed[0]}"] if malformed else []
        return Outcome(not said, "; ".join(said))


def _contains(found: Any, wanted: Any) -> bool:
    """Test if all that is wanted is there, in dictionaries within too; lists must be equal."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(key in found and _contains(found[key], wanted[key]) for key in wanted)
    return bool(found == wanted)
