"""Pairs: every source gives the same rows, and every problem is named with its row and line."""

import collections
import csv
import gc
import gzip
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow as tf
from _paths import ROOT
from _shared_data import shared_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_keras_tune.errors import PairsError, PairsWarning
from gemma_keras_tune.pairs import (
    Message,
    Pair,
    PairChecks,
    PairSource,
    read_pairs,
    split_pairs,
)
from gemma_keras_tune.pairs.schemas import SCHEMAS, known_schemas
from gemma_keras_tune.pairs.sources import text as text_files

PAIRS = [
    ("What is 2 + 2?", "4"),
    ('Größe, 2 Zeilen\nund "Anführung"', "ça, va 😀\r\n;\t"),
    ("x", "y"),
]


def texts(source, **options):
    """The (prompt, response) texts of a source without problems."""
    source = read_pairs(source, **options)
    pairs = list(source)
    source.raise_for_problems()
    assert [pair.row for pair in pairs] == list(range(1, len(pairs) + 1))
    return [(pair.prompt, pair.response) for pair in pairs]


def problems(source, **options):
    source = read_pairs(source, **options)
    collections.deque(source, maxlen=0)
    return [str(problem) for problem in source.problems]


def error(source, **options):
    with pytest.raises(PairsError) as caught:
        read_pairs(source, **options).raise_for_problems()
    return str(caught.value)


def dicts(rows):
    return [{"prompt": prompt, "response": response} for prompt, response in rows]


def columns(rows):
    return {
        "prompt": [prompt for prompt, _ in rows],
        "response": [response for _, response in rows],
    }


def write_csv(path, rows, delimiter=",", header=("prompt", "response")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def write_tsv(path, rows, header=("prompt", "response")):
    lines = ["\t".join(row) + "\n" for row in [header, *rows]]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    return path


def write_lines(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def write_json(path, rows, **options):
    path.write_text(json.dumps(rows, **options), encoding="utf-8")
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_folder(path, rows):
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    for number, row in enumerate(rows, 1):
        write_json(path / f"record_{number}.json", row, indent=1)
    (path / "README.md").write_text("Not a record.")
    return path


def every_source(rows, folder):
    """The same rows in every form, by name."""
    records = dicts(rows)
    yield "tuples", rows
    yield "lists", [list(row) for row in rows]
    yield "dicts", records
    yield "dictionary of columns", columns(rows)
    yield "generator", (row for row in records)
    yield "function", lambda: iter(records)
    yield (
        "KerasHub",
        {
            "prompts": [prompt for prompt, _ in rows],
            "responses": [response for _, response in rows],
        },
    )
    yield "DataFrame", pd.DataFrame(records)
    yield "Arrow table", pa.Table.from_pylist(records)
    yield "jsonl", write_lines(folder / "rows.jsonl", records)
    yield "jsonl of lists", write_lines(folder / "lists.jsonl", [list(row) for row in rows])
    yield "jsonl.gz", write_lines(folder / "rows.jsonl.gz", records, gzip.open)
    yield "json", write_json(folder / "rows.json", records)
    yield "json, indented", write_json(folder / "indented.json", records, indent=2)
    yield "json of columns", write_json(folder / "columns.json", columns(rows))
    yield "json under a name", write_json(folder / "data.json", {"data": records})
    yield "json lines as json", write_lines(folder / "lines.json", records)
    yield "json as jsonl", write_json(folder / "array.jsonl", records, indent=2)
    yield "csv", write_csv(folder / "rows.csv", rows)
    yield "csv with semicolons", write_csv(folder / "semicolons.csv", rows, ";")
    if not re.search(r"[\t\r\n]", "".join(itertools.chain(*rows))):
        yield "tsv", str(write_tsv(folder / "rows.tsv", rows))
    yield "parquet", write_parquet(folder / "rows.parquet", records)
    yield "folder", write_folder(folder / "records", records)


def tensorflow_sources(rows):
    data = tf.data.Dataset.from_tensor_slices(columns(rows))
    yield "tf.data", data
    yield "tf.data, batched", data.batch(2)
    yield "tf.data of tuples", tf.data.Dataset.from_tensor_slices(tuple(columns(rows).values()))
    yield (
        "tf.data, more columns",
        data.map(lambda row: {**row, "id": 1, "vector": tf.zeros([3])}),
    )


field = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('\n\r\t,;"\\ '), min_size=1
).filter(lambda text: not text.isspace())


@pytest.mark.slow
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.tuples(field, field), min_size=1, max_size=5))
def test_every_source_gives_the_same_pairs(rows, tmp_path):
    for name, source in every_source(rows, tmp_path):
        assert texts(source) == rows, name


def test_tensorflow_datasets_give_the_same_pairs():
    for name, source in tensorflow_sources(PAIRS):
        assert texts(source) == PAIRS, name


@pytest.mark.slow
def test_hugging_face_datasets_give_the_same_pairs():
    import datasets

    dataset = datasets.Dataset.from_list(dicts(PAIRS))
    assert texts(dataset) == PAIRS
    assert texts(dataset.with_format("numpy")) == PAIRS
    assert texts(dataset.to_iterable_dataset()) == PAIRS
    splits = datasets.DatasetDict({"test": dataset.select([0]), "train": dataset})
    assert texts(splits) == PAIRS
    assert texts(splits, split="test") == PAIRS[:1]


@pytest.mark.slow
def test_a_tfds_builder_and_its_folder(tmp_path):
    import tensorflow_datasets as tfds

    class TinyAnswers(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"question": text, "answer": text}),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

        def _generate_examples(self, count=0):
            for i in range(count):
                yield i, {"question": f"q{i}", "answer": f"a{i}"}

    builder = TinyAnswers(data_dir=tmp_path, file_format="tfrecord")
    rows = sorted(texts(builder))
    assert rows == [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]
    assert texts(builder, split="test") == [("q0", "a0")]
    assert len(texts(builder, split="train[:2]")) == 2
    assert sorted(texts(tmp_path / "tiny_answers" / "1.0.0")) == rows
    message = error(builder, split="validation")
    assert "'train', 'test'" in message and "'validation'" in message


def test_a_name_that_is_neither_a_file_nor_in_tfds():
    if not hasattr(pytest.importorskip("tensorflow_datasets"), "builder"):
        pytest.skip("tensorflow_datasets does not start beside the installed protobuf")
    message = error("no_such_data_anywhere")
    assert "'no_such_data_anywhere' is neither a file nor the name of a TFDS dataset" in message


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input_text": "a", "output_text": "b"}, "a"),
        ({"prompt": "a", "response": "b"}, "a"),
        ({"prompts": "a", "responses": "b"}, "a"),
        ({"input": "a", "output": "b"}, "a"),
        ({"prompt": "a", "completion": "b"}, "a"),
        ({"question": "a", "answer": "b", "id": 3}, "a"),
        ({"instruction": "a", "output": "b"}, "a"),
        ({"instruction": "a", "response": "b"}, "a"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\n\nc"),
        ({"instruction": "a", "input": "", "output": "b"}, "a"),
        ({"instruction": "a", "input": None, "response": "b"}, "a"),
        ({"instruction": "a", "context": "c", "response": "b"}, "a\n\nc"),
        ({" Prompt": "a", "RESPONSE ": "b"}, "a"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "a",
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a"),
        ([{"role": "user", "content": "a"}, {"role": "model", "content": "b"}], "a"),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            "a",
        ),
    ],
)
def test_known_schemas(record, expected):
    assert texts([record]) == [(expected, "b")]


def test_the_guide_shows_the_table_of_schemas():
    guide = (ROOT / "docs" / "data.md").read_text("utf-8")
    for line in known_schemas().splitlines():
        assert line.strip() in guide
    assert len(known_schemas().splitlines()) == len(SCHEMAS) + 1


def test_own_column_names():
    rows = [{"text": "a", "emoji": "b", "prompt": "no", "response": "no", "rules": "s"}]
    names = {"prompt_column": "text", "response_column": "emoji"}
    assert texts(rows, **names) == [("a", "b")]
    assert texts(pd.DataFrame(rows), **names) == [("a", "b")]
    (pair,) = read_pairs(rows, **names, system_column="rules")
    assert [m.role for m in pair.messages] == ["system", "user", "assistant"]
    (pair,) = read_pairs(rows, system_column="rules")
    assert pair.messages[0].content == "s" and pair.prompt == "no"
    chat = [{"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert texts(chat, prompt_column="chat") == [("a", "b")]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
CHAT_MESSAGES = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "Bye"),
    Message("assistant", "Ciao"),
)


def test_conversations_through_every_source(tmp_path):
    sharegpt = [{"from": turn["role"], "value": turn["content"]} for turn in CHAT]
    rows = [{"messages": CHAT}, {"messages": CHAT}]
    sources = {
        "dicts": rows,
        "sharegpt": [{"conversations": sharegpt}] * 2,
        "system beside": [{"system_prompt": "Be brief.", "messages": CHAT[1:]}] * 2,
        "list of conversations": [CHAT, CHAT],
        "messages": [CHAT_MESSAGES, CHAT_MESSAGES],
        "one record": {"messages": CHAT},
        "column": {"messages": [CHAT, CHAT]},
        "DataFrame": pd.DataFrame(rows),
        "parquet frame": pd.read_parquet(write_parquet(tmp_path / "frame.parquet", rows)),
        "jsonl": write_lines(tmp_path / "a.jsonl", rows),
        "json": write_json(tmp_path / "a.json", rows, indent=1),
        "one in json": write_json(tmp_path / "b.json", rows[0], indent=1),
        "parquet": write_parquet(tmp_path / "a.parquet", rows),
        "csv": write_csv(tmp_path / "a.csv", [[json.dumps(CHAT)]] * 2, header=["messages"]),
        "tf.data": tf.data.Dataset.from_tensors(
            {"messages": {key: [turn[key] for turn in CHAT] for key in ("role", "content")}}
        ),
    }
    for name, source in sources.items():
        source = read_pairs(source)
        found = list(source)
        source.raise_for_problems()
        assert found and all(pair.messages == CHAT_MESSAGES for pair in found), name
    assert found[0].prompt_messages == CHAT_MESSAGES[:-1]
    assert (found[0].prompt, found[0].response) == ("Bye", "Ciao")


def test_content_in_typed_parts_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert texts([[{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]]) == [
        ("ab", "c")
    ]
    image = [{"type": "image", "url": "x"}]
    assert problems([[{"role": "user", "content": image}, {"role": "model", "content": "c"}]]) == [
        "row 1: message 1 of the row (user) has parts that are no text: image"
    ]


def test_structured_answers_are_written_as_json(tmp_path):
    answer = {"type": "order", "items": [{"name": "Brötchen", "quantity": 2, "note": None}]}
    rows = [{"prompt": "a", "response": answer}, {"prompt": "b", "response": ["x", 1.5, True]}]
    expected = [
        ("a", '{"type": "order", "items": [{"name": "Brötchen", "quantity": 2, "note": null}]}'),
        ("b", '["x", 1.5, true]'),
    ]
    assert texts(rows) == expected
    assert texts(pd.DataFrame(rows)) == expected
    assert texts(write_lines(tmp_path / "a.jsonl", rows)) == expected
    assert texts(write_json(tmp_path / "a.json", rows)) == expected
    numbers = [("a", {"n": np.int64(3), "v": np.array([1.5, 2.0])})]
    assert texts(numbers) == [("a", '{"n": 3, "v": [1.5, 2.0]}')]
    not_a_number, not_json = problems([("a", {"n": float("nan")}), ("a", {"n": {1, 2}})])
    assert not_a_number.startswith("row 1: the response cannot be written as JSON: Out of range")
    assert not_json == "row 2: the response cannot be written as JSON: it holds a set"


@pytest.mark.slow
def test_real_data():
    assert len(texts(shared_data("gsm8k/train.jsonl"))) == 7473
    assert len(texts(shared_data("gsm8k"), split="test")) == 1319
    csv_file = shared_data("emoji/text_to_emoji.csv")
    emoji = texts(csv_file, prompt_column="text", response_column="emoji")
    assert len(emoji) == 2529 and emoji[0] == ("3D printing a new creation", "🖨️💡✨🔧")
    emails = texts(shared_data("business_email"))
    assert len(emails) == 8
    assert all("items" in json.loads(answer) for _, answer in emails)


# Problems.


def test_all_problems_are_reported_at_once_with_their_rows():
    rows = [
        ("fine", "fine"),
        ("", None),
        {"prompt": 1, "response": float("nan")},
        {"prompt": b"\xff", "response": " \n"},
        {"text": "a", "label": 3},
        "zzz",
        ("a", "b", "c"),
        {"prompt": "a", "response": "b"},
        {"prompt": "only"},
        ("half \ud800", pd.NA),
        {},
        None,
        {"prompt": ["a"], "response": "b"},
    ]
    source = read_pairs(rows)
    assert [(pair.prompt, pair.row) for pair in source] == [("fine", 1), ("a", 8)]
    with pytest.raises(PairsError) as caught:
        source.raise_for_problems()
    assert caught.value.problems == (
        "row 2: the prompt is empty",
        "row 2: the response is missing (its value is None)",
        "row 3: `prompt` must be text, got an int: 1",
        "row 3: `response` is missing (its value is nan)",
        "row 4: `prompt` is not UTF-8: byte 0xff at byte 1",
        "row 4: `response` is empty",
        "row 5: no known schema has the keys 'text', 'label'",
        "row 6: a str, expected (prompt, response) or a dictionary: 'zzz'",
        "row 7: a tuple of 3, expected (prompt, response)",
        "row 9: `response` is missing (keys: 'prompt')",
        "row 10: the prompt holds half a surrogate pair at character 6",
        "row 10: the response is missing (its value is <NA>)",
        "row 11: the row is empty",
        "row 12: a NoneType, expected (prompt, response) or a dictionary: None",
        "row 13: `prompt` must be text, got a list: ['a']",
    )
    message = str(caught.value)
    assert message.startswith("The list: 11 rows cannot be trained on.\n  - row 2: ")
    assert known_schemas() in message and "prompt_column=…" in message


def test_unknown_and_ambiguous_keys():
    assert problems([{"prompt": "a"}]) == [
        "row 1: no known schema has the keys 'prompt'; beside 'prompt' it would need 'response' or "
        "'completion'"
    ]
    (problem,) = problems([{"prompt": "a", "response": "b", "completion": "c"}])
    assert "fit more than one schema: prompt, response / prompt, completion" in problem
    message = error(pd.DataFrame([{"text": "a", "label": "b"}]))
    assert message.startswith("The columns of the DataFrame make no pair.\n  - no known schema has")
    assert known_schemas() in message
    message = error([{"text": "a", "emoji": "b"}], prompt_column="txt", response_column="emoji")
    assert "row 1: `txt` is missing (keys: 'text', 'emoji'); did you mean 'text'?" in message
    assert "more than one column named 'prompt'" in error(
        pd.DataFrame([["a", "b", "c"]], columns=["prompt", "response", "prompt"])
    )


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("a", "the assistant speaks first"),
        ("au", "the assistant speaks first"),
        ("su", "the last turn is the user's, with no answer to learn"),
        ("uau", "the last turn is the user's, with no answer to learn"),
        ("uua", "message 2 is a second user turn in a row"),
        ("suaa", "message 4 is a second assistant turn in a row"),
        ("usa", "message 2 is a system message, which may only come first, once"),
        ("ssua", "message 2 is a system message, which may only come first, once"),
        ("s", "there is no user message"),
    ],
)
def test_turns_in_an_impossible_order(roles, expected):
    names = {"s": "system", "u": "user", "a": "assistant"}
    turns = [{"role": names[role], "content": "x"} for role in roles]
    written = ", ".join(turn["role"] for turn in turns)
    assert problems([{"messages": turns}]) == [
        f"row 1: turns of `messages` in an impossible order: {expected} (roles: {written})"
    ]


def test_broken_messages():
    rows = [
        {"messages": []},
        {"messages": None},
        {"messages": "hello"},
        {"messages": "[{"},
        {"messages": ["hi"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "critic", "content": "x"}]},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": None}]},
    ]
    found = problems(rows)
    assert found[:3] == [
        "row 1: `messages` is empty",
        "row 2: `messages` is missing (its value is None)",
        "row 3: `messages` must be a list of messages, got a str: 'hello'",
    ]
    assert found[3].startswith("row 4: `messages` is broken JSON: ")
    assert found[4:] == [
        "row 5: message 1 of `messages` must be a dictionary, got a str: 'hi'",
        "row 6: message 1 of `messages` has neither role and content nor from and value",
        "row 7: message 1 of `messages` has the unknown role 'critic' (known: system, developer, "
        "user, human, prompter, assistant, model, gpt, bot, ai)",
        "row 8: message 1 of `messages` (user) is empty",
        "row 8: message 2 of `messages` (assistant) is missing (its value is None)",
    ]


def test_json_lines_problems_name_row_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "response": "b"}\n'
        b"\n"
        b'{"prompt": "a", "response": \n'
        b'{"prompt": "\xe9", "response": "b"}\n'
        b'{"prompt": "a", "response": "\\ud83d"}\r\n'
        b'  {"prompt": "c", "response": "d"}  \n'
        b'{"prompt": "a", "response": "b"} extra\n'
        b'{"prompt": "e", "response": "f"}'
    )
    source = read_pairs(path)
    assert [(p.prompt, p.row, p.line) for p in source] == [("a", 1, 1), ("c", 5, 6), ("e", 7, 8)]
    assert [str(problem) for problem in source.problems] == [
        "row 2 (line 3): broken JSON at column 30: Expecting value",
        "row 3 (line 4): byte 0xe9 is not UTF-8 (byte 13 of the line)",
        "row 4 (line 5): `response` holds half a surrogate pair at character 1",
        "row 6 (line 7): broken JSON at column 34: Extra data",
    ]


def test_json_array_problems_name_row_and_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(
        b'[\n  {"prompt": "a",\n   "response": "b"},\n  {"prompt": "\xe9", "response": "b"},\n'
        b'  {"prompt": "c"\n   "response": "d"},\n  {"prompt": "e", "response": "f"}\n]'
    )
    source = read_pairs(path)
    assert [(pair.prompt, pair.row, pair.line) for pair in source] == [("a", 1, 2)]
    assert [str(problem) for problem in source.problems] == [
        "row 2 (line 4): `prompt` is not UTF-8: byte 0xe9 at character 1",
        "row 3 (line 5): broken JSON in line 6: Expecting ',' delimiter; the rest cannot be read",
    ]
    # What is lost after row 3 cannot be counted, so leaving rows out does not help here.
    assert "what comes after such a row in it was not read" in error(path, on_error="skip")
    path.write_text('[["a", "b"], ["c", "d"')
    assert problems(path) == [
        "row 2 (line 1): broken JSON in line 1: Expecting ',' delimiter; the rest cannot be read"
    ]
    path.write_text('[["a", "b"],\n')
    assert problems(path) == ["row 2 (line 2): the file ends before the array does"]
    path.write_text('[["a", "b"]]\n[]')
    assert problems(path) == ["row 2 (line 1): there is text after the end of the array"]
    path.write_text('{"prompt": ')
    assert "the file is not JSON (a list of records, one record, or a record a line): " in error(
        path
    )
    assert "Expecting value: line 1 column 12" in error(path)


@given(data=st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_json_arrays_are_read_across_chunks(data, tmp_path, monkeypatch):
    chunk = data.draw(st.integers(1, 40), label="chunk")
    monkeypatch.setattr(text_files, "_CHUNK_CHARACTERS", chunk)
    rows = data.draw(st.lists(st.tuples(field, field), min_size=1, max_size=6))
    indent = data.draw(st.sampled_from([None, 0, 2]))
    path = write_json(tmp_path / "rows.json", dicts(rows), indent=indent, ensure_ascii=False)
    source = read_pairs(path)
    found = list(source)
    assert [(pair.prompt, pair.response) for pair in found] == rows
    per_row = {None: 0, 0: 4, 2: 4}[indent]
    assert [pair.line for pair in found] == [
        1 + (indent is not None) + per_row * i for i in range(len(rows))
    ]


@pytest.mark.parametrize("chunk", range(1, 12))
def test_a_number_is_not_cut_at_the_end_of_a_chunk(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK_CHARACTERS", chunk)
    (tmp_path / "rows.json").write_text("[1234567]")
    assert problems(tmp_path / "rows.json") == [
        "row 1 (line 1): an int, expected (prompt, response) or a dictionary: 1234567"
    ]


def test_csv_lines_are_counted_through_quoted_newlines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt,response\r\n"
        b'"a\nb\nc",d\r\n'
        b"\r\n"
        b"e\r\n"
        b"f,\r\n"
        b"g,h,i\r\n"
        b'"j\n\xff",k\r\n'
        b'"l"m,n\r\n'
        b"o,p\r\n"
        b'"q,r\r\n'
        b"s,t\r\n"
    )
    source = read_pairs(path)
    assert [(p.prompt, p.row, p.line) for p in source] == [("a\nb\nc", 1, 2), ("o", 7, 12)]
    assert [str(problem) for problem in source.problems] == [
        "row 2 (line 6): 1 field, but the first line names 2 columns",
        "row 3 (line 7): `response` is empty",
        "row 4 (line 8): 3 fields, but the first line names 2 columns",
        "row 5 (line 10): byte 0xff is not UTF-8 (byte 1 of the line)",
        "row 6 (line 11): broken CSV: ',' expected after '\"'",
        "row 8 (line 13): the quote that opens here is never closed",
    ]


def test_rows_behind_an_open_quote_are_never_left_out_in_silence(tmp_path):
    path = tmp_path / "rows.csv"
    for broken in (b'"c,d', b'"c\xff,d'):
        path.write_bytes(b"prompt,response\na,b\n" + broken + b"\ne,f\ng,h\n")
        message = error(path, on_error="skip")
        assert "row 2 (line 3): " in message and "was not read" in message


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_files_are_closed_when_reading_ends_early(tmp_path):
    whole = {"a.csv": "prompt,response\na,b\nc,d\n", "a.json": '[["a", "b"],\n["c", "d"]]'}
    cut = {"b.csv": 'prompt,response\na,b\n"c,d\n', "b.json": '[["a", "b"],\n["c", '}
    for name, text in {**whole, **cut}.items():
        (tmp_path / name).write_text(text)
        source = read_pairs(tmp_path / name)
        next(iter(source))
        list(source)
        gc.collect()
    assert source.problems


def test_csv_takes_very_long_fields(tmp_path):
    long = "word " * 100_000
    assert texts(write_csv(tmp_path / "rows.csv", [(long, "b")])) == [(long, "b")]


def test_undecodable_bytes_in_parquet(tmp_path):
    bad = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": bad, "response": ["b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert problems(tmp_path / "rows.parquet") == [
        "row 2: `prompt` is not UTF-8: byte 0xff at byte 1"
    ]


def test_folder_problems_name_the_file(tmp_path):
    write_folder(tmp_path / "records", dicts([("a", "b")] * 10 + [("", "c")]))
    assert problems(tmp_path / "records") == ["row 11 (record_11.json): `prompt` is empty"]


def test_every_broken_file_of_a_folder_is_named(tmp_path):
    folder = write_folder(tmp_path / "records", dicts([("a", "b"), ("", "c"), ("d", "e")]))
    (folder / "record_4.json").write_text('{"prompt": ')
    (folder / "record_5.json").write_bytes(b'{"prompt": "\xff"}')
    found = problems(folder)
    assert found[0] == "row 2 (record_2.json): `prompt` is empty"
    assert found[1].startswith("row 4 (record_4.json): the file is not JSON")
    assert found[2] == "row 5 (record_5.json): the file is not UTF-8: byte 0xff in line 1"
    source = read_pairs(folder, on_error="skip")
    assert [pair.prompt for pair in source] == ["a", "d"]
    with pytest.warns(PairsWarning, match="3 of 5 rows are left out"):
        source.raise_for_problems()
    # How many rows such a file held, nobody knows.
    (folder / "more.parquet").write_bytes(b"PAR1")
    message = error(folder, on_error="skip")
    assert "(more.parquet): 'more.parquet' is not a whole Parquet file" in message
    assert "row 5 (record_4.json)" in message


def test_files_that_cannot_be_opened(tmp_path):
    write_lines(tmp_path / "train_rows.jsonl", dicts(PAIRS))
    message = error(tmp_path / "trian_rows.jsonl")
    assert message == (
        f"'{tmp_path}/trian_rows.jsonl' does not exist.\n"
        f"Did you mean '{tmp_path}/train_rows.jsonl'?"
    )
    assert "There is no folder" in error(tmp_path / "nowhere" / "rows.csv")
    assert "comes close" in error(str(tmp_path / "zzz.csv"))
    assert "not read from a URL" in error("https://example.com/rows.csv")
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert "must be one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet" in error(
        tmp_path / "rows.xlsx"
    )
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    assert "'rows.parquet' is not a whole Parquet file" in error(tmp_path / "rows.parquet")
    (tmp_path / "wide.csv").write_text("prompt,response\na,b\n", encoding="utf-16")
    assert "written in UTF-16" in error(tmp_path / "wide.csv")
    (tmp_path / "empty").mkdir()
    assert "holds no file that pairs are read from" in error(tmp_path / "empty")
    assert "`split='test'` was asked for, but the file" in error(
        tmp_path / "train_rows.jsonl", split="test"
    )
    zipped = write_lines(tmp_path / "cut.jsonl.gz", dicts(PAIRS * 200), gzip.open)
    zipped.write_bytes(zipped.read_bytes()[:-20])
    assert "after this row the file cannot be read" in error(zipped, on_error="skip")


def test_splits_of_a_folder(tmp_path):
    write_lines(tmp_path / "train-00000.jsonl", dicts([("a", "b")]))
    write_lines(tmp_path / "train-00001.jsonl", dicts([("c", "d")]))
    write_lines(tmp_path / "test.jsonl", dicts([("e", "f")]))
    assert texts(tmp_path) == [("a", "b"), ("c", "d")]
    assert texts(tmp_path, split="test") == [("e", "f")]
    assert "has the splits 'test', 'train' and none is named 'dev'" in error(tmp_path, split="dev")


@pytest.mark.parametrize(
    ("files", "split"),
    [
        (["dev_order.json", "order_2.json", "order_3.json"], "dev"),
        (["train.jsonl", "more.jsonl"], "train"),
    ],
)
def test_a_folder_where_only_some_files_are_named_like_a_split(files, split, tmp_path):
    for name in files:
        write_lines(tmp_path / name, dicts([(name, "b")]))
    message = error(tmp_path)
    assert (
        f"1 of {len(files)} files in the folder {tmp_path.name} are named like a split" in message
    )
    assert all(repr(name) in message for name in files) and f"`split='{split}'`" in message
    with pytest.warns(PairsWarning) as caught:
        assert texts(tmp_path, split=split) == [(files[0], "b")]
    assert all(repr(name) in str(caught[0].message) for name in files[1:])
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "source", [5, None, b"prompt", object()], ids=["int", "None", "bytes", "object"]
)
def test_what_is_no_source(source):
    assert "Pairs cannot be read from" in error(source)


def test_empty_sources(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_text("")
        assert error(tmp_path / name) == f"{name} has no rows.\nPass at least one pair."
    (tmp_path / "b.csv").write_text("prompt,response\n")
    assert "b.csv has no rows." in error(tmp_path / "b.csv")
    assert "The list has no rows." in error([])
    assert "The DataFrame has no rows." in error(pd.DataFrame({"prompt": [], "response": []}))
    source = read_pairs(iter([]))
    assert list(source) == []
    with pytest.raises(PairsError, match="was this one used before"):
        source.raise_for_problems()


def test_endless_datasets_are_refused():
    data = tf.data.Dataset.from_tensor_slices(columns(PAIRS)).repeat()
    assert "The tf.data.Dataset repeats forever." in error(data)


def test_columns_of_different_length():
    message = error({"prompt": ["a", "b"], "response": ["c"]})
    assert "'prompt': 2 rows" in message and "'response': 1 rows" in message


def test_wrong_arguments():
    message = error(PAIRS, response_column="x", limit=0, on_error="ignore")
    assert "`response_column` needs `prompt_column`" in message
    assert "`limit` must be an integer of at least 1. Received: 0" in message
    assert "`on_error` must be 'raise' or 'skip'. Received: 'ignore'" in message
    message = error(PAIRS, prompt_column=["a"], response_column=3, system_column=b"s")
    assert message.count("must be a name, a string") == 3
    with pytest.raises(PairsError, match="have been opened already"):
        read_pairs(read_pairs(PAIRS), limit=3)


# Reading.


def test_a_generator_is_read_once():
    source = read_pairs(row for row in PAIRS)
    assert len(list(source)) == 3
    source.raise_for_problems()
    with pytest.raises(PairsError, match="gives its rows once") as caught:
        iter(source)
    assert "a function that returns a fresh iterator" in str(caught.value)


def test_a_source_can_be_read_again_and_its_problems_are_of_the_latest_reading():
    rows = [("a", "b"), ("", "c")]
    source = read_pairs(rows)
    for _ in range(2):
        assert len(list(source)) == 1
        assert len(source.problems) == 1
    rows[1] = ("now", "fine")
    with pytest.raises(PairsError, match="row 2: the prompt is empty"):
        source.raise_for_problems()  # Reports the reading above, and does not read again.
    assert len(list(source)) == 2
    source.raise_for_problems()


def test_length_is_told_when_known(tmp_path):
    assert len(read_pairs(PAIRS)) == 3
    assert len(read_pairs(PAIRS, limit=2)) == 2
    assert len(read_pairs(write_parquet(tmp_path / "a.parquet", dicts(PAIRS)))) == 3
    source = read_pairs(write_lines(tmp_path / "a.jsonl", dicts(PAIRS)))
    assert source and repr(source) == "<PairSource a.jsonl>"
    with pytest.raises(TypeError, match="only once it has been read"):
        len(source)
    assert len(list(source)) == len(source) == 3
    assert repr(source) == "<PairSource a.jsonl: 3 rows>"


def test_limit_reads_no_further():
    rows = itertools.count()
    source = read_pairs(((f"q{i}", "a") for i in rows), limit=5)
    assert [pair.row for pair in source] == [1, 2, 3, 4, 5]
    assert next(rows) <= 6


def test_rows_are_left_out_only_when_asked_and_then_listed():
    rows = [("a", "b"), ("", "c"), ("d", None), ("e", "f")]
    source = read_pairs(rows, on_error="skip")
    assert [pair.row for pair in source] == [1, 4]
    with pytest.warns(PairsWarning) as caught:
        source.raise_for_problems()
    assert str(caught[0].message) == (
        "The list: 2 of 4 rows are left out.\n"
        "  - row 2: the prompt is empty\n"
        "  - row 3: the response is missing (its value is None)"
    )
    assert caught[0].filename == __file__
    assert [problem.row for problem in source.skipped] == [2, 3]
    assert read_pairs(rows).skipped == ()
    assert "No row can be trained on." in error(rows[1:3], on_error="skip")


def test_a_problem_of_many_rows_takes_one_line():
    rows = [{"text": "a", "label": "b"}] * 1000
    rows[499:500] = [("a", "b")]
    message = error(rows)
    assert (
        "  - 999 rows, 1-499, 501-1000: no known schema has the keys 'text', 'label'\n" in message
    )
    assert len(problems(rows)) == 999


def test_pairs_keep_their_row_numbers():
    pairs = list(read_pairs([("a", "b"), ("", "x"), ("c", "d")]))
    again = read_pairs(pairs)
    assert list(again) == pairs and [pair.row for pair in again] == [1, 3]
    wrong = Pair((Message("assistant", "a"),), row=7)
    assert "the assistant speaks first" in problems([wrong])[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_large_files_are_read_in_little_memory(kind, tmp_path):
    count = 20_000
    rows = [(f"question {i} " * 20, f"answer {i}") for i in range(count)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_lines(path, dicts(rows))
    elif kind == "json":
        write_json(path, dicts(rows))
    elif kind == "csv":
        write_csv(path, rows)
    else:
        pyarrow.parquet.write_table(pa.table(columns(rows)), path, row_group_size=5000)
    del rows
    source = read_pairs(path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in source) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6, f"{peak / 1e6:.1f} MB"


def test_importing_pairs_imports_no_heavy_package():
    code = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('gemma_keras_tune')\n"
        f"package.__path__ = [{str(pathlib.Path(text_files.__file__).parents[2])!r}]\n"
        "sys.modules['gemma_keras_tune'] = package\n"
        "from gemma_keras_tune.pairs.reader import read_pairs\n"
        "assert len(list(read_pairs([('a', 'b')]))) == 1\n"
        "heavy = {'pandas', 'pyarrow', 'tensorflow', 'tensorflow_datasets', 'datasets', 'keras'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Checks.


def checked(rows, special_tokens=()):
    checks = PairChecks(special_tokens)
    for pair in read_pairs(rows):
        checks.add(pair)
    return checks


def test_checks_name_the_rows():
    rows = [("a", "b"), ("c", "d"), ("a", "b"), ("a", "e"), ("f <end_of_turn> g", "h<eos>")]
    checks = checked(rows, ["<eos>", "<end_of_turn>"])
    assert checks.duplicates == ((1, 3),)
    assert checks.contradictions == ((1, 3, 4),)
    assert checks.special_tokens == {
        "'<end_of_turn>' stands in user text": (5,),
        "'<eos>' stands in assistant text": (5,),
    }
    with pytest.warns(PairsWarning) as caught:
        checks.warn()
    assert str(caught[0].message) == (
        "Some pairs look wrong.\n"
        "  - rows 1, 3 are exact duplicates\n"
        "  - rows 1, 3-4 answer the same prompt differently\n"
        "  - row 5: '<end_of_turn>' stands in user text\n"
        "  - row 5: '<eos>' stands in assistant text"
    )


def test_nothing_found_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked([]).warn()
        checked(PAIRS, ["<eos>"]).warn()


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def test_checks_see_every_turn():
    same_start = checked([chat("a", "b"), chat("a", "b", "c", "d")])
    assert same_start.duplicates == same_start.contradictions == ()
    earlier_turn = checked([chat("a", "b", "c", "d"), chat("a", "x", "c", "d"), chat("e", "f")])
    assert earlier_turn.contradictions == ((1, 2),)
    other_history = checked([chat("a", "b", "c", "d"), chat("x", "b", "c", "y")])
    assert other_history.contradictions == ()
    other_system = checked([chat("a", "b", system="s"), chat("a", "c", system="t"), ("a", "d")])
    assert other_system.contradictions == ()


def test_checks_are_compact():
    checks = PairChecks(["<eos>"])
    count = 100_000
    for row in range(1, count + 1):
        checks.add(Pair((Message("user", f"q{row % 99_999}"), Message("assistant", "a")), row))
    held = (checks._prompts, checks._answers, checks._rows)
    assert sum(part.itemsize * len(part) for part in held) <= 16 * count
    assert checks.duplicates == ((1, 100_000),)
    assert checks.contradictions == ()


# Splitting.


@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=40),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
@settings(deadline=None)
def test_a_split_leaks_no_prompt_and_loses_no_row(prompts, fraction, seed):
    rows = [(f"q{prompt}", f"a{i}") for i, prompt in enumerate(prompts)]
    if len(set(prompts)) < 2:
        with pytest.raises(PairsError, match="same prompt"):
            split_pairs(rows, fraction, seed=seed)
        return
    training, validation = split_pairs(rows, fraction, seed=seed)
    assert sorted(pair.row for pair in [*training, *validation]) == list(range(1, len(rows) + 1))
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in validation}
    assert len(training) and len(validation)
    again = split_pairs(rows, fraction, seed=seed)
    assert [list(side) for side in again] == [list(training), list(validation)]
    largest = max(collections.Counter(prompts).values())
    assert abs(len(validation) - fraction * len(rows)) <= max(largest, 1) + 0.5


def test_a_split_of_a_file_holds_no_rows_and_equals_that_of_a_list(tmp_path):
    rows = [(f"q{i % 30}", f"a{i}") for i in range(100)]
    path = write_lines(tmp_path / "rows.jsonl", dicts(rows))
    sides = split_pairs(path, 0.2, seed=3)
    assert [len(side) for side in sides] == [len(list(side)) for side in sides]
    assert len(sides[1]) == pytest.approx(20, abs=3)
    in_memory = split_pairs(rows, 0.2, seed=3)
    for side, expected in zip(sides, in_memory, strict=True):
        assert [(p.row, p.messages) for p in side] == [(p.row, p.messages) for p in expected]
        assert isinstance(side, PairSource)
    assert sides[1].name == "rows.jsonl [validation]"
    inner = split_pairs(sides[0], 0.5)
    assert sorted(p.row for side in inner for p in side) == [p.row for p in sides[0]]


def test_a_split_takes_few_bytes_of_memory(tmp_path):
    peaks = []
    for count in (1000, 4000):
        rows = dicts((f"question {i}", "a") for i in range(count))
        path = write_lines(tmp_path / "rows.jsonl", rows)
        del rows
        tracemalloc.start()
        try:
            split_pairs(path, 0.1)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 3000 < 130


def test_a_split_reports_problems(tmp_path):
    rows = [("a", "b"), ("", "c"), ("d", "e"), ("f", "g")]
    with pytest.raises(PairsError, match="row 2: the prompt is empty"):
        split_pairs(rows)
    path = write_lines(tmp_path / "rows.jsonl", dicts(rows))
    with pytest.warns(PairsWarning):
        training, validation = split_pairs(read_pairs(path, on_error="skip"))
    assert len(list(training)) == 2 and len(list(validation)) == 1
    assert [problem.row for problem in training.skipped] == [2]
    assert validation.skipped == ()
    for fraction in (0, 1, True, -0.5):
        with pytest.raises(PairsError, match="`fraction` must be between 0 and 1"):
            split_pairs(PAIRS, fraction)


def test_columns_and_splits_of_pandas_whatever_their_labels():
    frame = pd.DataFrame({"q": ["x", "a", "b"], "a": ["y", "c", "d"]}).iloc[1:]
    columns = {"prompt": frame["q"], "response": frame["a"]}
    assert [[m.content for m in p.messages] for p in read_pairs(columns)] == [
        ["a", "c"],
        ["b", "d"],
    ]
    frame = frame.rename(columns={"q": "prompt", "a": "response"})
    assert len(list(read_pairs({"train": frame, "test": frame}))) == 2


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_a_compressed_file_damaged_at_its_beginning(suffix, tmp_path):
    text = json.dumps({"prompt": [str(i) for i in range(9999)], "response": ["y"] * 9999})
    path = tmp_path / f"pairs.{suffix}.gz"
    path.write_bytes(gzip.compress(text.encode())[:2000])
    with pytest.raises(PairsError, match=f"pairs.{suffix}.gz"):
        read_pairs(path).raise_for_problems()
        list(read_pairs(path))
