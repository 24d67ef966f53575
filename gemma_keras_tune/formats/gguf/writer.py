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
import tempfile
from collections.abc import Iterable, Mapping
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
    parts_of_tensors,
    tensor_shape,
)
from gemma_keras_tune.formats.gguf.settings import backbone_config, rope_factors, sizes
from gemma_keras_tune.formats.hugging_face.tokenizer import merge_rules
from gemma_keras_tune.formats.weights import Progress, merged_weights, rounded, warn_of_media
from gemma_keras_tune.gemma.families import Family, Weight, backbone_settings, family_of, join
from gemma_keras_tune.gemma.state import is_instruct, origin_of
from gemma_keras_tune.gemma.tables import GGUF_PRECISE, SENTENCEPIECE, FusedPart
from gemma_keras_tune.gemma.templates import END_OF_TEXT, Template, get_template, template_of
from gemma_keras_tune.gemma.vocabularies import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    sentencepiece_messages,
)

FILE_NAME = "model.gguf"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
QUANTIZATIONS = ("Q8_0", "Q4_0")

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
    is in memory beside the model. Norm scales stay in float32, as llama.cpp wants them.

    Args:
        model: A KerasHub `CausalLM`. Of a model that sees, the text tower.
        folder: An existing folder.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: bfloat16 where the model's
            weights are, else float16.
        progress: Called with the tensor's name, how many are written, and how many there are.
        quantization: `"Q8_0"` or `"Q4_0"`, instead of `dtype`. Matrices whose rows are no multiple
            of 32 values are written as float16; the embedding of a `"Q4_0"` file is `"Q8_0"`. Or
            one of `k_quants.K_QUANTS`, which the program `llama-quantize` makes of a whole file in
            the weights' own dtype.
        file_name: Name of the file.

    Raises:
        ExportError: GGUF cannot carry this model, a weight is too large for the dtype, or
            `llama-quantize` is needed and not on the PATH.
    """
    if str(quantization).upper() in k_quants.K_QUANTS:
        _write_k_quant(model, folder / file_name, str(quantization).upper(), progress)
        return
    family = family_of(model)
    kind = _file_kind(model, dtype, quantization)
    weights = family.weights(model)
    warn_of_media(
        model,
        "GGUF file",
        "llama.cpp takes the vision tower as a second file (mmproj), which this library does not "
        "write.",
    )
    path = folder / file_name
    writer = gguf.GGUFWriter(path, family.name)
    try:
        for key, value in _metadata(model, family, kind).items():
            _add(writer, key, value)
        kinds = {weight.gguf: _tensor_kind(weight, kind) for weight in weights}
        extra = rope_factors(model, family)
        rows = _rows(model)
        shapes = {
            name: (rows, held[0].matrix_shape[1])
            if held[0].spec.kind == "embedding"
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
    program = k_quants.find_quantizer()
    held = str(family_of(model).head(model).embedding.dtype)
    with tempfile.TemporaryDirectory(dir=path.parent) as space:
        dtype = "bfloat16" if held == "bfloat16" else "float32"
        write(model, pathlib.Path(space), dtype=dtype, progress=progress)
        k_quants.quantize(program, pathlib.Path(space, FILE_NAME), path, quantization)


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


def _metadata(model: Any, family: Family, kind: str) -> dict[str, Any]:
    """The keys of the file; whole numbers become uint32, others float32."""
    described = {f"{family.name}.{key}": value for key, value in sizes(model, family).items()}
    _check_settings(model, family, described)
    origin = origin_of(model)
    name = pathlib.PurePath(origin.source).stem if origin else family.title
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.license": "gemma",
        "general.license.link": _TERMS,
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **described,
        **_tokenizer(model, family),
    }
    return metadata | _template(model)


def _check_settings(model: Any, family: Family, described: Mapping[str, Any]) -> None:
    """Refuse a model that the metadata would make another model of."""
    given = backbone_settings(model)
    problems = family.unlike(given, "llama.cpp", family.gguf.fixed(given))
    if not problems and "layer_types" not in family.hugging_face.fields:
        problems = _read_back(given, family, described, family.weights(model))
    if problems:
        raise ExportError(
            f"GGUF has no words for some settings of this {family.title}.",
            problems,
            "Export a Keras preset or a Hugging Face folder instead.",
        )


def _read_back(
    given: Mapping[str, Any],
    family: Family,
    described: Mapping[str, Any],
    weights: Iterable[Weight],
) -> list[str]:
    """Name the settings that the metadata do not give back."""
    tensors = {
        weight.gguf: TensorInfo(weight.gguf, weight.matrix_shape, _Kind.F32, 0, 0, pathlib.Path())
        for weight in weights
    }
    found = backbone_config(GgufFile(pathlib.Path(), described, tensors), family)
    defaults = inspect.signature(family.backbone_class).parameters
    problems = []
    for name, value in given.items():
        if name in _SILENT:
            continue
        default = defaults[name].default if name in defaults else value
        expected = found.get(name, default)
        if not _same(value, expected):
            problems.append(f"{name} is {value!r}; llama.cpp computes with {expected!r}")
    return problems


def _same(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-6) if numbers else a == b


def _tokenizer(model: Any, family: Family) -> dict[str, Any]:
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
        if kind not in (NORMAL, BYTE):
            kind, score = USER_DEFINED, _NO_SCORE
            # llama.cpp looks for these in text as it is, not as SentencePiece spells it.
            text = text.replace(SPACE, " ")
        if kind != BYTE and _CONTROL_TOKENS.fullmatch(text) and text not in _VISIBLE_TOKENS:
            kind, score = CONTROL, _NO_SCORE
        tokens.append(text)
        scores.append(score)
        types.append(kind)
    for number in range(len(tokens), rows):
        tokens.append(f"[PAD{number}]")
        scores.append(_NO_SCORE)
        types.append(UNUSED)
    prefix = "tokenizer.ggml."
    kind_of_tokenizer: dict[str, Any] = {prefix + "model": family.gguf.tokenizer}
    if family.gguf.tokenizer == SENTENCEPIECE:
        kind_of_tokenizer[prefix + "pre"] = "default"
    else:
        merges = [" ".join(pair) for pair in merge_rules(proto.pieces)]
        kind_of_tokenizer[prefix + "merges"] = merges
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
    template = get_template(model)
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
    return min(rows, int(backbone_settings(model).get("vocab_size_per_layer_input") or rows))


def _tensor_kind(weight: Weight, kind: str) -> gguf.GGMLQuantizationType:
    shape = weight.matrix_shape
    if len(shape) < 2 or weight.spec.gguf in GGUF_PRECISE:
        return _Kind.F32
    if kind == "Q4_0" and weight.spec.kind == "embedding":
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
    pieces: dict[FusedPart | None, np.ndarray] = {}
    for weight, value in group:
        matrix, offset = weight.to_matrix(value), weight.gguf_offset
        if offset:
            matrix = np.asarray(matrix, np.float32) + offset
        pieces[weight.spec.gguf_part] = matrix
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
