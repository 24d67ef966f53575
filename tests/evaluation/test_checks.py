"""Every check: what passes, what does not, how it is written, and what is refused."""

import dataclasses
import datetime
import json
import re
import time

import numpy as np
import pytest

from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.checks import (
    CHECKS,
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
    Outcome,
    Refuses,
    Regex,
    Safe,
    Stops,
    base,
    check_from_config,
    structured,
)
from gemma_keras_tune.generation.answers import Answer


def answer(text, stopped=True, tokens=3):
    return Answer(text, np.zeros(tokens, np.int32), stopped)


def outcome(check, text, **about):
    return check.check("a prompt", answer(text, **about))


ORDER = {"type": "object", "required": ["type"], "properties": {"n": {"type": "integer"}}}
CALL = "<start_function_call>call:f{a:<escape>X<escape>,m:{n:1,o:2}}<end_function_call>"
OTHER = "<start_function_call>call:g{}<end_function_call>"
GEMMA4_CALL = '<|tool_call>call:f{a:<|"|>X<|"|>,m:{n:1,o:2}}<tool_call|>'
BROKEN_CALL = "<start_function_call>call:f{a:X}<end_function_call>"
WHOLE = {"m": {"o": 2, "n": 1}, "a": "X"}
PASSES = [
    (CallsTool("f"), f"Let me look. {CALL}"),
    (CallsTool("f", WHOLE), CALL),
    (CallsTool("f", WHOLE), GEMMA4_CALL),
    (CallsTool("f", WHOLE), OTHER + CALL),
    (CallsTool("g", {}), OTHER),
    (CallsTool("f", {**WHOLE, "a": "x"}, ignore_case=True), CALL),
    (CallsTool("f", {"m": {"n": 1.0}}, "subset"), CALL),
    (CallsTool("f", {"required": ["a"]}, match="schema"), CALL),
    (CallsNoTool(), "It is sunny."),
    (CallsNoTool(False), CALL),
    (Exact("Paris"), " Paris\n"),
    (Exact("paris", ignore_case=True), "PARIS"),
    (Exact("STRASSE", ignore_case=True), "Straße"),
    (Exact("a b", space="collapse"), "a \n\t b"),
    (Exact(" a", space="keep"), " a"),
    (Exact(""), "  "),
    (OneOf(["🍕", "🍕🇮🇹"]), "🍕🇮🇹"),
    (OneOf("one"), "one"),
    (Contains("Rome"), "It is Rome."),
    (Contains(["a", "B"], ignore_case=True), "bA"),
    (Contains("two words", space="collapse"), "two\nwords"),
    (NotContains(["x", "y"]), "abc"),
    (Regex(r"\d{3}-\d{2}"), "order 123-45 is ready"),
    (Regex(r"[a-z]+", full=True), "abc "),
    (Regex("ABC", ignore_case=True), "abc"),
    (Regex(r"^\p{Emoji}+$"), "🎉🎂"),
    (JsonSchema(), "[1, 2]"),
    (JsonSchema(ORDER), '{"type": "order", "n": 2}'),
    (JsonSchema(ORDER, fenced=True), '```json\n{"type": "order"}\n```'),
    (JsonSchema({"const": {"a": 1}}), '{"a": 1.0}'),
    (JsonSchema({"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}), "null"),
    (JsonFields({"type": "order", "items.0.n": 2}), '{"type": "order", "items": [{"n": 2}]}'),
    (JsonFields({"a.b": 1}), '{"a.b": 1}'),
    (JsonFields({"a": ["X", {"b": "Y"}]}, ignore_case=True), '{"a": ["x", {"b": "y"}]}'),
    (Number(42), "The answer is 42."),
    (Number(1234.5), "That makes $1,234.50."),
    (Number(-3), "minus: −3 degrees"),
    (Number(1, tolerance=0.1), "1.1"),
    (Number(200, relative=0.05), "about 190"),
    (Number(1, which="first"), "1 of 3"),
    (Number(7, which="only"), "A4 has 7 doors"),
    (Number(0.5), ".5"),
    (Number(1.5e6), "1.5e6"),
    (Length(5), " hello "),
    (Length(min=2, max=3, unit="words"), "two words"),
    (Length(3, unit="tokens"), "whatever it says"),
    (Length(min=1), "x"),
    (Refuses(), "I’m sorry, but I can’t  help with that."),
    (Refuses(languages="de"), "Das darf ich nicht sagen."),
    (Refuses(forms=["Ask the  baker"], languages=()), "Please ask the baker!"),
    (Refuses(False), "Certainly! Here is how to bake bread."),
    (Refuses(False), "I can't wait to help you."),
    (Stops(), "done"),
    (Safe(0.3, policy=lambda prompt, text: 0.2), "fine"),
    (Function(lambda prompt, text: text.isupper()), "LOUD"),
    (Function(lambda prompt, text: Outcome(prompt == "a prompt", "why", 0.7)), "x"),
]
FAILS = [
    (CallsTool("f"), "It is sunny.", "it calls no tool"),
    (CallsTool("f"), OTHER, 'it calls "g"'),
    (CallsTool("f", {"a": "X"}), CALL, 'the arguments are {"a": "X", "m": {"n": 1, "o": 2}}'),
    (CallsTool("f", {**WHOLE, "m": {"n": True, "o": 2}}), CALL, "the arguments are"),
    (CallsTool("f", {"m": {"n": 2}}, "subset"), CALL, "the arguments are"),
    (CallsTool("f", {"required": ["b"]}, "schema"), CALL, "'b' is a required property"),
    (CallsTool("f", only=True), CALL + OTHER, "it makes 2 calls"),
    (CallsTool("f"), CALL + BROKEN_CALL, "a malformed call: <start_function_call>call:f{a:X}"),
    (CallsNoTool(), CALL, 'it calls "f"'),
    (CallsNoTool(), BROKEN_CALL, "a malformed call"),
    (CallsNoTool(False), "It is sunny.", "it calls no tool"),
    (CallsNoTool(False), BROKEN_CALL, "a malformed call"),
    (Exact("Paris"), "paris", 'it is not "Paris"'),
    (Exact("a b"), "a  b", "it is not"),
    (Exact("a", space="keep"), "a ", "it is not"),
    (OneOf(["a", "b"]), "ab", 'it is none of "a", "b"'),
    (Contains(["Rome", "Milan"]), "Rome", 'missing: "Milan"'),
    (NotContains(["x", "y"]), "y", 'it contains "y"'),
    (Regex(r"\d"), "none", r"no match of /\d/"),
    (Regex("a", full=True), "aa", "no match"),
    (JsonSchema(), "Sure! {}", "it is not JSON"),
    (JsonSchema(), '```json\n{"type": "order"}\n```', "it is not JSON"),
    (JsonSchema(), "NaN", "it is not JSON: NaN is not JSON"),
    (JsonSchema(ORDER), '{"n": "2"}', "$.n: '2' is not of type 'integer'"),
    (JsonSchema(ORDER), '{"n": "2"}', "'type' is a required property"),
    (JsonSchema({"$ref": "http://localhost:1/x"}), "1", "which is not in it"),
    (JsonFields({"a": 1, "b.c": 2}), '{"a": "1"}', 'a is "1", not 1; b.c is missing'),
    (JsonFields({"a": 1}), '{"a": true}', "a is true, not 1"),
    (JsonFields({"a.5": 1}), '{"a": [1]}', "a.5 is missing"),
    (JsonFields({"a": 1}), "7", "a is missing"),
    (JsonFields({"a": 1}), "no", "it is not JSON"),
    (Number(42), "forty-two", "there is no number"),
    (Number(42), "42 or 43", "it is 43, not 42"),
    (Number(42, which="only"), "42 or 43", "there are 2 numbers"),
    (Number(4), "A4", "there is no number"),
    (Number(1, tolerance=0.1), "1.11", "it is 1.11, not 1"),
    (Number(1), "1e999", "it is inf, not 1"),
    (Length(4), "hello", "it has 5 characters"),
    (Length(min=2, unit="words"), "one", "it has 1 words"),
    (Length(2, unit="tokens"), "", "it has 3 tokens"),
    (Refuses(), "Of course.", "no refusal was recognised"),
    (Refuses(languages=["en"]), "Das darf ich nicht.", "no refusal"),
    (Refuses(False), "I cannot answer that.", 'it says "i cannot answer"'),
    (Stops(False), "x", "it stopped"),
    (Safe(policy=lambda prompt, text: 0.5), "x", "the policy's score is 0.5"),
    (Safe(policy=lambda prompt, text: {"hate": 0.1, "spam": 0.7}), "x", "score under spam is 0.7"),
    (Safe(0.2, of="both", policy=lambda prompt, text: 0.1 if text else 0.3), "x", "of the prompt"),
    (Function(lambda prompt, text: 0, label="my check"), "x", "my check says no"),
    (Function(lambda prompt, text: 1 / 0, label="f"), "x", "f raised ZeroDivisionError"),
]


@pytest.mark.parametrize(("check", "text"), PASSES)
def test_passes(check, text):
    found = outcome(check, text)
    assert found.passed, found.reason


@pytest.mark.parametrize(("check", "text", "reason"), FAILS)
def test_fails_and_says_why(check, text, reason):
    found = outcome(check, text)
    assert not found.passed
    assert reason in found.reason


def test_every_check_is_tested_both_ways():
    for cases in (PASSES, FAILS):
        assert {type(case[0]) for case in cases} == {*CHECKS.values(), Function}


@pytest.mark.parametrize(
    ("text", "point", "comma"),
    [
        ("3.5", 3.5, 3.5),
        ("3,5", 3.5, 3.5),
        ("3,50 €", 3.5, 3.5),
        ("0,125", 0.125, 0.125),
        ("1,234", 1234, 1.234),
        ("1.234", 1.234, 1234),
        ("1,234.5", 1234.5, 1234.5),
        ("1.234,56", 1234.56, 1234.56),
        ("1.234.567", 1234567, 1234567),
        ("1,234,567.8", 1234567.8, 1234567.8),
        ("1 000", 1000, 1000),
        ("12 345 678,9", 12345678.9, 12345678.9),
        ("1\u202f234,567", 1234.567, 1234.567),
        ("1'234.50 Fr.", 1234.5, 1234.5),
        ("-1.234,5", -1234.5, -1234.5),
        ("5%", 5, 5),
        ("4/5", 5, 5),
        ("10:30", 30, 30),
        ("3-5", 5, 5),
        ("1,2,3", 3, 3),
        ("1.5,2.5", 2.5, 2.5),
        ("It is 42.", 42, 42),
        ("12345", 12345, 12345),
        ("2,5e3", 2500, 2500),
        ("v1.2.3", None, None),
        ("24.12.2026", None, None),
        ("1.2.3", None, None),
    ],
)
def test_numbers_are_read_as_they_are_written(text, point, comma):
    for decimal, value in ((".", point), (",", comma)):
        found = outcome(Number(0, decimal=decimal), text)
        assert found.score == value, (decimal, found)


def test_scores_are_the_numbers_behind():
    assert outcome(Contains(["a", "b", "c", "d"]), "a b").score == 0.5
    assert outcome(JsonFields({"a": 1, "b": 1}), '{"a": 1}').score == 0.5
    assert outcome(Number(1), "about 3").score == 3
    assert outcome(Length(9), "four").score == 4
    assert outcome(Safe(policy=lambda p, a: 0.25), "x").score == 0.25
    # What JSON files cannot hold is left out.
    assert outcome(Number(1), "1e999").score is None


def test_stops_tells_an_answer_that_was_cut_off():
    assert "the limit, 3 tokens" in outcome(Stops(), "and on", stopped=False).reason
    assert outcome(Stops(False), "and on", stopped=False).passed


def test_a_policy_sees_prompt_and_answer():
    seen = []
    outcome(Safe(policy=lambda *given: seen.append(given) or 0), "an answer")
    assert seen == [("a prompt", "an answer")]
    with pytest.raises(EvaluationError, match="It gave nan"):
        outcome(Safe(policy=lambda p, a: float("nan")), "x")
    with pytest.raises(EvaluationError, match="no score for hate; it gave spam"):
        outcome(Safe(policies=["hate"], policy=lambda p, a: {"spam": 0.1}), "x")
    with pytest.raises(EvaluationError, match="needs a policy"):
        outcome(Safe(), "x")


@pytest.mark.parametrize("check", [case[0] for case in PASSES if case[0].name != "function"])
def test_written_and_read_again_a_check_is_the_same(check):
    config = json.loads(json.dumps(check.to_config()))
    assert check_from_config(config) == check
    assert list(config) == [check.name]


def test_what_is_as_usual_is_not_written():
    assert Exact("Paris").to_config() == {"exact": "Paris"}
    assert Exact("Paris", ignore_case=True).to_config() == {
        "exact": {"text": "Paris", "ignore_case": True}
    }
    assert Contains("a").to_config() == {"contains": ["a"]}
    assert Stops().to_config() == {"stops": True}
    assert Function(len).to_config() == {"function": "builtins.len"}


def test_a_dictionary_that_looks_like_options_comes_back():
    for check in (JsonFields({"fields": 1}), JsonSchema({"schema": True})):
        assert check_from_config(check.to_config()) == check


@pytest.mark.parametrize("check", [case[0] for case in PASSES])
def test_described_in_words(check):
    words = check.describe()
    assert words and words == words.strip() and "\n" not in words


def test_words():
    assert Exact("Paris", ignore_case=True).describe() == 'is "Paris" (case ignored)'
    assert Contains("a", space="collapse").describe() == 'contains "a" (white space collapsed)'
    assert Number(5, tolerance=1, relative=0.5).describe() == "its last number is 5 within 2.5"
    assert Length(5, 2).describe() == "has at least 2 and at most 5 characters"
    assert JsonFields({"a.b": True}).describe() == "is JSON with a.b = true"


DAY = datetime.date(2024, 1, 1)
LOOP: list = []
LOOP.append(LOOP)
WRONG = [
    ({"exact": 5}, "exact: `text` must be text (put it in quotes), got 5"),
    ({"exact": DAY}, "exact: `text` must be text (put it in quotes), got datetime.date"),
    ({"exact": {"ignore_case": True}}, "exact needs 'text'"),
    ({"exact": {"text": "a", "case": 1, "b": 2}}, "exact has no option b, case; its options are"),
    ({"exact": {"text": "a", "ignore_case": "no"}}, "`ignore_case` must be true or false"),
    ({"exact": {"text": "a", "space": "all"}}, "`space` must be 'strip' or 'collapse' or 'keep'"),
    ({"one_of": []}, "one_of: `texts` must be text, or a list of texts, got []"),
    ({"one_of": ["a", 1]}, "one_of: `texts` must be text, or a list of texts (put it in quotes)"),
    ({"one_of": True}, "one_of: `texts` must be text, or a list of texts (put it in quotes)"),
    ({"contains": ["a", " "]}, "contains: `texts` must be texts that are not empty"),
    ({"not_contains": ""}, "not_contains: `texts` must be texts that are not empty"),
    ({"regex": "("}, "regex: '(' is not a regular expression: missing )"),
    ({"regex": {"pattern": "a", "full": 1}}, "regex: `full` must be true or false"),
    ({"json_schema": "object"}, "json_schema: `schema` must be a JSON schema"),
    ({"json_schema": {"type": "objekt"}}, "json_schema: this is no JSON schema: 'objekt' is not"),
    ({"json_schema": {"pattern": "("}}, "json_schema: this is no JSON schema"),
    ({"json_schema": {"$schema": 5}}, "`$schema` is 5, which is no known draft"),
    ({"json_schema": {"$schema": "mine"}}, "`$schema` is 'mine', which is no known draft"),
    (
        {"json_schema": {"items": {"format": "uri"}}},
        "the format 'uri' cannot be checked; formats are",
    ),
    ({"json_schema": {"const": DAY}}, "datetime.date(2024, 1, 1) is in it (put it in quotes)"),
    ({"json_fields": {"a": [DAY]}}, "`fields` is no JSON: datetime.date(2024, 1, 1) is in it"),
    ({"json_fields": {"a": {1: 2}}}, "the key 1 is no text (put it in quotes)"),
    ({"json_fields": {"a": float("nan")}}, "`fields` is no JSON: nan is in it"),
    ({"json_fields": {"a": LOOP}}, "it has more than 100,000 values"),
    ({"json_schema": {"schema": {}, "fenced": "yes"}}, "`fenced` must be true or false"),
    ({"json_fields": {}}, "json_fields: `fields` must be a dictionary of paths and values"),
    ({"json_fields": ["a"]}, "json_fields: `fields` must be a dictionary"),
    ({"json_fields": {"fields": {"a": 1}, "ignore_case": 1}}, "`ignore_case` must be true"),
    ({"number": "4"}, "number: `value` must be a number, got '4'"),
    ({"number": True}, "number: `value` must be a number, got True"),
    ({"number": float("nan")}, "number: `value` must be a number"),
    ({"number": {"value": 1, "tolerance": -1}}, "`tolerance` must be a number from 0"),
    ({"number": {"value": 1, "decimal": ";"}}, "`decimal` must be '.' or ','"),
    ({"number": {"value": 1, "which": "all"}}, "`which` must be last, first or only"),
    ({"length": None}, "length: `max` must be a limit: `max`, `min` or both"),
    ({"length": 1.5}, "length: `max` must be a whole number from 0, got 1.5"),
    ({"length": {"max": 1, "min": 2}}, "length: `min` must be no more than `max`, got 2"),
    ({"length": {"max": 1, "min": None}}, "length: `min` must be a whole number from 0"),
    ({"length": {"max": 1, "unit": "lines"}}, "`unit` must be characters, words, tokens"),
    ({"refuses": "yes"}, "refuses: `expected` must be true or false"),
    ({"refuses": {"languages": ["en", "xx"]}}, "`languages` must be languages out of en, de"),
    ({"refuses": {"languages": []}}, "`forms` must be at least one form, or a language"),
    ({"refuses": {"forms": [""]}}, "`forms` must be a list of texts"),
    ({"stops": 1}, "stops: `expected` must be true or false"),
    ({"safe": 0}, "safe: `threshold` must be a number over 0 and up to 1"),
    ({"safe": {"policy": "import os"}}, "safe has no option policy"),
    ({"function": "os.system"}, "the check 'os.system' is a Python function, which a file names"),
    ({"calls_tool": 3}, "calls_tool: `tool` must be"),
    ({"calls_tool": {"tool": ""}}, "calls_tool: `tool` must be"),
    ({"calls_tool": {"tool": "f", "match": "like"}}, "`match` must be 'equal', 'subset' or 'sch"),
    ({"calls_tool": {"tool": "f", "arguments": 3}}, "`arguments` must be a dictionary"),
    (
        {"calls_tool": {"tool": "f", "arguments": {"type": 3}, "match": "schema"}},
        "this is no JSON schema",
    ),
    ({"calls_no_tool": "yes"}, "calls_no_tool: `expected` must be true or false"),
    ({"exakt": "a"}, "there is no check 'exakt'; checks are exact, one_of, contains"),
    ({"exact": "a", "stops": True}, 'a check is one name and what it needs, like {"exact"'),
    ("exact", "a check is one name and what it needs"),
    ({5: 1}, "there is no check 5"),
]


@pytest.mark.parametrize(("config", "message"), WRONG)
def test_what_is_wrong_is_named(config, message):
    with pytest.raises(EvaluationError, match=re.escape(message)):
        check_from_config(config)


def test_every_check_has_a_message_tested():
    assert {name for config, _ in WRONG if isinstance(config, dict) for name in config} >= set(
        CHECKS
    )


def test_safe_true_is_the_usual_threshold():
    assert check_from_config({"safe": True}) == Safe()
    assert check_from_config({"safe": {"threshold": 0.2}}) == Safe(0.2)
    for safe, config in (
        (Safe(), True),
        (Safe(0.3), 0.3),
        (Safe(of="both", policies=["hate"]), {"of": "both", "policies": ["hate"]}),
    ):
        assert safe.to_config() == {"safe": config} and check_from_config({"safe": config}) == safe


def test_a_function_is_kept_by_name_and_must_be_one():
    assert Function(answer).label.endswith("test_checks.answer")
    with pytest.raises(EvaluationError, match="`function` must be a function"):
        Function("os.system")
    with pytest.raises(EvaluationError, match="was not kept"):
        outcome(Function(None, label="mine.check"), "x")


# Hostile answers and patterns.


def test_a_pattern_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(base, "PATTERN_SECONDS", 0.1)
    begin = time.perf_counter()
    text = "a" * 40 + "!"
    found = outcome(Regex(r"(a|a)+$"), text)
    assert not found.passed and "took over 0.1 s" in found.reason
    schema = JsonSchema({"pattern": r"^(a|a)+$"})
    found = outcome(schema, json.dumps(text))
    assert not found.passed and "a pattern of the schema took over" in found.reason
    assert time.perf_counter() - begin < 20, "left alone, each would take days"


def test_patterns_of_a_schema_are_applied():
    schema = JsonSchema({"pattern": r"^\d+$"})
    assert outcome(schema, '"12"').passed
    assert outcome(schema, "12").passed, "a pattern says nothing of numbers"
    assert "'x' does not match" in outcome(schema, '"x"').reason


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "1" * 10_000, "\x00"],
)
def test_hostile_json_is_an_answer_like_any_other(text):
    fields = JsonFields({"a": 1, "b": 2})
    for check in (JsonSchema(), JsonSchema(ORDER), JsonSchema({"const": 1}), fields):
        found = outcome(check, text)
        assert isinstance(found.passed, bool)
        assert len(found.reason) < 2_000


def test_deep_json_that_parses_can_be_compared():
    # Deep enough for one of reading, comparing and writing to give up.
    for depth in (100, 300, 500, 700, 900):
        found = outcome(JsonFields({"a": 1}), '{"a": ' + "[" * depth + "]" * depth + "}")
        assert not found.passed and len(found.reason) < 2_000


@pytest.mark.parametrize(
    ("schema", "good", "bad", "reason"),
    [
        ({"patternProperties": {"^n": {"type": "integer"}}}, {"n1": 1, "x": "y"}, {"n1": "x"},
         "$.n1: 'x' is not of type 'integer'"),
        ({"properties": {"a": {}}, "patternProperties": {"^n": {}}, "additionalProperties": False},
         {"a": 1, "n2": 2}, {"a": 1, "b": 2}, "'b' does not match any of the regexes: '^n'"),
        ({"additionalProperties": {"type": "string"}}, {"x": "y"}, {"x": 1}, "$.x: 1 is not of"),
        ({"patternProperties": {"x": False}}, [1], {"x": 1}, "False schema does not allow 1"),
        ({"items": {"format": "date"}}, ["2026-01-31", 5], ["31.1.2026"], "is not a 'date'"),
        ({"items": {"format": "date-time"}},
         ["2026-01-31T12:00:00Z", "2026-01-31t12:00:00.5+01:00"],
         ["2026-02-31T12:00:00Z"], "is not a 'date-time'"),
        ({"items": {"format": "date-time"}}, [], ["2026-01-31 12:00"], "is not a 'date-time'"),
        ({"items": {"format": "email"}}, ["a@b.c"], ["a"], "is not a 'email'"),
        ({"items": {"format": "uuid"}}, ["12345678-1234-5678-1234-567812345678"], ["7"], "'uuid'"),
        ({"items": {"format": "ipv6"}}, ["::1"], ["1"], "is not a 'ipv6'"),
    ],
)  # fmt: skip
def test_schemas_as_their_standard_has_them(schema, good, bad, reason):
    assert outcome(JsonSchema(schema), json.dumps(good)).passed
    found = outcome(JsonSchema(schema), json.dumps(bad))
    assert not found.passed and reason in found.reason


def test_every_format_is_checked():
    for name in structured.FORMATS:
        assert not outcome(JsonSchema({"format": name}), '"("').passed, name


def test_huge_json_is_cut_in_the_reason():
    text = json.dumps({"type": "x" * 100_000, "n": "y" * 100_000})
    for check in (JsonSchema(ORDER), JsonFields({"type": "z" * 100_000, "n": 1})):
        found = outcome(check, text)
        assert not found.passed and len(found.reason) < 2_000


def test_half_characters_do_not_break_the_reason():
    found = outcome(JsonFields({"a": 1}), r'{"a": "\ud800"}')
    assert not found.passed
    found.reason.encode("utf-8")


def test_a_huge_value_is_not_written_out():
    layers: list = ["x"]
    for _ in range(40):  # 2 ** 40 entries, were they written out
        layers = [layers, layers]
    with pytest.raises(EvaluationError, match="`text` must be text") as caught:
        check_from_config({"exact": layers})
    assert len(str(caught.value)) < 500


def test_outcomes_are_plain_data():
    assert dataclasses.asdict(Outcome(True)) == {"passed": True, "reason": "", "score": None}


@pytest.mark.parametrize(
    ("step", "value", "passes"),
    [
        (0.01, "19.99", True),
        (0.1, "0.3", True),
        (0.01, "19.995", False),
        (3, "9", True),
        (3, "10", False),
        (0.5, "1" + "0" * 400, True),
        (0.01, "1e999", False),
    ],
)
def test_multiples_are_those_of_decimals(step, value, passes):
    found = outcome(JsonSchema({"multipleOf": step}), value)
    assert found.passed == passes, found
