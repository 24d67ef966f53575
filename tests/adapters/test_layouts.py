"""Adapters of other tools come in exactly, or are refused by name and leave the model alone."""

import json
import math

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.adapters.layouts import read_adapter
from gemma_keras_tune.gemma.families import family_of, from_matrix, to_matrix

FUZZ = settings(
    max_examples=40, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """Only read from: `read_adapter` never touches it."""
    return testing.tiny_model("gemma3")


def linears_of(model):
    return {linear.hugging_face: linear for linear in family_of(model).linears(model)}


def kernel_shape(linear):
    return tuple(linear.layer._kernel.shape)


def shape_of(linear):
    """`(outputs, inputs)`."""
    zeros = np.zeros(kernel_shape(linear))
    return to_matrix(zeros, linear.output_axes, linear.input_axes).shape


def drawn(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype("float32")


def peft(model, folder, *, rank_of=lambda name: 2, names=None, prefix="model.", **config):
    """A PEFT folder, and what it adds to each `[outputs, inputs]` weight at a scale of 1."""
    tensors, updates = {}, {}
    for name, linear in linears_of(model).items():
        if names is not None and name not in names:
            continue
        (outputs, inputs), rank = shape_of(linear), rank_of(name)
        a, b = drawn(rank, inputs), drawn(outputs, rank)
        full = f"base_model.model.{prefix}{name.removeprefix('model.')}"
        tensors[f"{full}.lora_A.weight"], tensors[f"{full}.lora_B.weight"] = a, b
        updates[name] = b @ a
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    target_modules = sorted({name.rpartition(".")[2] for name in updates})
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": target_modules}
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    return folder, updates


def assert_adds(adapter, updates):
    """The adapter adds just this, and nothing to the other layers of its target_modules."""
    assert adapter.problems == ()
    config = adapter.config
    scale = config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
    for name, (a, b) in adapter.factors.items():
        assert a.shape[0] == b.shape[1] == config.rank
        expected = updates.get(name, np.zeros((b.shape[0], a.shape[1])))
        np.testing.assert_allclose(scale * b @ a, expected, atol=1e-5, err_msg=name)
    assert set(updates) <= set(adapter.factors)


# PEFT's settings.


def test_ranks_and_alphas_of_layers(model, tmp_path):
    def rank_of(name):
        return 4 if name.endswith("q_proj") else 1 if name == "model.layers.1.mlp.up_proj" else 2

    folder, updates = peft(
        model, tmp_path, rank_of=rank_of, lora_alpha=6, alpha_pattern={"q_proj": 2},
        rank_pattern={"q_proj": 4, r"layers\.1\.mlp\.up_proj": 1},
    )  # fmt: skip
    for name, update in updates.items():
        update *= (2 if name.endswith("q_proj") else 6) / rank_of(name)
    adapter = read_adapter(folder, model)
    assert (adapter.config.rank, adapter.config.alpha) == (4, 4)
    assert_adds(adapter, updates)


@pytest.mark.parametrize("stabilized", [False, True])
def test_one_rank_and_alpha_stay_as_they_are(model, tmp_path, stabilized):
    folder, updates = peft(
        model, tmp_path, rank_of=lambda _: 3, r=3, lora_alpha=5, use_rslora=stabilized
    )
    adapter = read_adapter(folder, model)
    config = adapter.config
    assert (config.rank, config.alpha, config.use_rslora) == (3, 5, stabilized)
    assert_adds(adapter, {n: u * 5 / (3**0.5 if stabilized else 3) for n, u in updates.items()})


@pytest.mark.parametrize(
    "prefix", ["model.", "model.language_model.", "language_model.model.", "model.model."]
)
def test_the_names_of_multimodal_models(model, tmp_path, prefix):
    folder, updates = peft(model, tmp_path, prefix=prefix)
    assert_adds(read_adapter(folder, model), updates)


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.layers\.1\.(self_attn|mlp)\.\w+"},
        {"exclude_modules": r"model\.layers\.0\..*"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"fan_in_fan_out": True, "bias": "none", "init_lora_weights": "gaussian"}
        | {"target_modules": r".*\.1\..*"},
    ],
)
def test_layers_that_are_left_out_stay_as_they_are(model, tmp_path, config):
    names = [name for name in linears_of(model) if ".layers.1." in name]
    folder, updates = peft(model, tmp_path, names=names, **config)
    adapter = read_adapter(folder, model)
    assert len(adapter.factors) == 2 * len(updates)
    assert_adds(adapter, updates)


def test_what_the_settings_and_the_weights_say_differently_is_listed(model, tmp_path):
    names = [name for name in linears_of(model) if ".layers.1." in name]
    folder, _ = peft(model, tmp_path, names=names)
    problems = read_adapter(folder, model).problems
    assert len(problems) == 7 and all("no factors for it" in text for text in problems)
    folder, _ = peft(model, tmp_path, exclude_modules=["q_proj"])
    problems = read_adapter(folder, model).problems
    assert len(problems) == 2 and all("leave it out" in text for text in problems)


def test_all_that_cannot_be_done_is_listed_at_once(model, tmp_path):
    refused = {
        "use_dora": True, "lora_bias": True, "modules_to_save": ["lm_head"], "bias": "all",
        "trainable_token_indices": [5], "peft_type": "IA3", "init_lora_weights": "pissa_niter_4",
        "layer_replication": [[0, 2]], "target_parameters": ["experts.gate_up_proj"],
    }  # fmt: skip
    folder, _ = peft(model, tmp_path, **refused)
    problems = read_adapter(folder, model).problems
    assert len(problems) == len(refused)
    assert all(any(name in text for text in problems) for name in refused)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "lm_head", "model.embed_tokens.modules_to_save.default"]
)
def test_an_embedding_that_was_not_trained_is_no_part_of_it(name, dtype, model, tmp_path):
    """PEFT's `save_embedding_layers`, and `modules_to_save` that no step moved."""
    folder, updates = peft(model, tmp_path, modules_to_save=[name.split(".")[-1]]
                           if name == "lm_head" else None)  # fmt: skip
    embedding = np.asarray(model.backbone.token_embedding.embeddings).astype(dtype)
    beside(folder, name, embedding)
    assert_adds(read_adapter(folder, model), updates)
    other = embedding.copy()
    other[[7, 9]] *= 1.5
    beside(folder, name, other)
    (problem,) = read_adapter(folder, model).problems
    assert f"{name}.weight: the embedding was trained too (2 of {len(other):,} rows" in problem
    beside(folder, name, np.concatenate([embedding, embedding[:2]]))
    (problem,) = read_adapter(folder, model).problems
    assert "tokens were added, or it was trained on another base" in problem


def beside(folder, name, value):
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}.weight": value}, file)


def test_only_factors_are_read_whole(model, tmp_path, monkeypatch):
    folder, updates = peft(model, tmp_path)
    embedding = np.asarray(model.backbone.token_embedding.embeddings)
    beside(folder, "model.embed_tokens", embedding)
    read = []
    stock = safetensors.safe_open

    class Watched:
        def __init__(self, *given):
            self.file = stock(*given)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *given):
            return self.file.__exit__(*given)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    assert_adds(read_adapter(folder, model), updates)
    assert len(read) == 2 * len(updates) and all("lora_" in name for name in read)


def test_a_path_that_is_no_adapter_says_what_to_pass(model, tmp_path, monkeypatch):
    folder, updates = peft(model, tmp_path / "adapter")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_adds(read_adapter("~/adapter", model), updates)
    with pytest.raises(gkt.errors.AdapterError, match=f"Pass its folder: {folder}"):
        read_adapter(folder / "adapter_model.safetensors", model)
    with pytest.raises(gkt.errors.AdapterError, match=r"There is no adapter at .*nowhere"):
        read_adapter(tmp_path / "nowhere", model)


@pytest.mark.parametrize(
    ("family", "module"),
    [("gemma3n", "altup.correction_coefs"), ("gemma4", "per_layer_input_gate")],
)
def test_layers_that_lora_cannot_stand_on_are_told_from_unknown_ones(family, module, tmp_path):
    """PEFT's "all-linear" puts factors on them."""
    model = testing.tiny_model(family)
    folder, _ = peft(model, tmp_path, names=["model.layers.0.self_attn.q_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in (module, "nothing"):
        full = f"base_model.model.model.layers.0.{name}"
        tensors |= {f"{full}.lora_A.weight": drawn(2, 4), f"{full}.lora_B.weight": drawn(4, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    problems = read_adapter(folder, model).problems
    assert any(f"{module}: LoRA of this library cannot stand" in p for p in problems), problems
    assert any("nothing: this model has no such layer" in p for p in problems)


def test_a_pickle_is_not_opened(model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(gkt.errors.AdapterError, match="pickle"):
        read_adapter(tmp_path, model)


def test_a_pattern_that_would_never_end_is_given_up(model, tmp_path):
    folder, _ = peft(model, tmp_path, target_modules=r"(.|\w)*[!?]")
    with pytest.raises(gkt.errors.AdapterError, match="pattern"):
        read_adapter(folder, model)


def test_only_factors_without_effect_may_stand_elsewhere(model, tmp_path):
    folder, updates = peft(model, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    tower = {name.format("A"): drawn(2, 8), name.format("B"): np.zeros((8, 2), "float32")}
    save_file(tensors | tower, path)
    assert_adds(read_adapter(folder, model), updates)
    save_file(tensors | tower | {name.format("B"): drawn(8, 2)}, path)
    assert "no such layer" in read_adapter(folder, model).problems[0]


def test_bfloat16_factors(model, tmp_path):
    folder, updates = peft(model, tmp_path)
    path = folder / "adapter_model.safetensors"
    rounded = {name: value.astype(bfloat16) for name, value in load_file(path).items()}
    save_file(rounded, path)
    adapter = read_adapter(folder, model)
    assert adapter.problems == () and set(adapter.factors) == set(updates)
    assert all(a.dtype == b.dtype == "float32" for a, b in adapter.factors.values())


# The other layouts.


def mlx(model, folder, **settings):
    tensors, updates = {}, {}
    for name, linear in linears_of(model).items():
        if "self_attn" in name:
            outputs, inputs = shape_of(linear)
            a, b = drawn(inputs, 2), drawn(2, outputs)
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
            updates[name] = 20 * (a @ b).T
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return updates


def test_an_adapter_of_mlx(model, tmp_path):
    updates = mlx(model, tmp_path)
    adapter = read_adapter(tmp_path, model)
    assert (adapter.layout, adapter.config.rank, adapter.config.alpha) == ("mlx", 2, 40)
    assert adapter.config.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert_adds(adapter, updates)
    mlx(model, tmp_path, fine_tune_type="dora")
    assert "dora" in read_adapter(tmp_path, model).problems[0]
    mlx(model, tmp_path, lora_parameters={"rank": 2})
    with pytest.raises(gkt.errors.AdapterError, match="lora_parameters"):
        read_adapter(tmp_path, model)


ALL_OF_KERAS_HUB = [
    "query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "target_modules"),
    [
        ("gemma3", None),
        pytest.param("gemma", ALL_OF_KERAS_HUB, marks=pytest.mark.slow),
        pytest.param("gemma3", ALL_OF_KERAS_HUB, marks=pytest.mark.slow),
        pytest.param("gemma2", ALL_OF_KERAS_HUB, marks=pytest.mark.slow),
        pytest.param("gemma4", ALL_OF_KERAS_HUB, marks=pytest.mark.slow),
        pytest.param(
            "gemma3n", ["q_proj", "o_proj", "gate_proj", "down_proj"], marks=pytest.mark.slow
        ),
    ],
)
def test_an_adapter_of_keras_hub(family, target_modules, tmp_path):
    """KerasHub itself makes it; the kernels it merges are what must come in."""
    theirs = testing.tiny_model(family)
    linears = linears_of(theirs)
    before = {name: np.asarray(linear.layer.kernel) for name, linear in linears.items()}
    theirs.backbone.enable_lora(1, target_layer_names=target_modules)
    for linear in linears.values():
        if linear.layer.lora_enabled:
            linear.layer.lora_kernel_b.assign(drawn(*linear.layer.lora_kernel_b.shape))
    path = tmp_path / "tuned.lora.h5"
    theirs.backbone.save_lora_weights(str(path))
    updates = {
        name: to_matrix(
            np.asarray(linear.layer.kernel) - before[name], linear.output_axes, linear.input_axes
        )
        for name, linear in linears.items()
        if linear.layer.lora_enabled
    }
    assert updates
    adapter = read_adapter(path, testing.tiny_model(family))
    assert adapter.layout == "keras_hub"
    assert adapter.config.rank == (1 if family == "gemma3n" else 4)  # one A for each head
    assert_adds(adapter, updates)


def test_a_broken_file_of_keras_hub(model, tmp_path):
    import h5py

    path = tmp_path / "tuned.lora.h5"
    path.write_bytes(b"nothing")
    with pytest.raises(gkt.errors.AdapterError, match="cannot be read"):
        read_adapter(path, model)
    with h5py.File(path, "w") as file:
        file["lora/vars/rank"] = 2
        file["lora/11/vars/lora_kernel_a"] = drawn(1, 16, 2)
        file["lora/11/vars/lora_kernel_b"] = drawn(2, 9)
        file["lora/0/vars/lora_kernel_a"] = drawn(4, 2)
        file["lora/0/vars/lora_kernel_b"] = drawn(2, 4)
    problems = read_adapter(path, model).problems
    assert any("layer 11" in p and "expected shapes (1, 16, 2) and (2, 8)" in p for p in problems)
    assert any("layer 0" in p for p in problems)
    liars = [
        dict(data=np.float32("inf")),
        dict(data=-2),
        dict(data=[2]),
        dict(shape=(10**13,), dtype="i8", chunks=(1000,)),  # a file of three kilobytes
    ]
    for rank in liars:
        with h5py.File(path, "w") as file:
            file.create_dataset("lora/vars/rank", **rank)
        with pytest.raises(gkt.errors.AdapterError, match="rank is"):
            read_adapter(path, model)


def jax_tree(model):
    """The tree the Gemma library for JAX 3.3 trains, by its own names and shapes."""
    shapes = {
        ("attn", "q_einsum", "_LoRAEinsum_0"): ((16, 2), (2, 4, 8)),
        ("attn", "kv_einsum", "_LoRAEinsum_0"): ((16, 2), (2, 2, 1, 8)),
        ("attn", "attn_vec_einsum", "_LoRAEinsum_0"): ((4, 8, 2), (2, 16)),
        ("mlp", "_LoRAEinsum_gating_einsum"): ((16, 2), (2, 2, 24)),
        ("mlp", "_LoRAEinsum_linear"): ((24, 2), (2, 16)),
    }
    tree, updates = {}, {}
    for block in range(2):
        prefix = f"model.layers.{block}."
        for place, (a_shape, b_shape) in shapes.items():
            a, b = drawn(*a_shape, seed=block), drawn(*b_shape, seed=block)
            node = tree.setdefault(f"layer_{block}", {})
            for name in place:
                node = node.setdefault(name, {})
            node["lora"] = {"a": a, "b": b}
            kind = place[1]
            if kind == "q_einsum":
                found = {"self_attn.q_proj": np.einsum("dr,rnh->nhd", a, b).reshape(32, 16)}
            elif kind == "kv_einsum":
                keys, values = np.einsum("dr,rckh->ckhd", a, b).reshape(2, 8, 16)
                found = {"self_attn.k_proj": keys, "self_attn.v_proj": values}
            elif kind == "attn_vec_einsum":
                found = {"self_attn.o_proj": np.einsum("nhr,rd->dnh", a, b).reshape(16, 32)}
            elif "gating" in kind:
                gate, up = np.einsum("dr,rcf->cfd", a, b)
                found = {"mlp.gate_proj": gate, "mlp.up_proj": up}
            else:
                found = {"mlp.down_proj": (a @ b).T}
            updates |= {prefix + name: update for name, update in found.items()}
    return tree, updates


def test_a_tree_of_the_gemma_library_for_jax(model):
    tree, updates = jax_tree(model)
    adapter = read_adapter(tree, model)
    assert (adapter.layout, adapter.config.rank, adapter.config.alpha) == ("gemma_jax", 2, 2)
    assert set(adapter.factors) == set(linears_of(model))
    assert_adds(adapter, updates)
    tree["layer_0"]["attn"]["q_einsum"]["w"] = drawn(4, 16, 8)
    assert "q_einsum/w" in read_adapter(tree, model).problems[0]


@pytest.mark.slow
def test_an_orbax_folder(model, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    tree, updates = jax_tree(model)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "lora", tree)
    assert_adds(read_adapter(tmp_path / "lora", model), updates)
    tree["layer_0"]["attn"]["q_einsum"]["_LoRAEinsum_0"]["lora"]["a"] = drawn(600, 600)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "large", tree)
    with pytest.raises(
        gkt.errors.AdapterError, match=r"q_einsum.*\(600, 600\) is larger than any weight"
    ):
        read_adapter(tmp_path / "large", model)
    for file in (tmp_path / "lora").rglob("*"):
        if file.is_file() and file.name not in ("_METADATA", "_CHECKPOINT_METADATA"):
            file.write_bytes(b"broken")
    with pytest.raises(gkt.errors.AdapterError, match="Orbax"):
        read_adapter(tmp_path / "lora", model)


@pytest.mark.slow
def test_what_is_read_is_what_the_model_computes(tmp_path):
    """Ranks and scales that differ, put on the model: the kernels plus the updates."""
    tuned, merged = testing.tiny_model(), testing.tiny_model()
    folder, updates = peft(
        tuned, tmp_path, rank_of=lambda name: 1 if "mlp" in name else 2, lora_alpha=1,
        rank_pattern={"mlp.*": 1}, names=[n for n in linears_of(tuned) if ".0." in n],
        layers_to_transform=[0],
    )  # fmt: skip
    gkt.load_adapter(tuned, folder)
    for name, linear in linears_of(merged).items():
        if name in updates:
            update = updates[name] * (1.0 if "mlp" in name else 0.5)
            axes = linear.output_axes, linear.input_axes
            kernel = linear.layer.kernel
            kernel.assign(kernel + from_matrix(update, kernel_shape(linear), *axes))
    ids = np.arange(4, 20).reshape(2, 8)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    np.testing.assert_allclose(tuned(inputs), merged(inputs), atol=1e-4)


# Hostile files.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
NAMES = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "bias",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "use_dora",
    "init_lora_weights", "modules_to_save", "lora_parameters", "fine_tune_type",
)  # fmt: skip


def tries(source, model):
    """Reads it or refuses it: nothing else may come out, and never factors that do not fit."""
    try:
        adapter = read_adapter(source, model)
    except gkt.errors.AdapterError:
        return
    linears = linears_of(model)
    assert adapter.problems or adapter.config.rank >= 1
    for name, (a, b) in adapter.factors.items():
        assert (b.shape[0], a.shape[1]) == shape_of(linears[name])
        assert np.isfinite(a).all()


@pytest.mark.slow
@FUZZ
@given(st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=3))
def test_any_settings_are_read_or_refused(model, tmp_path, settings):
    folder, _ = peft(model, tmp_path / "peft", **settings)
    tries(folder, model)
    (tmp_path / "mlx").mkdir(exist_ok=True)
    mlx(model, tmp_path / "mlx", **settings)
    tries(tmp_path / "mlx", model)


@FUZZ
@given(st.data())
def test_any_damage_to_the_weights_is_read_or_refused(model, tmp_path, data):
    folder, _ = peft(model, tmp_path / "peft", names=["model.layers.0.self_attn.q_proj"])
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 300))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    tries(folder, model)


@FUZZ
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    key=st.text(max_size=12) | st.sampled_from(["lora_A.weight", "lora_B.weight", "lora_a"]),
    value=st.sampled_from([0.0, 1.0, np.nan, np.inf, 1e300]),
)
def test_shapes_that_lie_are_refused(model, tmp_path, shape, key, value):
    folder, _ = peft(model, tmp_path / "peft")
    path = folder / "adapter_model.safetensors"
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{key}"
    save_file(load_file(path) | {name: np.full(shape, value)}, path)
    tries(folder, model)
    tries({"layer_0": {"attn": {"q_einsum": {"lora": {"a": np.full(shape, value)}}}}}, model)


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path):
    model = testing.tiny_model()
    linears = linears_of(model)
    before = {name: np.asarray(linear.layer.kernel) for name, linear in linears.items()}
    folder, _ = peft(model, tmp_path, rank_pattern={"down_proj": 3})
    with pytest.raises(gkt.errors.AdapterError, match="rank_pattern"):
        gkt.load_adapter(model, folder)
    folder, _ = peft(model, tmp_path, rank_of=lambda _: 9, r=9)
    with pytest.raises(gkt.errors.AdapterError, match="at most 8"):
        gkt.load_adapter(model, folder)
    assert gkt.lora_config(model) is None
    for name, linear in linears.items():
        np.testing.assert_array_equal(linear.layer.kernel, before[name])
