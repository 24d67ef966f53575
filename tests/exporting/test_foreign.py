"""`verify` in PEFT and in the Gemma library for JAX, each in a process of its own."""

import os
from importlib.util import find_spec

import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.exporting.verifying import verify

pytestmark = pytest.mark.slow
PROMPTS = ["Hello!", "part number  for\nbrake 7"]


def tuned():
    model = testing.tiny_model("gemma3", num_layers=7)
    gkt.enable_lora(model, rank=2, verbose=0)
    draw = np.random.default_rng(0)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, 0.3 * draw.normal(size=b.shape).astype("float32"))
    return model


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
def test_an_adapter_on_a_hugging_face_base_is_opened_by_peft(tmp_path):
    base = testing.tiny_model("gemma3", num_layers=7)
    gkt.export(base, tmp_path / "base", dtype="float32", check=False, verbose=0)
    adapter = gkt.save_adapter(tuned(), tmp_path / "adapter", check=True, prompts=PROMPTS)
    verdict = verify(adapter, base=tmp_path / "base")
    assert verdict.passed and "PEFT" in str(verdict) and not verdict.skipped, str(verdict)
    other = testing.tiny_model("gemma3", num_layers=7, seed=1)
    gkt.export(other, tmp_path / "other", dtype="float32", check=False, verbose=0)
    assert "logits differ" in str(verify(adapter, base=tmp_path / "other"))


def test_a_checkpoint_is_opened_by_the_gemma_library(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    options = dict(check=True, prompts=PROMPTS, verbose=0)
    gkt.export(tuned(), tmp_path / "jax", format="gemma_jax", **options)
    verdict = verify(tmp_path / "jax")
    assert verdict.passed, str(verdict)
    if os.environ.get("GEMMA_JAX_PYTHON"):
        assert "logits differ by" in str(verdict) and not verdict.skipped, str(verdict)
    elif find_spec("gemma") is None:
        assert "pip install gemma" in str(verdict)
