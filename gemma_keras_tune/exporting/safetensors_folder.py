"""A Hugging Face folder: sharded safetensors, configuration, tokenizer, chat template, stop tokens.

The names and axes come from `families`. Configuration fields are those of `transformers`'
`GemmaConfig`, `Gemma2Config` and `Gemma3TextConfig`; a setting they have no field for is refused.
"""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np

from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.exporting._weights import merged_weights
from gemma_keras_tune.exporting.tokenizer_files import write_json, write_tokenizer
from gemma_keras_tune.families import FAMILIES, Family, Weight, family_of, is_instruct
from gemma_keras_tune.templates import Template, get_template, template_of

FORMAT = "safetensors"
RUNTIME = "transformers"
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_MODEL_TYPES = {
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_POSITIONS, _LONG_POSITIONS = {"gemma": 8192, "gemma2": 8192, "gemma3": 32_768}, 131_072
_BOS, _EOS, _PAD = 2, 1, 0

Progress = Callable[[str, int, int], None]


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    shard_size: int = 5_000_000_000,
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Write a model as `transformers` saves it.

    LoRA is merged in float32 and rounded once. One shard at a time lies in memory beside the
    model.

    Args:
        model: A KerasHub `CausalLM` of Gemma 1, 2 or 3, text only.
        folder: An existing, empty folder.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: the dtype of the weights.
        shard_size: Bytes of weights in one file at most.
        progress: Called with each weight's name, how many are written, and how many there are.

    Raises:
        ExportError: `transformers` cannot compute this model, or a weight is beyond the dtype.
    """
    family = _supported(model)
    stored = str(family.head(model).embedding.dtype) if dtype == "auto" else dtype
    if stored not in DTYPES:
        raise ExportError(f"`dtype` must be 'auto' or one of {tuple(DTYPES)}. Received: {dtype!r}")
    template = _template(model)
    tokenizer: Any = model.preprocessor.tokenizer
    stops = {_EOS}
    if template is not None:
        stops.update(template.stop_token_ids(tokenizer))
    ends = sorted(stops)
    config = _config(model, family)
    config |= {"dtype": stored, "torch_dtype": stored, "eos_token_id": ends}
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": _BOS, "eos_token_id": ends, "pad_token_id": _PAD},
    )
    write_tokenizer(tokenizer, folder, template, (family.turn.start, family.turn.end))
    _write_weights(model, folder, family, DTYPES[stored], shard_size, progress)


# The configuration.


def _supported(model: Any) -> Family:
    family = family_of(model)
    if family.name not in _MODEL_TYPES:
        known = [FAMILIES[name].title for name in _MODEL_TYPES]
        raise ExportError(
            f"{family.title} cannot be written as a Hugging Face folder yet.",
            next_step=f"It is written for {', '.join(known)}. Save a Keras preset with "
            "`save_preset`, or the adapter with `save_adapter`.",
        )
    if getattr(model.backbone, "vision_encoder", None) is not None:
        raise ExportError(
            f"This {family.title} sees: its vision tower cannot be written yet.",
            next_step="Save the adapter with `save_adapter`: PEFT puts it on the original model.",
        )
    return family


def _template(model: keras.Model) -> Template | None:
    """The prompt format; `None` for a pretrained model that was not tuned."""
    if is_instruct(model) is False and template_of(model) is None:
        return None
    return get_template("auto", model)


def _config(model: Any, family: Family) -> dict[str, Any]:
    given = model.backbone.get_config()
    model_type, architecture = _MODEL_TYPES[family.name]
    old = family.name in ("gemma", "gemma2")
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": given["vocabulary_size"],
        "hidden_size": given["hidden_dim"],
        # KerasHub gives Gemma 1 and 2 the width of both gates together.
        "intermediate_size": given["intermediate_dim"] // (2 if old else 1),
        "num_hidden_layers": given["num_layers"],
        "num_attention_heads": given["num_query_heads"],
        "num_key_value_heads": given["num_key_value_heads"],
        "head_dim": given["head_dim"],
        "rms_norm_eps": given["layer_norm_epsilon"],
        "max_position_embeddings": _POSITIONS[family.name],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": _BOS,
        "pad_token_id": _PAD,
    }
    if family.name != "gemma":
        config |= _later_config(given)
    if family.name == "gemma3":
        config |= _gemma3_config(given)
    _refuse_settings(given, family)
    return config


def _later_config(given: dict[str, Any]) -> dict[str, Any]:
    scalar = given["head_dim"]
    if not given["query_head_dim_normalize"]:
        scalar = given["hidden_dim"] / given["num_query_heads"]
    window = given["sliding_window_size"]
    if not given["use_sliding_window_attention"]:
        window = _LONG_POSITIONS
    return {
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": given["attention_logit_soft_cap"],
        "final_logit_softcapping": given["final_logit_soft_cap"],
        "sliding_window": window,
    }


def _gemma3_config(given: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
    }
    factor = float(given["global_rope_scaling_factor"])
    if factor != 1:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        config["max_position_embeddings"] = _LONG_POSITIONS
    return config


# What each generation computes with, where its Hugging Face configuration has no field.
_FIXED: dict[str, dict[str, Any]] = {
    "gemma": {
        "query_head_dim_normalize": True,
        "use_post_ffw_norm": False,
        "use_post_attention_norm": False,
        "attention_logit_soft_cap": None,
        "final_logit_soft_cap": None,
        "use_sliding_window_attention": False,
    },
    "gemma2": {"use_post_ffw_norm": True, "use_post_attention_norm": True},
    "gemma3": {
        "use_post_ffw_norm": True,
        "use_post_attention_norm": True,
        "use_query_key_norm": True,
        "local_rope_scaling_factor": 1.0,
        "use_bidirectional_attention": False,
        "is_embedding_model": False,
    },
}


def _refuse_settings(given: dict[str, Any], family: Family) -> None:
    problems = [
        f"{name} is {given[name]!r}; transformers computes with {expected!r}"
        for name, expected in _FIXED[family.name].items()
        if name in given and given[name] != expected
    ]
    if problems:
        raise ExportError(
            f"transformers cannot compute this {family.title}.",
            problems,
            "Save a Keras preset with `save_preset` instead.",
        )


# The weights.


def _write_weights(
    model: keras.Model,
    folder: pathlib.Path,
    family: Family,
    dtype: np.dtype,
    shard_size: int,
    progress: Progress,
) -> None:
    from safetensors.numpy import save_file

    shards = _shards(family.weights(model), dtype, shard_size)
    count = len(shards)
    stem = "model" if count == 1 else "model-{:05}-of-{:05}"
    total = sum(map(len, shards))
    values = _converted(model, dtype)
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem.format(number, count)}.safetensors"
        tensors = {}
        for name in names:
            found, tensors[name] = next(values)
            if found != name:
                raise ExportError(f"{name} came out of turn; this is a fault of the library.")
            placed[name] = file
            progress(name, len(placed), total)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        size = sum(_bytes(weight, dtype) for weight in family.weights(model))
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(weights: tuple[Weight, ...], dtype: np.dtype, shard_size: int) -> list[list[str]]:
    """Names in order, cut where the next weight would not fit any more."""
    shards: list[list[str]] = [[]]
    held = 0
    for weight in weights:
        size = _bytes(weight, dtype)
        if shards[-1] and held + size > shard_size:
            shards.append([])
            held = 0
        shards[-1].append(weight.hugging_face)
        held += size
    return shards


def _bytes(weight: Weight, dtype: np.dtype) -> int:
    return int(np.prod(weight.variable.shape)) * dtype.itemsize


def _converted(model: keras.Model, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    for weight, value in merged_weights(model):
        matrix = np.ascontiguousarray(weight.to_matrix(value))
        with np.errstate(over="ignore"):
            stored = matrix.astype(dtype, copy=False)
        if not np.isfinite(stored).all():
            raise ExportError(
                f"{weight.hugging_face} holds values up to {np.abs(matrix).max():g}, beyond "
                f"{dtype.name}.",
                next_step="Export with `dtype='bfloat16'` or 'float32'.",
            )
        yield weight.hugging_face, stored
