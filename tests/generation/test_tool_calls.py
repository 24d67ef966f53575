"""Tools end to end, on tiny models: tuned, asked, read."""

import json

import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.errors import PairsError, PairsWarning, TemplateError
from gemma_keras_tune.gemma.templates import TEMPLATES
from gemma_keras_tune.gemma.tools import FUNCTION_GEMMA, UNUSED_TOKENS, has_marks
from gemma_keras_tune.testing import tiny_model

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "price",
            "description": "Price of a part",
            "parameters": {"type": "object", "properties": {"part": {"type": "string"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "Call."}


def row(part, number):
    call = {"id": "1", "function": {"name": "price", "arguments": json.dumps({"part": part})}}
    return {
        "tools": TOOLS,
        "messages": [
            SYSTEM,
            {"role": "user", "content": f"How much is a {part}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": {"price": number}},
            {"role": "assistant", "content": f"{number} yes"},
        ],
    }


ROWS = [row("roll", 3), row("cake", 8)]


@pytest.fixture(scope="module")
def tuned():
    model = tiny_model("gemma4", tools=True, hidden_dim=32)
    gkt.tune(
        model, ROWS, epochs=60, batch_size=2, learning_rate=2e-2, rank=8, verbose=0,
        target_modules="all",
    )  # fmt: skip
    return model


def asked(part):
    return [SYSTEM, {"role": "user", "content": f"How much is a {part}?"}]


@pytest.mark.slow
def test_a_tuned_model_calls_and_answers(tuned):
    answer = gkt.generate(tuned, asked("roll"), tools=TOOLS, max_new_tokens=96)
    assert answer.stopped
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("price", {"part": "roll"})]
    assert answer.content == "" and answer.tool_problems == ()
    many = gkt.generate(tuned, [asked("roll"), asked("cake")], tools=TOOLS, max_new_tokens=96)
    assert [a.tool_calls[0].arguments for a in many] == [{"part": "roll"}, {"part": "cake"}]
    streamed = "".join(gkt.stream(tuned, asked("cake"), tools=TOOLS, max_new_tokens=96))
    assert streamed == many[1].text
    whole = ROWS[1]["messages"][:4]
    assert gkt.generate(tuned, whole, tools=TOOLS, max_new_tokens=8).content == "8 yes"


def test_the_template_is_that_of_the_tokenizers_marks():
    marked = tiny_model("gemma3", tools=True)
    assert gkt.get_template(marked) == TEMPLATES["functiongemma"]
    assert gkt.get_template(tiny_model("gemma3")) == TEMPLATES["gemma3"]
    assert gkt.get_template(tiny_model("gemma4", tools=True)).tools == "gemma4"


def test_models_without_a_format_refuse_rows_by_name():
    model = tiny_model("gemma3")
    with pytest.raises(PairsError, match="no format for tools") as caught:
        gkt.tune(model, [("a", "b"), *ROWS], verbose=0)
    assert [p[:6] for p in caught.value.problems] == ["row 2:", "row 3:"]
    assert "template='functiongemma'" in str(caught.value)
    with pytest.raises(
        TemplateError, match="prompt 1: The template 'gemma3' has no format"
    ) as caught:
        gkt.generate(model, asked("roll"), tools=TOOLS)
    assert "instruct model of Gemma 4" in str(caught.value)
    with pytest.raises(TemplateError, match=r"tool 1 of `tools` needs a `name`"):
        gkt.generate(model, "Hi", tools=[{"description": "x"}])


def test_functiongemmas_marks_take_the_place_of_unused_tokens(monkeypatch):
    from gemma_keras_tune import testing

    with pytest.raises(TemplateError, match="'<escape>' is not one token of it"):
        gkt.get_template(tiny_model("gemma3"), "functiongemma")
    monkeypatch.setattr(testing, "_TOOL_MARKS", UNUSED_TOKENS)
    model = tiny_model("gemma3", tools=True)
    tokenizer = model.preprocessor.tokenizer
    ids = [tokenizer.token_to_id(token) for token in UNUSED_TOKENS]
    with pytest.warns(PairsWarning, match="FunctionGemma's marks"):
        template = gkt.get_template(model, "functiongemma")
    assert template == TEMPLATES["functiongemma"] and has_marks(tokenizer, FUNCTION_GEMMA)
    assert [tokenizer.token_to_id(mark) for mark in FUNCTION_GEMMA.marks] == ids
    shown = gkt.preview(model, ROWS[:1], rows=1, template=template).rows[0]
    pieces = [p for p, taught in zip(shown.pieces, shown.trained, strict=True) if taught]
    assert "".join(pieces) == (
        "<start_function_call>call:price{part:<escape>roll<escape>}<end_function_call>"
        "<start_function_response>3 yes<end_of_turn>"
    )
    assert {*FUNCTION_GEMMA.marks[2:5], "<escape>"} <= {*pieces}
