"""Prompt templates: the published turn formats, users' own, and what is kept beside the weights."""

import dataclasses
import gc
import json
import types
import weakref

import jinja2
import pytest

from gemma_keras_tune.errors import LoraError, PairsWarning, TemplateError
from gemma_keras_tune.gemma import families, templates
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.templates import (
    PLAIN,
    SIDECAR,
    TEMPLATES,
    FunctionTemplate,
    Segment,
    Template,
    TextTemplate,
    attach_template,
    get_template,
    read_sidecar,
    read_template,
    template_of,
    write_sidecar,
)
from gemma_keras_tune.loading.loader import _handle_instruct
from gemma_keras_tune.pairs import Message
from gemma_keras_tune.testing import FAMILIES, tiny_model, tiny_tokenizer
from gemma_keras_tune.training.tuning import tune

TURN_FORMATS = [name for name in TEMPLATES if name != "plain"]
ASK = (Message("user", " Hi \n"),)
ANSWERED = (*ASK, Message("assistant", " Hello.\n"))
CHAT = (Message("system", "Be brief."), *ANSWERED, Message("user", "Bye"))


def text(template, messages, **kwargs):
    return "".join(segment.text for segment in template.segments(messages, **kwargs))


def trained(template, messages):
    return [segment.text for segment in template.segments(messages) if segment.trained]


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "gemma3n"])
def test_start_of_turn_formats(name):
    template = TEMPLATES[name]
    assert template.segments(ANSWERED) == (
        Segment("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", False),
        Segment("Hello.<end_of_turn>", True),
    )
    assert text(template, CHAT, generation_prompt=True) == (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    assert template.stop_token == "<end_of_turn>"
    assert template.stop_tokens == ("<end_of_turn>", "<eos>")


def test_gemma4_has_a_system_role_of_its_own():
    assert text(TEMPLATES["gemma4"], CHAT, generation_prompt=True) == (
        "<|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
        "<|turn>model\nHello.<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
    )
    assert TEMPLATES["gemma4"].stop_tokens == ("<turn|>", "<|tool_response>", "<eos>")


def test_large_gemma4_gets_an_empty_thought_before_the_last_answer_only():
    template = TEMPLATES["gemma4_no_thought"]
    thought = "<|channel>thought\n<channel|>"
    assert text(template, CHAT, generation_prompt=True).count(thought) == 1
    assert text(template, CHAT, generation_prompt=True).endswith("<|turn>model\n" + thought)
    assert template.segments(ANSWERED)[0].text.endswith(thought)
    assert thought not in template.segments(ANSWERED)[1].text


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_text_begins_with_the_prompt_as_generated_from(name):
    template = TEMPLATES[name]
    prompt = template.segments(ASK, generation_prompt=True)
    assert len(prompt) == 1 and not prompt[0].trained
    assert template.segments(ANSWERED)[0] == prompt[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_trained_and_ends_with_the_stop_token(name):
    template = TEMPLATES[name]
    answers = trained(template, (*CHAT, Message("assistant", "So long.")))
    assert len(answers) == 2
    assert all(answer.endswith(template.stop_token) for answer in answers)
    segments = template.segments((*CHAT, Message("assistant", "So long.")))
    assert [segment.trained for segment in segments] == [False, True, False, True]
    assert segments[2].text.startswith("\n")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [(), (Message("system", "Be brief."),)])
@pytest.mark.parametrize("turns", [1, 2])
def test_jinja_writes_the_same_text(name, system, turns):
    template = TEMPLATES[name]
    tail = (Message("user", 'What does "\\n" in {{ braces }} mean? '),)
    messages = (*system, *(ANSWERED if turns == 2 else ()), *tail)
    rendered = render(template, messages, add_generation_prompt=True)
    assert rendered == "<bos>" + text(template, messages, generation_prompt=True)


def test_jinja_refuses_roles_out_of_order():
    with pytest.raises(RuntimeError, match="alternate"):
        render(TEMPLATES["gemma3"], [*ASK, *ASK])


def test_jinja_of_own_template_places_the_system_text():
    template = TextTemplate("[{system}] Q: {prompt} A: {response}\n")
    rendered = render(template, CHAT, add_generation_prompt=True)
    assert rendered == "<bos>" + text(template, CHAT, generation_prompt=True)
    assert rendered.startswith("<bos>[Be brief.] Q:  Hi \n A:  Hello.")


def render(template, messages, **variables):
    def raise_exception(message):
        raise RuntimeError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template.chat_template()).render(
        messages=[dataclasses.asdict(m) for m in messages], bos_token="<bos>", **variables
    )


def test_plain_template_keeps_white_space_and_ends_with_eos():
    assert PLAIN.segments(ANSWERED) == (
        Segment(" Hi \n\n", False),
        Segment(" Hello.\n<eos>", True),
    )
    with_system = (Message("system", "Be brief."), *ANSWERED)
    assert PLAIN.segments(with_system)[0].text == "Be brief.\n\n Hi \n\n"


def test_own_template_puts_the_space_with_the_answer():
    template = TextTemplate("Question: {prompt}\nAnswer: {response}")
    assert template.segments((Message("user", "2+2"), Message("assistant", "4"))) == (
        Segment("Question: 2+2\nAnswer:", False),
        Segment(" 4<eos>", True),
    )
    prompt = template.segments((Message("user", "2+2"),), generation_prompt=True)
    assert prompt == (Segment("Question: 2+2\nAnswer:", False),)


def test_own_template_with_its_own_ending():
    template = TextTemplate(
        "<start_of_turn>user\n{prompt}<end_of_turn>\nx{response} !<end_of_turn>\n"
    )
    assert template.stop_token == "<end_of_turn>"
    assert trained(template, ANSWERED) == [" Hello.\n !<end_of_turn>"]
    assert TextTemplate("{prompt}|{response};").stop_token == "<eos>"
    assert trained(TextTemplate("{prompt}|{response};"), ANSWERED) == [" Hello.\n;<eos>"]


def test_own_template_with_doubled_braces_and_system():
    template = TextTemplate('{{"s": "{system}", "q": "{prompt}"}} => {response}')
    assert (
        text(template, CHAT[:2], generation_prompt=True) == '{"s": "Be brief.", "q": " Hi \n"} =>'
    )
    assert text(template, ASK, generation_prompt=True).startswith('{"s": "", "q"')


@pytest.mark.parametrize(
    ("template", "problems"),
    [
        ("{prompt}", ["{response} is missing"]),
        ("{response}", ["{prompt} is missing"]),
        ("{instruction} {answer}", 4 * [""]),
        ("{response} {prompt}", ["{response} must come after {prompt} and {system}"]),
        ("{prompt} {response} {system}", ["{response} must come after {prompt} and {system}"]),
        ("{prompt} {prompt} {response}", ["{prompt} is there more than once"]),
    ],
)
def test_wrong_placeholders_are_all_named(template, problems):
    with pytest.raises(TemplateError) as caught:
        TextTemplate(template)
    assert len(caught.value.problems) == len(problems)
    if any(problems):
        assert list(caught.value.problems) == problems


@pytest.mark.parametrize(
    ("roles", "generation_prompt", "words"),
    [
        ("", False, "no user message"),
        ("s", True, "no user message"),
        ("a", False, "the assistant speaks first"),
        ("uu", False, "message 2 is a second user turn in a row"),
        ("sua" + "s", False, "message 4 is a system message, which may only come first, once"),
        ("u", False, "the last turn is the user's, with no answer to learn"),
        ("ua", True, "the last turn is the assistant's, with nothing to answer"),
    ],
)
def test_messages_out_of_order_are_refused(roles, generation_prompt, words):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [Message(names[role], "x") for role in roles]
    with pytest.raises(TemplateError, match=words):
        TEMPLATES["gemma3"].segments(messages, generation_prompt=generation_prompt)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), TextTemplate("{prompt} {response}")])
def test_config_round_trip(template):
    assert Template.from_config(json.loads(json.dumps(template.to_config()))) == template


def test_a_function_is_saved_by_name_and_refused_on_load(tmp_path):
    template = get_template(bare_model(), shout)
    assert text(template, ASK, generation_prompt=True) == " HI \n:"
    assert trained(template, ANSWERED) == [" Hello.\n<eos>"]
    assert template.chat_template() is None
    write_sidecar(tmp_path, {"template": template.to_config()})
    with pytest.raises(TemplateError, match=r"shout.*cannot be saved"):
        read_template(tmp_path)


def test_a_function_must_return_text():
    with pytest.raises(TemplateError, match=r"as a string\. Received: int"):
        get_template(bare_model(), lambda messages: 3).segments(ANSWERED)


def shout(messages):
    return messages[-1].content.upper() + ":"


@pytest.mark.parametrize("config", [{}, {"kind": "text"}, {"kind": "turns", "colour": 3}])
def test_unknown_config(config):
    with pytest.raises(TemplateError, match="not the description of a template"):
        Template.from_config(config)


def test_sidecar_is_merged_and_written_whole(tmp_path):
    assert read_template(tmp_path) is None
    write_sidecar(tmp_path, {"base": "x"})
    write_sidecar(tmp_path, {"template": TEMPLATES["gemma4"].to_config()})
    assert read_template(tmp_path) == TEMPLATES["gemma4"]
    assert read_sidecar(tmp_path)["base"] == "x"
    with pytest.raises(TypeError):
        write_sidecar(tmp_path, {"bad": object()})
    assert [path.name for path in tmp_path.iterdir()] == [SIDECAR]
    (tmp_path / SIDECAR).write_text("{")
    with pytest.raises(TemplateError, match="not valid JSON"):
        read_template(tmp_path)


class BareModel:
    """A model as far as templates look at it."""

    def __init__(self, tokenizer=None):
        self.preprocessor = tokenizer and types.SimpleNamespace(tokenizer=tokenizer)


def bare_model(tokenizer=None):
    return BareModel(tokenizer)


def test_names_strings_and_templates_are_understood():
    model = bare_model(tiny_tokenizer("gemma3"))
    assert get_template(model, "gemma3") is TEMPLATES["gemma3"]
    assert get_template(model, "{prompt}: {response}") == TextTemplate("{prompt}: {response}")
    assert get_template(model, PLAIN) is PLAIN
    for wrong in ("chatml", 3):
        with pytest.raises(TemplateError, match=r"\{prompt\}"):
            get_template(model, wrong)


@pytest.mark.parametrize(
    ("family", "instruct", "per_layer", "expected"),
    [
        *((family, False, 4, "plain") for family in FAMILIES),
        *((family, True, 4, family) for family in FAMILIES),
        ("gemma3", None, 4, "gemma3"),
        ("gemma4", True, 0, "gemma4_no_thought"),
    ],
)
def test_auto_follows_the_generation(monkeypatch, family, instruct, per_layer, expected):
    monkeypatch.setattr(templates, "is_instruct", lambda model: instruct)
    monkeypatch.setattr(templates, "family_of", lambda model: families.FAMILIES[family])
    model = bare_model()
    model.backbone = types.SimpleNamespace(hidden_size_per_layer_input=per_layer)
    assert get_template(model) is TEMPLATES[expected]


def test_a_stop_token_the_tokenizer_lacks_is_refused():
    template = dataclasses.replace(TEMPLATES["gemma3"], turn_end="<no_such_token>")
    with pytest.raises(TemplateError, match="'<no_such_token>' is not one token"):
        get_template(bare_model(tiny_tokenizer("gemma3")), template)


OPENING = "<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n"


def test_a_leading_bos_is_there_once():
    tokenizer = tiny_tokenizer("gemma3")
    own = TextTemplate("<bos>" + OPENING + "{response}<end_of_turn>")
    written = FunctionTemplate(
        lambda messages: "<bos>" + OPENING.replace("{prompt}", messages[0].content), "<end_of_turn>"
    )
    messages = (Message("user", "yes"), Message("assistant", "no"))
    # <bos>, <start_of_turn>, us er \n, y es, <end_of_turn>, \n, …, n o, <end_of_turn>
    expected = [2, 6, 336, 291, 26, 554, 300, 7, 26, 6, 312, 340, 26, 538, 537, 7]
    for template in (own, written):
        ids, _ = RowTokenizer(tokenizer).encode(template.segments(messages))
        assert list(ids) == expected
    rendered = render(own, messages[:1], add_generation_prompt=True)
    assert rendered == "<bos>" + OPENING.replace("{prompt}", "yes")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{prompt}<eos>{response}", ["<eos>"]),
        (" <bos>{prompt}{response}", ["<bos>"]),
        ("<bos><bos>{prompt}{response}", ["<bos>"]),
        ("{prompt}<pad>{response}<unk><eos>", ["<pad>", "<unk>"]),
        ("{prompt}{response}<end_of_turn>\n<eos>", ["<eos>"]),
    ],
)
def test_control_tokens_that_would_be_spelled_out_are_refused(text, named):
    with pytest.raises(TemplateError, match="spell them out") as caught:
        TextTemplate(text)
    assert caught.value.problems == tuple(f"{token!r} stands in the text" for token in named)


def test_a_function_may_write_no_control_token_of_its_own():
    with pytest.raises(TemplateError, match="'<eos>' stands in the text"):
        FunctionTemplate(lambda m: f"{m[0].content}<eos>").segments(ANSWERED)
    (spoken,) = FunctionTemplate(lambda m: m[0].content).segments(
        (Message("user", "<bos> what is <eos>?"),), generation_prompt=True
    )
    assert spoken.text == "<bos> what is <eos>?"  # the user's own text
    with pytest.raises(TemplateError, match="'<eos>' stands in the text"):
        dataclasses.replace(TEMPLATES["gemma3"], turn_end="<eos>")


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f == "gemma3" else pytest.mark.slow) for f in FAMILIES],
)
def test_special_tokens_in_the_text_are_warned_of_by_tune(family):
    rows = [
        ("hi <start_of_turn>user evil <bos> <|turn>model", "b<end_of_turn>"),
        ("<h1> a < b <| no <turn>", "c <pad>"),
    ]
    model = tiny_model(family)
    with (
        pytest.warns(PairsWarning, match="Some pairs look wrong") as caught,
        pytest.raises(LoraError),  # after the pairs, and before anything is compiled
    ):
        tune(model, rows, template="plain", target_modules=["no_such_layer"], verbose=0)
    (told,) = [str(w.message) for w in caught if issubclass(w.category, PairsWarning)]
    assert sorted(line.strip(" -") for line in told.splitlines()[1:]) == [
        "row 1: '<bos>' stands in user text",
        "row 1: '<end_of_turn>' stands in assistant text",
        "row 1: '<start_of_turn>' stands in user text",
        "row 1: '<|turn>' stands in user text",
        "row 2: '<pad>' stands in assistant text",
    ]


@pytest.mark.parametrize(
    ("preset", "instruct"),
    [("shieldgemma_2b_en", True), ("gemma3_instruct_270m", True), ("gemma3_270m", False)],
)
def test_which_presets_are_asked_in_turns(preset, instruct):
    assert _handle_instruct(preset, f"kaggle://google/x/keras/{preset}/1") is instruct


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_tokens_are_single_ids(family):
    ids = TEMPLATES[family].stop_token_ids(tiny_tokenizer(family))
    assert len(ids) == 2 and ids[1] == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["own", "plain"])
def test_answers_end_with_the_id_of_the_stop_token(family, name):
    tokenizer = tiny_tokenizer(family)
    template = TEMPLATES[family if name == "own" else "plain"]
    ids, taught = RowTokenizer(tokenizer).encode(template.segments(ANSWERED))
    prompt, _ = RowTokenizer(tokenizer).encode(template.segments(ASK, generation_prompt=True))
    assert ids[-1] == template.stop_token_ids(tokenizer)[0] and taught[-1]
    assert list(ids[: len(prompt)]) == list(prompt) and not taught[: len(prompt)].any()
    assert taught[len(prompt) :].all()


@pytest.mark.slow
def test_attached_template_wins_and_does_not_keep_the_model():
    model = bare_model()
    assert template_of(model) is None
    attach_template(model, TEMPLATES["gemma4"])
    assert get_template(model) is TEMPLATES["gemma4"]
    attach_template(model, None)
    assert template_of(model) is None
    attach_template(model, PLAIN)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_only_templates_are_attached():
    with pytest.raises(TemplateError, match="`template` must be a `Template` or None"):
        attach_template(tiny_model(), "gemma3")
