"""Damaged and hostile Hugging Face folders: a clear error, every problem, nothing run."""

import json
import pathlib
import pickle
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.formats.hugging_face.reader import INDEX, WEIGHTS
from gemma_keras_tune.formats.weights import merged_weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "whole"
    model = testing.tiny_model("gemma4", moe=True)
    return gkt.export(model, folder, format="safetensors", check=False, verbose=0)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "sharded"
    model = testing.tiny_model("gemma3", num_layers=1)
    return gkt.export(model, folder, shard_size="20KB", check=False, verbose=0)


@pytest.fixture
def folder(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))


def error(folder):
    with pytest.raises(gkt.errors.LoadError) as caught:
        gkt.load(str(folder))
    return caught.value


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_settings_as_transformers_nests_them(folder, whole):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    heads = {"head_dim": config.pop("global_head_dim")}
    heads["num_key_value_heads"] = config.pop("num_global_key_value_heads")
    config["per_layer_config"] = {"1": heads, "3": heads}
    file.write_text(json.dumps(config))
    expected = {weight.path: value for weight, value in merged_weights(gkt.load(str(whole)))}
    for weight, value in merged_weights(gkt.load(str(folder))):
        np.testing.assert_array_equal(value, expected[weight.path])
    for name in ("num_attention_heads", "layer_types"):
        del config[name]
    file.write_text(json.dumps(config))
    assert error(folder).problems == (
        "num_attention_heads is missing",
        "layer_types is missing",
    )


def test_shapes_that_lie_are_all_named(folder):
    def lie(tensors):
        # As many values, so that reshaping them would go through.
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:3]
        del tensors["model.layers.1.router.scale"]
        codes = "model.layers.2.mlp.up_proj.weight"
        tensors[codes] = tensors[codes].astype("int8")

    change(folder, lie)
    problems = error(folder).problems
    assert len(problems) == 4
    assert "model.norm.weight has shape (3,), expected (16,)" in problems
    assert any("q_proj.weight has shape (16, 32), expected (32, 16)" in p for p in problems)
    assert "model.layers.1.router.scale is missing" in problems
    assert any("up_proj.weight is I8: quantized" in p for p in problems)


def test_a_shape_that_lies_in_gemma3_is_seen_too(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    name = "model.layers.0.mlp.up_proj.weight"
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, file)
    assert f"{name} has shape (16, 24), expected (24, 16)" in error(folder).problems


def test_settings_that_lie_build_nothing(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    assert "tells of 1000000000 layers, and its weights are those of 4" in str(error(folder))
    file.write_text(json.dumps(config | {"hidden_size": 1 << 30}))
    assert len(error(folder).problems) > 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(folder, value):
    def spoil(tensors):
        tensors["model.norm.weight"][2] = value
        tensors["model.layers.0.layer_scalar"][:] = value

    change(folder, spoil)
    assert error(folder).problems == ("layer_norm", "decoder_block_0/layer_scalar")


def test_a_preset_with_nan(tmp_path):
    model = testing.tiny_model("gemma3", num_layers=1)
    model.save_to_preset(str(tmp_path / "preset"))
    scale = model.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, np.nan))
    model.save_to_preset(str(tmp_path / "preset"))
    assert error(tmp_path / "preset").problems == ("layer_norm",)


def test_an_index_that_leads_out_of_the_folder(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    index = json.loads((folder / INDEX).read_text())
    names = list(index["weight_map"])
    for name, place in zip(names, ("../secret", "/etc/passwd", "C:\\x", ".."), strict=False):
        index["weight_map"][name] = place
    (folder / INDEX).write_text(json.dumps(index))
    found = error(folder)
    assert len(found.problems) == 4
    assert f"{INDEX} leads out of the folder: '../secret'" in found.problems
    (folder / INDEX).write_text('{"weight_map": [1, 2]}')
    assert "holds no map of weights" in str(error(folder))


def test_shards_missing_swapped_and_cut_off(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "copy")
    files = sorted(folder.glob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    problems = error(folder).problems
    assert f"{files[0].name} is missing" in problems
    assert any(problem.startswith(f"{files[1].name} cannot be read") for problem in problems)
    shutil.rmtree(folder)
    shutil.copytree(sharded, folder)
    files[1].write_bytes(files[0].read_bytes())
    assert any(f"is not in {files[1].name}, where the index places it" in problem
               for problem in error(folder).problems)  # fmt: skip


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 200_000_000),
        struct.pack("<Q", 10) + b"not json!!",
        struct.pack("<Q", 2) + b"[]",
        b"",
    ],
)
def test_hostile_headers(header, folder):
    (folder / WEIGHTS).write_bytes(header)
    (problem,) = error(folder).problems
    assert problem.startswith(f"{WEIGHTS} cannot be read")


def test_offsets_that_lie(folder):
    body = {"model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 1 << 40]}}
    text = json.dumps(body).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    assert error(folder).problems[0].startswith(f"{WEIGHTS} cannot be read")


def test_a_pickle_is_named_and_never_opened(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "sprung",)

    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    problems = error(folder).problems
    assert any("pytorch_model.bin is a pickle, which may run code" in p for p in problems)
    assert f"{WEIGHTS} is missing" in problems
    shutil.copy(folder / "pytorch_model.bin", folder / WEIGHTS)
    assert error(folder).problems[0].startswith(f"{WEIGHTS} cannot be read")
    assert not (tmp_path / "sprung").exists()


def test_half_precision_is_read(folder):
    def halve(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(ml_dtypes.bfloat16)

    change(folder, halve)
    model = gkt.load(str(folder), dtype="float32")
    assert np.asarray(model.backbone.layer_norm.scale).dtype == np.float32


def test_a_folder_with_tokenizer_json_alone(folder, sharded, tmp_path):
    for made in (folder, pathlib.Path(shutil.copytree(sharded, tmp_path / "gemma3"))):
        text = "part number  for <start_of_turn> 日本 12"
        expected = np.asarray(gkt.load(str(made)).preprocessor.tokenizer(text))
        (made / "tokenizer.model").unlink()
        again = np.asarray(gkt.load(str(made)).preprocessor.tokenizer(text))
        np.testing.assert_array_equal(again, expected)
