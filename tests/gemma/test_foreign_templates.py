"""Chat templates of others: equal to one of ours, used as they are, or named with what to do."""

import json
import pathlib
import shutil

import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.errors import TemplateError
from gemma_keras_tune.gemma import foreign_templates
from gemma_keras_tune.gemma.foreign_templates import JinjaTemplate, bring_chat_template, judge
from gemma_keras_tune.gemma.state import is_instruct, mark_origin
from gemma_keras_tune.gemma.templates import TEMPLATES, Template

# Written after the description of ChatML, with marks that the tiny tokenizer has.
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|turn>' + message.role + '\\n' + "
    "message.content + '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\\n' }}{% endif %}"
)
TURNS = [gkt.Message("user", "Hello"), gkt.Message("assistant", "Hi")]


@pytest.fixture
def model():
    model = testing.tiny_model("gemma3", num_layers=1)
    mark_origin(model, "somewhere", True)
    return model


def segments(template, messages, **options):
    return [(part.text, part.trained) for part in template.segments(messages, **options)]


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_no_thought"])
def test_a_template_like_ours_is_ours(name, model):
    verdict = judge(TEMPLATES[name].chat_template(), model)
    assert verdict.template == TEMPLATES[name]
    assert verdict.told == ("" if name == "gemma3" else f"its chat template is that of {name!r}")


def test_another_template_is_used_in_training_and_serving(model):
    with pytest.warns(UserWarning, match="its own chat template is used.*end with <turn|>"):
        bring_chat_template(model, CHATML, "somewhere")
    template = gkt.get_template(model)
    assert isinstance(template, JinjaTemplate) and template.stop_token == "<turn|>"
    prompt = "<|turn>user\nHello<turn|>\n<|turn>assistant\n"
    assert segments(template, TURNS[:1], generation_prompt=True) == [(prompt, False)]
    assert segments(template, TURNS) == [(prompt, False), ("Hi<turn|>", True)]
    more = [*TURNS, gkt.Message("user", "Bye"), gkt.Message("assistant", "So long")]
    assert segments(template, more)[2:] == [
        ("\n<|turn>user\nBye<turn|>\n<|turn>assistant\n", False), ("So long<turn|>", True)
    ]  # fmt: skip
    assert template.chat_template() == CHATML
    assert Template.from_config(json.loads(json.dumps(template.to_config()))) == template


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{% for message in messages %}{{ message.content }}{% endfor %}", "cannot be told"),
        ("{{ messages[0].content.upper() }}", "cannot be told from it which text is an answer"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ 'x' * 10 ** 10 }}", "MemoryError"),
        ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than"),
    ],
)
def test_what_cannot_be_used_is_named(source, told, model):
    verdict = judge(source, model)
    assert verdict.template is None
    assert "its chat template is not used, but 'gemma3'" in verdict.told and told in verdict.told
    with pytest.warns(UserWarning, match="is not used"):
        bring_chat_template(model, source, "somewhere")
    assert gkt.get_template(model) == TEMPLATES["gemma3"]


def test_a_template_that_takes_forever_is_stopped(model, monkeypatch):
    monkeypatch.setattr(foreign_templates, "_SECONDS", 1.0)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "takes longer than 1 seconds" in judge(loop, model).told


def test_a_conversation_it_refuses_names_it(model):
    source = CHATML.replace("{{ bos_token }}", "{% if messages[0].role == 'system' %}"
                            "{{ raise_exception('no system') }}{% endif %}")  # fmt: skip
    template = judge(source, model).template
    assert isinstance(template, JinjaTemplate)
    with pytest.raises(TemplateError, match="refuses this conversation: no system"):
        template.segments([gkt.Message("system", "x"), *TURNS])


def test_a_pretrained_model_that_carries_a_template(model):
    mark_origin(model, "somewhere", None)
    ours = TEMPLATES["gemma3"].chat_template()
    with pytest.warns(UserWarning, match="taken for pretrained.*'plain'.*`template='gemma3'`"):
        bring_chat_template(model, ours, "somewhere")
    assert is_instruct(model) is False and gkt.get_template(model).name == "plain"


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_folder_keeps_its_template_on_export(file, model, tmp_path):
    source = gkt.export(model, tmp_path / "m-it", format="safetensors", check=False, verbose=0)
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "other-it"))
    (folder / "gemma_keras_tune.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    config["chat_template"] = named if file == "tokenizer_config.json" else None
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if file == "chat_template.jinja":
        (folder / file).write_text(CHATML)
    with pytest.warns(UserWarning, match="its own chat template is used"):
        loaded = gkt.load(folder)
    out = gkt.export(loaded, tmp_path / "out", format="safetensors", check=False, verbose=0)
    assert (out / "chat_template.jinja").read_text() == CHATML
    gguf = gkt.export(loaded, tmp_path / "m.gguf", format="gguf", check=False, verbose=0)
    assert gkt.template_of(gkt.load(gguf)) == gkt.template_of(loaded)


@pytest.mark.slow
def test_a_prompt_with_marks_is_told_once_everywhere():
    model = testing.tiny_model("gemma3", num_layers=1)
    text = "<bos><start_of_turn>user\nHello<end_of_turn>"
    for ask in (
        lambda: gkt.generate(model, [text, "Hello"], max_new_tokens=2),
        lambda: list(gkt.stream(model, text, max_new_tokens=2)),
    ):
        with pytest.warns(gkt.errors.PairsWarning, match="special tokens in their text") as told:
            ask()
        assert len(told) == 1
        assert "prompt 1: '<bos>' stands in user text" in str(told[0].message)
        assert "'<end_of_turn>' stands in user text" in str(told[0].message)
