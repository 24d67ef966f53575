"""A user's screen stays clean."""

import subprocess
import sys

import pytest

SCRIPT = """
import gemma_keras_tune as gkt
from gemma_keras_tune import testing

model = testing.tiny_model("gemma3")
gkt.tune(model, testing.tiny_pairs(4), epochs=1, verbose=0)
gkt.generate(model, "roll", max_new_tokens=2)
"""


@pytest.mark.slow
def test_a_quiet_script_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""
