"""KerasHub presets, opened in a process that has only KerasHub."""

import subprocess
import sys

import numpy as np
import pytest
from _paths import RUNTIMES

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.gemma.families import backbone_inputs

MODELS = {
    "gemma": dict(num_layers=1),
    "gemma2": dict(),
    "gemma3": dict(),
    "gemma3n": dict(),
    "gemma4": dict(),
    "gemma4 moe": dict(moe=True),
}
IDS = np.random.default_rng(1).integers(5, 500, (1, 16))
TEXT = "part number  <start_of_turn> 日本"


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    root = tmp_path_factory.mktemp("presets")
    made = {}
    for name, sizes in MODELS.items():
        model = testing.tiny_model(name.partition(" ")[0], **sizes)
        gkt.enable_lora(model, rank=2)
        draw = np.random.default_rng(0)
        for linear in lora_linears(model):
            a, b, _ = get_factors(linear)
            set_factors(linear, a, 0.3 * draw.normal(size=b.shape).astype("float32"))
        path = gkt.export(
            model,
            root / name.replace(" ", "_"),
            format="keras",
            check=False,
            verbose=0,
        )
        made[name] = (model, str(path))
    return made


@pytest.fixture(scope="module")
def answers(presets, tmp_path_factory):
    root = tmp_path_factory.mktemp("keras")
    given = {"text": np.asarray(TEXT)}
    for model, path in presets.values():
        fed = backbone_inputs(model.backbone, IDS, np.ones_like(IDS))
        given |= {f"{path}:{name}": np.asarray(value) for name, value in fed.items()}
    np.savez(root / "inputs.npz", **given)
    script = RUNTIMES / "keras_twin.py"
    paths = [path for _, path in presets.values()]
    command = [sys.executable, script, root / "inputs.npz", root / "answers.npz", *paths]
    subprocess.run(command, check=True)
    return np.load(root / "answers.npz")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_kerashub_alone_computes_the_same(name, presets, answers):
    model, path = presets[name]
    ours = model.backbone(backbone_inputs(model.backbone, IDS, np.ones_like(IDS)))
    np.testing.assert_allclose(answers[f"{path}:hidden"], np.asarray(ours), atol=1e-4)
    ids = np.asarray(model.preprocessor.tokenizer(TEXT))
    np.testing.assert_array_equal(answers[f"{path}:ids"], ids)


@pytest.mark.slow
def test_a_scale_that_kerashub_alone_does_not_compute_is_said(tmp_path, recwarn):
    model = gkt.load(testing.tiny_model("gemma2", query_head_dim_normalize=False))
    with pytest.warns(UserWarning, match="scales its queries by hidden size over heads"):
        path = gkt.save_preset(model, tmp_path / "preset")
    assert not gkt.load(path).backbone.transformer_layers[0].attention.query_head_dim_normalize
    recwarn.clear()
    # Hidden size over heads is the head size.
    same = gkt.load(testing.tiny_model("gemma2", query_head_dim_normalize=False, head_dim=4))
    gkt.save_preset(same, tmp_path / "same")
    assert not [w for w in recwarn if "scales its queries" in str(w.message)]
