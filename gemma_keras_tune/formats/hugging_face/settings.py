"""The settings of Hugging Face's `config.json` and those of KerasHub's backbones, both ways.

What a config leaves out is what transformers takes for it. What KerasHub cannot compute is refused
by name: its own reader passes over most of it and builds another model without a word.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma.families import Family

# transformers' name of a setting, and KerasHub's.
FIELDS: Mapping[str, Mapping[str, str]] = {
    "gemma3n": {
        "vocab_size": "text_vocab_size",
        "hidden_size": "text_hidden_size",
        "final_logit_softcapping": "final_logit_soft_cap",
        **{
            name: name
            for name in (
                "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                "intermediate_size", "layer_types", "sliding_window", "rms_norm_eps",
                "max_position_embeddings", "vocab_size_per_layer_input",
                "hidden_size_per_layer_input", "altup_num_inputs", "altup_active_idx",
                "altup_coef_clip", "altup_correct_scale", "laurel_rank", "num_kv_shared_layers",
                "activation_sparsity_pattern", "attention_bias", "attention_dropout",
            )
        },
    },
    "gemma4": {
        "vocab_size": "vocabulary_size",
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_query_heads",
        "num_key_value_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "global_head_dim": "global_head_dim",
        "num_global_key_value_heads": "num_global_key_value_heads",
        "intermediate_size": "intermediate_dim",
        "layer_types": "layer_types",
        "sliding_window": "sliding_window_size",
        "rms_norm_eps": "layer_norm_epsilon",
        "final_logit_softcapping": "final_logit_soft_cap",
        "vocab_size_per_layer_input": "vocab_size_per_layer_input",
        "hidden_size_per_layer_input": "hidden_size_per_layer_input",
        "num_kv_shared_layers": "num_kv_shared_layers",
        "use_double_wide_mlp": "use_double_wide_mlp",
        "enable_moe_block": "enable_moe_block",
        "num_experts": "num_experts",
        "moe_intermediate_size": "expert_intermediate_dim",
        "top_k_experts": "num_experts_per_token",
    },
}  # fmt: skip
_OLDER_FIELDS = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
}
_CAPPED_FIELDS = _OLDER_FIELDS | {
    "attn_logit_softcapping": "attention_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
    "sliding_window": "sliding_window_size",
}
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "gemma": _OLDER_FIELDS,
    "gemma2": _CAPPED_FIELDS,
    "gemma3": _CAPPED_FIELDS,
    **FIELDS,
}
# What transformers takes where a config says nothing; published ones leave some of it out.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {"rms_norm_eps": 1e-6},
    "gemma2": {
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    "gemma3": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": 4096,
    },
    "gemma3n": {},
    "gemma4": {
        "num_global_key_value_heads": None,
        "num_experts": None,
        "moe_intermediate_size": None,
        "top_k_experts": None,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    },
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPE_KINDS = {_FULL: "rope_theta", _SLIDING: "rope_local_base_freq"}
_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0
_PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
# Each so-manieth layer sees everything.
_PERIODS = {"gemma2": 2, "gemma3": 6}
# KerasHub's Gemma 1 to 3 take `layer_norm_epsilon` for the last norm alone.
EPSILON = 1e-6
_TANH = "gelu_pytorch_tanh"
_AGAIN = "Copy or download the folder again."
_OTHER = "Tune the model it was made of, or open it with transformers."


def settings(given: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of transformers' configuration of a Gemma 3n or 4.

    Args:
        given: What the KerasHub backbone is built from.
        family: Its family.

    Returns:
        Fields by name. What transformers has no field for is not looked at.
    """
    fields = {theirs: given[ours] for theirs, ours in FIELDS[family.name].items()}
    if family.name == "gemma3n":
        # The names of before transformers 5, which later ones still read.
        return fields | {name: given[name] for name in _ROPE_KINDS.values()}
    shared = given["num_global_key_value_heads"] is not None
    return fields | {
        "attention_k_eq_v": shared,
        "global_head_dim": given["global_head_dim"] or given["head_dim"],
        "vocab_size_per_layer_input": given["vocab_size_per_layer_input"]
        or given["vocabulary_size"],
        "top_k_experts": given["num_experts_per_token"] if given["enable_moe_block"] else None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": given["global_rope_wavelength"] or 1_000_000.0,
                "partial_rotary_factor": given["global_rope_partial_rotary_factor"],
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": given["local_rope_wavelength"] or 10_000.0,
            },
        },
    }


def backbone_arguments(
    folder: pathlib.Path, family: Family, config: Mapping[str, Any]
) -> dict[str, Any]:
    """What a KerasHub backbone is built from.

    Args:
        folder: The folder, for the message.
        family: The family.
        config: The settings of the text model: `config.json`, or `text_config` in it.

    Returns:
        Arguments of `family.backbone_class`.

    Raises:
        LoadError: Settings are missing, or mean what KerasHub cannot compute. All are named.
    """
    filled = _filled(family, config)
    fields = _FIELDS[family.name]
    missing = [f"{name} is missing" for name in fields if name not in filled]
    if missing:
        raise LoadError(
            f"config.json in {folder} lacks settings of a {family.title}.", missing, _AGAIN
        )
    ropes = _ropes(family, config)
    problems = [*_not_computed(family, filled), *_ropes_not_computed(family, ropes)]
    if problems:
        raise LoadError(
            f"KerasHub cannot compute the {family.title} that config.json in {folder} describes.",
            problems,
            _OTHER,
        )
    arguments = {ours: filled[theirs] for theirs, ours in fields.items()}
    if family.name == "gemma3n":
        return arguments | _gemma3n(filled, ropes)
    if family.name == "gemma4":
        return _gemma4(arguments, filled, ropes)
    return arguments | _older(family, filled, ropes)


def _filled(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**_DEFAULTS[family.name], **config}
    period = _PERIODS.get(family.name)
    if period and not filled.get("layer_types") and "num_hidden_layers" in filled:
        if family.name == "gemma3":
            period = filled.get("sliding_window_pattern") or period
        filled["layer_types"] = layer_types(filled["num_hidden_layers"], period)
    if family.name == "gemma4":
        # Saved by transformers 5, the layers that see everything have sizes of their own.
        for layer in (config.get("per_layer_config") or {}).values():
            filled["global_head_dim"] = layer.get("head_dim", filled.get("global_head_dim"))
            filled["num_global_key_value_heads"] = layer.get("num_key_value_heads")
        filled.setdefault("global_head_dim", filled.get("head_dim"))
    return filled


def layer_types(layers: int, period: int) -> list[str]:
    """What each layer attends to, where every so-manieth sees everything.

    Args:
        layers: Number of layers.
        period: Of so many layers the last sees everything; with 1 all do.

    Returns:
        transformers' name for each layer.
    """
    return [_SLIDING if (layer + 1) % period else _FULL for layer in range(layers)]


def _ropes(family: Family, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary embedding of each kind of attention, however the config spells it."""
    given = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if _FULL in scaling or _SLIDING in scaling:
        given, scaling = scaling, {}
    if family.name in ("gemma", "gemma2"):
        theta = config.get("rope_theta") or _LOCAL_THETA
        return {_FULL: _rope(theta, scaling, given)}
    local = _rope(config.get("rope_local_base_freq") or _LOCAL_THETA, given.get(_SLIDING) or {})
    stretch = _PROPORTIONAL if family.name == "gemma4" and not given else {}
    theta = config.get("rope_theta") or _THETA
    return {_FULL: _rope(theta, stretch, given.get(_FULL) or {}, scaling), _SLIDING: local}


def _rope(theta: float, *given: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": theta}
    for part in given:
        rope |= part
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def _not_computed(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """What is set to something that KerasHub has no argument for."""
    if config.get("quantization_config"):
        yield "quantization_config: quantized weights cannot be read"
    if config.get("attention_bias"):
        yield "attention_bias is true, and KerasHub's attention has none"
    # Gemma 1 was published with "gelu", which transformers, too, takes for the approximation.
    old = family.name == "gemma"
    for name in ("hidden_act", "hidden_activation") if old else ("hidden_activation",):
        if config.get(name) not in (None, _TANH, *(["gelu"] if old else [])):
            yield f"{name} is {config[name]!r}, and KerasHub computes {_TANH!r}"
    if family.name not in FIELDS and config["rms_norm_eps"] != EPSILON:
        yield f"rms_norm_eps is {config['rms_norm_eps']!r}, and KerasHub's blocks have {EPSILON!r}"
    if family.name in _PERIODS:
        yield from _attention_not_computed(family, config)


def _attention_not_computed(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    layers, period = config["num_hidden_layers"], _PERIODS[family.name]
    if config["layer_types"] not in (layer_types(layers, period), [_FULL] * layers):
        yield (
            f"layer_types is {config['layer_types']}, and of KerasHub's layers the "
            f"{period}th, {2 * period}th and so on see everything"
        )
    elif _SLIDING in config["layer_types"] and not config["sliding_window"]:
        yield f"sliding_window is {config['sliding_window']!r}, and there are layers that slide"
    scalar, head, share = config["query_pre_attn_scalar"], config["head_dim"], _share(config)
    if scalar not in (head, share):
        yield (
            f"query_pre_attn_scalar is {scalar!r}, and KerasHub scales by head_dim, {head}, or by "
            f"hidden_size / num_attention_heads, {share}"
        )


def _share(config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"] // config["num_attention_heads"])


def _ropes_not_computed(family: Family, ropes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for kind, rope in ropes.items():
        theta = _LOCAL_THETA if kind == _SLIDING or len(ropes) == 1 else _THETA
        if family.name not in FIELDS and rope["rope_theta"] != theta:
            yield f"rope_theta of {kind} is {rope['rope_theta']:g}, and KerasHub's is {theta:g}"
        known = ["default"]
        if family.name == "gemma3":
            known.append("linear")
        if family.name == "gemma4" and kind == _FULL:
            known.append("proportional")
        if rope["rope_type"] not in known:
            yield f"rope_type of {kind} is {rope['rope_type']!r}, and KerasHub computes {known}"
        elif rope["rope_type"] == "proportional" and rope.get("factor", 1.0) != 1.0:
            yield f"factor of {kind} is {rope['factor']!r}, and KerasHub's is 1"


def _older(
    family: Family, config: Mapping[str, Any], ropes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    # KerasHub gives Gemma 1 and 2 the width of both gates together.
    doubled = {"intermediate_dim": 2 * config["intermediate_size"]}
    if family.name == "gemma":
        return doubled
    arguments = {
        "query_head_dim_normalize": config["query_pre_attn_scalar"] == config["head_dim"],
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_sliding_window_attention": _SLIDING in config["layer_types"],
    }
    if family.name == "gemma2":
        return doubled | arguments
    return arguments | {
        "image_size": None,
        "use_query_key_norm": True,
        "local_rope_scaling_factor": _factor(ropes[_SLIDING]),
        "global_rope_scaling_factor": _factor(ropes[_FULL]),
    }


def _factor(rope: Mapping[str, Any]) -> float:
    return float(rope.get("factor", 1.0)) if rope["rope_type"] == "linear" else 1.0


def _gemma3n(config: Mapping[str, Any], ropes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    widths, layers = config["intermediate_size"], config["num_hidden_layers"]
    return {
        **{name: ropes[kind]["rope_theta"] for kind, name in _ROPE_KINDS.items()},
        "intermediate_size": widths if isinstance(widths, list) else [widths] * layers,
        "hidden_activation": "gelu_approximate",
        "pad_token_id": config.get("pad_token_id") or 0,
    }


def _gemma4(
    arguments: dict[str, Any],
    config: Mapping[str, Any],
    ropes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    if not config.get("attention_k_eq_v"):
        arguments["num_global_key_value_heads"] = None
    if not arguments["enable_moe_block"]:
        del arguments["num_experts_per_token"]
    return arguments | {
        "image_size": None,
        "global_rope_wavelength": ropes[_FULL]["rope_theta"],
        "local_rope_wavelength": ropes[_SLIDING]["rope_theta"],
        "global_rope_partial_rotary_factor": ropes[_FULL].get("partial_rotary_factor", 1.0),
    }


def check_reading(
    folder: pathlib.Path, family: Family, config: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Compare what KerasHub's own reader made of a config with what the config means.

    Args:
        folder: The folder, for the message.
        family: The family.
        config: The settings of the text model.
        given: What the backbone was built from.

    Raises:
        LoadError: KerasHub computes another model. Every difference is named.
    """
    theirs = {ours: name for name, ours in _FIELDS[family.name].items()}
    meant = backbone_arguments(folder, family, config)
    problems = [
        f"{theirs.get(name, name)} is {value!r}, and KerasHub computes with {given[name]!r}"
        for name, value in meant.items()
        if name in given and name != "image_size" and given[name] != value
    ]
    if problems:
        raise LoadError(
            f"KerasHub cannot compute the {family.title} that config.json in {folder} describes.",
            problems,
            _OTHER,
        )


def completed(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """A text model's settings with those that KerasHub's reader wants to find written out.

    Args:
        family: The family.
        config: The settings, as published or as transformers 5 saves them.

    Returns:
        The settings, more of them.
    """
    ropes = _ropes(family, config)
    written = {name: ropes[kind]["rope_theta"] for kind, name in _ROPE_KINDS.items()}
    return _filled(family, config) | written
