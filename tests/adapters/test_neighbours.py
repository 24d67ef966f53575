"""A folder that is something else says what it is, and which neighbour was meant."""

import json

import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing

BASE = "google/gemma-3-270m-it"


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model("gemma3", num_layers=1)


def adapter(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": BASE}))
    return folder


def merged(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def load_error(folder):
    with pytest.raises(gkt.errors.LoadError) as caught:
        gkt.load(str(folder))
    return str(caught.value)


def adapter_error(model, folder):
    with pytest.raises(gkt.errors.AdapterError) as caught:
        gkt.load_adapter(model, folder)
    return str(caught.value)


def test_an_adapter_one_folder_deeper(model, tmp_path):
    inner = adapter(tmp_path / "out" / "adapter")
    message = load_error(tmp_path / "out")
    assert f"{inner} is an adapter: load its base model, {BASE}, then `load_adapter(" in message
    assert f"{inner} is an adapter" in adapter_error(model, tmp_path / "out")


def test_the_checkpoints_of_a_trainer(model, tmp_path):
    for step in (9, 100, 20):
        (adapter(tmp_path / f"checkpoint-{step}") / "optimizer.pt").write_bytes(b"x")
    for message in (load_error(tmp_path), adapter_error(model, tmp_path)):
        assert (
            f"{tmp_path / 'checkpoint-100'} is an adapter, the checkpoint of a trainer" in message
        )
    message = load_error(tmp_path / "checkpoint-9")
    assert f"It is an adapter, the checkpoint of a trainer: load its base model, {BASE}" in message


def test_an_adapter_with_the_config_of_its_base(tmp_path):
    (adapter(tmp_path) / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    message = load_error(tmp_path)
    assert "model.safetensors is missing" in message and "It is an adapter" in message


def test_a_model_where_an_adapter_was_asked_for(model, tmp_path):
    inner = merged(tmp_path / "merged")
    assert f"It is a model: pass it to `load`: {inner}" in adapter_error(model, inner)
    assert f"{inner} is a model: pass it to `load`" in adapter_error(model, tmp_path)
    (inner / "logs").mkdir()
    assert f"The folder above is a model: pass it to `load`: {inner}" in load_error(inner / "logs")


def test_weights_in_parts(tmp_path):
    (tmp_path / "zero_to_fp32.py").write_text("")
    assert "a checkpoint of DeepSpeed or FSDP" in load_error(tmp_path)


def test_a_tokenizer_that_is_in_the_folder_above(tmp_path):
    folder = merged(tmp_path / "checkpoint-5")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    message = load_error(folder)
    assert f"Copy it from the folder above: {tmp_path / 'tokenizer.json'}" in message


def test_an_adapter_beside_a_model_is_told(model, tmp_path):
    folder = gkt.export(model, tmp_path / "m", format="safetensors", check=False, verbose=0)
    adapter(folder)
    with pytest.warns(UserWarning, match="holds an adapter beside the model, and it is not on"):
        gkt.load(str(folder))
