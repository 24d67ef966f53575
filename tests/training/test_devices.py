"""Several devices share each batch: the same losses, and no batch that does not divide."""

import json
import os
import subprocess
import sys
from unittest import mock

import jax
import keras
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune.errors import PlanError
from gemma_keras_tune.testing import tiny_model
from gemma_keras_tune.training.shapes import choose_shapes, indivisible

# A last batch of three rows.
PAIRS = [(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(11)]
TUNE = """
import json, sys
import gemma_keras_tune as gkt
import keras
from gemma_keras_tune.testing import tiny_model

keras.distribution.set_distribution(keras.distribution.DataParallel())
model = tiny_model("gemma3")
result = gkt.tune(model, json.loads(sys.argv[1]), epochs=3, batch_size=4, rank=2, verbose=0)
answers = gkt.generate(model, ["What is 3 plus 3?"] * 3, max_new_tokens=8)
json.dump([result.history["loss"], answers, str(result.plan)], sys.stdout)
"""


@pytest.mark.slow
def test_two_devices_train_as_one_does():
    done = subprocess.run(
        [sys.executable, "-c", TUNE, json.dumps(PAIRS)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    losses, answers, plan = json.loads(done.stdout)
    model = tiny_model("gemma3")
    result = gkt.tune(model, PAIRS, epochs=3, batch_size=4, rank=2, verbose=0)
    np.testing.assert_allclose(losses, result.history["loss"], rtol=1e-5)
    assert answers == gkt.generate(model, ["What is 3 plus 3?"] * 3, max_new_tokens=8)
    assert "on 2 x cpu in float32: a step may need" in plan
    assert "on cpu in float32: a step may need" in str(result.plan)


@pytest.fixture
def four_replicas():
    """A distribution whose mesh has four devices, of which one is here."""
    mesh = mock.Mock(shape=(4, 2), axis_names=("batch", "model"), devices=np.zeros((4, 2)))
    distribution = mock.Mock(device_mesh=mesh, batch_dim_name="batch")
    with mock.patch.object(keras.distribution, "distribution", lambda: distribution):
        yield


def test_a_batch_that_does_not_divide_is_refused_before_the_pairs_are_read(four_replicas):
    words = "`batch_size` must be a multiple of 4, the devices .* Received: 6"
    with pytest.raises(PlanError, match=words):
        gkt.make_plan(tiny_model("gemma3"), "no such file", batch_size=6)
    assert indivisible(8) == indivisible("auto") == []


def test_batches_chosen_here_divide(four_replicas):
    plan = gkt.make_plan(tiny_model("gemma3"), PAIRS[:3])
    assert plan.batch_size == 4 and plan.device == f"8 x {jax.devices()[0].device_kind}"
    assert all(s.batch_size % 4 == 0 and s.positions % 4 == 0 for s in plan.shapes)


def test_shapes_divide_into_parts():
    lengths = np.array([5, 6, 7])
    (shape,) = choose_shapes(lengths, lengths - 2, 12, parts=3)
    assert shape.batch_size == 3 and shape.positions % 3 == 0
    (shape,) = choose_shapes(lengths, lengths - 2, 8, parts=4)
    assert shape.batch_size == 4
