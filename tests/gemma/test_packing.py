"""Kernels packed for the CPU: unpacked as they were, and no longer transposed in the program."""

import re

import jax
import numpy as np
import pytest
from keras import ops

from gemma_keras_tune.gemma.families import family_of
from gemma_keras_tune.gemma.packing import axes_of, pack, packed_axes, unpack
from gemma_keras_tune.testing import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacked_as_they_were(family: str) -> None:
    model = tiny_model(family)
    axes = axes_of(model.variables, model)
    assert sum(a is not None for a in axes) == len(packed_axes(model))
    assert bool(packed_axes(model)) == (family != "gemma3n")  # whose kernels are matrices
    values = [variable.value for variable in model.variables]
    for before, after in zip(values, unpack(pack(values, axes), axes), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_packed_kernel_is_not_transposed_again() -> None:
    layer = family_of(model := tiny_model("gemma3")).linears(model)[0].layer
    axes = packed_axes(model)[id(layer.kernel)]
    shape = [16, 4, 8]
    assert [layer.kernel.shape[axis] for axis in axes] == shape

    def transposes(packed: bool) -> int:
        def product(x, kernel):
            kernel = unpack([kernel], [axes])[0] if packed else kernel
            return ops.einsum(layer.equation, x, kernel)

        kernel = pack([layer.kernel.value], [axes])[0] if packed else layer.kernel.value
        text = jax.jit(product).lower(np.ones((2, 3, 16), "float32"), kernel).compile().as_text()
        return len(re.findall(r"= f32\[[\d,]*\]\{[\d,]*\} (?:transpose|copy)\(", text))

    assert transposes(packed=True) == 0
    assert transposes(packed=False) > 0
