"""What leaves is the merged weight, whole numbers only, and never a code."""

import importlib.util
import json
import math
import types

import keras
import keras_hub
import numpy as np
import pytest
from _quantized import quantize
from safetensors.numpy import save_file

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.active import use_adapter
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.exporting.receipts import read_receipt, record_answers
from gemma_keras_tune.formats.hugging_face.reader import INDEX, WEIGHTS, read_tensors
from gemma_keras_tune.formats.keras_preset import largest_variable, write_preset
from gemma_keras_tune.formats.weights import DTYPES, merged_weights, shape_problems
from gemma_keras_tune.gemma.building import empty_backbone
from gemma_keras_tune.gemma.families import FAMILIES, family_of


def tuned(**sizes):
    model = testing.tiny_model("gemma3", **sizes)
    gkt.enable_lora(model, rank=2, verbose=0)
    draw = np.random.default_rng(0)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, draw.normal(size=b.shape).astype("float32"))
    return model


def values_of(model):
    return {weight.path: value for weight, value in merged_weights(model)}


def assert_same(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_allclose(right[path], value, rtol=0, atol=tolerance, err_msg=path)


def test_all_that_does_not_fit_is_told_at_once():
    expected = {"a": (2, 3), "b": (4,), "c": (5,)}
    assert shape_problems(expected, {**expected, "idle": (1,)}, {"idle"}) == []
    assert shape_problems(
        expected, {"a": (3, 2), "c": (5,), "x": (1,), "idle": (1,)}, {"idle"}
    ) == [
        "a has shape (3, 2), expected (2, 3)",
        "b is missing",
        "x is no weight of this model",
    ]


def test_lora_that_is_on_is_added():
    model = tuned()
    on = values_of(model)
    with gkt.lora_disabled(model):
        off = values_of(model)
    gkt.merge_lora(model)
    plain = values_of(testing.tiny_model("gemma3"))
    changed = [path for path in plain if np.abs(on[path] - plain[path]).max() > 0]
    assert len(changed) == 7 * len(model.backbone.transformer_layers)
    assert_same(off, plain)
    assert_same(values_of(model), on)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_merged_is_not_copied(dtype):
    model = tuned(dtype=dtype)
    merged = {f"{linear.hugging_face}.weight" for linear in lora_linears(model)}
    for weight, value in merged_weights(model):
        if weight.hugging_face in merged:
            assert value.dtype == np.float32, weight.path
        else:
            assert value.dtype == DTYPES[dtype], weight.path
            assert np.shares_memory(value, np.asarray(weight.variable)), weight.path


def switched_off(model, way):
    if way == "lora_disabled":
        return gkt.lora_disabled(model)
    return use_adapter(model, None)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora_disabled", "set_adapter"])
@pytest.mark.parametrize("format", ["keras", "save_preset", "safetensors", "gguf", "gemma_jax"])
def test_what_is_off_stays(format, way, tmp_path):
    if format == "gemma_jax":
        pytest.importorskip("orbax.checkpoint")
    model, base = tuned(num_layers=1), testing.tiny_model("gemma3", num_layers=1)
    with switched_off(model, way):
        if format == "save_preset":
            path = gkt.save_preset(model, tmp_path / "out", check=True, prompts=["Hello!"])
        else:
            options = {"dtype": "float32"} if format == "gguf" else {}
            path = gkt.export(
                model, tmp_path / "out", format=format, check=True, prompts=["Hello!"], verbose=0,
                **options,
            )  # fmt: skip
    receipt = read_receipt(path)
    assert receipt.adapter is None and receipt.recordings == record_answers(base, ["Hello!"])
    # GGUF holds norms plus 1.
    assert_same(values_of(gkt.load(str(path))), values_of(base), 1e-6 if format == "gguf" else 0)
    if (format, way) == ("keras", "lora_disabled"):
        assert gkt.verify(path).passed
    assert gkt.adapters.active(model) == "default"


def test_an_adapter_that_is_off_is_no_file(tmp_path):
    model = tuned(num_layers=1)
    with gkt.lora_disabled(model), pytest.raises(gkt.errors.ExportError, match="switched off"):
        gkt.export(model, tmp_path / "x.gguf", format="gguf_adapter", verbose=0)


@pytest.mark.parametrize(
    "name, format",
    [
        ("x.safetensors", "auto"), ("x.keras", "auto"), ("x.h5", "keras"), ("x.tflite", "auto"),
        ("x.litertlm", "litert"), ("x.GGUF", "ollama"), ("x.gguf", "safetensors"),
    ],
)  # fmt: skip
def test_a_folder_does_not_get_the_name_of_a_file(name, format, tmp_path):
    model = testing.tiny_model("gemma3", num_layers=1)
    with pytest.raises(gkt.errors.ExportError, match=r"has the name of a file.*\n.*such as 'x'"):
        gkt.export(model, tmp_path / name, format=format, verbose=0)
    assert not list(tmp_path.iterdir())


def test_arguments_that_a_format_does_not_take_are_refused(tmp_path):
    model = testing.tiny_model("gemma3", num_layers=1)
    for format in ("gguf", "ollama", "gemma_jax", "litert", "gguf_adapter"):
        with pytest.raises(
            gkt.errors.ExportError, match="`shard_size` is for 'keras' and 'safetensors'"
        ):
            gkt.export(model, tmp_path / "out", format=format, shard_size="1GB", verbose=0)
    with pytest.raises(gkt.errors.ExportError, match="`quantization` is for 'gguf' and 'ollama'"):
        gkt.export(model, tmp_path / "out", format="keras", quantization="Q8_0", verbose=0)


def test_a_preset_is_cut_into_shards_and_the_bar_goes_to_its_end(tmp_path, capsys):
    model = testing.tiny_model("gemma3", num_layers=2)
    options = {"format": "keras", "shard_size": "40KB", "check": False}
    path = gkt.export(model, tmp_path / "out", **options, verbose=1)
    assert len(list(path.glob("*.weights.h5"))) > 1
    assert_same(values_of(gkt.load(str(path))), values_of(model))
    assert "writing out: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gemma3", "gemma3n", "gemma4"])
def test_a_variable_larger_than_a_file_of_weights_is_saved(family, dtype, tmp_path):
    """KerasHub's limit of 5 GB, lowered to a kilobyte."""
    model = testing.tiny_model(family, dtype=dtype)
    assert largest_variable(model) > 1024
    write_preset(model, tmp_path, shard_size=1024)
    found = gkt.load(tmp_path, dtype=dtype)
    assert_same(values_of(found), values_of(model))


# Rows and width of the largest variable, at the real sizes: the inputs of each layer, or the
# embedding.
REAL = {
    "gemma3n": ("embed_tokens_per_layer", dict(
        num_hidden_layers=35, hidden_size_per_layer_input=256, vocab_size_per_layer_input=262_144,
        intermediate_size=[24] * 35, activation_sparsity_pattern=[0.0] * 35,
        num_kv_shared_layers=15,
        layer_types=[*["sliding_attention"] * 4, "full_attention"] * 7, text_vocab_size=262_400,
    ), 262_144 * 35 * 256),
    "gemma3": ("embed_tokens", dict(
        vocabulary_size=262_208, hidden_dim=5376, num_layers=1), 262_208 * 5376),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", REAL)
def test_what_real_sizes_need_is_computed_without_memory(family, dtype):
    name, sizes, count = REAL[family]
    table = FAMILIES[family]
    backbone = empty_backbone(table, {**table.tiny, **sizes}, dtype)
    model = types.SimpleNamespace(backbone=backbone)
    size = largest_variable(model)
    assert size == count * (4 if dtype == "float32" else 2)
    assert any(math.prod(weight.variable.shape) == count and name in weight.hugging_face
               for weight in table.weights(backbone))  # fmt: skip


def test_broken_weights_are_all_named():
    model = testing.tiny_model("gemma3")
    for index in (0, 1):
        scale = model.backbone.transformer_layers[index].pre_ffw_norm.scale
        scale.assign(np.full(scale.shape, np.nan))
    with pytest.raises(gkt.errors.ExportError) as caught:
        next(merged_weights(model))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "format", ["keras", "safetensors", "gguf", "gguf_adapter", "ollama", "gemma_jax"]
)
def test_no_target_takes_nan(format, tmp_path):
    if format == "gemma_jax":
        pytest.importorskip("orbax.checkpoint")
    model = testing.tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, rank=2, target_modules=["q_proj"])
    (linear,) = lora_linears(model)
    a, b, _ = get_factors(linear)
    set_factors(linear, a, np.full_like(b, np.nan))
    with pytest.raises(gkt.errors.ExportError, match="attention/query: its LoRA"):
        gkt.export(model, tmp_path / "out", format=format, check=False, verbose=0)
    set_factors(linear, a, b)
    scale = model.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, np.inf))
    with pytest.raises(gkt.errors.ExportError, match="NaN or infinite values\\.\n  - layer_norm"):
        gkt.export(model, tmp_path / "out", format=format, check=False, verbose=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gemma3n"])
def test_int8_leaves_as_the_floats_it_stands_for(family):
    model = testing.tiny_model(family)
    before = {weight.path: value for weight, value in merged_weights(model)}
    # `model.backbone.quantize` does this for every layer, and builds the graph again.
    layers = {weight.path: weight.layer for weight in family_of(model).weights(model)}
    for path, layer in layers.items():
        if path.startswith("decoder_block_0") and hasattr(layer, "kernel_initializer"):
            quantize(layer, "int8")
    changed = 0
    for weight, value in merged_weights(model):
        original = weight.to_matrix(before[weight.path])
        if "int8" not in str(weight.variable.dtype):
            np.testing.assert_array_equal(value, before[weight.path])
            continue
        step = np.abs(original).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(weight.to_matrix(value) - original) <= 0.51 * step), weight.path
        changed += 1
    assert changed >= {"gemma3": 7, "gemma3n": 14}[family]


@pytest.fixture(scope="module")
def int8():
    model = testing.tiny_model("gemma3", num_layers=1)
    quantize(model.backbone, "int8")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "gguf", "gemma_jax"])
def test_an_int8_model_is_exported_in_floats(int8, format, tmp_path):
    if format == "gemma_jax":
        pytest.importorskip("orbax.checkpoint")
    path = gkt.export(
        int8, tmp_path / "out", format=format, dtype="float32", check=True, prompts=["Hello!"],
        verbose=0,
    )  # fmt: skip
    verdict = gkt.verify(path)
    assert verdict.passed, verdict
    assert read_receipt(path).compute_dtype == "int8"
    found = values_of(gkt.load(str(path)))
    for name, value in values_of(int8).items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_preset_answers_alike(mode, int8, tmp_path):
    model = int8
    if mode == "int4":
        model = testing.tiny_model("gemma3", num_layers=1)
        quantize(model.backbone, "int4")
    model.backbone.get_config()  # Keras changes the layers' policies when it is asked for this
    options = dict(check=True, prompts=["Hello!"], verbose=0)
    path = gkt.export(model, tmp_path / "out", format="keras", **options)
    verdict = gkt.verify(path)
    assert verdict.passed and not verdict.skipped
    for dtype in ("auto", "bfloat16"):
        loaded = gkt.load(path, dtype=dtype)
        for found, expected in zip(loaded.backbone.weights, model.backbone.weights, strict=True):
            if "int" in str(expected.dtype):
                np.testing.assert_array_equal(found, expected, err_msg=found.path)
            elif dtype == "bfloat16":
                assert str(found.dtype) in ("bfloat16", "float32"), found.path
    assert keras.config.dtype_policy().name == "float32"
    gkt.enable_lora(model, rank=2, verbose=0)
    try:
        for save in (gkt.save_preset, lambda m, p: gkt.export(m, p, format="keras", verbose=0)):
            with pytest.raises(gkt.errors.ExportError, match=f"quantized kernels.*\n.*: {mode}"):
                save(model, tmp_path / "tuned")
    finally:
        gkt.remove_lora(model)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int4", "float8"])
def test_other_quantizations_are_refused(mode, tmp_path):
    model = testing.tiny_model("gemma3", num_layers=1)
    quantize(model.backbone.transformer_layers[0].gating_ffw, mode)
    for format in ("safetensors", "gguf", "ollama", "gemma_jax", "litert"):
        with pytest.raises(gkt.errors.ExportError, match=f"decoder_block_0/gating_ffw: {mode}"):
            gkt.export(model, tmp_path / "out", format=format, verbose=0)


HELD = {
    "mixed_bfloat16": "float32",
    "mixed_float16": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", HELD)
def test_half_precision_policies_export_what_they_hold(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = tuned(num_layers=1)
    finally:
        keras.config.set_dtype_policy("float32")
    held, values = HELD[policy], values_of(model)
    tolerances = {"hf": 0, "keras": 0, "jax": 0, "x.gguf": 1e-2}
    if importlib.util.find_spec("orbax") is None:
        del tolerances["jax"]
    expected = {
        path: np.asarray(value).astype(DTYPES[held]).astype("float32")
        for path, value in values.items()
    }
    for name, tolerance in tolerances.items():
        format = {"jax": "gemma_jax", "keras": "keras"}.get(name, "auto")
        gkt.export(model, tmp_path / name, format=format, check=False, verbose=0)
        found = values_of(gkt.load(str(tmp_path / name), dtype="float32"))
        for path, value in expected.items():
            np.testing.assert_allclose(found[path], value, atol=tolerance, err_msg=path)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == held
    # KerasHub opens any preset in Keras's own policy.
    again = values_of(keras_hub.models.CausalLM.from_preset(str(tmp_path / "keras")))
    for path, value in expected.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    assert model.backbone.dtype_policy.name == policy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "file.gguf"])
def test_the_cap_that_the_task_of_gemma4_brings_leaves_with_it(name, tmp_path):
    tiny = testing.tiny_model("gemma4", final_logit_soft_cap=None)
    model = keras_hub.models.Gemma4CausalLM(
        backbone=tiny.backbone, preprocessor=tiny.preprocessor, final_logit_cap=30.0
    )
    path = gkt.export(model, tmp_path / name, dtype="float32", verbose=0, check=False)
    loaded = gkt.load(str(path))
    assert family_of(loaded).head(loaded).soft_cap == 30.0


def test_an_index_beside_a_single_file_is_not_followed(tmp_path):
    save_file({"model.norm.weight": np.zeros(2, "float32")}, tmp_path / WEIGHTS)
    save_file({"model.norm.weight": np.zeros(3, "float32")}, tmp_path / "other.safetensors")
    index = {"weight_map": {"model.norm.weight": "other.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert read_tensors(tmp_path)["model.norm.weight"].shape == (2,)
    (tmp_path / WEIGHTS).unlink()
    assert read_tensors(tmp_path)["model.norm.weight"].shape == (3,)
