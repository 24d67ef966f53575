"""Prompt templates: how a conversation becomes the text a Gemma reads and writes.

A template cuts a conversation into segments. Those the model must learn to write are `trained`:
each answer with the token that ends it, so that a tuned model stops by itself. Segments are
tokenized one by one, and a prompt therefore has the same token ids in training and when served.

The instruct models of each family were taught one turn format, kept here as data. A pretrained
model knows none of them and gets plain text. What a model was tuned with is attached to it and
written beside its weights, because a model answers well only in the format it was taught.

Formats after the chat templates published with the models: `google/gemma-2b-it`,
`google/gemma-2-2b-it`, `google/gemma-3-270m-it`, `google/gemma-3n-E2B-it`, `google/gemma-4-E2B-it`.
"""

import abc
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import keras

from gemma_keras_tune._support.files import write_text
from gemma_keras_tune._support.json import read_json_object
from gemma_keras_tune.errors import TemplateError, warn_of_pairs
from gemma_keras_tune.gemma.families import FAMILIES, family_of
from gemma_keras_tune.gemma.state import is_instruct, locked, state_of
from gemma_keras_tune.gemma.tables import Turn
from gemma_keras_tune.gemma.tools import (
    ADVICE,
    FUNCTION_GEMMA,
    TOOL_FORMATS,
    ToolFormat,
    filled_in,
    has_marks,
    put_marks,
)
from gemma_keras_tune.pairs.conversations import find_disorder

SIDECAR = "gemma_keras_tune.json"
START_OF_TEXT = "<bos>"
END_OF_TEXT = "<eos>"
KNOWN_STOP_TOKENS = (END_OF_TEXT, "<end_of_turn>", "<turn|>")
# SentencePiece never reads these out of text: it spells them out, letter by letter.
CONTROL_TOKENS = (START_OF_TEXT, END_OF_TEXT, "<pad>", "<unk>")
# Control signs of some Gemma. No tokenizer has all of them.
SPECIAL_TOKENS = (
    *CONTROL_TOKENS, "<mask>",
    "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>",
    "<|channel>", "<channel|>", "<|think|>",
    *(mark for form in TOOL_FORMATS.values() for mark in form.marks),
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<|image>", "<|image|>", "<image|>",
    "<start_of_audio>", "<end_of_audio>", "<audio_soft_token>", "<|audio>", "<|audio|>", "<audio|>",
    "<|video>", "<|video|>", "<video|>",
)  # fmt: skip


class MessageLike(Protocol):
    """A message, as templates read it."""

    @property
    def role(self) -> str:
        """`"system"`, `"user"`, `"assistant"` or `"tool"`."""

    @property
    def content(self) -> str:
        """The text of the message."""


Messages = Sequence[MessageLike]


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the text of one conversation.

    Attributes:
        text: The text, special tokens written out.
        trained: True if the model is taught to write it.
        masked: An answer of which nothing is taught; it ends with a token like one that is.
    """

    text: str
    trained: bool
    masked: bool = False


class Template(abc.ABC):
    """A way to write conversations for one model."""

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A short name, for people to read."""

    @property
    @abc.abstractmethod
    def stop_token(self) -> str:
        """The token every answer ends with."""

    @property
    def tool_format(self) -> ToolFormat | None:
        """The format for tools, if there is one."""
        return None

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """Tokens at which generation ends: `stop_token`, that of a call and, always, `<eos>`."""
        called = (self.tool_format.result_start,) if self.tool_format else ()
        return tuple(dict.fromkeys((self.stop_token, *called, END_OF_TEXT)))

    @abc.abstractmethod
    def _segments(self, messages: Messages) -> list[Segment]:
        """Cut messages, whose order has been checked, into segments."""

    @abc.abstractmethod
    def chat_template(self) -> str | None:
        """Write the template in Jinja, as Hugging Face and llama.cpp want it.

        Returns:
            A Jinja template over `messages`, `bos_token` and `add_generation_prompt`, or `None`
            where there is none: a Python function cannot be written in Jinja.
        """

    @abc.abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The template as JSON data, for `from_config`."""

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "Template":
        """Make the template that `to_config` described.

        Args:
            config: The result of `to_config`, perhaps read back from JSON.

        Returns:
            The template.

        Raises:
            TemplateError: It was a Python function, or the description cannot be understood.
        """
        settings = dict(config) if isinstance(config, Mapping) else {}
        kind = settings.pop("kind", None)
        if kind == FunctionTemplate.kind:
            raise TemplateError(
                f"The model was tuned with the Python function {settings.get('function')!r} as its "
                "template, and a function cannot be saved.",
                next_step="Pass the function again: `template=your_function`.",
            )
        classes: dict[Any, type[Template]] = {c.kind: c for c in (TurnTemplate, TextTemplate)}
        try:
            if not all(isinstance(value, str) for value in settings.values()):
                raise TypeError("a setting is no text")
            return classes[kind](**settings)
        except (KeyError, TypeError) as error:
            raise TemplateError(
                f"This is not the description of a template: {config!r}",
                next_step=f"`kind` must be one of {sorted(classes)}, with its own settings.",
            ) from error

    def segments(
        self, messages: Messages, *, generation_prompt: bool = False
    ) -> tuple[Segment, ...]:
        """Cut a conversation into trained and untrained text.

        `<bos>` is not part of the text: it is put in front when the segments are tokenized.

        Args:
            messages: At most one system message, first; then user and assistant in turn. After an
                answer that calls tools come their results.
            generation_prompt: True if the conversation ends with a user message or the result of a
                tool, and the text where the response begins. Otherwise it ends with the response
                and its stop token.

        Returns:
            Segments, trained and untrained in turn. Turns after the last answer that is trained are
            left out, as they teach nothing.

        Raises:
            TemplateError: The messages are in an order that makes no conversation, or there are
                tools and the template has no format for them.
        """
        _check_order(messages, generation_prompt)
        if self.tool_format is None and any(map(_has_tools, messages)):
            raise TemplateError(
                f"The template {self.name!r} has no format for tools, and the conversation has "
                "tools, calls or results.",
                next_step=NO_TOOLS,
            )
        if generation_prompt or all(map(_is_trained, messages)):
            return _joined(self._segments(messages))
        places = [i for i, m in enumerate(messages) if m.role == "assistant" and _is_trained(m)]
        if places:
            results = itertools.takewhile(lambda m: m.role == "tool", messages[places[-1] + 1 :])
            messages = messages[: places[-1] + 1 + len(list(results))]
        return _mask(_joined(self._segments(messages)), messages)

    def stop_token_ids(self, tokenizer: keras.layers.Layer) -> tuple[int, ...]:
        """Look up the ids of `stop_tokens`.

        Args:
            tokenizer: A KerasHub tokenizer.

        Returns:
            One id for each of `stop_tokens`; none for that of a call in a tokenizer without it.

        Raises:
            TemplateError: A stop token is not a single token of this tokenizer.
        """
        ids = {token: _token_id(tokenizer, token) for token in self.stop_tokens}
        needed = (self.stop_token, END_OF_TEXT)
        missing = [token for token, found in ids.items() if found is None and token in needed]
        if missing:
            raise TemplateError(
                f"The template {self.name!r} does not fit the model's tokenizer.",
                [f"{token!r} is not one token of it" for token in missing],
                "Use `template='auto'`, or end the template with a token the model knows.",
            )
        return tuple(found for found in ids.values() if found is not None)

    def __str__(self) -> str:
        """Name and stop token."""
        return f"{self.name} (answers end with {self.stop_token})"


@dataclasses.dataclass(frozen=True)
class TurnTemplate(Template):
    """The turn format an instruct model was taught.

    Leading and trailing white space of every message is left out, as the published templates do.

    Attributes:
        turns: Name of the format.
        turn_start: Token that begins a turn; the role and a line feed follow.
        turn_end: Token that ends a turn, and the stop token of an answer.
        system: `"turn"` where the generation has a system role; `"first_user"` where it has none,
            and the system text is put in front of the first user message with an empty line
            between; `"developer"` where the role has that name.
        answer_start: Text put in front of the answer that is to be given, and of no earlier one.
        tools: Name of the format for tools, one of `gemma.tools.TOOL_FORMATS`; empty for none.
    """

    turns: str
    turn_start: str
    turn_end: str
    system: Literal["turn", "first_user", "developer"]
    answer_start: str = ""
    tools: str = ""

    kind: ClassVar[str] = "turns"

    def __post_init__(self) -> None:
        """Check the marks.

        Raises:
            TemplateError: One of them holds a control token, or there is no such format for tools.
        """
        if self.tools and self.tools not in TOOL_FORMATS:
            raise TemplateError(
                f"`tools` must be one of {', '.join(TOOL_FORMATS)}. Received: {self.tools!r}"
            )
        _check_control(self.name, (self.turn_start, self.turn_end, self.answer_start))

    @property
    def name(self) -> str:
        """Name of the format."""
        return self.turns

    @property
    def stop_token(self) -> str:
        """The token that ends a turn."""
        return self.turn_end

    @property
    def tool_format(self) -> ToolFormat | None:
        """The format for tools, if there is one."""
        return TOOL_FORMATS.get(self.tools)

    def _segments(self, messages: Messages) -> list[Segment]:
        system, rest = _split_system(messages)
        prefix = ""
        parts = []
        if self.system != "first_user" and messages[0].role == "system":
            parts.append(Segment(self._system(messages[0]) + "\n", False))
        elif system is not None:
            # Not stripped: the published template of Gemma 3 strips the user's text alone.
            prefix = system + "\n\n"
        for index, message in enumerate(rest):
            if message.role == "user":
                text = self._turn("user", prefix + message.content.strip())
                start = self.answer_start if index >= len(rest) - 2 else ""
                parts.append(Segment(f"{text}\n{self.turn_start}model\n{start}", False))
                prefix = ""
            elif message.role == "tool":
                parts.append(Segment(self._result(rest, index), False))
            elif calls := getattr(message, "tool_calls", ()):
                parts.append(Segment(self._calls(message, calls, rest, index), True))
            else:
                parts.append(Segment(message.content.strip() + self.turn_end, True))
                if index < len(rest) - 1:
                    parts.append(Segment("\n", False))
        return parts

    def _system(self, message: Any) -> str:
        form = self.tool_format
        tools = getattr(message, "tools", ())
        declared = "".join(form.declaration(tool) for tool in tools) if form else ""
        if declared and form is FUNCTION_GEMMA and not message.content.strip():
            _advise()
        role = "developer" if self.system == "developer" else "system"
        return self._turn(role, message.content.strip() + declared)

    def _calls(self, message: Any, calls: Any, rest: Messages, index: int) -> str:
        """Calls, and the token that begins the result: there the model stops."""
        form = self.tool_format
        assert form is not None
        said, made = message.content.strip(), "".join(map(form.call, calls))
        if form.text_after_calls:
            said, made = made, "" if _results_follow(rest, index) else said
        return said + made + form.result_start

    def _result(self, rest: Messages, index: int) -> str:
        """The result of a call. Its first token is the last of the call before it."""
        form, message = self.tool_format, rest[index]
        assert form is not None
        data = getattr(message, "data", None)
        name = getattr(message, "name", None) or "unknown"
        text = form.result(name, message.content if data is None else data)
        if rest[index - 1].role != "tool":
            text = text.removeprefix(form.result_start)
        if form.text_after_calls and not _results_follow(rest, index):
            asked = next(m for m in reversed(rest[:index]) if m.role != "tool")
            text += asked.content.strip()
        return text

    def _turn(self, role: str, content: str) -> str:
        return f"{self.turn_start}{role}\n{content}{self.turn_end}"

    def chat_template(self) -> str:
        """Write the format in Jinja, with the same result as the published template for text."""
        form = self.tool_format
        role = "developer" if self.system == "developer" else "system"
        return filled_in(
            "turns.jinja",
            **(form.variables() if form else {}),
            tools=bool(form),
            thinks=bool(form and form.text_after_calls),
            system=self.system,
            system_role=json.dumps(role + "\n"),
            start=json.dumps(self.turn_start),
            end=json.dumps(self.turn_end),
            answer_start=json.dumps(self.answer_start),
        )

    def to_config(self) -> dict[str, Any]:
        """Return the format and its name as JSON data."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class TextTemplate(Template):
    """A template written as one string, for pretrained models and for users' own formats.

    `{prompt}` and `{response}` stand for the user's text and the answer, `{system}` (optional) for
    the system text. `{{` and `}}` stand for one brace. Where `{system}` is absent, a system text is
    put in front of the first prompt with an empty line between. Later exchanges of a conversation
    repeat the template on a new line, `{system}` left empty.

    When text follows `{response}`, it is taught as part of the answer, up to and with the first of
    `<eos>`, `<end_of_turn>` and `<turn|>` in it, which becomes the stop token. With none of them,
    `<eos>` is added. Spaces just before `{response}` count to the answer, as tokens carry the space
    in front of a word with the word. A leading `<bos>` is left out: every row gets one anyway.

    Attributes:
        text: The template.
        label: A short name.
    """

    text: str
    label: str = "custom"

    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        """Check the placeholders, and the text between them.

        Raises:
            TemplateError: One is missing, unknown, repeated, or out of order; or a control token
                is where it would be spelled out.
        """
        _check_placeholders(self.text)
        before, _, ending, following = self._cut
        own = [text for kind, text in before if kind == "text"]
        _check_control(self.text, (*own, ending.removesuffix(END_OF_TEXT), following))

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    @property
    def stop_token(self) -> str:
        """The first known stop token after `{response}`, or `<eos>`."""
        return _first_stop(self._parts()[1]) or END_OF_TEXT

    def _parts(self) -> tuple[list[tuple[str, str]], str]:
        """Return the pieces before `{response}`, as `(kind, text)`, and the text after it."""
        pieces = _pieces(self.text.removeprefix(START_OF_TEXT))
        index = pieces.index(("field", "response"))
        after = "".join(text for _, text in pieces[index + 1 :])
        return pieces[:index], after

    @functools.cached_property
    def _cut(self) -> tuple[list[tuple[str, str]], str, str, str]:
        """Pieces before the answer, its leading spaces, its ending, and what follows."""
        before, after = self._parts()
        spaces = ""
        if before and before[-1][0] == "text":
            text = before[-1][1]
            bare = text.rstrip(" ")
            spaces = text[len(bare) :]
            before = [*before[:-1], ("text", bare)]
        stop = _first_stop(after)
        if stop is None:
            return before, spaces, after + END_OF_TEXT, ""
        ending, _, rest = after.partition(stop)
        return before, spaces, ending + stop, rest

    def _segments(self, messages: Messages) -> list[Segment]:
        system, rest = _split_system(messages)
        before, spaces, ending, following = self._cut
        own_place = ("field", "system") in before
        parts = []
        for index, message in enumerate(rest):
            if message.role == "assistant":
                parts.append(Segment(spaces + message.content + ending, True))
                if index < len(rest) - 1:
                    parts.append(Segment(_newline(following), False))
                continue
            first = index == 0 and system is not None
            values = {"prompt": message.content, "system": system if first and system else ""}
            if first and not own_place:
                values["prompt"] = f"{system}\n\n{message.content}"
            text = "".join([t if kind == "text" else values[t] for kind, t in before])
            parts.append(Segment(text, False))
        return parts

    def chat_template(self) -> str:
        """Write the template in Jinja."""
        before, spaces, ending, following = self._cut
        own_place = ("field", "system") in before
        fields = {
            "prompt": "message['content']" if own_place else "ns.system + message['content']",
            "system": "ns.system",
        }
        return filled_in(
            "text.jinja",
            blank='""' if own_place else '"\\n\\n"',
            prompt=" + ".join(json.dumps(t) if k == "text" else fields[t] for k, t in before),
            answer=f"{json.dumps(spaces)} + message['content'] + {json.dumps(ending)}",
            newline=json.dumps(_newline(following)),
        )

    def to_config(self) -> dict[str, Any]:
        """Return the text and its label as JSON data."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class FunctionTemplate(Template):
    """A template written as a Python function.

    Attributes:
        function: Takes the messages before the answer, returns the text before the answer. A
            leading `<bos>` is left out, as it is put in front of every row. In a conversation of
            several turns the last answer alone is trained.
        stop: The stop token.
    """

    function: Callable[[Messages], str]
    stop: str = END_OF_TEXT

    kind: ClassVar[str] = "function"

    @property
    def name(self) -> str:
        """Module and name of the function."""
        module = getattr(self.function, "__module__", None) or "?"
        return f"{module}.{getattr(self.function, '__qualname__', type(self.function).__name__)}"

    @property
    def stop_token(self) -> str:
        """The stop token."""
        return self.stop

    def _segments(self, messages: Messages) -> list[Segment]:
        answered = messages[-1].role == "assistant"
        parts = [Segment(self._prompt(messages[:-1] if answered else messages), False)]
        if answered:
            parts.append(Segment(messages[-1].content + self.stop, True))
        return parts

    def _prompt(self, messages: Messages) -> str:
        text = self.function(tuple(messages))
        if not isinstance(text, str):
            raise TemplateError(
                f"The template function {self.name} must return the text of the prompt as a string."
                f" Received: {type(text).__name__}"
            )
        # What the messages themselves hold is the user's text, and stays as it is.
        given = "".join(message.content for message in messages)
        own = {t: text.count(t) - given.count(t) for t in CONTROL_TOKENS if t in text}
        if own.get(START_OF_TEXT, 0) > 0 and text.startswith(START_OF_TEXT):
            text = text.removeprefix(START_OF_TEXT)
            own[START_OF_TEXT] -= 1
        _check_control(self.name, [token for token, count in own.items() if count > 0])
        return text

    def chat_template(self) -> None:
        """Return `None`: Python cannot be written in Jinja."""
        return None

    def to_config(self) -> dict[str, Any]:
        """Return the function's name, which `from_config` refuses to run."""
        return {"kind": self.kind, "function": self.name, "stop": self.stop}


TemplateSpec = str | Callable[[Messages], str] | Template


def get_template(model: keras.Model, spec: TemplateSpec = "auto") -> Template:
    """Find the template a user means, and check it against the model's tokenizer.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        spec: `"auto"`; a name of `TEMPLATES`; a string with `{prompt}` and `{response}`; a function
            from messages to the text before the answer; or a `Template`. `"auto"` is the template
            attached to the model, when it was tuned here; else `"plain"` when it is known to be
            pretrained (`load` knows); else the turn format of its family.

    Returns:
        The template.

    Raises:
        TemplateError: No such template, wrong placeholders, or a stop token the tokenizer lacks.
    """
    if isinstance(spec, Template):
        template = spec
    elif spec == "auto":
        template = template_of(model) or _auto(model)
    elif isinstance(spec, str):
        template = _by_name(spec)
    elif callable(spec):
        template = FunctionTemplate(spec)
    else:
        raise TemplateError(
            "`template` must be 'auto', a name, a string with {prompt} and {response}, a function "
            f"or a Template. Received: {spec!r}"
        )
    if getattr(model, "preprocessor", None) is None:
        return template
    tokenizer = model.preprocessor.tokenizer
    template = _with_marks(template, tokenizer)
    template.stop_token_ids(tokenizer)
    return template


def _with_marks(template: Template, tokenizer: keras.layers.Layer) -> Template:
    """Make sure that the marks of a format for tools are tokens; else the format is left out."""
    form = template.tool_format
    if form is None or has_marks(tokenizer, form):
        return template
    if form is not FUNCTION_GEMMA:
        assert isinstance(template, TurnTemplate)
        return dataclasses.replace(template, tools="")
    if not put_marks(tokenizer):
        raise TemplateError(
            f"The template {template.name!r} does not fit the model's tokenizer.",
            [f"{mark!r} is not one token of it" for mark in form.marks],
            "Use FunctionGemma, or a Gemma 3, which has unused tokens in their place.",
        )
    warn_of_pairs(
        "The model's tokenizer has no marks for tools: its unused tokens 46 to 52 have the names "
        "of FunctionGemma's marks from now on, and are saved with it. The model has yet to learn "
        "their meaning.",
        [],
    )
    return template


def special_tokens(tokenizer: keras.layers.Layer) -> tuple[str, ...]:
    """List the special tokens of a tokenizer as text: control signs, suspect in a user's text.

    Args:
        tokenizer: A KerasHub tokenizer of a Gemma.

    Returns:
        Those of `SPECIAL_TOKENS` that are one token of it.
    """
    return tuple(t for t in SPECIAL_TOKENS if _token_id(tokenizer, t) is not None)


def _token_id(tokenizer: keras.layers.Layer, token: str) -> int | None:
    """Return the id of a text that is one token."""
    found = int(tokenizer.token_to_id(token))
    return found if tokenizer.id_to_token(found) == token else None


@locked
def attach_template(model: keras.Model, template: Template | None) -> None:
    """Remember the template a model was tuned with.

    It belongs to the active adapter; without one, to the model itself.

    Args:
        model: The model.
        template: Its template; `None` forgets the one that was attached.

    Raises:
        TemplateError: It is no `Template`, such as the name of one.
    """
    if not (template is None or isinstance(template, Template)):
        raise TemplateError(
            f"`template` must be a `Template` or None. Received: {template!r}",
            next_step="Find it first: `get_template(model, …)`.",
        )
    state = state_of(model)
    if template is None:
        state.templates.pop(state.active, None)
    else:
        state.templates[state.active] = template


@locked
def template_of(model: keras.Model) -> Template | None:
    """Return the template a model was tuned with.

    Args:
        model: A model.

    Returns:
        The template attached to the active adapter by `attach_template`, `tune` or
        `load_adapter`; else the one attached to the model itself, also by `load`; else `None`.
    """
    state = state_of(model)
    template: Template | None = state.template(state.active)
    return template


def read_template(folder: str | os.PathLike[str]) -> Template | None:
    """Read the template recorded in a folder, or `None` if there is none.

    Args:
        folder: Folder of a preset, an adapter or an export, or any other.

    Returns:
        The template, if one is recorded.

    Raises:
        TemplateError: It was a Python function, or the record cannot be read.
    """
    config = read_sidecar(folder).get("template")
    return None if config is None else Template.from_config(config)


def write_sidecar(folder: str | os.PathLike[str], values: Mapping[str, Any]) -> pathlib.Path:
    """Add entries to the record this library keeps beside the weights.

    The file is written aside and renamed, so a reader sees the old record or the new one.

    Args:
        folder: An existing folder.
        values: JSON data by name. Entries of the same name are replaced, others kept.

    Returns:
        The file written.

    Raises:
        ExportError: The disk is full, or the system refuses.
    """
    path = pathlib.Path(folder) / SIDECAR
    text = json.dumps({**read_sidecar(folder), **values}, indent=2, ensure_ascii=False) + "\n"
    return write_text(path, text)


def read_sidecar(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record this library keeps beside the weights; empty if there is none.

    Args:
        folder: Any folder.

    Returns:
        JSON data by name.

    Raises:
        TemplateError: The file is there but cannot be read.
    """
    path = pathlib.Path(folder) / SIDECAR
    if not path.exists():
        return {}
    return read_json_object(path, TemplateError, "Delete it, or restore it from a copy.")


def _auto(model: keras.Model) -> Template:
    # Where nothing says, an instruct model is the likelier: small sets are tuned on them.
    if is_instruct(model) is False:
        return PLAIN
    family = family_of(model)
    marked = TEMPLATES.get(family.turn.marked)
    if marked is not None and getattr(model, "preprocessor", None) is not None:
        assert marked.tool_format is not None
        if has_marks(model.preprocessor.tokenizer, marked.tool_format):
            return marked
    if family.turn.no_thought and not model.backbone.hidden_size_per_layer_input:
        return TEMPLATES[family.name + _NO_THOUGHT]
    return TEMPLATES[family.name]


def _by_name(spec: str) -> Template:
    if spec in TEMPLATES:
        return TEMPLATES[spec]
    if "{" not in spec:
        raise TemplateError(
            f"There is no template {spec!r}.",
            next_step=f"Use 'auto', one of {', '.join(TEMPLATES)}, or a string with {{prompt}} and "
            "{response}.",
        )
    return TextTemplate(spec)


def _check_order(messages: Messages, generation_prompt: bool) -> None:
    disorder = find_disorder(messages, "user" if generation_prompt else "assistant")
    if disorder:
        raise TemplateError(
            "These messages are no conversation.",
            [disorder],
            "Give at most one system message, first, then user and assistant in turn.",
        )


NO_TOOLS = (
    "Use a model that was taught to call tools: an instruct model of Gemma 4, or FunctionGemma. To "
    "teach another Gemma 3 FunctionGemma's format, pass `template='functiongemma'`."
)


def _has_tools(message: MessageLike) -> bool:
    more = getattr(message, "tools", ()) or getattr(message, "tool_calls", ())
    return bool(more) or message.role == "tool"


def _results_follow(messages: Messages, index: int) -> bool:
    return index + 1 < len(messages) and messages[index + 1].role == "tool"


@functools.cache
def _advise() -> None:
    """Tell once of the sentence that FunctionGemma was taught to call tools after."""
    warn_of_pairs(
        "There are tools and no system message. FunctionGemma was trained with this one: "
        f"{ADVICE!r}.",
        [],
    )


def _is_trained(message: MessageLike) -> bool:
    return getattr(message, "trained", True)


def _mask(parts: Sequence[Segment], messages: Messages) -> tuple[Segment, ...]:
    """Take the training away from answers that are not to be trained.

    Each answer is a segment apart, so that it has the same token ids as where it is trained.
    """
    answers = [message for message in messages if message.role == "assistant"]
    masked = list(parts)
    places = [place for place, part in enumerate(parts) if part.trained]
    # From the end: a template that is a function makes a segment of the last answer alone.
    for place, answer in zip(reversed(places), reversed(answers), strict=False):
        if not _is_trained(answer):
            masked[place] = Segment(parts[place].text, trained=False, masked=True)
    return tuple(masked)


def _joined(parts: Sequence[Segment]) -> tuple[Segment, ...]:
    joined: list[Segment] = []
    for part in parts:
        if joined and joined[-1].trained == part.trained:
            joined[-1] = Segment(joined[-1].text + part.text, part.trained)
        elif part.text:
            joined.append(part)
    return tuple(joined)


def _split_system(messages: Messages) -> tuple[str | None, Messages]:
    if messages[0].role == "system":
        return messages[0].content, messages[1:]
    return None, messages


_FIELDS = ("system", "prompt", "response")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def _pieces(text: str) -> list[tuple[str, str]]:
    """`("text", literal)` and `("field", name)` in order, doubled braces undone."""
    pieces: list[tuple[str, str]] = []
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        pieces.append(("text", text[end : match.start()]))
        end = match.end()
        field = match.group(1)
        pieces.append(("text", match.group()[0]) if field is None else ("field", field))
    pieces.append(("text", text[end:]))
    joined: list[tuple[str, str]] = []
    for kind, value in pieces:
        if joined and kind == joined[-1][0] == "text":
            joined[-1] = ("text", joined[-1][1] + value)
        else:
            joined.append((kind, value))
    return [piece for piece in joined if piece[1]]


def _check_placeholders(text: str) -> None:
    fields = [value for kind, value in _pieces(text) if kind == "field"]
    problems = [f"{{{name}}} is missing" for name in _FIELDS[1:] if name not in fields]
    problems += [f"{{{name}}} is unknown" for name in dict.fromkeys(fields) if name not in _FIELDS]
    problems += [
        f"{{{name}}} is there more than once" for name in _FIELDS if fields.count(name) > 1
    ]
    if not problems and fields[-1] != "response":
        problems.append("{response} must come after {prompt} and {system}")
    if problems:
        raise TemplateError(
            f"The template {text!r} cannot be used.",
            problems,
            "Write {prompt} where the user's text goes and {response} where the answer goes, "
            "{system} where a system text goes if you have one, and {{ or }} for a brace.",
        )


def _check_control(template: str, own: Sequence[str]) -> None:
    """Refuse control tokens in a template's own text."""
    found = [token for token in CONTROL_TOKENS if any(token in text for text in own)]
    if found:
        raise TemplateError(
            f"The template {template!r} has control tokens where the tokenizer would spell them "
            "out, letter by letter.",
            [f"{token!r} stands in the text" for token in found],
            "Leave them out. <bos> is put in front of every row anyway, and <eos> may only end the "
            "answer. To end another turn, write a token that text can hold, such as <end_of_turn>.",
        )


def _first_stop(text: str) -> str | None:
    found = [token for token in KNOWN_STOP_TOKENS if token in text]
    return min(found, key=text.index) if found else None


def _newline(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _turns(name: str, turn: Turn, answer_start: str = "") -> TurnTemplate:
    system: Literal["turn", "first_user"] = "turn" if turn.system_role else "first_user"
    return TurnTemplate(name, turn.start, turn.end, system, answer_start, turn.tools)


_NO_THOUGHT = "_no_thought"
PLAIN = TextTemplate("{prompt}\n{response}", label="plain")

TEMPLATES: Mapping[str, Template] = {
    "plain": PLAIN,
    **{f.name: _turns(f.name, f.turn) for f in FAMILIES.values()},
    **{
        f"{f.name}{_NO_THOUGHT}": _turns(f"{f.name}{_NO_THOUGHT}", f.turn, f.turn.no_thought)
        for f in FAMILIES.values()
        if f.turn.no_thought
    },
    **{
        f.turn.marked: TurnTemplate(
            f.turn.marked, f.turn.start, f.turn.end, "developer", tools=f.turn.marked
        )
        for f in FAMILIES.values()
        if f.turn.marked
    },
}
