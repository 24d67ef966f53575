"""Text files of rows: JSON Lines, JSON arrays, and values separated by commas or tabs."""

import codecs
import csv
import gzip
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from gemma_keras_tune.errors import PairsError
from gemma_keras_tune.pairs.sources.rows import Broken, Keys, Record, Rows, whole

_CHUNK_CHARACTERS = 2**18
_MAX_FIELD = 2**28


def read_bytes(path: pathlib.Path) -> BinaryIO:
    """Open a text file as bytes, behind its UTF-8 byte order mark if there is one."""
    zipped = path.name.lower().endswith(".gz")
    file: Any = gzip.open(path, "rb") if zipped else open(path, "rb")  # noqa: SIM115
    head = file.read(3)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        file.close()
        raise PairsError(
            f"{path.name!r} is written in UTF-16.", next_step="Save it as UTF-8 and try again."
        )
    if head != codecs.BOM_UTF8:
        file.seek(0)
    return file


def _text(file: BinaryIO) -> io.TextIOWrapper:
    """Read the file as text, with marks for bytes that are not UTF-8; closing closes both."""
    return io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")


def _bad_byte(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not UTF-8 (byte {error.start + 1} of the line)"


def json_lines(file: BinaryIO) -> Iterator[Record]:
    """Read a record from each line that is not empty."""
    scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
    line = 0
    for line, raw in enumerate(file, 1):
        try:
            text = raw.decode()
            record, end = scan(text, 0)
            if text[end:].strip():
                record = json.loads(text)  # Raises, with what is wrong.
        except StopIteration:  # Nothing, or an indented record, or no JSON.
            if not raw.isspace():
                yield None, line, json_line(text)
            continue
        except UnicodeDecodeError as error:
            record = Broken(_bad_byte(error))
        except (ValueError, RecursionError) as error:
            record = _broken_json(error)
        yield None, line, record


def json_line(text: str) -> Any:
    """Read one text as JSON; a `Broken` row where it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _broken_json(error)


def _broken_json(error: Exception, *, fatal: bool = False) -> Broken:
    if isinstance(error, json.JSONDecodeError):
        return Broken(f"broken JSON at column {error.pos + 1}: {error.msg}", fatal)
    return Broken(f"broken JSON: {error}", fatal)


def json_rows(path: pathlib.Path, read: Callable[[BinaryIO], Iterator[Record]]) -> Rows:
    """Make the rows of a JSON file from a function that reads them."""

    def records(_: Keys) -> Iterator[Record]:
        with read_bytes(path) as file:
            yield from read(file)

    return Rows(path.name, lambda keys: whole(records(keys)), stable=True)


def skip_space(file: BinaryIO) -> bytes:
    """Read up to the next character that is not white space, and return it."""
    while (character := file.read(1)).isspace():
        pass
    return character


def json_array(file: BinaryIO) -> Iterator[Record]:
    """Parse the elements of one long JSON array, one at a time."""
    with _text(file) as text:
        yield from _array_elements(text)


def _array_elements(text: io.TextIOWrapper) -> Iterator[Record]:
    decode = json.JSONDecoder().raw_decode
    between = re.compile(r"[\s,]*")
    buffer = text.read(_CHUNK_CHARACTERS)
    position = buffer.index("[") + 1
    line = 1 + buffer.count("\n", 0, position)
    ended = False
    while True:
        start = between.match(buffer, position).end()  # type: ignore[union-attr]
        line += buffer.count("\n", position, start)
        position = start
        if buffer[position : position + 1] == "]":
            if buffer[position + 1 :].strip() or text.read().strip():
                yield None, line, Broken("there is text after the end of the array", fatal=True)
            return
        failure: Exception | None = None
        try:
            record, end = decode(buffer, position)
        except (ValueError, RecursionError) as error:
            failure = error
        if not ended and (end == len(buffer) if failure is None else _cut(failure, buffer)):
            more = text.read(max(_CHUNK_CHARACTERS, len(buffer) - position))
            ended = not more
            buffer = buffer[position:] + more
            position = 0
            continue
        if failure is not None:
            yield None, line, _broken_array(failure, buffer, position, line)
            return
        yield None, line, record
        line += buffer.count("\n", position, end)
        position = end


def _cut(failure: Exception, buffer: str) -> bool:
    """Tell if parsing may have failed only because the buffer ends."""
    if not isinstance(failure, json.JSONDecodeError):
        return False
    return failure.pos > len(buffer) - 64 or failure.msg.startswith("Unterminated string")


def _broken_array(failure: Exception, buffer: str, position: int, line: int) -> Broken:
    if position >= len(buffer):
        return Broken("the file ends before the array does", fatal=True)
    if isinstance(failure, json.JSONDecodeError):
        line += buffer.count("\n", position, failure.pos)
        text = f"broken JSON in line {line}: {failure.msg}; the rest cannot be read"
        return Broken(text, fatal=True)
    return _broken_json(failure, fatal=True)


def open_csv(path: pathlib.Path) -> Rows:
    """Open a file with commas, semicolons or tabs, in which quotes hold fields together."""
    with read_bytes(path) as file:
        first = file.readline()
    delimiter = next((mark for mark in (",", ";", "\t") if mark.encode() in first), ",")
    return _open_delimited(path, delimiter)


def open_tsv(path: pathlib.Path) -> Rows:
    """Open a file with tabs and without quoting."""
    return _open_delimited(path, "\t", _tab_separated)


def _open_delimited(
    path: pathlib.Path, delimiter: str, read: "Callable[..., Iterator[Record]] | None" = None
) -> Rows:
    read = read or _delimited
    # The limit is the process's, and 128 KiB by default, which a long document passes.
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD))
    with read_bytes(path) as file:
        first = next(read(file, delimiter), (None, None, ()))[2]
    if isinstance(first, Broken):
        raise PairsError(f"The first line of {path.name!r} cannot be read: {first.text}.")
    columns = tuple(first)

    def records(_: Keys) -> Iterator[Record]:
        with read_bytes(path) as file:
            rows = read(file, delimiter)
            next(rows, None)
            for _file, line, values in rows:
                if type(values) is list:
                    if len(values) != len(columns):
                        values = Broken(_field_count(len(values), columns))
                    else:
                        values = dict(zip(columns, values, strict=True))
                yield None, line, values

    return Rows(path.name, lambda keys: whole(records(keys)), columns=columns, stable=True)


def _field_count(count: int, columns: Sequence[str]) -> str:
    fields = "1 field" if count == 1 else f"{count} fields"
    return f"{fields}, but the first line names {len(columns)} columns"


def _delimited(file: BinaryIO, delimiter: str) -> Iterator[Record]:
    """Read the rows of a CSV file, also the first one, each with the line it begins on."""
    undecodable: list[tuple[int, UnicodeDecodeError]] = []
    # Strict, or a quote that is never closed would swallow every row after it.
    reader = csv.reader(_text_lines(file, undecodable), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values: Any = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            values = _broken_csv(str(error))
        if undecodable:
            line, failure = undecodable[0]
            lost = isinstance(values, Broken) and values.fatal
            values = Broken(_bad_byte(failure), fatal=lost)
            undecodable.clear()
        if values:
            yield None, line, values


def _tab_separated(file: BinaryIO, delimiter: str) -> Iterator[Record]:
    """Read the rows of a file with tabs, in which quotes are characters like any other."""
    undecodable: list[tuple[int, UnicodeDecodeError]] = []
    for number, line in enumerate(_text_lines(file, undecodable), 1):
        text = line.rstrip("\r\n")
        if undecodable:
            yield None, number, Broken(_bad_byte(undecodable.pop()[1]))
        elif text:
            yield None, number, text.split(delimiter)


def _broken_csv(text: str) -> Broken:
    if "unexpected end" in text:  # It took in all rows behind it.
        return Broken("the quote that opens here is never closed", fatal=True)
    return Broken(f"broken CSV: {text}")


def _text_lines(file: BinaryIO, undecodable: list[tuple[int, UnicodeDecodeError]]) -> Iterator[str]:
    with _text(file) as text:
        for number, line in enumerate(text, 1):
            if failure := _undecodable(line):
                undecodable.append((number, failure))
            yield line


def _undecodable(line: str) -> UnicodeDecodeError | None:
    if line.isascii():
        return None
    try:
        line.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        return error
    return None
