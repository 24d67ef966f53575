"""What one row means: from a raw record to the messages of a conversation.

The keys a row may have are one table, `SCHEMAS`, used for reading and for the error message alike.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from gemma_keras_tune.pairs.sources import Broken, is_message

Role = Literal["system", "user", "assistant"]


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`.
        content: The text, exactly as it came.
    """

    role: Role
    content: str


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One row to train on: a conversation that ends with the assistant's answer.

    Attributes:
        messages: At most one system message, first; then user and assistant in turn.
        row: The row's number in its source, from 1.
        line: The line it begins on, from 1, where the source is a file of lines.
        file: The file's name, where the source is a folder.
    """

    messages: tuple[Message, ...]
    row: int
    line: int | None = None
    file: str | None = None

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The messages before the last response."""
        return self.messages[:-1]

    @property
    def prompt(self) -> str:
        """Text of the user's last message."""
        return self.messages[-2].content

    @property
    def response(self) -> str:
        """Text of the last message, the assistant's."""
        return self.messages[-1].content


# What the keys of a row mean.


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
            return f"{self.prompt}: a list of {{role, content}} or {{from, value}} messages"
        if self.below:
            return f"{self.prompt} [+ {' or '.join(self.below)}], {self.response}"
        return f"{self.prompt}, {self.response}"


SCHEMAS = (
    Schema("messages"),
    Schema("conversations"),
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
SYSTEM_KEYS = ("system", "system_prompt")
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}


def known_schemas() -> str:
    """The keys a row may have.

    Returns:
        One schema a line, as error messages show them.
    """
    lines = [f"    {schema}" for schema in SCHEMAS]
    lines.append(f"    each with {' or '.join(SYSTEM_KEYS)} for a system message, if you like")
    return "\n".join(lines)


class RowError(Exception):
    """A row that cannot be trained on, for one or more reasons."""

    def __init__(self, problems: Sequence[str], *, schema: bool = False) -> None:
        super().__init__(*problems)
        self.problems = problems
        self.schema = schema


Reader = Callable[[Mapping[Any, Any]], tuple[Message, ...]]


class RowReader:
    """Turns raw rows into messages. The keys of a row are looked up once for each set of keys."""

    def __init__(
        self, prompt_column: str | None, response_column: str | None, system_column: str | None
    ) -> None:
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.system_column = system_column
        self._readers: dict[tuple[Any, ...], Reader] = {}
        self._last: Schema | None = None

    def read(self, record: Any) -> tuple[Message, ...]:
        """The messages of a row, or `RowError`."""
        if isinstance(record, (tuple, list)):
            first = record[0] if record else None
            if isinstance(first, Message) or (not isinstance(first, str) and is_message(first)):
                return _conversation(record, "the row", None)
            if len(record) == 2:
                return _pair_messages(first, record[1], ("the prompt", "the response"), None)
            raise RowError([f"{_kind(record)} of {len(record)}, expected (prompt, response)"])
        if isinstance(record, Mapping):
            keys = tuple(record)
            reader = self._readers.get(keys)
            if reader is None:
                reader = self._reader(keys)
            return reader(record)
        if isinstance(record, Pair):
            return _conversation(record.messages, "the row", None)
        if isinstance(record, Broken):
            raise RowError([record.text])
        raise RowError(
            [f"{_kind(record)}, expected (prompt, response) or a dictionary: {record!r:.60}"]
        )

    def used_columns(self, columns: tuple[Any, ...]) -> tuple[Any, ...]:
        """The columns to read of a table, or `RowError` where they make no pair."""
        schema, names, system = self._resolve(columns)
        used = [names[key] for key in (*schema.keys, *schema.below) if key in names]
        return tuple(dict.fromkeys((*used, *system)))

    def _reader(self, keys: tuple[Any, ...]) -> Reader:
        schema, names, system = self._resolve(keys)
        if len(self._readers) > 1000:  # Rows whose keys are data. Do not hoard them.
            self._readers.clear()
        self._readers[keys] = reader = _make_reader(schema, names, system)
        return reader

    def _resolve(self, keys: tuple[Any, ...]) -> tuple[Schema, dict[str, Any], tuple[Any, ...]]:
        """The schema, the row's own spelling of its keys, and the keys of system messages."""
        if self.prompt_column is not None:
            schema = Schema(self.prompt_column, self.response_column)
            names = {key: key for key in schema.keys if key in keys}
        else:
            names = _spelling(keys)
            schema = self._choose(keys, names)
        system: tuple[Any, ...] = ()
        missing = [key for key in schema.keys if key not in names]
        if self.system_column is not None:
            system = (self.system_column,)
            missing += [key for key in system if key not in keys]
        elif self.prompt_column is None:
            system = tuple(names[key] for key in SYSTEM_KEYS if key in names)
        if missing:
            raise RowError([_missing_key(key, keys) for key in missing])
        return schema, names, system

    def _choose(self, keys: tuple[Any, ...], names: dict[str, Any]) -> Schema:
        fitting = [schema for schema in SCHEMAS if all(key in names for key in schema.keys)]
        # A conversation is the fullest form; an instruction's `input` is not a prompt.
        best = (
            [schema for schema in fitting if schema.response is None]
            or [schema for schema in fitting if schema.below]
            or fitting
        )
        if len(best) == 1:
            self._last = best[0]
            return best[0]
        if best:
            raise RowError(
                [
                    f"the keys {_listed(keys)} fit more than one schema: "
                    f"{' / '.join(map(str, best))}; name them with `prompt_column` and "
                    "`response_column`"
                ],
                schema=True,
            )
        if self._last is not None and any(key in names for key in self._last.keys):
            return self._last
        raise RowError([_unknown_keys(keys, names)], schema=True)


def _unknown_keys(keys: tuple[Any, ...], names: Mapping[str, Any]) -> str:
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
    return f"no known schema has the keys {_listed(keys)}{hint}"


def _spelling(keys: tuple[Any, ...]) -> dict[str, Any]:
    """Plain lower-case keys to the row's own; a spreadsheet's `Prompt ` is a `prompt` too."""
    names = {key.strip().lower(): key for key in reversed(keys) if isinstance(key, str)}
    return names | {key: key for key in keys if isinstance(key, str)}


def _missing_key(key: str, keys: Sequence[Any]) -> str:
    near = difflib.get_close_matches(key, [k for k in keys if isinstance(k, str)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"`{key}` is missing (keys: {_listed(keys) or 'none'}){hint}"


def _listed(keys: Sequence[Any]) -> str:
    shown = ", ".join(repr(key) for key in keys[:20])
    return shown if len(keys) <= 20 else f"{shown}, … ({len(keys)} in all)"


def _make_reader(schema: Schema, names: dict[str, Any], system: tuple[Any, ...]) -> Reader:
    prompt_key = names[schema.prompt]
    if schema.response is None:

        def read_conversation(record: Mapping[Any, Any]) -> tuple[Message, ...]:
            return _conversation(record[prompt_key], f"`{prompt_key}`", _system(record, system))

        return read_conversation
    answer_key = names[schema.response]
    below = [names[key] for key in schema.below if key in names]
    labels = (f"`{prompt_key}`", f"`{answer_key}`")
    if not below and not system:

        def read(record: Mapping[Any, Any]) -> tuple[Message, ...]:
            return _pair_messages(record[prompt_key], record[answer_key], labels, None)

        return read

    def read_all(record: Mapping[Any, Any]) -> tuple[Message, ...]:
        prompt = record[prompt_key]
        more = [key for key in below if not _is_blank(record[key])]
        if more:
            problems: list[str] = []
            parts = [_text(record[key], f"`{key}`", problems) for key in (prompt_key, *more)]
            if problems:
                raise RowError(problems)
            prompt = "\n\n".join(parts)
        return _pair_messages(prompt, record[answer_key], labels, _system(record, system))

    return read_all


def _pair_messages(
    prompt: Any, answer: Any, labels: tuple[str, str], system: tuple[str, Any] | None
) -> tuple[Message, ...]:
    if type(prompt) is not str and _is_conversation(prompt):
        answers = answer if _is_conversation(answer) else [{"role": "assistant", "content": answer}]
        return _conversation([*prompt, *answers], labels[0], system)
    problems: list[str] = []
    user = Message("user", _text(prompt, labels[0], problems))
    assistant = Message("assistant", _answer(answer, labels[1], problems))
    if system is not None:
        label, value = system
        instruction = Message("system", _text(value, label, problems))
        if problems:
            raise RowError(problems)
        return (instruction, user, assistant)
    if problems:
        raise RowError(problems)
    return (user, assistant)


def _system(record: Mapping[Any, Any], keys: tuple[Any, ...]) -> tuple[str, Any] | None:
    """The first system message the row has, with its label; an empty one is none."""
    for key in keys:
        if not _is_blank(record[key]):
            return f"`{key}`", record[key]
    return None


# The values of a row.


def _text(value: Any, label: str, problems: list[str]) -> str:
    """The value as text, unchanged; what is wrong with it is added to `problems`."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            byte = value[error.start]
            problems.append(f"{label} is not UTF-8: byte 0x{byte:02x} at byte {error.start + 1}")
            return ""
    if isinstance(value, str):
        if value and not value.isspace() and (value.isascii() or not _unreadable(value)):
            return str(value)
        problems.append(f"{label} {_unreadable(value) or 'is empty'}")
    elif _is_missing(value):
        problems.append(f"{label} is missing (its value is {value!r})")
    else:
        problems.append(f"{label} must be text, got {_kind(value)}: {value!r:.60}")
    return ""


def _answer(value: Any, label: str, problems: list[str]) -> str:
    """The value as text; a dictionary or list as JSON."""
    if isinstance(value, str) or not (
        isinstance(value, (Mapping, list, tuple)) or _is_array(value)
    ):
        return _text(value, label, problems)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_json_default)
    except (TypeError, ValueError, RecursionError) as error:
        problems.append(f"{label} cannot be written as JSON: {error}")
        return ""
    return _text(text, label, problems)


def _json_default(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers.
        return value.tolist()
    raise TypeError(f"it holds {_kind(value)}")


def _is_array(value: Any) -> bool:
    return hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0


def _is_missing(value: Any) -> bool:
    """Whether it is None, a NaN of any kind, or one of pandas' missing values."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    try:
        return math.isnan(value)
    except (TypeError, ValueError, OverflowError):
        return False


def _is_blank(value: Any) -> bool:
    """Whether an optional field is not there."""
    if isinstance(value, (str, bytes)):
        return not value or value.isspace()
    return _is_missing(value)


def _unreadable(text: str) -> str | None:
    """Why text from a file or a JSON escape is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # How Python marks a byte that could not be decoded.
            return f"is not UTF-8: byte 0x{code - 0xDC00:02x} at character {error.start + 1}"
        return f"holds half a surrogate pair at character {error.start + 1}"
    return None


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


# Conversations.


def _is_conversation(value: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(value, (list, tuple)) and bool(value) and is_message(value[0])


def _conversation(value: Any, label: str, system: tuple[str, Any] | None) -> tuple[Message, ...]:
    problems: list[str] = []
    turns = _turns(value, label)
    messages = []
    for place, turn in enumerate(turns, 1):
        message = _message(turn, f"message {place} of {label}", problems)
        if message is not None:
            messages.append(message)
    if system is not None and not (messages and messages[0].role == "system"):
        messages.insert(0, Message("system", _text(system[1], system[0], problems)))
    if not problems and (disorder := _disorder(messages)):
        roles = ", ".join(message.role for message in messages)
        problems.append(f"turns of {label} in an impossible order: {disorder} (roles: {roles})")
    if problems:
        raise RowError(problems)
    return tuple(messages)


def _turns(value: Any, label: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) and value.strip()[:1] in ("[", b"["):
        try:  # How a CSV file holds one.
            value = json.loads(value)
        except ValueError as error:
            raise RowError([f"{label} is broken JSON: {error}"]) from None
    if _is_array(value):
        value = value.tolist()
    if isinstance(value, Mapping) and value and all(map(_is_list, value.values())):
        # A list of dictionaries comes out of Arrow and TFDS as a dictionary of lists.
        value = [
            dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)
        ]
    if isinstance(value, (list, tuple)):
        if value:
            return value
        raise RowError([f"{label} is empty"])
    if _is_blank(value):
        raise RowError([f"{label} is missing (its value is {value!r})"])
    raise RowError([f"{label} must be a list of messages, got {_kind(value)}: {value!r:.60}"])


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or _is_array(value)


def _message(turn: Any, label: str, problems: list[str]) -> Message | None:
    if isinstance(turn, Message):
        role: Any = turn.role
        content: Any = turn.content
    elif not isinstance(turn, Mapping):
        problems.append(f"{label} must be a dictionary, got {_kind(turn)}: {turn!r:.60}")
        return None
    elif "role" in turn and "content" in turn:
        role, content = turn["role"], turn["content"]
    elif "from" in turn and "value" in turn:
        role, content = turn["from"], turn["value"]
    else:
        problems.append(f"{label} has neither role and content nor from and value")
        return None
    if isinstance(role, bytes):
        role = role.decode(errors="replace")
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        problems.append(f"{label} has the unknown role {role!r} (known: {', '.join(ROLES)})")
        return None
    if known == "system" and _is_blank(content):
        return None
    content = _parts(content, label, problems)
    write = _answer if known == "assistant" else _text
    return Message(known, write(content, f"{label} ({role})", problems))


def _parts(content: Any, label: str, problems: list[str]) -> Any:
    """The text of content that is a list of typed parts, as chat services write it."""
    if not (isinstance(content, (list, tuple)) and content):
        return content
    if not all(isinstance(part, Mapping) and "type" in part for part in content):
        return content
    other = {str(part["type"]) for part in content} - {"text"}
    if other:
        problems.append(f"{label} has parts that are no text: {', '.join(sorted(other))}")
        return "…"  # Reported already.
    return "".join(str(part.get("text", "")) for part in content)


def _disorder(messages: Sequence[Message]) -> str | None:
    """Why the order of turns makes no conversation to train on."""
    start = 1 if messages and messages[0].role == "system" else 0
    if len(messages) == start:
        return "there is no user message"
    for place, message in enumerate(messages[start:], start + 1):
        expected = "assistant" if (place - start) % 2 == 0 else "user"
        if message.role == "system":
            return f"message {place} is a system message, which may only come first, once"
        if message.role != expected:
            if place == start + 1:
                return "the assistant speaks first"
            return f"message {place} is a second {message.role} turn in a row"
    if messages[-1].role != "assistant":
        return "the last turn is the user's, with no answer to learn"
    return None
