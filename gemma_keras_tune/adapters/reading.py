"""Adapters from disk, or from the Gemma library for JAX, onto their base model."""

import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import keras

from gemma_keras_tune.adapters.active import add_adapter, name_conflict
from gemma_keras_tune.adapters.bases import base_name, wrong_base
from gemma_keras_tune.adapters.layouts import read_adapter
from gemma_keras_tune.adapters.lora import DEFAULT, LoraConfig
from gemma_keras_tune.errors import AdapterError, TemplateError
from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.gemma.state import locked
from gemma_keras_tune.gemma.templates import Template, read_sidecar, read_template


@locked
def load_adapter(
    model: keras.Model,
    path: str | os.PathLike[str] | Mapping[str, Any],
    *,
    name: str = DEFAULT,
    check_base: bool = True,
) -> LoraConfig:
    """Put an adapter on its base model, and switch to it.

    Adapters saved by this library, PEFT, TRL, Unsloth and Axolotl share a layout; those of mlx-lm,
    of KerasHub's `save_lora_weights` (`.lora.h5`) and of the Gemma library for JAX are read too.
    Where ranks differ from layer to layer, the smaller ones are filled up with zeros; where scales
    do, they are multiplied into the factors: what the model computes is the same. Several may be
    on one base, each under a name; `gkt.adapters.set`, `gkt.adapters.use` and
    `generate(adapter=…)` switch between them. The template recorded with it is attached; one that
    cannot be, such as a Python function, is left out with a warning.

    The base may be loaded in another dtype, or quantized, than it was trained in: a sample of its
    weights, recorded with the adapter, is compared within what rounding explains. Adapters made
    elsewhere bring none; where one names its base and that is not this model's name, a warning says
    so.

    Args:
        model: A KerasHub Gemma: the base the adapter was trained on.
        path: The adapter's folder or file; or the nested dictionary of parameters that the Gemma
            library for JAX trains.
        name: What to call it. An adapter of that name is replaced.
        check_base: Whether other weights than those of the adapter's base are refused. Without it
            the family and every shape must still fit.

    Returns:
        The adapter's `LoraConfig`.

    Raises:
        AdapterError: A file is missing or broken, the adapter needs something this library cannot
            do, or it does not fit the model; every mismatch is listed and the model is unchanged.
    """
    adapter = read_adapter(path, model)
    folder = None if isinstance(path, Mapping) else pathlib.Path(path).expanduser()
    record = _record(folder) if folder else {}
    problems = [
        *_wrong_generation(model, record),
        *filter(None, [_other_base(model, record, adapter.base) if check_base else None]),
        *adapter.problems,
        *filter(None, [name_conflict(model, name, adapter.config)]),
    ]
    if problems:
        raise AdapterError(
            f"The adapter in {folder or 'memory'} does not fit this model.", problems
        )
    template = _template(folder) if folder else None
    return add_adapter(model, name, adapter.config, adapter.factors, template)


def _record(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return read_sidecar(folder)
    except TemplateError as error:
        raise AdapterError(error.headline, error.problems, error.next_step) from error


def _template(folder: pathlib.Path) -> Template | None:
    try:
        return read_template(folder)
    except TemplateError as error:
        warnings.warn(f"{folder}: its template is left out. {error}", UserWarning, stacklevel=3)
        return None


def _wrong_generation(model: keras.Model, record: Mapping[str, Any]) -> list[str]:
    name = family_of(model).name
    there = record.get("family", name)
    return [] if there == name else [f"it was trained on {there}, this is {name}"]


def _other_base(model: keras.Model, record: Mapping[str, Any], named: str | None) -> str | None:
    """By the sample of weights in our record; of adapters made elsewhere, by names alone."""
    different = wrong_base(model, record)
    if different:
        base = f": {named}" if named else ""
        return (
            f"{different}. Load the base it was trained on{base}; or pass `check_base=False`, if "
            "this is that base in other weights, such as requantized ones"
        )
    here = base_name(model)
    names = {pathlib.PurePath(name).name for name in (named, here) if name}
    if not record and len(names) == 2:
        warnings.warn(
            f"The adapter names {named} as its base, and this model came from {here}.",
            UserWarning,
            stacklevel=3,
        )
    return None
