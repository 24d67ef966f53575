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
    """Test a value against a type, such as `PositiveInt`, without any conversion from text."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def problem(name: str, value: Any, kind: Any) -> str:
    """Describe in a sentence what is wrong with an argument or a field; empty if nothing is.

    Types without a description accept all values.
    """
    metas = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    words = next((m.description for m in reversed(metas) if isinstance(m, Meta)), None)
    if words is None or fits(value, kind):
        return ""
    return f"`{name}` must be {words}, got {shown(value)}"


def shown(value: Any) -> str:
    """Write a value in few characters, as its `repr`, shortened.

    A file may contain nested lists that no memory could write out.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= 160 else text[:159] + "…"
