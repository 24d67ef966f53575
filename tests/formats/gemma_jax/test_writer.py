"""Checkpoints for the Gemma library for JAX: its tree, and its own model's logits."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
from _paths import RUNTIMES, TESTS

from gemma_keras_tune.adapters.lora import (
    enable_lora,
    get_factors,
    lora_linears,
    merge_lora,
    set_factors,
)
from gemma_keras_tune.errors import ExportError, LoadError
from gemma_keras_tune.exporting.exporter import export
from gemma_keras_tune.exporting.verifying import verify
from gemma_keras_tune.formats.gemma_jax import writer as gemma_jax_writer
from gemma_keras_tune.formats.gemma_jax.reader import _flat
from gemma_keras_tune.formats.weights import merged_weights
from gemma_keras_tune.gemma.families import backbone_inputs, backbone_settings
from gemma_keras_tune.gemma.state import is_instruct
from gemma_keras_tune.gemma.templates import SIDECAR, attach_template, get_template, template_of
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.testing import tiny_model

# `gemma` asks for other versions of what this library uses, so it may stand in an environment of
# its own: name its Python here.
PYTHON = os.environ.get("GEMMA_JAX_PYTHON", sys.executable)
PROBE = "from gemma import gm; gm.ckpts.load_params"


@pytest.fixture(scope="module")
def gemma3() -> Any:
    return tiny_model("gemma3", num_layers=7)


def _tuned(model: Any) -> Any:
    enable_lora(model, rank=2)
    random = np.random.default_rng(1)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, random.normal(0, 0.2, b.shape).astype("float32"))
    return model


def written_tree(model: Any, folder: pathlib.Path, **options: Any) -> Any:
    """The parameters as they are on the disk."""
    orbax = pytest.importorskip("orbax.checkpoint")
    folder.mkdir(exist_ok=True)
    gemma_jax_writer.write(model, folder, **options)
    return orbax.StandardCheckpointer().restore((folder / "params").absolute())


def test_tree_has_the_layout_of_the_library(gemma3: Any, tmp_path: pathlib.Path) -> None:
    tree = written_tree(gemma3, tmp_path)
    assert set(tree) == {"embedder", "final_norm", *(f"layer_{i}" for i in range(7))}
    layer = tree["layer_6"]
    block = gemma3.backbone.transformer_layers[6]
    assert layer["attn"]["kv_einsum"]["w"].shape == (2, 1, 16, 8)
    np.testing.assert_array_equal(
        layer["attn"]["kv_einsum"]["w"][1], np.asarray(block.attention.value_dense.kernel)
    )
    assert layer["mlp"]["gating_einsum"].shape == (2, 24, 16)
    np.testing.assert_array_equal(
        layer["mlp"]["gating_einsum"][0], np.asarray(block.gating_ffw.kernel).T
    )
    assert layer["attn"]["_query_norm"]["scale"].shape == (8,)


def test_dtype_is_the_one_asked_for(gemma3: Any, tmp_path: pathlib.Path) -> None:
    tree = written_tree(gemma3, tmp_path, dtype="bfloat16")
    assert tree["final_norm"]["scale"].dtype == ml_dtypes.bfloat16
    with pytest.raises(ExportError, match="'int8'"):
        gemma_jax_writer.write(gemma3, tmp_path, dtype="int8")


@pytest.mark.slow
def test_gemma2_2b_alone_keeps_its_gates_untransposed(tmp_path: pathlib.Path) -> None:
    sizes = dict(num_layers=1, num_query_heads=2, num_key_value_heads=1, head_dim=4)
    model = tiny_model("gemma2", hidden_dim=2304, intermediate_dim=8, **sizes)
    tree = written_tree(model, tmp_path / "2b")
    assert tree["layer_0"]["mlp"]["gating_einsum"].shape == (2, 2304, 4)
    tree = written_tree(tiny_model("gemma2", num_layers=1), tmp_path / "other")
    assert tree["layer_0"]["mlp"]["gating_einsum"].shape == (2, 24, 16)


def test_embeddings_get_the_rows_the_library_expects() -> None:
    embedding = np.arange(512_000, dtype="float32").reshape(256_000, 2)
    padded = gemma_jax_writer._with_its_rows(embedding)
    assert padded.shape == (256_128, 2)
    np.testing.assert_array_equal(padded[:256_000], embedding)
    assert (padded[256_000:] == embedding[0]).all()
    assert gemma_jax_writer._with_its_rows(np.zeros((262_208, 1))).shape == (262_144, 1)
    assert gemma_jax_writer._with_its_rows(np.zeros((262_400, 1, 1))).shape == (262_144, 1, 1)
    assert gemma_jax_writer._with_its_rows(np.zeros((500, 1))).shape == (500, 1)


def test_gemma1_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ExportError, match="Gemma 2, Gemma 3, Gemma 3n and Gemma 4") as caught:
        gemma_jax_writer.write(tiny_model("gemma", num_layers=1), tmp_path)
    assert "Gemma 1" in str(caught.value)


def test_gemma4_that_the_library_cannot_compute_is_refused(tmp_path: pathlib.Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    model = tiny_model("gemma4", layer_types=kinds, layer_norm_epsilon=1e-5)
    with pytest.raises(ExportError, match="cannot compute this Gemma 4") as caught:
        gemma_jax_writer.write(model, tmp_path)
    told = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 2
    assert "layer_norm_epsilon is 1e-05" in told
    with pytest.raises(ExportError, match="enable_moe_block is True"):
        gemma_jax_writer.write(tiny_model("gemma4", moe=True), tmp_path)
    assert "['full_attention', 'sliding_attention']" in told


def test_settings_the_library_does_not_know_are_refused(tmp_path: pathlib.Path) -> None:
    model = tiny_model("gemma3", num_layers=1, num_key_value_heads=4, use_post_ffw_norm=False)
    with pytest.raises(ExportError, match="use_post_ffw_norm") as caught:
        gemma_jax_writer.write(model, tmp_path)
    assert len(caught.value.problems) == 2


def test_gemma3n_that_the_library_cannot_compute_is_refused(tmp_path: pathlib.Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    model = tiny_model("gemma3n", layer_types=kinds, intermediate_size=[24, 24, 24, 32])
    with pytest.raises(ExportError, match="cannot compute this Gemma 3n") as caught:
        gemma_jax_writer.write(model, tmp_path)
    told = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "altup_num_inputs is 2" in told
    assert "[24, 24, 24, 32]" in told
    assert "['full_attention', 'sliding_attention']" in told


def test_orbax_holds_the_tree_and_lora_is_merged(tmp_path: pathlib.Path) -> None:
    model = _tuned(tiny_model("gemma3", num_layers=1))
    seen: list[tuple[str, int, int]] = []
    restored = written_tree(model, tmp_path, progress=lambda *news: seen.append(news))
    assert seen[-1][1] == seen[-1][2] == len(seen)
    merge_lora(model)
    merged = written_tree(model, tmp_path / "merged")
    keras.tree.map_structure(
        lambda left, right: np.testing.assert_allclose(left, right, atol=1e-6), restored, merged
    )
    proto = (tmp_path / "tokenizer.model").read_bytes()
    assert proto == model.preprocessor.tokenizer.proto


MEASURE = """
import pathlib, sys
import gemma_keras_tune as gkt
sys.path.append(sys.argv[2])
from _peak_memory import PeakMemory
from gemma_keras_tune.testing import tiny_model

def write(model, name):
    path = pathlib.Path(sys.argv[1], name)
    gkt.export(model, path, format="gemma_jax", check=False, verbose=0)

write(tiny_model("gemma3", num_layers=1), "imports and threads")
model = tiny_model("gemma3", num_layers=8, hidden_dim=1024, intermediate_dim=4096)
size = sum(int(variable.value.nbytes) for variable in model.variables)
with PeakMemory() as memory:
    write(model, "model")
print(size, memory.grown)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the memory")
def test_few_weights_lie_in_memory_beside_the_model(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    benchmarks = TESTS / "benchmarks"
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(benchmarks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, taken = map(int, done.stdout.split()[-2:])
    assert size > 400e6
    # As much as a shard of 200 MB, such as the other formats cut; the whole tree takes over 900.
    assert taken < 1.1 * 200e6, f"{taken / 1e6:,.0f} MB"


def test_nothing_stays_of_a_checkpoint_that_fails_at_its_end(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    model = tiny_model("gemma3", num_layers=1)
    scale = model.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, 1e6))
    options: dict[str, Any] = {"format": "gemma_jax", "check": False, "verbose": 0}
    with pytest.raises(ExportError, match=r"holds values up to 1e\+06, beyond float16"):
        export(model, tmp_path / "jax", dtype="float16", **options)
    assert list(tmp_path.iterdir()) == []


def test_every_name_of_a_checkpoint_needs_an_array(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    from gemma_keras_tune.formats.gemma_jax import orbax_tree

    with pytest.raises(ValueError, match=r"no arrays for \['b/c'\]"):
        orbax_tree.save(tmp_path / "x", {"a": "a", "b": {"c": "b/c"}}, [("a", np.ones(3))])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in the foreground: a shell has its background jobs ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_what_is_being_written() -> None:
    pytest.importorskip("orbax.checkpoint")
    from gemma_keras_tune.formats.gemma_jax import orbax_tree

    class Writing:
        done = False

        def result(self) -> None:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            self.done = True

    writing = Writing()
    with pytest.raises(KeyboardInterrupt):
        orbax_tree._finish(writing)
    assert writing.done


def test_large_arrays_are_cut_and_come_back_whole(tmp_path: pathlib.Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    from gemma_keras_tune.formats.gemma_jax import orbax_tree

    large = np.arange(2**24 + 5, dtype="float32").reshape(1, -1)  # more than a file holds
    arrays = {"b/large": large, "a": np.float32([1, 2]), "b/none": np.zeros((2, 3), "float16")}
    tree = {"a": "a", "b": {"large": "b/large", "none": "b/none"}}
    orbax_tree.save(tmp_path / "x", tree, iter(arrays.items()))
    with orbax.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(tmp_path / "x").item_metadata.tree
        found = checkpointer.restore(tmp_path / "x")
    assert metadata["b"]["large"].storage.chunk_shape < large.shape
    keras.tree.map_structure(
        lambda name, array: np.testing.assert_array_equal(array, arrays[name], strict=True),
        tree,
        found,
    )


SIZES: dict[str, dict[str, Any]] = {
    "gemma2": {"num_layers": 2},
    "gemma3": {"num_layers": 7},
    "gemma3n": {"altup_num_inputs": 4},
    "gemma4": {},
}


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f == "gemma3" else pytest.mark.slow) for f in SIZES]
)
def test_what_was_written_loads_again(family: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    sizes = {"num_layers": 2} if family in ("gemma2", "gemma3") else {}
    model = _tuned(tiny_model(family, **SIZES[family] | sizes))
    attach_template(model, get_template(model, "{prompt}>{response}"))
    export(model, tmp_path / "jax", format="gemma_jax", verbose=0, check=False)
    again = load(tmp_path / "jax", dtype="float32")
    assert type(again) is type(model)
    assert template_of(again) == template_of(model)
    theirs = {weight.path: value for weight, value in merged_weights(again)}
    for weight, value in merged_weights(model):
        value = value if weight.used else np.zeros_like(value)  # the library has no place for it
        np.testing.assert_array_equal(theirs.pop(weight.path), value, err_msg=weight.path)
    assert not theirs


@pytest.mark.parametrize(
    ("family", "layers", "settings"),
    [
        ("gemma3", 18, {"sliding_window_size": 512}),
        pytest.param(
            "gemma3", 34, {"sliding_window_size": 1024, "global_rope_scaling_factor": 8.0},
            marks=pytest.mark.slow,
        ),
        pytest.param("gemma2", 26, {"sliding_window_size": 4096}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flat", [True, False])
def test_a_published_checkpoint_is_read(
    family: str, layers: int, settings: dict[str, Any], flat: bool, tmp_path: pathlib.Path
) -> None:
    orbax = pytest.importorskip("orbax.checkpoint")
    model = tiny_model(family, num_layers=layers, **settings)
    tree = written_tree(model, tmp_path / "ours")
    sight = {"a": {"w": np.ones(3, "float32")}}
    if flat:  # as Google published them: the last name alone is a level of the tree
        leaves = dict(_flat(tree, "transformer"))
        leaves = {f"{k}/w" if "/mlp/" in k else k: leaf for k, leaf in leaves.items()}
        tree = {"SigLiPFromPatches_0/b": sight["a"]}
        for path, leaf in leaves.items():
            place, _, name = path.rpartition("/")
            tree.setdefault(place, {})[name] = leaf
    else:
        tree["vision_encoder"] = sight
        tree["embedder"]["mm_input_projection"] = sight["a"]
    folder = tmp_path / "a-model-it"
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    (tmp_path / "tokenizer.model").write_bytes(model.preprocessor.tokenizer.proto)
    with pytest.warns(UserWarning, match="the text tower alone was read"):
        again = load(folder, dtype="float32")
    assert is_instruct(again)
    theirs, ours = (backbone_settings(m) for m in (again, model))
    for name in theirs.keys() & ours.keys() - {"name", "image_size"}:
        assert theirs[name] == ours[name], name
    values = {weight.path: value for weight, value in merged_weights(again)}
    for weight, value in merged_weights(model):
        np.testing.assert_array_equal(values.pop(weight.path), value, err_msg=weight.path)
    assert not values


def test_a_checkpoint_that_lies_is_refused(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    model = tiny_model("gemma3", num_layers=1)
    folder = export(model, tmp_path / "jax", format="gemma_jax", verbose=0, check=False)
    record = json.loads((folder / SIDECAR).read_text())

    def error(**settings: Any) -> LoadError:
        lie = record | {"backbone": record["backbone"] | settings}
        (folder / SIDECAR).write_text(json.dumps(lie))
        with pytest.raises(LoadError) as caught:
            load(folder)
        return caught.value

    assert "10000000 layers, and the checkpoint holds 1" in str(error(num_layers=10_000_000))
    wide = error(hidden_dim=2**30)
    assert "embedder/input_embedding has shape" in str(wide)
    assert len(wide.problems) > 5
    (folder / SIDECAR).unlink()
    with pytest.raises(LoadError, match=r"no published Gemma 2 or 3(.|\n)*gemma_keras_tune\.json"):
        load(folder)
    tokenizer = (folder / "tokenizer.model").rename(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match=r"no tokenizer: tokenizer\.model is missing"):
        load(folder)
    tokenizer.rename(folder / "tokenizer.model")
    (folder / SIDECAR).write_text(json.dumps(record))
    for file in (folder / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(LoadError, match="cannot be read as a checkpoint"):
        load(folder)


_LOCAL, _WHOLE = "LOCAL_SLIDING", "GLOBAL"
# A published model, its layers, and settings that differ from its own.
TWINS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "gemma2": ("Gemma2_9B", [_LOCAL, _WHOLE], {}),
    "gemma3": ("Gemma3_1B", [_LOCAL] * 5 + [_WHOLE, _LOCAL], {}),
    "gemma3n": (
        "Gemma3n_E2B",
        [_LOCAL, _WHOLE] * 2,
        {
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "per_layer_input_dim": 4,
            "laurel_rank": 4,
            "shared": 2,
        },
    ),
    "gemma4": (
        "Gemma4_E2B",
        [_LOCAL, _WHOLE] * 2,
        {
            "global_key_size": 16,
            "global_rope_proportion": 0.5,
            "per_layer_input_dim": 4,
            "override_kv_shared_ffw_hidden": None,
            "shared": 2,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TWINS)
def test_the_library_computes_the_same_logits(family: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    found = subprocess.run([PYTHON, "-c", PROBE], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("the package `gemma` does not start here; GEMMA_JAX_PYTHON names another")
    model = _tuned(tiny_model(family, **SIZES[family]))
    options = dict(check=True, prompts=["one", "two"], verbose=0)
    folder = export(model, tmp_path / "jax", format="gemma_jax", **options)
    ids = np.random.default_rng(0).integers(5, 500, (2, 20))
    # With its own cap, but for Gemma 3n, whose cap the library leaves out.
    ours = model(backbone_inputs(model.backbone, ids, np.ones_like(ids)))
    if family == "gemma3n":
        ours = 30.0 * np.arctanh(np.asarray(ours, "float64") / 30.0)
    name, kinds, other = TWINS[family]
    sizes = other | dict(
        num_embed=model.preprocessor.tokenizer.vocabulary_size(),
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=8,
        num_kv_heads=model.backbone.num_key_value_heads,
        sliding_window_size=8,
    )
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    asked = {"model": name, "kinds": kinds, "sizes": sizes, "ids": ids.tolist()}
    request.write_text(json.dumps(asked))
    script = str(RUNTIMES / "gemma_jax_twin.py")
    done = subprocess.run(
        [PYTHON, script, str(folder), str(request), str(answer)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    theirs = np.asarray(json.loads(answer.read_text()))
    np.testing.assert_allclose(theirs, np.asarray(ours), atol=1e-3)
    verdict = verify(folder)
    assert verdict.passed, str(verdict)
    assert "gemma" in str(verdict.checks)
