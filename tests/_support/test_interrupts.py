"""Ctrl-C ends a program for certain, and does not come between what belongs together."""

import signal
import subprocess
import sys
import threading

import pytest

from gemma_keras_tune._support.interrupts import held_interrupts, runs_as_program


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts(), held_interrupts():
        signal.raise_signal(signal.SIGINT)
        done.append("first")
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_block_may_ask_for_it_and_a_second_one_does_not_wait():
    with held_interrupts() as raise_held:
        raise_held()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_held()
        raise_held()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_held()


def test_handlers_of_the_program_and_other_threads_are_left_alone(monkeypatch):
    got = []
    before = signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
    try:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            assert got == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)

    def in_thread():
        with held_interrupts():
            got.append("thread")

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert got[-1] == "thread"


@pytest.mark.parametrize(
    ("argv", "words", "runs"),
    [
        (["-m"], ["python", "-X", "utf8", "-m", "gemma_keras_tune", "tune"], True),
        (["-m"], ["python", "-m", "pytest", "gemma_keras_tune"], False),
        (["/venv/bin/gemma-keras-tune", "tune"], ["python", "…"], True),
        (["serve.py", "-m", "gemma_keras_tune"], ["python", "serve.py"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_its_own_program_takes_over_the_signal(argv, words, runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", words)
    assert runs_as_program("gemma_keras_tune") == runs


# A program that native code keeps busy without Python's lock, as a compilation does, and one that
# loses every exception.
STUCK = """
import hashlib, os, pathlib, signal, time
from gemma_keras_tune._support.files import new_folder
from gemma_keras_tune._support.interrupts import ENDING

def native():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def deaf():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

signal.signal(signal.SIGINT, signal.default_int_handler)
for stuck in (native, deaf):
    child = os.fork()
    if not child:
        ENDING.install()
        with ENDING.unwinding(), new_folder("made") as folder:
            (folder / "file").write_text("")
            stuck()
    while not list(pathlib.Path().glob(".made*/file")):
        time.sleep(0.05)
    time.sleep(0.2)
    begin = time.monotonic()
    os.kill(child, signal.SIGINT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(stuck.__name__, code, time.monotonic() - begin < 3, os.listdir())
"""


@pytest.mark.slow
def test_a_program_ends_whatever_it_does_and_leaves_nothing_half_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STUCK],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["native 130 True []", "deaf 130 True []"], done.stderr
    assert done.stderr.split() == ["interrupted", "interrupted"]
