"""One reader of conversations: what trains can be asked, and can be a case of a test plan."""

import json

import numpy as np
import pytest

from gemma_keras_tune.errors import EvaluationError, PairsError, PairsWarning, TemplateError
from gemma_keras_tune.evaluation.checks import Stops
from gemma_keras_tune.evaluation.plans import Case, TestPlan
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.templates import TEMPLATES, FunctionTemplate, Segment, TextTemplate
from gemma_keras_tune.generation.answers import encode_prompts, generate
from gemma_keras_tune.generation.streaming import stream
from gemma_keras_tune.pairs import Message, PairChecks, read_pairs
from gemma_keras_tune.testing import tiny_model

CHAT = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "Bye"),
    Message("assistant", "Ciao"),
)


def turns(make, chat=CHAT):
    return [make(message.role, message.content) for message in chat]


def nested(value):
    """As pandas gives what it read from Parquet: every list an array."""
    if isinstance(value, dict):
        return {key: nested(part) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    array = np.empty(len(value), object)
    array[:] = [nested(part) for part in value]
    return array


NAMES = {"system": "System", "user": "Human", "assistant": "GPT"}
GOOGLE = {"system": "system", "user": "user", "assistant": "model"}
PARTS = turns(lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]})
DIALECTS = {
    "messages": turns(lambda role, text: {"role": role, "content": text}),
    "Message": list(CHAT),
    "from and value": turns(lambda role, text: {"from": NAMES[role], "value": text}),
    "developer": turns(
        lambda role, text: {"role": role.replace("system", "developer"), "content": text}
    ),
    "upper case": turns(lambda role, text: {"Role": role.upper(), "Content": text}),
    "bytes": turns(lambda role, text: {"role": role.encode(), "content": text.encode()}),
    "parts": PARTS,
    "parts in two": turns(
        lambda role, text: {"role": role, "content": [{"text": text[:2]}, {"text": text[2:]}]}
    ),
    "strings in lists": turns(lambda role, text: {"role": role, "content": [text]}),
    "one part": turns(lambda role, text: {"role": role, "content": {"type": "text", "text": text}}),
    "input_text and output_text": turns(
        lambda role, text: {
            "role": role,
            "content": [
                {"type": "output_text" if role == "assistant" else "input_text", "text": text}
            ],
        }
    ),
    "Google": turns(lambda role, text: {"role": GOOGLE[role], "parts": [{"text": text}]}),
    "arrays": nested(turns(lambda role, text: {"role": role, "content": text})),
    "arrays in arrays": nested(PARTS),
    "filled by Arrow": turns(
        lambda role, text: {
            "role": role, "content": [{"type": "text", "text": text, "image_url": None},
                                      {"type": None, "text": None, "image_url": None}],
            "from": None, "value": None, "tool_calls": None, "name": None, "weight": None,
        }
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma3", num_layers=1)


@pytest.mark.filterwarnings("error::gemma_keras_tune.errors.PairsWarning")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_trains_can_be_asked(dialect, model):
    conversation = DIALECTS[dialect]
    for source in ([conversation], [{"messages": conversation}], [{"conversations": conversation}]):
        source = read_pairs(source)
        (pair,) = source
        source.raise_for_problems()
        assert pair.messages == CHAT and source.unused == {}
    question = conversation[:-1]
    template, tokenizer = TEMPLATES["gemma3"], model.preprocessor.tokenizer
    expected = template.segments(CHAT[:-1], generation_prompt=True)
    (row,) = encode_prompts(question, template, tokenizer)
    np.testing.assert_array_equal(row, RowTokenizer(tokenizer).encode(expected)[0])
    case = Case("bye", question, "success", Stops())
    assert case.messages == CHAT[:-1] and case.text == "Bye"


def test_dialects_are_answered_alike(model):
    asked = [DIALECTS[name][:-1] for name in ("messages", "from and value", "Google")]
    answers = generate(model, asked, max_new_tokens=4, template="gemma3")
    assert len(set(answers)) == 1
    streamed = [
        list(stream(model, prompt, max_new_tokens=4, template="gemma3")) for prompt in asked
    ]
    assert streamed[0] == streamed[1] == streamed[2]


def test_a_plan_is_read_in_any_dialect_and_written_in_one(tmp_path):
    path = tmp_path / "plan.jsonl"
    names = ("messages", "from and value", "Google", "parts")
    cases = [
        {"id": name, "prompt": DIALECTS[name][:-1], "kind": "success", "checks": [{"number": 4}]}
        for name in names
    ]
    path.write_text("\n".join(map(json.dumps, cases)))
    plan = TestPlan.from_file(path)
    assert [case.prompt for case in plan] == [CHAT[:-1]] * len(names)
    assert plan.cases[0].to_config()["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert TestPlan.from_file(plan.to_file(tmp_path / "again.csv")).cases[0].prompt == CHAT[:-1]


def test_everywhere_the_same_problems(model):
    wrong = [
        {"role": "user", "content": "What is this?", "images": ["a.png"]},
        {"role": "critic", "content": "x"},
    ]
    expected = (
        "`images` of message 1{of} holds images, audio, video or files, and this library tunes "
        "text alone",
        "message 2{of} has the unknown role 'critic' (known: system, developer, user, human, "
        "prompter, assistant, model, gpt, bot, ai)",
    )
    with pytest.raises(PairsError) as caught:
        read_pairs([{"messages": wrong}]).raise_for_problems()
    assert caught.value.problems == tuple(
        "row 1: " + text.format(of=" of `messages`") for text in expected
    )
    with pytest.raises(TemplateError) as caught:
        generate(model, [wrong], template="gemma3")
    assert caught.value.problems == tuple("prompt 1: " + text.format(of="") for text in expected)
    with pytest.raises(EvaluationError) as caught:
        Case("x", wrong, "success", Stops())
    assert caught.value.problems == tuple("`prompt`: " + text.format(of="") for text in expected)


def test_everywhere_unused_keys_are_told(model):
    chat = [
        {"role": "user", "content": "Hi", "name": "Bo"},
        {"role": "assistant", "content": "Hello", "name": "AI"},
    ]
    line = "  - `name` of messages: {}, first in {} 1: 'Bo'"
    with pytest.warns(PairsWarning) as caught:
        read_pairs([{"messages": chat}]).raise_for_problems()
    assert line.format("2 times", "row") in str(caught[0].message)
    with pytest.warns(PairsWarning) as caught:
        generate(model, chat[:1], max_new_tokens=1, template="gemma3")
    assert line.format("1 time", "prompt") in str(caught[0].message)
    with pytest.warns(PairsWarning) as caught:
        Case("x", chat[:1], "success", Stops())
    assert str(caught[0].message).startswith("A case has keys that hold something")


def test_reasoning_of_earlier_turns_is_not_asked_again(model):
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "A greeting."},
        {"role": "user", "content": "Bye"},
    ]
    with pytest.warns(PairsWarning, match="`reasoning_content` of messages: 1 time"):
        assert Case("x", chat, "success", Stops()).messages == CHAT[1:-1]


# Answers that are not trained.

MASKED = (
    Message("user", "a"),
    Message("assistant", "b", trained=False),
    Message("user", "c"),
    Message("assistant", "d"),
    Message("user", "e"),
    Message("assistant", "f", trained=False),
)


def test_masked_answers_are_read_and_not_trained():
    for template in (TEMPLATES["gemma3"], TEMPLATES["gemma4"], TextTemplate("{prompt} {response}")):
        parts = template.segments(MASKED)
        whole = template.segments([Message(m.role, m.content) for m in MASKED[:4]])
        assert [part.text for part in parts] == [part.text for part in whole]
        assert [part.trained for part in parts] == [False, False, False, True]
        assert [part.masked for part in parts] == [False, True, False, False]


def test_a_function_trains_the_last_answer_that_is_not_masked():
    template = FunctionTemplate(lambda messages: "|".join(m.content for m in messages) + "|")
    assert template.segments(MASKED) == (Segment("a|b|c|", False), Segment("d<eos>", True))


def test_a_masked_answer_has_the_tokens_of_a_trained_one(model):
    encoder = RowTokenizer(model.preprocessor.tokenizer)
    template = TextTemplate("{prompt} {response}")
    ids, trained = encoder.encode(template.segments(MASKED[:4]))
    plain = template.segments([Message(m.role, m.content) for m in MASKED[:4]])
    same, all_trained = encoder.encode(plain)
    np.testing.assert_array_equal(ids, same)
    assert 0 < trained.sum() < all_trained.sum()
    assert (ids == encoder.end_id).sum() == 2


def test_checks_compare_trained_answers_alone():
    checks = PairChecks()
    for pair in read_pairs([MASKED, [Message("user", "a"), Message("assistant", "x")]]):
        checks.add(pair)
    assert checks.contradictions == ()
