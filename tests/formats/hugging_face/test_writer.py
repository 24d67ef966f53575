"""Hugging Face folders, opened by transformers and by `load`."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from _hostile_texts import HOSTILE
from _paths import RUNTIMES

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.exporting.receipts import read_receipt
from gemma_keras_tune.formats.weights import merged_weights
from gemma_keras_tune.gemma.families import backbone_inputs, family_of

# Heads times width is not the model's width; several heads share keys; soft caps; both kinds of
# attention, with rows longer than the window; a stretched rotary embedding.
MODELS = {
    "gemma": dict(num_query_heads=4, num_key_value_heads=2, head_dim=8),
    "gemma2": dict(attention_logit_soft_cap=5.0, final_logit_soft_cap=3.0, sliding_window_size=8),
    "gemma3": dict(num_layers=7, global_rope_scaling_factor=8.0, sliding_window_size=8),
    "gemma3n": dict(altup_num_inputs=3),
    "gemma4": dict(),
    "gemma4 moe": dict(moe=True),
}


def tuned(name, **sizes):
    model = testing.tiny_model(name.partition(" ")[0], **{**MODELS[name], **sizes})
    gkt.enable_lora(model, rank=2, target_modules="all")
    draw = np.random.default_rng(0)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, 0.3 * draw.normal(size=b.shape).astype("float32"))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every model with the folder it was written to."""
    root = tmp_path_factory.mktemp("export")
    made = {name: (tuned(name), root / name.replace(" ", "_")) for name in MODELS}
    for model, folder in made.values():
        gkt.export(model, folder, format="safetensors", check=False, verbose=0)
    return made


def in_memory(model, ids):
    x = backbone_inputs(model.backbone, ids, np.ones_like(ids))
    hidden = np.asarray(model.backbone(x))
    head = family_of(model).head(model)
    logits = hidden @ np.asarray(head.embedding).T
    return head.soft_cap * np.tanh(logits / head.soft_cap) if head.soft_cap else logits


TEXTS = ["part number for brake 7", "a  b", "  x", "Ünï \n\n\t🙂 日本", "<end_of_turn>"]


IDS = np.random.default_rng(1).integers(5, 500, (1, 24))


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    """What transformers makes of each folder: not here, torch beside TensorFlow may crash."""
    root = tmp_path_factory.mktemp("asked")
    asked = {}
    for model, folder in folders.values():
        ours = model.preprocessor.tokenizer
        stops = [1, *gkt.get_template(model).stop_token_ids(ours)]
        asked[str(folder)] = {
            "ids": IDS.tolist(),
            "texts": TEXTS,
            "chat": [{"role": "user", "content": " Hello "}],
            "spoken": [*np.asarray(ours("roll")).tolist(), *stops],
        }
    (root / "asked.json").write_text(json.dumps(asked))
    script = RUNTIMES / "transformers_twin.py"
    command = [sys.executable, script, root / "asked.json", root / "found.json"]
    subprocess.run(command, check=True)
    return json.loads((root / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("name", MODELS)
def test_transformers_answers_as_the_model_in_memory(name, folders, answers):
    model, folder = folders[name]
    found = answers[str(folder)]
    ours = model.preprocessor.tokenizer
    template = gkt.get_template(model)
    assert found["class"] == name.partition(" ")[0].capitalize() + "ForCausalLM"
    assert found["loading"] == {}
    logits = np.asarray(found["logits"])
    np.testing.assert_allclose(in_memory(model, IDS), logits, atol=1e-4)
    with gkt.lora_disabled(model):
        assert np.abs(in_memory(model, IDS) - logits).max() > 1e-2  # LoRA is in what was written
    assert found["texts"] == [[2, *np.asarray(ours(text)).tolist()] for text in TEXTS]
    segments = template.segments([gkt.Message("user", " Hello ")], generation_prompt=True)
    assert found["chat"] == "<bos>" + "".join(segment.text for segment in segments)
    assert set(found["stops"]) == {1, *template.stop_token_ids(ours)}
    assert found["spoken"] == "roll"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_load_gives_the_same_weights(name, folders):
    model, folder = folders[name]
    again = gkt.load(str(folder))
    assert type(again) is type(model)
    theirs = {weight.path: value for weight, value in merged_weights(again)}
    for weight, value in merged_weights(model):
        np.testing.assert_array_equal(theirs[weight.path], value, err_msg=weight.path)
    assert gkt.template_of(again) == gkt.template_of(model)


@pytest.mark.real
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_the_real_270m_in_transformers(tmp_path):
    model = gkt.load("package://gemma3_270m")
    hostile = "\n".join(HOSTILE)
    # Token ids, logits and greedy answers are compared.
    path = gkt.export(
        model, tmp_path / "out", prompts=["What is the capital of France?", hostile], check="run",
        verbose=0,
    )  # fmt: skip
    outcome = read_receipt(path).verification
    assert outcome.status == "passed" and outcome.runtime.startswith("transformers")
    assert any("logits differ by" in text for text in outcome.checked)


# What transformers 5 reads for each generation.
CLASSES = {
    "gemma": ("gemma", "GemmaForCausalLM", 8192),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", 8192),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", 131_072),
    # KerasHub's backbone holds that of Gemma 3n alone.
    "gemma3n": ("gemma3n_text", "Gemma3nForCausalLM", 32_768),
    "gemma4": ("gemma4_text", "Gemma4ForCausalLM", 131_072),
    "gemma4 moe": ("gemma4_text", "Gemma4ForCausalLM", 262_144),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_faults_of_kerashubs_exporter_are_not_ours(name, folders):
    model, folder = folders[name]
    files = {
        file: json.loads((folder / file).read_text())
        for file in ("config.json", "generation_config.json", "tokenizer_config.json",
                     "special_tokens_map.json", "tokenizer.json")
    }  # fmt: skip
    config, generation = files["config.json"], files["generation_config.json"]
    template = gkt.get_template(model)
    stops = {1, *template.stop_token_ids(model.preprocessor.tokenizer)}
    # It exchanges the tokens that begin and end a text.
    assert (config["bos_token_id"], config["pad_token_id"]) == (2, 0)
    assert generation["bos_token_id"] == 2
    # It leaves out the generation config, and with it the end of a turn.
    assert set(config["eos_token_id"]) == set(generation["eos_token_id"]) == stops
    # It leaves out the class, and the longest text.
    kind, owner, longest = CLASSES[name]
    assert (config["model_type"], config["architectures"]) == (kind, [owner])
    assert config["max_position_embeddings"] == longest
    # It ties no embeddings and rounds soft caps away.
    assert config["tie_word_embeddings"] is True
    cap = family_of(model).head(model).soft_cap
    assert config.get("final_logit_softcapping") == cap
    # It leaves out tokenizer.json, the chat template and the special tokens.
    told = files["tokenizer_config.json"]
    added = {int(id): token["content"] for id, token in told["added_tokens_decoder"].items()}
    assert added == {t["id"]: t["content"] for t in files["tokenizer.json"]["added_tokens"]}
    assert {"<pad>", "<eos>", "<bos>", *template.stop_tokens} <= set(added.values())
    assert told["chat_template"] == (folder / "chat_template.jinja").read_text()
    assert files["special_tokens_map.json"]["eos_token"] == "<eos>"
    if name == "gemma3":
        scaling = config.get("rope_scaling") or config["rope_parameters"]["full_attention"]
        assert scaling == scaling | {"rope_type": "linear", "factor": 8.0}
    if name.startswith("gemma4"):
        # Full layers turn a part of each head, and may take keys as values.
        assert config["rope_parameters"]["full_attention"]["rope_type"] == "proportional"
        assert config["attention_k_eq_v"] is (name == "gemma4 moe")
        assert config["enable_moe_block"] is (name == "gemma4 moe")


def test_shards_and_their_index(tmp_path):
    from safetensors.numpy import load_file

    model = testing.tiny_model("gemma")
    gkt.export(model, tmp_path / "model", shard_size="20KB", check=False, verbose=0)
    files = sorted(tmp_path.glob("model/model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert held == index["weight_map"]
    weights = {weight.hugging_face: value for weight, value in merged_weights(model)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    assert set(weights) == set(held)


def test_half_precision_and_what_it_cannot_hold(tmp_path):
    from safetensors import safe_open

    model = testing.tiny_model("gemma3")
    weights = [weight.hugging_face for weight, _ in merged_weights(model)]
    gkt.export(model, tmp_path / "model", dtype="bfloat16", check=False, verbose=0)
    with safe_open(tmp_path / "model/model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in weights} == {"BF16"}
    scale = model.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, 1e6))
    with pytest.raises(
        gkt.errors.ExportError, match=r"model\.norm\.weight holds values up to 1e\+06"
    ):
        gkt.export(model, tmp_path / "half", dtype="float16", check=False, verbose=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_written_is_refused(tmp_path):
    model = testing.tiny_model("gemma3")
    for options, message in (
        (dict(format="onnx"), "`format` must be"),
        (dict(format="safetensors", quantization="Q8_0"), "`quantization` is for"),
        (dict(dtype="float8"), "`dtype` must be"),
        (dict(shard_size="5 apples"), "`shard_size` must be"),
        (dict(format="keras", dtype="float16"), "keeps the dtype"),
    ):
        with pytest.raises(gkt.errors.ExportError, match=message):
            gkt.export(model, tmp_path / "x", check=False, verbose=0, **options)
    odd = testing.tiny_model("gemma3", use_query_key_norm=False, layer_norm_epsilon=1e-3)
    with pytest.raises(gkt.errors.ExportError, match="use_query_key_norm is False") as caught:
        gkt.export(odd, tmp_path / "x", check=False, verbose=0)
    # Of KerasHub's norms the last alone has it.
    assert "layer_norm_epsilon is 0.001; transformers computes with 1e-06" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_a_gemma3_whose_layers_all_see_everything(tmp_path):
    model = testing.tiny_model("gemma3", num_layers=2, use_sliding_window_attention=False)
    folder = gkt.export(model, tmp_path / "out", check=True, prompts=["Hello!"], verbose=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 2
    assert config["sliding_window_pattern"] == 1 and config["rms_norm_eps"] == 1e-6
    assert not gkt.load(folder).backbone.use_sliding_window_attention
    verdict = gkt.verify(folder)
    assert verdict.passed and not verdict.skipped, verdict


def test_a_preset_and_a_gguf_file_by_name(tmp_path):
    import keras_hub

    model = testing.tiny_model("gemma3")
    gkt.export(model, tmp_path / "preset", format="keras", check=False, verbose=0)
    keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset"))
    path = gkt.export(model, tmp_path / "tiny.gguf", dtype="float32", check=False, verbose=0)
    assert path.is_file() and gkt.load(str(path)).backbone.num_layers == model.backbone.num_layers
    with pytest.raises(gkt.errors.ExportError, match="already exists"):
        gkt.export(model, path, check=False, verbose=0)
    gkt.export(model, path, overwrite=True, check=False, verbose=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "preset", "tiny.gguf", "tiny.gguf.receipt.json",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "gguf", "ollama", "gemma_jax"])
def test_of_a_model_that_sees_the_text_tower_is_written(format, tmp_path):
    if format == "gemma_jax":
        pytest.importorskip("orbax.checkpoint")
    from keras_hub.src.models.gemma3.gemma3_vision_encoder import Gemma3VisionEncoder

    sight = Gemma3VisionEncoder(
        image_size=16, patch_size=4, num_heads=2, hidden_dim=8, num_layers=1,
        intermediate_dim=8, output_dim=16, pool_size=2,
    )  # fmt: skip
    model = testing.tiny_model("gemma3", vision_encoder=sight)
    path = tmp_path / ("out.gguf" if format == "gguf" else "out")
    with pytest.warns(UserWarning, match="the text tower alone: it will not see images"):
        gkt.export(model, path, format=format, dtype="float32", verbose=0, check=False)
    again = gkt.load(str(path), dtype="float32")
    assert again.backbone.vision_encoder is None
    theirs = {weight.path: value for weight, value in merged_weights(again)}
    for weight, value in merged_weights(model):
        np.testing.assert_allclose(theirs.pop(weight.path), value, atol=1e-6)
    assert not theirs
