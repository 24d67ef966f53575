"""A disk that is full in the middle of a write: a plain error, and what was there is still whole.

The kernel refuses to let a file grow further, as it does on a full disk.
"""

import os
import resource
import signal
import subprocess
import sys

import pytest

from gemma_keras_tune._support.files import new_folder
from gemma_keras_tune.errors import ExportError

SCRIPT = """
import importlib.util, os, pathlib, resource, sys
import gemma_keras_tune as gkt
from gemma_keras_tune.testing import tiny_model

root = pathlib.Path(sys.argv[1])
options = dict(overwrite=True, check=False)
writers = {
    "hugging_face": lambda path: gkt.export(model, path, verbose=0, **options),
    "file.gguf": lambda path: gkt.export(model, path, verbose=0, **options),
    "lora.gguf": lambda path: gkt.export(
        model, path, format="gguf_adapter", verbose=0, **options
    ),
    "ollama": lambda path: gkt.export(model, path, format="ollama", verbose=0, **options),
    "preset": lambda path: gkt.save_preset(model, path, **options),
    "adapter": lambda path: gkt.save_adapter(model, path, **options),
}
if importlib.util.find_spec("orbax"):
    writers["jax"] = lambda path: gkt.export(
        model, path, format="gemma_jax", verbose=0, **options
    )
model = tiny_model("gemma3", hidden_dim=64)
gkt.enable_lora(model, rank=8, verbose=0)
for name, write in writers.items():
    write(root / name)

def state():
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path): path.read_bytes() for path in files}

before = state()
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for name, write in writers.items():
    # All but the end of the largest file fits: the weights, or a Hugging Face tokenizer.
    files = [path for path in before if path.startswith(str(root / name))]
    largest = max(len(before[path]) for path in files)
    # TensorStore gathers small weights in files of varying size; the embedding has over half of it.
    fits = largest // 2 if name == "jax" else largest - 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (fits, most))
    try:
        write(root / name)
    except gkt.errors.ExportError as error:
        assert "the disk is full" in str(error), error
        assert str(root / name) in str(error), error
    else:
        raise SystemExit(f"{name}: it was written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert state() == before, name
    parts = [path for path in root.iterdir() if path.name.startswith(".")]
    assert not parts, parts
print("all whole")
"""


@pytest.mark.slow
def test_every_writer_on_a_full_disk(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        # The compilation cache would grow, too.
        env={k: v for k, v in os.environ.items() if not k.startswith("JAX_")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all whole" in done.stdout


def test_the_error_names_the_folder_and_nothing_is_left(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(ExportError, match=r"preset could not be written: the disk is full"),
            new_folder(tmp_path / "preset") as part,
        ):
            (part / "weights").write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "anything"),
        RuntimeError("file write failed: errno = 28, error message = 'No space left on device'"),
        ValueError("I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_in_whatever_words_a_library_says_it(error, tmp_path):
    with pytest.raises(ExportError, match="the disk is full"), new_folder(tmp_path / "preset"):
        raise error
    with pytest.raises(ExportError, match="the disk is full"), new_folder(tmp_path / "preset"):
        raise RuntimeError("writing failed") from error


def test_other_refusals_of_the_system_are_told_and_other_errors_pass(tmp_path):
    with (
        pytest.raises(ExportError, match="preset could not be written: Permission denied"),
        new_folder(tmp_path / "preset"),
    ):
        raise OSError(13, "Permission denied")
    with pytest.raises(ValueError, match="anything"), new_folder(tmp_path / "preset"):
        raise ValueError("anything")
    assert list(tmp_path.iterdir()) == []
