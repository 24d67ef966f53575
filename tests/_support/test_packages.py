"""Packages that only one feature needs."""

import sys
import tomllib

import keras
import pytest
from _paths import ROOT

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune._support.packages import import_extra, installed_versions


def test_versions_of_what_is_installed():
    found = installed_versions(["keras", "there-is-no-such-package"])
    assert found == {"keras": keras.__version__}


def test_a_missing_package_names_its_extra(monkeypatch):
    assert (
        import_extra("json.decoder", "x", "These", gkt.errors.LoadError).__name__ == "json.decoder"
    )
    monkeypatch.setitem(sys.modules, "colorsys", None)
    with pytest.raises(gkt.errors.LoadError, match="These need the package colorsys") as caught:
        import_extra("colorsys", "x", "These", gkt.errors.LoadError)
    assert caught.value.next_step == 'pip install "gemma-keras-tune[x]"'


def test_an_orbax_that_is_missing_leaves_nothing(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.endswith("orbax_tree")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("orbax", "orbax.checkpoint"):
        monkeypatch.setitem(sys.modules, name, None)
    model = testing.tiny_model("gemma3", num_layers=1)
    with pytest.raises(
        gkt.errors.ExportError, match=r'pip install "gemma-keras-tune\[gemma-jax\]"'
    ):
        gkt.export(model, tmp_path / "x", format="gemma_jax", verbose=0, check=False)
    assert list(tmp_path.iterdir()) == []


def test_the_extra_that_errors_name_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "gemma-jax" in project["project"]["optional-dependencies"]
