"""Tools in the formats of FunctionGemma and Gemma 4: declarations, calls and results."""

import functools
import pathlib
import subprocess
import sys
import zipfile

import jinja2
import jinja2.sandbox
import pytest
from _tool_conversations import (
    ASK,
    BARE,
    CALL,
    CONVERSATIONS,
    FINE,
    NESTED,
    PING,
    SUNNY,
    SYSTEM,
    TOOLS,
    WEATHER,
    calling,
    messages_of,
    result,
)

from gemma_keras_tune.errors import TemplateError
from gemma_keras_tune.gemma.templates import TEMPLATES
from gemma_keras_tune.gemma.tools import FUNCTION_GEMMA, GEMMA4, parse_calls
from gemma_keras_tune.pairs.tools import ToolCall

FORMATS = ("functiongemma", "gemma4")


def text(template, messages, **options):
    return "".join(s.text for s in template.segments(messages, **options))


@functools.cache
def compiled(source):
    def raise_exception(message):
        raise RuntimeError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def render(source, conversation, **variables):
    return compiled(source).render(messages=conversation, bos_token="<bos>", **variables)


# Literally.


def test_functiongemma_literally():
    conversation = [SYSTEM, ASK, CALL, SUNNY, FINE]
    segments = TEMPLATES["functiongemma"].segments(messages_of(conversation, [WEATHER]))
    assert [(s.text, s.trained) for s in segments] == [
        (
            "<start_of_turn>developer\n"
            "You are a model that can do function calling with the following functions"
            "<start_function_declaration>declaration:get_current_weather{"
            "description:<escape>Gets the current weather in a given location.<escape>,"
            "parameters:{properties:{"
            'location:{description:<escape>City, e.g. "Tokyo, JP"<escape>,'
            "type:<escape>STRING<escape>},"
            "unit:{description:<escape>The unit.<escape>,"
            "enum:[<escape>celsius<escape>,<escape>fahrenheit<escape>],"
            "type:<escape>STRING<escape>}},"
            "required:[<escape>location<escape>],type:<escape>OBJECT<escape>}}"
            "<end_function_declaration><end_of_turn>\n"
            "<start_of_turn>user\nWhat's the weather in Tokyo right now?<end_of_turn>\n"
            "<start_of_turn>model\n",
            False,
        ),
        (
            "<start_function_call>call:get_current_weather{"
            "location:<escape>Tokyo, Japan<escape>,unit:<escape>celsius<escape>}"
            "<end_function_call><start_function_response>",
            True,
        ),
        (
            "response:get_current_weather{temperature:15,weather:<escape>sunny<escape>}"
            "<end_function_response>",
            False,
        ),
        ("It is sunny.<end_of_turn>", True),
    ]


def test_gemma4_literally():
    conversation = [ASK, NESTED, result("ok", 0), result({"b": None, "A": [1]}, 1), FINE]
    segments = TEMPLATES["gemma4"].segments(messages_of(conversation, [PING, BARE]))
    assert [(s.text, s.trained) for s in segments] == [
        (
            '<|turn>system\n<|tool>declaration:ping{description:<|"|><|"|>,parameters:{'
            'type:<|"|>OBJECT<|"|>}}<tool|>'
            '<|tool>declaration:now{description:<|"|>The time<|"|>}<tool|><turn|>\n'
            "<|turn>user\nWhat's the weather in Tokyo right now?<turn|>\n<|turn>model\n",
            False,
        ),
        (
            "<|tool_call>call:book.table-2{empty:[],free:{},"
            "guests:[{age:4.5,vip:true},{age:1e-07,vip:false}],"
            'notes:[<|"|>x, {y}<|"|>,<|"|>ü:<|"|>],place:{room:<|"|>hall<|"|>},Zone:3}<tool_call|>'
            "<|tool_call>call:ping{}<tool_call|><|tool_response>",
            True,
        ),
        (
            'response:book.table-2{value:<|"|>ok<|"|>}<tool_response|>'
            "<|tool_response>response:ping{A:[1],b:null}<tool_response|>",
            False,
        ),
        ("It is sunny.<turn|>", True),
    ]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Gemma 4's published chat template, as the package trl carries it."""
    folder = tmp_path_factory.mktemp("trl")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "trl==1.16.0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip("trl cannot be fetched")
    (wheel,) = pathlib.Path(folder).glob("trl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read("trl/chat_templates/gemma4_v5.jinja").decode()


def with_responses(conversation):
    """Structured results where the published template takes them: beside the calls."""
    written = []
    for message in conversation:
        if message["role"] != "tool" or all(
            isinstance(m["content"], str) for m in conversation if m["role"] == "tool"
        ):
            written.append(dict(message))
        else:
            response = {"name": message["name"], "response": message["content"]}
            written[-1].setdefault("tool_responses", []).append(response)
    return written


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [[], [WEATHER], TOOLS], ids=len)
def test_gemma4_is_written_as_its_published_template_does(published, name, tools):
    conversation = CONVERSATIONS[name]
    theirs = render(published, with_responses(conversation), tools=tools)
    ours = "<bos>" + text(TEMPLATES["gemma4"], messages_of(conversation, tools))
    assert ours == theirs.removesuffix("\n")
    assert render(TEMPLATES["gemma4"].chat_template(), conversation, tools=tools) == theirs
    for end in range(1, len(conversation)):
        if conversation[end]["role"] == "assistant":
            asked = conversation[:end]
            theirs = render(
                published, with_responses(asked), tools=tools, add_generation_prompt=True
            )
            ours = text(
                TEMPLATES["gemma4"], messages_of(asked, tools, ends_with="user"),
                generation_prompt=True,
            )  # fmt: skip
            assert "<bos>" + ours == theirs
    thinking = dict(tools=tools, enable_thinking=True)
    assert render(TEMPLATES["gemma4"].chat_template(), conversation, **thinking) == render(
        published, with_responses(conversation), **thinking
    )


@pytest.mark.parametrize("template", [*FORMATS, "gemma4_no_thought"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_jinja_writes_the_same_text(template, name):
    conversation, template = CONVERSATIONS[name], TEMPLATES[template]
    source = template.chat_template()
    for tools in ([], TOOLS, [tool["function"] for tool in TOOLS]):
        written = text(template, messages_of(conversation, tools)).replace(
            template.answer_start or "\0", ""
        )
        assert render(source, conversation, tools=tools).removesuffix("\n") == "<bos>" + written
        for end in range(1, len(conversation)):
            if conversation[end]["role"] != "assistant":
                continue
            asked = conversation[:end]
            ours = text(
                template, messages_of(asked, tools, ends_with="user"), generation_prompt=True
            )
            theirs = render(source, asked, tools=tools, add_generation_prompt=True)
            assert theirs == "<bos>" + ours


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_trained_is_what_is_answered_after_the_same_prompt(name):
    template = TEMPLATES[name]
    for conversation in CONVERSATIONS.values():
        written = text(template, messages_of(conversation))
        for end in range(1, len(conversation)):
            if conversation[end]["role"] == "assistant":
                asked = messages_of(conversation[:end], ends_with="user")
                assert written.startswith(text(template, asked, generation_prompt=True))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("content", ["", "Let me look."])
def test_calls_and_answers_are_trained_and_results_are_not(name, content):
    template = TEMPLATES[name]
    steps = [calling(("ping", {}), content=content), result("pong", name="ping")] * 2
    segments = template.segments(messages_of([SYSTEM, ASK, *steps, FINE]))
    trained = [s.text for s in segments if s.trained]
    assert len(trained) == 3
    assert all(t.endswith(template.tool_format.result_start) for t in trained[:2])
    assert trained[2] == "It is sunny." + template.stop_token
    assert not any("pong" in t for t in trained)
    masked = [SYSTEM, ASK, {**steps[0], "weight": 0}, *steps[1:], FINE]
    segments = template.segments(messages_of(masked))
    assert [s.text for s in segments if s.trained] == trained[1:]
    assert [s.masked for s in segments if s.text == trained[0]] == [True, False]


# Models without a format, and texts with marks.


@pytest.mark.parametrize("name", ["gemma", "gemma3", "plain"])
def test_a_template_without_a_format_refuses_tools_by_name(name):
    with pytest.raises(TemplateError, match="no format for tools") as caught:
        TEMPLATES[name].segments(messages_of([SYSTEM, ASK, CALL]))
    assert "functiongemma" in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_with_a_mark_is_refused(name):
    form = TEMPLATES[name].tool_format
    call = calling(("ping", {"text": f"a{form.mark}b"}))
    for conversation in ([ASK, call], [ASK, CALL, result(form.result_end), FINE]):
        with pytest.raises(TemplateError, match="written with"):
            TEMPLATES[name].segments(messages_of(conversation))


# Reading calls.

VALUES = {
    "text": "a {b}, [c]: d\n\"e\"", "empty": "", "n": -3, "x": 2.5e-3, "yes": True, "no": False,
    "nothing": None, "list": [1, "a", [], {"k": ["v"]}], "map": {"a b": {"c": "}"}},
}  # fmt: skip


@pytest.mark.parametrize("form", [FUNCTION_GEMMA, GEMMA4], ids=FORMATS)
def test_what_is_written_is_read(form):
    calls = (ToolCall("f", VALUES), ToolCall("g.h-2", {}))
    written = "Look: " + "".join(map(form.call, calls)) + " Bye"
    assert parse_calls(written) == (calls, (), "Look:  Bye")


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ("call:f{a:1", "neither a comma nor a brace"),
        ("call:f", "{ is missing"),
        ("f{}", "does not begin with call:"),
        ("call:f{a:paris}", "'paris' is no number"),
        ("call:f{a:<escape>x}", "does not end"),
        ("call:f{a:1}b", "comes after the arguments"),
        ("call:f{a:1,a:2}", "'a' is there twice"),
        ("call:f{a:}", "is no value"),
        ("call:f{a:NaN}", "'NaN' is no number"),
        ("call:f{:1}", "is no argument"),
        ("call:f{a:[1}", "neither a comma nor a bracket"),
    ],
)
def test_a_malformed_call_is_said_and_kept(inner, words):
    good = "<start_function_call>call:g{}<end_function_call>"
    broken = f"<start_function_call>{inner}<end_function_call>"
    calls, problems, rest = parse_calls(good + broken + "x")
    assert calls == (ToolCall("g"),)
    assert len(problems) == 1 and words in problems[0] and inner in problems[0]
    assert rest == broken + "x"


def test_a_call_that_was_cut_off_is_said():
    calls, problems, rest = parse_calls("<|tool_call>call:f{a:1}")
    assert calls == () and "it has no <tool_call|>" in problems[0]
    assert rest == "<|tool_call>call:f{a:1}"
    assert parse_calls("no calls {") == ((), (), "no calls {")
