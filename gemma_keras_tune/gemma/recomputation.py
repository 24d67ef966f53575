"""Recomputation: layers that keep nothing but their inputs between the forward and backward pass.

In the backward pass each of them runs forward once more (Chen et al., 2016, arXiv:1604.06174; also
called gradient checkpointing). Keras's `RematScope` must be open while a model is built, and fails
on Gemma 3n, whose `training` it traces. And `jax.checkpoint` saves nothing on a CPU: XLA drops the
barrier that it sets, and repeats every layer at once. So a layer's class becomes a subclass of
itself while the forward pass is traced, and `_apart` keeps its repetition apart.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.extend.core import jaxpr_as_fun
from keras.src.backend.common.variables import AutocastScope


@contextlib.contextmanager
def recomputed(layers: Iterable[Any]) -> Iterator[None]:
    """Let layers be recomputed in the backward pass of what is traced in a block of code.

    Args:
        layers: Built Keras layers, none of them inside another.
    """
    before: list[tuple[Any, Any]] = [(layer, type(layer)) for layer in layers]
    try:
        for layer, kind in before:
            layer.__class__ = _recomputed_class(kind)
        yield
    finally:
        for layer, kind in before:
            layer.__class__ = kind


@functools.cache
def _recomputed_class(kind: Any) -> Any:
    class Recomputed(kind):
        def call(self, *args: Any, **kwargs: Any) -> Any:
            return _recomputed_call(self, super().call, args, kwargs)

        def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
            return _recomputed_call(self, super().quantized_call, args, kwargs)

    return Recomputed


def _recomputed_call(layer: Any, call: Callable[..., Any], *given: Any) -> Any:
    """Call a layer, and keep its inputs and its weights alone for the backward pass.

    Arrays among the arguments are traced, flags and numbers are not. The states of the layer's
    seeds go in and come out, so that the forward pass and its repetition draw the same noise.
    """
    leaves, structure = jax.tree.flatten(given)
    arrays, fill = _picked(leaves, lambda leaf: isinstance(leaf, jax.Array))
    weights = {id(weight) for weight in layer.weights}
    seeds = [variable for variable in layer.variables if id(variable) not in weights]
    groups = (layer.trainable_variables, layer.non_trainable_variables)

    def forward(trained: list[Any], fixed: list[Any], arrays: list[Any]) -> tuple[Any, list[Any]]:
        args, kwargs = jax.tree.unflatten(structure, fill(arrays))
        values = zip(groups[0] + groups[1], trained + fixed, strict=True)
        with keras.StatelessScope(state_mapping=list(values)) as scope:
            result = call(*args, **kwargs)
        return result, [scope.get_current_value(seed) for seed in seeds]

    with AutocastScope(None):  # the weights themselves, and no copies in what the layer computes in
        values = [[variable.value for variable in group] for group in groups]
    result, states = _run_twice(forward, *values, arrays)
    for seed, state in zip(seeds, states, strict=True):
        seed.assign(state)
    return result


def _run_twice(forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a function of trained values, fixed values and arrays, and again in the backward pass.

    Python runs it once: in the backward pass, Keras would no longer know that it trains.
    """
    traced, shapes = jax.make_jaxpr(forward, return_shape=True)(*inputs)

    def run(*inputs: Any) -> Any:
        flat = jaxpr_as_fun(traced)(*jax.tree.leaves(inputs))
        return jax.tree.unflatten(jax.tree.structure(shapes), flat)

    def backward(kept: tuple[Any, Any, Any], slopes: Any) -> tuple[Any, None, Any]:
        leaves, structure = jax.tree.flatten(slopes)
        steep, fill_slopes = _picked(leaves, _is_float)

        def pulled(trained: Any, fixed: Any, arrays: Any, steep: Any) -> Any:
            smooth, fill = _picked(arrays, _is_float)
            _, pull = jax.vjp(lambda t, smooth: run(t, fixed, fill(smooth)), trained, smooth)
            return pull(jax.tree.unflatten(structure, fill_slopes(steep)))

        to_trained, to_smooth = _apart(pulled, *kept, steep)
        _, fill = _picked([_is_float(array) or None for array in kept[2]], bool)
        return to_trained, None, fill(to_smooth)

    twice = jax.custom_vjp(lambda *inputs: _apart(run, *inputs))
    twice.defvjp(lambda *inputs: (_apart(run, *inputs), inputs), backward)
    return twice(*inputs)


def _apart(function: Callable[..., Any], *inputs: Any) -> Any:
    """Run a function as a part of the program that waits for all its inputs.

    On a CPU it is a branch that is always taken, which XLA cannot know: what the function holds
    beside its results is then freed at its end, the transposed weights among them. Elsewhere XLA
    keeps to a barrier.
    """
    if jax.default_backend() != "cpu":
        return function(*jax.lax.optimization_barrier(inputs))
    shapes = jax.eval_shape(function, *inputs)
    first = next(value for value in jax.tree.leaves(inputs[2:]) if _is_float(value))
    always = 0 * first.ravel()[0] != 1

    def never(*_: Any) -> Any:
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    return jax.lax.cond(always, function, never, *inputs)


def _picked(
    values: list[Any], where: Callable[[Any], bool]
) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """Pick values of a list, and make a function that puts others in their places."""
    picked = [where(value) for value in values]

    def fill(others: list[Any]) -> list[Any]:
        rest = iter(others)
        return [next(rest) if here else value for here, value in zip(picked, values, strict=True)]

    return [value for here, value in zip(picked, values, strict=True) if here], fill


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
