"""A Hugging Face folder: sharded safetensors, configuration, tokenizer, chat template, stop tokens.

The names and axes come from `families`. Configuration fields are those of `transformers`'
`GemmaConfig`, `Gemma2Config` and the text configurations of Gemma 3, 3n and 4; a setting they have
no field for is refused. Of a model that sees or hears, the text tower is written: transformers
opens it as `Gemma…ForCausalLM`.
"""

import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from safetensors.numpy import save_file

from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.formats.hugging_face.reader import INDEX
from gemma_keras_tune.formats.hugging_face.settings import settings
from gemma_keras_tune.formats.hugging_face.tokenizer import write_json, write_tokenizer
from gemma_keras_tune.formats.weights import (
    DTYPES,
    Progress,
    merged_weights,
    rounded,
    stored_dtype,
    warn_of_media,
)
from gemma_keras_tune.gemma.families import (
    Family,
    Weight,
    backbone_settings,
    context_length,
    family_of,
    join,
)
from gemma_keras_tune.gemma.state import is_instruct
from gemma_keras_tune.gemma.tables import FULL, GELU
from gemma_keras_tune.gemma.templates import Template, get_template, template_of

_BOS, _EOS, _PAD = 2, 1, 0


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    shard_size: int = 5_000_000_000,
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Write a model as `transformers` saves it.

    LoRA is merged in float32 and rounded once. One shard at a time is in memory beside the
    model.

    Args:
        model: A KerasHub Gemma `CausalLM`. Of a model that sees or hears, the text tower.
        folder: An existing, empty folder.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: the dtype of the weights.
        shard_size: Bytes of weights in one file at most.
        progress: Called with each weight's name, how many are written, and how many there are.

    Raises:
        ExportError: `transformers` cannot compute this model, or a weight is beyond the dtype.
    """
    family = family_of(model)
    warn_of_media(
        model,
        "folder",
        "For the whole model, save the adapter with `save_adapter`: PEFT puts it on the original.",
    )
    stored = stored_dtype(model, dtype)
    template = _template(model)
    tokenizer: Any = model.preprocessor.tokenizer
    stops = {_EOS}
    if template is not None:
        stops.update(template.stop_token_ids(tokenizer))
    ends = sorted(stops)
    config = _config(model, family)
    config |= {"dtype": stored, "torch_dtype": stored, "eos_token_id": ends}
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": _BOS, "eos_token_id": ends, "pad_token_id": _PAD},
    )
    write_tokenizer(tokenizer, folder, template, (family.turn.start, family.turn.end))
    _write_weights(model, folder, family, stored, shard_size, progress)


# The configuration.


def _template(model: keras.Model) -> Template | None:
    """The prompt format; `None` for a pretrained model that was not tuned."""
    if is_instruct(model) is False and template_of(model) is None:
        return None
    return get_template(model)


def _config(model: Any, family: Family) -> dict[str, Any]:
    given = backbone_settings(model)
    _refuse_settings(given, family)
    return {
        "architectures": [family.hugging_face.architecture],
        "model_type": family.hugging_face.model_type,
        "hidden_act": GELU,
        "hidden_activation": GELU,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": context_length(model),
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": _BOS,
        "pad_token_id": _PAD,
        **settings(given, family),
    }


def _refuse_settings(given: dict[str, Any], family: Family) -> None:
    problems = family.unlike(given, "transformers", family.hugging_face.fixed)
    if "layer_types" in family.hugging_face.fields and given["layer_types"][-1] != FULL:
        problems.append("the last layer attends to a window; transformers lets it see everything")
    if problems:
        raise ExportError(
            f"transformers cannot compute this {family.title}.",
            problems,
            "Save a Keras preset with `save_preset` instead.",
        )


# The weights.


def _write_weights(
    model: keras.Model,
    folder: pathlib.Path,
    family: Family,
    dtype: str,
    shard_size: int,
    progress: Progress,
) -> None:
    sizes = _sizes(family.weights(model), dtype)
    shards = _shards(sizes, shard_size)
    count = len(shards)
    stem = "model" if count == 1 else "model-{:05}-of-{:05}"
    tensors = _tensors(model, dtype)
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem.format(number, count)}.safetensors"
        held = {}
        for name in names:
            found, held[name] = next(tensors)
            if found != name:
                raise ExportError(f"{name} came out of turn; this is a fault of the library.")
            placed[name] = file
            progress(name, len(placed), len(sizes))
        save_file(held, folder / file, metadata={"format": "pt"})
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
        write_json(folder / INDEX, index)


def _sizes(weights: tuple[Weight, ...], dtype: str) -> dict[str, int]:
    """Bytes of each tensor, in order."""
    sizes: dict[str, int] = {}
    for weight in weights:
        size = math.prod(weight.matrix_shape) * DTYPES[dtype].itemsize
        sizes[weight.text_name] = sizes.get(weight.text_name, 0) + size
    return sizes


def _shards(sizes: dict[str, int], shard_size: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would not fit any more."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_size:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _tensors(model: keras.Model, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor, its pieces put together: they follow one another in the table."""
    pairs = ((weight.text_name, weight, value) for weight, value in merged_weights(model))
    for name, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        pieces = (
            (weight.spec.part, rounded(name, weight.to_matrix(value), dtype))
            for _, weight, value in group
        )
        yield name, join(dict(pieces))
