"""The keys a row may have, in one table for reading and for messages."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Schema:
    """Keys that make a row a pair.

    Attributes:
        prompt: The key of the prompt, or of the whole conversation where `response` is `None`.
        response: The key of the response.
        below: Keys of more text, joined below the prompt with an empty line between. May be
            missing or empty.
    """

    prompt: str
    response: str | None = None
    below: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys a row must have."""
        return (self.prompt,) if self.response is None else (self.prompt, self.response)

    def __str__(self) -> str:
        if self.response is None:
            forms = "{role, content} or {from, value}"
            forms = "{role, parts}" if self.prompt == "contents" else forms
            return f"{self.prompt}: a list of {forms} messages"
        if self.below:
            return f"{self.prompt} [+ {' or '.join(self.below)}], {self.response}"
        return f"{self.prompt}, {self.response}"


SCHEMAS = (
    Schema("messages"),
    Schema("conversations"),
    Schema("contents"),
    Schema("instruction", "output", below=("input", "context")),
    Schema("instruction", "response", below=("input", "context")),
    Schema("input_text", "output_text"),
    Schema("prompt", "response"),
    Schema("prompts", "responses"),
    Schema("prompt", "completion"),
    Schema("question", "answer"),
    Schema("input", "output"),
)
# Read where a row has one of them and its conversation does not begin with a system message.
SYSTEM_KEYS = ("system", "system_prompt", "systeminstruction", "system_instruction")
TOOL_KEYS = ("tools", "functions", "available_tools")  # JSON schemas
# Of the preferred answer. The prompt is that of any schema, or in the answer.
PREFERRED_KEYS = (
    "chosen", "chosen_messages", "chosen_response", "chosen_answer", "preferred_output",
    "response_chosen", "accepted",
)  # fmt: skip


def known_schemas() -> str:
    """List the keys a row may have, one schema a line, as error messages show them."""
    lines = [f"    {schema}" for schema in SCHEMAS]
    lines.append("    each with system, system_prompt or systemInstruction for a system message, "
                 "and tools for JSON schemas, if you like")  # fmt: skip
    return "\n".join(lines)


def spell_keys(keys: Sequence[Any]) -> dict[str, Any]:
    """Map plain lower-case keys to the row's own; a spreadsheet's `Prompt ` is a `prompt` too."""
    names = {key.strip().lower(): key for key in reversed(keys) if isinstance(key, str)}
    return names | {key: key for key in keys if isinstance(key, str)}


def preference_schema(names: Mapping[str, Any]) -> Schema | None:
    """Find the schema that trains the preferred answer of a row; `None` where there is none.

    Args:
        names: The row's keys by their plain spelling.
    """
    for chosen in PREFERRED_KEYS:
        if chosen in names:
            for schema in SCHEMAS:
                if schema.prompt in names:
                    return Schema(schema.prompt, chosen, schema.below)
            return Schema(chosen)
    return None


def describe_missing(key: str, keys: Sequence[Any]) -> str:
    """Say that a key is missing, which keys there are, and which of them is close."""
    near = difflib.get_close_matches(key, [k for k in keys if isinstance(k, str)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"`{key}` is missing (keys: {list_keys(keys) or 'none'}){hint}"


def describe_unknown(keys: Sequence[Any], names: Mapping[str, Any]) -> str:
    """Say that no schema has these keys, and which one is the nearest."""
    if not keys:
        return "the row is empty"
    halves = [
        (found, missing)
        for schema in SCHEMAS
        if schema.response is not None
        for found, missing in (schema.keys, schema.keys[::-1])
        if found in names
    ]
    hint = ""
    if halves:
        partners = [missing for found, missing in halves if found == halves[0][0]]
        hint = f"; beside {halves[0][0]!r} it would need {' or '.join(map(repr, partners))}"
    elif near := _nearest(names):
        hint = f"; the nearest is {near}"
    return f"no known schema has the keys {list_keys(keys)}{hint}"


def _nearest(names: Mapping[str, Any]) -> Schema | None:
    """Find the schema whose keys are spelled most like those of the row."""

    def likeness(schema: Schema) -> float:
        return min(
            max(difflib.SequenceMatcher(None, key, name).ratio() for name in names)
            for key in schema.keys
        )

    best = max(SCHEMAS, key=likeness) if names else None
    return best if best is not None and likeness(best) >= 0.7 else None


def list_keys(keys: Sequence[Any]) -> str:
    """Show keys for a message, at most 20 of them."""
    shown = ", ".join(repr(key) for key in keys[:20])
    return shown if len(keys) <= 20 else f"{shown}, … ({len(keys)} in all)"
