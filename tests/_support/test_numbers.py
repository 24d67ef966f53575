"""Numbers that users pass."""

import math

import numpy as np
import pytest

from gemma_keras_tune._support.numbers import NOT_NEGATIVE, POSITIVE, integer, plain


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (integer(1), [1, 10**20, np.int64(3), np.uint8(1)], [0, -1, 1.0, True, np.bool_(1), "1"]),
        (integer(0), [0, np.int32(0)], [-1, False, None]),
        (POSITIVE, [1, 0.5, np.float32(0.5)], [0, -1.0, math.inf, math.nan, True, "1", None]),
        (NOT_NEGATIVE, [0, 0.0, 3], [-1e-9, math.inf, math.nan, [1]]),
    ],
)
def test_numbers_are_accepted_or_described(rule, good, bad):
    assert all(rule.accepts(value) and rule.problem("x", value) is None for value in good)
    for value in bad:
        assert rule.problem("x", value) == f"`x` must be {rule.words}. Received: {value!r}"


def test_other_values_are_accepted_by_name():
    assert integer(1).problem("x", None, None) is None
    assert integer(1).problem("x", "auto", "auto", None) is None
    problem = integer(1).problem("x", "all", "auto", None)
    assert problem == "`x` must be 'auto' or an integer of at least 1. Received: 'all'"


def test_scalars_of_numpy_become_python_s():
    for value in (np.int64(3), np.float32(0.5), np.bool_(True), np.str_("a")):
        assert type(plain(value)) in (int, float, bool, str) and plain(value) == value
    assert plain(None) is None
