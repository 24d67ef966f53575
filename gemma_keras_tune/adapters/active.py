"""Several adapters on one base: by name, one on at a time, switched without compiling again.

All adapters of a model share one LoRA, as wide as the widest of them and on all layers any of them
has: a narrower one is filled up with zeros, which add nothing and which no training moves, as the
gradient of either factor is zero where the other one is. To switch is to assign other factors to
the same variables, so every compiled program goes on serving; only loading an adapter that needs a
wider LoRA, or more layers, compiles anew. The base is in memory once.

One thread at a time has the model: calls of others wait until an answer or a context is finished.
"""

import contextlib
import dataclasses
import enum
import functools
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any, Final

import keras
import numpy as np

from gemma_keras_tune._support.interrupts import held_interrupts
from gemma_keras_tune.adapters.lora import (
    AdapterSet,
    LoraConfig,
    Matrices,
    NamedAdapter,
    adapters_of,
    fitting_linears,
    is_lora_on,
    largest_rank,
    lora_linears,
    put_on,
    remove_lora,
    set_lora_on,
    take_off,
)
from gemma_keras_tune.errors import AdapterError, LoraError
from gemma_keras_tune.gemma.state import locked, model_lock, state_of
from gemma_keras_tune.gemma.templates import Template, attach_template


class Active(enum.Enum):
    """Stands for the adapter that is on."""

    ACTIVE = "active"


ACTIVE: Final = Active.ACTIVE


def list_adapters(model: keras.Model) -> tuple[str, ...]:
    """Return the names of a model's adapters, in the order they came. It never waits.

    Args:
        model: A model. LoRA that was put on by `tune` or `enable_lora` is called `"default"`.

    Returns:
        The names.
    """
    found = adapters_of(model)
    return tuple(found.adapters) if found else ()


def active_adapter(model: keras.Model) -> str | None:
    """Return the name of the adapter that is on. It never waits.

    Args:
        model: A model.

    Returns:
        The name; `None` where the model answers as its base. While another thread answers with an
        adapter, it is that one.
    """
    on = any(linear.layer.lora_enabled for linear in lora_linears(model))
    return state_of(model).active if on else None


@locked
def adapter_config(model: keras.Model) -> LoraConfig | None:
    """Return the own rank, alpha and target modules of the adapter that is on, or was last."""
    found = adapters_of(model)
    return found.adapters[found.held].config if found else None


@locked
def adapter_strength(model: keras.Model) -> float:
    """Return the `scale` that the adapter was switched to with, 1 if it was trained since."""
    found = _up_to_date(model)
    return found.scale if found else 1.0


@locked
@held_interrupts()
def set_adapter(model: keras.Model, name: str | None, *, scale: float = 1.0) -> None:
    """Switch to an adapter, with the template it was tuned with.

    Args:
        model: A model with adapters.
        name: One of `gkt.adapters.list(model)`; `None` switches all off, and the model answers as
            its base, bit for bit.
        scale: Strength of the adapter: its update times this number.

    Raises:
        AdapterError: There is no such adapter, or the scale is not a finite number.
        TrainingError: Another thread trains the model.
    """
    if name is None:
        set_lora_on(model, on=False)
        state_of(model).active = None
        return
    found = _with(model, name)
    if not _is_finite(scale):
        raise AdapterError(f"`scale` must be a finite number. Received: {scale!r}")
    found.assign(name, scale)
    set_lora_on(model, on=True)
    state_of(model).active = name


@contextlib.contextmanager
def use_adapter(
    model: keras.Model, name: str | Active | None = ACTIVE, *, scale: float = 1.0
) -> Iterator[None]:
    """Switch to an adapter for a block of code, in which other threads wait for the model.

    Args:
        model: A model with adapters.
        name: As for `gkt.adapters.set`. Left out, nothing is switched, and other threads cannot
            switch either.
        scale: As for `gkt.adapters.set`.

    Yields:
        Nothing.

    Raises:
        AdapterError: There is no such adapter, or the scale is not a finite number.
        TrainingError: Another thread trains the model.
    """
    with model_lock(model):
        found = _up_to_date(model)
        if isinstance(name, Active) or (name is None and found is None):
            yield
            return
        held, strength = (found.held, found.scale) if found else ("", 1.0)
        active, on = state_of(model).active, is_lora_on(model)
        try:
            set_adapter(model, name, scale=scale)
            yield
        finally:
            with held_interrupts():
                _switch_back(model, held, strength, active, on=on)


def _switch_back(
    model: keras.Model, held: str, strength: float, active: str | None, *, on: bool
) -> None:
    """Switch to what was on; adapters may have been trained, loaded or removed in the meantime."""
    found = _up_to_date(model)
    if found is None or held not in found.adapters:
        set_adapter(model, None)
        return
    if (found.held, found.scale) != (held, strength):
        found.assign(held, strength)
    set_lora_on(model, on=on)
    state_of(model).active = active


@locked
def held_adapter(model: keras.Model) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context of the adapter that is on now, whatever other threads switch to later."""
    name, scale = active_adapter(model), adapter_strength(model)
    return functools.partial(use_adapter, model, name, scale=scale)


@locked
@held_interrupts()
def remove_adapter(model: keras.Model, name: str) -> None:
    """Take an adapter off a model and forget it.

    Args:
        model: A model with adapters.
        name: Its name. Where it was on, the model answers as its base afterwards; with the last one
            LoRA is taken off altogether.

    Raises:
        AdapterError: There is no such adapter.
        TrainingError: Another thread trains the model.
    """
    found = _with(model, name)
    left = {n: one for n, one in found.adapters.items() if n != name}
    if not left:
        remove_lora(model)
        return
    found.adapters = left
    state_of(model).templates.pop(name, None)
    if found.held == name:
        found.assign(next(iter(left)))
        set_adapter(model, None)


@locked
@held_interrupts()
def add_adapter(
    model: keras.Model, name: str, config: LoraConfig, matrices: Matrices, template: Template | None
) -> LoraConfig:
    """Put an adapter among those of a model, and switch to it. One of the same name is replaced.

    Args:
        model: The base, with or without other adapters.
        name: Its new name.
        config: Its own rank, alpha and target modules.
        matrices: Its factors.
        template: The template it was tuned with.

    Returns:
        `config`, with the number of the model's parameters.

    Raises:
        AdapterError: The name is empty, or is that of other LoRA, which was tuned in memory and
            would be lost; or it does not fit beside the others. The model is unchanged.
    """
    problem = name_conflict(model, name, config)
    if problem:
        raise AdapterError(f"The adapter cannot be put on this model: {problem}")
    before = _up_to_date(model)
    others = {n: a for n, a in before.adapters.items() if n != name} if before else {}
    found = _wide_enough(model, before, others, config)
    own = dataclasses.replace(config, total_parameters=found.lora.total_parameters)
    everything = {**others, name: NamedAdapter(own, found.values(own, matrices))}
    order = dict.fromkeys([*(before.adapters if before else ()), name])
    found.adapters = {n: everything[n] for n in order}
    state = state_of(model)
    state.adapters = found
    state.templates.pop(name, None)
    set_adapter(model, name)
    if template:
        attach_template(model, template)
    return own


def _wide_enough(
    model: keras.Model,
    before: AdapterSet | None,
    others: dict[str, NamedAdapter],
    config: LoraConfig,
) -> AdapterSet:
    """The LoRA of a model, put on anew where it does not hold the others and a new adapter."""
    shared = _shared([config, *(other.config for other in others.values())])
    most = largest_rank(model, shared.target_modules)
    if shared.rank > most:
        raise AdapterError(
            f"Together the adapters need rank {shared.rank} on {', '.join(shared.target_modules)}, "
            f"and some of these layers can carry {most} at most.",
            next_step="Load it on another copy of the base, or call `gkt.adapters.remove` first.",
        )
    if before and _fits(before.lora, shared, alone=not others):
        return before
    try:
        linears = fitting_linears(model, shared.rank, shared.target_modules)
    except LoraError as error:
        raise AdapterError(error.headline, error.problems, error.next_step) from error
    if before:
        take_off(model, before)
    found = put_on(model, linears, shared.rank, shared.alpha, use_rslora=shared.use_rslora)
    for other in others.values():
        assert before is not None
        other.values = found.values(other.config, before.matrices(other))
    return found


def name_conflict(model: keras.Model, name: Any, config: LoraConfig) -> str | None:
    """Return why a name cannot be given to an adapter, or `None` where it can."""
    if not isinstance(name, str) or not name:
        return f"`name` must be a text that is not empty. Received: {name!r}"
    found = adapters_of(model)
    there = found.adapters.get(name) if found else None
    if there is None or there.loaded or _alike(there.config, config):
        return None
    return (
        f"other LoRA is on the model under the name {name!r} ({there.config}): load the adapter "
        "under another `name`, or call `remove_lora(model)` first"
    )


@locked
def chosen_adapter(model: keras.Model, name: str | Active = ACTIVE) -> str:
    """Return the name of an adapter that is there, by default of the one that is or was last on.

    Raises:
        AdapterError: There is no such adapter.
    """
    found = adapters_of(model)
    if found is None:
        raise AdapterError(
            "There is no adapter to save: LoRA is not on this model.",
            next_step="Tune with `method='lora'`, or save the whole model with `save_preset`.",
        )
    if isinstance(name, Active):
        return found.held
    _with(model, name)
    return name


@locked
def adapter_factors(
    model: keras.Model, name: str | Active = ACTIVE
) -> tuple[LoraConfig, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return an adapter as it was trained: its own configuration and its factors.

    Raises:
        AdapterError: There is no such adapter.
    """
    chosen = chosen_adapter(model, name)
    found = _with(model, chosen)
    adapter = found.adapters[chosen]
    return adapter.config, found.matrices(adapter)


def _up_to_date(model: keras.Model) -> AdapterSet | None:
    """The adapters of a model, with what was trained since they were switched."""
    found = adapters_of(model)
    if found:
        found.keep_trained()
    return found


def _with(model: keras.Model, name: Any) -> AdapterSet:
    """The adapters of a model, among which there must be one of this name."""
    found = _up_to_date(model)
    if found is None or not isinstance(name, str) or name not in found.adapters:
        raise AdapterError(
            f"There is no adapter {name!r} on this model.",
            next_step=f"There are: {', '.join(list_adapters(model)) or 'none'}. Load one with "
            "`load_adapter(model, path, name=…)`.",
        )
    return found


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _shared(configs: list[LoraConfig]) -> LoraConfig:
    """The LoRA that all of them fit into. The first one's scale is everybody's."""
    first, rank = configs[0], max(config.rank for config in configs)
    if all(config.rank == rank for config in configs):
        widest = first
    else:
        widest = dataclasses.replace(first, rank=rank, alpha=first.scale * rank, use_rslora=False)
    target_modules = sorted({target for config in configs for target in config.target_modules})
    return dataclasses.replace(widest, target_modules=tuple(target_modules))


def _fits(lora: LoraConfig, wanted: LoraConfig, *, alone: bool) -> bool:
    """True if adapters that need one LoRA can live in another."""
    if alone:
        return _alike(lora, wanted)
    return lora.rank >= wanted.rank and set(lora.target_modules) >= set(wanted.target_modules)


def _alike(first: LoraConfig, second: LoraConfig) -> bool:
    names = ("rank", "alpha", "target_modules", "use_rslora")
    return all(getattr(first, name) == getattr(second, name) for name in names)
