"""Hugging Face folders with a text model: their settings both ways, their weights read back.

KerasHub reads what Hugging Face publishes: Gemma 1 to 3, and the models of 3n and 4 that see and
hear. What it does not know are the text models of 3n and 4 (`gemma3n_text`, `gemma4_text`), and it
takes any matrix for any other with as many values. So the settings of Gemma 1 to 3 are KerasHub's
reading, those of 3n and 4 stand in a table here, and the weights of all text models are read after
`families`, each checked before the first is taken.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np

from gemma_keras_tune.building import backbone_class, causal_lm, without_values
from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.families import FAMILIES, Family, Piece, Weight, family_of, split

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TEXT_MODEL_TYPES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
}
_DTYPES = ("F64", "F32", "F16", "BF16")
_AGAIN = "Copy or download the folder again."
_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|model\.)")

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
_ROPE_KINDS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of a tensor.

    Attributes:
        file: The file that holds it.
        name: Its name there.
        shape: Its shape.
        dtype: Its dtype as safetensors names it, such as `BF16`.
    """

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, from the headers of its files alone.

    Args:
        folder: A Hugging Face folder with safetensors.

    Returns:
        Each tensor, named as in a text model: `model.layers.0…` whatever the prefix there.

    Raises:
        LoadError: The index leads out of the folder, or files are missing, damaged or not what the
            index says. All problems are listed.
    """
    placed, problems = _placed(folder)
    found: dict[str, Tensor] = {}
    files = sorted({file for file in placed.values() if (folder / file).is_file()})
    for file in files if placed or problems else [WEIGHTS]:
        try:
            for tensor in _header(folder / file):
                found[tensor.name] = tensor
        except Exception as error:
            problems.append(f"{file} cannot be read: {error}")
    problems += [
        f"{name} is not in {file}, where the index places it"
        for name, file in placed.items()
        if not problems and (name not in found or found[name].file.name != file)
    ]
    if problems:
        raise LoadError(f"The weights in {folder} are damaged.", problems, _AGAIN)
    return {_text_name(name): tensor for name, tensor in found.items()}


def _placed(folder: pathlib.Path) -> tuple[dict[str, str], list[str]]:
    """The file of each tensor, where there is an index; and what is wrong with that."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return {}, []
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(
            f"{folder / INDEX} holds no map of weights.", [repr(error)], _AGAIN
        ) from error
    files = sorted(set(named.values()))
    problems = [
        f"{INDEX} leads out of the folder: {file!r}" for file in files if not is_plain(file)
    ]
    if problems:
        return {}, problems
    return named, [f"{file} is missing" for file in files if not (folder / file).is_file()]


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder."""
    return name not in ("", ".", "..") and not re.search(r"[\\/:\0]", name)


def _header(file: pathlib.Path) -> Iterator[Tensor]:
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        for name in opened.keys():  # noqa: SIM118  It is no mapping.
            part = opened.get_slice(name)
            yield Tensor(file, name, tuple(part.get_shape()), part.get_dtype())


def _text_name(name: str) -> str:
    return _PREFIX.sub("model.", name)


def check_tensors(
    folder: pathlib.Path, weights: Sequence[Weight], tensors: Mapping[str, Tensor]
) -> None:
    """Compare what a folder holds with what the model is built of.

    Args:
        folder: The folder, for the message.
        weights: The text tower's weights.
        tensors: The tensors found.

    Raises:
        LoadError: Weights are missing, of another shape, or of a dtype that is no float.
    """
    groups = collections.defaultdict(list)
    for weight in weights:
        groups[_text_name(weight.hugging_face)].append(weight)
    problems = []
    for name, parts in groups.items():
        tensor = tensors.get(name)
        expected = _shape(parts)
        if tensor is None:
            # Checkpoints may leave out what is never read.
            problems += [f"{name} is missing"] if parts[0].used else []
        elif tensor.shape != expected:
            problems.append(f"{tensor.name} has shape {tensor.shape}, expected {expected}")
        elif tensor.dtype not in _DTYPES:
            problems.append(f"{tensor.name} is {tensor.dtype}: quantized weights cannot be read")
    if problems:
        raise LoadError(
            f"The weights in {folder} do not fit the model its config.json describes.",
            problems,
            _AGAIN,
        )


def _shape(parts: Sequence[Weight]) -> tuple[int, ...]:
    shape = list(parts[0].matrix_shape)
    piece = parts[0].entry.piece
    if piece is not None:
        shape[piece.axis] *= len(parts)
    return tuple(shape)


def load_text_model(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: str,
) -> keras.Model:
    """Open a folder with a text model.

    Args:
        folder: The folder.
        config: Its `config.json`, with a `model_type` of `TEXT_MODEL_TYPES`.
        tensors: Its tensors, from `read_tensors`.
        dtype: Keras dtype of the weights.

    Returns:
        A KerasHub `CausalLM` with preprocessor and tokenizer.

    Raises:
        LoadError: Settings are missing, or the tensors do not fit them.
    """
    family = FAMILIES[TEXT_MODEL_TYPES[config["model_type"]]]
    _check_depth(folder, config, tensors)
    if family.name in FIELDS:
        arguments = _arguments(folder, family, config)
        backbone = without_values(lambda: backbone_class(family)(**arguments, dtype=dtype))
    else:
        backbone = without_values(
            lambda: keras_hub.models.Backbone.from_preset(
                str(folder.resolve()), load_weights=False, dtype=dtype
            )
        )
    model = causal_lm(family, backbone, _proto(folder))
    weights = family_of(model).weights(model)
    check_tensors(folder, weights, tensors)
    _assign(weights, tensors)
    return model


def _check_depth(
    folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Before anything is built after the settings: as many layers as they say."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if config.get("num_hidden_layers") != len(layers):
        raise LoadError(
            f"config.json in {folder} tells of {config.get('num_hidden_layers')!r} layers, and its "
            f"weights are those of {len(layers)}.",
            next_step=_AGAIN,
        )


def _proto(folder: pathlib.Path) -> bytes:
    file = folder / "tokenizer.model"
    if file.is_file():
        return file.read_bytes()
    tokenizer: Any = keras_hub.tokenizers.Tokenizer.from_preset(str(folder.resolve()))
    return tokenizer.proto


def _assign(weights: Sequence[Weight], tensors: Mapping[str, Tensor]) -> None:
    from safetensors import safe_open

    counts = collections.Counter(weight.hugging_face for weight in weights)
    files = collections.defaultdict(list)
    for weight in weights:
        tensor = tensors.get(_text_name(weight.hugging_face))
        if tensor is None:
            weight.variable.assign(np.zeros(weight.variable.shape, "float32"))
        else:
            files[tensor.file].append((weight, tensor.name))
    for file, held in files.items():
        with safe_open(file, "np") as opened:
            for weight, name in held:
                value = opened.get_tensor(name)
                piece: Piece | None = weight.entry.piece
                if piece is not None:
                    value = split(value, piece, counts[weight.hugging_face])
                weight.variable.assign(weight.from_matrix(value))


# The settings of Gemma 3n and 4.


def settings(given: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of transformers' configuration of a Gemma 3n or 4.

    Args:
        given: What the KerasHub backbone is built from.
        family: Its generation.

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


def _arguments(folder: pathlib.Path, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a KerasHub backbone is built from; the inverse of `settings`."""
    config = _flattened(config)
    missing = [name for name in FIELDS[family.name] if name not in config]
    if missing:
        raise LoadError(
            f"config.json in {folder} lacks settings of a {family.title}.",
            [f"{name} is missing" for name in missing],
            _AGAIN,
        )
    arguments = {ours: config[theirs] for theirs, ours in FIELDS[family.name].items()}
    if family.name == "gemma3n":
        return arguments | {
            "rope_theta": config["rope_theta"],
            "rope_local_base_freq": config["rope_local_base_freq"],
            "hidden_activation": "gelu_approximate",
            "pad_token_id": config.get("pad_token_id") or 0,
        }
    if not config.get("attention_k_eq_v"):
        arguments["num_global_key_value_heads"] = None
    if not arguments["enable_moe_block"]:
        del arguments["num_experts_per_token"]
    return arguments | {
        "image_size": None,
        "global_rope_wavelength": config["rope_theta"],
        "local_rope_wavelength": config["rope_local_base_freq"],
        "global_rope_partial_rotary_factor": config["partial_rotary_factor"],
    }


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those that transformers 5 nests beside the others."""
    ropes = config.get("rope_parameters") or {}
    flat: dict[str, Any] = {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "partial_rotary_factor": 1.0,
        "global_head_dim": config.get("head_dim"),
        "num_global_key_value_heads": None,
        "num_experts": None,
        "moe_intermediate_size": None,
        "top_k_experts": None,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    }
    for kind, name in _ROPE_KINDS.items():
        if "rope_theta" in ropes.get(kind, {}):
            flat[name] = ropes[kind]["rope_theta"]
    whole = ropes.get("full_attention", {})
    if "partial_rotary_factor" in whole:
        flat["partial_rotary_factor"] = whole["partial_rotary_factor"]
    for layer in (config.get("per_layer_config") or {}).values():
        flat["global_head_dim"] = layer.get("head_dim", flat["global_head_dim"])
        flat["num_global_key_value_heads"] = layer.get("num_key_value_heads")
    return flat | dict(config)
