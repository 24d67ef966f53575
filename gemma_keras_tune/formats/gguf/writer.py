"""GGUF files, for llama.cpp and everything built on it.

The names and axes come from `families`; this module knows the metadata and what llama.cpp wants of
the tokenizer. What it writes is checked against what `gguf_files` would read: a model with a
setting that GGUF has no word for is refused, not exported as another model.

Written after llama.cpp's `convert_hf_to_gguf.py`, and compared with a file it made of Gemma 3 270M.
"""

import collections
import inspect
import itertools
import json
import math
import pathlib
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gguf
import keras
import numpy as np

from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.formats.gguf import k_quants
from gemma_keras_tune.formats.gguf.reader import (
    INSTRUCT_KEY,
    TEMPLATE_KEY,
    GgufFile,
    TensorInfo,
    backbone_config,
    norm_rests,
    parts_of_tensors,
    tensor_shape,
)
from gemma_keras_tune.formats.hugging_face.tokenizer import merge_rules
from gemma_keras_tune.formats.weights import merged_weights, rounded
from gemma_keras_tune.gemma.building import backbone_class
from gemma_keras_tune.gemma.families import (
    Family,
    Piece,
    Weight,
    backbone_settings,
    context_length,
    family_of,
    join,
)
from gemma_keras_tune.gemma.state import is_instruct, origin_of
from gemma_keras_tune.gemma.templates import END_OF_TEXT, Template, get_template, template_of
from gemma_keras_tune.gemma.vocabularies import sentencepiece_messages

FORMAT = "gguf"
FILE_NAME = "model.gguf"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
QUANTIZATIONS = ("Q8_0", "Q4_0")

Progress = Callable[[str, int, int], None]

_Kind = gguf.GGMLQuantizationType
_FLOATS = {_Kind.F32: "float32", _Kind.F16: "float16", _Kind.BF16: "bfloat16"}
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_TERMS = "https://ai.google.dev/gemma/terms"


# SentencePiece's piece types, which llama.cpp's token types repeat.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6
# llama.cpp prints no control token and ends no word in one; all others are text that users write.
_CONTROL_TOKENS = re.compile(
    r"<(pad|eos|bos|unk|mask|unused\d+|start_of_turn|end_of_turn|\|.*|.*\|)>"
)
# Tools and thoughts: llama.cpp's chat parser wants to see them.
_VISIBLE_TOKENS = (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>',
)  # fmt: skip
_NO_SCORE = -1000.0
# Small matrices that llama.cpp's own converter leaves in float32.
_PRECISE = ("altup_correct_coef", "altup_predict_coef")
_IDS = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
# Where the backbone's settings say nothing that a text model's file must carry.
_SILENT = ("name", "trainable", "dtype", "image_size", "vision_encoder", "dropout")


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    progress: Progress = lambda name, done, total: None,
    quantization: str | None = None,
    file_name: str = FILE_NAME,
) -> None:
    """Write a model as one GGUF file, tokenizer and chat template included.

    Weights are merged, converted and written one at a time, so that little more than the largest
    lies in memory beside the model. Norm scales stay in float32, as llama.cpp wants them.

    Args:
        model: A KerasHub `CausalLM`. Of a model that sees, the text tower.
        folder: An existing folder.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: bfloat16 where the model's
            weights are, else float16.
        progress: Called with the tensor's name, how many are written, and how many there are.
        quantization: `"Q8_0"` or `"Q4_0"`, instead of `dtype`. Matrices whose rows are no multiple
            of 32 values are written as float16; the embedding of a `"Q4_0"` file is `"Q8_0"`. Or
            one of `k_quants.K_QUANTS`, which llama.cpp's own quantizer makes of a whole file in
            the weights' own dtype.
        file_name: Name of the file.

    Raises:
        ExportError: GGUF cannot carry this model, a weight is too large for the dtype, or
            llama.cpp's quantizer is asked for and not installed.
    """
    if str(quantization).upper() in k_quants.K_QUANTS:
        _write_k_quant(model, folder / file_name, str(quantization).upper(), progress)
        return
    family = family_of(model)
    kind = _file_kind(model, dtype, quantization)
    weights = family.weights(model)
    _warn_of_vision(model)
    path = folder / file_name
    writer = gguf.GGUFWriter(path, family.name)
    try:
        rests = _rests(weights) if kind == "F32" else {}
        for key, value in (_metadata(model, family, kind) | rests).items():
            _add(writer, key, value)
        kinds = {weight.gguf: _tensor_kind(weight, kind) for weight in weights}
        extra = _rope_factors(model) if family.name == "gemma4" else {}
        rows = _rows(model)
        shapes = {
            name: (rows, held[0].matrix_shape[1])
            if held[0].entry.kind == "embedding"
            else tensor_shape(held)
            for name, held in parts_of_tensors(weights).items()
        }
        for name, value in extra.items():
            _announce(writer, name, value.shape, _Kind.F32)
        for name, shape in shapes.items():
            _announce(writer, name, shape, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for value in extra.values():
            put(writer, value)
        _write_tensors(writer, model, shapes, kinds, progress)
    finally:
        writer.close()


def _write_k_quant(
    model: keras.Model, path: pathlib.Path, quantization: str, progress: Progress
) -> None:
    command = k_quants.quantizer()
    held = str(family_of(model).head(model).embedding.dtype)
    with tempfile.TemporaryDirectory(dir=path.parent) as space:
        dtype = "bfloat16" if held == "bfloat16" else "float32"
        write(model, pathlib.Path(space), dtype=dtype, progress=progress)
        k_quants.quantize(command, pathlib.Path(space, FILE_NAME), path, quantization)


# What goes into the header.


def _file_kind(model: keras.Model, dtype: str, quantization: str | None) -> str:
    if quantization is not None:
        name = str(quantization).upper()
        if name not in QUANTIZATIONS:
            raise ExportError(
                f"`quantization` must be one of {QUANTIZATIONS + k_quants.K_QUANTS} or None. "
                f"Received: {quantization!r}"
            )
        return name
    if dtype == "auto":
        stored = str(family_of(model).head(model).embedding.dtype)
        dtype = "bfloat16" if stored == "bfloat16" else "float16"
    if dtype not in DTYPES:
        raise ExportError(
            f"`dtype` must be 'auto' or one of {tuple(DTYPES)}. Received: {dtype!r}",
            next_step=f"For smaller files pass `quantization`, one of {QUANTIZATIONS}.",
        )
    return DTYPES[dtype]


def _warn_of_vision(model: Any) -> None:
    if getattr(model.backbone, "vision_encoder", None) is not None:
        warnings.warn(
            "The GGUF file holds the text tower alone: it will not see images. llama.cpp takes the "
            "vision tower as a second file (mmproj), which this library does not write.",
            UserWarning,
            stacklevel=4,
        )


def _metadata(model: Any, family: Family, kind: str) -> dict[str, Any]:
    """The keys of the file; whole numbers become uint32, others float32."""
    own = {"gemma3n": _gemma3n_sizes, "gemma4": _gemma4_sizes}.get(family.name)
    given = own(model) if own else _sizes(model, family)
    sizes = {f"{family.name}.{key}": value for key, value in given.items()}
    if own is None:  # the others refuse by name what the file cannot say
        _check_sizes(model, family, sizes)
    origin = origin_of(model)
    name = pathlib.PurePath(origin.source).stem if origin else family.title
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.license": "gemma",
        "general.license.link": _TERMS,
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **sizes,
        **_tokenizer(model),
    }
    return metadata | _template(model)


def _sizes(model: Any, family: Family) -> dict[str, Any]:
    backbone = model.backbone
    config = backbone.get_config()
    wide = family.name in ("gemma", "gemma2")
    sizes: dict[str, Any] = {
        "context_length": context_length(model),
        "embedding_length": config["hidden_dim"],
        "block_count": config["num_layers"],
        # KerasHub gives Gemma 1 and 2 the width of both gates together.
        "feed_forward_length": config["intermediate_dim"] // (2 if wide else 1),
        "attention.head_count": config["num_query_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
    }
    if family.name == "gemma2":
        sizes |= {
            "attn_logit_softcapping": float(config["attention_logit_soft_cap"] or 0),
            "final_logit_softcapping": float(config["final_logit_soft_cap"] or 0),
            "attention.sliding_window": config["sliding_window_size"],
        }
    if family.name == "gemma3":
        sizes |= {
            "rope.freq_base": 1_000_000.0,
            "rope.freq_base_swa": 10_000.0,
            "attention.sliding_window": config["sliding_window_size"],
        }
        factor = float(config["global_rope_scaling_factor"])
        if factor != 1:
            sizes |= {
                "rope.scaling.type": "linear",
                "rope.scaling.factor": factor,
            }
    return sizes


# What llama.cpp computes with, where its metadata have no word for it.
_GEMMA4_FIXED: Mapping[str, Any] = {
    "attention_logit_soft_cap": None,
    "use_sliding_window_attention": True,
    "local_rope_scaling_factor": 1.0,
    "global_rope_scaling_factor": 1.0,
    "use_bidirectional_attention": False,
    "is_embedding_model": False,
}


# What llama.cpp's Gemma 3n has in numbers: layers with a sparse feed-forward, layers with keys of
# their own, and every how many layers one sees everything.
_GEMMA3N_SPARSE, _GEMMA3N_KEYED, _GEMMA3N_PERIOD = 10, 20, 5


def _gemma3n_sizes(model: Any) -> dict[str, Any]:
    config = backbone_settings(model)
    layers = config["num_hidden_layers"]
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    fixed = {
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "laurel_rank": 64,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": layers - _GEMMA3N_KEYED,
        "layer_types": [
            "full_attention" if i % _GEMMA3N_PERIOD == _GEMMA3N_PERIOD - 1 else "sliding_attention"
            for i in range(layers)
        ],
        "activation_sparsity_pattern": [
            0.95 if i < _GEMMA3N_SPARSE else 0.0 for i in range(layers)
        ],
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "final_logit_soft_cap": 30.0,
    }
    problems = [
        f"{name} is {config[name]!r}; llama.cpp computes with {expected!r}"
        for name, expected in fixed.items()
        if config[name] != expected
    ]
    if problems:
        raise _unsaid("Gemma 3n", problems)
    sparsity = statistics.NormalDist()
    return {
        "context_length": context_length(model),
        "embedding_length": config["text_hidden_size"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "block_count": layers,
        "feed_forward_length": list(config["intermediate_size"]),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": local,
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "altup.num_inputs": config["altup_num_inputs"],
        "altup.active_idx": config["altup_active_idx"],
        "activation_sparsity_scale": [
            sparsity.inv_cdf(part) if part else -math.inf
            for part in config["activation_sparsity_pattern"]
        ],
        "rope.freq_base": float(config["rope_theta"]),
        "rope.freq_base_swa": float(config["rope_local_base_freq"]),
        "final_logit_softcapping": float(config["final_logit_soft_cap"]),
    }


def _gemma4_sizes(model: Any) -> dict[str, Any]:
    config = backbone_settings(model)
    problems = [
        f"{name} is {config[name]!r}; llama.cpp computes with {expected!r}"
        for name, expected in _GEMMA4_FIXED.items()
        if config[name] != expected
    ]
    if problems:
        raise _unsaid("Gemma 4", problems)
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    wide = config["global_head_dim"] or config["head_dim"]
    heads, few = config["num_key_value_heads"], config["num_global_key_value_heads"]
    width = config["intermediate_dim"]
    alone = config["num_layers"] - config["num_kv_shared_layers"]
    doubled = config["use_double_wide_mlp"] and config["num_kv_shared_layers"]
    sizes: dict[str, Any] = {
        "context_length": context_length(model),
        "embedding_length": config["hidden_dim"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "block_count": config["num_layers"],
        "feed_forward_length": [width * (1 + (i >= alone)) for i in range(len(local))]
        if doubled
        else width,
        "attention.head_count": config["num_query_heads"],
        "attention.head_count_kv": [heads if near else few for near in local] if few else heads,
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "attention.sliding_window": config["sliding_window_size"],
        "attention.sliding_window_pattern": local,
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "rope.dimension_count": wide,
        "rope.dimension_count_swa": config["head_dim"],
        "rope.freq_base": float(config["global_rope_wavelength"] or 1_000_000),
        "rope.freq_base_swa": float(config["local_rope_wavelength"] or 10_000),
    }
    if config["final_logit_soft_cap"]:
        sizes["final_logit_softcapping"] = float(config["final_logit_soft_cap"])
    if config["enable_moe_block"]:
        sizes |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_token"],
            "expert_feed_forward_length": config["expert_intermediate_dim"],
        }
    return sizes


def _rope_factors(model: Any) -> dict[str, np.ndarray]:
    """Gemma 4 turns a part of each global head; the rest is slowed down to a standstill."""
    config = backbone_settings(model)
    half = (config["global_head_dim"] or config["head_dim"]) // 2
    turned = int(half * config["global_rope_partial_rotary_factor"])
    return {"rope_freqs.weight": np.array([1.0] * turned + [1e30] * (half - turned), np.float32)}


def _unsaid(title: str, problems: list[str]) -> ExportError:
    return ExportError(
        f"GGUF has no words for some settings of this {title}.",
        problems,
        "Export a Keras preset or a Hugging Face folder instead.",
    )


def _check_sizes(model: Any, family: Family, sizes: Mapping[str, Any]) -> None:
    """Read the metadata back: what they cannot say would make another model of the file."""
    tensors = {
        weight.gguf: TensorInfo(weight.gguf, weight.matrix_shape, _Kind.F32, 0, 0, pathlib.Path())
        for weight in family.weights(model)
    }
    described = backbone_config(GgufFile(pathlib.Path(), sizes, tensors), family)
    defaults = inspect.signature(backbone_class(family)).parameters
    problems = []
    for name, value in backbone_settings(model).items():
        if name in _SILENT:
            continue
        default = defaults[name].default if name in defaults else value
        expected = described.get(name, default)
        if not _same(value, expected):
            problems.append(f"{name} is {value!r}; llama.cpp computes with {expected!r}")
    if problems:
        raise _unsaid(family.title, problems)


def _same(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-6) if numbers else a == b


def _tokenizer(model: Any) -> dict[str, Any]:
    """The SentencePiece model taken apart, padded to the rows of the embedding."""
    proto = sentencepiece_messages().ModelProto.FromString(model.preprocessor.tokenizer.proto)
    rows = _rows(model)
    if len(proto.pieces) > rows:
        raise ExportError(
            f"The tokenizer has {len(proto.pieces)} pieces and the embedding {rows} rows.",
            next_step="Use the tokenizer the model was made with.",
        )
    tokens, scores, types = [], [], []
    for piece in proto.pieces:
        text, score, kind = piece.piece, piece.score, piece.type
        if kind not in (_NORMAL, _BYTE):
            kind, score = _USER_DEFINED, _NO_SCORE
            # llama.cpp looks for these in text as it is, not as SentencePiece spells it.
            text = text.replace("▁", " ")
        if kind != _BYTE and _CONTROL_TOKENS.fullmatch(text) and text not in _VISIBLE_TOKENS:
            kind, score = _CONTROL, _NO_SCORE
        tokens.append(text)
        scores.append(score)
        types.append(kind)
    for number in range(len(tokens), rows):
        tokens.append(f"[PAD{number}]")
        scores.append(_NO_SCORE)
        types.append(_UNUSED)
    prefix = "tokenizer.ggml."
    kind_of_tokenizer: dict[str, Any] = {prefix + "model": "llama", prefix + "pre": "default"}
    if family_of(model).name == "gemma4":
        merges = [" ".join(pair) for pair in merge_rules(proto.pieces)]
        kind_of_tokenizer = {prefix + "model": "gemma4", prefix + "merges": merges}
    return {
        **kind_of_tokenizer,
        prefix + "tokens": tokens,
        prefix + "scores": scores,
        prefix + "token_type": types,
        **{f"{prefix}{name}_token_id": number for name, number in _IDS.items()},
        prefix + "add_bos_token": True,
        prefix + "add_eos_token": False,
        prefix + "add_space_prefix": False,
    }


def _template(model: keras.Model) -> dict[str, Any]:
    """The chat template and stop token: none for a pretrained model that was not tuned."""
    instruct = is_instruct(model)
    if instruct is False and template_of(model) is None:
        return {INSTRUCT_KEY: False}
    template = get_template("auto", model)
    metadata: dict[str, Any] = {TEMPLATE_KEY: json.dumps(template.to_config())}
    if instruct is not None:
        metadata[INSTRUCT_KEY] = instruct
    jinja = template.chat_template()
    if jinja is not None:
        metadata["tokenizer.chat_template"] = jinja
    return metadata | _end_of_turn(model, template)


def _end_of_turn(model: Any, template: Template) -> dict[str, Any]:
    if template.stop_token == END_OF_TEXT:
        return {}
    return {"tokenizer.ggml.eot_token_id": template.stop_token_ids(model.preprocessor.tokenizer)[0]}


def _rests(weights: Iterable[Weight]) -> dict[str, Any]:
    norms = [weight for weight in weights if weight.gguf_offset]
    values = [np.asarray(norm.variable, np.float32) for norm in norms]
    stored = [value + norm.gguf_offset for value, norm in zip(values, norms, strict=True)]
    return norm_rests(values, stored)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# The tensors.


def _rows(model: Any) -> int:
    """Tokens of the file. Gemma 3n's embedding has more, for images and sounds."""
    rows = int(family_of(model).head(model).embedding.shape[0])
    if family_of(model).name != "gemma3n":
        return rows
    return min(rows, int(model.backbone.get_config()["vocab_size_per_layer_input"]))


def _tensor_kind(weight: Weight, kind: str) -> gguf.GGMLQuantizationType:
    shape = weight.matrix_shape
    if len(shape) < 2 or weight.entry.gguf in _PRECISE:
        return _Kind.F32
    if kind == "Q4_0" and weight.entry.kind == "embedding":
        kind = "Q8_0"
    if kind in QUANTIZATIONS and shape[-1] % gguf.GGML_QUANT_SIZES[_Kind[kind]][0]:
        kind = "F16"
    return _Kind[kind]


def _announce(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType
) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    size = math.prod(shape) // block * block_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _write_tensors(
    writer: gguf.GGUFWriter,
    model: keras.Model,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, gguf.GGMLQuantizationType],
    progress: Progress,
) -> None:
    waiting = collections.deque(shapes)
    groups = itertools.groupby(merged_weights(model), key=lambda pair: pair[0].gguf)
    for done, (name, group) in enumerate(groups, 1):
        if not waiting or name != waiting.popleft():
            raise ExportError(f"{name} came out of turn; this is a fault of the library.")
        # Gemma 3n's embedding has rows for images and sounds, which come last.
        put(writer, encode(name, _tensor(group)[: shapes[name][0]], kinds))
        progress(name, done, len(shapes))
    if waiting:
        raise ExportError("Weights are missing; this is a fault of the library.", waiting)


def _tensor(group: Iterable[tuple[Weight, np.ndarray]]) -> np.ndarray:
    """A tensor out of its pieces, or the one weight it holds."""
    pieces: dict[Piece | None, np.ndarray] = {}
    for weight, value in group:
        matrix, offset = weight.to_matrix(value), weight.gguf_offset
        if offset:
            matrix = np.asarray(matrix, np.float32) + offset
        pieces[weight.entry.gguf_piece] = matrix
    return join(pieces)


def put(writer: gguf.GGUFWriter, tensor: np.ndarray) -> None:
    """Write the next tensor's bytes.

    The writer's own way is NumPy's `tofile`, which loses the end without a word on a full disk.

    Args:
        writer: A writer whose header is written.
        tensor: From `encode`.
    """
    [file] = writer.fout
    writer.write_padding(file, file.tell())
    file.write(np.ascontiguousarray(tensor).data.cast("B"))
    writer.write_padding(file, tensor.nbytes)


def encode(
    name: str, matrix: np.ndarray, kinds: Mapping[str, gguf.GGMLQuantizationType]
) -> np.ndarray:
    """A tensor's bytes as the file holds them.

    Args:
        name: Its GGUF name.
        matrix: Its values.
        kinds: How each tensor is stored, by name.

    Returns:
        The array to write.

    Raises:
        ExportError: A value is larger than the dtype's largest.
    """
    kind = kinds[name]
    if kind not in _FLOATS:
        return gguf.quantize(np.ascontiguousarray(matrix, np.float32), kind)
    stored = rounded(name, matrix, _FLOATS[kind])
    return stored.view(np.uint8) if kind == _Kind.BF16 else stored
