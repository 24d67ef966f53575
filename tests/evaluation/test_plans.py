"""Test plans: read from every kind of file, written back, and every mistake named with its row."""

import errno
import json
import os

import pytest
import yaml

from gemma_keras_tune.errors import EvaluationError, ExportError
from gemma_keras_tune.evaluation.checks import (
    CallsNoTool,
    CallsTool,
    Contains,
    Exact,
    Function,
    JsonFields,
    JsonSchema,
    Length,
    NotContains,
    Number,
    OneOf,
    Refuses,
    Regex,
    Safe,
    Stops,
)
from gemma_keras_tune.evaluation.plans import Case, TestPlan
from gemma_keras_tune.pairs import Message

TALK = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"))
TOOL = {"name": "f", "description": "F", "parameters": {"properties": {"a": {"type": "array"}}}}
TOOL_TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": [2]}}]},
    {"role": "tool", "content": {"b": [None, 1]}},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "Again"},
]
CHECKS = (
    Exact("Paris", ignore_case=True),
    OneOf(["🍕", "🍝"]),
    Contains(["a", "b"]),
    NotContains("c"),
    Regex(r"^\w+$", full=True),
    JsonSchema({"type": "object"}, fenced=True),
    JsonFields({"a.b": [1, None, True]}),
    Number(1.5, tolerance=0.1, which="only"),
    Length(min=3, unit="words"),
    Refuses(False, languages=["en"], forms=["no way"]),
    Stops(),
    Safe(0.25),
    CallsTool("f", only=True),
    CallsNoTool(False),
)
PLAN = TestPlan(
    [
        Case("one", "Capital of France?", "success", Exact("Paris")),
        Case("two", 'Line 1\nline 2, "quoted"', "boundary", CHECKS),
        Case("three", TALK, "failure", Refuses(), 5, 0.8, ("a", "b"), 2.5, "see, here"),
        Case("vier", "Größe? 😀", "success", Number(4), tags="maß", weight=3),
        Case("four", TOOL_TALK, "success", CallsTool("f", {"a": [1]}, "subset"), tools=[TOOL]),
    ],
    name="all",
)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".yaml", ".yml"])
def test_a_plan_is_read_as_it_was_written(tmp_path, suffix):
    path = PLAN.to_file(tmp_path / f"all{suffix}")
    again = TestPlan.from_file(path)
    assert [case.to_config() for case in again] == [case.to_config() for case in PLAN]
    assert [case.checks for case in again] == [case.checks for case in PLAN]
    assert [case.row for case in again] == [1, 2, 3, 4, 5]
    assert again.name == "all"
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing else is left behind"


def test_a_file_is_not_replaced_unasked(tmp_path):
    path = PLAN.to_file(tmp_path / "plan.jsonl")
    with pytest.raises(EvaluationError, match="already exists"):
        PLAN.to_file(path)
    assert len(TestPlan.from_file(PLAN.to_file(path, overwrite=True))) == 5
    with pytest.raises(EvaluationError, match="A test plan's file ends in"):
        PLAN.to_file(tmp_path / "plan.txt")


def test_a_plan_in_python():
    case = Case("id", "p", "success", Exact("x"), tags="t")
    assert case.checks == (Exact("x"),) and case.tags == ("t",)
    assert case.messages == (Message("user", "p"),)
    talk = Case("talk", list(TALK), "success", [Stops(), Length(5)])
    assert talk.messages == TALK and talk.text == "Bye" and len(talk.checks) == 2
    plan = TestPlan([case, talk])
    assert len(plan) == 2 and list(plan) == [case, talk] and plan.cases[1] is talk


def test_a_plan_in_python_may_be_written_as_in_files():
    def loud(prompt, answer):
        return answer.isupper()

    talk = [{"role": m.role, "content": m.content} for m in TALK]
    one = Case(prompt=talk, kind="success", checks={"exact": "x", "stops": True})
    assert one.prompt == TALK and one.checks == (Exact("x"), Stops()) and one.id == ""
    two = Case(7, "p", "boundary", loud)
    assert two.id == "7" and two.checks == (Function(loud),)
    three = Case("c", "p", "success", [loud, {"length": 5}, Stops()])
    assert three.checks == (Function(loud), Length(5), Stops())
    plan = TestPlan([one, two, Case(prompt="q", kind="failure", checks=Refuses())])
    assert [case.id for case in plan] == ["1", "7", "3"]


def write(tmp_path, *records, name="plan.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def case(**changes):
    usual = {"prompt": "2 + 2?", "kind": "success", "checks": [{"number": 4}]}
    return {k: v for k, v in {**usual, **changes}.items() if v is not ...}


def test_ids_are_the_rows_where_there_are_none(tmp_path):
    plan = TestPlan.from_file(write(tmp_path, case(), case(id="x"), case(id=None), case(id=" ")))
    assert [c.id for c in plan] == ["1", "x", "3", "4"]


IDS = {
    "plan.jsonl": '{"id": 7, "prompt": "p", "kind": "success", "checks": {"stops": true}}\n'
    '{"id": "007", "prompt": "p", "kind": "success", "checks": {"stops": true}}\n'
    '{"prompt": "p", "kind": "success", "checks": {"stops": true}}\n',
    "plan.csv": "id,prompt,kind,stops\n7,p,success,TRUE\n007,p,success,True\n,p,success,true\n",
    "plan.yaml": "- {id: 7, prompt: p, kind: success, checks: {stops: true}}\n"
    "- {id: 007, prompt: p, kind: success, checks: {stops: true}}\n"
    "- {id: , prompt: p, kind: success, checks: {stops: true}}\n",
}


@pytest.mark.parametrize("name", IDS)
def test_ids_are_alike_in_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    path.write_text(IDS[name], encoding="utf-8")
    plan = TestPlan.from_file(path)
    assert [c.id for c in plan] == ["7", "007", "3"]
    assert all(c.checks == (Stops(),) for c in plan)


GOOD = '{"prompt": "p", "kind": "success", "checks": [{"stops": true}]}'
TWICE = {
    "plan.jsonl": GOOD + '\n\n{"prompt": "a", "kind": "success", "checks": {"contains": "a", '
    '"contains": "b"}}\n',
    "array.jsonl": "[\n" + GOOD + ',\n{"prompt": "a", "kind": "success", "prompt": "b", '
    '"checks": [{"stops": true}]}\n]',
    "plan.yaml": "- {prompt: p, kind: success, checks: {stops: true}}\n"
    "- prompt: a\n  kind: success\n  checks: [{json_fields: {x: 1, x: 2}}]\n",
    "plan.csv": 'prompt,kind,checks\np,success,"{""stops"": true}"\n'
    'a,success,"{""length"": 1, ""length"": 2}"\n',
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_is_there_twice_is_refused_with_its_row(tmp_path, name):
    path = tmp_path / name
    path.write_text(TWICE[name], encoding="utf-8")
    with pytest.raises(EvaluationError, match="is there twice") as caught:
        TestPlan.from_file(path)
    (problem,) = caught.value.problems
    assert problem.startswith("row 2")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "plan.csv"
    path.write_text("prompt,kind,contains,contains\np,success,a,b\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="names the column 'contains' twice"):
        TestPlan.from_file(path)


def test_missing_folders_are_made_and_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    path = PLAN.to_file(tmp_path / "new" / "er" / "plan.jsonl")
    assert len(TestPlan.from_file(path)) == 5
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="the disk is full"):
        PLAN.to_file(path, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["plan.jsonl"]
    assert path.read_bytes() == before


def test_checks_may_be_one_dictionary(tmp_path):
    plan = TestPlan.from_file(write(tmp_path, case(checks={"number": 4, "stops": True})))
    assert plan.cases[0].checks == (Number(4), Stops())


def test_messages_as_a_prompt(tmp_path):
    talk = [{"role": m.role, "content": m.content} for m in TALK]
    plan = TestPlan.from_file(write(tmp_path, case(prompt=talk)))
    assert plan.cases[0].prompt == TALK


WRONG = [
    ({"prompt": ...}, ["`prompt` is missing"]),
    ({"kind": ...}, ["`kind` is missing"]),
    ({"prompt": " \n"}, ["`prompt` is empty"]),
    ({"prompt": 5}, ["`prompt` must be text or a list of messages, got 5"]),
    ({"prompt": []}, ["`prompt` must be text or a list of messages, got []"]),
    (
        {"prompt": [{"role": "assistant", "content": "x"}]},
        ["`prompt`: turns in an impossible order: the assistant speaks first (roles: assistant)"],
    ),
    (
        {"prompt": [{"role": "critic", "content": "x"}, {"role": "user"}, "hi"]},
        [
            "`prompt`: message 1 has the unknown role 'critic'",
            "`prompt`: message 2 has neither role and content nor from and value",
            "`prompt`: message 3 must be a dictionary, got a str: 'hi'",
        ],
    ),
    ({"kind": "sucess"}, ["`kind` must be one of success, failure, boundary, got 'sucess'"]),
    ({"kind": ["success"]}, ["`kind` must be one of"]),
    ({"checks": ...}, ["`checks` is missing: say what must hold for an answer"]),
    ({"checks": []}, ["`checks` is missing"]),
    ({"checks": "Paris"}, ["`checks` must be a list of checks, got 'Paris'"]),
    ({"checks": [{"exakt": 1}, {"regex": "("}]}, ["no check 'exakt'", "regex: '(' is not"]),
    ({"id": 5.5}, ["`id` must be text, got 5.5"]),
    ({"id": ["a"]}, ["`id` must be text, got ['a']"]),
    ({"notes": "\ud800"}, ["`notes` has half a character in it: '\\ud800'"]),
    ({"prompt": "\udc00 x"}, ["`prompt` has half a character in it: '\\udc00'"]),
    ({"checks": [{"exact": "\ud800"}]}, ["`checks` has half a character in it"]),
    ({"checks": [{"json_schema": {"$schema": 5}}]}, ["`$schema` is 5, which is no known draft"]),
    ({"samples": 0}, ["`samples` must be a whole number from 1, got 0"]),
    ({"samples": 1.5}, ["`samples` must be a whole number from 1"]),
    ({"samples": True}, ["`samples` must be a whole number from 1"]),
    ({"required": 0}, ["`required` must be a share of samples, over 0 and up to 1, got 0"]),
    ({"required": 80}, ["`required` must be a share of samples"]),
    ({"tags": [1]}, ["`tags` must be a list of texts"]),
    ({"tags": {"a": 1}}, ["`tags` must be a list of texts, got {'a': 1}"]),
    ({"weight": -1}, ["`weight` must be a number over 0, got -1"]),
    ({"weight": "2"}, ["`weight` must be a number over 0"]),
    ({"notes": 3}, ["`notes` must be text, got 3"]),
    ({"promt": "x"}, ["there is no key 'promt'; keys are id, prompt, kind, checks"]),
    (
        {"prompt": ..., "kind": "bad", "samples": -1, "checks": [{"x": 1}], "more": 1},
        ["`prompt` is missing", "`kind` must be", "`samples`", "no check 'x'", "no key 'more'"],
    ),
]


@pytest.mark.parametrize(("changes", "texts"), WRONG)
def test_what_is_wrong_is_named_with_its_row(tmp_path, changes, texts):
    path = write(tmp_path, case(), case(**changes))
    with pytest.raises(EvaluationError, match="is no test plan") as caught:
        TestPlan.from_file(path)
    problems = caught.value.problems
    assert len(problems) == len(texts), problems
    for text in texts:
        assert any(p.startswith("row 2: ") and text in p for p in problems), (text, problems)
    assert '"checks": [{"number": 4}]' in str(caught.value)


def test_all_problems_of_a_file_at_once(tmp_path):
    path = tmp_path / "plan.jsonl"
    good = json.dumps(case(id="same"))
    lines = [good, "", "{broken", '"text"', json.dumps(case(kind="x", samples=0)), good, "[1]"]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(EvaluationError) as caught:
        TestPlan.from_file(path)
    text = str(caught.value)
    assert "row 2 (line 3): " in text
    assert "row 3 (line 4): a case is a dictionary, got 'text'" in text
    assert "row 4 (line 5): `kind`" in text and "row 4 (line 5): `samples`" in text
    assert "row 6 (line 7): a case is a dictionary, got [1]" in text
    assert "rows 1, 5 have the same id 'same'" in text
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("name", ["plan.jsonl", "plan.csv", "plan.yaml"])
def test_a_file_without_cases(tmp_path, name):
    path = tmp_path / name
    path.write_text({"plan.yaml": "[]"}.get(name, ""), encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"cases|empty"):
        TestPlan.from_file(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(EvaluationError, match="There is no file"):
        TestPlan.from_file(tmp_path / "plan.jsonl")
    with pytest.raises(EvaluationError, match="A test plan's file ends in"):
        TestPlan.from_file(tmp_path / "plan.json")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(EvaluationError, match="There is no file"):
        TestPlan.from_file(tmp_path / "folder.csv")


def test_problems_in_python_are_all_named():
    with pytest.raises(EvaluationError, match="Case 'x' cannot be run") as caught:
        Case("x", "", "bad", [], samples=0, required=2, weight=float("inf"))
    assert len(caught.value.problems) == 6
    with pytest.raises(EvaluationError, match="`checks` must be a list of checks, got 'Paris'"):
        Case("x", "p", "success", "Paris")
    with pytest.raises(EvaluationError, match="A case cannot be run") as caught:
        Case()
    assert [p.split("`")[1] for p in caught.value.problems] == ["prompt", "checks", "kind"]
    with pytest.raises(EvaluationError, match="`prompt`: message 1 has neither role"):
        Case("x", [{"role": "user"}], "success", Stops())
    with pytest.raises(EvaluationError, match="there is no check 'exakt'"):
        Case("x", "p", "success", [Stops(), {"exakt": 1}])
    with pytest.raises(EvaluationError, match="a check is one name"):
        Case("x", "p", "success", [Stops])
    ones = [Case("a", "p", "success", Stops()), Case("a", "q", "success", Stops())]
    with pytest.raises(EvaluationError, match="rows 1, 2 have the same id 'a'"):
        TestPlan(ones)
    with pytest.raises(EvaluationError, match="is no `Case`"):
        TestPlan(["a"])
    with pytest.raises(EvaluationError, match="'mine' has no cases"):
        TestPlan([], name="mine")


def test_functions_are_written_by_name_and_not_read(tmp_path):
    plan = TestPlan([Case("f", "p", "success", Function(len))])
    path = plan.to_file(tmp_path / "plan.jsonl")
    with pytest.raises(EvaluationError, match="is a Python function, which"):
        TestPlan.from_file(path)


# CSV.


def test_a_column_for_each_check(tmp_path):
    path = tmp_path / "plan.csv"
    path.write_text(
        "prompt,kind,exact,one_of,contains,number,length,regex,stops,refuses,json_fields,tags\n"
        "a,success,Paris,,,,,,,,,geo easy\n"
        'b,success,,"[""x"", ""y""]",,4,,,,,,\n'
        "c,boundary,,,word,,40,^[a-z]$,true,,,\n"
        'd,failure,,,,,,,,true,"{""a.b"": 1}",\n'
        'e,success,5,,12,"{""value"": 5, ""tolerance"": 0.5}",,[0-9],,,,\n'
        'f,success,"{""text"": ""X"", ""ignore_case"": true}",,,,,,,,,\n'
        'g,success,"{""a"": 1}",true,"[sic]",,,,,,,\n',
        encoding="utf-8",
    )
    cases = TestPlan.from_file(path).cases
    assert [c.checks for c in cases] == [
        (Exact("Paris"),),
        (OneOf(["x", "y"]), Number(4)),
        (Contains("word"), Length(40), Regex("^[a-z]$"), Stops()),
        (Refuses(), JsonFields({"a.b": 1})),
        (Exact("5"), Contains("12"), Number(5, tolerance=0.5), Regex("[0-9]")),
        (Exact("X", ignore_case=True),),
        (Exact('{"a": 1}'), OneOf("true"), Contains("[sic]")),
    ]
    assert cases[0].tags == ("geo", "easy") and cases[1].tags == ()


def test_numbers_and_messages_in_csv(tmp_path):
    path = tmp_path / "plan.csv"
    path.write_text(
        "id,prompt,messages,kind,checks,samples,required,weight,notes\n"
        '007,123,,success,"{""stops"": true}",4,0.5,2,12\n'
        ',,"[{""role"": ""user"", ""content"": ""hi""}]",success,"[{""length"": 5}]",,,,\n',
        encoding="utf-8",
    )
    one, two = TestPlan.from_file(path)
    assert (one.id, one.prompt, one.samples, one.required, one.weight, one.notes) == (
        "007", "123", 4, 0.5, 2, "12",
    )  # fmt: skip
    assert two.prompt == (Message("user", "hi"),) and two.id == "2" and two.samples == 1


def test_problems_in_csv(tmp_path):
    path = tmp_path / "plan.csv"
    path.write_text(
        "prompt,kind,number,checks,colour\n"
        "a,success,four,,\n"
        "b,success,,{stops},\n"
        "c,success,1,,red\n"
        "d,success,,,\n"
        "e,success,1,,,,\n",
        encoding="utf-8",
    )
    with pytest.raises(EvaluationError) as caught:
        TestPlan.from_file(path)
    text = str(caught.value)
    assert "row 1 (line 2): `checks`: number: `value` must be a number, got 'four'" in text
    assert "row 2 (line 3): `checks` is no JSON" in text
    assert "row 3 (line 4): there is no key 'colour'" in text
    assert "row 4 (line 5): `checks` is missing" in text
    assert "row 5 (line 6): " in text
    assert len(caught.value.problems) == 5


# YAML.


def test_a_plan_as_people_write_it_in_yaml(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        """\
- prompt: Capital of Italy?
  kind: success
  checks:
    - exact: Rome
    - length: {max: 3, unit: words}
  tags: [geo]
- prompt: |
    Two
    lines
  kind: failure
  checks: {refuses: true, stops: true}
""",
        encoding="utf-8",
    )
    one, two = TestPlan.from_file(path)
    assert one.checks == (Exact("Rome"), Length(3, unit="words")) and one.tags == ("geo",)
    assert two.prompt == "Two\nlines\n" and two.checks == (Refuses(), Stops())


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {folder}/ran']",
        "- !!python/object/new:subprocess.Popen [[touch, '{folder}/ran']]",
        "- prompt: !!python/name:os.system\n  kind: success",
    ],
)
def test_yaml_runs_no_code(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace("{folder}", str(tmp_path)), encoding="utf-8")
    with pytest.raises(EvaluationError, match="is no YAML"):
        TestPlan.from_file(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no YAML"),
        ("- 2020-99-99", "is no YAML"),
        ("- {a: 1}\n---\n- {b: 1}", "is no YAML"),
        (
            "- prompt: x\n  kind: success\n  checks: [{json_fields: {d: 2024-01-01}}]",
            r"row 1: `checks`: json_fields: `fields` is no JSON: .* \(put it in quotes\)",
        ),
        ("[" * 3000, "is no YAML"),
        ("cases: []", "must be a list of cases. Received: {'cases': \\[\\]}"),
        ("just text", "must be a list of cases. Received: 'just text'"),
        ("- prompt: 2020-01-01\n  kind: success\n  checks: {stops: true}", "must be text"),
        ("- {1: 2}", "there is no key 1"),
    ],
)
def test_broken_yaml(tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=message) as caught:
        TestPlan.from_file(path)
    assert len(str(caught.value)) < 2_000


def test_yaml_that_is_no_utf_8(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"- prompt: \xff")
    with pytest.raises(EvaluationError, match="is no YAML"):
        TestPlan.from_file(path)


def test_a_bomb_of_aliases_is_not_written_out(tmp_path):
    levels = [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "plan.yaml"
    path.write_text("\n".join(["- &a0 [x]", *levels]), encoding="utf-8")
    with pytest.raises(EvaluationError, match="is no test plan") as caught:
        TestPlan.from_file(path)
    assert len(caught.value.problems) == 12
    assert len(str(caught.value)) < 5_000


def test_yaml_dump_can_be_read_by_others(tmp_path):
    data = yaml.safe_load(PLAN.to_file(tmp_path / "plan.yaml").read_text(encoding="utf-8"))
    assert data[0] == {
        "id": "one",
        "kind": "success",
        "prompt": "Capital of France?",
        "checks": [{"exact": "Paris"}],
    }


def test_a_key_that_is_there_twice_in_a_broken_row(tmp_path):
    path = tmp_path / "plan.jsonl"
    path.write_text('{"prompt": "x", "checks": {"contains": "a", "contains": "b"}\n')
    with pytest.raises(EvaluationError, match="row 1"):
        TestPlan.from_file(path)
