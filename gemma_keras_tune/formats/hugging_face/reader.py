"""Hugging Face folders: their weights read back into KerasHub models.

KerasHub reads what Hugging Face publishes: Gemma 1 to 3, and the models of 3n and 4 that see and
hear. What it does not know are the text models of 3n and 4 (`gemma3n_text`, `gemma4_text`); it
takes any matrix for any other with as many values, and passes over settings it has no argument for.
So text models are built by `settings` and filled by the family's table, each weight checked before
the first is taken, and KerasHub's reading of the others is compared with both.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune._support.json import read_json_object
from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.formats.hugging_face.settings import (
    backbone_arguments,
    check_reading,
    completed,
)
from gemma_keras_tune.formats.weights import shape_problems
from gemma_keras_tune.gemma.building import causal_lm, empty_backbone
from gemma_keras_tune.gemma.families import Family, Weight, family_of, joined_shape, split
from gemma_keras_tune.gemma.vocabularies import folder_vocabulary

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")
_AGAIN = "Copy or download the folder again."
_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|model\.)")
_HEAD = "lm_head.weight"
# Tensors beside the text model, and those computed and not learnt. The head is the embedding.
_BESIDE = re.compile(
    r"(model\.)?(vision_tower|audio_tower|multi_modal_projector|embed_vision|embed_audio)\..*"
    r"|.*rotary_emb\.inv_freq|.*lm_head\.weight"
)
_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as a safetensors header describes it.

    Attributes:
        file: The file that holds it.
        name: Its name there.
        shape: Its shape.
        dtype: Its dtype as safetensors names it, such as `BF16`.
    """

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, from the headers of its files alone.

    Args:
        folder: A Hugging Face folder with safetensors.

    Returns:
        Each tensor, named as in a text model: `model.layers.0…` whatever the prefix there.

    Raises:
        LoadError: The index leads out of the folder, or files are missing, damaged or not what the
            index says. All problems are listed.
    """
    placed, problems = _placed(folder)
    found: dict[str, Tensor] = {}
    files = sorted({file for file in placed.values() if (folder / file).is_file()})
    for file in files if placed or problems else [WEIGHTS]:
        try:
            for tensor in _header(folder / file):
                found[tensor.name] = tensor
        except Exception as error:
            problems.append(f"{file} cannot be read: {error}")
    problems += [
        f"{name} is not in {file}, where the index places it"
        for name, file in placed.items()
        if not problems and (name not in found or found[name].file.name != file)
    ]
    if problems:
        raise LoadError(f"The weights in {folder} are damaged.", problems, _AGAIN)
    return {_text_name(name): tensor for name, tensor in found.items()}


def _placed(folder: pathlib.Path) -> tuple[dict[str, str], list[str]]:
    """The file of each tensor, where there is an index; and what is wrong with that."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return {}, []
    places = read_json_object(folder / INDEX, LoadError, _AGAIN).get("weight_map")
    if not isinstance(places, dict):
        raise LoadError(f"{folder / INDEX} holds no map of weights.", next_step=_AGAIN)
    named = {name: str(file) for name, file in places.items()}
    files = sorted(set(named.values()))
    problems = [
        f"{INDEX} leads out of the folder: {file!r}" for file in files if not is_plain(file)
    ]
    if problems:
        return {}, problems
    return named, [f"{file} is missing" for file in files if not (folder / file).is_file()]


def is_plain(name: str) -> bool:
    """Tell if a name is that of a file in the same folder."""
    return name not in ("", ".", "..") and not re.search(r"[\\/:\0]", name)


def _header(file: pathlib.Path) -> Iterator[Tensor]:
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        for name in opened.keys():  # noqa: SIM118  It is no mapping.
            part = opened.get_slice(name)
            yield Tensor(file, name, tuple(part.get_shape()), part.get_dtype())


def _text_name(name: str) -> str:
    return _PREFIX.sub("model.", name)


def _check_tensors(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    model: keras.Model,
    tensors: Mapping[str, Tensor],
) -> None:
    """Compare what a folder holds with what the model is built of."""
    family = family_of(model)
    groups = collections.defaultdict(list)
    for weight in family.weights(model):
        groups[weight.text_name].append(weight)
    known = {name: tensor.name for name, tensor in tensors.items()}
    idle = family.idle_names(model)
    problems = shape_problems(
        {
            known.get(name, name): joined_shape(
                parts[0].matrix_shape, parts[0].spec.part, len(parts)
            )
            for name, parts in groups.items()
            # Checkpoints may leave out what is never read.
            if name in known or parts[0].used
        },
        {tensor.name: tensor.shape for tensor in tensors.values()},
        {known[name] for name in known if name in idle or _BESIDE.fullmatch(name)},
    )
    problems += [
        f"{tensor.name} is {tensor.dtype}: quantized weights cannot be read"
        for name, tensor in tensors.items()
        if name in groups and tensor.dtype not in _DTYPES
    ]
    if not problems:
        problems = _head_problems(config, next(iter(groups)), tensors)
    if problems:
        raise LoadError(
            f"The weights in {folder} do not fit the model its config.json describes.",
            dict.fromkeys(problems),
            _AGAIN,
        )


def _head_problems(
    config: Mapping[str, Any], embedding: str, tensors: Mapping[str, Tensor]
) -> list[str]:
    """KerasHub's Gemmas write with the embedding they read with."""
    text = config.get("text_config") or {}
    if config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is not False:
        return []
    head = next((tensor for name, tensor in tensors.items() if name.endswith(_HEAD)), None)
    if head is not None and _same(head, tensors[embedding]):
        return []
    return [f"tie_word_embeddings is false, and {_HEAD} is not the embedding: KerasHub ties them"]


def _same(one: Tensor, other: Tensor) -> bool:
    """Compare two matrices bit by bit, a few rows at a time."""
    from safetensors import safe_open

    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with safe_open(one.file, "np") as first, safe_open(other.file, "np") as second:
        parts = first.get_slice(one.name), second.get_slice(other.name)
        count = one.shape[0]
        ranges = (slice(at, min(at + _ROWS, count)) for at in range(0, count, _ROWS))
        return all(parts[0][rows].tobytes() == parts[1][rows].tobytes() for rows in ranges)


def load_hugging_face(
    folder: pathlib.Path, config: Mapping[str, Any], family: Family, *, dtype: str
) -> keras.Model:
    """Open a folder.

    Args:
        folder: The folder.
        config: Its `config.json`, that of a Gemma.
        family: The family it names.
        dtype: Keras dtype of the weights.

    Returns:
        A KerasHub `CausalLM` with preprocessor and tokenizer.

    Raises:
        LoadError: Settings are missing or none that KerasHub computes with, or the tensors do not
            fit them.
    """
    tensors = read_tensors(folder)
    sees = config["model_type"] == family.hugging_face.media_type
    text = config.get("text_config") or {} if sees else config
    _check_depth(folder, text, tensors)
    if not sees:
        return _load_text_model(folder, family, config, tensors, dtype)
    backbone_arguments(folder, family, text)  # before anything is built
    whole = {**config, "text_config": completed(family, text)}
    with _with_config(folder, whole) as place:
        model: keras.Model = family.causal_lm_class.from_preset(str(place), dtype=dtype)
    check_reading(folder, family, text, model.backbone.get_config())
    _check_tensors(folder, config, model, tensors)
    return model


@contextlib.contextmanager
def _with_config(folder: pathlib.Path, config: Mapping[str, Any]) -> Iterator[pathlib.Path]:
    """A folder with the same files and another `config.json`.

    Beside a single file of weights, which is the one that is checked, an index is left out:
    KerasHub would follow it.
    """
    left_out = {"config.json"} | ({INDEX} if (folder / WEIGHTS).is_file() else set())
    with tempfile.TemporaryDirectory(prefix="gemma_keras_tune") as name:
        place = pathlib.Path(name)
        for file in folder.iterdir():
            if file.name not in left_out:
                (place / file.name).symlink_to(file.resolve())
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield place


def _load_text_model(
    folder: pathlib.Path,
    family: Family,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: str,
) -> keras.Model:
    backbone = empty_backbone(family, backbone_arguments(folder, family, config), dtype)
    _check_tensors(folder, config, backbone, tensors)
    weights = family.weights(backbone)
    proto = folder_vocabulary(folder, weights[0].matrix_shape[0])
    model = causal_lm(family, backbone, proto)
    _assign(weights, tensors)
    return model


def _check_depth(
    folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Before anything is built after the settings: as many layers as they say."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if config.get("num_hidden_layers") != len(layers):
        raise LoadError(
            f"config.json in {folder} tells of {config.get('num_hidden_layers')!r} layers, and its "
            f"weights are those of {len(layers)}.",
            next_step=_AGAIN,
        )


def _assign(weights: Sequence[Weight], tensors: Mapping[str, Tensor]) -> None:
    from safetensors import safe_open

    counts = collections.Counter(weight.hugging_face for weight in weights)
    files = collections.defaultdict(list)
    for weight in weights:
        tensor = tensors.get(weight.text_name)
        if tensor is None:
            weight.variable.assign(np.zeros(weight.variable.shape, "float32"))
        else:
            files[tensor.file].append((weight, tensor.name))
    for file, held in files.items():
        with safe_open(file, "np") as opened:
            for weight, name in held:
                value = opened.get_tensor(name)
                value = split(value, weight.spec.part, counts[weight.hugging_face])
                weight.variable.assign(weight.from_matrix(value))
