"""GGUF files as other tools leave them: Ollama's blobs, mistyped marks, merges without scores."""

import gguf
import numpy as np
import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.formats.gguf.reader import read_header
from gemma_keras_tune.formats.gguf.writer import _add
from gemma_keras_tune.formats.hugging_face.tokenizer import merge_rules
from gemma_keras_tune.gemma.vocabularies import NORMAL, UNUSED, sentencepiece_messages
from gemma_keras_tune.loading.loader import load

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
SCORES, MERGES = "tokenizer.ggml.scores", "tokenizer.ggml.merges"
TEXTS = ("part number for 12", "a  b   c", "<start_of_turn>user\nGrüße 😀<end_of_turn>\n", " x\n\n")
ONES = np.ones((2, 2), "float32")


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model("gemma3")


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return gkt.export(model, path, format="gguf", dtype="float32", check=False, verbose=0)


def changed(path, to, *, tensors=None, keys=None):
    """The same file with other metadata (`None` leaves a key out) and more tensors."""
    file = read_header(path)
    writer = gguf.GGUFWriter(to, "gemma3")
    for key, value in {**file.metadata, **(keys or {})}.items():
        if key == "general.architecture" or value is None:
            continue
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if isinstance(value, list):
            value = [v.decode() if isinstance(v, bytes) else v for v in value]
        _add(writer, key, value)
    for name in file.tensors:
        writer.add_tensor(name, file.read(name))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def assert_same(loaded, model):
    for a, b in zip(loaded.backbone.weights, model.backbone.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=a.path)
    for text in TEXTS:
        ids = np.asarray(model.preprocessor.tokenizer(text))
        np.testing.assert_array_equal(np.asarray(loaded.preprocessor.tokenizer(text)), ids)


def test_a_blob_of_ollama_loads_its_text(model, file, tmp_path):
    names = ("v.blk.0.attn_q.weight", "v.position_embd.weight", "mm.input_projection.weight")
    tensors = dict.fromkeys((*names, "a.conv1d.0.weight"), ONES)
    tensors["output.weight"] = read_header(file).read("token_embd.weight")
    keys = {
        "gemma3.rope.freq_base": None,
        "gemma3.rope.freq_base_swa": None,
        "gemma3.rope.global.freq_base": 1e6,
        "gemma3.rope.local.freq_base": 1e4,
        "gemma3.vision.block_count": 27,
    }
    blob = changed(file, tmp_path / "sha256-1234", tensors=tensors, keys=keys)
    with pytest.warns(UserWarning) as told:
        loaded = load(blob)
    (line,) = [str(warning.message) for warning in told]
    assert "vision (2 tensors), projector (1 tensors), audio (1 tensors) left out" in line
    assert_same(loaded, model)
    keys["gemma3.rope.local.freq_base"] = 5.0
    with pytest.raises(LoadError, match=r"rope\.freq_base_swa is 5, and KerasHub's model has"):
        load(changed(file, tmp_path / "other", keys=keys))


def test_a_head_that_is_not_the_embedding_is_refused(file, tmp_path):
    head = read_header(file).read("token_embd.weight") + 1
    with pytest.raises(LoadError, match=r"output\.weight, is not the embedding"):
        load(changed(file, tmp_path / "m.gguf", tensors={"output.weight": head}))


@pytest.mark.parametrize(("layers", "factor"), [(2, 1.0), (34, 8.0)])
def test_the_stretch_that_ollama_leaves_out(layers, factor, tmp_path):
    model = testing.tiny_model("gemma3", num_layers=layers, hidden_dim=8, intermediate_dim=8)
    file = gkt.export(model, tmp_path / "m.gguf", format="gguf", check=False, verbose=0)
    assert load(file).backbone.global_rope_scaling_factor == 1.0
    names = ("gemma3.rope.scaling.type", "gemma3.rope.scaling.factor")
    bare = changed(file, tmp_path / "bare.gguf", keys=dict.fromkeys(names))
    assert load(bare).backbone.global_rope_scaling_factor == factor


def test_the_tower_alone_names_the_text_model(file, tmp_path):
    load_me = changed(file, tmp_path / "text.gguf")
    tower = changed(file, tmp_path / "mmproj.gguf", keys={"general.type": "mmproj"})
    with pytest.raises(LoadError, match="sees or hears for a model") as caught:
        load(tower)
    assert str(load_me) in str(caught.value)


def test_marks_that_are_called_normal_are_repaired(model, file, tmp_path):
    header = read_header(file)
    types = header.metadata[TYPES].copy()
    for mark in (b"<start_of_turn>", b"<end_of_turn>"):
        types[header.metadata[TOKENS].index(mark)] = NORMAL
    with pytest.warns(UserWarning, match="'<start_of_turn>', '<end_of_turn>' had a type"):
        loaded = load(changed(file, tmp_path / "m.gguf", keys={TYPES: types}))
    assert_same(loaded, model)


def merges_of(model):
    pieces = sentencepiece_messages().ModelProto.FromString(model.preprocessor.tokenizer.proto)
    return [f"{left} {right}" for left, right in merge_rules(pieces.pieces)]


def test_a_tokenizer_of_merges_alone(model, file, tmp_path):
    """As llama.cpp's converter writes a `tokenizer.json` that comes without `tokenizer.model`."""
    types = read_header(file).metadata[TYPES].copy()
    types[types == 6] = NORMAL  # bytes, too
    keys = {"tokenizer.ggml.model": "gpt2", SCORES: None, MERGES: merges_of(model), TYPES: types}
    assert_same(load(changed(file, tmp_path / "m.gguf", keys=keys)), model)
    keys |= {"tokenizer.ggml.model": "llama", SCORES: [float(i) for i in range(len(types))]}
    assert_same(load(changed(file, tmp_path / "ollama.gguf", keys=keys)), model)
    keys = {"tokenizer.ggml.model": "gpt2", SCORES: None}
    with pytest.raises(LoadError, match=r"tokenizer\.ggml\.scores is missing"):
        load(changed(file, tmp_path / "none.gguf", keys=keys))


def test_a_tokenizer_of_gpt2_is_refused(model, file, tmp_path):
    tokens = [t.replace("▁".encode(), "Ġ".encode()) for t in read_header(file).metadata[TOKENS]]
    keys = {"tokenizer.ggml.model": "gpt2", MERGES: merges_of(model), TOKENS: tokens}
    with pytest.raises(LoadError, match="spelled in the bytes of GPT-2"):
        load(changed(file, tmp_path / "m.gguf", keys=keys))


def test_tokens_that_fill_up_are_no_tokens(model, file, tmp_path):
    header = read_header(file)
    count = len(header.metadata[TOKENS])
    types = header.metadata[TYPES].copy()
    types[-3:] = UNUSED
    loaded = load(changed(file, tmp_path / "m.gguf", keys={TYPES: types}))
    assert loaded.preprocessor.tokenizer.vocabulary_size() == count - 3
    keys = {
        TOKENS: [*header.metadata[TOKENS], b"<image_soft_token_2>"],
        TYPES: [*header.metadata[TYPES].tolist(), 3],
        SCORES: [*header.metadata[SCORES].tolist(), -1.0],
    }
    assert_same(load(changed(file, tmp_path / "media.gguf", keys=keys)), model)
