"""The receipt beside the weights: written, read back, and refused where it is none."""

import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune._support.files import sha256
from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
from gemma_keras_tune.exporting.receipts import (
    FILE_NAME,
    NOT_CHECKED,
    Receipt,
    read_receipt,
    receipt_path,
    record_answers,
)
from gemma_keras_tune.gemma.families import backbone_inputs


@pytest.fixture(scope="module")
def model():
    model = testing.tiny_model("gemma3", num_layers=1)
    gkt.enable_lora(model, rank=2, verbose=0)
    draw = np.random.default_rng(0)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, 0.3 * draw.normal(size=b.shape).astype("float32"))
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("receipts") / "adapter"
    return gkt.save_adapter(model, path, check=True, prompts=["Hello!", "part number 7"])


def test_a_receipt_says_what_was_written(model, folder):
    receipt = read_receipt(folder)
    assert (receipt.format, receipt.dtype, receipt.family) == ("adapter", "float32", "gemma3")
    assert (receipt.adapter["rank"], receipt.adapter["alpha"]) == (2, gkt.lora_config(model).alpha)
    assert receipt.stop_tokens == gkt.get_template(model).stop_tokens
    assert receipt.packages["keras"]
    names = {file.path for file in receipt.files}
    assert names == {path.name for path in folder.iterdir()} - {FILE_NAME}
    for file in receipt.files:
        assert file.bytes == (folder / file.path).stat().st_size
        assert file.sha256 == sha256(folder / file.path)


@pytest.mark.slow
def test_recordings_are_what_the_model_answers(model, folder):
    for prompt, one in zip(
        ["Hello!", "part number 7"], read_receipt(folder).recordings, strict=True
    ):
        answer = gkt.generate_answers(model, prompt, max_new_tokens=16, batch_size=2)[0]
        assert list(one.answer_ids) == answer.ids.tolist() and one.answer == answer.text
        ids = np.asarray([one.ids])
        logits = np.asarray(model(backbone_inputs(model.backbone, ids, np.ones_like(ids))))[0, -1]
        best = np.argsort(-logits, kind="stable")[:8]
        assert list(one.top_ids) == best.tolist()
        np.testing.assert_allclose(one.top_logits, logits[best], atol=1e-5)
        np.testing.assert_allclose(one.margins[0], logits[best[0]] - logits[best[1]], atol=1e-5)


def test_a_receipt_without_a_result_says_that_it_was_not_checked(folder, tmp_path):
    data = as_data(folder)
    assert data.pop("verification")["status"] == "not run"
    data.pop("format_version")
    assert read_receipt(write(tmp_path, data)).verification == NOT_CHECKED
    data["verification"] = {"status": "fine", "runtime": 3, "checked": [], "reasons": None}
    with pytest.raises(gkt.errors.ExportError) as caught:
        read_receipt(write(tmp_path, data))
    assert len(caught.value.problems) == 3
    data["schema"] = "gemma_keras_tune.receipt/0"
    with pytest.raises(
        gkt.errors.ExportError, match=r"receipt/1'. Received: 'gemma_keras_tune.receipt/0'"
    ):
        read_receipt(write(tmp_path, data))


def test_no_answers_are_recorded_unless_asked(model, tmp_path):
    assert read_receipt(gkt.save_adapter(model, tmp_path / "a")).recordings == ()
    assert read_receipt(gkt.save_preset(model, tmp_path / "p")).recordings == ()
    path = gkt.export(model, tmp_path / "x.gguf", verbose=0)
    receipt = read_receipt(path)
    assert receipt.recordings == ()
    assert receipt_path(path).name == "x.gguf.receipt.json"
    assert (receipt.format, receipt.dtype) == ("gguf", "float16")
    assert [file.path for file in receipt.files] == ["x.gguf"]


def test_prompts_must_be_texts(model):
    with pytest.raises(gkt.errors.ExportError, match="`prompts` must be texts"):
        record_answers(model, [1])


# Reading what others may have written.


def as_data(folder):
    return json.loads((folder / FILE_NAME).read_text())


def write(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / FILE_NAME).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "C:/x", "a\\b", "\0", "a/.", None, 3],
)
def test_paths_stay_inside(path, folder, tmp_path):
    data = as_data(folder)
    data["files"][0]["path"] = path
    with pytest.raises(gkt.errors.ExportError, match=r"files\[0\]\.path must be"):
        read_receipt(write(tmp_path, data))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", "{", "NaN", "[" * 100_000, '{"schema": "other/1"}', "\x00"],
)
def test_what_is_no_receipt_is_refused(text, tmp_path):
    with pytest.raises(gkt.errors.ExportError, match=r"receipt\.json"):
        read_receipt(write(tmp_path, text))


def test_a_missing_receipt_is_named(tmp_path):
    with pytest.raises(gkt.errors.ExportError, match="There is no receipt"):
        read_receipt(tmp_path)


def test_every_fault_is_listed(folder, tmp_path):
    data = as_data(folder)
    data["files"][0]["sha256"] = "xyz"
    data["files"][1]["bytes"] = -1
    data["recordings"][0]["margins"] = [1.0]
    data["dtype"], data["added"] = 3, 1
    with pytest.raises(gkt.errors.ExportError) as caught:
        read_receipt(write(tmp_path, data))
    assert len(caught.value.problems) == 5


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def places(data, path=()):
    """Every place in JSON data, as the keys that lead there."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items if isinstance(data, (dict, list)) else ():
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_receipt_with_anything_in_it_is_read_or_refused(data, folder, tmp_path_factory):
    known = as_data(folder)
    for _ in range(data.draw(st.integers(1, 3))):
        changed = copy.deepcopy(known)
        *path, last = data.draw(st.sampled_from([p for p in places(known) if p]))
        inner = changed
        for key in path:
            inner = inner[key]
        inner[last] = data.draw(anything)
        known = changed
    target = write(tmp_path_factory.getbasetemp() / "fuzz", known)
    try:
        receipt = read_receipt(target)
    except gkt.errors.ExportError:
        return
    assert isinstance(receipt, Receipt)
    for file in receipt.files:
        assert (target / file.path).resolve().is_relative_to(target.resolve())


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_bytes_that_are_no_receipt_are_refused(content, tmp_path_factory):
    target = tmp_path_factory.getbasetemp() / "bytes"
    target.mkdir(exist_ok=True)
    (target / FILE_NAME).write_bytes(content)
    with pytest.raises(gkt.errors.ExportError):
        read_receipt(target)
