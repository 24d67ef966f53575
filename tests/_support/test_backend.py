"""What JAX runs on is told: an accelerator that is not used, above all."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import jax
import keras
import pytest
import tensorflow as tf

from gemma_keras_tune._support import backend

JAX = importlib.metadata.version("jax")
JAXLIB = importlib.metadata.version("jaxlib")
PLUGINS = ("jax_cuda12_plugin", "jax_rocm60_plugin", "libtpu")
USE = """
import gemma_keras_tune as gkt
from gemma_keras_tune import testing

model = testing.tiny_model("gemma3", num_layers=1)
for _ in range(2):
    gkt.load(model)
"""
SAY_MEMORY = """
import os, sys
print(*(v for k, v in os.environ.items() if "_CLIENT_" in k), file=sys.stderr)
"""
OURS = "JAX runs on the CPU, though a plugin for an accelerator is installed"
JAXS = "JAX plugin jax_cuda12_plugin version 0.0.1 is installed, but it is not compatible"


def install(folder: pathlib.Path, plugin: str) -> None:
    """A plugin of another version than jaxlib, as far as JAX looks at it."""
    package, info = folder / plugin, folder / f"{plugin}-0.0.1.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "version.py").write_text("__version__ = '0.0.1'\n")
    (package / "__init__.py").touch()
    if "cuda" in plugin:  # of others JAX does not compare the version
        (package / "_solver.py").touch()
    if plugin == "libtpu":
        (package / "__init__.py").write_text("get_library_path = lambda: __file__\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {plugin}\nVersion: 0.0.1\n")


def said(code: str, folder: pathlib.Path, **environment: str) -> str:
    """What a process with the plugins in a folder writes to standard error."""
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "PYTHONWARNINGS")}
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def test_an_accelerator_that_is_not_used_is_told_once_and_so_is_what_jax_says(tmp_path):
    for plugin in PLUGINS:
        install(tmp_path, plugin)
    plain = said("import jax; jax.devices()", tmp_path)
    text = said(USE, tmp_path)
    assert text.count(JAXS) == plain.count(JAXS) > 0
    assert text.count(OURS) == 1 and text.count("UserWarning: JAX runs on the CPU") == 1
    assert f"{', '.join(f'{name} 0.0.1' for name in PLUGINS)}, beside jaxlib {JAXLIB}" in text
    rocm = f"jax-rocm60-plugin=={JAXLIB} jax-rocm60-pjrt=={JAXLIB}"
    assert f'    pip install "jax[cuda12]=={JAX}" {rocm} "jax[tpu]=={JAX}"\n' in text


def test_nothing_is_told_where_the_cpu_is_chosen(tmp_path):
    install(tmp_path, "jax_cuda12_plugin")
    assert OURS not in said(USE, tmp_path, JAX_PLATFORMS="cpu")


def test_a_module_that_pip_has_replaced_is_told_with_both_versions(tmp_path):
    loaded = "import pyarrow; pyarrow.__version__ = '18.1.0'\n"
    text = said(loaded + USE, tmp_path)
    installed = importlib.metadata.version("pyarrow")
    assert text.count(f"pyarrow 18.1.0 is loaded, {installed} is installed. Restart it") == 1
    assert "numpy" not in text


def test_jax_takes_most_of_a_gpu_unless_the_user_says_how_it_allocates(tmp_path):
    install(tmp_path, "jax_cuda12_plugin")
    use = USE + SAY_MEMORY
    assert said(use, tmp_path).endswith("0.92\n")
    assert said(use, tmp_path, XLA_PYTHON_CLIENT_PREALLOCATE="false").endswith("\nfalse\n")


class Accelerator:
    platform, device_kind = "gpu", "NVIDIA T4"


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_accelerator_that_is_not_used_is_told(monkeypatch, recwarn, count):
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator()] * count)
    backend._check_devices()
    said = [str(w.message) for w in recwarn]
    assert len(said) == count - 1
    assert all("One of 2 devices (NVIDIA T4) is used" in text for text in said)
    assert all("keras.distribution.DataParallel())" in text for text in said)


def test_a_distribution_uses_all_accelerators(monkeypatch, recwarn):
    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator()] * 2)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "data parallel")
    backend._check_devices()
    assert not list(recwarn)


def test_tensorflow_sees_no_accelerator(monkeypatch):
    hidden = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda d, kind: hidden.append((kind, d)))
    backend._keep_tensorflow_off()
    assert hidden == [("GPU", []), ("TPU", [])]
