"""Several adapters on one base: by name, one on at a time, switched without compiling again.

All adapters of a model share one LoRA, as wide as the widest of them and on all layers any of them
has: a narrower one is filled up with zeros, which add nothing and which no training moves, as the
gradient of either factor is zero where the other one is. To switch is to assign other factors to
the same variables, so every compiled program goes on serving; only loading an adapter that needs a
wider LoRA, or more layers, compiles anew. The base is in memory once.
"""

import contextlib
import dataclasses
import enum
import math
import numbers
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

import keras
import numpy as np

from gemma_keras_tune.adapters.lora import (
    LoraConfig,
    base_template,
    enable_lora,
    get_factors,
    is_lora_on,
    largest_rank,
    lora_config,
    lora_linears,
    remove_lora,
    set_factors,
    set_lora_on,
)
from gemma_keras_tune.errors import AdapterError
from gemma_keras_tune.gemma.families import locked, model_lock
from gemma_keras_tune.gemma.templates import Template, attach_template, template_of

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
DEFAULT: Final = "default"


class Active(enum.Enum):
    """Stands for whatever adapter is on."""

    ACTIVE = "active"


ACTIVE: Final = Active.ACTIVE


@dataclasses.dataclass
class _Adapter:
    """One adapter, ready to be assigned.

    Attributes:
        config: Its own rank, alpha and target_modules.
        values: `lora_kernel_a` and `lora_kernel_b` of every layer with LoRA, on the device.
        template: The template it was tuned with.
        loaded: Whether it came by `add_adapter`, rather than by `tune` or `enable_lora`.
    """

    config: LoraConfig
    values: list[tuple[Any, Any]]
    template: Template | None
    loaded: bool = True


@dataclasses.dataclass
class _Bank:
    """The adapters of one model.

    Attributes:
        lora: The LoRA they share.
        adapters: By name.
        base_template: The template without any of them.
        active: Which one the variables hold.
        assigned: The very arrays the variables were given: where they hold others, they have been
            trained since.
        scale: The strength they were assigned at.
    """

    lora: LoraConfig
    adapters: dict[str, _Adapter]
    base_template: Template | None
    active: str
    assigned: list[tuple[Any, Any]]
    scale: float = 1.0


_banks: "weakref.WeakKeyDictionary[keras.Model, _Bank]" = weakref.WeakKeyDictionary()


@locked
def list_adapters(model: keras.Model) -> tuple[str, ...]:
    """Names of the adapters on a model, in the order they came.

    Args:
        model: A model. LoRA that was put on by `tune` or `enable_lora` is called `"default"`.

    Returns:
        The names.
    """
    bank = _bank(model)
    return tuple(bank.adapters) if bank else ()


@locked
def active_adapter(model: keras.Model) -> str | None:
    """The adapter that is on.

    Args:
        model: A model.

    Returns:
        Its name; `None` where the model answers as its base.
    """
    bank = _bank(model)
    return bank.active if bank and is_lora_on(model) else None


@locked
def adapter_config(model: keras.Model) -> LoraConfig | None:
    """The configuration of the adapter that is on, or was last.

    Args:
        model: A model.

    Returns:
        Its own rank, alpha and target modules: the LoRA that several adapters share is as wide as
        the widest. `None` where LoRA is not on the model.
    """
    bank = _bank(model)
    return bank.adapters[bank.active].config if bank else None


@locked
def adapter_strength(model: keras.Model) -> float:
    """The strength of the adapter that is on, or was last.

    Args:
        model: A model.

    Returns:
        The `scale` it was switched to with, 1 where it was trained since or LoRA is not on the
        model.
    """
    bank = _bank(model)
    if bank is None:
        return 1.0
    _keep_trained(model, bank)
    return bank.scale


@locked
def set_adapter(model: keras.Model, name: str | None, *, scale: float = 1.0) -> None:
    """Switch to an adapter, with the template it was tuned with.

    Args:
        model: A model with adapters.
        name: One of `list_adapters(model)`; `None` switches all off, and the model answers as its
            base, bit for bit.
        scale: Strength of the adapter: its update times this number.

    Raises:
        AdapterError: There is no such adapter, or the scale is no finite number.
    """
    bank = _bank(model)
    if name is None:
        if bank:
            set_lora_on(model, on=False)
            attach_template(model, bank.base_template)
        return
    if bank is None or not isinstance(name, str) or name not in bank.adapters:
        raise AdapterError(
            f"There is no adapter {name!r} on this model.",
            next_step=f"There are: {', '.join(list_adapters(model)) or 'none'}. Load one with "
            "`load_adapter(model, path, name=…)`.",
        )
    if not _is_finite(scale):
        raise AdapterError(f"`scale` must be a finite number. Received: {scale!r}")
    _keep_trained(model, bank)
    adapter = bank.adapters[name]
    bank.assigned = _assign(model, adapter.values, scale)
    bank.active, bank.scale = name, scale
    set_lora_on(model, on=True)
    attach_template(model, adapter.template or bank.base_template)


@contextlib.contextmanager
def use_adapter(
    model: keras.Model, name: str | Active | None = ACTIVE, *, scale: float = 1.0
) -> Iterator[None]:
    """Switch to an adapter for a while, in which other threads wait for the model.

    Args:
        model: A model with adapters.
        name: As for `set_adapter`. Left out, nothing is switched, and nothing can be by others.
        scale: As for `set_adapter`.

    Yields:
        Nothing.

    Raises:
        AdapterError: As for `set_adapter`.
    """
    with model_lock(model):
        if isinstance(name, Active) or (name is None and _bank(model) is None):
            yield
            return
        bank = _bank(model)
        if bank is not None:
            _keep_trained(model, bank)
        before, held, strength = (bank.active, bank.assigned, bank.scale) if bank else ("", [], 1.0)
        on, template = is_lora_on(model), template_of(model)
        set_adapter(model, name, scale=scale)
        try:
            yield
        finally:
            _switch_back(model, before, held, strength)
            if before in list_adapters(model):
                set_lora_on(model, on=on)
                attach_template(model, template)


def _switch_back(
    model: keras.Model, before: str, held: list[tuple[Any, Any]], strength: float
) -> None:
    """Adapters may have been trained, loaded or removed in the meantime."""
    bank = _bank(model)
    if bank is None:
        return
    _keep_trained(model, bank)
    if before not in bank.adapters:
        set_adapter(model, None)
    elif bank.active != before or bank.assigned is not held:
        set_adapter(model, before, scale=strength)


@locked
def remove_adapter(model: keras.Model, name: str) -> None:
    """Take an adapter off a model and forget it.

    Args:
        model: A model with adapters.
        name: Its name. Where it was on, the model answers as its base afterwards; with the last one
            LoRA is taken off altogether.

    Raises:
        AdapterError: There is no such adapter.
    """
    bank = _bank(model)
    if bank is None or not isinstance(name, str) or name not in bank.adapters:
        raise AdapterError(
            f"There is no adapter {name!r} on this model.",
            next_step=f"There are: {', '.join(list_adapters(model)) or 'none'}.",
        )
    del bank.adapters[name]
    if not bank.adapters:
        remove_lora(model)
        attach_template(model, bank.base_template)
        del _banks[model]
    elif bank.active == name:
        first = next(iter(bank.adapters))
        bank.assigned = _assign(model, bank.adapters[first].values, 1.0)
        bank.active, bank.scale = first, 1.0
        set_adapter(model, None)


@locked
def add_adapter(
    model: keras.Model, name: str, config: LoraConfig, factors: Factors, template: Template | None
) -> None:
    """Put an adapter among those of a model, and switch to it. One of the same name is replaced.

    Args:
        model: The base, with or without other adapters.
        name: What to call it.
        config: Its rank, alpha and target_modules.
        factors: `A [rank, inputs]` and `B [outputs, rank]` by Hugging Face module name.
        template: The template it was tuned with.

    Raises:
        AdapterError: The name is empty, or is that of other LoRA, which was tuned in memory and
            would be lost.
    """
    problem = name_conflict(model, name, config)
    if problem:
        raise AdapterError(f"The adapter cannot be put on this model: {problem}")
    bank = _bank(model)
    plain_template = bank.base_template if bank else template_of(model)
    if bank is not None:
        _keep_trained(model, bank)
    others = {n: a for n, a in bank.adapters.items() if n != name} if bank else {}
    shared = _shared([config, *(other.config for other in others.values())])
    most = largest_rank(model, shared.target_modules)
    if shared.rank > most:
        raise AdapterError(
            f"Together the adapters need rank {shared.rank} on {', '.join(shared.target_modules)}, "
            f"and some of these layers can carry {most} at most.",
            next_step="Load it on another copy of the base, or call `remove_adapter` first.",
        )
    if bank is None or not _fits(bank.lora, shared, alone=not others):
        plain = {n: _factors(model, other) for n, other in others.items()}
        if lora_config(model) is not None:
            remove_lora(model)
        enable_lora(
            model, shared.rank, alpha=shared.alpha, target_modules=shared.target_modules,
            use_rslora=shared.use_rslora, verbose=0,
        )  # fmt: skip
        for other_name, other in others.items():
            other.values = _values(model, other.config, plain[other_name])
    lora = lora_config(model)
    assert lora is not None
    own = dataclasses.replace(config, total_parameters=lora.total_parameters)
    values = _values(model, own, factors)
    order = dict.fromkeys([*(bank.adapters if bank else ()), name])
    everything = {**others, name: _Adapter(own, values, template)}
    _banks[model] = _Bank(
        lora, {n: everything[n] for n in order}, plain_template, name, _assign(model, values, 1.0)
    )
    set_lora_on(model, on=True)
    attach_template(model, template or plain_template)


def name_conflict(model: keras.Model, name: Any, config: LoraConfig) -> str | None:
    """Why a name cannot be given to an adapter, or `None` where it can.

    Args:
        model: The base, with or without other adapters.
        name: The name.
        config: The adapter's rank, alpha and target_modules.

    Returns:
        A line that says what is wrong with it.
    """
    if not isinstance(name, str) or not name:
        return f"`name` must be a text that is not empty. Received: {name!r}"
    bank = _bank(model)
    there = bank.adapters.get(name) if bank else None
    if there is None or there.loaded or _alike(there.config, config):
        return None
    return (
        f"other LoRA is on the model under the name {name!r} ({there.config}): load the adapter "
        "under another `name`, or call `remove_lora(model)` first"
    )


@locked
def chosen_adapter(model: keras.Model, name: str | Active = ACTIVE) -> str:
    """The name of an adapter that is there.

    Args:
        model: A model with LoRA on.
        name: One of `list_adapters(model)`; by default the one that is on, or was last.

    Returns:
        The name.

    Raises:
        AdapterError: There is no such adapter.
    """
    bank = _bank(model)
    chosen = bank.active if bank and isinstance(name, Active) else name
    if bank is None or chosen not in bank.adapters:
        raise AdapterError(
            "There is no such adapter on this model."
            if bank
            else "There is no adapter to save: LoRA is not on this model.",
            next_step="Tune with `method='lora'`, or save the whole model with `save_preset`.",
        )
    return str(chosen)


@locked
def adapter_factors(
    model: keras.Model, name: str | Active = ACTIVE
) -> tuple[LoraConfig, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """An adapter as it was trained: its own rank, alpha and target_modules, and its factors.

    Args:
        model: As for `chosen_adapter`.
        name: As for `chosen_adapter`.

    Returns:
        Its configuration, and `A [rank, inputs]` and `B [outputs, rank]` by Hugging Face module
        name.

    Raises:
        AdapterError: There is no such adapter.
    """
    chosen, bank = chosen_adapter(model, name), _bank(model)
    assert bank is not None
    _keep_trained(model, bank)
    adapter = bank.adapters[chosen]
    return adapter.config, _factors(model, adapter)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


# The bank of a model.


def _bank(model: keras.Model) -> _Bank | None:
    """Its adapters. LoRA that was put on without a name is the one called `"default"`."""
    lora, bank = lora_config(model), _banks.get(model)
    if lora is None:
        _banks.pop(model, None)
        return None
    if bank is None or bank.lora is not lora:
        held = _held(model)
        adapter = _Adapter(lora, held, template_of(model), loaded=False)
        bank = _Bank(lora, {DEFAULT: adapter}, base_template(model), DEFAULT, held)
        _banks[model] = bank
    return bank


def _held(model: keras.Model) -> list[tuple[Any, Any]]:
    layers = [linear.layer for linear in lora_linears(model)]
    return [(layer.lora_kernel_a.value, layer.lora_kernel_b.value) for layer in layers]


def _keep_trained(model: keras.Model, bank: _Bank) -> None:
    """What the variables hold goes into the bank, where it is not what was assigned to them."""
    held = _held(model)
    same = all(a is c and b is d for (a, b), (c, d) in zip(held, bank.assigned, strict=True))
    adapter = bank.adapters.get(bank.active)
    if adapter is not None and is_lora_on(model):
        adapter.template = template_of(model) or adapter.template
    if same or adapter is None:
        return
    adapter.values = bank.assigned = held
    bank.scale = 1.0


def _assign(
    model: keras.Model, values: list[tuple[Any, Any]], scale: float
) -> list[tuple[Any, Any]]:
    """Give the variables an adapter's values, and return what they hold."""
    if scale != 1.0:
        values = [(a, b * np.asarray(scale, b.dtype)) for a, b in values]
    return _assign_as(model, values)


def _assign_as(model: keras.Model, values: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    for linear, (a, b) in zip(lora_linears(model), values, strict=True):
        linear.layer.lora_kernel_a.assign(a)
        linear.layer.lora_kernel_b.assign(b)
    return _held(model)


# Between an adapter's own form and the shared one.


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
    """Whether adapters that need one LoRA can live in another."""
    if alone:
        return _alike(lora, wanted)
    return lora.rank >= wanted.rank and set(lora.target_modules) >= set(wanted.target_modules)


def _alike(first: LoraConfig, second: LoraConfig) -> bool:
    names = ("rank", "alpha", "target_modules", "use_rslora")
    return all(getattr(first, name) == getattr(second, name) for name in names)


def _values(model: keras.Model, config: LoraConfig, factors: Factors) -> list[tuple[Any, Any]]:
    """Factors in the shapes of the model's LoRA. The variables are left as they were."""
    lora = lora_config(model)
    assert lora is not None
    before = _held(model)
    for linear in lora_linears(model):
        given_a, given_b, _ = get_factors(linear)
        a, b = np.zeros_like(given_a), np.zeros_like(given_b)
        if linear.hugging_face in factors:
            own_a, own_b = factors[linear.hugging_face]
            a[: config.rank] = own_a
            b[:, : config.rank] = own_b * _ratio(config.scale, lora.scale)
        set_factors(linear, a, b)
    values = _held(model)
    _assign_as(model, before)
    return values


def _factors(model: keras.Model, adapter: _Adapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The inverse of `_values`."""
    lora = lora_config(model)
    assert lora is not None
    config, before = adapter.config, _held(model)
    _assign_as(model, adapter.values)
    found = {}
    for linear in lora_linears(model):
        if linear.target in config.target_modules:
            a, b, _ = get_factors(linear)
            own_b = b[:, : config.rank] * _ratio(lora.scale, config.scale)
            found[linear.hugging_face] = (a[: config.rank].copy(), np.ascontiguousarray(own_b))
    _assign_as(model, before)
    return found


def _ratio(first: float, second: float) -> np.float32:
    return np.float32(1.0 if first == second else first / second)
