"""Recomputation: layers that keep nothing but their inputs between the forward and backward pass.

In the backward pass each of them runs forward once more (Chen et al., 2016, arXiv:1604.06174; also
called gradient checkpointing). Keras's `RematScope` must be open while a model is built, and fails
on Gemma 3n, whose `training` it traces. And `jax.checkpoint` saves nothing on a CPU: XLA drops the
barrier it sets, and repeats every layer at once. So a layer's class becomes a subclass of itself
while the forward pass is traced, and its repetition computes with the slope that it waits for.
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
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    weights = {id(weight) for weight in layer.weights}
    seeds = [variable for variable in layer.variables if id(variable) not in weights]
    groups = (layer.trainable_variables, layer.non_trainable_variables)

    def forward(trained: list[Any], fixed: list[Any], arrays: list[Any]) -> tuple[Any, list[Any]]:
        rest = iter(arrays)
        filled = [next(rest) if here else leaf for here, leaf in zip(is_array, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, filled)
        values = zip(groups[0] + groups[1], trained + fixed, strict=True)
        with keras.StatelessScope(state_mapping=list(values)) as scope:
            result = call(*args, **kwargs)
        return result, [scope.get_current_value(seed) for seed in seeds]

    with AutocastScope(None):  # the weights themselves, and no copies in what the layer computes in
        values = [[variable.value for variable in group] for group in groups]
    arrays = [leaf for here, leaf in zip(is_array, leaves, strict=True) if here]
    result, states = _run_twice(forward, *values, arrays)
    for seed, state in zip(seeds, states, strict=True):
        seed.assign(state)
    return result


def _run_twice(forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a function, and run it again in the backward pass, where its trained inputs have slopes.

    Python runs it once: in the backward pass, Keras would no longer know that it trains.
    """
    traced, shapes = jax.make_jaxpr(forward, return_shape=True)(*inputs)

    def run(*inputs: Any) -> Any:
        flat = jaxpr_as_fun(traced)(*jax.tree.leaves(inputs))
        return jax.tree.unflatten(jax.tree.structure(shapes), flat)

    def backward(kept: tuple[Any, Any, Any], slopes: Any) -> tuple[Any, None, Any]:
        trained, fixed, arrays = kept
        repeated = _after(slopes, arrays)
        _, pull = jax.vjp(lambda trained, arrays: run(trained, fixed, arrays), trained, repeated)
        to_trained, to_arrays = pull(slopes)
        # XLA would otherwise put these off, and hold the activations of every layer for them.
        return to_trained, None, _after(to_trained, to_arrays)

    twice = jax.custom_vjp(run)
    twice.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
    return twice(*inputs)


def _after(first: Any, arrays: list[Any]) -> list[Any]:
    """Return the same arrays, but XLA takes them for others that are computed from `first`."""
    zero = sum(0 * value.ravel()[0] for value in jax.tree.leaves(first) if _is_float(value))
    zeros = (jnp.asarray(zero, array.dtype) if _is_float(array) else None for array in arrays)
    return [a if none is None else a + none for a, none in zip(arrays, zeros, strict=True)]


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
