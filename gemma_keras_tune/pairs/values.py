"""Values of rows: text, answers written as JSON, structures written as text, missing values."""

import ast
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

MAX_STRUCTURE = 2**22  # characters of a list or dictionary in a cell; Python's repr is slow to read
_DEEP = 20


class ReadingError(Exception):
    """A row or conversation that cannot be used, for one or more reasons."""

    def __init__(self, problems: Sequence[str], *, schema: bool = False) -> None:
        super().__init__(*problems)
        self.problems = problems
        self.schema = schema


def read_text(value: Any, label: str, problems: list[str]) -> str:
    """Return the value as text, unchanged; add what is wrong with it to `problems`."""
    if type(value) is str and value.isascii() and value and not value.isspace():
        return value
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            byte = value[error.start]
            problems.append(f"{label} is not UTF-8: byte 0x{byte:02x} at byte {error.start + 1}")
            return ""
    if isinstance(value, str):
        if value and not value.isspace() and not unreadable(value):
            return str(value)
        problems.append(f"{label} {unreadable(value) or 'is empty'}")
    elif is_missing(value):
        problems.append(f"{label} is missing (its value is {value!r})")
    else:
        problems.append(f"{label} must be text, got {kind(value)}: {shorten(value)}")
    return ""


def unreadable(text: str) -> str | None:
    """Say why text from a file or a JSON escape is not Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # How Python marks a byte that could not be decoded.
            return f"is not UTF-8: byte 0x{code - 0xDC00:02x} at character {error.start + 1}"
        return f"holds half a surrogate pair at character {error.start + 1}"
    return None


def write_answer(value: Any, label: str, problems: list[str]) -> str:
    """Return the value as text; a dictionary or list as JSON."""
    if isinstance(value, str) or not (isinstance(value, Mapping) or is_list(value)):
        return read_text(value, label, problems)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_to_json)
    except (TypeError, ValueError, RecursionError) as error:
        problems.append(f"{label} cannot be written as JSON: {error}")
        return ""
    return read_text(text, label, problems)


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers.
        return value.tolist()
    raise TypeError(f"it holds {kind(value)}")


def parse_structure(text: str | bytes, label: str) -> Any:
    """Read a list or dictionary that is written as JSON or in Python's notation, as in CSV files.

    Raises:
        ReadingError: It is neither.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        failure = error
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    if len(text) <= MAX_STRUCTURE:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    hint = ""
    if "}\n {" in text or "array(" in text:
        hint = "; NumPy wrote it as it shows an array, so write it again with `json.dumps`"
    raise ReadingError([f"{label} is broken JSON: {failure}{hint}"])


def is_list(value: Any) -> bool:
    """Tell whether a value is a list, a tuple or a NumPy array with dimensions."""
    return isinstance(value, (list, tuple)) or _is_array(value)


def _is_array(value: Any) -> bool:
    return hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0


def as_list(value: Any) -> Any:
    """Turn a NumPy array into a list; leave anything else as it is."""
    return value.tolist() if _is_array(value) else value


def is_missing(value: Any) -> bool:
    """Tell whether a value is None, a NaN of any kind, or one of pandas' missing values."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    try:
        return math.isnan(value)
    except (TypeError, ValueError, OverflowError):
        return False


def is_empty(value: Any) -> bool:
    """Tell whether an optional text is not there: missing, or white space alone."""
    if isinstance(value, (str, bytes)):
        return not value or value.isspace()
    return value is None or is_missing(value)


def is_blank(value: Any, depth: int = 0) -> bool:
    """Tell whether a value holds nothing: missing, white space, or empty throughout.

    Arrow fills missing parts of a structure with `None`, and text files write them as `[]`.
    """
    if value is None or isinstance(value, (bool, int)):
        return value is None
    if isinstance(value, (str, bytes)):
        return not value or value.isspace() or (len(value) < 5 and value in _BLANK_TEXTS)
    if depth < _DEEP and isinstance(value, Mapping):
        return all(is_blank(part, depth + 1) for part in value.values())
    if depth < _DEEP and is_list(value):
        return all(is_blank(part, depth + 1) for part in value)
    return is_missing(value)


_BLANK_TEXTS = ("[]", "{}", "null", "None", b"[]", b"{}")


def kind(value: Any) -> str:
    """Name the type of a value, with its article."""
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def shorten(value: Any) -> str:
    """Show a value in at most 60 characters, without writing a long one out."""
    if isinstance(value, (str, bytes)):
        return f"{value[:60]!r:.60}"
    return f"{_short.repr(value):.60}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxdict = _short.maxlist = 6
