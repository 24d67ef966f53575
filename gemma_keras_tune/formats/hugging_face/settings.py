"""The settings of Hugging Face's `config.json` and those of KerasHub's backbones, both ways.

The names and values of each family are in `gemma.tables`. A field that a config leaves out has
transformers' default. A setting that KerasHub cannot compute is refused by name: its own reader
ignores most of them and builds another model without a word.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma.families import Family
from gemma_keras_tune.gemma.tables import FULL, GELU, SLIDING

_ROPE_FIELDS = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
_PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
# The window of models without one.
_ENDLESS = 131_072
_AGAIN = "Copy or download the folder again."
_OTHER = "Tune the model it was made of, or open it with transformers."


def settings(given: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the fields of transformers' configuration of a text model.

    Args:
        given: The arguments of the KerasHub backbone.
        family: Its family.

    Returns:
        Fields by name. Settings that transformers has no field for are not examined.
    """
    fields: dict[str, Any] = {
        theirs: given[ours] if ours else None for theirs, ours in family.hugging_face.fields.items()
    }
    if family.gates > 1:
        fields["intermediate_size"] //= family.gates
    if "query_pre_attn_scalar" in fields:
        by_head = given["query_head_dim_normalize"]
        share = given["hidden_dim"] / given["num_query_heads"]
        fields["query_pre_attn_scalar"] = given["head_dim"] if by_head else share
    if "sliding_window" in fields and not given.get("use_sliding_window_attention", True):
        fields["sliding_window"] = _ENDLESS
    if "num_global_key_value_heads" in fields:
        fields |= _sizes_of_global_layers(given)
    fields |= _rope_fields(given, family)
    if family.hugging_face.period_field:
        sliding = given["use_sliding_window_attention"]
        period = family.full_attention_period if sliding else 1
        fields |= {
            family.hugging_face.period_field: period,
            "layer_types": layer_types(given["num_layers"], period or 1),
            "use_bidirectional_attention": False,
        }
    factor = family.ropes[FULL].factor
    if factor and given[factor] != 1:
        fields["rope_scaling"] = {"rope_type": "linear", "factor": float(given[factor])}
    return fields


def _sizes_of_global_layers(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_k_eq_v": given["num_global_key_value_heads"] is not None,
        "global_head_dim": given["global_head_dim"] or given["head_dim"],
        "vocab_size_per_layer_input": given["vocab_size_per_layer_input"]
        or given["vocabulary_size"],
        "top_k_experts": given["num_experts_per_token"] if given["enable_moe_block"] else None,
    }


def _rope_fields(given: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The rotary embedding; in the names of before transformers 5, if those suffice."""
    thetas = {
        kind: (given[rope.setting] if rope.setting else None) or rope.theta
        for kind, rope in family.ropes.items()
    }
    if not any(rope.share for rope in family.ropes.values()):
        return {_ROPE_FIELDS[kind]: theta for kind, theta in thetas.items()}
    parameters: dict[str, dict[str, Any]] = {}
    for kind, rope in family.ropes.items():
        turned = {"partial_rotary_factor": given[rope.share]} if rope.share else {}
        rope_type = "proportional" if rope.share else "default"
        parameters[kind] = {"rope_type": rope_type, "rope_theta": thetas[kind], **turned}
    return {"rope_parameters": parameters}


def backbone_arguments(
    folder: pathlib.Path, family: Family, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments that a KerasHub backbone is built from.

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
    fields = {theirs: ours for theirs, ours in family.hugging_face.fields.items() if ours}
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
    arguments = {ours: filled[theirs] for theirs, ours in fields.items()} | dict(family.built_with)
    for kind, rope in family.ropes.items():
        if rope.setting:
            arguments[rope.setting] = ropes[kind]["rope_theta"]
        if rope.factor:
            linear = ropes[kind]["rope_type"] == "linear"
            arguments[rope.factor] = float(ropes[kind].get("factor", 1.0)) if linear else 1.0
        if rope.share:
            arguments[rope.share] = ropes[kind].get("partial_rotary_factor", 1.0)
    _adapt_sizes(family, filled, arguments)
    return arguments


def _adapt_sizes(family: Family, config: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    """Change arguments that KerasHub wants in another way than a config has them."""
    widths = config["intermediate_size"]
    if family.gates > 1:
        arguments["intermediate_dim"] = family.gates * widths
    if family.widths_by_layer and not isinstance(widths, list):
        arguments["intermediate_size"] = [widths] * config["num_hidden_layers"]
    if "pad_token_id" in arguments:
        arguments["pad_token_id"] = config.get("pad_token_id") or 0
    if family.full_attention_period:
        scalar = config["query_pre_attn_scalar"]
        arguments["query_head_dim_normalize"] = scalar == config["head_dim"]
        arguments["use_sliding_window_attention"] = SLIDING in config["layer_types"]
    if "num_global_key_value_heads" in arguments and not config.get("attention_k_eq_v"):
        arguments["num_global_key_value_heads"] = None
    if "enable_moe_block" in arguments and not arguments["enable_moe_block"]:
        del arguments["num_experts_per_token"]


def _filled(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    table = family.hugging_face
    filled = {**table.defaults, **config}
    period = family.full_attention_period
    if period and not filled.get("layer_types") and "num_hidden_layers" in filled:
        period = filled.get(table.period_field or "") or period
        filled["layer_types"] = layer_types(filled["num_hidden_layers"], period)
    if "global_head_dim" in table.fields:
        # Saved by transformers 5, the layers with full attention have their own sizes.
        for layer in (config.get("per_layer_config") or {}).values():
            filled["global_head_dim"] = layer.get("head_dim", filled.get("global_head_dim"))
            filled["num_global_key_value_heads"] = layer.get("num_key_value_heads")
        filled.setdefault("global_head_dim", filled.get("head_dim"))
    return filled


def layer_types(layers: int, period: int) -> list[str]:
    """Return the attention type of each layer: full for every `period`-th, else a sliding window.

    Args:
        layers: Number of layers.
        period: Distance between layers with full attention; with 1 all have it.

    Returns:
        transformers' name for each layer.
    """
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def _ropes(family: Family, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary embedding of each kind of attention, however the config spells it."""
    given = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if FULL in scaling or SLIDING in scaling:
        given, scaling = scaling, {}
    full = family.ropes[FULL]
    theta = config.get("rope_theta") or full.theta
    if len(family.ropes) == 1:
        return {FULL: _rope(theta, scaling, given)}
    local_theta = config.get("rope_local_base_freq") or family.ropes[SLIDING].theta
    stretch = _PROPORTIONAL if full.share and not given else {}
    return {
        FULL: _rope(theta, stretch, given.get(FULL) or {}, scaling),
        SLIDING: _rope(local_theta, given.get(SLIDING) or {}),
    }


def _rope(theta: float, *given: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": theta}
    for part in given:
        rope |= part
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def _not_computed(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    """Name settings that KerasHub has no argument for."""
    if config.get("attention_bias"):
        yield "attention_bias is true, and KerasHub's attention has none"
    for name, known in family.hugging_face.activations.items():
        if config.get(name) not in (None, *known):
            yield f"{name} is {config[name]!r}, and KerasHub computes {GELU!r}"
    epsilon = family.fixed.get("layer_norm_epsilon", config["rms_norm_eps"])
    if config["rms_norm_eps"] != epsilon:
        yield f"rms_norm_eps is {config['rms_norm_eps']!r}, and KerasHub's blocks have {epsilon!r}"
    if family.full_attention_period:
        yield from _attention_not_computed(family.full_attention_period, config)


def _attention_not_computed(period: int, config: Mapping[str, Any]) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    if config["layer_types"] not in (layer_types(layers, period), [FULL] * layers):
        yield (
            f"layer_types is {config['layer_types']}, and of KerasHub's layers the "
            f"{period}th, {2 * period}th and so on see everything"
        )
    elif SLIDING in config["layer_types"] and not config["sliding_window"]:
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
        ours = family.ropes[kind]
        if not ours.setting and rope["rope_theta"] != ours.theta:
            theta = rope["rope_theta"]
            yield f"rope_theta of {kind} is {theta:g}, and KerasHub's is {ours.theta:g}"
        known = ["default"]
        if ours.factor:
            known.append("linear")
        if ours.share:
            known.append("proportional")
        if rope["rope_type"] not in known:
            yield f"rope_type of {kind} is {rope['rope_type']!r}, and KerasHub computes {known}"
        elif rope["rope_type"] == "proportional" and rope.get("factor", 1.0) != 1.0:
            yield f"factor of {kind} is {rope['factor']!r}, and KerasHub's is 1"
