"""The formats in which Gemmas are told of tools, call them and read results.

A format is a few marks and switches; one Jinja file writes both of them, for training, answering
and exports alike. Only models that were taught a format have one: FunctionGemma, which is a Gemma 3
with marks of its own, and Gemma 4.

Formats after https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices and the
chat templates published with `google/functiongemma-270m-it` and `google/gemma-4-E2B-it`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import keras

from gemma_keras_tune.errors import TemplateError
from gemma_keras_tune.pairs.tools import ToolCall

ADVICE = "You are a model that can do function calling with the following functions"


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """A format for tools.

    Attributes:
        declare: Opens the declaration of a tool.
        declared: Closes it.
        called_start: Opens a call.
        called_end: Closes it.
        result_start: Opens a result. An answer that calls tools ends with it: the model stops.
        result_end: Closes a result.
        mark: Stands before and after every text.
        missing: The missing value.
        text_after_calls: Whether the text of an answer comes after its calls and their results.
        always_described: Whether a parameter without a description has an empty one.
        nullable: Whether it is said that a parameter may be null.
        own_keys: Whether a parameter may be named like a key of JSON Schema, as `description`.
        responses: Whether the schema of what a tool returns is declared.
    """

    declare: str
    declared: str
    called_start: str
    called_end: str
    result_start: str
    result_end: str
    mark: str
    missing: str
    text_after_calls: bool = False
    always_described: bool = False
    nullable: bool = False
    own_keys: bool = False
    responses: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks in the order of FunctionGemma's token ids."""
        fields = dataclasses.fields(self)[:7]
        return tuple(getattr(self, field.name) for field in fields)

    def variables(self) -> dict[str, str]:
        """Write each value as Jinja does."""
        return {f.name: json.dumps(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def declaration(self, tool: Mapping[str, Any]) -> str:
        """Write the declaration of a tool.

        Raises:
            TemplateError: A text of its schema holds a mark of the format.
        """
        self._refuse_marks(tool, f"the tool {tool.get('function', tool).get('name')!r}")
        return self._write("declaration", tool)

    def call(self, call: ToolCall) -> str:
        """Write a call.

        Raises:
            TemplateError: An argument holds a mark of the format.
        """
        self._refuse_marks(call.arguments, f"the call of {call.name!r}")
        return self._write("tool_call", {"name": call.name, "arguments": call.arguments})

    def result(self, name: str, data: Any) -> str:
        """Write the result of a call.

        Raises:
            TemplateError: It holds a mark of the format.
        """
        self._refuse_marks(data, f"the result of {name!r}")
        return self._write("result", name, data)

    def _write(self, macro: str, *values: Any) -> str:
        return str(getattr(_module(self), macro)(*values))

    def _refuse_marks(self, data: Any, label: str) -> None:
        written = json.dumps(data, ensure_ascii=False, default=str).replace('\\"', '"')
        found = [mark for mark in self.marks if mark in written]
        if found:
            raise TemplateError(
                f"{label} holds {found[0]!r}, which the model's format for tools is written with: "
                "take it out of the text."
            )

    def parse(self, text: str) -> tuple[tuple[ToolCall, ...], tuple[str, ...], str]:
        """Read the calls of an answer.

        Args:
            text: The answer.

        Returns:
            The calls in order; what is wrong with those that cannot be read; and the text that is
            left without the calls that can be.
        """
        calls: list[ToolCall] = []
        problems: list[str] = []
        rest = []
        before, *parts = text.split(self.called_start)
        rest.append(before)
        for part in parts:
            inner, closed, after = part.partition(self.called_end)
            try:
                if not closed:
                    raise ValueError(f"it has no {self.called_end}")
                calls.append(_Reader(inner.strip(), self.mark).call())
            except ValueError as error:
                problems.append(f"{self.called_start}{inner[:200]}: {error}")
                rest.append(self.called_start + part)
            else:
                rest.append(after)
        return tuple(calls), tuple(problems), "".join(rest)


FUNCTION_GEMMA = ToolFormat(
    "<start_function_declaration>",
    "<end_function_declaration>",
    "<start_function_call>",
    "<end_function_call>",
    "<start_function_response>",
    "<end_function_response>",
    "<escape>",
    missing="None",
    always_described=True,
)
GEMMA4 = ToolFormat(
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    missing="null",
    text_after_calls=True,
    nullable=True,
    own_keys=True,
    responses=True,
)
TOOL_FORMATS: Mapping[str, ToolFormat] = {"functiongemma": FUNCTION_GEMMA, "gemma4": GEMMA4}
# Gemma 3's tokens that FunctionGemma's marks took the place of.
UNUSED_TOKENS = tuple(f"<unused{number}>" for number in range(40, 47))


@functools.cache
def _module(form: ToolFormat) -> Any:
    """Compile the macros of a format."""
    environment = jinja2.Environment(autoescape=False)  # no HTML
    return environment.from_string(filled_in("tools.jinja", **form.variables())).module


@functools.cache
def _files() -> jinja2.Environment:
    """Jinja with other marks, which leaves alone the Jinja of the templates that it fills in."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        autoescape=False,  # no HTML
        undefined=jinja2.StrictUndefined,
    )


def filled_in(file: str, **values: Any) -> str:
    """Fill in a `.jinja` file of this package; line breaks and indents of the file are left out."""
    text = _files().get_template(file).render(values)
    return "".join(line.strip() for line in text.splitlines())


def parse_calls(text: str) -> tuple[tuple[ToolCall, ...], tuple[str, ...], str]:
    """Read the calls of an answer in any of the formats; as `ToolFormat.parse`."""
    for form in TOOL_FORMATS.values():
        if form.called_start in text:
            return form.parse(text)
    return (), (), text


def has_marks(tokenizer: keras.layers.Layer, form: ToolFormat) -> bool:
    """Tell whether every mark of a format is one token."""
    return all(_is_token(tokenizer, mark) for mark in form.marks)


def _is_token(tokenizer: keras.layers.Layer, text: str) -> bool:
    return bool(tokenizer.id_to_token(int(tokenizer.token_to_id(text))) == text)


def put_marks(tokenizer: keras.layers.Layer) -> bool:
    """Name Gemma 3's unused tokens after FunctionGemma's marks, which have their ids.

    Args:
        tokenizer: A KerasHub tokenizer.

    Returns:
        Whether it has such tokens; if not, it is left alone.
    """
    from gemma_keras_tune.gemma.vocabularies import USER_DEFINED, sentencepiece_messages

    if not all(_is_token(tokenizer, token) for token in UNUSED_TOKENS):
        return False
    model = sentencepiece_messages().ModelProto.FromString(tokenizer.proto)
    names = dict(zip(UNUSED_TOKENS, FUNCTION_GEMMA.marks, strict=True))
    for piece in model.pieces:
        if piece.piece in names:
            piece.piece, piece.type = names[piece.piece], USER_DEFINED
    tokenizer.set_proto(model.SerializeToString())
    return True


class _Reader:
    """Reads one call, from left to right.

    Args:
        text: The call, without its marks.
        mark: Stands before and after every text.
    """

    _NAME = re.compile(r"call:\s*([^\s{}:,]+)\s*")
    _KEY = re.compile(r"\s*([^\s{}\[\],:<][^{}\[\],:<]*?)\s*:\s*")
    _BARE = re.compile(r"\s*([^\s{}\[\],][^{}\[\],]*?)\s*(?=[,}\]]|$)")
    _WORDS: Mapping[str, Any] = {
        "true": True, "false": False, "null": None, "True": True, "False": False, "None": None,
    }  # fmt: skip

    def __init__(self, text: str, mark: str) -> None:
        self.text = text
        self.mark = mark
        self.place = 0

    def call(self) -> ToolCall:
        """Read the call.

        Raises:
            ValueError: It is malformed.
        """
        name = self._NAME.match(self.text)
        if name is None:
            raise ValueError("it does not begin with call: and a name")
        self.place = name.end()
        arguments = self._mapping()
        if self.text[self.place :].strip():
            raise ValueError(f"{self._shown()} comes after the arguments")
        return ToolCall(name[1], arguments)

    def _mapping(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._take("{")
        while not self._takes("}"):
            key = self._key()
            if key in found:
                raise ValueError(f"{key!r} is there twice")
            found[key] = self._value()
            if not self._takes(",") and not self._next("}"):
                raise ValueError(f"{self._shown()} is neither a comma nor a brace")
        return found

    def _key(self) -> str:
        if self._next(self.mark):
            key = self._string()
            self._take(":")
            return key
        match = self._KEY.match(self.text, self.place)
        if match is None:
            raise ValueError(f"{self._shown()} is no argument")
        self.place = match.end()
        return match[1]

    def _value(self) -> Any:
        if self._next(self.mark):
            return self._string()
        if self._next("{"):
            return self._mapping()
        if self._takes("["):
            found = []
            while not self._takes("]"):
                found.append(self._value())
                if not self._takes(",") and not self._next("]"):
                    raise ValueError(f"{self._shown()} is neither a comma nor a bracket")
            return found
        return self._bare()

    def _string(self) -> str:
        self._take(self.mark)
        text, closed, _ = self.text[self.place :].partition(self.mark)
        if not closed:
            raise ValueError(f"the text {text[:40]!r} does not end")
        self.place += len(text) + len(self.mark)
        return text

    def _bare(self) -> Any:
        match = self._BARE.match(self.text, self.place)
        if match is None:
            raise ValueError(f"{self._shown()} is no value")
        word = match[1]
        if word in self._WORDS:
            value = self._WORDS[word]
        else:
            try:
                value = json.loads(word, parse_constant=_no_number)
            except ValueError:
                raise ValueError(f"{word[:40]!r} is no number, and has no {self.mark}") from None
        self.place = match.end()
        return value

    def _next(self, sign: str) -> bool:
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1
        return self.text.startswith(sign, self.place)

    def _takes(self, sign: str) -> bool:
        found = self._next(sign)
        self.place += len(sign) if found else 0
        return found

    def _take(self, sign: str) -> None:
        if not self._takes(sign):
            raise ValueError(f"{sign} is missing before {self._shown()}")

    def _shown(self) -> str:
        return (
            repr(self.text[self.place : self.place + 40]) if self.text[self.place :] else "the end"
        )


def _no_number(name: str) -> Any:
    raise ValueError(name)
