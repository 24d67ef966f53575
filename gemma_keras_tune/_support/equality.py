"""Equality of dataclasses that hold arrays."""

import dataclasses
from typing import Any

import numpy as np


class ArrayEquality:
    """A base of dataclasses with `eq=False` that compares arrays by their shapes and values.

    The `==` that `dataclass` makes asks for the truth value of an array, which is an error.
    """

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in _fields(self))


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)


def _equal(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)
