"""The reader of conversations, one for training, answering and testing.

It takes the dialects in which conversations are stored: the names of roles and keys, content as
text or in parts, lists as NumPy arrays or as text. A key it does not use is counted, or refused
where it changes what a message means.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gemma_keras_tune.pairs.tools import (
    ToolCall,
    check_name,
    declared_arguments,
    read_calls,
    read_result,
)
from gemma_keras_tune.pairs.unused import Meaning, Unused, meaning_of
from gemma_keras_tune.pairs.values import (
    ReadingError,
    as_list,
    is_blank,
    is_empty,
    is_list,
    kind,
    parse_structure,
    read_text,
    shorten,
)

Role = Literal["system", "user", "assistant", "tool"]
Reasoning = Literal["refuse", "keep", "drop"]

# In lower case. The reader takes them in any case.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
}
_RESULT_ROLES = (
    "tool", "function", "function_response", "observation", "tool_response", "tool_result",
    "ipython",
)  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
_CALL_KEYS = ("tool_calls", "toolcalls", "function_call", "functioncall")
_NAME_KEYS = ("name", "tool_call_id")  # of a result
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "parts", "text")
TEXT_TYPES = ("text", "input_text", "output_text")
_THOUGHT_TYPES = ("thinking", "reasoning", "reasoning_text", "thought")


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `"system"`, `"user"`, `"assistant"` or `"tool"`.
        content: The text, exactly as it came.
        trained: Whether the model is taught to write it; of an answer alone.
    """

    role: Role
    content: str
    trained: bool = True

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Calls of tools that an answer makes."""
        return ()

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """JSON schemas of the tools that a conversation may use; of the system message alone."""
        return ()

    @property
    def name(self) -> str | None:
        """Name of the tool that gave a result."""
        return None

    @property
    def tool_call_id(self) -> str | None:
        """The `id` of the call that a result belongs to."""
        return None

    @property
    def data(self) -> Any:
        """A tool's result that is a structure, of which `content` is the JSON text."""
        return None

    @property
    def written(self) -> str:
        """All that the message says: its text, and calls and tools as JSON."""
        return self.content

    def to_config(self) -> dict[str, Any]:
        """Convert the message to JSON data that is read as this message."""
        config: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            config["tool_calls"] = [call.to_config() for call in self.tool_calls]
        if self.role == "tool":
            config |= {"name": self.name, "content": self.data or self.content}
        return config


@dataclasses.dataclass(frozen=True, slots=True)
class ToolMessage(Message):
    """A message with tools, calls of tools or the result of a call.

    A class of its own, as each field costs time where a million messages have none.
    """

    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), hash=False)
    name: str | None = None
    tool_call_id: str | None = dataclasses.field(default=None, compare=False)
    data: Any = dataclasses.field(default=None, hash=False)

    @property
    def written(self) -> str:
        """All that the message says: its text, and calls and tools as JSON."""
        calls = [call.to_config()["function"] for call in self.tool_calls]
        more = [json.dumps(v, ensure_ascii=False, default=str) for v in (calls, self.tools) if v]
        return "\n".join([self.content, *more] if self.content else more)


@dataclasses.dataclass(slots=True)
class Notes:
    """Settings and findings of the reading of one row.

    Attributes:
        unused: Counts what is not used.
        reasoning: What is done with reasoning beside an answer.
        problems: What is wrong.
    """

    unused: Unused
    reasoning: Reasoning = "refuse"
    problems: list[str] = dataclasses.field(default_factory=list)


def read_conversation(
    value: Any,
    label: str = "",
    *,
    ends_with: Literal["assistant", "user"] = "assistant",
    unused: Unused | None = None,
) -> tuple[Message, ...]:
    """Read a conversation in any of the known dialects.

    Args:
        value: A list of messages, or text or an array that holds one.
        label: The name of the conversation in problems; none where it goes without saying.
        ends_with: `"assistant"` for one to train on; `"user"` for one to be answered, in which
            reasoning of earlier turns is left out.
        unused: Counts keys that hold something and are not used.

    Returns:
        At most one system message, first; then user and assistant in turn.

    Raises:
        ReadingError: It cannot be read, or its turns are in an impossible order.
    """
    asked = ends_with == "user"
    notes = Notes(Unused() if unused is None else unused, "drop" if asked else "refuse")
    messages = read_messages(value, label, notes)
    return check_conversation(messages, label, notes.problems, ends_with)


def check_conversation(
    messages: Sequence[Message],
    label: str,
    problems: list[str],
    ends_with: Literal["assistant", "user"] = "assistant",
) -> tuple[Message, ...]:
    """Return the messages where nothing is wrong with them and with their order.

    Raises:
        ReadingError: There are problems, or the turns are in an impossible order.
    """
    if not problems and (disorder := find_disorder(messages, ends_with)):
        roles = ", ".join(message.role for message in messages)
        where = f"turns of {label}" if label else "turns"
        problems.append(f"{where} in an impossible order: {disorder} (roles: {roles})")
    trained = any(m.trained for m in reversed(messages) if m.role == "assistant")
    if not problems and ends_with == "assistant" and not trained:
        problems.append(f"{label or 'the conversation'} has no answer that is to be trained")
    if problems:
        raise ReadingError(problems)
    return tuple(messages)


def find_disorder(messages: Sequence[Any], ends_with: str = "assistant") -> str | None:
    """Say why the order of turns is not that of a conversation, or return `None`."""
    start = 1 if messages and messages[0].role == "system" else 0
    if len(messages) == start:
        return "there is no user message"
    before = "assistant"
    for place, message in enumerate(messages[start:], start + 1):
        role = message.role
        if role == "system":
            return f"message {place} is a system message, which may only come first, once"
        if role == "tool" and before in ("user", "assistant"):
            return f"message {place} is the result of a tool, and message {place - 1} calls none"
        if before == "call" and role != "tool":
            return f"message {place - 1} calls a tool, and message {place} is not the result"
        if before == "tool" and role == "user":
            return f"message {place} is a user turn, and the result before it has no answer"
        if role == "assistant" and place == start + 1:
            return "the assistant speaks first"
        if role == before != "tool":
            return f"message {place} is a second {role} turn in a row"
        before = "call" if getattr(message, "tool_calls", ()) else role
    ended = "user" if messages[-1].role == "tool" else messages[-1].role
    if ended == ends_with:
        return None
    if messages[-1].role == "tool":
        return "the last message is the result of a tool, with no answer to learn"
    if ends_with == "assistant":
        return "the last turn is the user's, with no answer to learn"
    return "the last turn is the assistant's, with nothing to answer"


# Messages.


def is_message(value: Any) -> bool:
    """Tell whether a value is one message of a conversation, in any of the dialects."""
    if isinstance(value, Message):
        return True
    if not isinstance(value, Mapping):
        return False
    keys = _message_keys(tuple(value))
    if not keys.roles or any(is_list(value[key]) for key in keys.roles):
        return False
    # A structured answer may have a `from`, too: an e-mail, a journey.
    speaks = "role" in value and ("content" in value or "parts" in value)
    return speaks or any(_role_name(value[key]) in _KNOWN_ROLES for key in keys.roles)


def is_conversation(value: Any) -> bool:
    """Tell whether a value is a list of messages."""
    return is_list(value) and len(value) > 0 and is_message(value[0])


def find_messages(value: Any, label: str) -> Any:
    """Return what a value of a row holds as a conversation, or `None` where it is something else.

    One message alone counts, and a dictionary around the `messages`. Text counts where it is a list
    or dictionary with roles, as CSV files hold it.

    Raises:
        ReadingError: Such text cannot be read.
    """
    if isinstance(value, (str, bytes)):
        if not may_hold_messages(value):
            return None
        value = parse_structure(value, label)
    if is_message(value):
        return [value]
    return value if _is_wrapped(value) or is_conversation(value) else None


def _is_wrapped(value: Any) -> bool:
    """Tell whether a dictionary holds messages, or the columns of a list of them."""
    if not isinstance(value, Mapping):
        return False
    if is_conversation(value.get("messages")):
        return True
    roles: Any = next((value[key] for key in _ROLE_KEYS if key in value), None)
    return is_list(roles) and len(roles) > 0 and _role_name(roles[0]) in _KNOWN_ROLES


_BRACKETS = ("[", "{", b"[", b"{")
_ROLES_IN_TEXT = re.compile(r"""^\W*\{.{0,2000}?["'](role|from)["']\s*:""", re.DOTALL)


def may_hold_messages(text: str | bytes) -> bool:
    """Tell whether text begins like a list or dictionary of messages."""
    if text[:1] not in _BRACKETS:
        return False
    start = _decoded(text[:4000])
    return ("role" in start or "from" in start) and bool(_ROLES_IN_TEXT.search(start))


def read_messages(value: Any, label: str, notes: Notes) -> list[Message]:
    """Read messages; an empty system message is left out, and problems are added to `notes`."""
    messages = []
    for place, turn in enumerate(_turns(value, label or "the conversation", notes), 1):
        where = f"message {place} of {label}" if label else f"message {place}"
        message = _message(turn, where, notes)
        if message is not None:
            messages.append(message)
    return _named(messages, notes) if any(m.role == "tool" for m in messages) else messages


def plain_messages(value: Any) -> tuple[Message, ...] | None:
    """Read a conversation in the commonest form, or return `None` for the reader of all forms.

    It is a list of dictionaries of a `role` and a `content` in ASCII, which needs no check of its
    characters: user and assistant in turn.
    """
    if type(value) is not list or not value or len(value) % 2:
        return None
    messages = []
    wanted: Role = "user"
    for turn in value:
        if type(turn) is not dict or len(turn) != 2 or turn.get("role") != wanted:
            return None
        content = turn.get("content")
        if type(content) is not str or not content.isascii() or is_empty(content):
            return None
        messages.append(Message(wanted, content))
        wanted = "assistant" if wanted == "user" else "user"
    return tuple(messages)


def _named(messages: list[Message], notes: Notes) -> list[Message]:
    """Give each result the name of the tool that was called: by its id, or by its place."""
    calls: Sequence[ToolCall] = ()
    place = 0
    named = []
    for number, message in enumerate(messages, 1):
        if message.role != "tool":
            calls, place = message.tool_calls, 0
        else:
            name = next(
                (c.name for c in calls if c.id and c.id == message.tool_call_id), message.name
            )
            if name is None and message.tool_call_id is None and place < len(calls):
                name = calls[place].name
            if name is None and calls:
                notes.problems.append(
                    f"message {number} is the result of no call before it: give it the `name` of "
                    "the tool, or the `id` of its call as `tool_call_id`"
                )
            assert isinstance(message, ToolMessage)
            message, place = dataclasses.replace(message, name=name), place + 1
        named.append(message)
    return named


def put_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Put the tools of a conversation into its system message, an empty one if it has none."""
    if not tools:
        return list(messages)
    first = messages[0] if messages and messages[0].role == "system" else Message("system", "")
    system = ToolMessage("system", first.content, tools=tuple(tools))
    rest = messages[1:] if messages and messages[0] is first else messages
    return [system, *(_declared(message, tools) for message in rest)]


def _declared(message: Message, tools: Sequence[Mapping[str, Any]]) -> Message:
    if not isinstance(message, ToolMessage) or not message.tool_calls:
        return message
    return dataclasses.replace(message, tool_calls=declared_arguments(message.tool_calls, tools))


def _turns(value: Any, label: str, notes: Notes) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) and value.strip()[:1] in _BRACKETS:
        try:
            value = parse_structure(value, label)
        except ReadingError as error:
            marks = describe_turn_marks(value, label)
            raise (ReadingError([marks]) if marks else error) from None
    value = as_list(value)
    if isinstance(value, Mapping) and value:
        value = _turns_of_mapping(value, label, notes)
    if isinstance(value, (list, tuple)):
        if value:
            return value
        raise ReadingError([f"{label} is empty"])
    if is_empty(value):
        raise ReadingError([f"{label} is missing (its value is {value!r})"])
    if marks := describe_turn_marks(value, label):
        raise ReadingError([marks])
    raise ReadingError([f"{label} must be a list of messages, got {kind(value)}: {shorten(value)}"])


def describe_turn_marks(value: Any, label: str) -> str | None:
    """Say what to do about text that is a conversation written out with the marks of its turns."""
    if not isinstance(value, str) or not _MARKS.search(value, 0, 20_000):
        return None
    return (
        f"{label} is a conversation written out with turn marks: give its turns as `messages`, "
        "without the marks, and the model's template writes its own"
    )


_MARKS = re.compile(
    r"<start_of_turn>|<\|turn>|<\|im_start\|>|<\|start_header_id\|>|\[INST\]"
    r"|<\|(?:user|assistant)\|>|^\s*(?:#+ *)?(?:Human|User|Instruction|Assistant|Response)\s*:",
    re.MULTILINE,
)


def _turns_of_mapping(value: Mapping[Any, Any], label: str, notes: Notes) -> Any:
    if is_message(value):
        return [value]
    if is_conversation(value.get("messages")):
        others = [(key, meaning_of(key)) for key in value if key != "messages"]
        _look_at_others(value, tuple(others), "assistant", label, notes)
        return as_list(value["messages"])
    if all(map(is_list, value.values())):
        # A list of dictionaries comes out of Arrow and TFDS as a dictionary of lists.
        lengths = {str(key): len(column) for key, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise ReadingError([f"the lists in {label} differ in length: {lengths}"])
        columns = zip(*value.values(), strict=True)
        return [dict(zip(value, turn, strict=True)) for turn in columns]
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of a message or part by their use; `plain` if they are one role and one content."""

    roles: tuple[Any, ...]
    contents: tuple[Any, ...]
    others: tuple[tuple[Any, Meaning | None], ...]
    plain: bool


@functools.lru_cache(maxsize=1024)
def _message_keys(keys: tuple[Any, ...]) -> _Keys:
    names = {key: key.strip().lower() if isinstance(key, str) else key for key in keys}
    roles = tuple(key for name in _ROLE_KEYS for key in keys if names[key] == name)
    contents = tuple(key for name in _CONTENT_KEYS for key in keys if names[key] == name)
    others = [key for key in keys if key not in roles and key not in contents]
    plain = not others and len(roles) == len(contents) == 1
    return _Keys(roles, contents, tuple((key, meaning_of(key)) for key in others), plain)


def _message(turn: Any, label: str, notes: Notes) -> Message | None:
    keys = _message_keys(tuple(turn)) if type(turn) is dict else None
    if keys is not None and keys.plain:
        role, content = turn[keys.roles[0]], turn[keys.contents[0]]
        known = ROLES.get(role) if type(role) is str else None
        if known and type(content) is str and content.isascii() and not is_empty(content):
            return Message(known, content)
    if isinstance(turn, Message):
        return _written_message(turn, label, notes)
    if not isinstance(turn, Mapping):
        notes.problems.append(f"{label} must be a dictionary, got {kind(turn)}: {shorten(turn)}")
        return None
    return _any_message(turn, keys or _message_keys(tuple(turn)), label, notes)


def _any_message(
    turn: Mapping[Any, Any], keys: "_Keys", label: str, notes: Notes
) -> Message | None:
    before = len(notes.problems)
    role = _pick(turn, keys.roles, label, notes)
    trained, thought = _look_at_others(turn, keys.others, role, label, notes)
    called = [key for key in _CALL_KEYS if not is_blank(turn.get(key))]
    if _role_name(role) in (*_RESULT_ROLES, *_CALL_ROLES) or called:
        message = _tool_message(turn, keys, role, called, trained, label, notes)
        if message is None or not thought or message.role != "assistant":
            return message
        text = "\n\n".join([*thought, *([message.content] if message.content else [])])
        return dataclasses.replace(message, content=text)
    if len(notes.problems) > before:
        return None
    if not keys.roles or not keys.contents:
        notes.problems.append(_unknown_message(tuple(turn), keys, label))
        return None
    known = _known_role(role, label, notes)
    content = _pick(turn, keys.contents, label, notes)
    if known is None or len(notes.problems) > before:
        return None
    if known == "system" and is_blank(content):
        return None
    where = f"{label} ({_decoded(role)})"
    text, thoughts = read_content(content, where, notes)
    if thoughts := [*thought, *thoughts]:
        text = _with_reasoning(text, "\n\n".join(thoughts), known, notes)
    return Message(known, text, trained)


def _tool_message(
    turn: Mapping[Any, Any],
    keys: "_Keys",
    role: Any,
    called: Sequence[str],
    trained: bool,
    label: str,
    notes: Notes,
) -> Message | None:
    """Read an answer that calls tools, or the result of a call."""
    before = len(notes.problems)
    where = f"{label} ({_decoded(role)})"
    content = _pick(turn, keys.contents, label, notes)
    if _role_name(role) in _RESULT_ROLES:
        name, call = (None if is_blank(turn.get(key)) else turn[key] for key in _NAME_KEYS)
        if isinstance(content, Mapping) and set(content) == {"name", "response"}:
            name, content = content["name"], content["response"]
        if name is not None:
            check_name(name, where, notes.problems)
        if _is_parts(content):
            text, data = read_content(content, where, notes)[0], None
        else:
            text, data = read_result(content, where, notes.problems)
        call = None if call is None else str(call)
        message = ToolMessage("tool", text, name=name, tool_call_id=call, data=data)
    else:
        if _role_name(role) in _CALL_ROLES:
            calls, text = read_calls(content, where, notes.problems), ""
        else:
            if ROLES.get(_role_name(role)) != "assistant":
                notes.problems.append(f"{where} calls a tool, which only an assistant does")
            name = f"`{called[0]}` of {label}"
            calls = read_calls(turn[called[0]], name, notes.problems)
            text = "" if is_blank(content) else read_content(content, where, notes)[0]
        message = ToolMessage("assistant", text, trained, tool_calls=calls)
    return message if len(notes.problems) == before else None


def _is_parts(content: Any) -> bool:
    return (
        is_list(content)
        and len(content) > 0
        and all(isinstance(part, Mapping) and "type" in part for part in content)
    )


def _written_message(message: Message, label: str, notes: Notes) -> Message | None:
    known = _known_role(message.role, label, notes)
    if isinstance(message, ToolMessage):
        return message
    if known == "tool":
        return ToolMessage("tool", message.content)
    if known is None or (known == "system" and is_empty(message.content)):
        return None
    text = read_text(message.content, f"{label} ({message.role})", notes.problems)
    if known == message.role and text == message.content:
        return message
    return Message(known, text, message.trained)


def _pick(turn: Mapping[Any, Any], keys: tuple[Any, ...], label: str, notes: Notes) -> Any:
    """Return the value of the one key that holds something."""
    if len(keys) == 1:
        return turn[keys[0]]
    filled = [key for key in keys if not is_blank(turn[key])]
    if any(_differ(turn[key], turn[filled[0]]) for key in filled[1:]):
        names = " and ".join(f"`{key}`" for key in filled)
        notes.problems.append(f"{label} has {names}, and they say different things")
    chosen = filled or list(keys)
    return turn[chosen[0]] if chosen else None


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except ValueError:  # Arrays within.
        return True


def _decoded(role: Any) -> Any:
    return role.decode(errors="replace") if isinstance(role, bytes) else role


def _role_name(role: Any) -> str:
    role = _decoded(role)
    return role.strip().lower() if isinstance(role, str) else ""


_KNOWN_ROLES = {*ROLES, *_RESULT_ROLES, *_CALL_ROLES}


def _known_role(role: Any, label: str, notes: Notes) -> Role | None:
    known = ROLES.get(role) if isinstance(role, str) else None
    known = known or ROLES.get(_role_name(role)) or ("tool" if role == "tool" else None)
    if known is None:
        notes.problems.append(
            f"{label} has the unknown role {shorten(_decoded(role))} (known: {', '.join(ROLES)})"
        )
    return known


def _unknown_message(given: tuple[Any, ...], keys: _Keys, label: str) -> str:
    text = f"{label} has neither role and content nor from and value"
    if not keys.others:
        return text
    wanted = [*(_ROLE_KEYS if not keys.roles else ()), *(() if keys.contents else _CONTENT_KEYS)]
    near = {
        str(key): close[0]
        for key, _ in keys.others
        if (close := difflib.get_close_matches(str(key).lower(), wanted, n=1, cutoff=0.5))
    }
    hint = "".join(f"; did you mean {name!r} by {key!r}?" for key, name in near.items())
    return f"{text} (its keys: {', '.join(map(repr, given[:20]))}){hint}"


def _look_at_others(
    turn: Mapping[Any, Any],
    others: tuple[tuple[Any, Meaning | None], ...],
    role: Any,
    label: str,
    notes: Notes,
) -> tuple[bool, list[str]]:
    """Judge the keys of a message beside its role and content.

    Returns:
        Whether the message is trained, and its reasoning.
    """
    trained = True
    thoughts: list[str] = []
    for key, meaning in others:
        value = turn[key]
        if is_blank(value) or _is_read_with_calls(key, role):
            continue
        if meaning is Meaning.WEIGHT:
            flag = read_flag(value)
            if flag is None or "mask" in str(key).lower():
                notes.problems.append(f"`{key}` of {label} {Meaning.WEIGHT.value}")
            elif not flag:
                trained = False
            elif ROLES.get(_role_name(role)) != "assistant":
                notes.unused.add(f"`{key}` of messages that are not answers", value)
        elif meaning is Meaning.REASONING and not isinstance(value, bool):
            thoughts += read_reasoning(value, f"`{key}` of {label}", f"`{key}` of messages", notes)
        elif meaning in (None, Meaning.CONTEXT, Meaning.REASONING):
            notes.unused.add(f"`{key}` of messages", value)
        else:
            assert meaning is not None
            notes.problems.append(f"`{key}` of {label} {meaning.value}")
    return trained, thoughts


def _is_read_with_calls(key: Any, role: Any) -> bool:
    """Tell whether a key of a message is one of a call or its result."""
    if _role_name(role) in _RESULT_ROLES:
        return key in _NAME_KEYS
    return key in _CALL_KEYS


def read_flag(value: Any) -> bool | None:
    """Read a truth value, also as a number or as a cell of a CSV file; `None` for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    try:
        return bool(value) if value in (0, 1) else None
    except (TypeError, ValueError):
        return None


def read_reasoning(value: Any, label: str, name: str, notes: Notes) -> list[str]:
    """Keep, drop or refuse reasoning, as the notes say; return what is kept."""
    if notes.reasoning == "refuse":
        notes.problems.append(f"{label} {Meaning.REASONING.value}")
    elif notes.reasoning == "drop":
        notes.unused.add(name, value)
    else:
        # Reasoning within reasoning is refused, however deep.
        text, _ = read_content(value, label, dataclasses.replace(notes, reasoning="refuse"))
        return [text]
    return []


def _with_reasoning(text: str, thoughts: str, role: Role, notes: Notes) -> str:
    if role != "assistant":
        notes.unused.add("reasoning of messages that are not answers", thoughts)
        return text
    return f"{thoughts}\n\n{text}"


# Content.


def read_content(value: Any, label: str, notes: Notes) -> tuple[str, list[str]]:
    """Read content that is text or consists of parts, as chat services write it.

    Returns:
        The text, the parts joined; and the reasoning among the parts that is to be kept.
    """
    value = as_list(value)
    if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple, Mapping)):
        return read_text(value, label, notes.problems), []
    parts = [value] if isinstance(value, Mapping) else value
    if not parts:
        notes.problems.append(f"{label} is empty")
        return "", []
    if not all(map(_is_part, parts)):
        notes.problems.append(
            f"{label} must be text or a list of parts with text, got {kind(value)}: "
            f"{shorten(value)}"
        )
        return "", []
    texts: list[str] = []
    thoughts: list[str] = []
    other: set[str] = set()
    before = len(notes.problems)
    for part in parts:
        _read_part(part, label, notes, texts, thoughts, other)
    if other:
        notes.problems.append(f"{label} has parts that are no text: {', '.join(sorted(other))}")
    if len(notes.problems) > before:
        return "", []
    return read_text("".join(texts), label, notes.problems), thoughts


def _is_part(value: Any) -> bool:
    if isinstance(value, Mapping):
        keys = _message_keys(tuple(value))
        meant = any(kind in _MEANT_IN_PARTS for _, kind in keys.others)
        return bool("type" in value or keys.contents or meant) and not keys.roles
    return isinstance(value, (str, bytes))


_MEANT_IN_PARTS = (Meaning.TOOLS, Meaning.MEDIA, Meaning.REASONING)


def _read_part(
    part: Any, label: str, notes: Notes, texts: list[str], thoughts: list[str], other: set[str]
) -> None:
    if not isinstance(part, Mapping):
        texts.append(_piece(part, label, notes))
        return
    keys = _message_keys(tuple(part))
    named = part.get("type")
    form = str(_decoded(named)).strip().lower() if not is_blank(named) else "text"
    if form in _THOUGHT_TYPES or read_flag(part.get("thought")):
        thoughts += read_reasoning(_thought(part, keys), f"a part of {label}",
                                   "reasoning in parts of messages", notes)  # fmt: skip
        return
    if form not in TEXT_TYPES:
        other.add(form)
        return
    for key, meaning in keys.others:
        if key == "type" or is_blank(part[key]) or (meaning and read_flag(part[key]) is False):
            continue
        if meaning in _MEANT_IN_PARTS:
            assert meaning is not None
            notes.problems.append(f"`{key}` in a part of {label} {meaning.value}")
        else:
            notes.unused.add(f"`{key}` of parts of messages", part[key])
    value = _pick(part, keys.contents, f"a part of {label}", notes)
    if isinstance(value, Mapping) and set(value) >= {"value"}:  # {"text": {"value": …}}
        value = value["value"]
    texts.append(_piece(value, label, notes))


def _thought(part: Mapping[Any, Any], keys: _Keys) -> Any:
    for key in (*keys.contents, *_THOUGHT_TYPES):
        if not is_blank(part.get(key)) and not isinstance(part[key], bool):
            return part[key]
    return None


def _piece(value: Any, label: str, notes: Notes) -> str:
    """Return the text of one part; an empty one adds nothing."""
    if is_empty(value) and not isinstance(value, (str, bytes)):
        return ""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes) and not value.strip():
        return value.decode()
    return read_text(value, f"a part of {label}", notes.problems)
