"""The chat template that a checkpoint brings, held against ours, and used where it is another.

It is code of somebody else's. So it is rendered in Jinja's sandbox, first in a process of its own
with little time and memory, on a few conversations. If it writes what one of our templates writes,
that one is used. If it writes something else, it is used itself where rendering the beginnings of
a conversation shows where each answer begins and ends.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import jinja2
import keras

from gemma_keras_tune._support import jinja
from gemma_keras_tune.errors import TemplateError
from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.gemma.state import is_instruct, mark_origin, origin_of
from gemma_keras_tune.gemma.templates import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    START_OF_TEXT,
    TEMPLATES,
    Messages,
    Segment,
    Template,
    attach_template,
    get_template,
)
from gemma_keras_tune.pairs.conversations import Message

_SECONDS = 10.0
_MEMORY = 1 << 30
# ShieldGemma is asked in the turn format, though its names do not say so.
INSTRUCT_NAME = re.compile(
    r"(^|[-_./ ])(it|instruct|chat|shieldgemma|functiongemma)($|[-_./ ])", re.IGNORECASE
)
_MARKS = re.compile(r"<[^<>\s]+>")


@dataclasses.dataclass(frozen=True)
class JinjaTemplate(Template):
    """A chat template of another tool, written in Jinja.

    A conversation is cut where its beginnings end: the text up to an answer is what the template
    writes for the messages before it, and the answer is what is new with it, up to the stop token.

    Attributes:
        source: The template.
        stop: The token that ends an answer.
    """

    source: str
    stop: str

    kind: ClassVar[str] = "jinja"

    @property
    def name(self) -> str:
        """Name that says where it is from."""
        return "checkpoint's own"

    @property
    def stop_token(self) -> str:
        """The stop token."""
        return self.stop

    def _segments(self, messages: Messages) -> list[Segment]:
        parts, written = [], ""
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._render(messages[:index], True)
            whole = self._render(messages[: index + 1], False)
            answer, stop, _ = whole.removeprefix(prompt).partition(self.stop)
            if not (prompt.startswith(written) and whole.startswith(prompt) and stop):
                _refuse_split()
            if message.content.strip() != answer.strip():
                _refuse_split()
            parts += [Segment(prompt.removeprefix(written), False), Segment(answer + stop, True)]
            written = prompt + answer + stop
        if messages[-1].role != "assistant":
            prompt = self._render(messages, True)
            if not prompt.startswith(written):
                _refuse_split()
            parts.append(Segment(prompt.removeprefix(written), False))
        return parts

    def _render(self, messages: Messages, generation_prompt: bool) -> str:
        try:
            text = jinja.render_chat(self.source, as_dictionaries(messages), generation_prompt)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise TemplateError(
                f"The checkpoint's own chat template refuses this conversation: {error}",
                next_step="Write the conversation as it wants it, or pass another `template=`.",
            ) from error
        return text.removeprefix(START_OF_TEXT)

    def chat_template(self) -> str:
        """Return the template as it was found."""
        return self.source

    def to_config(self) -> dict[str, Any]:
        """Return the template as JSON data."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


def _refuse_split() -> NoReturn:
    raise TemplateError(
        "The checkpoint's own chat template writes the beginning of this conversation in another "
        "way than the whole, so it cannot be told which text is an answer.",
        next_step=f"Pass another template: `template=` one of {', '.join(TEMPLATES)}, or a string "
        "with {prompt} and {response}.",
    )


def as_dictionaries(messages: Messages) -> list[dict[str, str]]:
    """Write messages as chat templates take them."""
    return [{"role": message.role, "content": message.content} for message in messages]


# Holding it against ours.

_TURN = [Message("user", "What is 2+2?"), Message("assistant", "It is 4.")]
_MORE = [*_TURN, Message("user", " And 3+3? \n"), Message("assistant", "6")]
_SYSTEM = Message("system", "Be brief.")
_PROBES: tuple[tuple[tuple[Message, ...], bool], ...] = tuple(
    (tuple(messages), prompt)
    for messages, prompt in (
        (_TURN[:1], True), (_TURN, False), (_MORE[:3], True), (_MORE, False),
        ([_SYSTEM, *_TURN[:1]], True), ([_SYSTEM, *_TURN], False),
        ([_SYSTEM, *_MORE[:3]], True), ([_SYSTEM, *_MORE], False),
    )
)  # fmt: skip
# Run with the file of the renderer: the package itself takes seconds to import.
_WORKER = """
import json, runpy, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
except Exception:
    pass  # Windows has none, and macOS refuses
render = runpy.run_path({file!r})["render_chat"]
asked = json.load(sys.stdin)
found = []
for messages, prompt in asked["probes"]:
    try:
        found.append([True, render(asked["source"], messages, prompt)])
    except Exception as error:
        found.append([False, f"{{type(error).__name__}}: {{error}}"[:300]])
json.dump(found, sys.stdout)
"""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a checkpoint's chat template is.

    Attributes:
        template: The template to use: one of ours that writes the same, or the checkpoint's own;
            `None` where neither can be.
        told: A sentence for the user; empty where it is what the family has anyway.
    """

    template: Template | None
    told: str = ""


def judge(source: str, model: keras.Model) -> Verdict:
    """Hold a checkpoint's chat template against ours.

    Args:
        source: The template, in Jinja.
        model: The model it came with.

    Returns:
        The `Verdict`.
    """
    usual = get_template(model)
    try:
        rendered = _rendered_apart(source)
    except TemplateError as error:
        return Verdict(None, f"its chat template is not used, but {usual.name!r}: {error.headline}")
    if not any(fine for fine, _ in rendered[:2]):
        return Verdict(None, f"its chat template is not used, but {usual.name!r}: {rendered[0][1]}")
    for template in (usual, *TEMPLATES.values()):
        if not _differences(template, rendered):
            told = "" if template is usual else f"its chat template is that of {template.name!r}"
            return Verdict(template, told)
    differences = _differences(usual, rendered)
    own = _own(source, model, rendered)
    if own is not None:
        return Verdict(
            own,
            "its own chat template is used, in training and in serving: answers end with "
            f"{own.stop_token}. It is not {usual.name!r}: {differences[0]}",
        )
    return Verdict(
        None,
        f"its chat template is not used, but {usual.name!r}: it cannot be told from it which text "
        f"is an answer. It differs: {differences[0]} Pass `template=` a string or a function that "
        "writes its format",
    )


def _rendered_apart(source: str) -> list[tuple[bool, str]]:
    """Render the probes in a process with little time and memory."""
    probes = [(as_dictionaries(messages), prompt) for messages, prompt in _PROBES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _WORKER.format(memory=_MEMORY, file=jinja.__file__)],
            input=json.dumps({"source": source, "probes": probes}),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
            env=environment,
        )
        return [(bool(fine), str(text)) for fine, text in json.loads(done.stdout)]
    except subprocess.TimeoutExpired:
        raise TemplateError(f"it takes longer than {_SECONDS:g} seconds.") from None
    except (subprocess.CalledProcessError, OSError, ValueError):
        raise TemplateError("it cannot be rendered in little memory.") from None


def _differences(template: Template, rendered: Sequence[tuple[bool, str]]) -> list[str]:
    """Say where a template of ours writes another text; what theirs refuses is no difference."""
    found = []
    for (messages, prompt), (fine, theirs) in zip(_PROBES, rendered, strict=True):
        if not fine:
            continue
        source = str(template.chat_template())
        ours = jinja.render_chat(source, as_dictionaries(messages), prompt)
        ours, theirs = (text.removeprefix(START_OF_TEXT) for text in (ours, theirs))
        # A line feed after the last answer teaches nothing.
        if ours != theirs and (prompt or ours.rstrip("\n") != theirs.rstrip("\n")):
            found.append(_first_difference(theirs, ours))
    return found


def _first_difference(theirs: str, ours: str) -> str:
    same = (at for at, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b)
    at = next(same, min(len(theirs), len(ours)))
    return f"it writes {theirs[at : at + 40]!r} where that has {ours[at : at + 40]!r}."


def _own(source: str, model: keras.Model, rendered: Sequence[tuple[bool, str]]) -> Template | None:
    """The template itself, if the probes can be cut into prompts and answers by it."""
    answer = _TURN[1].content
    ending = rendered[1][1].rpartition(answer)[2]
    mark = _MARKS.search(ending)
    own = JinjaTemplate(source, mark.group() if mark else END_OF_TEXT)
    tokenizer = model.preprocessor.tokenizer
    try:
        own.stop_token_ids(tokenizer)
        for (messages, prompt), (fine, text) in zip(_PROBES, rendered, strict=True):
            if not fine:
                continue
            parts = own.segments(messages, generation_prompt=prompt)
            written = "".join(segment.text for segment in parts)
            if not text.removeprefix(START_OF_TEXT).startswith(written):
                return None
    except TemplateError:
        return None
    return own


# On load.


def bring_chat_template(model: keras.Model, source: str, where: str) -> None:
    """Decide what a checkpoint's chat template means, attach it if it is needed, and say so.

    A pretrained model often carries one all the same: it alone does not make a model instruct.

    Args:
        model: The model, with its origin marked.
        source: The chat template.
        where: Where the model is from, for the message.
    """
    if is_instruct(model) is None and _marks_of_its_own(model, source):
        _mark_instruct(model, True)
    if is_instruct(model) is not True:
        told = (
            "it carries a chat template, and neither its name, nor its metadata, nor its end "
            "tokens say that it was taught one: it is taken for pretrained, with the template "
            f"'plain'. If it is an instruct model, pass `template={family_of(model).name!r}`"
        )
        if is_instruct(model) is None:
            _mark_instruct(model, False)
            _tell(where, told)
        return
    verdict = judge(source, model)
    if verdict.template is not None and verdict.template != get_template(model):
        attach_template(model, verdict.template)
    if verdict.told:
        _tell(where, verdict.told)


def _tell(where: str, told: str) -> None:
    warnings.warn(f"{where}: {told.rstrip('.')}.", UserWarning, stacklevel=6)


def _mark_instruct(model: keras.Model, instruct: bool) -> None:
    origin = origin_of(model)
    if origin is not None:
        mark_origin(model, origin.source, instruct)


def _marks_of_its_own(model: keras.Model, source: str) -> bool:
    """Tell if the template writes marks that were added to the tokenizer, as for ChatML."""
    tokenizer = model.preprocessor.tokenizer
    return any(
        tokenizer.id_to_token(int(tokenizer.token_to_id(mark))) == mark
        for mark in set(_MARKS.findall(source)) - set(SPECIAL_TOKENS)
    )
