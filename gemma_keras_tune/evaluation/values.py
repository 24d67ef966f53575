"""Types of the values that users give, each with its limits and its description in words.

A type is written once, beside the field or the argument that it is for, and `problem` reads it
with msgspec.
"""

import reprlib
import sys
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

_MAX = sys.float_info.max

Flag = Annotated[bool, Meta(description="true or false")]
Text = Annotated[str, Meta(description="text")]
Count = Annotated[int, Meta(ge=0, description="a whole number from 0")]
PositiveInt = Annotated[int, Meta(ge=1, description="a whole number from 1")]
Real = Annotated[float, Meta(ge=-_MAX, le=_MAX, description="a number")]
NonNegative = Annotated[float, Meta(ge=0, le=_MAX, description="a number from 0")]
Positive = Annotated[float, Meta(gt=0, le=_MAX, description="a number over 0")]
Share = Annotated[float, Meta(gt=0, le=1, description="a number over 0 and up to 1")]
Confidence = Annotated[float, Meta(gt=0, lt=1, description="between 0 and 1")]
AutoCount = Annotated[Literal["auto"] | Count, Meta(description="'auto' or a whole number from 0")]
AutoPositiveInt = Annotated[
    Literal["auto"] | PositiveInt, Meta(description="'auto' or a whole number from 1")
]


def fits(value: Any, kind: Any) -> bool:
    """Test a value against a type, without any conversion from text.

    Args:
        value: Any value.
        kind: A type, such as `PositiveInt`.

    Returns:
        True if the value is of the type and within its limits.
    """
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def problem(name: str, value: Any, kind: Any) -> str:
    """Describe what is wrong with an argument or a field.

    Args:
        name: Its name.
        value: Its value.
        kind: A type with a description, such as `PositiveInt`; any other type accepts all values.

    Returns:
        One sentence; empty if nothing is wrong.
    """
    metas = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    words = next((m.description for m in reversed(metas) if isinstance(m, Meta)), None)
    if words is None or fits(value, kind):
        return ""
    return f"`{name}` must be {words}, got {shown(value)}"


def shown(value: Any) -> str:
    """Write a value in few characters, however large it is.

    Args:
        value: Any value; a file may hold nested lists that no memory could write out.

    Returns:
        Its `repr`, shortened.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= 160 else text[:159] + "…"
