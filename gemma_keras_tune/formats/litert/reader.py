"""LiteRT files that `export` wrote, read back: `load_litert`.

Google's converter lays the weights into the file as Hugging Face has them, but for the norms, whose
scales it raises by one; nothing in the file says which is which. So `record_weights` notes where
each one stands, and lays aside those that do not stand there bit for bit.
"""

import mmap
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy

from gemma_keras_tune.errors import LoadError, TemplateError
from gemma_keras_tune.formats.gemma_jax.reader import BACKBONE_KEY, backbone_record
from gemma_keras_tune.gemma.building import causal_lm, empty_backbone
from gemma_keras_tune.gemma.families import FAMILIES, Family, Weight, family_of
from gemma_keras_tune.gemma.templates import SIDECAR, read_sidecar, write_sidecar

FILE_NAME = "model.litertlm"
ASIDE = "aside.safetensors"
TOKENIZER = "tokenizer.model"
PLACES_KEY = "litert_weights"

_KEY_BYTES = 4096
_AGAIN = "Export the model again, or copy the whole folder again."


def record_weights(
    model: Any, folder: pathlib.Path, values: Iterable[tuple[Weight, np.ndarray]]
) -> None:
    """Write what `load_litert` needs beside a file of the converter.

    Args:
        model: The KerasHub `CausalLM` it was made of.
        folder: The folder with the `.litertlm` file.
        values: Each weight of the text tower and its value, float32, LoRA merged.
    """
    places: dict[str, int] = {}
    aside: dict[str, np.ndarray] = {}
    with (
        (folder / FILE_NAME).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        end = 0
        for weight, value in values:
            matrix = np.ascontiguousarray(weight.to_matrix(value), "float32")
            # Most stand in the order of the layers.
            place = -1 if weight.spec.kind == "norm" else _find(data, matrix, end)
            if place < 0:
                aside[weight.text_name] = matrix
            else:
                places[weight.text_name] = place
                end = place + matrix.nbytes
    safetensors.numpy.save_file(aside, folder / ASIDE)
    (folder / TOKENIZER).write_bytes(model.preprocessor.tokenizer.proto)
    write_sidecar(folder, {BACKBONE_KEY: backbone_record(model), PLACES_KEY: places})


def _find(data: mmap.mmap, matrix: np.ndarray, after: int) -> int:
    """Where the array stands bit for bit; -1 if nowhere."""
    flat = matrix.reshape(-1)
    key = flat[: _KEY_BYTES // 4].tobytes()
    for begin, end in ((after, len(data)), (0, min(after + len(key), len(data)))):
        place = data.find(key, begin, end)
        while place >= 0:
            if place + flat.nbytes <= len(data):
                there = np.frombuffer(data, "float32", flat.size, place)
                same = np.array_equal(there.view("uint32"), flat.view("uint32"))
                del there  # a map with views on it cannot be closed
                if same:
                    return place
            place = data.find(key, place + 1, end)
    return -1


def load_litert(folder: pathlib.Path, *, dtype: str = "float32") -> keras.Model:
    """Open a folder that `export(..., format="litert")` wrote.

    Args:
        folder: The folder, with the `.litertlm` file and what this library wrote beside it.
        dtype: Keras dtype of the weights.

    Returns:
        A KerasHub `CausalLM` with preprocessor and tokenizer.

    Raises:
        LoadError: What this library writes beside it is missing, or does not fit the file.
    """
    family, config, places = _recorded(folder)
    try:
        aside = safetensors.numpy.load_file(folder / ASIDE)
        _check_depth(folder, config, [*places, *aside])
        backbone = empty_backbone(family, config, dtype)
        model = causal_lm(family, backbone, (folder / TOKENIZER).read_bytes())
        weights = family_of(model).weights(model)
    except LoadError:
        raise
    except Exception as error:  # KerasHub and SentencePiece fail in many ways on damaged files.
        raise LoadError(
            f"{folder} cannot be read back.",
            [f"{type(error).__name__}: {error}"],
            next_step=_AGAIN,
        ) from error
    path = folder / FILE_NAME
    _check_fit(folder, weights, places, aside, path.stat().st_size)
    for weight in weights:
        name, shape = weight.hugging_face, weight.matrix_shape
        if name in places:
            value = np.memmap(path, "float32", "r", places[name], shape)
        else:
            value = aside[name]
        weight.variable.assign(weight.from_matrix(np.asarray(value)))
    return model


def _recorded(folder: pathlib.Path) -> tuple[Family, dict[str, Any], dict[str, int]]:
    try:
        record = read_sidecar(folder)
    except TemplateError as error:
        raise LoadError(f"{folder}: its record is damaged. {error}", next_step=_AGAIN) from error
    family, config = FAMILIES.get(str(record.get("family"))), record.get(BACKBONE_KEY)
    places = record.get(PLACES_KEY)
    missing = [name for name in (TOKENIZER, ASIDE) if not (folder / name).is_file()]
    whole = isinstance(places, dict) and all(
        isinstance(place, int) and place >= 0 for place in places.values()
    )
    if family is None or not isinstance(config, dict) or not whole:
        missing.append(f"{SIDECAR} with the model's settings and the places of its weights")
    if missing:
        raise LoadError(
            f"The LiteRT file in {folder} does not say which model it is.",
            [f"{name} is missing" for name in missing],
            "Only folders that `export(..., format='litert')` wrote are opened. Load the model it "
            "was made of.",
        )
    assert family is not None
    assert isinstance(config, dict)
    assert isinstance(places, dict)
    return family, config, places


def _check_depth(folder: pathlib.Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Before anything is built after the record: as many layers as there are weights for."""
    layers = len({found[1] for name in names if (found := re.search(r"layers\.(\d+)\.", name))})
    if config.get("num_layers") != layers:
        raise LoadError(
            f"{folder}: the record tells of {config.get('num_layers')!r} layers, and there are "
            f"weights for {layers}.",
            next_step=_AGAIN,
        )


def _check_fit(
    folder: pathlib.Path,
    weights: Sequence[Weight],
    places: Mapping[str, int],
    aside: Mapping[str, np.ndarray],
    size: int,
) -> None:
    problems = []
    for weight in weights:
        name, shape = weight.hugging_face, weight.matrix_shape
        if name in places:
            if places[name] + 4 * int(np.prod(shape, dtype="int64")) > size:
                problems.append(f"{name} would stand beyond the end of {FILE_NAME}")
        elif name not in aside:
            problems.append(f"{name} is missing")
        elif aside[name].shape != shape:
            problems.append(f"{name} has shape {aside[name].shape}, expected {shape}")
    known = {weight.hugging_face for weight in weights}
    problems += [f"{name} is no weight of this model" for name in {*places, *aside} - known]
    if problems:
        raise LoadError(
            f"{folder}: the file does not fit the model the record describes.",
            problems,
            next_step=_AGAIN,
        )
