"""An Orbax checkpoint that the Gemma library for JAX reads (the package `gemma`).

    from gemma import gm

    model = gm.nn.Gemma3_270M()
    params = gm.ckpts.load_params("folder/params")
    tokenizer = gm.text.Gemma3Tokenizer("folder/tokenizer.model")

The names and layouts come from `families`.
"""

import collections
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from gemma_keras_tune._support.packages import import_extra
from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.formats.gemma_jax.reader import (
    BACKBONE_KEY,
    PARAMETERS,
    TOKENIZER,
    VOCABULARIES,
    backbone_record,
    unread_weights,
)
from gemma_keras_tune.formats.weights import (
    DTYPES,
    Progress,
    merged_weights,
    rounded,
    stored_dtype,
    warn_of_media,
)
from gemma_keras_tune.gemma.families import (
    FAMILIES,
    Family,
    Weight,
    backbone_settings,
    family_of,
    join,
)
from gemma_keras_tune.gemma.tables import FusedPart
from gemma_keras_tune.gemma.templates import write_sidecar


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Write `params`, an Orbax checkpoint, `tokenizer.model`, and what `load` needs to know.

    LoRA is merged in float32 and rounded once. Weights are written one after another: the largest,
    and some 64 MB of smaller ones, are in memory beside the model.

    Args:
        model: A KerasHub `CausalLM` of Gemma 2, 3, 3n or 4. Of a model that sees or hears, the
            text tower.
        folder: An existing folder.
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"`: the dtype of the weights.
        progress: Called with each weight's name, how many are done, and how many there are.

    Raises:
        ExportError: The library cannot compute this model, a weight is beyond the dtype, or
            `orbax-checkpoint` is not installed.
    """
    names = [*_counts(_supported(model).weights(model)), *unread_weights(model)]
    module = "gemma_keras_tune.formats.gemma_jax.orbax_tree"
    orbax_tree = import_extra(module, "gemma-jax", "Orbax checkpoints", ExportError)
    tensors = _tensors(model, stored_dtype(model, dtype), progress)
    warn_of_media(model, "checkpoint", "Open it with a model made with `text_only=True`.")
    orbax_tree.save(folder / PARAMETERS, _nested({name: name for name in names}), tensors)
    tokenizer: Any = model.preprocessor.tokenizer
    (folder / TOKENIZER).write_bytes(tokenizer.proto)
    write_sidecar(folder, {BACKBONE_KEY: backbone_record(model)})


def _tensors(
    model: keras.Model, dtype: str, progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of the tree and its path, as soon as all its pieces are there."""
    weights = family_of(model).weights(model)
    counts = _counts(weights)
    found: dict[str, dict[FusedPart | None, np.ndarray]] = collections.defaultdict(dict)
    done = itertools.count(1)  # `enumerate` would hold on to the last value
    for weight, value in merged_weights(model):
        name = str(weight.jax)
        if weight.used:
            found[name][weight.spec.jax_part] = _stored(weight, value, dtype)
        del value
        progress(weight.path, next(done), len(weights))
        if name in found and len(found[name]) == counts[name]:
            yield name, join(found.pop(name))
    for name, shape in unread_weights(model).items():
        yield name, np.zeros(shape, DTYPES[dtype])


def _counts(weights: Sequence[Weight]) -> collections.Counter[str]:
    """Number of weights that each tensor of the tree is made of."""
    for weight in weights:
        if weight.jax is None:
            raise ExportError(f"{weight.path} has no name in the Gemma library for JAX.")
    return collections.Counter(str(weight.jax) for weight in weights if weight.used)


def _stored(weight: Weight, value: np.ndarray, dtype: str) -> np.ndarray:
    value = weight.to_jax(value)
    if weight.spec.kind == "embedding":
        value = _with_its_rows(value)
    return rounded(weight.path, value, dtype)


def _supported(model: Any) -> Family:
    family = family_of(model)
    instead = "Export a Hugging Face folder with `format='safetensors'`, or save the adapter with "
    instead += "`save_adapter`."
    if family.jax is None:
        *known, last = [known.title for known in FAMILIES.values() if known.jax]
        raise ExportError(
            f"{family.title} cannot be written for the Gemma library for JAX.",
            next_step=f"It is written for {', '.join(known)} and {last}. {instead}",
        )
    given = backbone_settings(model)
    problems = family.unlike(given, "the library", family.jax.fixed)
    if family.widths_by_layer:
        problems += _unlike_one_width(given)
    if "num_kv_shared_layers" in given:
        problems += _unlike_sharing(given)
    heads = given.get("num_query_heads", given.get("num_attention_heads"))
    if heads == given["num_key_value_heads"] and not family.jax.one_key_head_a_query:
        problems.append(
            f"every query head has a key of its own: no published {family.title} is built so, and "
            "the library holds keys otherwise then"
        )
    if problems:
        raise ExportError(
            f"The Gemma library for JAX cannot compute this {family.title}.", problems, instead
        )
    return family


def _unlike_one_width(given: Mapping[str, Any]) -> Iterator[str]:
    """Sizes by layer, or of the two embeddings, for which the library's model has one number."""
    if len(set(given["intermediate_size"])) > 1:
        yield f"the layers differ in width: intermediate_size is {given['intermediate_size']}"
    tokens = given["text_vocab_size"]
    rows, inputs = VOCABULARIES.get(tokens, tokens), given["vocab_size_per_layer_input"]
    if rows != inputs:
        yield f"its embeddings have {rows:,} and {inputs:,} rows; the library's have as many"


def _unlike_sharing(given: Mapping[str, Any]) -> Iterator[str]:
    """Name layers that take keys and values of other layers than in the library."""
    kinds, shared = given["layer_types"], given["num_kv_shared_layers"]
    own = kinds[: len(kinds) - shared]
    # The library takes the keys and values of the last two layers that have some.
    if shared and own[-2:] != ["sliding_attention", "full_attention"]:
        yield (
            "the last layers with keys of their own must be one with a sliding window and one "
            f"without; they are {own[-2:]}"
        )


def _with_its_rows(embedding: np.ndarray) -> np.ndarray:
    """The rows the library expects; those to add are copies of `<pad>`'s, which never wins."""
    rows = len(embedding)
    expected = VOCABULARIES.get(rows, rows)
    if expected <= rows:
        return embedding[:expected]
    return np.concatenate([embedding, np.repeat(embedding[:1], expected - rows, axis=0)])


def _nested(found: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in found.items():
        *places, name = path.split("/")
        node = tree
        for place in places:
            node = node.setdefault(place, {})
        node[name] = value
    return tree
