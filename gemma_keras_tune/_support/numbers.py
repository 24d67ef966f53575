"""Checks of the numbers that users pass."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """The valid values of a numeric argument; numbers of NumPy are numbers, truth values are not.

    Attributes:
        words: A description, such as `"an integer of at least 1"`.
        kind: The abstract type of the numbers.
        fits: A test of a number of this type.
    """

    words: str
    kind: type
    fits: Callable[[Any], bool]

    def accepts(self, value: Any) -> bool:
        """Tell whether a value is valid."""
        is_number = isinstance(value, self.kind) and not isinstance(value, bool)
        return is_number and self.fits(value)

    def problem(self, name: str, value: Any, *others: str | None) -> str | None:
        """Describe what is wrong with the value of an argument.

        Args:
            name: The argument.
            value: The value that was passed.
            *others: Valid values that are not numbers.

        Returns:
            One line, or `None` where the value is valid.
        """
        if (value is None or isinstance(value, str)) and value in others:
            return None
        if self.accepts(value):
            return None
        words = " or ".join([*(repr(other) for other in others if other), self.words])
        return f"`{name}` must be {words}. Received: {value!r}"


def integer(minimum: int) -> Rule:
    """Accept integers of at least `minimum`."""
    return Rule(
        f"an integer of at least {minimum}", numbers.Integral, lambda value: bool(value >= minimum)
    )


POSITIVE = Rule("a number above 0", numbers.Real, lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("a number of at least 0", numbers.Real, lambda value: 0 <= value < math.inf)


def plain(value: Any) -> Any:
    """Turn a scalar of NumPy into Python's own; leave anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value
