"""The reader of rows: from a raw record to the messages of a conversation."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from gemma_keras_tune.pairs.conversations import (
    TEXT_TYPES,
    Message,
    Notes,
    Reasoning,
    check_conversation,
    describe_turn_marks,
    find_messages,
    is_message,
    may_hold_messages,
    plain_messages,
    put_tools,
    read_content,
    read_flag,
    read_messages,
    read_reasoning,
)
from gemma_keras_tune.pairs.schemas import (
    PREFERRED_KEYS,
    SCHEMAS,
    SYSTEM_KEYS,
    TOOL_KEYS,
    Schema,
    describe_missing,
    describe_unknown,
    list_keys,
    preference_schema,
    spell_keys,
)
from gemma_keras_tune.pairs.sources import Broken
from gemma_keras_tune.pairs.tools import read_tools
from gemma_keras_tune.pairs.unused import Meaning, Unused, meaning_of
from gemma_keras_tune.pairs.values import (
    ReadingError,
    as_list,
    is_blank,
    is_empty,
    is_list,
    kind,
    read_text,
    shorten,
    write_answer,
)

MAX_READERS = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One row to train on: a conversation that ends with the assistant's answer.

    Attributes:
        messages: At most one system message, first; then user and assistant in turn. After an
            answer that calls tools come their results, and the next answer.
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
        return next(m.content for m in reversed(self.messages) if m.role == "user")

    @property
    def response(self) -> str:
        """Text of the last message, the assistant's; calls of tools as JSON."""
        return self.messages[-1].written


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """The options of `read_pairs` that say how a row is read, as its arguments."""

    prompt_column: str | None = None
    response_column: str | None = None
    system_column: str | None = None
    preference: Literal["chosen"] | None = None
    reasoning: Reasoning = "refuse"


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The keys of a row by their use.

    Attributes:
        schema: The schema they fit.
        names: The row's own spelling of plain keys.
        system: The keys of system messages.
        tools: The keys of the tools that a conversation may use.
        others: The keys that are left, with what they mean.
    """

    schema: Schema
    names: Mapping[str, Any]
    system: tuple[Any, ...]
    tools: tuple[Any, ...]
    others: tuple[tuple[Any, Meaning | None], ...]


Reader = Callable[[Mapping[Any, Any], Unused], tuple[Message, ...]]


class RowReader:
    """Turns raw rows into messages. The keys of a row are looked up once for each set of keys."""

    def __init__(self, options: RowOptions) -> None:
        self.options = options
        self._readers: dict[tuple[Any, ...], Reader] = {}
        self._filled_readers: dict[tuple[Any, ...], Reader] = {}
        self._last: Schema | None = None

    def read(self, record: Any, unused: Unused) -> tuple[Message, ...]:
        """Return the messages of a row, or raise `ReadingError`."""
        if isinstance(record, (tuple, list)):
            return self._read_list(record, unused)
        if isinstance(record, Mapping):
            keys = tuple(record)
            reader = self._readers.get(keys)
            if reader is None:
                reader = self._reader(keys, record)
            return reader(record, unused)
        if isinstance(record, Pair):
            return self._conversation(record.messages, "the row", unused)
        if isinstance(record, Broken):
            raise ReadingError([record.text])
        if is_list(record):
            return self._read_list(as_list(record), unused)
        raise ReadingError(
            [f"{kind(record)}, expected (prompt, response) or a dictionary: {shorten(record)}"]
        )

    def used_columns(self, columns: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the columns to read of a table, or raise `ReadingError` where they make no pair.

        Columns that change what a row means are among them.
        """
        fitting = self._fitting(spell_keys(columns))
        if len(fitting) > 1 and self.options.prompt_column is None:
            used = {key for schema in fitting for key in (*schema.keys, *schema.below)}
            used |= set(SYSTEM_KEYS)
            names = spell_keys(columns)
            keep = {names[key] for key in used if key in names}
            return tuple(c for c in columns if c in keep or self._meaning(c) is not None)
        layout = self._resolve(columns)
        wanted = (*layout.schema.keys, *layout.schema.below)
        used_names = [layout.names[key] for key in wanted if key in layout.names]
        meant = [key for key, meaning in layout.others if meaning is not None]
        return tuple(dict.fromkeys((*used_names, *layout.system, *layout.tools, *meant)))

    def _read_list(self, record: Sequence[Any], unused: Unused) -> tuple[Message, ...]:
        first = record[0] if record else None
        if isinstance(first, Message) or (not isinstance(first, str) and is_message(first)):
            return self._conversation(record, "the row", unused)
        if len(record) == 2:
            labels = ("the prompt", "the response")
            if type(first) is str and type(record[1]) is str:
                plain = _plain_pair(first, record[1], labels, [])
                if plain is not None:
                    return plain
            return _pair_messages(first, record[1], labels, None, [], self._notes(unused))
        raise ReadingError([f"{kind(record)} of {len(record)}, expected (prompt, response)"])

    def _notes(self, unused: Unused) -> Notes:
        return Notes(unused, self.options.reasoning)

    def _conversation(self, value: Any, label: str, unused: Unused) -> tuple[Message, ...]:
        notes = self._notes(unused)
        return check_conversation(read_messages(value, label, notes), label, notes.problems)

    # Keys.

    def _reader(self, keys: tuple[Any, ...], record: Mapping[Any, Any]) -> Reader:
        if len(self._fitting(spell_keys(keys))) > 1:
            reader: Reader = self._read_filled
        else:
            try:
                reader = self._make_reader(self._resolve(keys))
            except ReadingError as error:
                if error.schema and (hint := _written_out(record)):
                    raise ReadingError([hint], schema=True) from None
                raise
        _keep(self._readers, keys, reader)
        return reader

    def _read_filled(self, record: Mapping[Any, Any], unused: Unused) -> tuple[Message, ...]:
        """Read a row that could be of several schemas by the keys that hold something."""
        filled = {key: value for key, value in record.items() if not is_blank(value)}
        keys = tuple(filled)
        reader = self._filled_readers.get(keys)
        if reader is None:
            reader = self._make_reader(self._resolve(keys))
            _keep(self._filled_readers, keys, reader)
        return reader(filled, unused)

    def _fitting(self, names: Mapping[str, Any]) -> list[Schema]:
        """Find the schemas among which the values of a row decide: the best that fit its keys."""
        if self.options.prompt_column is not None or self.options.preference is not None:
            return []
        fitting = [schema for schema in SCHEMAS if all(key in names for key in schema.keys)]
        # A conversation is the fullest form; an instruction's `input` is not a prompt.
        conversations = [schema for schema in fitting if schema.response is None]
        below = [schema for schema in fitting if schema.below]
        return conversations + (below or [s for s in fitting if s.response is not None])

    def _resolve(self, keys: tuple[Any, ...]) -> _Layout:
        options = self.options
        names = spell_keys(keys)
        if options.preference is not None:
            schema = self._preferred(keys, names)
        elif options.prompt_column is not None:
            schema = Schema(options.prompt_column, options.response_column)
        else:
            schema = self._choose(keys, names)
        system: tuple[Any, ...] = ()
        missing = [key for key in schema.keys if key not in names]
        if options.system_column is not None:
            system = (options.system_column,)
            missing += [key for key in system if key not in keys]
        elif options.prompt_column is None:
            system = tuple(names[key] for key in SYSTEM_KEYS if key in names)
        if missing:
            raise ReadingError([describe_missing(key, keys) for key in missing])
        tools = tuple(names[key] for key in TOOL_KEYS if key in names)
        used = {
            *system,
            *tools,
            *(names[key] for key in (*schema.keys, *schema.below) if key in names),
        }
        others = tuple((key, self._meaning(key)) for key in keys if key not in used)
        return _Layout(schema, names, system, tools, others)

    def _preferred(self, keys: tuple[Any, ...], names: Mapping[str, Any]) -> Schema:
        found = preference_schema(names)
        if found is None:
            known = ", ".join(PREFERRED_KEYS)
            raise ReadingError(
                [f"no key of a preferred answer ({known}) is among {list_keys(keys) or 'none'}"],
                schema=True,
            )
        own = self.options.prompt_column
        return found if own is None else Schema(own, found.keys[-1])

    def _choose(self, keys: tuple[Any, ...], names: Mapping[str, Any]) -> Schema:
        fitting = self._fitting(names)
        best = [schema for schema in fitting if schema.response is None] or fitting
        preferred = None if best else preference_schema(names)
        if preferred is not None:
            key = names[preferred.keys[-1]]
            raise ReadingError([f"`{key}` {Meaning.PREFERENCE.value}"])
        if len(best) == 1:
            self._last = best[0]
            return best[0]
        if best:
            raise ReadingError(
                [
                    f"the keys {list_keys(keys)} fit more than one schema: "
                    f"{' / '.join(map(str, best))}; name them with `prompt_column` and "
                    "`response_column`"
                ],
                schema=True,
            )
        if self._last is not None and any(key in names for key in self._last.keys):
            return self._last
        raise ReadingError([describe_unknown(keys, names)], schema=True)

    def _meaning(self, key: Any) -> Meaning | None:
        """Look up what a key means that no schema uses; a verdict where the user chose: nothing."""
        meaning = meaning_of(key)
        if self.options.prompt_column is not None and meaning in _CHOSEN_BY_NAME:
            return None
        if self.options.preference is not None and meaning in _CHOSEN_BY_PREFERENCE:
            return None
        return meaning

    # Readers.

    def _make_reader(self, layout: _Layout) -> Reader:
        schema = layout.schema
        prompt_key = layout.names[schema.prompt]
        if schema.response is None:
            return self._conversation_reader(prompt_key, layout)
        answer_key = layout.names[schema.response]
        below = [layout.names[key] for key in schema.below if key in layout.names]
        labels = (f"`{prompt_key}`", f"`{answer_key}`")
        optional = (*below, *layout.system)
        tool_keys = layout.tools

        def read(record: Mapping[Any, Any], unused: Unused) -> tuple[Message, ...]:
            prompt, answer = record[prompt_key], record[answer_key]
            plain = type(prompt) is str and type(answer) is str
            for key in optional:
                plain = plain and is_empty(record[key])
            for key in tool_keys:
                plain = plain and is_blank(record[key])
            if plain and not layout.others:
                found = _plain_pair(prompt, answer, labels, [])
                if found is not None:
                    return found
            notes = self._notes(unused)
            thoughts = _look_at_others(record, layout.others, notes)
            if plain and not thoughts:
                found = _plain_pair(prompt, answer, labels, notes.problems)
                if found is not None:
                    return found
            prompt = _join_below(record, prompt_key, below, notes)
            system = _system(record, layout.system, notes)
            tools = _tools(record, tool_keys, notes)
            return _pair_messages(prompt, answer, labels, system, thoughts, notes, tools)

        return read

    def _conversation_reader(self, key: Any, layout: _Layout) -> Reader:
        label = f"`{key}`"
        alone = not (layout.others or layout.system or layout.tools)

        def read(record: Mapping[Any, Any], unused: Unused) -> tuple[Message, ...]:
            if alone and (plain := plain_messages(record[key])):
                return plain
            notes = self._notes(unused)
            thoughts = _look_at_others(record, layout.others, notes)
            messages = read_messages(record[key], label, notes)
            messages = _put_system(messages, _system(record, layout.system, notes), notes)
            messages = put_tools(messages, _tools(record, layout.tools, notes))
            return check_conversation(_with_thoughts(messages, thoughts), label, notes.problems)

        return read


def _keep(readers: dict[tuple[Any, ...], Reader], keys: tuple[Any, ...], reader: Reader) -> None:
    """Keep a reader for the next row with these keys, unless the keys are data."""
    if len(readers) > MAX_READERS:
        readers.clear()
    readers[keys] = reader


_CHOSEN_BY_NAME = (Meaning.VERDICT, Meaning.PREFERENCE, Meaning.WEIGHT, Meaning.CONTEXT)
_CHOSEN_BY_PREFERENCE = (Meaning.VERDICT, Meaning.PREFERENCE)
# Verdicts that are true of a good answer.
_APPROVALS = {"label", "ktotag", "correct", "iscorrect", "accepted", "isaccepted", "isgood", "good"}


def _written_out(record: Mapping[Any, Any]) -> str | None:
    texts = (describe_turn_marks(value, f"`{key}`") for key, value in record.items())
    return next((text for text in texts if text), None)


def _plain_pair(
    prompt: str, answer: str, labels: tuple[str, str], problems: list[str]
) -> tuple[Message, ...] | None:
    """Read two texts; `None` where one of them may hold a conversation."""
    if prompt.startswith(_OPENING) and may_hold_messages(prompt):
        return None
    if answer.startswith(_OPENING) and may_hold_messages(answer):
        return None
    user = Message("user", read_text(prompt, labels[0], problems))
    assistant = Message("assistant", read_text(answer, labels[1], problems))
    if problems:
        raise ReadingError(problems)
    return (user, assistant)


_OPENING = ("[", "{")


def _join_below(
    record: Mapping[Any, Any], prompt_key: Any, below: Sequence[Any], notes: Notes
) -> Any:
    more = [key for key in below if not is_empty(record[key])]
    if not more:
        return record[prompt_key]
    keys = (prompt_key, *more)
    for key in keys:
        if isinstance(record[key], str) and may_hold_messages(record[key]):
            notes.problems.append(f"`{key}` holds messages, and only text is joined to a prompt")
    return "\n\n".join([read_text(record[key], f"`{key}`", notes.problems) for key in keys])


def _look_at_others(
    record: Mapping[Any, Any], others: tuple[tuple[Any, Meaning | None], ...], notes: Notes
) -> list[str]:
    """Judge the keys of a row that its schema does not use; return its reasoning."""
    thoughts: list[str] = []
    for key, meaning in others:
        value = record[key]
        if is_blank(value):
            continue
        if meaning is None or (meaning is Meaning.REASONING and isinstance(value, bool)):
            notes.unused.add(f"`{key}`", value)
        elif meaning is Meaning.REASONING:
            thoughts += read_reasoning(value, f"`{key}`", f"`{key}`", notes)
        elif problem := _problem_of(key, meaning, value):
            notes.problems.append(problem)
    return thoughts


def _problem_of(key: Any, meaning: Meaning, value: Any) -> str | None:
    """Say why a key of a row keeps it from being trained on; a flag may also allow it."""
    flag = read_flag(value)
    if meaning is Meaning.WEIGHT and flag is not None and "mask" not in str(key).lower():
        return None if flag else f"`{key}` says that this row is not to be trained on"
    approves = re.sub(r"[\W_]", "", str(key).lower()) in _APPROVALS
    # A number may be that of a class.
    if approves and flag is not None and str(value).strip().lower() in ("true", "false"):
        return None if flag else f"`{key}` is false: its owner calls this answer a bad one"
    return f"`{key}` {meaning.value}"


def _pair_messages(
    prompt: Any,
    answer: Any,
    labels: tuple[str, str],
    system: Message | None,
    thoughts: Sequence[str],
    notes: Notes,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[Message, ...]:
    asked = find_messages(prompt, labels[0])
    if asked is not None:
        prompts = read_messages(asked, labels[0], notes)
    elif _is_in_parts(prompt):
        prompts = [Message("user", read_content(prompt, labels[0], notes)[0])]
    else:
        prompts = [Message("user", read_text(prompt, labels[0], notes.problems))]
    said = find_messages(answer, labels[1])
    if said is not None:
        answers = read_messages(said, labels[1], notes)
    else:
        answers = [Message("assistant", _answer_text(answer, labels[1], notes))]
    messages = _put_system(_join_turns(prompts, answers), system, notes)
    messages = put_tools(_with_thoughts(messages, thoughts), tools)
    return check_conversation(messages, labels[asked is None], notes.problems)


def _answer_text(answer: Any, label: str, notes: Notes) -> str:
    """Return the answer as text; typed parts are joined, other structures written as JSON."""
    if _is_in_parts(answer):
        text, thoughts = read_content(answer, label, notes)
        return "\n\n".join([*thoughts, text])
    return write_answer(answer, label, notes.problems)


def _is_in_parts(value: Any) -> bool:
    """Tell whether a value consists of typed parts, as chat services write them, one a text."""
    parts = as_list(value) if is_list(value) else [value]
    if not all(isinstance(part, Mapping) and "type" in part for part in parts):
        return False
    return any(str(part["type"]) in TEXT_TYPES and "text" in part for part in parts)


def _join_turns(prompts: list[Message], answers: list[Message]) -> list[Message]:
    """Join the turns of a prompt and of an answer that may begin with the prompt again."""
    systems = [message for message in prompts if message.role == "system"]
    asked = [message for message in prompts if message.role != "system"]
    said = [message for message in answers if message.role != "system"]
    repeated = len(said) >= len(asked) and all(
        (a.role, a.written.strip()) == (b.role, b.written.strip())
        for a, b in zip(asked, said, strict=False)
    )
    if not repeated:
        return [*prompts, *answers]
    others = [m for m in answers if m.role == "system" and m not in systems]
    return [*systems, *others, *asked, *said[len(asked) :]]


def _with_thoughts(messages: list[Message], thoughts: Sequence[str]) -> list[Message]:
    """Put the reasoning of a row in front of its last answer."""
    if not thoughts or not messages:
        return messages
    last = messages[-1]
    content = "\n\n".join([*thoughts, last.content])
    return [*messages[:-1], dataclasses.replace(last, content=content)]


def _tools(
    record: Mapping[Any, Any], keys: tuple[Any, ...], notes: Notes
) -> tuple[Mapping[str, Any], ...]:
    """Read the tools of a row from the first key that has some."""
    filled = [key for key in keys if not is_blank(record[key])]
    for key in filled[1:]:
        notes.unused.add(f"`{key}` beside `{filled[0]}`", record[key])
    if not filled:
        return ()
    return read_tools(record[filled[0]], f"`{filled[0]}`", notes.unused, notes.problems)


def _system(record: Mapping[Any, Any], keys: tuple[Any, ...], notes: Notes) -> Message | None:
    """Return the first system message the row has beside its turns; an empty one is none."""
    found = None
    for key in keys:
        value = record[key]
        if is_blank(value):
            continue
        if found is not None:
            notes.unused.add(f"`{key}` beside another system message", value)
            continue
        if isinstance(value, Mapping):
            value = [{**value, "role": "system"}]
        messages = find_messages(value, f"`{key}`")
        if messages is not None:
            read = read_messages(messages, f"`{key}`", notes)
            if len(read) > 1 or any(message.role != "system" for message in read):
                notes.problems.append(f"`{key}` must hold one system message")
            found = next(iter(read), None)
        else:
            found = Message("system", read_content(value, f"`{key}`", notes)[0])
    return found


def _put_system(messages: list[Message], system: Message | None, notes: Notes) -> list[Message]:
    """Put a system message in front of turns that do not begin with one."""
    if system is None:
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content != system.content:
            notes.unused.add("a system message beside that of the conversation", system.content)
        return messages
    return [system, *messages]
