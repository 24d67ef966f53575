"""A JSON object of others, or the reason why not."""

import pytest

from gemma_keras_tune._support.json import read_json_object
from gemma_keras_tune.errors import AdapterError


def test_an_object_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "é"}', encoding="utf-8")
    assert read_json_object(tmp_path / "x.json", AdapterError) == {"a": "é"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "it is not valid JSON: Expecting"),
        (b"[" * 100_000, "it is not valid JSON"),
        (b"\xff", "it is not valid JSON: 'utf-8'"),
        (b"[1]", "it must hold a JSON object. Received: list"),
        (None, "No such file"),
    ],
)
def test_anything_else_is_refused(data, message, tmp_path):
    path = tmp_path / "x.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(AdapterError) as caught:
        read_json_object(path, AdapterError, "Copy it again.")
    assert caught.value.headline.startswith(f"{path} cannot be read: ")
    assert message in caught.value.headline
    assert caught.value.next_step == "Copy it again."
