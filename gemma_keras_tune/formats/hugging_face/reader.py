"""Hugging Face folders: their text model read back into KerasHub models.

KerasHub's own reader takes any matrix for any other with as many values, passes over settings it
has no argument for, and wants the files of processors for models that see or hear. So the text
model of a folder, whoever saved it, is built by `settings` and filled by the family's table, each
weight checked before the first is taken. Towers for images and sounds are left out with a warning.
"""

import collections
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune._support.json import read_json_object
from gemma_keras_tune.errors import LoadError
from gemma_keras_tune.formats.hugging_face.settings import backbone_arguments
from gemma_keras_tune.formats.weights import shape_problems
from gemma_keras_tune.gemma.building import causal_lm, empty_backbone
from gemma_keras_tune.gemma.families import Family, Weight, family_of, joined_shape, split
from gemma_keras_tune.gemma.state import name_as_media_model
from gemma_keras_tune.gemma.vocabularies import folder_vocabulary

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")
_AGAIN = "Copy or download the folder again."
# transformers 4 and 5, Unsloth, Axolotl and mlx-lm put different ones before the same names.
_PREFIX = re.compile(r"^((model|language_model)\.)+")
_HEAD = "lm_head.weight"
_TOWER = re.compile(r"(?:model\.)?(\w*(?:vision|image|audio|multi_modal)\w*)\..*")
# Computed, or the same as the embedding.
_BESIDE = re.compile(r".*rotary_emb\.inv_freq|.*lm_head\.weight")
_BEFORE_MERGING = re.compile(
    r"base_model\..*|.*\.(lora_(embedding_)?[AB]|lora_magnitude_vector|base_layer|modules_to_save|"
    r"original_module)\b.*"
)
# The tensors that tell a quantization, and the way back to floats.
_QUANTIZED: Mapping[str, tuple[str, str]] = {
    "bitsandbytes": (
        r".*\.(SCB|absmax|nested_absmax|quant_map|quant_state\..*)",
        "In transformers, `model.dequantize()` and `save_pretrained` write such a model in floats.",
    ),
    "gptq": (r".*\.g_idx", ""),
    "awq": (r".*\.(qweight|qzeros)", ""),
    "compressed-tensors": (r".*\.(weight_packed|weight_shape)", ""),
    "fp8": (r".*\.(weight_scale|weight_scale_inv|input_scale|activation_scale)", ""),
    "mlx": (r".*\.(scales|biases)", "`mlx_lm.convert --dequantize` writes it in floats."),
}
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
    return _by_text_name(folder, found)


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


def _by_text_name(folder: pathlib.Path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {name: _PREFIX.sub("model.", name) for name in found}
    counts = collections.Counter(named.values())
    twice = [name for name, text in named.items() if counts[text] > 1]
    if twice:
        raise LoadError(f"{folder} holds weights twice, under different prefixes.", twice, _AGAIN)
    return {named[name]: tensor for name, tensor in found.items()}


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
        {known[name] for name in known if name in idle or _is_beside(name)},
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


def _is_beside(name: str) -> bool:
    return bool(_TOWER.fullmatch(name) or _BESIDE.fullmatch(name))


def _head_problems(
    config: Mapping[str, Any], embedding: str, tensors: Mapping[str, Tensor]
) -> list[str]:
    """KerasHub's Gemmas write with the embedding they read with."""
    tied, head = _is_tied(config), _head(tensors)
    if head is None:
        return [] if tied else [f"tie_word_embeddings is false, and {_HEAD} is missing"]
    if _same(head, tensors[embedding]):
        return []
    said = "" if tied else "tie_word_embeddings is false, and "
    return [f"{said}{_HEAD} is not the embedding: KerasHub ties them, and cannot compute this"]


def _is_tied(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config") or {}
    return config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is not False


def _head(tensors: Mapping[str, Tensor]) -> Tensor | None:
    return next((tensor for name, tensor in tensors.items() if name.endswith(_HEAD)), None)


def _same(one: Tensor, other: Tensor) -> bool:
    """Compare two matrices bit by bit, a few rows at a time."""
    from safetensors import safe_open

    if one == other:
        return True
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
    _refuse_unmerged(folder, tensors)
    _refuse_quantized(folder, config, tensors.values())
    text = config.get("text_config") or config
    _check_depth(folder, text, tensors)
    backbone = empty_backbone(family, backbone_arguments(folder, family, text), dtype)
    weights = family.weights(backbone)
    head = _head(tensors)
    if head is not None and _is_tied(config):
        # Of two names of one matrix, some tools keep this one.
        tensors.setdefault(weights[0].text_name, head)
    _check_tensors(folder, config, backbone, tensors)
    model = causal_lm(family, backbone, folder_vocabulary(folder, weights[0].matrix_shape[0]))
    _assign(weights, tensors)
    if config["model_type"] == family.hugging_face.media_type:
        name_as_media_model(model)
    _warn_of_towers(folder, tensors)
    return model


def _refuse_unmerged(folder: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    found = [tensor.name for name, tensor in tensors.items() if _BEFORE_MERGING.fullmatch(name)]
    if found:
        raise LoadError(
            f"{folder} was saved before its LoRA was merged into the weights.",
            found,
            "Merge and save again: in PEFT `model.merge_and_unload().save_pretrained(...)`, in "
            "Unsloth `model.save_pretrained_merged(...)`. Or save the adapter alone, load its base "
            "model here, and put it on with `load_adapter`.",
        )


def _refuse_quantized(
    folder: pathlib.Path, config: Mapping[str, Any], tensors: Iterable[Tensor]
) -> None:
    """Refuse quantized weights under the name of their format, by the settings or the tensors."""
    for kind, signs in (*_stated_quantization(config), *_seen_quantizations(tensors)):
        way_back = _QUANTIZED.get(kind, ("", ""))[1]
        raise LoadError(
            f"The weights in {folder} are quantized ({kind}), a format this library does not read.",
            signs,
            f"Load the model they were made from, in bfloat16 or float32. {way_back}".rstrip(),
        )


def _stated_quantization(config: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for settings in (config, config.get("text_config") or {}):
        for name in ("quantization_config", "quantization"):
            stated = settings.get(name)
            if stated:
                # mlx writes the size of its groups and no name.
                kind = stated.get("quant_method", "mlx") if isinstance(stated, dict) else "unknown"
                yield str(kind), [f"config.json: {name} is {stated!r}"]


def _seen_quantizations(tensors: Iterable[Tensor]) -> Iterator[tuple[str, list[str]]]:
    tensors = tuple(tensors)
    for kind, (pattern, _) in _QUANTIZED.items():
        found = [tensor.name for tensor in tensors if re.fullmatch(pattern, tensor.name)]
        if found:
            yield kind, found
    odd = [f"{tensor.name} is {tensor.dtype}" for tensor in tensors if "F8" in tensor.dtype]
    if odd:
        yield "fp8", odd


def _warn_of_towers(folder: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    found = collections.Counter(
        match[1] for name in tensors if (match := _TOWER.fullmatch(name)) is not None
    )
    if found:
        left = ", ".join(f"{tower} ({count} tensors)" for tower, count in found.items())
        warnings.warn(
            f"{folder}: the text model alone was loaded, and {left} left out: this library tunes "
            "text.",
            UserWarning,
            stacklevel=4,
        )


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
