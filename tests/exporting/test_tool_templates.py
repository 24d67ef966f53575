"""Exports keep the format for tools: the template, its marks as tokens, the token that stops."""

import json
import urllib.request

import gguf
import pytest
from _tool_conversations import CONVERSATIONS, PING, WEATHER, messages_of

import gemma_keras_tune as gkt
from gemma_keras_tune.gemma.templates import TEMPLATES
from gemma_keras_tune.gemma.tools import TOOL_FORMATS, has_marks
from gemma_keras_tune.testing import tiny_model

FORMATS = {"gemma3": "functiongemma", "gemma4": "gemma4"}


@pytest.fixture(params=FORMATS)
def model(request):
    found = tiny_model(request.param, tools=True)
    gkt.attach_template(found, TEMPLATES[FORMATS[request.param]])
    return found


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_an_export_has_the_template_and_stops_at_a_call(model, format, tmp_path):
    path = tmp_path / ("out.gguf" if format == "gguf" else "out")
    gkt.export(model, path, format=format, dtype="float32", check=False, verbose=0)
    template = gkt.template_of(model)
    if format == "gguf":
        field = gguf.GGUFReader(path).fields["tokenizer.chat_template"]
        assert field.contents() == template.chat_template()
    else:
        assert (path / "chat_template.jinja").read_text("utf-8") == template.chat_template()
        stops = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
        assert stops == sorted(template.stop_token_ids(model.preprocessor.tokenizer))
        assert len(stops) == 3
    again = gkt.load(str(path), dtype="float32")
    assert gkt.get_template(again) == template
    assert has_marks(again.preprocessor.tokenizer, TOOL_FORMATS[template.tools])


def test_ollama_says_that_it_has_no_tools(model, tmp_path):
    with pytest.warns(UserWarning, match=r"writes no tools and no calls"):
        gkt.export(model, tmp_path / "out", format="ollama", check=False, verbose=0)
    stop = TEMPLATES[gkt.template_of(model).name].tool_format.result_start
    assert f'PARAMETER stop "{stop}"' in (tmp_path / "out" / "Modelfile").read_text("utf-8")


@pytest.mark.slow
def test_llama_cpp_writes_the_prompts_of_training(model, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    path = tmp_path / "out.gguf"
    gkt.export(model, path, format="gguf", dtype="float32", check=False, verbose=0)
    options = xllamacpp.CommonParams()
    options.model.path, options.use_jinja, options.warmup = str(path), True, False
    options.n_ctx, options.n_parallel = 512, 1
    server = xllamacpp.Server(options)
    # A server takes results that are text alone.
    texts = [c for c in CONVERSATIONS.values() if all(type(m["content"]) is not dict for m in c)]
    assert len(texts) >= 4
    for conversation in texts:
        for end in (i for i, m in enumerate(conversation) if m["role"] == "assistant"):
            asked = conversation[:end]
            body = json.dumps({"messages": asked, "tools": [WEATHER, PING]}).encode()
            request = urllib.request.Request(
                f"{server.listening_address}/apply-template", body,
                {"Content-Type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=60) as answer:
                written = json.load(answer)["prompt"]
            messages = messages_of(asked, [WEATHER, PING], ends_with="user")
            segments = gkt.template_of(model).segments(messages, generation_prompt=True)
            assert written.removeprefix("<bos>") == "".join(s.text for s in segments)
