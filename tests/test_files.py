"""Folders appear whole or not at all, whatever happens on the way."""

import signal
import subprocess
import sys

import pytest

from gemma_keras_tune._files import new_folder
from gemma_keras_tune.errors import ExportError

KILLED = """
import os, signal, sys
from gemma_keras_tune._files import new_folder

with new_folder(sys.argv[1], overwrite=True) as part:
    (part / "weights").write_bytes(b"half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def save(path, text, **options):
    with new_folder(path, **options) as part:
        (part / "weights").write_text(text)


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_the_old_folder_whole(tmp_path):
    target = tmp_path / "preset"
    save(target, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in target.iterdir()] == ["weights"]
    assert (target / "weights").read_text() == "old"
    save(target, "new", overwrite=True)
    assert (target / "weights").read_text() == "new"


def test_an_error_in_the_middle_leaves_nothing_new(tmp_path):
    target = tmp_path / "preset"
    with pytest.raises(RuntimeError), new_folder(target) as part:
        (part / "weights").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_is_refused_before_anything_is_written(tmp_path):
    target = tmp_path / "preset"
    save(target, "old")
    with pytest.raises(ExportError, match=r"preset already exists[\s\S]*overwrite=True"):
        save(target, "new")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ExportError, match="already exists"):
        save(file, "new", overwrite=True)
    assert (target / "weights").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "preset"]
