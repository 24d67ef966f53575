"""The metadata of GGUF files and the settings of KerasHub's backbones, both ways.

The keys of each family are in `gemma.tables`; most are settings that `transformers` has, too, under
another name. A setting that GGUF has no key for is refused, not exported as another model.
"""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import gguf
import keras
import numpy as np
import scipy.special

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.gemma.families import Family, backbone_settings, context_length
from gemma_keras_tune.gemma.tables import FULL, GGUF_KEYS, SLIDING

BROKEN = "Download or convert it again: the file is damaged or was cut off."
# Far beyond any Gemma; a header that says more is damaged, and nothing is built after it.
MAX_SIZE = 1 << 24
ROPE_FACTORS = "rope_freqs.weight"
# A factor beyond it slows a rotary frequency to a standstill; converters write 1e30.
_STANDSTILL, _STOPPED = 1e20, 1e30
_ROPE_KEYS = {FULL: "rope.freq_base", SLIDING: "rope.freq_base_swa"}
# Ollama's converters spell these keys otherwise.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "rope.freq_base": ("rope.global.freq_base",),
    "rope.freq_base_swa": ("rope.local.freq_base", "rope.freq_base_local"),
    "attention.key_length": ("head_dim",),
}


class Header(Protocol):
    """The header of a GGUF file."""

    @property
    def path(self) -> pathlib.Path:
        """The file."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Its keys and values."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Its tensors by name, each with `shape` and `kind`."""

    def read(self, name: str) -> np.ndarray:
        """Return the values of a tensor."""


# Writing.


def sizes(model: keras.Model, family: Family) -> dict[str, Any]:
    """Return the metadata that describe a model, without the prefix of the architecture.

    Args:
        model: A KerasHub `CausalLM`.
        family: Its family.

    Returns:
        Values by key: int, float, bool, or a list of them.
    """
    given = backbone_settings(model)
    special = _special_values(model, family, given)
    found: dict[str, Any] = {}
    for key, default in family.gguf.keys.items():
        if key in special:
            found[key] = special[key]
            continue
        value = given[_setting(family, key)]
        if isinstance(value, float) or isinstance(default, float):
            value = None if value is None and default == 0 else float(value or 0)
        found[key] = value
    factor = family.ropes[FULL].factor
    if factor and (given[factor] != 1 or given["num_layers"] in family.gguf.stretched):
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(given[factor])}
    return {key: value for key, value in found.items() if value is not None}


def _setting(family: Family, key: str) -> str:
    return str(family.hugging_face.fields[GGUF_KEYS[key]])


def _special_values(model: keras.Model, family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are no setting as it is."""
    wide = given.get("global_head_dim") or given["head_dim"]
    found: dict[str, Any] = {
        "context_length": context_length(model),
        "feed_forward_length": _widths(family, given),
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": given["head_dim"],
        "attention.value_length_swa": given["head_dim"],
        "rope.dimension_count": wide,
        "rope.dimension_count_swa": given["head_dim"],
    }
    for kind, rope in family.ropes.items():
        theta = given[rope.setting] if rope.setting else None
        found[_ROPE_KEYS[kind]] = float(theta or rope.theta)
    if "layer_types" in given and "layer_types" in family.hugging_face.fields:
        local = [kind == SLIDING for kind in given["layer_types"]]
        few = given.get("num_global_key_value_heads")
        heads = given["num_key_value_heads"]
        found["attention.sliding_window_pattern"] = local
        found["attention.head_count_kv"] = (
            [heads if is_local else few for is_local in local] if few else heads
        )
    if "activation_sparsity_pattern" in given:
        normal = statistics.NormalDist()
        found["activation_sparsity_scale"] = [
            normal.inv_cdf(part) if part else -math.inf
            for part in given["activation_sparsity_pattern"]
        ]
    if not given.get("enable_moe_block"):
        found |= dict.fromkeys(_EXPERT_KEYS)
    return found


_EXPERT_KEYS = ("expert_count", "expert_used_count", "expert_feed_forward_length")


def _widths(family: Family, given: Mapping[str, Any]) -> Any:
    width = given[_setting(family, "feed_forward_length")]
    if family.widths_by_layer:
        return list(width)
    shared = given.get("num_kv_shared_layers")
    if not (shared and given.get("use_double_wide_mlp")):
        return width // family.gates
    alone = given["num_layers"] - shared
    return [width * (1 + (layer >= alone)) for layer in range(given["num_layers"])]


def rope_factors(model: keras.Model, family: Family) -> dict[str, np.ndarray]:
    """Return the tensor of rotary factors, if only a share of each global head is rotated.

    Args:
        model: A KerasHub `CausalLM`.
        family: Its family.

    Returns:
        The tensor by its name: factors that slow the other frequencies to a standstill.
    """
    share = family.ropes[FULL].share
    if share is None:
        return {}
    given = backbone_settings(model)
    half = (given["global_head_dim"] or given["head_dim"]) // 2
    turned = int(half * given[share])
    return {ROPE_FACTORS: np.array([1.0] * turned + [_STOPPED] * (half - turned), np.float32)}


# Reading.


def backbone_config(file: Header, family: Family) -> dict[str, Any]:
    """Return the arguments of the KerasHub backbone that the metadata describe.

    Args:
        file: The header. Of its tensors, shapes are examined, and the rotary factors read.
        family: Its family.

    Returns:
        Arguments of `family.backbone_class`.

    Raises:
        LoadError: Something is missing or out of range; all of it is listed.
    """
    values = _Metadata(file, family.name)
    layers = _layers(values)
    config: dict[str, Any] = dict(family.built_with) | dict(family.gguf.unsaid)
    config[_setting(family, "block_count")] = layers
    _read_plain(values, family, config)
    _read_rows(values, family, config)
    _read_ropes(values, family, config)
    if family.full_attention_period:
        config["use_sliding_window_attention"] = True
        # 27B alone scales its queries by the width of the model; no key says so.
        config["query_head_dim_normalize"] = layers != family.gguf.layers_scaled_by_width
    if "attention.sliding_window_pattern" in family.gguf.keys:
        local = _local(values, family, layers)
        config["layer_types"] = [SLIDING if is_local else FULL for is_local in local]
        _read_global_layers(values, family, config, local)
    _read_widths(values, family, config, layers)
    if "activation_sparsity_scale" in family.gguf.keys:
        config["activation_sparsity_pattern"] = _sparse_parts(values, layers)
    if "expert_count" in family.gguf.keys:
        config["enable_moe_block"] = values.count("expert_count", 0) > 0
        for key in _EXPERT_KEYS if config["enable_moe_block"] else ():
            config[_setting(family, key)] = values.count(key)
    if values.problems:
        raise LoadError(
            f"{file.path}: the metadata describe no {family.title} that KerasHub can build.",
            values.problems,
            next_step=BROKEN,
        )
    return config


def _read_plain(values: "_Metadata", family: Family, config: dict[str, Any]) -> None:
    """Read the keys that are a setting as it is, and the heads."""
    for key, default in family.gguf.keys.items():
        known = GGUF_KEYS.get(key) in family.hugging_face.fields
        if not known or key in (*_EXPERT_KEYS, "block_count", "feed_forward_length"):
            continue
        setting = _setting(family, key)
        if key == "attention.head_count_kv":
            heads = config[_setting(family, "attention.head_count")]
            layers = config[_setting(family, "block_count")]
            config[setting] = values.each(key, layers, heads)[0]
        elif isinstance(default, float):
            value = float(values.number(key, default))
            config[setting] = value if default else value or None
        else:
            config[setting] = values.count(key, default)
    if "layer_norm_epsilon" in family.fixed:
        values.expect("attention.layer_norm_rms_epsilon", family.fixed["layer_norm_epsilon"])


def _read_rows(values: "_Metadata", family: Family, config: dict[str, Any]) -> None:
    """Read the sizes that tensors alone tell: their rows."""
    for setting, name in family.gguf.rows.items():
        info = values.file.tensors.get(family.gguf_name(name))
        config[setting] = info.shape[0] if info else 1
    embedding = family.gguf_name("embed_tokens")
    info = values.file.tensors.get(embedding)
    if info is None or len(info.shape) != 2:
        values.problems.append(f"the tensor {embedding} is missing or no matrix")
    else:
        config[str(family.hugging_face.fields["vocab_size"])] = info.shape[0]


def _read_ropes(values: "_Metadata", family: Family, config: dict[str, Any]) -> None:
    for kind, rope in family.ropes.items():
        if rope.setting and rope.setting not in family.gguf.fixed(config):
            config[rope.setting] = float(values.number(_ROPE_KEYS[kind], rope.theta))
        else:
            values.expect(_ROPE_KEYS[kind], rope.theta)
            config |= {rope.setting: rope.theta} if rope.setting else {}
        if rope.share:
            config[rope.share] = _turned_part(values.file)
    factor = family.ropes[FULL].factor
    if factor:
        name = f"{values.prefix}.rope.scaling.type"
        scaling = values.metadata.get(name, "none")
        if scaling not in ("none", "linear"):
            values.problems.append(f"{name} must be 'linear', not {scaling!r}")
        layers = config[_setting(family, "block_count")]
        config[factor] = float(
            values.number("rope.scaling.factor", family.gguf.stretched.get(layers, 1.0))
        )


def _local(values: "_Metadata", family: Family, layers: int) -> list[bool]:
    """Read which layers have a sliding window."""
    key, period = "attention.sliding_window_pattern", family.gguf.default_period
    if period and f"{values.prefix}.{key}" not in values.metadata:
        return [(layer + 1) % period > 0 for layer in range(layers)]
    return values.flags(key, layers)


def _read_global_layers(
    values: "_Metadata", family: Family, config: dict[str, Any], local: Sequence[bool]
) -> None:
    """Read the sizes of the layers with full attention, if they have their own."""
    if "attention.key_length_swa" not in family.gguf.keys:
        return
    config["global_head_dim"] = config["head_dim"]
    config["head_dim"] = values.count("attention.key_length_swa", config["head_dim"])
    heads = values.each("attention.head_count_kv", len(local), config["num_query_heads"])
    near = (count for count, is_local in zip(heads, local, strict=True) if is_local)
    config["num_key_value_heads"] = next(near, max(heads))
    # Where they take their keys for values.
    names = values.file.tensors
    config["num_global_key_value_heads"] = next(
        (
            count
            for block, (is_local, count) in enumerate(zip(local, heads, strict=True))
            if not is_local
            and family.gguf_name("self_attn.k_proj", block) in names
            and family.gguf_name("self_attn.v_proj", block) not in names
        ),
        None,
    )


def _read_widths(values: "_Metadata", family: Family, config: dict[str, Any], layers: int) -> None:
    setting = _setting(family, "feed_forward_length")
    widths = values.each("feed_forward_length", layers)
    if family.widths_by_layer:
        config[setting] = widths
        return
    config[setting] = widths[0] * family.gates
    if "use_double_wide_mlp" in family.hugging_face.fields:
        shared = config["num_kv_shared_layers"]
        doubled = [widths[0] * (1 + (layer >= layers - shared)) for layer in range(layers)]
        if widths not in ([widths[0]] * layers, doubled):
            values.problems.append(
                f"{values.prefix}.feed_forward_length must be one width, doubled at most in the "
                f"{shared} layers that share keys and values, not {widths}"
            )
        config["use_double_wide_mlp"] = widths != [widths[0]] * layers


def _sparse_parts(values: "_Metadata", layers: int) -> list[float]:
    """Read the share of each layer's feed-forward that is cut: the file has its normal quantile."""
    name = f"{values.prefix}.activation_sparsity_scale"
    found: Any = values.metadata.get(name)
    numeric = isinstance(found, np.ndarray) and np.issubdtype(found.dtype, np.floating)
    if not numeric or len(found) != layers or np.isnan(found).any():
        values.problems.append(f"{name} must be {layers} numbers, one for each layer")
        return [0.0] * layers
    return [round(float(part), 6) for part in scipy.special.ndtr(found.astype("float64"))]


def _turned_part(file: Header) -> float:
    """Return the share of each global-attention head that RoPE rotates."""
    info = file.tensors.get(ROPE_FACTORS)
    if info is None or info.kind != gguf.GGMLQuantizationType.F32:
        return 1.0
    return float((file.read(ROPE_FACTORS) < _STANDSTILL).mean())


class _Metadata:
    """Values under the architecture's prefix; what is wrong is collected in `problems`."""

    def __init__(self, file: Header, prefix: str) -> None:
        self.file = file
        self.metadata = file.metadata
        self.prefix = prefix
        self.problems: list[str] = []

    def number(self, key: str, default: float | None = None) -> float:
        name = f"{self.prefix}.{key}"
        value: Any = self.metadata.get(name)
        if value is None:
            others = (self.metadata.get(f"{self.prefix}.{k}") for k in _SPELLINGS.get(key, ()))
            value = next((other for other in others if other is not None), default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not math.isfinite(value):
            what = "is missing" if value is None else f"must be a number, not {value!r}"
            self.problems.append(f"{name} {what}")
            return 1
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        least = 0 if default == 0 else 1
        if value != int(value) or not least <= value <= MAX_SIZE:
            self.problems.append(f"{self.prefix}.{key} must be a whole number, not {value!r}")
            return 1
        return int(value)

    def each(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """A count for each layer, where the file may say one for all."""
        name = f"{self.prefix}.{key}"
        found = self.metadata.get(name)
        if not isinstance(found, np.ndarray):
            return [self.count(key, default)] * layers
        whole = np.issubdtype(found.dtype, np.integer) and len(found) == layers
        if not whole or not np.all((found >= 0) & (found <= MAX_SIZE)):
            self.problems.append(f"{name} must be {layers} whole numbers, not {found[:8]!r}")
            return [1] * layers
        return [int(value) for value in found]

    def flags(self, key: str, layers: int) -> list[bool]:
        name = f"{self.prefix}.{key}"
        found = self.metadata.get(name)
        if not isinstance(found, np.ndarray) or found.dtype != bool or len(found) != layers:
            self.problems.append(f"{name} must be {layers} flags, one for each layer")
            return [True] * layers
        return [bool(value) for value in found]

    def expect(self, key: str, value: float) -> None:
        found = self.number(key, value)
        if not math.isclose(found, value, rel_tol=1e-6):
            self.problems.append(
                f"{self.prefix}.{key} is {found:g}, and KerasHub's model has {value:g}"
            )


def _layers(values: _Metadata) -> int:
    """As many layers as there are tensors for: nothing is laid out after a number alone."""
    told = values.count("block_count")
    blocks = {name.split(".")[1] for name in values.file.tensors if name.startswith("blk.")}
    if len(blocks) != told:
        values.problems.append(
            f"{values.prefix}.block_count is {told}, tensors of {len(blocks)} are there"
        )
    return max(1, len(blocks))
