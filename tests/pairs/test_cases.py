"""Rows as they are in the world: each is read rightly or refused by name, and nothing is lost."""

import json
import re
import warnings

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_keras_tune.errors import PairsError, PairsWarning
from gemma_keras_tune.pairs import read_pairs
from gemma_keras_tune.pairs.conversations import ROLES
from gemma_keras_tune.pairs.schemas import PREFERRED_KEYS, SCHEMAS


def read(rows, **options):
    """Turns of every pair as (role, content), and what was not used."""
    source = read_pairs(rows, **options)
    pairs = list(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PairsWarning)
        source.raise_for_problems()
    return [[(m.role, m.content) for m in pair.messages] for pair in pairs], source.unused


def one(row, **options):
    (turns,), _ = read([row], **options)
    return turns


def refusal(row, **options):
    source = read_pairs([row], **options)
    assert list(source) == []
    assert all(str(problem).startswith("row 1: ") for problem in source.problems)
    return " / ".join(problem.text for problem in source.problems)


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SUM = [("user", "2+2?"), ("assistant", "4")]

# A row says more than we use.


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": [assistant("4")]},
        {"prompt": "2+2?", "completion": assistant("4")},
        {"prompt": "2+2?", "completion": [user("2+2?"), assistant("4")]},
        {"prompt": [user("2+2?")], "completion": [user("2+2?"), assistant("4")]},
        {"prompt": [user("2+2?")], "completion": "4"},
        {"prompt": "2+2?", "completion": [{"type": "text", "text": "4"}]},
        {"prompt": "2+2?", "completion": {"type": "text", "text": "4"}},
        {"input": {"messages": [user("2+2?")]}, "output": [assistant("4")]},
        {"prompt": [{"type": "text", "text": "2+2?"}], "completion": "4"},
        ("2+2?", [assistant("4")]),
    ],
)
def test_an_answer_that_is_a_conversation(row):
    assert one(row) == SUM


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [assistant("5")]},
        {"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
        {"question": "2+2?", "chosen": "4", "rejected": "5"},
        {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
        {"messages": [user("2+2?")], "chosen": assistant("4"), "rejected": assistant("5")},
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {
            "prompt": "2+2?",
            "messages": [user("2+2?"), assistant("4")],
            "chosen": [user("2+2?"), assistant("4")],
            "rejected": [user("2+2?"), assistant("5")],
            "score_chosen": 5.0,
        },
        {
            "chosen_messages": [user("2+2?"), assistant("4")],
            "rejected_messages": [user("2+2?"), assistant("5")],
        },
        {
            "input": {"messages": [user("2+2?")]},
            "preferred_output": [assistant("4")],
            "non_preferred_output": [assistant("5")],
        },
    ],
)
def test_preferences(row):
    problem = refusal(row)
    assert "`preference='chosen'`" in problem
    (turns,), unused = read([row], preference="chosen")
    assert turns == SUM
    rejected = next(key for key in row if "rejected" in key or "non_preferred" in key)
    assert unused[f"`{rejected}`"] == 1


def test_preferences_by_named_columns():
    row = {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [assistant("5")]}
    turns, unused = read([row], prompt_column="prompt", response_column="chosen")
    assert turns == [SUM] and unused == {"`rejected`": 1}
    row = {"q": "2+2?", "chosen": "4", "rejected": "5"}
    turns, unused = read([row] * 3, prompt_column="q", preference="chosen")
    assert turns == [SUM] * 3 and unused == {"`rejected`": 3}
    assert "no key of a preferred answer" in refusal({"prompt": "a"}, preference="chosen")
    with pytest.raises(PairsError, match="`preference` must be None or 'chosen'"):
        read_pairs([row], preference="rejected")
    with pytest.raises(PairsError, match="both name the answer"):
        read_pairs([row], prompt_column="q", response_column="chosen", preference="chosen")


CALL = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("messages", "key"),
    [
        (
            [user("Hi"), {"role": "model", "parts": [{"functionCall": {"name": "f"}}]}],
            "`functionCall` in a part of message 2",
        ),
        (
            [user("Hi"), assistant([{"type": "tool_use", "name": "f", "input": {}}])],
            "message 2 of `messages` (assistant) has parts that are no text: tool_use",
        ),
    ],
)
def test_tool_calls_are_refused_by_name(messages, key):
    problem = refusal({"messages": messages})
    assert key in problem and "is missing" not in problem
    assert "tool calls" in problem or "no text" in problem


def test_an_answer_in_parts_that_are_no_text_is_refused():
    parts = [{"type": "text", "text": "4"}, {"type": "image_url", "image_url": "x"}]
    assert refusal({"prompt": "2+2?", "completion": parts}) == (
        "`completion` has parts that are no text: image_url"
    )


TOOL = {"type": "function", "function": {"name": "look", "description": "Looks"}}


def tools_of(pair):
    return [tool["function"]["name"] for tool in pair.messages[0].tools]


@pytest.mark.parametrize(
    "tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL]), np.array([TOOL]), [json.dumps(TOOL)],
              [{"function_declarations": [TOOL["function"]]}]],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("key", ["tools", "functions", "Tools"])
def test_tools_of_a_row(tools, key):
    for row in ({"messages": [user("Hi"), assistant("x")]}, {"prompt": "Hi", "completion": "x"}):
        (pair,) = read_pairs([{**row, key: tools}])
        assert tools_of(pair) == ["look"]
        assert [(m.role, m.content) for m in pair.messages[1:]] == [
            ("user", "Hi"),
            ("assistant", "x"),
        ]
    (pair,) = read_pairs([{**row, key: tools, "system": "Be brief."}])
    assert tools_of(pair) == ["look"] and pair.messages[0].content == "Be brief."


def test_empty_tools_are_none():
    row = {"messages": [user("Hi"), assistant("x")]}
    for empty in (None, [], "[]", float("nan"), ""):
        assert one({**row, "tools": empty}) == [("user", "Hi"), ("assistant", "x")]


def calls_of(*messages):
    (pair,) = read_pairs([{"messages": messages, "tools": [TOOL]}])
    return [
        (m.content, [(c.name, c.arguments) for c in m.tool_calls], m.name)
        for m in pair.messages[1:]
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"function": {"name": "look", "arguments": '{"at": "x", "n": [1]}'}},
        {"function": {"name": "look", "arguments": {"at": "x", "n": [1]}}, "id": "1"},
        {"name": "look", "arguments": {"at": "x", "n": np.array([1])}},
        {"name": "look", "arguments": "{'at': 'x', 'n': [1]}"},
    ],
)
def test_calls_of_an_answer(given):
    for calls in ([given], given, np.array([given])):
        read = calls_of(user("Hi"), assistant("Let me look.", tool_calls=calls))
        assert read[1] == ("Let me look.", [("look", {"at": "x", "n": [1]})], None)
    assert calls_of(user("Hi"), assistant(None, tool_calls=[given]))[1][0] == ""
    legacy = assistant(None, function_call={"name": "f"})
    assert calls_of(user("Hi"), legacy)[1] == ("", [("f", {})], None)


def test_results_are_named_by_id_or_place():
    two = [{**CALL[0], "id": name, "function": {"name": name}} for name in "ab"]
    tail = assistant("x")
    by_id = [{"role": "tool", "tool_call_id": n, "content": n.upper()} for n in "ba"]
    read = calls_of(user("Hi"), assistant("", tool_calls=two), *by_id, tail)
    assert read[2:] == [("B", [], "b"), ("A", [], "a"), ("x", [], None)]
    by_place = [{"role": "tool", "content": {"n": 1}}, {"role": "function", "content": "2"}]
    read = calls_of(user("Hi"), assistant("", tool_calls=two), *by_place, tail)
    assert read[2:4] == [('{"n": 1}', [], "a"), ("2", [], "b")]
    parts = [{"role": "tool", "name": "z", "content": [{"type": "text", "text": "2"}]}]
    read = calls_of(user("Hi"), assistant("", tool_calls=two), *parts, tail)
    assert read[2] == ("2", [], "z")


def test_calls_and_results_as_sharegpt_has_them():
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
        {"from": "observation", "value": '{"seen": true}'},
        {"from": "gpt", "value": "x"},
    ]
    (pair,) = read_pairs([{"conversations": turns, "tools": json.dumps([TOOL])}])
    assert [m.role for m in pair.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert pair.messages[2].tool_calls[0].arguments == {"at": 1}
    assert pair.messages[3].name == "look" and pair.messages[3].content == '{"seen": true}'


@pytest.mark.parametrize(
    ("content", "written"),
    [({}, "{}"), ([1, 2], "[1, 2]"), (3.5, "3.5"), (True, "true"), (b"ok", "ok"),
     ({"a": np.array([1])}, '{"a": [1]}')],
)  # fmt: skip
def test_results_are_text_numbers_or_structures(content, written):
    result = {"role": "tool", "content": content}
    read = calls_of(user("Hi"), assistant("", tool_calls=CALL), result, assistant("x"))
    assert read[2] == (written, [], "look")


def test_what_arrow_fills_in_is_left_out():
    schema = {"type": "object", "properties": {"at": {"type": "string", "enum": None}, "n": None}}
    tool = {"type": "function", "function": {"name": "look", "parameters": schema, "strict": None}}
    call = {"function": {"name": "look", "arguments": {"at": None, "other": None}}}
    row = {"messages": [user("Hi"), assistant("", tool_calls=[call])], "tools": [tool]}
    (pair,) = read_pairs([row])
    assert pair.messages[0].tools[0]["function"]["parameters"]["properties"] == {
        "at": {"type": "string"}
    }
    assert pair.messages[2].tool_calls[0].arguments == {"at": None}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([user("Hi"), assistant("", tool_calls=CALL), user("?"), assistant("x")], "not the result"),
        ([user("Hi"), {"role": "tool", "content": "5"}, assistant("x")], "message 1 calls none"),
        (
            [user("Hi"), assistant("", tool_calls=CALL), {"role": "tool", "content": "5"}],
            "the result of a tool, with no answer to learn",
        ),
        ([user("Hi"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
         "`arguments` of call 1 of `tool_calls` of message 2"),
        ([user("Hi"), assistant("", tool_calls=[{"name": "f", "arguments": [1]}])], "a dictionary"),
        ([user("Hi"), assistant("", tool_calls=[{"name": "f{}"}])], "needs a `name`"),
        ([user("Hi"), assistant("", tool_calls="look")], "broken JSON"),
        ([user("Hi", tool_calls=CALL), assistant("x")], "which only an assistant does"),
        (
            [user("Hi"), assistant("", tool_calls=CALL),
             {"role": "tool", "tool_call_id": "9", "content": "5"}, assistant("x")],
            "message 3 is the result of no call before it",
        ),
        (
            [user("Hi"), assistant("", tool_calls=CALL), {"role": "tool", "content": ""},
             assistant("x")],
            "message 3 of `messages` (tool) is empty",
        ),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_read_are_named(messages, words):
    assert words in refusal({"messages": messages})


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("look", "broken JSON"),
        ([3], "tool 1 of `tools` must be a JSON schema"),
        ([{"description": "x"}], "tool 1 of `tools` needs a `name`"),
        ([TOOL, TOOL], "tool 2 of `tools` has the name 'look', which another one has"),
        ([{"name": "f", "parameters": {"type": "array"}}], "must have the type 'object'"),
        ([{"name": "f", "parameters": "x"}], "`parameters` must be a JSON schema"),
        ([{"name": "f", "description": 3}], "`description` must be text"),
    ],
)
def test_tools_that_cannot_be_read_are_named(tools, words):
    assert words in refusal({"messages": [user("Hi"), assistant("x")], "tools": tools})


def test_keys_of_tools_that_are_not_used_are_told():
    row = {"messages": [user("Hi"), assistant("x")], "tool_choice": "auto",
           "tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}  # fmt: skip
    source = read_pairs([row])
    assert len(list(source)) == 1
    assert source.unused == {"`strict` of tools": 1, "`tool_choice`": 1}


@pytest.mark.parametrize("key", ["images", "image", "image_url", "videos", "audio", "pixel_values"])
def test_media_are_refused_by_name(key):
    row = {"messages": [user("<image>What?"), assistant("A cat.")], key: ["cat.png"]}
    assert refusal(row).startswith(f"`{key}` holds images, audio, video or files")
    named = {"q": "What?", "a": "A cat.", key: "cat.png"}
    assert f"`{key}` holds" in refusal(named, prompt_column="q", response_column="a")
    message = {"messages": [user("What?", **{key: "cat.png"}), assistant("A cat.")]}
    assert f"`{key}` of message 1 of `messages` holds" in refusal(message)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": "x"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "input_audio", "input_audio": {"data": "x"}},
        {"inlineData": {"mimeType": "image/png", "data": "x"}},
        {"type": "text", "text": "What?", "image": "cat.png"},
    ],
)
def test_parts_that_are_no_text_are_refused_by_name(part):
    content = [{"type": "text", "text": "What?"}, part]
    problem = refusal([user(content), assistant("A cat.")])
    assert "message 1 of the row (user)" in problem
    assert str(part.get("type") or "inlineData") in problem or "`image`" in problem


REASONED = [
    {"messages": [user("2+2?"), assistant("4", reasoning_content="Two and two.")]},
    {"messages": [user("2+2?"), assistant("4", reasoning="Two and two.")]},
    {"messages": [user("2+2?"), assistant("4", thinking="Two and two.")]},
    {
        "messages": [
            user("2+2?"),
            assistant([{"type": "thinking", "thinking": "Two and two."}, {"text": "4"}]),
        ]
    },
    {
        "contents": [
            {"role": "user", "parts": [{"text": "2+2?"}]},
            {"role": "model", "parts": [{"text": "Two and two.", "thought": True}, {"text": "4"}]},
        ]
    },
    {"question": "2+2?", "answer": "4", "reasoning": "Two and two."},
    {
        "prompt": "2+2?",
        "completion": [
            {"type": "thinking", "thinking": "Two and two."},
            {"type": "text", "text": "4"},
        ],
    },
    {"prompt": "2+2?", "response": "4", "thinking": ["Two and two."]},
]


@pytest.mark.parametrize("row", REASONED)
def test_reasoning_is_refused_kept_or_dropped(row):
    assert "`reasoning='keep'`" in refusal(row)
    assert one(row, reasoning="keep") == [("user", "2+2?"), ("assistant", "Two and two.\n\n4")]
    (turns,), unused = read([row], reasoning="drop")
    assert turns == SUM and list(unused.values()) == [1]
    with pytest.raises(PairsError, match="`reasoning` must be 'refuse', 'keep' or 'drop'"):
        read_pairs([row], reasoning=True)


def test_reasoning_without_text_and_within_reasoning():
    chat = [user("2+2?"), assistant([{"thought": True}, {"text": "4"}])]
    assert "is missing" in refusal(chat, reasoning="keep")
    assert read([chat], reasoning="drop") == ([SUM], {"reasoning in parts of messages": 1})
    deep = "Two."
    for _ in range(400):
        deep = [{"type": "thinking", "thinking": deep}]
    assert "holds reasoning" in refusal([user("2+2?"), assistant(deep)], reasoning="keep")


@pytest.mark.parametrize(
    ("flag", "trained"),
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": 1}, True),
        ({"loss_weight": 0.0}, False),
        ({"trainable": False}, False),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"training": "false"}, False),
        ({"weight": None}, True),
    ],
)
def test_messages_that_are_not_to_be_trained(flag, trained):
    chat = [user("a"), assistant("b", **flag), user("c"), assistant("d")]
    (pair,) = read_pairs([{"messages": chat}])
    assert [m.trained for m in pair.messages] == [True, trained, True, True]
    if not trained:
        assert "no answer that is to be trained" in refusal({"messages": chat[:2]})


@pytest.mark.parametrize(
    "flag", [{"weight": 0.5}, {"weight": "much"}, {"train_detail": [{"a": 1}]}]
)
def test_weights_that_are_not_understood(flag):
    (key,) = flag
    problem = refusal({"messages": [user("a"), assistant("b", **flag)]})
    assert problem.startswith(f"`{key}` of message 2 of `messages` must be true or false")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"label": False}, "`label` is false: its owner calls this answer a bad one"),
        ({"label": "False"}, "`label` is false"),
        ({"kto_tag": False}, "`kto_tag` is false"),
        ({"is_correct": False}, "`is_correct` is false"),
        ({"label": 0}, "`label` is a verdict on the answer or the row"),
        ({"label": "bad"}, "`label` is a verdict on the answer or the row"),
        ({"score": 0.2}, "`score` is a verdict"),
        ({"overall_rating": 1}, "`overall_rating` is a verdict"),
        ({"corrected": "Five."}, "`corrected` is a verdict"),
        ({"weight": 0}, "`weight` says that this row is not to be trained on"),
        ({"weight": 0.3}, "`weight` must be true or false"),
        ({"context": "In Rome."}, "`context` seems to belong to the prompt"),
        ({"choices": ["4", "5"]}, "`choices` seems to belong to the prompt"),
    ],
)
def test_verdicts_weights_and_context_of_a_row(row, problem):
    row = {"prompt": "2+2?", "completion": "4", **row}
    assert problem in refusal(row)
    (key,) = set(row) - {"prompt", "completion"}
    turns, unused = read([row], prompt_column="prompt", response_column="completion")
    assert turns == [SUM] and unused == {f"`{key}`": 1}
    assert one({**row, key: None}) == SUM


def test_good_rows_among_bad_ones():
    rows = [{"prompt": str(i), "completion": "x", "label": i % 2 == 0} for i in range(4)]
    source = read_pairs(rows, on_error="skip")
    assert [pair.prompt for pair in source] == ["0", "2"]
    assert [problem.row for problem in source.skipped] == [2, 4]


def test_what_is_not_used_is_told_once_with_counts():
    rows = [
        {"question": "a", "answer": "b", "id": 7, "source": "x", "note": None, "tags": []},
        {"question": "c", "answer": "d", "id": 8, "source": "", "note": " ", "tags": {"a": None}},
    ]
    source = read_pairs(rows)
    list(source)
    assert source.unused == {"`id`": 2, "`source`": 1}
    with pytest.warns(PairsWarning) as caught:
        source.raise_for_problems()
        source.raise_for_problems()
    assert [str(warning.message) for warning in caught] == [
        "The list has keys that hold something and are not used.\n"
        "  - `id`: 2 times, first in row 1: 7\n"
        "  - `source`: 1 time, first in row 1: 'x'"
    ]
    assert caught[0].filename == __file__


def test_keys_that_are_data_are_counted_in_constant_memory():
    rows = [{"prompt": "a", "response": "b", f"key {i}": "x" * 10_000} for i in range(2000)]
    _, unused = read(rows)
    assert len(unused) <= 501 and sum(unused.values()) == 2000


def test_system_messages_that_are_not_used_are_counted():
    chat = [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")]
    (turns,), unused = read([{"system": "Be long.", "messages": chat}])
    assert turns[0] == ("system", "Be brief.")
    assert unused == {"a system message beside that of the conversation": 1}
    _, unused = read([{"system": "Be brief.", "messages": chat}])
    assert unused == {}


def write_table(folder, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


TABLE = [
    {"prompt": "a", "response": "b", "id": 1, "note": "x", "none": None, "empty": ""},
    {"prompt": "c", "response": "d", "id": 2, "note": "", "none": None, "empty": ""},
]


@pytest.mark.parametrize("make", [
    lambda folder: TABLE,
    lambda folder: pd.DataFrame(TABLE),
    lambda folder: {key: [row[key] for row in TABLE] for key in TABLE[0]},
    lambda folder: pa.Table.from_pylist(TABLE),
    lambda folder: datasets.Dataset.from_list(TABLE),
    lambda folder: write_table(folder, TABLE),
])  # fmt: skip
def test_columns_of_tables_that_are_not_used_are_counted(make, tmp_path):
    source = read_pairs(make(tmp_path))
    assert len(list(source)) == 2
    assert source.unused == {"`id`": 2, "`note`": 1}
    bad = read_pairs(make(tmp_path), prompt_column="note", response_column="prompt")
    assert len(list(bad)) == 1 and bad.unused["`response`"] == 2


def test_columns_of_tensors_that_are_not_used_are_counted():
    data = tf.data.Dataset.from_tensor_slices({"prompt": ["a"], "response": ["b"], "id": [1]})
    assert read(data) == ([[("user", "a"), ("assistant", "b")]], {"`id`": 1})


def test_columns_of_tables_that_change_the_meaning(tmp_path):
    rows = [{**row, "label": row["id"] == 1} for row in TABLE]
    source = read_pairs(write_table(tmp_path, rows))
    assert [pair.prompt for pair in source] == ["a"]
    assert [problem.text for problem in source.problems] == [
        "`label` is false: its owner calls this answer a bad one"
    ]
    picture = {"bytes": b"\x89PNG", "path": None}
    rows = [{**TABLE[0], "image": None}, {**TABLE[1], "image": picture}]
    source = read_pairs(write_table(tmp_path, rows))
    assert [pair.prompt for pair in source] == ["a"]
    assert source.problems[0].text.startswith("`image` holds images")


# Dialects of one thing.


def test_a_part_without_text_adds_nothing():
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": None}]
    assert one([user(parts), assistant(parts)]) == [("user", "Hi"), ("assistant", "Hi")]
    empty = [{"type": "text", "text": None}]
    assert refusal([user("Hi"), assistant(empty)]) == "message 2 of the row (assistant) is empty"


@pytest.mark.parametrize(
    "content",
    [
        ["Hi"],
        ["H", "i"],
        {"type": "text", "text": "Hi"},
        {"text": "Hi"},
        [{"text": "Hi"}],
        [{"type": "output_text", "text": "Hi", "annotations": []}],
        [{"type": "text", "text": {"value": "Hi", "annotations": []}}],
        [{"type": "text", "value": "Hi"}],
        np.array(["Hi"]),
        np.array([{"type": "text", "text": "Hi"}]),
    ],
)
def test_content_in_every_form(content):
    assert one([user(content), assistant(content)]) == [("user", "Hi"), ("assistant", "Hi")]


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], [["Hi"]], 5, True, {"text": ["Hi"]}, [None]])
def test_content_that_is_no_text_is_never_written_as_python_or_json(content):
    assert "message 2 of the row (assistant)" in refusal([user("Hi"), assistant(content)])


def test_google_rows():
    row = {
        "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "2+2"}, {"text": "?"}]},
            {"role": "model", "parts": [{"text": "4"}]},
        ],
    }
    assert one(row) == [("system", "Be brief."), *SUM]
    assert one({**row, "systemInstruction": "Be brief."}) == [("system", "Be brief."), *SUM]
    assert one({**row, "systemInstruction": {"parts": [{"text": ""}]}}) == SUM
    (turns,), unused = read([{**row, "generationConfig": {"temperature": 1}}])
    assert turns[1:] == SUM and unused == {"`generationConfig`": 1}


def test_messages_where_text_is_joined():
    chat = json.dumps([user("2+2?"), assistant("4")])
    problem = refusal({"instruction": "Answer.", "input": chat, "output": "4"})
    assert problem == "`input` holds messages, and only text is joined to a prompt"
    row = {"prompt": "2+2?", "response": "4", "system": chat}
    assert refusal(row) == "`system` must hold one system message"
    row["system"] = [{"role": "system", "content": "Be brief."}]
    assert one(row) == [("system", "Be brief."), *SUM]


def test_system_messages_in_parts():
    row = {"system": [{"text": "Be brief."}], "messages": [user("2+2?"), assistant("4")]}
    assert one(row) == [("system", "Be brief."), *SUM]


@pytest.mark.parametrize(
    "text",
    [
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>",
        "### Human: Hi\n### Assistant: Hello",
        "[INST] Hi [/INST] Hello",
    ],
)
def test_one_written_out_text(text):
    expected = "is a conversation written out with turn marks: give its turns as `messages`"
    assert refusal({"text": text}) == f"`text` {expected}, without the marks, and the model's " + (
        "template writes its own"
    )
    assert expected in refusal({"chosen": text, "rejected": text}, preference="chosen")
    assert refusal({"text": "Once."}) == "no known schema has the keys 'text'"


def test_conversations_from_parquet_through_pandas(tmp_path):
    parts = [{"type": "text", "text": "2+2?"}]
    rows = [{"messages": [user(parts), assistant([{"type": "text", "text": "4"}])]}] * 2
    frame = pd.read_parquet(write_table(tmp_path, rows))
    assert isinstance(frame["messages"][0], np.ndarray)
    assert read(frame)[0] == read(tmp_path / "rows.parquet")[0] == [SUM, SUM]
    assert read([{"messages": frame["messages"][0]}])[0] == [SUM]


def test_a_conversation_beside_text_columns():
    chat = [user("2+2?"), assistant("4")]
    rows = [
        {"messages": chat, "prompt": "x", "response": "y"},
        {"messages": chat, "prompt": None, "response": None},
        {"messages": None, "prompt": "2+2?", "response": "4"},
        {"messages": [], "prompt": "2+2?", "response": "4"},
    ]
    assert read(rows) == ([SUM] * 4, {"`prompt`": 1, "`response`": 1})
    assert read(pd.DataFrame(rows[:3]))[0] == [SUM] * 3
    turns, unused = read([{"messages": chat, "prompt": "2+2?", "prompt_id": "x"}])
    assert turns == [SUM] and unused == {"`prompt`": 1, "`prompt_id`": 1}


def test_csv_columns_that_hold_a_structure(tmp_path):
    chat = [user("It's 2+2?"), assistant('4, "exactly"')]
    expected = [("user", "It's 2+2?"), ("assistant", '4, "exactly"')]
    path = tmp_path / "rows.csv"
    for written in (json.dumps(chat), repr(chat), json.dumps({"messages": chat})):
        pd.DataFrame({"messages": [written]}).to_csv(path, index=False)
        assert read(path)[0] == [expected]
    pd.DataFrame({"prompt": ["It's 2+2?"], "completion": [chat[1:]]}).to_csv(path, index=False)
    assert read(path)[0] == [expected]
    frame = pd.read_parquet(write_table(tmp_path, [{"messages": chat}]))
    frame.to_csv(path, index=False)  # NumPy shows the array, without commas
    source = read_pairs(path)
    assert list(source) == []
    assert source.problems[0].text.startswith("`messages` is broken JSON")
    assert "NumPy wrote it as it shows an array" in source.problems[0].text
    frame.rename(columns={"messages": "completion"}).assign(prompt="x").to_csv(path, index=False)
    assert list(read_pairs(path)) == []


def test_no_code_of_a_cell_is_run_and_its_size_is_bounded(tmp_path):
    for cell in ("[__import__('os')]", "[" * 100_000, "[" + "-" * 100_000 + "1]", "[{'role': x}]"):
        assert "is broken JSON" in refusal({"messages": cell})


def test_tab_separated_files_have_no_quoting(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('prompt\tresponse\n"Hi," she said.\t"open\n"quoted"\tx\r\na""b\ty\nc\n')
    source = read_pairs(path)
    assert [(pair.prompt, pair.response) for pair in source] == [
        ('"Hi," she said.', '"open'),
        ('"quoted"', "x"),
        ('a""b', "y"),
    ]
    assert [str(problem) for problem in source.problems] == [
        "row 4 (line 5): 1 field, but the first line names 2 columns"
    ]


def test_unknown_forms_name_the_nearest_known_one():
    assert "; the nearest is prompt, response" in refusal({"promt": "a", "respons": "b"})
    assert "; the nearest is messages: a list of" in refusal({"mesages": []})
    problem = refusal({"messages": [{"rol": "user", "content": "a"}]})
    assert problem == (
        "message 1 of `messages` has neither role and content nor from and value "
        "(its keys: 'rol', 'content'); did you mean 'role' by 'rol'?"
    )


def test_two_keys_of_one_thing_that_disagree():
    chat = [{"role": "user", "content": "a", "value": "b"}, assistant("c")]
    assert refusal(chat) == (
        "message 1 of the row has `content` and `value`, and they say different things"
    )
    chat[0]["value"] = "a"
    assert one(chat) == [("user", "a"), ("assistant", "c")]


def test_answers_stay_structures_where_they_are_no_conversation():
    mail = {"from": "a@example.com", "to": "b@example.com", "text": "Hi"}
    assert one({"prompt": "x", "response": mail})[1][1] == json.dumps(mail)
    tags = [{"name": "x", "type": "text"}]
    assert one({"prompt": "x", "response": tags})[1][1] == json.dumps(tags)
    assert one({"prompt": "x", "response": '[{"role_of": "y"}]'})[1][1] == '[{"role_of": "y"}]'


# Any nesting of known keys, types and dialects.

WORDS = [f"word{i}word" for i in range(40)]
word = st.sampled_from(WORDS)
blank = st.sampled_from([None, "", [], {}, float("nan"), " "])
odd = st.one_of(blank, st.booleans(), st.integers(0, 3), st.just(b"\xff"), st.just("half \ud800"))
part_keys = ["type", "text", "value", "image_url", "thinking", "thought", "functionCall", "extra"]
part = st.one_of(
    word,
    st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text"]), "text": word}),
    st.fixed_dictionaries({"text": word | odd}),
    st.dictionaries(st.sampled_from(part_keys), word | odd, max_size=3),
)
content = st.integers(0, 19).flatmap(
    lambda n: word if n < 14 else st.lists(part, max_size=3) if n < 17 else part if n < 19 else odd
)
message_keys = [
    "name", "weight", "train", "tool_calls", "reasoning_content", "images", "label", "extra", "id",
]  # fmt: skip


@st.composite
def message(draw, role=None):
    names = draw(st.sampled_from([("role", "content"), ("from", "value"), ("role", "parts")]))
    role = draw(st.sampled_from([*ROLES, "tool", "critic"])) if role is None else role
    role = draw(st.sampled_from([role, role, role.upper()]))
    extra = {}
    if draw(st.integers(0, 5)) == 0:
        extra = draw(st.dictionaries(st.sampled_from(message_keys), word | odd, max_size=2))
    return {names[0]: role, names[1]: draw(content), **extra}


@st.composite
def conversation(draw):
    if draw(st.integers(0, 4)) == 0:
        return draw(st.lists(message(), max_size=4))
    count = draw(st.integers(1, 2))
    turns = [draw(message(role)) for _ in range(count) for role in ("user", "assistant")]
    form = draw(st.sampled_from(["list"] * 5 + ["json", "repr", "array", "odd"]))
    if form == "json":
        return json.dumps(turns, default=bytes.hex)
    if form == "repr":
        return repr(turns)
    return np.array(turns, object) if form == "array" else draw(odd) if form == "odd" else turns


schema_keys = sorted({key for schema in SCHEMAS for key in (*schema.keys, *schema.below)})
row_keys = [
    *schema_keys, *PREFERRED_KEYS[:2], "rejected", "system", "systemInstruction", "system_prompt",
    "label", "score", "tools", "images", "reasoning", "weight", "history", "id", "extra", "source",
]  # fmt: skip


@st.composite
def row(draw):
    schema = draw(st.sampled_from(SCHEMAS))
    found = {}
    for key in schema.keys:
        whole = schema.response is None or draw(st.integers(0, 5)) == 0
        found[key] = draw(conversation() if whole else content)
    more = st.dictionaries(st.sampled_from(row_keys), word | odd | conversation(), max_size=2)
    if draw(st.integers(0, 2)) == 0:
        found |= draw(more)
    options = {"reasoning": draw(st.sampled_from(["refuse", "keep", "drop"]))}
    if draw(st.integers(0, 3)) == 0:
        options["preference"] = "chosen"
        found["chosen"] = draw(conversation() | word)
        found["rejected"] = draw(word | blank)
        found.pop(schema.response, None)
    if draw(st.integers(0, 9)) == 0:
        found = {key.upper(): value for key, value in found.items()}
    return found, options


def words_in(value):
    """Every word of the input, however it is nested or written."""
    if isinstance(value, dict):
        return [found for part in value.values() for found in words_in(part)]
    if isinstance(value, (list, tuple, np.ndarray)):
        return [found for part in value for found in words_in(part)]
    return re.findall(r"word\d+word", value) if isinstance(value, str) else []


REPR = re.compile(r"None|nan|\[\]|\{\}|array\(|\\x|True|False")


def check_row(row, options):
    """Read one row as a test says, and return the pair, if it is one."""
    source = read_pairs([row], **options)
    pairs = list(source)
    if not pairs:
        assert source.problems
        for problem in source.problems:
            assert problem.row == 1 and problem.text
            keys = [str(key) for key in row]
            named = any(key in problem.text for key in keys) or "the row is empty" in problem.text
            assert named or "preferred" in problem.text, problem.text
        return None
    (pair,) = pairs
    given = words_in(row)
    told = sum(source.unused.values())
    for message in pair.messages:
        text = message.content
        # An answer that is a structure, written as JSON as promised, after reasoning that is kept.
        structured = text[:1] in "[{" or text.rpartition("\n\n")[2][:1] in "[{"
        assert structured or not REPR.search(text), text
        if structured:
            json.loads(text)
    used = [found for m in pair.messages for found in re.findall(r"word\d+word", m.written)]
    assert used and set(used) <= set(given)
    if set(given) - set(used):
        assert told, (given, used, source.unused)
    return pair


@given(case=row())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_row_is_a_pair_of_its_text_or_a_problem_that_names_it(case):
    check_row(*case)


@pytest.mark.slow
@given(case=row())
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_rows_are_pairs_of_their_text_or_problems_that_name_them(case):
    check_row(*case)
