"""Checkpoints of the Gemma library for JAX, read back: `load_gemma_jax`.

The tree says nothing of the model's settings, so `export` records them beside it. Of the published
checkpoints, which have no such record, `published` knows the settings of Gemma 2 and 3.
"""

import collections
import pathlib
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune._support.packages import import_extra
from gemma_keras_tune.errors import LoadError, TemplateError
from gemma_keras_tune.formats.gemma_jax.published import published_settings
from gemma_keras_tune.formats.weights import Shape, shape_problems
from gemma_keras_tune.gemma.building import causal_lm, empty_backbone
from gemma_keras_tune.gemma.families import (
    FAMILIES,
    Family,
    Weight,
    backbone_settings,
    family_of,
    joined_shape,
    split,
)
from gemma_keras_tune.gemma.tables import KEYS_AND_VALUES
from gemma_keras_tune.gemma.templates import read_sidecar

PARAMETERS = "params"
TOKENIZER = "tokenizer.model"
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA")
# Published trees may be flat, under this name; the rest is a vision tower, which is not read.
_FLAT = "transformer/"
_BESIDE = ("SigLiPFromPatches_0/", "vision_encoder/", "embedder/mm_")
BACKBONE_KEY = "backbone"
# The rows the library's embeddings have. Its Gemma 2 has some for tokens that do not exist; its
# Gemma 3 and 3n have none for the ids Hugging Face keeps for pictures and sounds.
VOCABULARIES = {256_000: 256_128, 262_208: 262_144, 262_400: 262_144}

_NOT_RECORDED = (
    "name",
    "trainable",
    "dtype",
    "vision_encoder",
    "vision_encoder_config",
    "audio_encoder_config",
)
_AGAIN = "Export the model again, or copy the whole folder again."


def backbone_record(model: Any) -> dict[str, Any]:
    """The settings a backbone is built from again, as JSON data.

    Args:
        model: A KerasHub `CausalLM` of Gemma 2, 3, 3n or 4.

    Returns:
        The backbone's arguments by name, those of its text tower, with the rows its checkpoint has.
    """
    given = backbone_settings(model)
    record = {name: value for name, value in given.items() if name not in _NOT_RECORDED}
    for name in {"vocabulary_size", "text_vocab_size"} & record.keys():
        record[name] = min(record[name], VOCABULARIES.get(record[name], record[name]))
    return record


def load_gemma_jax(folder: pathlib.Path, *, dtype: str = "float32") -> keras.Model:
    """Open a folder that `export(..., format="gemma_jax")` wrote, or a published checkpoint.

    Args:
        folder: The folder, with `params`, `tokenizer.model` and this library's record. Or the
            checkpoint of a published Gemma 2 or 3, with `tokenizer.model` in it or beside it; its
            text tower is read.
        dtype: Keras dtype of the weights.

    Returns:
        A KerasHub `CausalLM` with preprocessor and tokenizer.

    Raises:
        LoadError: Orbax or the tokenizer is missing, nothing tells the model's settings, or the
            tree is not the one they describe.
    """
    place, tokenizer, recorded = checkpoint_folder(folder), _tokenizer(folder), _recorded(folder)
    orbax = import_extra("orbax.checkpoint", "gemma-jax", "Orbax checkpoints", LoadError)
    path = (place or folder).absolute()
    try:
        with orbax.StandardCheckpointer() as checkpointer:
            held = checkpointer.metadata(path).item_metadata.tree
            found = _shapes(held)
            family, config = recorded or published_settings(folder, found)
            _check_depth(folder, config, found)
            backbone = empty_backbone(family, config, dtype)
            model = causal_lm(family, backbone, tokenizer.read_bytes())
            weights = family_of(model).weights(model)
            _check_shapes(folder, weights, found, unread_weights(model))
            tree = dict(_weights(checkpointer.restore(path)))
    except LoadError:
        raise
    except Exception as error:
        # Orbax, KerasHub and SentencePiece fail in many ways on damaged files.
        raise LoadError(
            f"{folder} cannot be read as a checkpoint of the Gemma library for JAX.",
            [f"{type(error).__name__}: {error}"],
            next_step=_AGAIN,
        ) from error
    _assign(weights, tree)
    if any(name.removeprefix(_FLAT).startswith(_BESIDE) for name, _ in _flat(held)):
        warnings.warn(
            f"{folder}: the text tower alone was read, and the model will not see images. Load the "
            "KerasHub preset or the Hugging Face folder of that Gemma to keep its vision tower.",
            UserWarning,
            stacklevel=4,
        )
    return model


def checkpoint_folder(folder: pathlib.Path) -> pathlib.Path | None:
    """Find the Orbax checkpoint of a model: `params` in the folder, or the folder itself."""
    if (folder / PARAMETERS).is_dir():
        return folder / PARAMETERS
    return folder if any((folder / name).is_file() for name in _MARKS) else None


def _tokenizer(folder: pathlib.Path) -> pathlib.Path:
    for file in (folder / TOKENIZER, folder.absolute().parent / TOKENIZER):
        if file.is_file():
            return file
    raise LoadError(
        f"The Orbax checkpoint in {folder} has no tokenizer: {TOKENIZER} is missing.",
        next_step=f"Put the model's {TOKENIZER} into the folder.",
    )


def _recorded(folder: pathlib.Path) -> tuple[Family, dict[str, Any]] | None:
    """The family and settings that `export` recorded, where it did."""
    try:
        record = read_sidecar(folder)
    except TemplateError as error:
        raise LoadError(f"{folder}: its record is damaged. {error}", next_step=_AGAIN) from error
    family, config = FAMILIES.get(str(record.get("family"))), record.get(BACKBONE_KEY)
    if family is None or not family.jax or not isinstance(config, dict):
        return None
    return family, config


def _flat(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, node in tree.items():
            yield from _flat(node, f"{place}/{name}" if place else str(name))
    else:
        yield place, tree


def _weights(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of the text tower, named as in the library's own model."""
    for name, leaf in _flat(tree):
        own = name.removeprefix(_FLAT)
        if own != name and "/mlp/" in own:
            own = own.removesuffix("/w")
        if not own.startswith(_BESIDE):
            yield own, leaf


def _shapes(tree: Any) -> dict[str, Shape]:
    return {name: tuple(leaf.shape) for name, leaf in _weights(tree)}


def _check_depth(
    folder: pathlib.Path, config: Mapping[str, Any], found: Mapping[str, Shape]
) -> None:
    """Before anything is built after the record: as many layers as it says."""
    layers = len({name.partition("/")[0] for name in found if name.startswith("layer_")})
    told = config.get("num_layers", config.get("num_hidden_layers"))
    if told != layers:
        raise LoadError(
            f"{folder}: the record tells of {told!r} layers, and the checkpoint holds {layers}.",
            next_step=_AGAIN,
        )


def _check_shapes(
    folder: pathlib.Path,
    weights: Sequence[Weight],
    found: Mapping[str, Shape],
    unread: Container[str],
) -> None:
    problems = shape_problems(_tree_shapes(weights), found, unread)
    if problems:
        raise LoadError(
            f"{folder}: the checkpoint does not fit the model its settings describe.",
            problems,
            next_step=_AGAIN,
        )


def unread_weights(model: Any) -> dict[str, Shape]:
    """Weights of the library's Gemma 4 for layers that take another's keys: never read.

    Args:
        model: A KerasHub `CausalLM` of Gemma 2, 3, 3n or 4.

    Returns:
        Shapes by path in the tree; empty for the other families.
    """
    family = family_of(model)
    if family.jax is None or not family.jax.keeps_unread_keys:
        return {}
    given = model.backbone.get_config()
    kinds, shared = given["layer_types"], given["num_kv_shared_layers"]
    weights = family.weights(model)
    shapes = _tree_shapes(weights)
    keys = [str(w.spec.jax) for w in weights if w.spec.hugging_face in KEYS_AND_VALUES]
    found = {}
    for layer in range(len(kinds) - shared, len(kinds)):
        alike = [i for i in range(len(kinds) - shared) if kinds[i] == kinds[layer]]
        for name in dict.fromkeys(keys):
            for source in alike[-1:]:
                if f"layer_{source}/{name}" in shapes:
                    found[f"layer_{layer}/{name}"] = shapes[f"layer_{source}/{name}"]
    return found


def _tree_shapes(weights: Sequence[Weight]) -> dict[str, Shape]:
    used = [weight for weight in weights if weight.used]
    counts = collections.Counter(str(weight.jax) for weight in used)
    return {str(weight.jax): _tree_shape(weight, counts[str(weight.jax)]) for weight in used}


def _tree_shape(weight: Weight, count: int) -> Shape:
    shape = weight.jax_shape
    if weight.spec.kind == "embedding":
        shape = (VOCABULARIES.get(shape[0], shape[0]), *shape[1:])
    return joined_shape(shape, weight.spec.jax_part, count)


def _assign(weights: Sequence[Weight], tree: Mapping[str, Any]) -> None:
    counts = collections.Counter(str(weight.jax) for weight in weights)
    for weight in weights:
        if not weight.used:
            weight.variable.assign(np.zeros(weight.variable.shape))
            continue
        value = np.asarray(tree[str(weight.jax)])
        value = split(value, weight.spec.jax_part, counts[str(weight.jax)])
        if weight.spec.kind == "embedding":
            value = value[: weight.variable.shape[0]]
        weight.variable.assign(weight.from_jax(value))
