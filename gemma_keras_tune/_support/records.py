"""Conversion of JSON data into dataclasses, with every fault listed.

msgspec converts and checks. It stops at the first fault, so each field is read by itself.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

Record = TypeVar("Record")

Whole = Annotated[int, Meta(ge=0, description="a whole number of at least 0")]
TokenId = Annotated[int, Meta(ge=0, lt=2**31, description="a token id")]
Finite = Annotated[float, Meta(gt=-1e30, lt=1e30, description="a finite number")]
_MAX_SHOWN = 80


def read_record(
    kind: type[Record], data: Any, where: str = "", problems: list[str] | None = None
) -> Record | None:
    """Read a dataclass from JSON data.

    Args:
        kind: The dataclass. Its field types say what is valid; a `Meta` with a description says it
            in words too. A method `faults` may name what is wrong between fields.
        data: What `json.loads` returns.
        where: The path of the data, for the messages.
        problems: All faults are added here, one line each.

    Returns:
        The record, or `None` where there is a fault.
    """
    found: list[str] = [] if problems is None else problems
    before = len(found)
    if not isinstance(data, Mapping):
        found.append(_message(where or "the data", "an object", data))
        return None
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    types = typing.get_type_hints(kind, include_extras=True)
    if extra := sorted(set(data) - set(fields)):
        found.append(f"{where or 'the data'} holds unknown entries: {', '.join(extra)[:200]}")
    values = {}
    for name, field in fields.items():
        if name in data or field.default is dataclasses.MISSING:
            values[name] = _value(types[name], data.get(name), f"{where}.{name}".lstrip("."), found)
    if len(found) > before:
        return None
    record = kind(**values)
    faults = getattr(record, "faults", None)
    found += [f"{where}.{fault}".lstrip(".") for fault in (faults() if faults else ())]
    return record if len(found) == before else None


def _value(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(kind):
        return read_record(typing.cast(type, kind), value, where, problems)
    inner = get_args(kind)[0] if get_origin(kind) is tuple else None
    if inner is not None and isinstance(value, list):
        return tuple(_value(inner, v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problems.append(_message(where, _description(kind) or _expected(error), value))
        return None


def _description(kind: Any) -> str:
    metas = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((meta.description for meta in metas if isinstance(meta, Meta)), None) or ""


def _expected(error: msgspec.ValidationError) -> str:
    found = re.search(r"Expected `(.+?)`(?:,|$)", str(error))
    return found[1] if found else "valid"


def _message(where: str, expected: str, value: Any) -> str:
    return f"{where} must be {expected}. Received: {repr(value)[:_MAX_SHOWN]}"
