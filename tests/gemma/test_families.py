"""The table of weights: complete, named as `transformers` and llama.cpp name them, invertible."""

import collections
import importlib.util
from typing import Any

import numpy as np
import pytest
import twins

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma.families import (
    FAMILIES,
    Family,
    Weight,
    backbone_settings,
    context_length,
    family_of,
    join,
    split,
)
from gemma_keras_tune.testing import tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {},
    "gemma3": {},
    "gemma3n": {"altup_num_inputs": 3},
    "gemma4": {},
    "gemma4 moe": {"moe": True},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param.partition(" ")[0], **MODELS[request.param])


@pytest.fixture(scope="module")
def weights(model: Any) -> tuple[Weight, ...]:
    return family_of(model).weights(model)


@pytest.mark.slow
def test_every_weight_of_the_text_tower_has_one_row(model: Any, weights: Any) -> None:
    listed = collections.Counter(weight.variable.path for weight in weights)
    expected = {
        variable.path for variable in model.backbone.weights if "vision" not in variable.path
    }
    assert set(listed) == expected
    assert set(listed.values()) == {1}
    assert len({weight.path for weight in weights}) == len(weights)


def test_maps_are_inverse(weights: tuple[Weight, ...]) -> None:
    for weight in weights:
        value = np.asarray(weight.variable)
        back = weight.from_matrix(np.ascontiguousarray(weight.to_matrix(value)))
        np.testing.assert_array_equal(back, value, err_msg=weight.path)
        np.testing.assert_array_equal(weight.from_jax(weight.to_jax(value)), value)


def test_weights_with_one_name_are_its_pieces(weights: tuple[Weight, ...]) -> None:
    pieces = {"hugging_face": "part", "gguf": "gguf_part", "jax": "jax_part"}
    for name, piece in pieces.items():
        groups: dict[str, dict[Any, np.ndarray]] = collections.defaultdict(dict)
        for weight in weights:
            if getattr(weight, name) is None:
                continue
            value = np.asarray(weight.variable)
            found = getattr(weight.spec, piece)
            change = weight.to_jax if name == "jax" else weight.to_matrix
            parts = groups[getattr(weight, name)]
            assert found not in parts, (name, weight.path)
            parts[found] = change(value)
        for tensor, parts in groups.items():
            if None in parts:
                assert len(parts) == 1, tensor
                continue
            assert sorted(part.index for part in parts) == list(range(len(parts)))
            joined = join(parts)
            for part, value in parts.items():
                np.testing.assert_array_equal(split(joined, part, len(parts)), value)


def test_gguf_names_are_those_of_llama_cpp(model: Any, weights: tuple[Weight, ...]) -> None:
    constants = pytest.importorskip("gguf").constants
    arch = constants.MODEL_ARCH[family_of(model).name.upper()]
    known = {constants.TENSOR_NAMES[tensor] for tensor in constants.MODEL_TENSORS[arch]}
    used = {weight.gguf for weight in weights}
    # llama.cpp gives these two a tensor beside `.weight`.
    scales = ("ffn_gate_inp.scale", "ffn_down_exps.scale")
    for name in used:
        index = name.split(".")[1] if name.startswith("blk.") else ""
        plain = name.replace(f"blk.{index}.", "blk.{bid}.") if index else name
        if plain.endswith(scales):
            plain = plain.removesuffix(".scale") + ".weight"
        assert plain.removesuffix(".weight") in known, name


def test_the_gemma_library_for_jax_has_all_but_gemma_1(
    model: Any, weights: tuple[Weight, ...]
) -> None:
    family = family_of(model)
    assert bool(family.jax) == (family.name != "gemma")
    for weight in weights:
        assert bool(weight.jax) == bool(family.jax), weight.path


@pytest.mark.slow
def test_names_and_shapes_are_those_of_transformers(
    model: Any, weights: tuple[Weight, ...]
) -> None:
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    expected = transformers_shapes(model, family_of(model))
    groups: dict[str, dict[Any, np.ndarray]] = collections.defaultdict(dict)
    for weight in weights:
        if weight.used:
            name = weight.hugging_face.replace("model.language_model.", "model.")
            groups[name][weight.spec.part] = weight.to_matrix(np.asarray(weight.variable))
    shapes = {
        name: (parts[None] if None in parts else join(parts)).shape
        for name, parts in groups.items()
    }
    assert shapes == expected


def test_gemma3n_marks_the_keys_it_never_reads() -> None:
    model = tiny_model("gemma3n")
    unused = {w.path for w in family_of(model).weights(model) if not w.used}
    assert unused == {
        f"decoder_block_{block}/attention/{layer}"
        for block in (2, 3)
        for layer in ("k_proj", "v_proj", "k_norm")
    }


@pytest.mark.parametrize(
    ("name", "blocks"), [("gemma2", ()), ("gemma3", ()), ("gemma3n", (2, 3)), ("gemma4", (2, 3))]
)
def test_keys_that_are_stored_and_never_read(name: str, blocks: tuple[int, ...]) -> None:
    model = tiny_model(name)
    assert family_of(model).idle_names(model) == {
        name
        for block in blocks
        for theirs, gguf in (("k_proj", "attn_k"), ("v_proj", "attn_v"), ("k_norm", "attn_k_norm"))
        for name in (
            f"model.layers.{block}.self_attn.{theirs}.weight",
            f"blk.{block}.{gguf}.weight",
        )
    }


@pytest.mark.parametrize(
    ("name", "sizes", "tokens"),
    [
        ("gemma", {}, 8192),
        ("gemma2", {}, 8192),
        ("gemma3", {}, 32_768),
        ("gemma3", {"global_rope_scaling_factor": 8.0}, 131_072),
        ("gemma3n", {"max_position_embeddings": 256}, 256),
        ("gemma4", {}, 131_072),
        ("gemma4", {"moe": True}, 262_144),
    ],
)
def test_context_length(name: str, sizes: dict[str, Any], tokens: int) -> None:
    assert context_length(tiny_model(name, **sizes)) == tokens


def test_settings_that_a_runtime_has_fixed_are_named() -> None:
    model = tiny_model("gemma3", use_post_ffw_norm=False)
    family, given = family_of(model), backbone_settings(model)
    assert family.unlike(given, "it", {"head_dim": 256, "of another": 1}) == [
        "use_post_ffw_norm is False; it computes with True",
        "head_dim is 8; it computes with 256",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classes_are_those_of_one_model(name: str) -> None:
    family, model = FAMILIES[name], tiny_model(name)
    assert family_of(model) is family
    assert type(model) is family.causal_lm_class
    assert type(model.backbone) is family.backbone_class
    assert type(model.preprocessor) is family.preprocessor_class
    assert type(model.preprocessor.tokenizer) is family.tokenizer_class


def transformers_shapes(model: Any, family: Family) -> dict[str, tuple[int, ...]]:
    backbone = model.backbone
    common: dict[str, Any] = dict(
        vocab_size=model.preprocessor.tokenizer.vocabulary_size(),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=len(getattr(backbone, "language_model", backbone).transformer_layers),
        num_attention_heads=4,
        num_key_value_heads=1 if family.name == "gemma3" else 2,
        head_dim=8,
    )
    kinds = ["sliding_attention", "full_attention"] * 2
    per_layer = dict(
        vocab_size_per_layer_input=common["vocab_size"],
        hidden_size_per_layer_input=4,
        num_kv_shared_layers=2,
        layer_types=kinds,
    )
    if family.name == "gemma3n":
        common |= per_layer | dict(
            intermediate_size=[24] * 4,
            altup_num_inputs=3,
            laurel_rank=4,
            activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        )
    if family.name == "gemma4":
        common |= per_layer | dict(global_head_dim=16)
        if backbone.enable_moe_block:
            common |= dict(
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
                enable_moe_block=True,
                num_experts=4,
                top_k_experts=2,
                moe_intermediate_size=8,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
            )
    stem = family.name.capitalize()
    text = "" if family.name in ("gemma", "gemma2") else "Text"
    request = [f"{stem}ForCausalLM", f"{stem}{text}Config", common]
    shapes = twins.ask("transformers_shapes.py", request)
    del shapes["lm_head.weight"]  # tied with the embedding
    return {name: tuple(shape) for name, shape in shapes.items()}


def test_the_cap_of_gemma4_is_that_of_the_backbone_or_of_the_task() -> None:
    import keras_hub

    def capped(backbone_cap: float | None, task_cap: float | None) -> Any:
        tiny = tiny_model("gemma4", num_layers=1, num_kv_shared_layers=0,
                          final_logit_soft_cap=backbone_cap)  # fmt: skip
        model = keras_hub.models.Gemma4CausalLM(
            backbone=tiny.backbone, preprocessor=tiny.preprocessor, final_logit_cap=task_cap
        )
        return family_of(model).head(model).soft_cap

    assert [capped(30.0, None), capped(None, 5.0), capped(None, None)] == [30.0, 5.0, None]
    with pytest.raises(LoadError, match=r"at 30\.0 by the backbone and at 5\.0 by the task"):
        capped(30.0, 5.0)
