"""A user's screen stays clean."""

import contextlib
import json
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


# What conftest.py sets for the tests, users do not.
USERS = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
NOISE = b"I0000 00:00:1795947684.5 62 cudart_stub.cc:31] Could not find cuda drivers.\n"


def run(script, **environment):
    """With users' environment; `None` takes a variable away."""
    both = {**USERS, **environment}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={name: value for name, value in both.items() if value is not None},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.slow
def test_a_quiet_script_prints_nothing():
    done = run(SCRIPT)
    assert done.stdout + done.stderr == ""


ENVIRONMENT = """
import json, os
import {module}
print(json.dumps(dict(os.environ)))
"""


def test_importing_chooses_the_backend_and_changes_nothing_else():
    ours = run(ENVIRONMENT.format(module="gemma_keras_tune"), KERAS_BACKEND=None)
    theirs = run(ENVIRONMENT.format(module="keras_hub"), KERAS_BACKEND="jax")
    assert json.loads(ours.stdout) == json.loads(theirs.stdout)
    assert ours.stderr == ""


def test_standard_error_holds_back_known_noise_alone(capfd):
    native = "W0000 00:00:1795947684.5 62 a.cc:1] native warning\n"
    with (
        open(2, "w", closefd=False) as stderr,
        contextlib.redirect_stderr(stderr),
        quiet_stderr(),
    ):
        os.write(2, NOISE + native.encode() + NOISE)
        print("from Python", file=sys.stderr)
        assert capfd.readouterr().err == "from Python\n"
    assert capfd.readouterr().err == native


def test_after_an_exception_all_is_shown(capfd):
    with pytest.raises(ValueError, match="broken"), quiet_stderr():
        os.write(2, NOISE)
        raise ValueError("broken")
    assert capfd.readouterr().err == NOISE.decode()


def test_standard_error_is_given_back_by_threads_that_overlap(capfd):
    entered, go_on, left = (threading.Event() for _ in range(3))

    def first():
        with quiet_stderr():
            entered.set()
            go_on.wait(5)
            os.write(2, NOISE)
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
