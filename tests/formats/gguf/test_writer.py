import importlib.util
import json
import os
import pathlib
import re
import shutil
import warnings

import gguf
import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma_keras_tune.adapters.lora import enable_lora, get_factors, lora_linears, set_factors
from gemma_keras_tune.errors import ExportError, LoadError
from gemma_keras_tune.exporting import llama_cpp
from gemma_keras_tune.exporting.exporter import export as gkt_export
from gemma_keras_tune.exporting.verifying import verify
from gemma_keras_tune.formats.gguf import adapter as gguf_adapter
from gemma_keras_tune.formats.gguf import k_quants, ollama
from gemma_keras_tune.formats.gguf import writer as gguf_writer
from gemma_keras_tune.formats.gguf.reader import TEMPLATE_KEY, read_header
from gemma_keras_tune.formats.weights import merged_weights
from gemma_keras_tune.gemma.families import backbone_inputs, family_of
from gemma_keras_tune.gemma.state import is_instruct
from gemma_keras_tune.gemma.templates import TEMPLATES, attach_template, get_template, template_of
from gemma_keras_tune.generation.answers import generate
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.loading.package import package_file
from gemma_keras_tune.pairs import Message
from gemma_keras_tune.testing import tiny_model

TEXTS = ("part number for 12", "a  b   c", "<start_of_turn>user\nGrüße 😀<end_of_turn>\n", " x\n\n")
IDS = [2, 9, 300, 41, 5, 77, 88, 99, 100, 200, 222, 111]


def export(model, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    gguf_writer.write(model, folder, **options)
    return folder / gguf_writer.FILE_NAME


def train_a_little(model, **options):
    """LoRA whose factors are random, as if it had been trained."""
    enable_lora(model, 2, verbose=0, **options)
    random = np.random.default_rng(3)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, random.normal(0, 0.3, b.shape).astype("float32"))


def log_probabilities(model, ids):
    inputs = backbone_inputs(model.backbone, np.array([ids]), np.ones((1, len(ids))))
    head = family_of(model).head(model)
    logits = np.asarray(model.backbone(inputs), "float64")[0] @ np.asarray(head.embedding).T
    if head.soft_cap:
        logits = head.soft_cap * np.tanh(logits / head.soft_cap)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma3", hidden_dim=32, intermediate_dim=32, num_layers=1)


def scatter_norms(model):
    """Norms of all magnitudes: adding 1 in float32 takes bits from the small ones."""
    random = np.random.default_rng(5)
    for weight in family_of(model).weights(model):
        if weight.gguf_offset:
            shape = tuple(weight.variable.shape)
            weight.variable.assign(random.normal(size=shape) * 10.0 ** random.uniform(-9, 3, shape))


def assert_read_back(loaded, original):
    for a, b in zip(*(family_of(m).weights(m) for m in (loaded, original)), strict=True):
        found, expected = np.asarray(a.variable, "float64"), np.asarray(b.variable, "float64")
        if b.gguf_offset:  # float32 holds 1 + norm with an error of 6e-8 of it
            np.testing.assert_allclose(1 + found, 1 + expected, rtol=1e-7, err_msg=a.path)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=a.path)


# The file.


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_float32_loads_back(family, tmp_path):
    # The heads together are twice as wide as the model: no axis can stand for another.
    original = tiny_model(family)
    backbone = original.backbone
    assert backbone.num_query_heads * backbone.head_dim != backbone.hidden_dim
    scatter_norms(original)
    calls = []
    path = export(original, tmp_path, dtype="float32", progress=lambda *call: calls.append(call))
    loaded = load(path)
    assert_read_back(loaded, original)
    for text in TEXTS:
        np.testing.assert_array_equal(
            np.asarray(loaded.preprocessor.tokenizer(text)),
            np.asarray(original.preprocessor.tokenizer(text)),
        )
    names = [weight.gguf for weight in family_of(original).weights(original)]
    assert calls == [(name, n, len(names)) for n, name in enumerate(names, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kinds", "tolerance"),
    [
        ({"dtype": "float16"}, {"F16", "F32"}, 1e-3),
        ({"dtype": "bfloat16"}, {"BF16", "F32"}, 8e-3),
        ({"quantization": "q8_0"}, {"Q8_0", "F32"}, 1e-2),
        ({"quantization": "Q4_0"}, {"Q4_0", "Q8_0", "F32"}, 0.13),
    ],
)
def test_smaller_files(options, kinds, tolerance, model, tmp_path):
    path = export(model, tmp_path, **options)
    file = read_header(path)
    assert {info.kind.name for info in file.tensors.values()} == kinds
    assert all((i.kind.name == "F32") == (len(i.shape) == 1) for i in file.tensors.values())
    for weight in family_of(model).weights(model):
        value = weight.to_matrix(np.asarray(weight.variable)) + weight.gguf_offset
        largest = np.abs(value).max()
        np.testing.assert_allclose(file.read(weight.gguf), value, atol=tolerance * largest)


# llama.cpp has most of Gemma 3n's sizes in its code.
GEMMA3N = dict(
    num_hidden_layers=25,
    num_kv_shared_layers=5,
    layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 5,
    intermediate_size=[24] * 25,
    activation_sparsity_pattern=[0.95] * 10 + [0.0] * 15,
    altup_num_inputs=4,
    laurel_rank=64,
    hidden_size_per_layer_input=256,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3n", GEMMA3N),
        ("gemma4", {}),
        ("gemma4", {"use_double_wide_mlp": True}),
        ("gemma4", {"moe": True}),
        ("gemma4", {"final_logit_soft_cap": None, "num_kv_shared_layers": 0, "global_head_dim": 8}),
    ],
)
def test_gemma3n_and_4_come_back_exactly(family, options, tmp_path):
    original = tiny_model(family, **options)
    path = export(original, tmp_path, dtype="float32")
    loaded = load(path)
    for a, b in zip(loaded.backbone.weights, original.backbone.weights, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.path)
    np.testing.assert_allclose(
        log_probabilities(loaded, IDS), log_probabilities(original, IDS), atol=1e-5
    )
    for text in TEXTS:
        ids = np.asarray(original.preprocessor.tokenizer(text))
        np.testing.assert_array_equal(np.asarray(loaded.preprocessor.tokenizer(text)), ids)


@pytest.fixture(scope="module")
def gemma4_file(tmp_path_factory):
    return export(tiny_model("gemma4", num_layers=2), tmp_path_factory.mktemp("gemma4"))


def changed(path, folder, **metadata):
    """The same file with other metadata, its tensors left where they are."""
    file = read_header(path)
    writer = gguf.GGUFWriter(folder / "changed.gguf", "gemma4")
    for key, value in {**file.metadata, **metadata}.items():
        if key != "general.architecture" and value is not None:
            value = value.tolist() if isinstance(value, np.ndarray) else value
            if isinstance(value, list):
                value = [v.decode() if isinstance(v, bytes) else v for v in value]
            gguf_writer._add(writer, key, value)
    for name in file.tensors:
        writer.add_tensor(name, file.read(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "changed.gguf"


def test_merges_stand_for_scores_where_there_are_none(gemma4_file, tmp_path):
    scores = "tokenizer.ggml.scores"
    count = len(read_header(gemma4_file).metadata[scores])
    path = changed(gemma4_file, tmp_path, **{scores: [-1000.0] * count})
    expected, found = load(gemma4_file).preprocessor.tokenizer, load(path).preprocessor.tokenizer
    for text in TEXTS:
        np.testing.assert_array_equal(np.asarray(found(text)), np.asarray(expected(text)))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("attention.sliding_window_pattern", None, "must be 2 flags, one for each layer"),
        ("attention.head_count_kv", [2, 2, 2], "head_count_kv must be 2 whole numbers"),
        ("feed_forward_length", [24, 25], "must be one width, doubled at most in"),
        ("attention.sliding_window", None, "attention.sliding_window is missing"),
    ],
)
def test_gemma4_with_other_metadata_is_refused(key, value, told, gemma4_file, tmp_path):
    with pytest.raises(LoadError, match=told):
        load(changed(gemma4_file, tmp_path, **{f"gemma4.{key}": value}))


def test_auto_keeps_bfloat16(model, tmp_path):
    path = export(model, tmp_path)
    assert read_header(path).metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    loaded = load(path, dtype="bfloat16")
    kinds = {i.kind.name for i in read_header(export(loaded, tmp_path / "b")).tensors.values()}
    assert kinds == {"BF16", "F32"}


def test_rows_that_fill_no_block_are_float16(tmp_path):
    file = read_header(export(tiny_model("gemma3"), tmp_path, quantization="Q8_0"))
    assert file.tensors["blk.0.attn_q.weight"].kind.name == "F16"
    assert file.tensors["blk.0.attn_output.weight"].kind.name == "Q8_0"


@pytest.mark.slow
def test_lora_is_merged(tmp_path):
    tuned = tiny_model("gemma3")
    train_a_little(tuned)
    loaded = load(export(tuned, tmp_path, dtype="float32"))
    np.testing.assert_allclose(
        log_probabilities(loaded, IDS), log_probabilities(tuned, IDS), atol=1e-3
    )
    base = log_probabilities(tiny_model("gemma3"), IDS)
    assert np.abs(log_probabilities(loaded, IDS) - base).max() > 0.1


def test_the_template_goes_along(tmp_path):
    tuned = tiny_model("gemma3")
    template = get_template(tuned, "Q: {prompt}\nA: {response}")
    attach_template(tuned, template)
    path = export(tuned, tmp_path)
    assert template_of(load(path)) == template
    assert is_instruct(load(path)) is True
    jinja = read_header(path).metadata["tokenizer.chat_template"]
    text = (
        ImmutableSandboxedEnvironment()
        .from_string(jinja)
        .render(messages=[{"role": "user", "content": "1?"}], bos_token="<bos>")
    )
    assert text == "<bos>Q: 1?\nA:"


def test_turns_set_the_end_of_turn_token(model, tmp_path):
    metadata = read_header(export(model, tmp_path)).metadata
    token = model.preprocessor.tokenizer.token_to_id("<end_of_turn>")
    assert metadata["tokenizer.ggml.eot_token_id"] == token
    assert metadata["tokenizer.ggml.eos_token_id"] == 1
    assert json.loads(metadata[TEMPLATE_KEY])["turns"] == "gemma3"


def test_a_function_as_template_is_left_out_with_a_warning(tmp_path):
    tuned = tiny_model("gemma3")
    attach_template(tuned, get_template(tuned, lambda messages: "x"))
    path = export(tuned, tmp_path)
    assert "tokenizer.chat_template" not in read_header(path).metadata
    with pytest.warns(UserWarning, match="its template is left out"):
        assert template_of(load(path)) is None


@pytest.mark.slow
def test_gemma3n_of_other_sizes_than_llama_cpp_has_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no words for some settings of this Gemma 3n") as caught:
        export(tiny_model("gemma3n", **GEMMA3N | {"laurel_rank": 4}), tmp_path)
    assert caught.value.problems == ("laurel_rank is 4; llama.cpp computes with 64",)


@pytest.mark.slow
def test_rows_for_images_and_sounds_stay_behind(tmp_path):
    original = tiny_model("gemma3n", **GEMMA3N, text_vocab_size=640)
    loaded = load(export(original, tmp_path, dtype="float32"))
    rows, kept = (np.asarray(family_of(m).head(m).embedding) for m in (original, loaded))
    assert rows.shape == (640, 16)
    np.testing.assert_array_equal(kept, rows[:600])


def test_settings_without_a_word_in_gguf_are_all_named(tmp_path):
    odd = tiny_model("gemma3", query_head_dim_normalize=False, final_logit_soft_cap=30.0)
    with pytest.raises(ExportError) as caught:
        export(odd, tmp_path)
    problems = "\n".join(caught.value.problems)
    assert "query_head_dim_normalize is False; llama.cpp computes with True" in problems
    assert "final_logit_soft_cap is 30.0; llama.cpp computes with None" in problems
    assert len(caught.value.problems) == 2


def test_wrong_options(model, tmp_path):
    with pytest.raises(ExportError, match="`quantization` must be one of"):
        export(model, tmp_path, quantization="Q4_K_X")
    with pytest.raises(ExportError, match="`dtype` must be 'auto' or one of"):
        export(model, tmp_path, dtype="int8")


def test_k_quants_need_the_quantizer(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="llama-quantize, which is not on the PATH") as caught:
        gguf_writer.write(model, tmp_path / "out", quantization="q4_k_m")
    assert "brew install llama.cpp" in str(caught.value)
    assert "'Q8_0' and 'Q4_0'" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def quantizing_program(folder, monkeypatch, *lines):
    program = folder / "llama-quantize"
    program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return str(program)


def test_the_program_is_given_the_name(model, tmp_path, monkeypatch):
    quantizing_program(tmp_path, monkeypatch, 'test "$#" = 3 && cp "$1" "$2" && echo "$3" >>"$2"')
    gguf_writer.write(model, tmp_path, quantization="q5_k_s", file_name="x.gguf")
    assert (tmp_path / "x.gguf").read_bytes().endswith(b"Q5_K_S\n")


@pytest.mark.parametrize(
    ("line", "said"), [("echo no such kind >&2; exit 1", "no such kind"), ("exit 3", "exit code 3")]
)
def test_a_quantizer_that_fails_leaves_nothing(line, said, model, tmp_path, monkeypatch):
    quantizing_program(tmp_path, monkeypatch, line)
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=rf"could not write Q6_K.*\n.*{said}"):
        gguf_writer.write(model, tmp_path / "out", quantization="Q6_K")
    assert not list((tmp_path / "out").iterdir())


def test_a_program_that_cannot_be_run_is_named(model, tmp_path, monkeypatch):
    program = pathlib.Path(quantizing_program(tmp_path, monkeypatch))
    program.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(ExportError, match="llama-quantize cannot be run: "):
        gguf_writer.write(model, tmp_path, quantization="Q6_K", file_name="x.gguf")
    assert list(tmp_path.iterdir()) == [program]


needs_quantizer = pytest.mark.skipif(
    shutil.which("llama-quantize") is None, reason="llama.cpp's llama-quantize is not on the PATH"
)


@needs_quantizer
def test_the_quantizer_tells_why_it_fails(tmp_path):
    files = tmp_path / "is_not_there.gguf", tmp_path / "x.gguf"
    with pytest.raises(ExportError, match=r"could not write Q6_K.*\n(.*\n)*.*is_not_there\.gguf"):
        k_quants.quantize(k_quants.find_quantizer(), *files, "Q6_K")


@pytest.fixture(scope="module")
def wide_model():
    """With rows of 256 values, as K-quants want them."""
    sizes = dict(num_layers=1, hidden_dim=256, intermediate_dim=512, head_dim=64)
    return tiny_model("gemma3", **sizes)


@needs_quantizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_k_quant(dtype, wide_model, tmp_path):
    source, program = export(wide_model, tmp_path, dtype=dtype), k_quants.find_quantizer()
    for quantization in k_quants.K_QUANTS:
        path = tmp_path / f"{quantization}.gguf"
        k_quants.quantize(program, source, path, quantization)
        kinds = {tensor.kind.name for tensor in read_header(path).tensors.values()}
        assert quantization[:4] in kinds
        number = gguf.GGUFReader(path).get_field("general.file_type").contents()
        assert gguf.LlamaFileType(number).name == f"MOSTLY_{quantization}"


@needs_quantizer
@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_k_quants(quantization, wide_model, tmp_path):
    path = gkt_export(
        wide_model, tmp_path / "x.gguf", quantization=quantization, check=True, verbose=0
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.gguf", "x.gguf.receipt.json"]
    kinds = {tensor.kind.name for tensor in read_header(path).tensors.values()}
    assert {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K"}[quantization] in kinds
    theirs = {weight.path: value for weight, value in merged_weights(load(path))}
    for weight, value in merged_weights(wide_model):
        assert np.abs(theirs[weight.path] - value).max() < 0.1 * np.abs(value).max(), weight.path
    if importlib.util.find_spec("xllamacpp"):
        assert verify(path).passed


def test_values_beyond_float16(tmp_path):
    large = tiny_model("gemma3", num_layers=1)
    kernel = large.backbone.transformer_layers[0].gating_ffw._kernel
    kernel.assign(np.asarray(kernel) * 1e6)
    with pytest.raises(ExportError, match=r"blk\.0\.ffn_gate\.weight holds values up to"):
        export(large, tmp_path, dtype="float16")


# llama.cpp.


def all_logits(runtime, ids):
    """Log-probabilities after each token: llama.cpp tells those at the end of a prompt alone."""
    return np.stack([runtime.next_logits(ids[: end + 1]) for end in range(len(ids))])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gemma", {}),
        ("gemma2", {}),
        # Its sixth layer is the first that sees everything.
        ("gemma3", {"num_layers": 7}),
        # llama.cpp takes the unbiased deviation for the sparse layers: wide ones hardly notice.
        ("gemma3n", GEMMA3N | {"intermediate_size": [2048] * 25}),
        ("gemma4", {"use_double_wide_mlp": True}),
        ("gemma4", {"moe": True}),
    ],
)
def test_llama_cpp_computes_the_same(family, sizes, tmp_path):
    pytest.importorskip("xllamacpp")
    original = tiny_model(family, **sizes)
    runtime = llama_cpp.open_runtime(export(original, tmp_path, dtype="float32").parent)
    try:
        for text in TEXTS:
            ids = np.asarray(original.preprocessor.tokenizer(text)).tolist()
            assert runtime.tokenize(text) == [2, *ids]
        expected = log_probabilities(original, IDS)
        # llama.cpp rounds to float16 on its way; a wrong layout or setting gives 1 and more.
        tolerance = {"gemma3n": 3e-1, "gemma4": 1e-1}.get(family, 2e-2)
        np.testing.assert_allclose(all_logits(runtime, IDS), expected, atol=tolerance)
        found = runtime.generate(IDS, 6)
        steps = log_probabilities(original, IDS + found)[len(IDS) - 1 : -1]
        # Random weights leave near ties: the likeliest, or as likely but for rounding.
        assert len(found) == 6
        assert (steps.max(-1) - steps[range(6), found] < tolerance).all()
    finally:
        runtime.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "stops"), [("<eos>", True), ("<end_of_turn>", True), ("<img>", False)]
)
def test_llama_cpp_stops_by_itself(token, stops, tmp_path):
    pytest.importorskip("xllamacpp")
    original = tiny_model("gemma3")
    inputs = {"token_ids": np.array([IDS]), "padding_mask": np.ones((1, len(IDS)))}
    last = np.asarray(original.backbone(inputs))[0, -1]
    embeddings = original.backbone.token_embedding.embeddings
    rows = np.asarray(embeddings).copy()
    rows[original.preprocessor.tokenizer.token_to_id(token)] = 20 * last
    embeddings.assign(rows)
    runtime = llama_cpp.open_runtime(export(original, tmp_path, dtype="float32"))
    try:
        found = runtime.generate(IDS, 1)
        assert found == ([] if stops else [original.preprocessor.tokenizer.token_to_id(token)])
    finally:
        runtime.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_llama_cpp_applies_the_adapter(family, tmp_path):
    pytest.importorskip("xllamacpp")
    tuned = tiny_model(family)
    base = export(tuned, tmp_path, dtype="float32")
    train_a_little(tuned, use_rslora=True, alpha=3.0)
    gguf_adapter.write(tuned, tmp_path)
    runtime = llama_cpp.open_runtime(base, adapter=tmp_path / gguf_adapter.FILE_NAME)
    try:
        expected = log_probabilities(tuned, IDS)
        np.testing.assert_allclose(all_logits(runtime, IDS), expected, atol=2e-2)
    finally:
        runtime.close()


@pytest.mark.slow
def test_llama_cpp_refuses_a_broken_file(tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ExportError, match=r"llama\.cpp cannot load"):
        llama_cpp.open_runtime(tmp_path)


def test_without_the_runtime(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ExportError, match="pip install xllamacpp"):
        llama_cpp.open_runtime(tmp_path)


@pytest.mark.real
def test_real_model(tmp_path):
    pytest.importorskip("xllamacpp")
    original = load("package://gemma3_270m")
    path = export(original, tmp_path, dtype="float32")
    source = read_header(package_file()).metadata
    ours = read_header(path).metadata
    prefix = "tokenizer.ggml."
    assert ours[prefix + "tokens"] == source[prefix + "tokens"]
    for name in ("scores", "token_type"):
        np.testing.assert_array_equal(ours[prefix + name], source[prefix + name])
    same = [key for key in source if key.startswith(("gemma3.", prefix + "add_"))]
    different = [key for key in same if ours.get(key, False) != source[key]]
    assert not different
    loaded = load(path)
    assert_read_back(loaded, original)
    del loaded
    prompts = [
        "Monday, Tuesday, Wednesday,",
        "The capital of France is",
        "def add(a, b):\n    return",
    ]
    template = get_template(original, "{prompt}{response}")
    expected = generate(original, prompts, template=template, max_new_tokens=16)
    runtime = llama_cpp.open_runtime(path)
    try:
        for prompt, answer in zip(prompts, expected, strict=True):
            ids = runtime.tokenize(prompt)
            assert ids[1:] == np.asarray(original.preprocessor.tokenizer(prompt)).tolist()
            found = runtime.generate(ids, 16)
            text = original.preprocessor.tokenizer.detokenize(np.array([found], "int32"))
            assert str(text[0]).strip() == answer
    finally:
        runtime.close()


# The adapter.


def test_adapter_keys(tmp_path):
    tuned = tiny_model("gemma2")
    train_a_little(tuned, alpha=6.0)
    gguf_adapter.write(tuned, tmp_path)
    file = read_header(tmp_path / "adapter.gguf")
    assert file.metadata["general.architecture"] == "gemma2"
    assert file.metadata["general.type"] == "adapter"
    assert file.metadata["adapter.type"] == "lora"
    assert file.metadata["adapter.lora.alpha"] == 6.0
    linears = lora_linears(tuned)
    assert len(file.tensors) == 2 * len(linears)
    for linear in linears:
        a, b, _ = get_factors(linear)
        np.testing.assert_array_equal(file.read(f"{linear.gguf}.weight.lora_a"), a)
        np.testing.assert_array_equal(file.read(f"{linear.gguf}.weight.lora_b"), b)


def test_adapter_that_cannot_be_written(model, tmp_path):
    with pytest.raises(ExportError, match="LoRA is not on"):
        gguf_adapter.write(model, tmp_path)
    tuned = tiny_model("gemma3", num_layers=1)
    train_a_little(tuned)
    with pytest.raises(ExportError, match="`dtype` must be"):
        gguf_adapter.write(tuned, tmp_path, dtype="int8")
    a, b, _ = get_factors(lora_linears(tuned)[0])
    set_factors(lora_linears(tuned)[0], a, b * np.nan)
    with pytest.raises(ExportError) as caught:
        gguf_adapter.write(tuned, tmp_path)
    assert caught.value.problems == ("decoder_block_0/attention/query: its LoRA",)
    with pytest.raises(ExportError, match="Gemma 3n"):
        gguf_adapter.write(tiny_model("gemma3n"), tmp_path)
    assert not list(tmp_path.iterdir())


# Ollama.


INSTRUCTIONS = ("FROM", "TEMPLATE", "SYSTEM", "LICENSE", "PARAMETER", "MESSAGE", "ADAPTER")


def parse_modelfile(text):
    """`{instruction: [arguments]}`, by Ollama's grammar. What does not fit it is an error."""
    found: dict[str, list[str]] = {}
    while text:
        name, _, rest = text.partition(" ")
        assert name in INSTRUCTIONS, text[:60]
        if name == "PARAMETER":
            name, _, rest = rest.partition(" ")
            assert name in ("temperature", "top_k", "repeat_penalty", "num_ctx", "stop"), name
        if rest.startswith('"""'):
            value, end, text = rest[3:].partition('"""')
            assert end and text.startswith("\n"), "quotes are left open"
            text = text[1:]
        else:
            value, end, text = rest.partition("\n")
            assert end, "the last line does not end"
            if value.startswith('"'):
                value = json.loads(value)
        found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize(
    "text",
    ["FORM ./x\n", 'TEMPLATE """x\n', "FROM ./x", "PARAMETER heat 3\n", 'PARAMETER stop "a\n'],
)
def test_the_parser_refuses_what_ollama_would(text):
    with pytest.raises((AssertionError, ValueError)):
        parse_modelfile(text)


def go(template, *, system="", prompt="", response=None):
    """What Go makes of the few constructs used, and Ollama of the rest."""
    if response is None:
        template = template.partition("{{ .Response }}")[0]
    chosen = r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}"
    text = re.sub(chosen, lambda m: m[1 if system else 2], template, flags=re.DOTALL)
    text = re.sub(r'\{\{ ("(?:[^"\\]|\\.)*") \}\}', lambda m: json.loads(m[1]), text)
    for name, value in (("System", system), ("Prompt", prompt), ("Response", response or "")):
        text = text.replace("{{ ." + name + " }}", value)
    return text


TEMPLATE_SPECS = [
    TEMPLATES["gemma3"],
    TEMPLATES["plain"],
    "Q: {prompt}\nA: {response}",
    'System: {system}\nUser "it": {prompt}\n{{"answer"}}: {response}<end_of_turn>\n---\n',
]


@pytest.mark.parametrize("spec", TEMPLATE_SPECS, ids=str)
def test_ollama_writes_the_prompts_of_training(spec, model):
    template = get_template(model, spec)
    text = ollama.go_template(template)
    user, answer, again = Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "So?")
    system = Message("system", "Be brief.")

    def ours(*messages):
        return "".join(s.text for s in template.segments(messages, generation_prompt=True))

    assert go(text, prompt="Hi") == ours(user)
    assert go(text, system="Be brief.", prompt="Hi") == ours(system, user)
    expected = ours(system, user, answer, again)
    # An answer's leading space, where a template has one, is in what the model wrote.
    reply = expected.partition("Yo")[0].removeprefix(ours(system, user)) + "Yo"
    first = go(text, system="Be brief.", prompt="Hi", response=reply)
    assert first + go(text, prompt="So?") == expected


def test_ollama_folder(tmp_path):
    tuned = tiny_model("gemma3", num_layers=1)
    ollama.write(tuned, tmp_path, quantization="Q8_0")
    parts = parse_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert parts["FROM"] == ["./model.gguf"]
    assert parts["stop"] == ["<end_of_turn>", "<eos>"]
    # Greedy, as `generate`.
    assert parts["temperature"] == ["0"] and parts["repeat_penalty"] == ["1"]
    assert int(parts["num_ctx"][0]) >= 8192
    assert go(parts["TEMPLATE"][0], prompt="Hi") == (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
    assert "ai.google.dev/gemma/terms" in parts["LICENSE"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / "model.gguf").backbone.num_layers == 1


def test_ollama_refuses_a_function(model):
    with pytest.raises(ExportError, match="which Ollama cannot run"):
        ollama.modelfile(get_template(model, lambda messages: "x"))
