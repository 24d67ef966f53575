"""Tools in conversations: their schemas, the calls of an assistant, and the results."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_keras_tune.pairs.unused import Unused
from gemma_keras_tune.pairs.values import (
    ReadingError,
    as_list,
    is_blank,
    is_list,
    kind,
    parse_structure,
    read_text,
    shorten,
    write_answer,
)

_ARGUMENT_KEYS = ("arguments", "args", "input", "parameters")
_SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema", "parameters_json_schema")
_DECLARED = ("name", "description", "response")
# They would end a name in the prompt.
_NO_NAME = frozenset("{}<>:,\"' \t\n")


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: The tool's name.
        arguments: JSON data by the name of the parameter.
        id: The name by which a result refers to this call, if there is one.
    """

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    id: str | None = dataclasses.field(default=None, compare=False)

    def to_config(self) -> dict[str, Any]:
        """Convert the call to JSON data, as providers store it."""
        function = {"name": self.name, "arguments": dict(self.arguments)}
        return {"type": "function", "function": function} | ({"id": self.id} if self.id else {})


def read_tools(
    value: Any, label: str, unused: Unused, problems: list[str]
) -> tuple[Mapping[str, Any], ...]:
    """Read the tools of a conversation: JSON schemas of functions, or JSON text of them.

    Args:
        value: A list of `{"type": "function", "function": {…}}`, of bare functions with `name`,
            `description` and `parameters`, or of Google's `function_declarations`.
        label: The name of the value in problems.
        unused: Counts keys that hold something and are not used.
        problems: What is wrong is added.

    Returns:
        The tools, each `{"type": "function", "function": {…}}`.
    """
    if is_blank(value):
        return ()
    try:
        items = _items(value, label)
    except ReadingError as error:
        problems += error.problems
        return ()
    found: dict[str, Mapping[str, Any]] = {}
    for place, item in enumerate(_functions(items), 1):
        where = f"tool {place} of {label}"
        tool = _tool(item, where, unused, problems)
        if tool is None:
            continue
        name = tool["function"]["name"]
        if name in found:
            problems.append(f"{where} has the name {name!r}, which another one has")
        found[name] = tool
    return tuple(found.values())


def _items(value: Any, label: str) -> list[Any]:
    if isinstance(value, (str, bytes)):
        value = parse_structure(value, label)
    value = as_list(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ReadingError([f"{label} must be a list, got {kind(value)}: {shorten(value)}"])
    parsed = [parse_structure(v, label) if isinstance(v, (str, bytes)) else v for v in value]
    return [item for item in parsed if not is_blank(item)]


def _functions(items: Sequence[Any]) -> Iterable[Any]:
    for item in items:
        declared = None
        if isinstance(item, Mapping):
            declared = item.get("function_declarations") or item.get("functionDeclarations")
        if is_list(declared):
            yield from as_list(declared)
        else:
            yield item


def _tool(item: Any, label: str, unused: Unused, problems: list[str]) -> dict[str, Any] | None:
    function = item.get("function", item) if isinstance(item, Mapping) else item
    if not isinstance(function, Mapping):
        problems.append(f"{label} must be a JSON schema, got {kind(item)}: {shorten(item)}")
        return None
    filled = _filled(function)
    schema_key = next((key for key in _SCHEMA_KEYS if key in filled), None)
    schema = filled.get(schema_key, {}) if schema_key else {}
    name, description = filled.get("name"), filled.get("description", "")
    before = len(problems)
    check_name(name, label, problems)
    if not isinstance(description, str):
        problems.append(f"{label}: `description` must be text, got {shorten(description)}")
    if not isinstance(schema, Mapping):
        problems.append(f"{label}: `{schema_key}` must be a JSON schema, got {shorten(schema)}")
    elif str(schema.get("type", "object")).lower() != "object":
        problems.append(f"{label}: `{schema_key}` must have the type 'object'")
    if len(problems) > before:
        return None
    for key, value in filled.items():
        if key not in _DECLARED and key != schema_key and not (function is item and key == "type"):
            unused.add(f"`{key}` of tools", value)
    tool: dict[str, Any] = {"name": name, "description": description}
    if schema:
        tool["parameters"] = {"type": "object", **schema}
    if isinstance(filled.get("response"), Mapping):
        tool["response"] = filled["response"]
    return {"type": "function", "function": tool}


def _filled(value: Any) -> Any:
    """Leave out the `None`s with which Arrow fills a structure up."""
    if isinstance(value, Mapping):
        return {str(key): _filled(part) for key, part in value.items() if part is not None}
    if is_list(value):
        return [_filled(part) for part in as_list(value)]
    return value


def check_name(name: Any, label: str, problems: list[str]) -> None:
    """Add a problem where a tool's name is none, or would end in the middle of a prompt."""
    if not isinstance(name, str) or not name or not _NO_NAME.isdisjoint(name):
        problems.append(f"{label} needs a `name` of letters, digits, _, - and ., got {name!r:.60}")


def read_calls(value: Any, label: str, problems: list[str]) -> tuple[ToolCall, ...]:
    """Read the calls of an assistant's message, or JSON text of them.

    Args:
        value: A list of calls or one: `{"function": {"name": …, "arguments": …}}` or `{"name": …,
            "arguments": …}`. Arguments are a dictionary, or JSON text of one.
        label: The name of the value in problems.
        problems: What is wrong is added.
    """
    try:
        items = _items(value, label)
    except ReadingError as error:
        problems += error.problems
        return ()
    calls = [_call(item, f"call {i} of {label}", problems) for i, item in enumerate(items, 1)]
    return tuple(call for call in calls if call is not None)


def _call(item: Any, label: str, problems: list[str]) -> ToolCall | None:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping):
        problems.append(f"{label} must have `name` and `arguments`, got {shorten(item)}")
        return None
    before = len(problems)
    check_name(function.get("name"), label, problems)
    arguments = next((function[key] for key in _ARGUMENT_KEYS if key in function), None)
    if isinstance(arguments, (str, bytes)) and not is_blank(arguments):
        try:
            arguments = parse_structure(arguments, f"`arguments` of {label}")
        except ReadingError as error:
            problems += error.problems
    if is_blank(arguments) and not isinstance(arguments, Mapping):
        arguments = {}
    if len(problems) == before and not isinstance(arguments, Mapping):
        problems.append(f"`arguments` of {label} must be a dictionary, got {shorten(arguments)}")
    if len(problems) > before:
        return None
    identity = item.get("id") or item.get("tool_call_id")
    return ToolCall(function["name"], _plain(arguments), str(identity) if identity else None)


def _plain(value: Any) -> Any:
    """Turn NumPy's arrays and numbers into Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def declared_arguments(
    calls: Iterable[ToolCall], tools: Sequence[Mapping[str, Any]]
) -> tuple[ToolCall, ...]:
    """Leave out arguments that are `None` and that the tool does not have: Arrow put them there."""
    schemas = {t["function"]["name"]: t["function"].get("parameters", {}) for t in tools}

    def declared(call: ToolCall) -> ToolCall:
        known = schemas.get(call.name, {}).get("properties", {})
        kept = {k: v for k, v in call.arguments.items() if v is not None or k in known}
        return (
            call if len(kept) == len(call.arguments) else dataclasses.replace(call, arguments=kept)
        )

    return tuple(map(declared, calls))


def read_result(value: Any, label: str, problems: list[str]) -> tuple[str, Any]:
    """Read the result of a call.

    Args:
        value: Text, a number, or a structure. Text stays text, also where it is JSON: that is what
            the tool returned.
        label: The name of the result in problems.
        problems: What is wrong is added.

    Returns:
        The result as text, and a structure as JSON data; `None` for text and numbers.
    """
    if isinstance(value, Mapping) or is_list(value):
        text = write_answer(value, label, problems)
        return text, json.loads(text) if text else None
    if isinstance(value, (bool, int, float)):
        return json.dumps(value), None
    return read_text(value, label, problems), None
