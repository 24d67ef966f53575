"""Several adapters on one base: each answers as it does alone, and nothing compiles again."""

import gc
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from _quantized import quantize
from safetensors.numpy import load_file

import gemma_keras_tune as gkt
from gemma_keras_tune.adapters.active import adapter_strength
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.errors import AdapterError
from gemma_keras_tune.exporting.receipts import read_receipt
from gemma_keras_tune.formats.gguf.reader import read_header
from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.generation.answers import compiled_programs
from gemma_keras_tune.testing import tiny_model, tiny_pairs

PROMPT = "Say something."


def fresh() -> Any:
    return tiny_model("gemma3", num_layers=2)


def ask(model: Any, **options: Any) -> np.ndarray:
    answer = gkt.generate_answers(model, PROMPT, max_new_tokens=12, **options)[0]
    return answer.ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Three adapters: two of one shape, one wider, on fewer layers and of another scale."""
    root = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, options) in enumerate(
        {
            "one": dict(rank=2),
            "two": dict(rank=2),
            "wide": dict(rank=3, alpha=12.0, target_modules=["q_proj", "v_proj"]),
        }.items()
    ):
        model = fresh()
        gkt.enable_lora(model, verbose=0, **options)  # type: ignore[arg-type]
        random = np.random.default_rng(seed)
        for linear in lora_linears(model):
            a, b, _ = get_factors(linear)
            set_factors(linear, a, random.normal(0, 0.6, b.shape).astype("float32"))
        gkt.attach_template(model, gkt.get_template(model, "{prompt} " + name + "\n{response}"))
        made[name] = gkt.save_adapter(model, root / name)
    return made


@pytest.fixture(scope="module")
def alone(folders: dict[str, pathlib.Path]) -> dict[str | None, np.ndarray]:
    """What each answers by itself, and the base."""
    found: dict[str | None, np.ndarray] = {None: ask(fresh())}
    for name, folder in folders.items():
        model = fresh()
        gkt.load_adapter(model, folder)
        found[name] = ask(model)
    assert len({tuple(ids) for ids in found.values()}) == 4
    return found


@pytest.fixture
def model(folders: dict[str, pathlib.Path]) -> Any:
    model = fresh()
    for name, folder in folders.items():
        gkt.load_adapter(model, folder, name=name)
    return model


@pytest.mark.slow
def test_each_answers_as_it_does_alone(model: Any, alone: dict[str | None, np.ndarray]) -> None:
    assert (
        gkt.adapters.list(model) == ("one", "two", "wide") and gkt.adapters.active(model) == "wide"
    )
    for name in ("one", None, "two", "wide", None, "one"):
        np.testing.assert_array_equal(ask(model, adapter=name), alone[name])
    assert gkt.adapters.active(model) == "wide"
    np.testing.assert_array_equal(ask(model), alone["wide"])


@pytest.mark.slow
def test_switching_compiles_nothing(model: Any) -> None:
    ask(model)
    made = compiled_programs(model)
    for name in ("one", "two", None, "wide"):
        ask(model, adapter=name)
    assert compiled_programs(model) == made


@pytest.mark.slow
def test_base_is_untouched_bit_for_bit(model: Any) -> None:
    ids = np.arange(5, 25).reshape(2, 10)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    expected = np.asarray(fresh().backbone(inputs))
    with gkt.adapters.use(model, None):
        np.testing.assert_array_equal(np.asarray(model.backbone(inputs)), expected)
    assert not (np.asarray(model.backbone(inputs)) == expected).all()


def test_scale_is_the_strength(model: Any) -> None:
    kernels = {}
    for scale in (1.0, 0.5, 0.0):
        with gkt.adapters.use(model, "one", scale=scale):
            kernels[scale] = np.asarray(lora_linears(model)[0].layer.kernel)
    middle = (kernels[1.0] + kernels[0.0]) / 2
    np.testing.assert_allclose(kernels[0.5], middle, atol=1e-6)
    assert np.abs(kernels[1.0] - kernels[0.0]).max() > 0.01
    for scale in (float("nan"), "0.5", None, True):
        with pytest.raises(gkt.errors.AdapterError, match="finite"):
            gkt.adapters.set(model, "one", scale=scale)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_base_is_in_memory_once(folders: dict[str, pathlib.Path]) -> None:
    def held() -> int:
        gc.collect()
        # JAX may list a buffer twice: as an array and as that array's part on its one device.
        arrays = jax.live_arrays()
        return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())

    model = fresh()
    gkt.load_adapter(model, folders["one"], name="first")
    config = gkt.lora_config(model)
    assert config is not None
    before = held()
    for number in range(6):
        gkt.load_adapter(model, folders["one"], name=str(number))
    most = 6 * 4 * config.parameters
    assert held() - before <= most + 10_000 < 3 * 4 * config.total_parameters


def test_saved_again_it_is_what_it_was(
    model: Any, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    from safetensors.numpy import load_file

    for name, folder in folders.items():
        again = gkt.save_adapter(model, tmp_path / name, adapter=name)
        for file in ("adapter_config.json", "gemma_keras_tune.json"):
            assert (again / file).read_text() == (folder / file).read_text()
        before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, again))
        assert set(before) == set(after)
        for key, value in before.items():
            np.testing.assert_allclose(after[key], value, rtol=1e-6)


def test_each_brings_its_template(model: Any, folders: dict[str, pathlib.Path]) -> None:
    """One made elsewhere has none, and takes the base's, whatever was on before."""

    def words() -> list[str]:
        template = gkt.template_of(model)
        return str(template.to_config()["text"]).split() if template else []

    (folders["one"] / "gemma_keras_tune.json").rename(folders["one"] / "aside")
    try:
        gkt.load_adapter(model, folders["one"], name="bare")
    finally:
        (folders["one"] / "aside").rename(folders["one"] / "gemma_keras_tune.json")
    assert words() == []
    for name, expected in {"two": ["two"], "bare": [], "wide": ["wide"]}.items():
        gkt.adapters.set(model, name)
        assert words()[1:2] == expected
        with gkt.adapters.use(model, None):
            assert words() == []
    gkt.attach_template(model, gkt.get_template(model, "{prompt} mine\n{response}"))
    gkt.adapters.set(model, "two")
    gkt.adapters.set(model, "wide")
    assert words()[1:2] == ["mine"]


@pytest.mark.slow
def test_removed_is_gone(model: Any, alone: dict[str | None, np.ndarray]) -> None:
    gkt.adapters.remove(model, "wide")
    assert gkt.adapters.list(model) == ("one", "two") and gkt.adapters.active(model) is None
    np.testing.assert_array_equal(ask(model), alone[None])
    gkt.adapters.set(model, "two")
    np.testing.assert_array_equal(ask(model), alone["two"])
    gkt.adapters.remove(model, "one")
    np.testing.assert_array_equal(ask(model), alone["two"])
    gkt.adapters.remove(model, "two")
    assert gkt.adapters.list(model) == () and gkt.lora_config(model) is None
    np.testing.assert_array_equal(ask(model), alone[None])


@pytest.mark.slow
def test_unknown_names_are_refused(model: Any) -> None:
    for call in (gkt.adapters.set, gkt.adapters.remove):
        for name in ("three", ["one"]):
            with pytest.raises(gkt.errors.AdapterError, match="one, two, wide"):
                call(model, name)
    with pytest.raises(gkt.errors.AdapterError, match="'three'"):
        gkt.generate(model, PROMPT, adapter="three")
    with pytest.raises(gkt.errors.AdapterError, match="none"):
        gkt.generate(fresh(), PROMPT, adapter="one")
    assert gkt.adapters.active(model) == "wide"
    assert gkt.generate(fresh(), PROMPT, adapter=None, max_new_tokens=2) is not None


def test_lora_tuned_in_memory_is_not_lost(folders: dict[str, pathlib.Path]) -> None:
    model = fresh()
    gkt.enable_lora(model, 4, verbose=0)
    with pytest.raises(gkt.errors.AdapterError, match="under another `name`"):
        gkt.load_adapter(model, folders["one"])
    gkt.load_adapter(model, folders["one"], name="one")
    assert gkt.adapters.list(model) == ("default", "one")
    config = gkt.lora_config(model)
    assert config is not None and config.rank == 4


@pytest.mark.slow
def test_what_was_trained_on_is_kept(
    model: Any, alone: dict[str | None, np.ndarray], tmp_path: pathlib.Path
) -> None:
    gkt.adapters.set(model, "two")
    gkt.tune(model, tiny_pairs(8), epochs=2, learning_rate=1e-2, template="{prompt}\n{response}",
             verbose=0)  # fmt: skip
    trained = ask(model)
    np.testing.assert_array_equal(ask(model, adapter="one"), alone["one"])
    np.testing.assert_array_equal(ask(model, adapter="two"), trained)
    np.testing.assert_array_equal(ask(model, adapter=None), alone[None])
    gkt.save_adapter(model, tmp_path / "trained", adapter="two")
    settings = json.loads((tmp_path / "trained/adapter_config.json").read_text())
    assert settings["r"] == 2  # the width it shares with the others is not its own
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        assert np.any(b[:, :2]) and not np.any(a[2:]) and not np.any(b[:, 2:])
    again = fresh()
    gkt.load_adapter(again, tmp_path / "trained")
    np.testing.assert_array_equal(ask(again), trained)
    gkt.adapters.set(model, None)
    with pytest.raises(gkt.errors.LoraError, match=r"adapters\.set"):
        gkt.tune(model, tiny_pairs(8), verbose=0)


def nudge(model: Any) -> np.ndarray:
    """Stands for training."""
    factor = lora_linears(model)[0].layer.lora_kernel_b
    factor.assign(factor.value + 1)
    return np.asarray(factor)


def test_trained_within_a_context_it_stays_on(model: Any) -> None:
    gkt.adapters.set(model, "one")
    with gkt.adapters.use(model, "one"):
        trained = nudge(model)
    factor = lora_linears(model)[0].layer.lora_kernel_b
    np.testing.assert_array_equal(np.asarray(factor), trained)
    gkt.adapters.set(model, "two")
    gkt.adapters.set(model, "one")
    np.testing.assert_array_equal(np.asarray(factor), trained)


def test_strength_comes_back_after_a_context(model: Any) -> None:
    gkt.adapters.set(model, "one", scale=0.5)
    before = np.asarray(lora_linears(model)[0].layer.kernel)
    with gkt.adapters.use(model, "two"):
        pass
    np.testing.assert_array_equal(np.asarray(lora_linears(model)[0].layer.kernel), before)


def test_adapters_come_and_go_within_a_context(folders: dict[str, pathlib.Path]) -> None:
    model = fresh()
    gkt.load_adapter(model, folders["one"], name="one")
    with gkt.adapters.use(model, "one"):
        gkt.load_adapter(model, folders["wide"], name="wide")
    assert gkt.adapters.active(model) == "one"
    with gkt.adapters.use(model, "wide"):
        gkt.adapters.remove(model, "one")
    assert gkt.adapters.list(model) == ("wide",) and gkt.adapters.active(model) is None
    with gkt.adapters.use(model, "wide"):
        gkt.adapters.remove(model, "wide")
    assert gkt.adapters.list(model) == () and gkt.lora_config(model) is None


def test_what_is_exported_is_the_one_asked_for(
    model: Any, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    gkt.adapters.set(model, "two", scale=0.5)

    def exported(of: Any, name: str, **options: Any) -> pathlib.Path:
        return gkt.export(of, tmp_path / name, check=False, verbose=0, **options)

    for name, adapter in (("one", "one"), ("base", None)):
        single = fresh()
        if adapter:
            gkt.load_adapter(single, folders[adapter])
        expected = load_file(exported(single, f"{name} alone") / "model.safetensors")
        folder = exported(model, name, adapter=adapter)
        for key, value in load_file(folder / "model.safetensors").items():
            np.testing.assert_allclose(value, expected[key], atol=1e-7, err_msg=key)
        assert read_receipt(folder).template == gkt.get_template(single).name
    receipt = read_receipt(tmp_path / "base")
    assert receipt.adapter is None and receipt.packages["safetensors"]
    preset = gkt.save_preset(model, tmp_path / "preset", adapter="one")
    again = {linear.path: linear for linear in family_of(model).linears(gkt.load(preset))}
    with gkt.adapters.use(model, "one"):
        for linear in lora_linears(model):
            kernel = np.asarray(again[linear.path].layer.kernel)
            np.testing.assert_allclose(kernel, np.asarray(linear.layer.kernel), atol=1e-7)
    assert read_receipt(preset).adapter["name"] == "one"  # type: ignore[index]
    assert gkt.adapters.active(model) == "two" and adapter_strength(model) == 0.5
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        exported(model, "nobody", adapter="nobody")
    assert not (tmp_path / "nobody").exists()


def test_a_gguf_adapter_has_its_own_rank(
    model: Any, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    gkt.adapters.set(model, "two", scale=0.5)
    for name, options in (("wide", {"adapter": "wide"}), ("one", {"adapter": "one"}), ("two", {})):
        path = gkt.export(model, tmp_path / f"{name}.gguf", format="gguf_adapter", verbose=0,
                          check=False, **options)  # fmt: skip
        file, strength = read_header(path), 1.0 if options else 0.5
        own = load_file(folders[name] / "adapter_model.safetensors")
        alpha, rank = (12.0, 3) if name == "wide" else (2.0, 2)
        assert file.metadata["adapter.lora.alpha"] == alpha
        assert len(file.tensors) == len(own)
        for linear in lora_linears(model):
            for part, times in (("a", 1.0), ("b", strength)):
                theirs = own.get(
                    f"base_model.model.{linear.hugging_face}.lora_{part.upper()}.weight"
                )
                if theirs is not None:
                    mine = file.read(f"{linear.gguf}.weight.lora_{part}")
                    np.testing.assert_allclose(mine, times * theirs, rtol=1e-6)
        receipt = read_receipt(path)
        entry = receipt.adapter
        assert entry is not None and receipt.packages["gguf"] and receipt.format_version == "3"
        assert (entry["name"], entry["rank"], entry["alpha"]) == (name, rank, alpha)
        assert (entry["scale"], entry["strength"]) == (alpha / rank, strength)
        assert entry["target_modules"] == (
            ["q_proj", "v_proj"] if name == "wide" else entry["target_modules"]
        )
    with pytest.raises(gkt.errors.ExportError, match="no adapter to write"):
        gkt.export(model, tmp_path / "base.gguf", format="gguf_adapter", adapter=None, verbose=0)


def test_an_adapter_that_cannot_stand_beside_the_other_leaves_it(tmp_path):
    model = tiny_model("gemma3")
    narrow = gkt.enable_lora(model, 8, target_modules=["k_proj"], verbose=0)
    folder = gkt.save_adapter(model, tmp_path / "narrow")
    gkt.remove_lora(model)
    gkt.enable_lora(model, 12, target_modules=["gate_proj"], verbose=0)
    before = [np.array(f) for n in lora_linears(model) for f in get_factors(n)[:2]]
    with pytest.raises(
        gkt.errors.AdapterError, match=f"need rank 12 .*can carry {narrow.rank} at most"
    ):
        gkt.load_adapter(model, folder, name="other")
    assert gkt.lora_config(model).rank == 12
    after = [np.array(f) for n in lora_linears(model) for f in get_factors(n)[:2]]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_adapter_on_layers_that_cannot_carry_it_leaves_the_other(tmp_path):
    for part in ("q_proj", "gate_proj"):
        model = tiny_model("gemma3n")
        gkt.enable_lora(model, 2, target_modules=[part], verbose=0)
        gkt.save_adapter(model, tmp_path / part)
    model = tiny_model("gemma3n")
    gates = [n.layer for n in family_of(model).linears(model) if n.target == "gate_proj"]
    for layer in gates:
        quantize(layer, "int4")
    gkt.load_adapter(model, tmp_path / "q_proj", name="one", check_base=False)
    before = [np.array(f) for n in lora_linears(model) for f in get_factors(n)[:2]]
    with pytest.raises(gkt.errors.AdapterError, match=r"gate_proj.*int4"):
        gkt.load_adapter(model, tmp_path / "gate_proj", name="two", check_base=False)
    assert gkt.adapters.list(model) == ("one",) and gkt.adapters.active(model) == "one"
    after = [np.array(f) for n in lora_linears(model) for f in get_factors(n)[:2]]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_removed_lora_leaves_the_template_of_the_base_and_merged_lora_its_own():
    for finish, expected in ((gkt.remove_lora, "base"), (gkt.merge_lora, "tuned")):
        model = tiny_model("gemma3")
        written = {n: gkt.get_template(n + "{prompt}\n{response}", model)
                   for n in ("base", "tuned")}  # fmt: skip
        gkt.attach_template(model, written["base"])
        gkt.enable_lora(model, 2, verbose=0)
        assert gkt.template_of(model) == written["base"]
        gkt.attach_template(model, written["tuned"])
        gkt.adapters.set(model, None)
        assert gkt.template_of(model) == written["base"]
        finish(model)
        assert gkt.template_of(model) == written[expected]


@pytest.mark.slow
def test_the_base_keeps_the_template_it_was_loaded_with():
    model = tiny_model("gemma3")
    own = gkt.get_template(model, "Q: {prompt}\nA: {response}")
    gkt.attach_template(model, own)
    gkt.tune(model, tiny_pairs(4), epochs=1, rank=2, template="plain", verbose=0)
    assert gkt.template_of(model).name == "plain"
    gkt.adapters.set(model, None)
    assert gkt.template_of(model) == own
