"""What accelerators run, read from programs lowered for them: none is here.

KerasHub and Keras choose the attention while a program is traced, from the first device. So what
they ask is answered for them here, as a GPU or a TPU would.
"""

import contextlib
import functools
import logging
import re
from unittest import mock

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.jax import trainer
from keras_hub.src.models.gemma import gemma_attention
from keras_hub.src.models.gemma3 import gemma3_attention
from keras_hub.src.models.gemma4 import gemma4_attention

import gemma_keras_tune as gkt
from gemma_keras_tune.generation.scoring import Scorer
from gemma_keras_tune.testing import FAMILIES, tiny_model

# Calls that JAX itself lowers for both platforms. Others would be ours, and for a CPU alone.
ALLOWED = {"mhlo.topk", "Sharding", "cu_threefry2x32_ffi", "annotate_device_placement"}
PAIRS = [("What colour is the sky?", "Blue."), ("And the grass?", "Green.")]


class Called(Exception):
    """A program was called: its function and arguments."""


@contextlib.contextmanager
def not_run():
    """Raise `Called` where a compiled program would run, so that nothing compiles here."""
    jit = jax.jit

    def recorded(function=None, **options):
        if function is None:
            return functools.partial(recorded, **options)

        @functools.wraps(function)
        def call(*arguments):
            raise Called(jit(function, **options), arguments)

        call.lower = call  # as a training step is checked before it runs
        return call

    with mock.patch.object(jax, "jit", recorded), mock.patch.object(trainer, "jit", recorded):
        yield


def program_of(use):
    """The compiled function that something runs first, and the shapes of its arguments."""
    with not_run(), pytest.raises(Called) as called:
        use()
    function, arguments = called.value.args
    shape = lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype)  # noqa: E731
    return function, jax.tree.map(shape, arguments)


def with_lora(family, **options):
    model = tiny_model(family, **options)
    gkt.enable_lora(model, rank=2)
    return model


def train(model):
    tuning = gkt.TuningModel(model)
    tuning.compile(optimizer=gkt.make_optimizer(1e-3, steps=4))
    data = gkt.make_dataset(model, PAIRS, batch_size=2)
    return lambda: tuning.fit(data, epochs=1, verbose=0)


USES = {
    "train": train,
    "greedy": lambda model: lambda: gkt.generate(model, "A?", max_new_tokens=4),
    "guessing": lambda model: lambda: gkt.generate(model, "A?", max_new_tokens=128),
    "sampled": lambda model: (
        lambda: gkt.generate(model, "A?", max_new_tokens=4, sampler=keras_hub_sampler())
    ),
    "stream": lambda model: lambda: list(gkt.stream(model, "A?", max_new_tokens=4)),
    "base": lambda model: lambda: gkt.generate(model, "A?", max_new_tokens=4, adapter=None),
    "losses": lambda model: (
        lambda: Scorer(model).losses([(np.arange(8, dtype=np.int32), np.arange(8) > 4)])
    ),
    "top logits": lambda model: (
        lambda: Scorer(model).top_logits([np.arange(8, dtype=np.int32)], [np.array([7])], 3)
    ),
}


def keras_hub_sampler():
    import keras_hub

    return keras_hub.samplers.TopKSampler(k=5, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_lowers_for_accelerators_without_calls_that_only_a_cpu_has(family):
    model = with_lora(family)
    for name, use in USES.items():
        function, shapes = program_of(use(model))
        checked = [jax.export.DisabledSafetyCheck.custom_call(call) for call in ALLOWED]
        export = jax.export.export(function, platforms=("cuda", "tpu"), disabled_checks=checked)
        calls = set(re.findall(r"custom_call @([\w.$]+)", export(*shapes).mlir_module()))
        assert calls <= ALLOWED, (name, calls - ALLOWED)


@contextlib.contextmanager
def a_gpu_with_cudnn():
    with contextlib.ExitStack() as patches:
        for name, value in {
            "check_cudnn_version": 91900,
            "check_compute_capability": True,
            "is_cuda_compute_capability_equal": True,
        }.items():
            patches.enter_context(mock.patch.object(cudnn, name, lambda *a, v=value: v))
        for module in (gemma_attention, gemma3_attention, gemma4_attention):
            patches.enter_context(mock.patch.object(module, "running_on_gpu", lambda: True))
            patches.enter_context(
                mock.patch.object(module, "gpu_supports_fused_attention_op", lambda: True)
            )
        yield


def lowered_for_cuda(use):
    function, shapes = program_of(use)
    return function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_answers_are_written_beside_cudnn_without_a_logged_failure(family, caplog):
    model = with_lora(family, dtype="bfloat16")
    with a_gpu_with_cudnn(), caplog.at_level(logging.DEBUG, "absl"):
        assert "__cudnn$fmha" in lowered_for_cuda(USES["losses"](model))
        for name in ("greedy", "guessing", "sampled"):
            lowered_for_cuda(USES[name](model))
    assert not [record for record in caplog.records if "cudnn" in record.getMessage()]


def test_gemma_2_keeps_the_soft_cap_of_its_attention_on_a_tpu():
    model = tiny_model("gemma2", attention_logit_soft_cap=0.05)
    ids = np.arange(2, 26, dtype=np.int32).reshape(2, 12)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    capped = run(model, inputs)
    for layer in model.backbone.transformer_layers:
        layer.attention.logit_soft_cap = None
    free = run(model, inputs)
    for layer in model.backbone.transformer_layers:
        layer.attention.logit_soft_cap = 0.05
    with a_tpu():
        assert_close(run(model, inputs), free)  # what Keras does: see docs/upstream.md
        gkt.TuningModel(model)
        assert_close(run(model, inputs), capped)
    assert np.abs(capped - free).max() > 0.01


@contextlib.contextmanager
def a_tpu():
    class Device:
        platform = "tpu"

        def memory_stats(self):
            return None

    with (
        mock.patch.object(jax, "devices", lambda *a: [Device()]),
        mock.patch.object(gemma_attention, "running_on_tpu", lambda: True),
    ):
        yield


def run(model, inputs):
    """Hidden states of a compiled backbone, traced anew."""
    values = [v.value for v in model.backbone.variables]

    def states(values, inputs):
        mapping = list(zip(model.backbone.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return model.backbone(inputs)

    return np.asarray(ops.cast(jax.jit(states)(values, inputs), "float32"))


def assert_close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-4)
