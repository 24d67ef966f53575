"""Low-rank adaptation (LoRA) on every Gemma family, in the factorisation the field shares.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds `scale * x A B` to a frozen linear layer. Keras has
LoRA on `EinsumDense`, but splits the kernel so that on a query kernel `[heads, width, head_dim]`
every head gets an `A` of its own: written as a PEFT adapter that is rank `heads * rank`. Here one
`A` serves all heads, as in PEFT and in the Gemma library for JAX, so rank r leaves as rank r.

The factors are kept under Keras's own names on the Keras layer (`lora_kernel_a`, `lora_kernel_b`,
`lora_rank`, `lora_alpha`, `lora_on`), in shapes whose `matmul` broadcasts to the kernel's. So
everything Keras and KerasHub do with LoRA goes on working: `layer.kernel` is the merged kernel and
`save_to_preset` writes a merged preset. In the forward pass the two thin products are taken instead
of the merged kernel, so no gradient of a full kernel is ever formed.
"""

import contextlib
import dataclasses
import difflib
import math
import numbers
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Literal

import jax
import keras
import numpy as np
from keras import ops

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune._support.interrupts import held_interrupts
from gemma_keras_tune.adapters._keras import (
    add_factor_weights,
    remove_factor_weights,
)
from gemma_keras_tune.errors import LoraError
from gemma_keras_tune.gemma.families import Family, Linear, family_of, stored_kernel
from gemma_keras_tune.gemma.state import locked, model_lock, state_of
from gemma_keras_tune.gemma.templates import attach_template

TargetModules = Literal["all", "attention"] | Iterable[str]
# `A [rank, inputs]` and `B [outputs, rank]`, float32, by Hugging Face module name.
Matrices = Mapping[str, tuple[np.ndarray, np.ndarray]]
# `lora_kernel_a` and `lora_kernel_b` of every layer with LoRA.
Values = list[tuple[Any, Any]]

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")
TARGET_GROUPS = {"all": ALL_TARGETS, "attention": ATTENTION_TARGETS}
# The same layers by KerasHub's names. Gemma 3n's have the names above.
_KERAS_TARGETS = (
    "query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"
)  # fmt: skip
DEFAULT: Final = "default"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Settings of LoRA on a model, and what they make trainable.

    Attributes:
        rank: Inner size of the factors.
        alpha: Scale before division: by `rank`, or by its square root when `use_rslora`.
        target_modules: Hugging Face module names of the adapted layers, sorted.
        use_rslora: True if the scale is `alpha / sqrt(rank)` (rsLoRA, arXiv:2312.03732).
        parameters: Number of trainable parameters.
        total_parameters: Number of parameters of the base model.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool
    parameters: int
    total_parameters: int

    @property
    def scale(self) -> float:
        """Factor on `A B`."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def __str__(self) -> str:
        share = 100 * self.parameters / self.total_parameters
        return (
            f"LoRA rank {self.rank}, alpha {self.alpha:g} on {', '.join(self.target_modules)}: "
            f"{self.parameters:,} of {self.total_parameters:,} parameters train ({share:.2f} %)"
        )


@dataclasses.dataclass
class NamedAdapter:
    """One adapter of a model, ready to be assigned.

    Attributes:
        config: Its own rank, alpha and target modules.
        values: Its factors in the shapes of the shared LoRA.
        loaded: True if it came by `load_adapter`, rather than by `tune` or `enable_lora`.
    """

    config: LoraConfig
    values: Values
    loaded: bool = True


@dataclasses.dataclass
class AdapterSet:
    """The LoRA of a model, and the adapters that share it.

    Attributes:
        lora: The shared LoRA: as wide as the widest adapter, on all layers any of them has.
        linears: The layers that carry it.
        was_trainable: The variables of the base, and whether each was trainable before.
        adapters: By name. A new dictionary replaces it, so other threads may read it at any time.
        held: Name of the adapter that the layers' variables hold.
        assigned: The arrays those variables were given.
        scale: Strength at which they were given them.
    """

    lora: LoraConfig
    linears: tuple[Linear, ...]
    was_trainable: list[tuple[keras.Variable, bool]]
    adapters: dict[str, NamedAdapter] = dataclasses.field(default_factory=dict)
    held: str = DEFAULT
    assigned: Values = dataclasses.field(default_factory=list)
    scale: float = 1.0

    def current(self) -> Values:
        """Return the arrays that the variables hold now."""
        layers = [linear.layer for linear in self.linears]
        return [(layer.lora_kernel_a.value, layer.lora_kernel_b.value) for layer in layers]

    @held_interrupts()
    def assign(self, name: str, scale: float = 1.0) -> None:
        """Give the variables the values of an adapter, its update times `scale`."""
        adapter = self.adapters[name]
        for linear, (a, b) in zip(self.linears, adapter.values, strict=True):
            linear.layer.lora_kernel_a.assign(a)
            linear.layer.lora_kernel_b.assign(b if scale == 1 else b * np.asarray(scale, b.dtype))
        self.held, self.assigned, self.scale = name, self.current(), scale
        if scale == 1:
            adapter.values = self.assigned

    def keep_trained(self) -> None:
        """Take over what was trained, or assigned by others, since `assign`.

        Arrays of JAX never change: variables that hold other ones have been given other values.
        """
        now = self.current()
        if any(new is not old for n, o in zip(now, self.assigned, strict=True)
               for new, old in zip(n, o, strict=True)):  # fmt: skip
            self.adapters[self.held].values = self.assigned = now
            self.scale = 1.0

    def values(self, config: LoraConfig, matrices: Matrices) -> Values:
        """Convert an adapter's own matrices to the shared LoRA, filled up with zeros."""
        found = []
        for linear in self.linears:
            outputs, inputs = matrix_shape(linear)
            a = np.zeros((self.lora.rank, inputs), "float32")
            b = np.zeros((outputs, self.lora.rank), "float32")
            if linear.hugging_face in matrices:
                a[: config.rank], own_b = matrices[linear.hugging_face]
                b[:, : config.rank] = own_b * _ratio(config.scale, self.lora.scale)
            both = _to_kernels(linear.layer, a, b)
            found.append((ops.convert_to_tensor(both[0]), ops.convert_to_tensor(both[1])))
        return found

    def matrices(self, adapter: NamedAdapter) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Convert an adapter back, as it was trained: the inverse of `values`."""
        config, found = adapter.config, {}
        for linear, values in zip(self.linears, adapter.values, strict=True):
            if linear.target in config.target_modules:
                a, b = _to_matrices(*values)
                own_b = b[:, : config.rank] * _ratio(self.lora.scale, config.scale)
                found[linear.hugging_face] = (a[: config.rank], np.ascontiguousarray(own_b))
        return found


def _ratio(first: float, second: float) -> np.float32:
    return np.float32(1.0 if first == second else first / second)


@locked
@held_interrupts()
def enable_lora(
    model: keras.Model,
    rank: int = 8,
    *,
    alpha: float | None = None,
    target_modules: TargetModules = "all",
    use_rslora: bool = False,
    seed: int = 0,
    verbose: int = 1,
) -> LoraConfig:
    """Freeze the model and put trainable low-rank factors on its linear layers.

    `A` starts uniform in `±1/sqrt(inputs)` (as in PEFT) and `B` at zero, so the model's output does
    not change until it is trained. The vision and audio towers are left alone.

    Args:
        model: A KerasHub Gemma `CausalLM` of any family.
        rank: Inner size of the factors, at least 1. At most the smaller side of every kernel.
        alpha: The update is scaled by `alpha / rank`. Defaults to `rank`, a scale of 1.
        target_modules: `"all"` linear layers of attention and feed-forward, `"attention"` alone, or
            names as Hugging Face (`"q_proj"`) or KerasHub (`"query"`) spell them.
        use_rslora: Scale by `alpha / sqrt(rank)` instead (rsLoRA, arXiv:2312.03732).
        seed: Seed of the initial `A`.
        verbose: 0 prints nothing, 1 prints what is trainable.

    Returns:
        The `LoraConfig` in force.

    Raises:
        LoraError: The rank is not a positive integer or too large, a target matches no layer, LoRA
            is already on, of this library or Keras's own, or a target layer is quantized to a form
            that cannot carry it.
    """
    check_backend()
    state = state_of(model)
    if state.adapters is not None:
        raise LoraError(
            f"LoRA is already on this model: {state.adapters.lora}",
            next_step="First call `merge_lora(model)` to keep it, or `remove_lora(model)`.",
        )
    rank = _rank(rank)
    alpha = _alpha(rank, alpha)
    linears = fitting_linears(model, rank, target_modules)
    found = put_on(model, linears, rank, alpha, use_rslora=use_rslora, seed=seed)
    found.adapters[DEFAULT] = NamedAdapter(found.lora, found.assigned, loaded=False)
    state.adapters, state.active = found, DEFAULT
    if verbose:
        print(found.lora)
    return found.lora


def fitting_linears(
    model: keras.Model, rank: int, target_modules: TargetModules
) -> tuple[Linear, ...]:
    """Return the layers that `target_modules` names, in layer order.

    Raises:
        LoraError: A name matches no layer, or a layer cannot carry the rank; all are named.
    """
    family = family_of(model)
    every = family.linears(model)
    if state_of(model).adapters is None:
        _check_bare(every)
    linears = _select(every, target_modules)
    _check_fit(family, linears, rank)
    return linears


def put_on(
    model: keras.Model,
    linears: tuple[Linear, ...],
    rank: int,
    alpha: float,
    *,
    use_rslora: bool,
    seed: int = 0,
) -> AdapterSet:
    """Freeze a model without LoRA, and give layers of `fitting_linears` their factors.

    Returns:
        An `AdapterSet` without adapters, which is not yet part of the model's state.
    """
    config = LoraConfig(
        rank=rank,
        alpha=alpha,
        target_modules=tuple(sorted({linear.target for linear in linears})),
        use_rslora=use_rslora,
        parameters=sum(rank * sum(matrix_shape(linear)) for linear in linears),
        total_parameters=model.count_params(),
    )
    found = AdapterSet(config, linears, [(v, v.trainable) for v in model.variables])
    for variable in model.variables:
        variable.trainable = False
    random = np.random.default_rng(seed)
    for linear in linears:
        _add_factors(linear, rank, config.scale * rank, random)
    found.assigned = found.current()
    _forget_compiled(model)
    return found


def take_off(model: keras.Model, adapters: AdapterSet) -> None:
    """Undo `put_on`."""
    for linear in adapters.linears:
        _remove_factors(linear.layer)
    for variable, trainable in adapters.was_trainable:
        variable.trainable = trainable
    _forget_compiled(model)


def lora_config(model: keras.Model) -> LoraConfig | None:
    """Return the LoRA configuration of a model.

    Args:
        model: A model.

    Returns:
        The LoRA that all adapters of the model share, or `None` without LoRA.
    """
    found = adapters_of(model)
    return found.lora if found else None


def adapters_of(model: keras.Model) -> AdapterSet | None:
    """Return the LoRA of a model and its adapters, `None` without LoRA."""
    found: AdapterSet | None = state_of(model).adapters
    return found


def lora_linears(model: keras.Model) -> tuple[Linear, ...]:
    """Return the linear layers that carry LoRA, in layer order; none without LoRA."""
    found = adapters_of(model)
    return found.linears if found else ()


@locked
def is_lora_on(model: keras.Model) -> bool:
    """Return True if the model has LoRA and it is not switched off, as by `lora_disabled`."""
    return any(linear.layer.lora_enabled for linear in lora_linears(model))


def lora_disabled(model: keras.Model) -> contextlib.AbstractContextManager[None]:
    """Switch LoRA off for a block of code: the model answers as its base, bit for bit.

    Other threads wait for the model meanwhile.

    Args:
        model: A model; without LoRA nothing happens.

    Returns:
        A context manager.

    Raises:
        TrainingError: Another thread trains the model.
    """
    return lora_switched(model, on=False)


@contextlib.contextmanager
def lora_switched(model: keras.Model, *, on: bool) -> Iterator[None]:
    """Switch LoRA on or off for a block of code; without LoRA nothing happens.

    A program traced while it is on serves the tuned model and the base: pass zeros for `B` to get
    the base.
    """
    with model_lock(model):
        was_on = is_lora_on(model)
        try:
            set_lora_on(model, on=on)
            yield
        finally:
            set_lora_on(model, on=was_on)


@locked
@held_interrupts()
def set_lora_on(model: keras.Model, *, on: bool) -> None:
    """Switch LoRA on or off on every layer that carries it."""
    if on == is_lora_on(model):
        return
    for linear in lora_linears(model):
        linear.layer.lora_enabled = on
    _forget_compiled(model)


@locked
@held_interrupts()
def remove_lora(model: keras.Model) -> None:
    """Take LoRA off and throw it away, with all adapters: the model is its base again.

    The template is again the one it had before LoRA was put on.

    Args:
        model: A model with LoRA on.

    Raises:
        LoraError: LoRA is not on.
    """
    take_off(model, _require(model))
    state = state_of(model)
    state.adapters = state.active = None
    state.templates = {name: one for name, one in state.templates.items() if name is None}


@locked
@held_interrupts()
def merge_lora(model: keras.Model) -> None:
    """Add the active adapter's update into the base kernels for good, and take LoRA off.

    The sum is taken in float32 and rounded once to the kernel's dtype. The template stays.

    Args:
        model: A model with LoRA on.

    Raises:
        LoraError: LoRA is not on, or the base is quantized, where a sum would be rounded away.
    """
    found = _require(model)
    quantized = [linear.path for linear in found.linears if linear.layer.quantization_mode]
    if quantized:
        raise LoraError(
            "LoRA cannot be merged into quantized kernels without loss.",
            quantized,
            "Save the adapter with `save_adapter`, and merge it into the unquantized model.",
        )
    template = state_of(model).template(found.held)
    for linear in found.linears:
        kernel = stored_kernel(linear.layer)
        kernel.assign(np.asarray(kernel, "float32") + kernel_update(linear))
    remove_lora(model)
    attach_template(model, template)


def get_factors(linear: Linear) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the factors of one layer in PEFT's layout.

    Args:
        linear: One of `lora_linears(model)`.

    Returns:
        `A [rank, inputs]`, `B [outputs, rank]` in float32 and the scale, so that the update of
        Hugging Face's `[outputs, inputs]` weight is `scale * B @ A`.
    """
    layer = linear.layer
    scale = layer.lora_alpha / layer.lora_rank
    return *_to_matrices(layer.lora_kernel_a, layer.lora_kernel_b), scale


def set_factors(linear: Linear, a: np.ndarray, b: np.ndarray) -> None:
    """Set the factors of one layer from PEFT's layout.

    Args:
        linear: One of `lora_linears(model)`.
        a: `[rank, inputs]`.
        b: `[outputs, rank]`.

    Raises:
        LoraError: The shapes do not fit the layer.
    """
    layer = linear.layer
    rank = layer.lora_rank
    outputs, inputs = matrix_shape(linear)
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise LoraError(
            f"The factors do not fit {linear.path}: expected A {(rank, inputs)} and "
            f"B {(outputs, rank)}. Received: A {a.shape}, B {b.shape}"
        )
    for variable, value in zip(
        (layer.lora_kernel_a, layer.lora_kernel_b), _to_kernels(layer, a, b), strict=True
    ):
        variable.assign(value)


def _to_matrices(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """`A [rank, inputs]` and `B [outputs, rank]` float32, from arrays in the layers' shapes."""
    a, b = np.asarray(a, "float32"), np.asarray(b, "float32")
    rank = a.shape[-1]
    matrix_b = np.moveaxis(b, -2, -1).reshape(-1, rank)
    return np.ascontiguousarray(a.reshape(-1, rank).T), np.ascontiguousarray(matrix_b)


def _to_kernels(layer: Any, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_to_matrices` for one layer."""
    *leading, rank, last = layer.lora_kernel_b.shape
    kernel_b = np.moveaxis(b.reshape(*leading, last, rank), -1, -2)
    return a.T.reshape(layer.lora_kernel_a.shape), kernel_b


def kernel_update(linear: Linear) -> np.ndarray:
    """Return what LoRA adds to one kernel, float32, in the kernel's own shape."""
    layer = linear.layer
    a, b = (np.asarray(f, "float32") for f in (layer.lora_kernel_a, layer.lora_kernel_b))
    return (layer.lora_alpha / layer.lora_rank) * np.matmul(a, b)


def _require(model: keras.Model) -> AdapterSet:
    found = adapters_of(model)
    if found is None:
        raise LoraError("LoRA is not on this model.", next_step="Call `enable_lora(model)` first.")
    return found


def _forget_compiled(model: keras.Model) -> None:
    """KerasHub caches a compiled `generate`, Keras compiled steps: they hold the old layers."""
    for name in ("generate_function", "train_function", "test_function", "predict_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def _rank(rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise LoraError(f"`rank` must be an integer of at least 1. Received: {rank!r}")
    return int(rank)


def _alpha(rank: int, alpha: Any) -> float:
    value = float(rank) if alpha is None else alpha
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):
        raise LoraError(f"`alpha` must be a positive number. Received: {alpha!r}")
    return float(value)


def _check_bare(linears: tuple[Linear, ...]) -> None:
    stock = [linear.path for linear in linears if linear.layer.lora_enabled]
    if stock:
        raise LoraError(
            "Keras's own LoRA is on this model, and would be lost.",
            stock,
            'Keep it with `model.backbone.save_lora_weights("x.lora.h5")`, load it anew, and '
            'go on with `load_adapter(model, "x.lora.h5")`.',
        )


def _select(linears: tuple[Linear, ...], target_modules: TargetModules) -> tuple[Linear, ...]:
    known = {linear.target for linear in linears}
    alias = {linear.layer.name: linear.target for linear in linears}
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise LoraError(
            f"`target_modules` must be names of layers. Received: {target_modules!r}",
            next_step=_known(known),
        )
    names = set(names)
    if not names:
        raise LoraError(
            "`target_modules` is empty: nothing would be trained.", next_step=_known(known)
        )
    # A group stands for those of its layers that the model has.
    wanted = {target for name in names for target in TARGET_GROUPS.get(name, ())} & known
    wanted |= {alias.get(name, name) for name in names - TARGET_GROUPS.keys()}
    unknown = wanted - known
    if unknown:
        raise LoraError(
            "`target_modules` names layers this model does not have; they would train nothing.",
            [repr(name) for name in sorted(unknown)],
            _known(known),
        )
    return tuple(linear for linear in linears if linear.target in wanted)


def check_targets(target_modules: TargetModules) -> None:
    """Refuse names of layers that no Gemma has.

    Args:
        target_modules: As `enable_lora` takes it.

    Raises:
        LoraError: There are such names; the nearest known ones are told.
    """
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    known = (*TARGET_GROUPS, *ALL_TARGETS, *_KERAS_TARGETS)
    if unknown := [name for name in names if name not in known]:
        near = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
        raise LoraError(
            "`target_modules` names layers that no Gemma has.",
            [repr(n) + (f": {near[n][0]!r} is one" if near[n] else "") for n in unknown],
            f"Known are {', '.join(map(repr, known))}.",
        )


def _known(known: set[str]) -> str:
    names = ", ".join(map(repr, sorted(known)))
    return f"Known target modules of this model: 'all', 'attention', {names}."


def _check_fit(family: Family, linears: tuple[Linear, ...], rank: int) -> None:
    problems = []
    for linear in linears:
        mode = linear.layer.quantization_mode
        if type(linear.layer) not in (*_LORA_CLASSES, *_LORA_CLASSES.values()):
            problems.append(f"{linear.path}: a {type(linear.layer).__name__} cannot carry LoRA")
        elif mode not in (None, "int8", "int4") or (mode and not family.quantized_lora):
            problems.append(
                f"{linear.path}: quantized to {mode}, which KerasHub computes wrongly here"
            )
        elif mode == "int4" and isinstance(linear.layer, keras.layers.Dense):
            problems.append(f"{linear.path}: LoRA on a Dense layer in int4 is not supported")
        elif rank > min(matrix_shape(linear)):
            problems.append(f"{linear.path}: the rank can be at most {min(matrix_shape(linear))}")
    if problems:
        raise LoraError(f"LoRA of rank {rank} does not fit every target layer.", problems)


def matrix_shape(linear: Linear) -> tuple[int, int]:
    """Return `(outputs, inputs)` of a layer seen as one matrix."""
    outputs, inputs = map(math.prod, axis_sizes(linear))
    return outputs, inputs


def axis_sizes(linear: Linear) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of the output axes and of the input axes of a layer's kernel."""
    kernel = kernel_shape(linear.layer)
    return (
        tuple(kernel[axis] for axis in linear.output_axes),
        tuple(kernel[axis] for axis in linear.input_axes),
    )


def largest_rank(model: keras.Model, target_modules: Iterable[str] = ALL_TARGETS) -> int:
    """Return the largest rank that every layer of these modules can carry: its smaller side."""
    wanted = set(target_modules)
    linears = (n for n in family_of(model).linears(model) if n.target in wanted)
    return min(min(matrix_shape(linear)) for linear in linears)


class _LoraForward:
    """Adds `scale * (x A) B` to the frozen layer's output instead of merging the kernel first."""

    def call(self: Any, inputs: Any, training: bool | None = None) -> Any:
        return _with_update(self, super().call, inputs)  # type: ignore[misc]

    def quantized_call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        base = super().quantized_call  # type: ignore[misc]
        return _with_update(self, lambda x: base(x, *args, **kwargs), inputs)


class _LoraEinsumDense(_LoraForward, keras.layers.EinsumDense):
    """`EinsumDense` whose LoRA is applied to the activations."""


class _LoraDense(_LoraForward, keras.layers.Dense):
    """`Dense` whose LoRA is applied to the activations."""


_LORA_CLASSES: dict[type, type] = {
    keras.layers.EinsumDense: _LoraEinsumDense,
    keras.layers.Dense: _LoraDense,
}


def _with_update(layer: Any, base: Callable[[Any], Any], inputs: Any) -> Any:
    if not layer.lora_enabled:
        return base(inputs)
    with without_lora(layer):  # the stock call would merge the kernel
        outputs = base(inputs)
    return ops.add(outputs, ops.cast(_update_of(layer, inputs), outputs.dtype))


def _update_of(layer: Any, inputs: Any) -> Any:
    into, out = _einsums(layer, len(inputs.shape))
    low = thin_product(into, inputs, _squeeze_ones(layer.lora_kernel_a, layer, first=True))
    high = thin_product(out, low, _squeeze_ones(layer.lora_kernel_b, layer, first=False))
    return ops.multiply(high, ops.cast(layer.lora_alpha / layer.lora_rank, high.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def thin_product(equation: str, x: Any, factor: Any) -> Any:
    """`einsum(equation, x, factor)`, with a gradient that is fast on the CPU.

    JAX multiplies `x` by the slope and transposes what comes out, and XLA on the CPU then computes
    the slope twice, the second time transposed: a quarter of a training step. Here the product has
    the factor's shape from the start.

    Args:
        equation: Two operands without an ellipsis, such as `"btd,dR->btR"`.
        x: Activations.
        factor: One of the two factors of an update.

    Returns:
        The product.
    """
    return ops.einsum(equation, x, factor)


def _thin_product_forward(equation: str, x: Any, factor: Any) -> tuple[Any, tuple[Any, Any]]:
    return thin_product(equation, x, factor), (x, factor)


def _thin_product_backward(equation: str, kept: tuple[Any, Any], slope: Any) -> tuple[Any, Any]:
    x, factor = kept
    operands, result = equation.split("->")
    of_x, of_factor = operands.split(",")
    to_x = ops.einsum(f"{result},{of_factor}->{of_x}", slope, factor)
    to_factor = ops.einsum(f"{result},{of_x}->{of_factor}", slope, x)
    return ops.cast(to_x, x.dtype), ops.cast(to_factor, factor.dtype)


thin_product.defvjp(_thin_product_forward, _thin_product_backward)


@contextlib.contextmanager
def without_lora(layer: Any) -> Iterator[None]:
    """Let one layer compute with its base kernel alone, for a block of code."""
    was_on, layer.lora_enabled = layer.lora_enabled, False
    try:
        yield
    finally:
        layer.lora_enabled = was_on


def _equation(layer: Any) -> tuple[str, str, str]:
    """Axis letters of input, kernel and output; `Dense` is `...x,xy->...y`."""
    if isinstance(layer, keras.layers.Dense):
        return "...x", "xy", "...y"
    source, rest = layer.equation.split(",")
    kernel, result = rest.split("->")
    return source, kernel, result


def _einsums(layer: Any, axes: int) -> tuple[str, str]:
    """`input, A -> low` and `low, B -> output`, for example `btd,dR->btR` and `btR,nRh->btnh`.

    Args:
        layer: The layer.
        axes: Axes of its input.
    """
    source, kernel, result = _equation(layer)
    leading = string.ascii_letters[: axes - 1]
    source, result = (part.replace("...", leading) for part in (source, result))
    contracted = "".join(axis for axis in kernel if axis in source)
    kept = "".join(axis for axis in source if axis not in contracted)
    heads = "".join(axis for axis in kernel[:-2] if axis not in source)
    into = f"{source},{contracted}R->{kept}R"
    return into, f"{kept}R,{heads}R{kernel[-1]}->{result}"


def _squeeze_ones(factor: Any, layer: Any, *, first: bool) -> Any:
    """The factor without axes of size one that only make `matmul(A, B)` broadcast to the kernel."""
    source, kernel, _ = _equation(layer)
    if first:
        ones = tuple(i for i, axis in enumerate(kernel[:-1]) if axis not in source)
    else:
        ones = tuple(i for i, axis in enumerate(kernel[:-2]) if axis in source)
    return ops.squeeze(factor, axis=ones) if ones else ops.convert_to_tensor(factor)


def _add_factors(linear: Linear, rank: int, alpha: float, random: np.random.Generator) -> None:
    """Give the layer its factors, under the names Keras's own LoRA uses."""
    layer = linear.layer
    source, kernel, _ = _equation(layer)
    shape = kernel_shape(layer)
    sizes = dict(zip(kernel, shape, strict=True))
    a_shape = [sizes[axis] if axis in source else 1 for axis in kernel[:-1]] + [rank]
    b_shape = [1 if axis in source else sizes[axis] for axis in kernel[:-2]] + [rank, shape[-1]]
    start = random.uniform(-1.0, 1.0, a_shape) / math.sqrt(math.prod(a_shape[:-1]))
    add_factor_weights(layer, _LORA_CLASSES[type(layer)], tuple(a_shape), tuple(b_shape))
    layer.lora_kernel_a.assign(start.astype("float32"))
    layer.lora_rank, layer.lora_alpha, layer.lora_enabled = rank, alpha, True


def _remove_factors(layer: Any) -> None:
    stock = next(stock for stock, ours in _LORA_CLASSES.items() if ours is type(layer))
    remove_factor_weights(layer, stock)
    layer.lora_rank, layer.lora_alpha, layer.lora_enabled = None, None, False


def kernel_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a kernel as the layer's equation sees it, packed or not."""
    if layer.quantization_mode != "int4":
        shape = stored_kernel(layer).shape
    elif isinstance(layer, keras.layers.Dense):
        shape = (layer.input_spec.axes[-1], layer.units)
    else:
        shape = layer.original_kernel_shape
    return tuple(int(size) for size in shape)
