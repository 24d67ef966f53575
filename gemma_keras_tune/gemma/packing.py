"""Kernels with their axes in the order in which XLA multiplies by them on the CPU.

KerasHub keeps a query kernel as `[heads, width, head_dim]`. XLA's matrix product on the CPU wants
the contracted axis first, and transposes the kernel at every use, which takes longer than the
product itself when few tokens run. A program that is handed the kernel as
`[width, heads, head_dim]`, and turns it back before use, does neither: the two turns cancel when it
is compiled.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from gemma_keras_tune.gemma.families import family_of

Axes = tuple[int, ...]


def packed_axes(model: Any) -> dict[int, Axes]:
    """Find the kernels that are faster to compute with when packed.

    Args:
        model: A KerasHub Gemma `CausalLM` or its backbone.

    Returns:
        By the `id` of a variable, the order of its axes to pack it in. Empty where arrays live on
        an accelerator, which chooses the layout itself.
    """
    import jax

    if jax.default_backend() != "cpu":
        return {}
    found = {}
    for weight in family_of(model).weights(model):
        inputs, outputs = weight.input_axes, weight.output_axes
        # What goes into an output kernel comes out of attention as [head_dim, heads].
        order = (*reversed(inputs), *outputs)
        sizes = weight.variable.shape
        if len(order) != len(sizes):  # packed by quantization
            continue
        # Axes of size one do not move anything.
        moved = [axis for axis in order if sizes[axis] > 1]
        if len(order) > 2 and moved != sorted(moved):
            found[id(weight.variable)] = order
    return found


def pack(values: Sequence[Any], axes: Sequence[Axes | None]) -> list[Any]:
    """Transpose arrays to the given orders of axes; `None` leaves one as it is."""
    return [v if a is None else ops.transpose(v, a) for v, a in zip(values, axes, strict=True)]


def unpack(values: Sequence[Any], axes: Sequence[Axes | None]) -> list[Any]:
    """Invert `pack`."""
    inverse = [None if a is None else tuple(a.index(i) for i in range(len(a))) for a in axes]
    return pack(values, inverse)


def axes_of(variables: Sequence[keras.Variable], model: Any) -> list[Axes | None]:
    """Return for each variable the order of axes to pack it in, or `None`."""
    packed = packed_axes(model)
    return [packed.get(id(variable)) for variable in variables]
