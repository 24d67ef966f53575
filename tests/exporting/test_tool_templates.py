"""Exports keep the format for tools: the template, its marks as tokens, the token that stops."""

import json

import gguf
import pytest

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
