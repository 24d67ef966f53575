"""The text model of folders that see or hear, whoever saved them."""

import json
import pathlib
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.formats.hugging_face.reader import WEIGHTS
from gemma_keras_tune.formats.weights import merged_weights
from gemma_keras_tune.gemma.families import family_of

FAMILIES = ("gemma3", "gemma3n", "gemma4")
TOWERS = {
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight": "vision_tower",
    "multi_modal_projector.mm_soft_emb_norm.weight": "multi_modal_projector",
    "embed_vision.embedding_projection.weight": "embed_vision",
    "audio_tower.layers.0.norm.weight": "audio_tower",
    "embed_audio.embedding.weight": "embed_audio",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each family a text model, and the folder with it."""
    found = {}
    for family in FAMILIES:
        model = testing.tiny_model(family)
        folder = tmp_path_factory.mktemp("text") / family
        found[family] = (
            model,
            gkt.export(model, folder, format="safetensors", check=False, verbose=0),
        )
    return found


def as_media_model(source, folder, *, prefix, outer="", towers=True, **more):
    """The folder as a model that sees and hears, saved by one of many tools."""
    shutil.copytree(source, folder)
    text = json.loads((folder / "config.json").read_text())
    media_type = text["model_type"].removesuffix("_text")
    config = {"model_type": media_type, "text_config": text, "vision_config": {}, **more}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        prefix + name.removeprefix("model."): value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    if towers:
        tensors |= {outer + name: np.ones((2, 2), "float32") for name in TOWERS}
    save_file(tensors, folder / WEIGHTS)
    return folder


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_same(found, expected):
    values = {weight.path: value for weight, value in merged_weights(expected)}
    for weight, value in merged_weights(found):
        np.testing.assert_array_equal(value, values[weight.path], err_msg=weight.path)
    assert len(found.backbone.weights) == len(expected.backbone.weights)


def error(folder):
    with pytest.raises(gkt.errors.LoadError) as caught:
        gkt.load(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "outer"),
    [
        ("model.language_model.", "model."),  # transformers 5, Unsloth, Axolotl
        ("language_model.model.", ""),  # transformers 4, mlx-lm
        ("model.", ""),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_loaded_and_the_rest_told_in_one_line(family, prefix, outer, made, tmp_path):
    model, source = made[family]
    folder = as_media_model(source, tmp_path / "m", prefix=prefix, outer=outer)
    (folder / "tokenizer.model").unlink()
    with pytest.warns(UserWarning) as told:
        loaded = gkt.load(str(folder))
    (line,) = [str(warning.message) for warning in told]
    assert "the text model alone was loaded" in line
    assert all(f"{tower} (1 tensors)" in line for tower in TOWERS.values())
    assert_same(loaded, model)
    for text in ("part number  for 12", "<start_of_turn>user\nGrüße 😀<end_of_turn>\n"):
        ids = np.asarray(model.preprocessor.tokenizer(text))
        np.testing.assert_array_equal(np.asarray(loaded.preprocessor.tokenizer(text)), ids)


def test_fused_by_mlx_lm_without_towers(made, tmp_path, recwarn):
    model, source = made["gemma3"]
    folder = as_media_model(source, tmp_path / "m", prefix="language_model.model.", towers=False)
    assert_same(gkt.load(str(folder)), model)
    assert not [w for w in recwarn if "left out" in str(w.message)]


def test_an_adapter_has_the_names_of_the_model_that_sees(made, tmp_path):
    """So that PEFT puts it on the folder that the text was loaded from."""
    model, source = made["gemma3"]
    folder = as_media_model(source, tmp_path / "m", prefix="model.language_model.", towers=False)
    loaded = gkt.load(str(folder))
    assert all("model.language_model.layers." in one.hugging_face
               for one in family_of(loaded).linears(loaded))  # fmt: skip
    gkt.enable_lora(loaded, rank=2, verbose=0)
    adapter = gkt.save_adapter(loaded, tmp_path / "adapter")
    names = load_file(adapter / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert gkt.load_adapter(model, adapter).rank == 2
    gkt.remove_lora(model)
    again = gkt.export(loaded, tmp_path / "again", format="safetensors", check=False, verbose=0)
    assert "model.layers.0.mlp.up_proj.weight" in load_file(again / WEIGHTS)


def test_weights_under_two_prefixes_are_refused(made, tmp_path):
    folder = as_media_model(made["gemma3"][1], tmp_path / "m", prefix="model.language_model.")
    change(folder, lambda t: t.update({"model.norm.weight": np.ones(16, "float32")}))
    assert "holds weights twice, under different prefixes" in error(folder)


# What is something else


def test_a_head_of_its_own_is_refused_and_a_copy_is_not(made, tmp_path):
    model, source = made["gemma3"]
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "m"))
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    change(folder, lambda t: t.update({"lm_head.weight": embedding.copy()}))
    assert_same(gkt.load(str(folder)), model)
    change(folder, lambda t: t.pop("model.embed_tokens.weight"))
    assert_same(gkt.load(str(folder)), model)
    other = embedding.copy()
    other[5, 3] += 1
    change(folder, lambda t: t.update({"lm_head.weight": other,
                                       "model.embed_tokens.weight": embedding}))  # fmt: skip
    assert "lm_head.weight is not the embedding: KerasHub ties them" in error(folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.embed_tokens.modules_to_save.default.weight",
    ],
)
def test_weights_saved_before_merging_are_named(name, made, tmp_path):
    folder = pathlib.Path(shutil.copytree(made["gemma3"][1], tmp_path / "m"))
    change(folder, lambda t: t.update({name: np.ones((2, 2), "float32")}))
    message = error(folder)
    assert "was saved before its LoRA was merged" in message and name in message
    assert "merge_and_unload" in message and "is no weight of this model" not in message


@pytest.mark.parametrize(
    ("config", "tensor", "kind"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, None, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, None, "mlx"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, None, "fp8"),
        ({}, "model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ({}, "model.layers.0.mlp.up_proj.qweight", "awq"),
        ({}, "model.layers.0.mlp.up_proj.g_idx", "gptq"),
        ({}, "model.layers.0.mlp.up_proj.scales", "mlx"),
        ({}, "model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ({}, "model.layers.0.mlp.up_proj.weight_scale_inv", "fp8"),
    ],
)
def test_quantized_formats_are_named(config, tensor, kind, made, tmp_path):
    folder = pathlib.Path(shutil.copytree(made["gemma3"][1], tmp_path / "m"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensor:
        change(folder, lambda t: t.update({tensor: np.ones((2, 2), "int8")}))
    message = error(folder)
    assert f"are quantized ({kind}), a format this library does not read" in message
    assert "Load the model they were made from" in message


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_float16_is_warned_of_where_it_overflows(family, made, tmp_path):
    if family == "gemma2":
        model = testing.tiny_model(family, num_layers=1)
        source = gkt.export(model, tmp_path / "g2", check=False, verbose=0)
    else:
        source = made[family][1]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gkt.load(str(source), dtype="float16")
    lines = [str(w.message) for w in told if "can leave the range of float16" in str(w.message)]
    assert len(lines) == (family == "gemma3")
