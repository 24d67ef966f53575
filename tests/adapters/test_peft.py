"""Adapters cross to the real PEFT on the real transformers, and back."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import twins

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.gemma.families import backbone_inputs, family_of

# Not imported here: torch beside TensorFlow may crash.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed"),
]

MODELS = {
    "gemma": dict(num_query_heads=4, num_key_value_heads=2, head_dim=8),
    "gemma2": dict(attention_logit_soft_cap=5.0, final_logit_soft_cap=3.0),
    "gemma3": dict(num_layers=7),
    "gemma3n": {},
    "gemma4": {},
    "gemma4_moe": dict(moe=True),
}


def tiny(name):
    return testing.tiny_model(name.removesuffix("_moe"), **MODELS[name])


def ids_of():
    return np.random.default_rng(1).integers(5, 500, (1, 20))


def logits_of(model):
    ids = ids_of()
    fed = backbone_inputs(model.backbone, ids, np.ones_like(ids))
    head = family_of(model).head(model)
    logits = np.asarray(model.backbone(fed)) @ np.asarray(head.embedding).T
    return head.soft_cap * np.tanh(logits / head.soft_cap) if head.soft_cap else logits


def peft_logits(model, folder, **request):
    """What PEFT computes on the exported base."""
    return np.asarray(peft_answer(model, folder, **request)["logits"])


def peft_answer(model, folder, **request):
    base = folder / "base"
    gkt.export(model, base, dtype="float32", check=False, verbose=0)
    request = {"base": str(base), "ids": ids_of().tolist(), **request}
    return twins.ask("peft_twin.py", request)


@pytest.mark.parametrize(("name", "stabilized"), [(name, name == "gemma2") for name in MODELS])
def test_peft_computes_our_adapter(name, stabilized, tmp_path):
    base = tiny(name)
    model = tiny(name)
    gkt.enable_lora(model, rank=3, alpha=5, target_modules="all", use_rslora=stabilized)
    draw = np.random.default_rng(0)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, 0.3 * draw.normal(size=b.shape).astype("float32"))
    gkt.save_adapter(model, tmp_path / "adapter")
    theirs = peft_logits(base, tmp_path, adapter=str(tmp_path / "adapter"))
    np.testing.assert_allclose(logits_of(model), theirs, atol=1e-4)
    assert np.abs(logits_of(base) - theirs).max() > 1e-2


def test_an_adapter_of_peft_is_tuned_further(tmp_path):
    model = tiny("gemma3")
    config = dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    theirs = peft_logits(
        model, tmp_path, config=config | {"task_type": "CAUSAL_LM"}, save=str(tmp_path / "theirs")
    )
    base = logits_of(model)
    gkt.load_adapter(model, tmp_path / "theirs")
    np.testing.assert_allclose(logits_of(model), theirs, atol=1e-4)
    assert np.abs(base - theirs).max() > 1e-2
    before = gkt.tune(model, testing.tiny_pairs(), epochs=6, verbose=0, rank=4, alpha=6,
                      target_modules=["q_proj", "v_proj", "down_proj"]).history["loss"]  # fmt: skip
    assert before[-1] < before[0]
    gkt.save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["r"] == 4


def test_our_adapter_is_trained_further_in_peft(tmp_path):
    base, model = tiny("gemma3"), tiny("gemma3")
    gkt.tune(model, testing.tiny_pairs(8), epochs=2, rank=2, verbose=0)
    gkt.save_adapter(model, tmp_path / "ours")
    theirs = peft_answer(
        base, tmp_path, adapter=str(tmp_path / "ours"), save=str(tmp_path / "theirs")
    )
    assert theirs["losses"][-1] < theirs["losses"][0] - 0.1
    config = gkt.load_adapter(base, tmp_path / "theirs")
    assert (config.rank, config.target_modules) == (2, gkt.lora_config(model).target_modules)
    np.testing.assert_allclose(logits_of(base), theirs["logits"], atol=1e-4)
    assert np.abs(logits_of(model) - theirs["logits"]).max() > 1e-2


@pytest.mark.parametrize(
    "config",
    [
        dict(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 2, r"layers\.[01]\.self_attn\.q_proj": 3},
            alpha_pattern={"down_proj": 3},
            layers_to_transform=[0, 1, 4],
        ),
        dict(
            r=2,
            lora_alpha=8,
            use_rslora=True,
            target_modules=r".*layers\.[2-5]\.(self_attn|mlp)\.\w+_proj",
            exclude_modules=["o_proj"],
        ),
    ],
)
def test_adapters_with_patterns(config, tmp_path):
    model = tiny("gemma3")
    request = dict(config=config | {"task_type": "CAUSAL_LM"}, save=str(tmp_path / "theirs"))
    theirs = peft_logits(model, tmp_path, **request)
    base = logits_of(model)
    gkt.load_adapter(model, tmp_path / "theirs")
    np.testing.assert_allclose(logits_of(model), theirs, atol=1e-4)
    assert np.abs(base - theirs).max() > 1e-2


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_adapters_that_also_name_layers_of_shared_keys(name, tmp_path):
    """PEFT puts factors on every `k_proj` transformers has, also on those it never runs."""
    model = tiny(name)
    config = dict(r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj"])
    request = dict(config=config | {"task_type": "CAUSAL_LM"}, save=str(tmp_path / "theirs"))
    theirs = peft_logits(model, tmp_path, **request)
    gkt.load_adapter(model, tmp_path / "theirs")
    np.testing.assert_allclose(logits_of(model), theirs, atol=1e-4)
