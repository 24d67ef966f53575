"""Reading GGUF files into KerasHub models.

The weights' names and axes come from `families`; this module knows the container, the metadata and
what conversion does to the tokenizer. The header is parsed here, because `gguf.GGUFReader` makes an
array of every string: 10 seconds and half a gigabyte for Gemma 3's 262,144 tokens, against 0.3
seconds. Dequantization is the `gguf` package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import gguf
import jax
import jax.numpy as jnp
import keras
import numpy as np

from gemma_keras_tune.errors import LoadError, TemplateError
from gemma_keras_tune.formats.gguf.settings import BROKEN, MAX_SIZE, ROPE_FACTORS, backbone_config
from gemma_keras_tune.formats.weights import shape_problems
from gemma_keras_tune.gemma.building import causal_lm, empty_backbone
from gemma_keras_tune.gemma.families import (
    FAMILIES,
    Family,
    Weight,
    all_finite,
    joined_shape,
    split,
)
from gemma_keras_tune.gemma.state import mark_origin
from gemma_keras_tune.gemma.templates import Template, attach_template
from gemma_keras_tune.gemma.vocabularies import (
    CONTROL,
    CONTROL_IDS,
    MEDIA,
    NORMAL,
    SPACE,
    UNK_ID,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    byte_type,
    scores_of_merges,
    sentencepiece_model,
)

MAGIC = b"GGUF"
# What this library adds to a file it writes: the template as JSON, and whether it is instruct.
TEMPLATE_KEY = "gemma_keras_tune.template"
INSTRUCT_KEY = "gemma_keras_tune.instruct"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4
# The fewest bytes that a metadata entry and a tensor's entry take.
_MIN_PAIR, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
# Values dequantized at a time: memory beside the result stays under some 20 MB.
_CHUNK_VALUES = 1 << 20
# Values handed over at a time of a larger embedding: XLA goes over all of it for each.
_BLOCK_VALUES = 1 << 24
# Towers for images and sounds that Ollama keeps in the same file, and their projectors.
_TOWERS = {"v": "vision", "a": "audio", "mm": "projector"}
# llama.cpp's converter says so of a tokenizer.json that comes without a tokenizer.model.
_MERGES_ALONE = "gpt2"
_OUTPUT = "output.weight"
# The frequencies of the rotary embedding are computed, not learnt.
_COMPUTED = (ROPE_FACTORS,)
_SPLIT_COUNT = "split.count"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_TOKENIZERS = tuple(dict.fromkeys(family.gguf.tokenizer for family in FAMILIES.values()))


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in a file.

    Attributes:
        name: Its name.
        shape: Its shape as numpy has it, outermost axis first.
        kind: How its values are quantized.
        offset: First byte, from the start of the file.
        size: Length in bytes.
        path: The file: one of several where the model was split.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: Its keys and values; arrays of strings as lists of bytes, of numbers as arrays.
        tensors: Its tensors by name.
    """

    path: pathlib.Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(
        self, name: str, dtype: Any = np.float32, *, start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        """A tensor's values.

        Args:
            name: Name of the tensor.
            dtype: NumPy dtype of the result.
            start: The first to read on the outermost axis.
            stop: The first to leave out; `None` reads to the end.

        Returns:
            The values, dequantized in pieces so that little memory is needed beside them.
        """
        info = self.tensors[name]
        values = np.empty((len(range(info.shape[0])[start:stop]), *info.shape[1:]), dtype)
        rows = values.reshape(-1, info.shape[-1])
        row_bytes = info.size // (math.prod(info.shape) // info.shape[-1])
        step = max(1, _CHUNK_VALUES // info.shape[-1])
        with info.path.open("rb") as file:
            file.seek(info.offset + start * (info.size // info.shape[0]))
            for first in range(0, len(rows), step):
                part = rows[first : first + step]
                data = np.fromfile(file, np.uint8, len(part) * row_bytes)
                raw = data.reshape(len(part), row_bytes)
                part[...] = gguf.dequantize(raw, info.kind).reshape(part.shape)
        return values


def read_header(path: str | os.PathLike[str]) -> GgufFile:
    """Read and check a GGUF file's header; of a model that was split, those of all its parts.

    Args:
        path: The file, or any part of one that llama.cpp's `gguf-split` made.

    Returns:
        Its metadata, and where its tensors lie.

    Raises:
        LoadError: It is no GGUF file, or damaged, or shorter than its header says, or a part is
            missing.
    """
    path = pathlib.Path(path)
    parts = _parts(path)
    missing = [f"{part} is missing" for part in parts if not part.exists()]
    if len(parts) > 1 and missing:
        raise LoadError(
            f"{path} is one of {len(parts)} parts of a model.",
            missing,
            next_step="Put all parts into one folder.",
        )
    first, *rest = (_read_header(part) for part in parts)
    count = first.metadata.get(_SPLIT_COUNT, 1)
    if count not in (0, 1, len(parts)):
        raise LoadError(
            f"{path} is one of {count} parts of a model, and its name does not say which.",
            next_step="Give the parts the names they had, such as model-00001-of-00002.gguf, or "
            "merge them: llama-gguf-split --merge FIRST_PART MODEL.gguf",
        )
    tensors = dict(first.tensors)
    for part in rest:
        twice = sorted(tensors.keys() & part.tensors.keys())
        if twice:
            raise LoadError(f"{part.path} holds tensors of another part.", twice, BROKEN)
        tensors |= part.tensors
    return GgufFile(first.path, first.metadata, tensors)


def is_later_part(path: pathlib.Path) -> bool:
    """Tell if a file is a later part of a split model."""
    return _parts(path)[0] != path


def is_model(path: pathlib.Path) -> bool:
    """Tell if a file may hold a model: it is neither an adapter nor a vision tower."""
    try:
        metadata = _read_header(path).metadata
    except LoadError:
        return True  # What is wrong with it is told when it is opened.
    kind = metadata.get("general.type", "model")
    return kind == "model" and metadata.get("general.architecture") != "clip"


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    """All parts of a model, after the names `gguf-split` gives them; most are whole."""
    found = _PART.fullmatch(path.name)
    if found is None or not 1 <= int(found[2]) <= int(found[3]):
        return [path]
    count = int(found[3])
    names = (f"{found[1]}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1))
    return [path.with_name(name) for name in names]


def _read_header(path: pathlib.Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            return _Parser(file, path).header()
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise LoadError(f"{path} is not a sound GGUF file: {error}", next_step=BROKEN) from error


def load_gguf(path: str | os.PathLike[str], *, dtype: str = "float32") -> keras.Model:
    """Turn a GGUF file into a KerasHub model with its tokenizer.

    Args:
        path: A GGUF file of any family, quantized or not.
        dtype: Keras dtype of the weights.

    Returns:
        A KerasHub `CausalLM` with preprocessor and tokenizer.

    Raises:
        LoadError: The file is damaged, is no such Gemma, or does not hold the weights its metadata
            describes.
    """
    file = read_header(path)
    family = _family(file)
    file = _without_copy_of_embedding(_without_towers(file), family)
    try:
        config = backbone_config(file, family)
        proto = tokenizer_proto(file)
        file = _without_vocabulary(file)
        backbone = empty_backbone(family, config, dtype)
        model = causal_lm(family, backbone, proto)
    except LoadError:
        raise
    except Exception as error:
        # KerasHub and SentencePiece fail in many ways on what no converter writes.
        raise LoadError(
            f"{file.path}: the metadata describe no model that KerasHub can build.",
            [f"{type(error).__name__}: {error}"],
            next_step=BROKEN,
        ) from error
    _assign(file, family.weights(backbone), family.idle_names(backbone))
    mark_origin(model, str(path), instruct=is_instruct(file))
    _attach_template(file, model)
    return model


def _without_towers(file: GgufFile) -> GgufFile:
    """Leave out what sees and hears, with a warning."""
    found = collections.Counter(
        tower for name in file.tensors if (tower := _TOWERS.get(name.partition(".")[0]))
    )
    if not found:
        return file
    left = ", ".join(f"{tower} ({count} tensors)" for tower, count in found.items())
    warnings.warn(
        f"{file.path}: the text model alone was loaded, and {left} left out: this library tunes "
        "text.",
        UserWarning,
        stacklevel=5,
    )
    kept = {
        name: info for name, info in file.tensors.items() if name.partition(".")[0] not in _TOWERS
    }
    return dataclasses.replace(file, tensors=kept)


def _without_copy_of_embedding(file: GgufFile, family: Family) -> GgufFile:
    """Leave out a head that is the embedding; refuse another, which KerasHub cannot compute."""
    head, embedding = (file.tensors.get(n) for n in (_OUTPUT, family.gguf_name("embed_tokens")))
    if head is None or embedding is None:
        return file
    if (head.shape, head.kind) != (embedding.shape, embedding.kind) or not _same(head, embedding):
        raise LoadError(
            f"{file.path}: the head, {_OUTPUT}, is not the embedding, {embedding.name}: KerasHub "
            "ties them, and cannot compute this model.",
            next_step="Convert it again from a model whose head is tied.",
        )
    kept = {name: info for name, info in file.tensors.items() if name != _OUTPUT}
    return dataclasses.replace(file, tensors=kept)


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    """Compare the bytes of two tensors, some at a time."""
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.size, _CHUNK_VALUES):
            count = min(_CHUNK_VALUES, one.size - start)
            if first.read(count) != second.read(count):
                return False
    return True


def _without_vocabulary(file: GgufFile) -> GgufFile:
    """Drop the tokenizer's strings from the header: a quarter of a million."""
    kept = {key: value for key, value in file.metadata.items() if not isinstance(value, list)}
    return dataclasses.replace(file, metadata=kept)


def is_instruct(file: GgufFile) -> bool:
    """Tell from the metadata if the model is instruction-tuned.

    Args:
        file: The header.

    Returns:
        What this library recorded in it; else true with a chat template, or when the file calls
        itself instruction-tuned.
    """
    recorded = file.metadata.get(INSTRUCT_KEY)
    if isinstance(recorded, bool):
        return recorded
    tuned = str(file.metadata.get("general.finetune", "")).lower()
    return "tokenizer.chat_template" in file.metadata or tuned in ("it", "instruct")


def _attach_template(file: GgufFile, model: keras.Model) -> None:
    """Give the model the template it was tuned with, where this library recorded one."""
    recorded = file.metadata.get(TEMPLATE_KEY)
    if recorded is None:
        return
    try:
        config = json.loads(str(recorded))
        if not isinstance(config, dict):
            raise TemplateError(f"{TEMPLATE_KEY} must hold a JSON object.")
        attach_template(model, Template.from_config(config))
    except (TemplateError, ValueError) as error:
        text = f"{file.path}: its template is left out. {error}"
        warnings.warn(text, UserWarning, stacklevel=4)


def tokenizer_proto(file: GgufFile) -> bytes:
    """Rebuild the SentencePiece model that conversion to GGUF took apart.

    Conversion spells runs of spaces in ASCII and calls every special token a control token.
    SentencePiece never finds a control token in text, so all but `<pad>`, `<eos>` and `<bos>`
    become user-defined pieces again.

    Args:
        file: The header.

    Returns:
        A serialized SentencePiece model that gives the original's ids.

    Raises:
        LoadError: The file has no SentencePiece tokenizer, or half of one.
    """
    tokens, scores, types = _vocabulary(file)
    pieces, kinds = [], []
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if number == UNK_ID:
            kind = UNKNOWN
        elif number in CONTROL_IDS:
            kind = CONTROL
        elif kind == CONTROL:
            kind = USER_DEFINED
        text = token.decode("utf-8")
        kind = byte_type(text, kind) if kind == NORMAL else kind
        pieces.append(text.replace(" ", SPACE) if kind == USER_DEFINED else text)
        kinds.append(kind)
    return sentencepiece_model(pieces, scores, kinds)


class _Parser:
    """Reads a header, never past the end of the file."""

    def __init__(self, file: BinaryIO, path: pathlib.Path) -> None:
        self.file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size

    def header(self) -> GgufFile:
        magic = self.file.read(4)
        if magic != MAGIC:
            raise ValueError(f"it starts with {magic!r} instead of {MAGIC!r}")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}")
        tensors, pairs = self._number("Q"), self._number("Q")
        self._require(pairs * _MIN_PAIR + tensors * _MIN_TENSOR)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text()
            if key in metadata:
                raise ValueError(f"the key {key!r} is there twice")
            metadata[key] = self._value(self._number("I"))
        entries = [self._entry() for _ in range(tensors)]
        start = self._data_start(metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
        found: dict[str, TensorInfo] = {}
        for entry in entries:
            if entry.name in found:
                raise ValueError(f"the tensor {entry.name!r} is there twice")
            found[entry.name] = dataclasses.replace(entry, offset=start + entry.offset)
        self._check_places(found.values())
        return GgufFile(self.path, metadata, found)

    def _data_start(self, alignment: Any) -> int:
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_SIZE:
            raise ValueError(f"general.alignment is {alignment!r}")
        return -(-self.file.tell() // alignment) * alignment

    def _check_places(self, tensors: Iterable[TensorInfo]) -> None:
        """Refuse tensors that end behind the file or overlap: the rest fits into memory."""
        end, before = 0, "the header"
        for info in sorted(tensors, key=lambda info: info.offset):
            if info.offset + info.size > self.size:
                raise ValueError(
                    f"its tensors need {info.offset + info.size:,} bytes and the file has "
                    f"{self.size:,}; it is cut off"
                )
            if info.offset < end:
                raise ValueError(f"the tensor {info.name!r} overlaps {before!r}")
            end, before = info.offset + info.size, info.name

    def _require(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("the header runs past the end of the file; it is cut off")

    def _bytes(self, count: int) -> bytes:
        self._require(count)
        return self.file.read(count)

    def _number(self, code: str) -> int:
        return struct.unpack("<" + code, self._bytes(struct.calcsize(code)))[0]

    def _string(self) -> bytes:
        return self._bytes(self._number("Q"))

    def _text(self) -> str:
        return self._string().decode("utf-8")

    def _value(self, code: int, depth: int = 0) -> Any:
        kind = gguf.GGUFValueType(code)
        if kind == gguf.GGUFValueType.STRING:
            return self._text()
        if kind == gguf.GGUFValueType.ARRAY:
            return self._array(self._number("I"), self._number("Q"), depth + 1)
        number = np.frombuffer(self._bytes(_NUMBERS[kind].itemsize), _NUMBERS[kind])[0]
        # The shortest decimal that gives this float32: 1e-06 and not 9.999999974752427e-07.
        return float(str(number)) if kind == gguf.GGUFValueType.FLOAT32 else number.item()

    def _array(self, code: int, count: int, depth: int) -> Any:
        kind = gguf.GGUFValueType(code)
        if depth > _MAX_NESTING:
            raise ValueError(f"arrays are nested more than {_MAX_NESTING} deep")
        if kind == gguf.GGUFValueType.STRING:
            self._require(count * 8)
            return [self._string() for _ in range(count)]
        if kind == gguf.GGUFValueType.ARRAY:
            self._require(count * 12)
            return [self._value(code, depth) for _ in range(count)]
        return np.frombuffer(self._bytes(count * _NUMBERS[kind].itemsize), _NUMBERS[kind])

    def _entry(self) -> TensorInfo:
        name = self._text()
        dimensions = self._number("I")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        kind = gguf.GGMLQuantizationType(self._number("I"))
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r} of shape {shape} cannot be {kind.name}")
        size = math.prod(shape) // block * block_bytes
        return TensorInfo(name, shape, kind, self._number("Q"), size, self.path)


_NUMBERS = {
    getattr(gguf.GGUFValueType, name): np.dtype(dtype)
    for name, dtype in {
        "UINT8": "u1", "INT8": "i1", "UINT16": "<u2", "INT16": "<i2", "UINT32": "<u4",
        "INT32": "<i4", "FLOAT32": "<f4", "BOOL": "?", "UINT64": "<u8", "INT64": "<i8",
        "FLOAT64": "<f8",
    }.items()
}  # fmt: skip


def _family(file: GgufFile) -> Family:
    name = str(file.metadata.get("general.architecture", "none"))
    kind = str(file.metadata.get("general.type", "model"))
    if kind == "mmproj" or name == "clip":
        beside = "".join(f": {model}" for model in _models_beside(file.path)[:1])
        raise LoadError(
            f"{file.path} sees or hears for a model, and holds no text model.",
            next_step=f"Pass the GGUF file of the text model that it belongs to{beside}",
        )
    if kind != "model":
        raise LoadError(
            f"{file.path} holds no model. Received: general.type={kind!r}",
            next_step="Load the base model, then the adapter onto it.",
        )
    family = FAMILIES.get(name)
    if family is None:
        raise LoadError(
            f"{file.path} is not a Gemma. Received: general.architecture={name!r}",
            next_step=f"GGUF files of {', '.join(f.title for f in FAMILIES.values())} can be read.",
        )
    return family


def _models_beside(path: pathlib.Path) -> list[pathlib.Path]:
    files = sorted(path.parent.glob("*.gguf"))
    return [file for file in files if file != path and is_model(file) and not is_later_part(file)]


def _assign(file: GgufFile, weights: Sequence[Weight], idle: Iterable[str]) -> None:
    parts = parts_of_tensors(weights)
    _check_tensors(file, parts, idle)
    broken: list[str] = []
    # The largest first: what is read and not yet handed over is then never beside the whole model.
    for weight in sorted(weights, key=lambda w: -math.prod(w.variable.shape)):
        if weight.spec.kind == "embedding" and math.prod(weight.variable.shape) > _BLOCK_VALUES:
            if not _assign_in_blocks(file, weight):
                broken.append(weight.gguf)
            continue
        dtype = weight.variable.dtype
        matrix = file.read(weight.gguf, np.float32 if weight.gguf_offset else dtype)
        if not all_finite(matrix):
            broken.append(weight.gguf)
        matrix = split(matrix, weight.spec.gguf_part, len(parts[weight.gguf]))
        if weight.gguf_offset:
            matrix = matrix - np.float32(weight.gguf_offset)
        value = weight.from_matrix(matrix)
        weight.variable.assign(value.astype(dtype, copy=False))
    if broken:
        raise LoadError(
            f"{file.path} holds NaN or infinite values.", dict.fromkeys(broken), next_step=BROKEN
        )


def _assign_in_blocks(file: GgufFile, weight: Weight) -> bool:
    """Assign rows as they are read: no second array as large is in memory beside the variable.

    Returns:
        Whether all values are finite.
    """
    variable = weight.variable
    count, width = variable.shape
    step = max(1, _BLOCK_VALUES // width)
    finite = True
    value = jnp.zeros((count, width), variable.dtype)
    for start in range(0, count, step):
        rows = file.read(weight.gguf, variable.dtype, start=start, stop=start + step)
        finite &= all_finite(rows)
        # JAX copies by and by, and would keep all blocks until then.
        value = jax.block_until_ready(_put_rows(value, rows, start))
    variable.assign(value)
    return finite


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(value: jax.Array, rows: jax.Array, start: int) -> jax.Array:
    """Write rows into an array, in its place."""
    put = jax.lax.dynamic_update_slice_in_dim
    if value.dtype.itemsize != 2:
        return put(value, rows, start, axis=0)
    # XLA's CPU computes with half precision in float32, and would convert the whole array.
    bits, part = (jax.lax.bitcast_convert_type(array, jnp.uint16) for array in (value, rows))
    return jax.lax.bitcast_convert_type(put(bits, part, start, axis=0), value.dtype)


def parts_of_tensors(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """The weights that each tensor of a file holds, one of most.

    Args:
        weights: Weights of a model.

    Returns:
        Weights by the name of their tensor.
    """
    parts = collections.defaultdict(list)
    for weight in weights:
        parts[weight.gguf].append(weight)
    return dict(parts)


def tensor_shape(parts: Sequence[Weight]) -> tuple[int, ...]:
    """Return the shape of the tensor that holds these weights, all of them."""
    return joined_shape(parts[0].matrix_shape, parts[0].spec.gguf_part, len(parts))


def _check_tensors(
    file: GgufFile, tensors: Mapping[str, Sequence[Weight]], idle: Iterable[str]
) -> None:
    problems = shape_problems(
        {name: tensor_shape(parts) for name, parts in tensors.items()},
        {name: info.shape for name, info in file.tensors.items()},
        {*idle, *_COMPUTED},
    )
    kinds = {info.kind for info in file.tensors.values()}
    problems += [
        f"the quantization {kind.name} cannot be read"
        for kind in sorted(kinds)
        if not _readable(kind)
    ]
    if problems:
        raise LoadError(
            f"{file.path}: the tensors do not fit the model its metadata describe.",
            problems,
            next_step="Convert the model again, with a quantization such as Q8_0 or Q4_K_M.",
        )


def _readable(kind: gguf.GGMLQuantizationType) -> bool:
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _vocabulary(file: GgufFile) -> tuple[list[bytes], list[float], list[int]]:
    prefix = "tokenizer.ggml."
    kind = file.metadata.get(prefix + "model")
    if kind not in (*_TOKENIZERS, _MERGES_ALONE):
        raise LoadError(
            f"{file.path} must hold a SentencePiece tokenizer: {prefix}model one of "
            f"{_TOKENIZERS}. Received: {kind!r}",
            next_step="Convert the model again from the original with its tokenizer.model.",
        )
    merges = file.metadata.get(prefix + "merges")
    names = ("tokens", "scores", "token_type")
    parts: dict[str, Any] = {name: file.metadata.get(prefix + name) for name in names}
    if merges is not None and parts["scores"] is None:
        del parts["scores"]
    rows = file.tensors[_family(file).gguf_name("embed_tokens")].shape[0]
    problems = _vocabulary_problems(parts) or _misfits(parts, rows, kind)
    if problems:
        raise LoadError(
            f"{file.path}: the tokenizer is incomplete.",
            [f"{prefix}{problem}" for problem in problems],
            next_step=BROKEN,
        )
    tokens, count = parts["tokens"], _tokens_with_a_row(parts, rows)
    scores = parts["scores"].tolist() if "scores" in parts else None
    if merges is not None and (scores is None or _say_nothing(scores)):
        scores = _scores_of_merges(file, tokens, merges)
    assert scores is not None
    return tokens[:count], scores[:count], parts["token_type"].tolist()[:count]


def _misfits(parts: Mapping[str, Any], rows: int, kind: str) -> list[str]:
    count = _tokens_with_a_row(parts, rows)
    if not UNK_ID < count <= rows:
        return [f"tokens are {count}, for {rows} rows of the embedding"]
    if kind == _MERGES_ALONE and not {b"<0x00>", SPACE.encode()} <= set(parts["tokens"]):
        return ["tokens are spelled in the bytes of GPT-2, as no Gemma's are"]
    return []


def _tokens_with_a_row(parts: Mapping[str, Any], rows: int) -> int:
    """Count the tokens without those at the end that fill up, or are of media and have no row."""
    tokens, types = parts["tokens"], parts["token_type"]
    count = len(tokens)
    while count > rows and MEDIA.fullmatch(tokens[count - 1].decode("utf-8", "replace")):
        count -= 1
    while count and types[count - 1] == UNUSED:
        count -= 1
    return count


def _say_nothing(scores: Sequence[float]) -> bool:
    """Tell if scores are one number for all, or Ollama's, which are the ids."""
    return len(set(scores)) == 1 or scores == list(range(len(scores)))


def _scores_of_merges(file: GgufFile, tokens: Sequence[bytes], merges: Any) -> list[float]:
    """Scores for a file that has the merges alone.

    llama.cpp's converter reads a tokenizer.json where there is no tokenizer.model; it has none.
    """
    pairs = [merge.decode("utf-8").split(" ") for merge in merges if isinstance(merge, bytes)]
    if not isinstance(merges, list) or [len(pair) for pair in pairs] != [2] * len(merges):
        raise LoadError(
            f"{file.path}: tokenizer.ggml.merges must be pairs of pieces with a space between.",
            next_step=BROKEN,
        )
    return scores_of_merges(
        [token.decode("utf-8") for token in tokens], [(left, right) for left, right in pairs]
    )


def _vocabulary_problems(parts: Mapping[str, Any]) -> list[str]:
    missing = [f"{name} is missing" for name, part in parts.items() if part is None]
    if missing:
        return missing
    tokens, types = parts["tokens"], parts["token_type"]
    scores = parts.get("scores", np.zeros(1))
    problems = []
    if not isinstance(tokens, list) or not all(isinstance(token, bytes) for token in tokens):
        problems.append("tokens must be strings")
    if not isinstance(scores, np.ndarray) or not np.isfinite(scores).all():
        problems.append("scores must be finite numbers")
    if not isinstance(types, np.ndarray) or not np.isin(types, range(1, 7)).all():
        problems.append("token_type must hold numbers from 1 to 6")
    if problems:
        return problems
    lengths = {name: len(part) for name, part in parts.items()}
    if len(set(lengths.values())) > 1:
        return [f"tokens, scores and types differ in number: {lengths}"]
    if len(set(tokens)) < len(tokens):
        return ["tokens holds some twice"]
    return []
