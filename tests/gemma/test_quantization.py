"""Bases that are quantized while they are loaded, from every source."""

import gc

import jax
import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.gemma import quantization
from gemma_keras_tune.gemma.families import FAMILIES, backbone_inputs, family_of
from gemma_keras_tune.training.tokenizing import tokenize_pairs

PLAIN = "{prompt}\n{response}"
ALLOWED = [name for name, family in FAMILIES.items() if family.quantized_lora]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One tiny model in every form that `load` takes."""
    folder = tmp_path_factory.mktemp("exports")
    model = testing.tiny_model("gemma3", num_layers=3)
    paths = {"keras": folder / "keras", "safetensors": folder / "hf", "gguf": folder / "m.gguf"}
    for name, path in paths.items():
        gkt.export(model, path, format=name, check=False, verbose=0)
    return model, paths


def kernels(model):
    return {linear.path: linear.layer for linear in family_of(model).linears(model)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", quantization.MODES)
@pytest.mark.parametrize("source", ["keras", "safetensors", "gguf"])
def test_every_source_is_quantized_as_keras_quantizes(source, mode, exports):
    _, paths = exports
    loaded = gkt.load(paths[source], quantize=mode)
    whole = gkt.load(paths[source])
    quantization.quantize_rest(whole, mode)
    assert family_of(loaded).head(loaded).is_floating
    for (path, ours), theirs in zip(kernels(loaded).items(), kernels(whole).values(), strict=True):
        assert ours.quantization_mode == mode and ours.inputs_quantizer is None, path
        for mine, other in zip(ours.weights, theirs.weights, strict=True):
            np.testing.assert_array_equal(mine, other, path)
    assert gkt.generate(loaded, "part number", max_new_tokens=2)


@pytest.mark.parametrize("source", ["safetensors", "gguf", "keras"])
def test_the_floats_of_one_layer_at_a_time_are_in_memory(source, exports, monkeypatch):
    _, paths = exports
    floats = []

    class Watched(quantization._Quantize):
        def __call__(self, kernel):
            arrays = [a for a in jax.live_arrays() if a.dtype == "float32" and a.ndim > 1]
            floats.append(sum(a.nbytes for a in arrays) - before)
            super().__call__(kernel)

    monkeypatch.setattr(quantization, "_Quantize", Watched)
    gc.collect()
    before = sum(a.nbytes for a in jax.live_arrays() if a.dtype == "float32" and a.ndim > 1)
    loaded = gkt.load(paths[source], quantize="int8")
    layers = kernels(loaded).values()
    assert len(floats) == len(layers)
    held = 4 * np.prod(family_of(loaded).head(loaded).embedding.shape)
    largest = 4 * max(np.prod(layer.kernel.shape) for layer in layers)
    assert max(floats) <= held + 2 * largest


def test_weights_that_are_not_finite_are_refused(exports):
    model = testing.tiny_model("gemma3", num_layers=1)
    layer = kernels(model)["decoder_block_0/attention/query"]
    layer.kernel.assign(np.full(layer.kernel.shape, np.nan, "float32"))
    with pytest.raises(gkt.errors.LoadError, match="NaN or infinite"):
        quantization.quantize_rest(model, "int8")


def test_what_cannot_be_quantized_is_refused_by_name():
    for name in FAMILIES.keys() - set(ALLOWED):
        with pytest.raises(gkt.errors.LoadError, match="Gemma 4 cannot be quantized"):
            quantization.quantize_rest(testing.tiny_model(name), "int8")
    for options, problem in (
        ({"quantize": "int2"}, "must be None or one of"),
        ({"quantize": "int8", "dtype": "float16"}, "pass 'bfloat16'"),
    ):
        with pytest.raises(gkt.errors.LoadError, match=problem):
            gkt.load("package://never_opened", **options)
    with pytest.raises(gkt.errors.LoadError, match="a model that is there"):
        gkt.load(testing.tiny_model("gemma3", num_layers=1), quantize="int8")


def test_quantized_kernels_are_neither_trained_nor_saved_as_other_ones(exports, tmp_path):
    model = gkt.load(exports[1]["keras"], quantize="int8")
    with pytest.raises(gkt.errors.ExportError, match="round the activations too"):
        gkt.save_preset(model, tmp_path / "preset")
    assert not (tmp_path / "preset").exists()
    model.trainable = True
    with pytest.raises(gkt.errors.LoraError, match="Quantized kernels cannot be trained"):
        gkt.TuningModel(model)


def own_loss(model, pairs):
    """Cross entropy of the logits that KerasHub computes."""
    tokens = tokenize_pairs(model, pairs, template=PLAIN)
    total, count = 0.0, 0
    for i in range(len(pairs)):
        row, taught = tokens.row(i)
        ids = np.asarray(row)[None]
        inputs = backbone_inputs(model.backbone, ids[:, :-1], np.ones_like(ids[:, :-1]))
        logits = np.asarray(family_of(model).head(model).logits(model.backbone(inputs))[0])
        nll = -np.asarray(jax.nn.log_softmax(logits.astype("float32")))
        picked = nll[np.arange(len(row) - 1), ids[0, 1:]]
        total, count = total + picked[taught[1:]].sum(), count + taught[1:].sum()
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("mode", quantization.MODES)
@pytest.mark.parametrize("family", ALLOWED)
def test_the_loss_is_that_of_kerashubs_own_logits(family, mode):
    model, pairs = testing.tiny_model(family), testing.tiny_pairs(2)
    floats = own_loss(model, pairs)
    quantization.quantize_rest(model, mode)
    own = own_loss(model, pairs)
    assert 1e-6 < abs(own - floats) < 0.5
    if (family, mode) == ("gemma3n", "int4"):
        with pytest.raises(gkt.errors.LoraError, match="Dense layer in int4"):
            gkt.enable_lora(model, 2, verbose=0)
        return
    gkt.enable_lora(model, 2, verbose=0)
    trainer = gkt.TuningModel(model, rematerialize=mode == "int4")
    trainer.compile(keras.optimizers.SGD(0.5))
    dataset = gkt.make_dataset(model, pairs, template=PLAIN, batch_size=2, shuffle=False)
    history = trainer.fit(dataset, epochs=2, verbose=0).history
    assert history["loss"][0] == pytest.approx(own, rel=1e-4)
    assert history["loss"][1] < history["loss"][0]


@pytest.mark.slow
def test_int4_kernels_stay_packed_between_forward_and_backward():
    sizes = {}
    for mode in quantization.MODES:
        model = testing.tiny_model(
            "gemma3", num_layers=8, hidden_dim=128, intermediate_dim=2048, head_dim=16
        )
        quantization.quantize_rest(model, mode)
        gkt.enable_lora(model, 2, target_modules="attention", verbose=0)
        trainer = gkt.TuningModel(model, rematerialize=False)
        trainer.compile(gkt.make_optimizer(1e-3, steps=2))
        trainer.optimizer.build(trainer.trainable_variables)
        state = tuple(
            [v.value for v in group]
            for group in (
                trainer.trainable_variables, trainer.non_trainable_variables,
                trainer.optimizer.variables, trainer.metrics_variables,
            )
        )  # fmt: skip
        pairs = testing.tiny_pairs(1)
        (batch,) = gkt.make_dataset(model, pairs, template=PLAIN).as_numpy_iterator()
        program = jax.jit(trainer.train_step).lower(state, batch).compile()
        sizes[mode] = program.memory_analysis().temp_size_in_bytes
    unpacked = 8 * 3 * 128 * 2048
    assert sizes["int4"] < sizes["int8"] + unpacked / 2, (sizes, unpacked)
