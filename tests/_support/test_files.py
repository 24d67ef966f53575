"""Folders appear whole or not at all, whatever happens on the way."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from gemma_keras_tune._support import files
from gemma_keras_tune._support.files import new_folder
from gemma_keras_tune.errors import ExportError

KILLED = """
import os, pathlib, signal, sys, types

# The module alone: Keras takes seconds to import.
package = types.ModuleType("gemma_keras_tune")
package.__path__ = [sys.argv[3]]
sys.modules["gemma_keras_tune"] = package
from gemma_keras_tune._support import files

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

when = sys.argv[2]
if when == "between the renames":
    files._exchange = lambda *_: False
    rename = pathlib.Path.rename
    pathlib.Path.rename = lambda self, to: (rename(self, to), kill())
if when == "after the exchange":
    files.shutil.rmtree = kill
with files.new_folder(sys.argv[1], overwrite=True) as part:
    (part / "weights").write_text("new")
    if when == "within":
        kill()
"""


def save(path, text, **options):
    with new_folder(path, **options) as part:
        (part / "weights").write_text(text)


@pytest.mark.parametrize(
    ("when", "kept", "back"),
    [
        ("within", "old", "old"),
        ("after the exchange", "new", "new"),
        ("between the renames", None, "old"),
    ],
)
def test_a_kill_leaves_a_whole_folder_and_the_next_call_tidies_up(when, kept, back, tmp_path):
    target = tmp_path / "preset"
    save(target, "old")
    package = str(pathlib.Path(files.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when, package], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 1
    assert (target / "weights").read_text() == kept if kept else not target.exists()
    with pytest.raises(ExportError, match="already exists"):
        save(target, "never")
    assert (target / "weights").read_text() == back
    assert [path.name for path in tmp_path.iterdir()] == ["preset"]
    save(target, "newer", overwrite=True)
    assert (target / "weights").read_text() == "newer"


def test_what_another_process_is_writing_stays(tmp_path):
    with new_folder(tmp_path / "preset") as part:
        (part / "weights").write_text("half")
        (tmp_path / ".presets.other").mkdir()
        save(tmp_path / "preset", "the other's")
        assert part.exists()
        part_name = part.name
        (tmp_path / "preset/weights").unlink()
        (tmp_path / "preset").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".presets.other", "preset"]
    assert part_name.startswith(".preset.")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_with_and_without_an_exchange(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    save(tmp_path / "preset", "old")
    save(tmp_path / "preset", "new", overwrite=True)
    assert (tmp_path / "preset/weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["preset"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    save(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "real/weights").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_places_that_cannot_be_written_to_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file is a file"):
        save(tmp_path / "file/below/preset", "new")
    with pytest.raises(ExportError, match=r"could not be written: "):
        save("/proc/nothing/preset", "new")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for path in (".", tmp_path, pathlib.Path("../work")):
        with pytest.raises(ExportError, match="the folder this process works in"):
            save(path, "new", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "work"]


def test_parents_that_were_made_for_it_go_with_it(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "there/a/b/preset"):
        raise RuntimeError
    assert os.listdir(tmp_path / "there") == []
    save(tmp_path / "there/a/b/preset", "new")
    assert (tmp_path / "there/a/b/preset/weights").read_text() == "new"


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


def test_a_folder_that_came_in_the_meantime_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ExportError), new_folder(target) as part:
        (part / "mine").write_text("x")
        target.mkdir()
        (target / "theirs").write_text("y")
    assert (target / "theirs").read_text() == "y" and not (target / "mine").exists()
    assert list(tmp_path.iterdir()) == [target]


def test_the_home_folder_may_be_named_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with new_folder("~/out") as part:
        (part / "mine").write_text("x")
    assert (tmp_path / "out" / "mine").exists()
