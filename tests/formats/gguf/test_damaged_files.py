"""Damaged and lying GGUF files: always a `LoadError`, never a traceback or a huge allocation."""

import math
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.formats.gguf.reader import load_gguf, read_header

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10
F32 = 0
SIZES = {
    "context_length": 64,
    "embedding_length": 8,
    "block_count": 1,
    "feed_forward_length": 8,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 4,
    "attention.sliding_window": 8,
}
SHAPES = {
    "token_embd": (300, 8),
    "output_norm": (8,),
    "blk.0.attn_norm": (8,),
    "blk.0.post_attention_norm": (8,),
    "blk.0.ffn_norm": (8,),
    "blk.0.post_ffw_norm": (8,),
    "blk.0.attn_q_norm": (4,),
    "blk.0.attn_k_norm": (4,),
    "blk.0.attn_q": (8, 8),
    "blk.0.attn_k": (4, 8),
    "blk.0.attn_v": (4, 8),
    "blk.0.attn_output": (8, 8),
    "blk.0.ffn_gate": (8, 8),
    "blk.0.ffn_up": (8, 8),
    "blk.0.ffn_down": (8, 8),
}
# Python and its caches; a model of these sizes takes a few hundred kilobytes.
MEMORY = 32 << 20
quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def array(kind, values, count=None):
    pack = {STRING: text, UINT32: lambda x: struct.pack("<I", x), FLOAT32: lambda x: pack_float(x)}
    body = b"".join(pack[kind](value) for value in values)
    return struct.pack("<IQ", kind, len(values) if count is None else count) + body


def pack_float(value):
    return struct.pack("<f", value)


def tokenizer():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [f"w{number}" for number in range(38)]
    types = [3] * 6 + [6] * 256 + [1] * 38
    prefix = "tokenizer.ggml."
    return {
        prefix + "model": (STRING, text("llama")),
        prefix + "tokens": (ARRAY, array(STRING, tokens)),
        prefix + "scores": (ARRAY, array(FLOAT32, [0.0] * 300)),
        prefix + "token_type": (ARRAY, array(UINT32, types)),
    }


def pairs(**changes):
    values = {"general.architecture": (STRING, text("gemma3"))}
    values |= {f"gemma3.{key}": (UINT32, struct.pack("<I", v)) for key, v in SIZES.items()}
    values |= tokenizer()
    return [*(values | {k.replace("__", "."): v for k, v in changes.items()}).items()]


def tensors():
    """`(name, shape, kind, offset)` of a sound file; an offset of `None` is the next free."""
    return [(f"{name}.weight", shape, F32, None) for name, shape in SHAPES.items()]


def build(path, *, metadata=None, entries=None, counts=(None, None), size=None):
    metadata = pairs() if metadata is None else metadata
    entries = tensors() if entries is None else entries
    count, keys = counts
    data = b"GGUF" + struct.pack(
        "<IQQ",
        3,
        len(entries) if count is None else count,
        len(metadata) if keys is None else keys,
    )
    for key, (kind, body) in metadata:
        data += text(key) + struct.pack("<I", kind) + body
    free = 0
    for name, shape, kind, offset in entries:
        data += text(name) + struct.pack("<I", len(shape))
        data += b"".join(struct.pack("<Q", extent) for extent in reversed(shape))
        data += struct.pack("<IQ", kind, free if offset is None else offset)
        room = math.prod(shape) * 4
        free += -(-room // 32) * 32 if offset is None and room < 1 << 20 else 0
    data += b"\0" * (-len(data) % 32)
    path.write_bytes(data + b"\0" * (free if size is None else size))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


@pytest.fixture(scope="module")
def sound(path):
    return build(path).read_bytes()


def refused(path, *parts):
    """The message of the `LoadError`, raised within little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(LoadError) as caught:
            load_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak:,} bytes"
    message = str(caught.value)
    for part in (path.name, *parts):
        assert part in message
    return message


def test_the_sound_file_loads(path):
    model = load_gguf(build(path))
    assert model.backbone.num_layers == 1
    assert np.asarray(model.preprocessor.tokenizer("<start_of_turn>")).tolist() == [4]


@quick
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated(path, sound, share):
    path.write_bytes(sound[: int(share * len(sound))])
    with pytest.raises(LoadError, match="not a sound GGUF file"):
        read_header(path)


@quick
@given(
    count=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    keys=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_header_counts_that_lie(path, count, keys):
    build(path, counts=(count, keys))
    if (count, keys) in ((None, None), (len(SHAPES), None)):
        return
    refused(path)


@quick
@given(kind=st.integers(0, 2**32 - 1), count=st.integers(301, 2**64 - 1), depth=st.integers(0, 99))
def test_array_counts_that_lie(path, kind, count, depth):
    nested = struct.pack("<IQ", ARRAY, 1) * depth
    body = nested + struct.pack("<IQ", kind, count)
    build(path, metadata=[("a", (ARRAY, body)), *pairs()])
    refused(path, "not a sound GGUF file")


def test_deep_nesting(path):
    body = struct.pack("<IQ", ARRAY, 1) * 100_000 + array(UINT32, [1])
    refused(build(path, metadata=[*pairs(), ("deep", (ARRAY, body))]), "arrays are nested")


@quick
@given(
    index=st.integers(0, len(SHAPES) - 1),
    shape=st.lists(st.integers(0, 2**64 - 1), min_size=0, max_size=6),
    kind=st.integers(0, 60),
    offset=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_tensors_that_lie(path, index, shape, kind, offset):
    entries = tensors()
    name = entries[index][0]
    if tuple(shape) == entries[index][1]:
        return
    entries[index] = (name, tuple(shape), kind, offset)
    refused(build(path, entries=entries, size=4096))


@pytest.mark.slow
@quick
@given(
    key=st.sampled_from(sorted(SIZES)),
    value=st.one_of(
        st.integers(0, 2**32 - 1).map(lambda n: (UINT32, struct.pack("<I", n))),
        st.integers(0, 2**64 - 1).map(lambda n: (UINT64, struct.pack("<Q", n))),
        st.floats(width=32).map(lambda x: (FLOAT32, struct.pack("<f", x))),
        st.just((STRING, text("8"))),
        st.just((ARRAY, array(UINT32, [8, 8]))),
        st.just((BOOL, b"\1")),
    ),
)
def test_sizes_that_lie(path, key, value):
    harmless = ("context_length", "attention.sliding_window")
    if key in harmless or value == (UINT32, struct.pack("<I", SIZES[key])):
        return
    build(path, metadata=pairs(**{f"gemma3__{key.replace('.', '__')}": value}))
    refused(path)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length"])
def test_a_giant_is_refused_before_it_is_built(path, key):
    giant = (UINT32, struct.pack("<I", 4_000_000_000))
    build(path, metadata=pairs(**{f"gemma3__{key}": giant}))
    refused(path, f"gemma3.{key} must be a whole number, not 4000000000")


def test_more_blocks_than_there_are_tensors(path):
    many = (UINT32, struct.pack("<I", 5_000_000))
    refused(build(path, metadata=pairs(gemma3__block_count=many)), "tensors of 1 are there")


def test_duplicate_names(path):
    entries = tensors()
    refused(build(path, entries=[*entries, entries[3]]), "is there twice")
    twice = [*pairs(), ("gemma3.block_count", (UINT32, struct.pack("<I", 2)))]
    refused(build(path, metadata=twice), "the key 'gemma3.block_count' is there twice")


def test_tensors_on_one_another(path):
    entries = [(name, shape, kind, 0) for name, shape, kind, _ in tensors()]
    refused(build(path, entries=entries, size=20_000), "overlaps")


@pytest.mark.parametrize("alignment", [(UINT32, b"\0" * 4), (STRING, text("x")), (BOOL, b"\0")])
def test_alignment(path, alignment):
    refused(build(path, metadata=pairs(general__alignment=alignment)), "general.alignment")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", (UINT32, b"\0" * 4)),
        ("model", (ARRAY, array(UINT32, [1, 2]))),
        ("tokens", (STRING, text("x"))),
        ("tokens", (ARRAY, array(UINT32, range(300)))),
        ("tokens", (ARRAY, array(STRING, ["twice"] * 300))),
        ("tokens", (ARRAY, array(STRING, [b"\xff" + b"x" * i for i in range(300)]))),
        ("scores", (ARRAY, array(FLOAT32, [float("nan")] * 300))),
        ("scores", (ARRAY, array(FLOAT32, [0.0] * 299))),
        ("scores", (FLOAT32, pack_float(1))),
        ("token_type", (ARRAY, array(UINT32, [9] * 300))),
        ("token_type", (ARRAY, array(STRING, ["1"] * 300))),
        ("token_type", (ARRAY, array(UINT32, [6] * 300))),
    ],
)  # fmt: skip
def test_tokenizer_that_lies(path, key, value):
    refused(build(path, metadata=pairs(**{f"tokenizer__ggml__{key}": value})))


@pytest.mark.parametrize("key", ["general__architecture", "general__type"])
def test_general_of_a_wrong_type(path, key):
    refused(build(path, metadata=pairs(**{key: (ARRAY, array(UINT32, [1, 2]))})))


@quick
@given(position=st.integers(0, 1200), value=st.integers(0, 255))
def test_one_byte_changed(path, sound, position, value):
    data = bytearray(sound)
    data[position] = value
    path.write_bytes(data)
    try:
        file = read_header(path)
    except LoadError:
        return
    assert sum(info.size for info in file.tensors.values()) <= len(data)


def test_kinds_are_those_of_gguf():
    assert gguf.GGUFValueType.ARRAY == ARRAY
    assert gguf.GGUFValueType.UINT64 == UINT64
