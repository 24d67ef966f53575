"""A user's screen stays clean."""

import os
import subprocess
import sys
import threading

import pytest

from gemma_keras_tune._support.quiet import quiet_stderr

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


def test_standard_error_is_given_back_by_threads_that_overlap(capfd):
    entered, go_on, left = (threading.Event() for _ in range(3))

    def first():
        with quiet_stderr():
            entered.set()
            go_on.wait(5)
            os.write(2, b"hidden")
        left.set()

    def second():
        entered.wait(5)
        threading.Timer(0.2, go_on.set).start()
        with quiet_stderr():
            left.wait(5)

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"
