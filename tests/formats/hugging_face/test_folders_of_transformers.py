"""Folders as transformers saves them: the same logits and ids, or an error that says why not."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from _paths import RUNTIMES

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.gemma.families import backbone_inputs, family_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed"),
]


def rope(full=1e6, local=1e4, **more):
    return {
        "full_attention": {"rope_type": "default", "rope_theta": full, **more},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


LINEAR = {"rope_type": "linear", "factor": 8.0}
KINDS = ["sliding_attention", "full_attention"]
COMPUTED = {
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    # As in 27B: hidden_size / num_attention_heads, and not head_dim.
    "gemma2 27b": ("Gemma2", {"query_pre_attn_scalar": 4}),
    "gemma3": ("Gemma3", {}),
    "gemma3 27b": ("Gemma3", {"query_pre_attn_scalar": 4}),
    "gemma3 rope": ("Gemma3", {"rope_parameters": rope(**LINEAR)}),
    "gemma3 full": ("Gemma3", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
    "gemma3n": ("Gemma3n", {}),
    "gemma3n thetas": ("Gemma3n", {"rope_parameters": rope(1e3, 1e2)}),
    "gemma4": ("Gemma4", {}),
    "gemma4 moe": (
        "Gemma4",
        {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
    ),
    "gemma4 eps": ("Gemma4", {"rms_norm_eps": 1e-2, "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional", "rope_theta": 1e3, "partial_rotary_factor": 0.5
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    }}),
}  # fmt: skip
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED = {
    "gemma eps": ("Gemma", {"rms_norm_eps": 1e-2}, "rms_norm_eps is 0.01, and KerasHub's blocks"),
    "gemma3 eps": ("Gemma3", {"rms_norm_eps": 1e-2}, "rms_norm_eps is 0.01"),
    "gemma theta": ("Gemma", THETA, "rope_theta of full_attention is 100, and KerasHub's is 10000"),
    "gemma2 theta": ("Gemma2", THETA, "rope_theta of full_attention is 100"),
    "gemma2 scale": ("Gemma2", {"query_pre_attn_scalar": 5}, "query_pre_attn_scalar is 5, and"),
    "gemma3 thetas": (
        "Gemma3",
        {"rope_parameters": rope(1e3, 1e2)},
        "rope_theta of full_attention is 1000, and KerasHub's is 1e+06",
    ),
    "gemma3 layers": ("Gemma3", {"num_hidden_layers": 2, "layer_types": KINDS}, "layer_types is"),
    "gemma3 yarn": ("Gemma3", {"rope_parameters": rope(**YARN)}, "rope_type of full_attention is"),
    "gemma3 silu": ("Gemma3", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    "gemma3 bias": ("Gemma3", {"attention_bias": True}, "attention_bias is true"),
    "gemma3 untied": ("Gemma3", {"tie_word_embeddings": False}, "tie_word_embeddings is false"),
    "gemma3 sees layers": (
        "Gemma3",
        {"sees": True, "num_hidden_layers": 2, "layer_types": KINDS},
        "layer_types is",
    ),
}
IDS = np.random.default_rng(1).integers(5, 500, (1, 24))
TEXTS = ("part number for 12", "a  b   c", "<start_of_turn>user\nGrüße 😀<end_of_turn>\n", " x\n\n")


@pytest.fixture(scope="module")
def tokenizer_model():
    return testing.tiny_model("gemma3", num_layers=1)


@pytest.fixture(scope="module")
def folders(tokenizer_model, tmp_path_factory):
    """All folders, written by transformers in a process of its own."""
    root = tmp_path_factory.mktemp("transformers")
    gkt.export(tokenizer_model, root / "tokenizer", check=False, verbose=0)
    cases = {name: case[:2] for name, case in (COMPUTED | REFUSED).items()}
    request = {
        "tokenizer": str(root / "tokenizer"),
        "vocab_size": tokenizer_model.backbone.vocabulary_size,
        "ids": IDS.tolist(),
        "folders": {str(root / name): case for name, case in cases.items()},
    }
    (root / "request.json").write_text(json.dumps(request))
    script = RUNTIMES / "transformers_writer.py"
    subprocess.run([sys.executable, script, root / "request.json"], check=True)
    return root


def logits(model):
    hidden = np.asarray(model.backbone(backbone_inputs(model.backbone, IDS, np.ones_like(IDS))))
    head = family_of(model).head(model)
    found = hidden @ np.asarray(head.embedding).T
    return head.soft_cap * np.tanh(found / head.soft_cap) if head.soft_cap else found


@pytest.mark.parametrize("name", COMPUTED)
def test_the_same_logits_and_ids(name, folders, tokenizer_model):
    folder = folders / name
    assert not (folder / "tokenizer.model").exists()  # what transformers 5 leaves out
    model = gkt.load(str(folder))
    expected = np.load(f"{folder}.npy")
    np.testing.assert_allclose(logits(model), expected, atol=2e-4)
    for text in TEXTS:
        ids = np.asarray(tokenizer_model.preprocessor.tokenizer(text))
        np.testing.assert_array_equal(np.asarray(model.preprocessor.tokenizer(text)), ids)


@pytest.mark.parametrize("name", REFUSED)
def test_what_kerashub_cannot_compute_is_named(name, folders):
    with pytest.raises(gkt.errors.LoadError) as caught:
        gkt.load(str(folders / name))
    assert any(problem.startswith(REFUSED[name][2]) for problem in caught.value.problems)
