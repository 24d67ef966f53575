"""Opens what pairs can come from: the part of `pairs` that knows files and other libraries' tables.

`open_source` turns any of them into `Rows`, a stream of raw records that holds a bounded number of
rows in memory. What a record means is decided in `pairs`. pandas, pyarrow, TensorFlow and the like
are imported only for a source that needs them.
"""

import codecs
import csv
import dataclasses
import difflib
import gzip
import io
import json
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, BinaryIO, NoReturn

from gemma_keras_tune.errors import PairsError, warn_of_pairs
from gemma_keras_tune.pairs.conversations import is_message
from gemma_keras_tune.pairs.values import is_blank

SPLITS = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")
_CHUNK_ROWS = 1024
_CHUNK_CHARACTERS = 2**18
_MAX_FIELD = 2**28
_TFDS_NAME = re.compile(r"\w+(/[\w.\-]+)?(:[\d.*]+)?")

Keys = tuple[Any, ...] | None
# The file within a folder, the line within the file, and the raw row; `None` where there is none.
Record = tuple[str | None, int | None, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Broken:
    """A row that cannot be read at all.

    Attributes:
        text: What is wrong with it.
        fatal: Whether what comes after it is lost too.
    """

    text: str
    fatal: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
    """An opened source.

    Attributes:
        name: How messages call it.
        records: Begins to read. Takes the columns wanted, where `columns` is known.
        columns: The column names, where every row has the same.
        length: Number of rows, where it is known.
        repeatable: Whether the rows can be read more than once.
        stable: Whether every reading gives the same rows in the same order, from outside memory.
        filled: Counts the rows in which a column holds something, of a table of which only the
            columns wanted are read.
    """

    name: str
    records: Callable[[Keys], Iterator[Record]]
    columns: tuple[Any, ...] | None = None
    length: int | None = None
    repeatable: bool = True
    stable: bool = False
    filled: Callable[[Any], int] | None = None


def open_source(source: Any, split: str | None = None) -> Rows:
    """Find out what a source is, and open it.

    Args:
        source: Anything `gemma_keras_tune.read_pairs` takes.
        split: Which part to read, of a source that has several.

    Returns:
        The opened source. No row has been read yet.

    Raises:
        PairsError: It cannot be opened, or is nothing that rows can be read from.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_path(source, split)
    if _is(source, "tensorflow_datasets", "core.DatasetBuilder"):
        return _open_tfds(source, split)
    if _is(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        chosen = _choose_split(list(source), split, "the DatasetDict")
        return dataclasses.replace(open_source(source[chosen]), name=f"dataset [{chosen}]")
    if isinstance(source, Mapping):
        return _open_mapping(source, split, "the dictionary")
    if split is not None:
        _no_splits(f"a {type(source).__name__}", split)
    return _open_object(source)


def _open_object(source: Any) -> Rows:
    if _is(source, "pandas", "DataFrame"):
        return _open_frame(source)
    if _is(source, "datasets", "Dataset"):
        return _open_hugging_face(source)
    if _is(source, "tensorflow", "data.Dataset"):
        return _open_tf(source, "the tf.data.Dataset")
    if hasattr(source, "__arrow_c_stream__") and isinstance(source, Sized):
        return _open_arrow(source)
    kind = type(source).__name__
    length = len(source) if isinstance(source, Sized) else None
    if isinstance(source, (bytes, bytearray)):
        _not_a_source(source)
    if isinstance(source, Iterator):
        return Rows(f"the {kind}", lambda _: _plain_records(source), repeatable=False)
    if isinstance(source, Iterable):
        return Rows(f"the {kind}", lambda _: _plain_records(source), length=length)
    if length is not None and hasattr(source, "__getitem__"):
        size = length
        return Rows(
            f"the {kind}",
            lambda _: _plain_records(source[index] for index in range(size)),
            length=length,
        )
    if callable(source):
        return Rows(f"the rows of {_name_of(source)}", lambda _: _plain_records(source()))
    _not_a_source(source)


def _plain_records(rows: Iterable[Any]) -> Iterator[Record]:
    for row in rows:
        yield None, None, row


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}()"


def _is(source: Any, package: str, *classes: str) -> bool:
    """Whether it is an instance of a class of a package, which is not imported for the question."""
    module = sys.modules.get(package)
    if module is None:
        return False
    for path in classes:
        found: Any = module
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and isinstance(source, found):
            return True
    return False


def _not_a_source(source: Any) -> NoReturn:
    raise PairsError(
        f"Pairs cannot be read from a {type(source).__name__}: {source!r:.80}.",
        next_step="Pass a list of (prompt, response) tuples or of dictionaries, a DataFrame, a "
        f"path to a {_known_suffixes()} file or a folder of them, a tf.data.Dataset, a TFDS name "
        "or builder, a Hugging Face Dataset, or any iterable of rows.",
    )


def at_start(name: str) -> str:
    """The name of a source at the start of a sentence; file names keep their spelling."""
    return f"The {name[4:]}" if name.startswith("the ") else name


# Splits.


def _choose_split(names: Sequence[str], wanted: str | None, what: str) -> str:
    if wanted is None:
        if "train" in names:
            return "train"
        if len(names) == 1:
            return names[0]
    elif wanted in names:
        return wanted
    asked = "" if wanted is None else f" and none is named {wanted!r}"
    raise PairsError(
        f"{at_start(what)} has the splits {', '.join(map(repr, names))}{asked}.",
        next_step=f"Choose one, for example `split={names[0]!r}`." if names else None,
    )


def _no_splits(what: str, split: str) -> NoReturn:
    raise PairsError(
        f"`split={split!r}` was asked for, but {what} has no splits.",
        next_step="Leave `split` out.",
    )


# Paths.


def _open_path(source: str | os.PathLike[str], split: str | None) -> Rows:
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        if split is not None and _suffix(path) != ".json":
            _no_splits(f"the file {path.name}", split)
        return _open_file(path, split)
    if isinstance(source, str) and _TFDS_NAME.fullmatch(source) and not _suffix(path):
        return _open_tfds_name(source, split)
    _missing(path, "does not exist")


def _missing(path: pathlib.Path, what: str) -> NoReturn:
    if "://" in str(path) or ":/" in str(path):
        raise PairsError(
            f"Pairs are not read from a URL: {path}.",
            next_step="Download the file first and pass its path.",
        )
    folder = path.parent
    if not folder.is_dir():
        step = f"There is no folder {str(folder)!r}; the working folder is {os.getcwd()!r}."
    else:
        near = difflib.get_close_matches(path.name, sorted(os.listdir(folder)), n=3, cutoff=0.5)
        step = (
            f"Did you mean {' or '.join(repr(str(folder / name)) for name in near)}?"
            if near
            else f"No name in the folder {str(folder.resolve())!r} comes close."
        )
    raise PairsError(f"{str(path)!r} {what}.", next_step=step)


def _suffix(path: pathlib.Path) -> str:
    """The suffix that says the format, or `""` where it is none of ours."""
    name = path.name.lower().removesuffix(".gz")
    return next((known for known in _OPENERS if name.endswith(known)), "")


def _known_suffixes() -> str:
    return ", ".join(_OPENERS)


def _open_file(path: pathlib.Path, split: str | None = None) -> Rows:
    suffix = _suffix(path)
    if not suffix:
        raise PairsError(
            f"{path.name!r} is no kind of file that pairs are read from.",
            next_step=f"The suffix must be one of {_known_suffixes()} (or these with .gz). For "
            "another format, read it yourself, for example with pandas, and pass the DataFrame.",
        )
    try:
        if suffix == ".json":
            return _open_json(path, split)
        return _OPENERS[suffix](path)
    except (EOFError, OSError, zlib.error) as error:
        raise PairsError(f"{path.name!r} cannot be opened: {error}.") from error


def _open_folder(folder: pathlib.Path, split: str | None) -> Rows:
    if (folder / "features.json").is_file():
        tfds = _tfds()
        return _open_tfds(tfds.builder_from_directory(folder), split)
    paths = [
        path
        for path in sorted(folder.iterdir(), key=_natural)
        if path.is_file() and _suffix(path) and not path.name.startswith((".", "_"))
    ]
    if not paths:
        raise PairsError(
            f"The folder {str(folder)!r} holds no file that pairs are read from.",
            next_step=f"The suffix must be one of {_known_suffixes()} (or these with .gz).",
        )
    name = folder.name or str(folder)
    splits = {path: _split_of(path) for path in paths}
    if split is not None and not any(splits.values()):
        _no_splits(f"the folder {name}", split)
    if any(splits.values()):
        chosen = _choose_folder_split(splits, split, name)
        paths = [path for path in paths if splits[path] == chosen]
        name = f"{name} [{chosen}]"

    def records(_: Keys) -> Iterator[Record]:
        for path in paths:
            for line, record in _folder_file(path):
                yield path.name, line, record

    return Rows(name, records, stable=True)


def _choose_folder_split(
    splits: Mapping[pathlib.Path, str | None], wanted: str | None, folder: str
) -> str:
    """The split to read of a folder, in which every file must then be of one."""
    named = [f"{path.name!r}: of the split {split!r}" for path, split in splits.items() if split]
    other = [f"{path.name!r}: of no split" for path, split in splits.items() if not split]
    found = list(dict.fromkeys(split for split in splits.values() if split))
    if not other:
        return _choose_split(found, wanted, f"the folder {folder}")
    if wanted is None:
        raise PairsError(
            f"{len(named):,} of {len(splits):,} files in the folder {folder} are named like a "
            "split.",
            (*named, *other),
            f"Rename the files that are no split, pass `split={found[0]!r}` to read it alone, or "
            "pass one of the files.",
        )
    chosen = _choose_split(found, wanted, f"the folder {folder}")
    warn_of_pairs(f"The folder {folder}: only the split {chosen!r} is read.", other, stacklevel=7)
    return chosen


def _folder_file(path: pathlib.Path) -> Iterator[tuple[int | None, Any]]:
    """Line and record of one file's rows; a file that cannot be opened is one broken row."""
    try:
        rows = _open_file(path)
    except PairsError as error:
        text = " ".join((error.headline, *error.problems))
        yield None, Broken(text, fatal=True)
        return
    for _file, line, record in rows.records(rows.columns):
        yield line, record


def _natural(path: pathlib.Path) -> list[Any]:
    """Sorts record_2 before record_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _split_of(path: pathlib.Path) -> str | None:
    stem = re.split(r"[.\-_]", path.name.lower())[0]
    return stem if stem in SPLITS else None


def _read_bytes(path: pathlib.Path) -> BinaryIO:
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
    """The file as text, in which bytes that are not UTF-8 are marked; it closes the file too."""
    return io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")


def _whole(records: Iterator[Record]) -> Iterator[Record]:
    """The records of a file; damage below the level of its format becomes the last one."""
    line = None
    try:
        for file, line, record in records:
            yield file, line, record
    except (EOFError, OSError, zlib.error) as error:
        yield None, line, Broken(f"after this row the file cannot be read: {error}", fatal=True)


def _bad_byte(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not UTF-8 (byte {error.start + 1} of the line)"


# JSON.


def _open_json_lines(path: pathlib.Path) -> Rows:
    with _read_bytes(path) as file:
        first = next((line.strip() for line in file if not line.isspace()), b"")
    if first in (b"[", b"{"):  # JSON, laid out over several lines, under the wrong suffix.
        return _open_json(path, None)

    def records(_: Keys) -> Iterator[Record]:
        with _read_bytes(path) as file:
            yield from _json_lines(file)

    return Rows(path.name, lambda keys: _whole(records(keys)), stable=True)


def _json_lines(file: BinaryIO) -> Iterator[Record]:
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
                yield None, line, _json_line(text)
            continue
        except UnicodeDecodeError as error:
            record = Broken(_bad_byte(error))
        except (ValueError, RecursionError) as error:
            record = _broken_json(error)
        yield None, line, record


def _json_line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _broken_json(error)


def _broken_json(error: Exception, *, fatal: bool = False) -> Broken:
    if isinstance(error, json.JSONDecodeError):
        return Broken(f"broken JSON at column {error.pos + 1}: {error.msg}", fatal)
    return Broken(f"broken JSON: {error}", fatal)


def _open_json(path: pathlib.Path, split: str | None) -> Rows:
    with _read_bytes(path) as file:
        start = _skip_space(file)
        first = b"" if start == b"[" else start + file.readline()
        more = bool(_skip_space(file))
    if start == b"[":
        if split is not None:
            _no_splits(f"the file {path.name}", split)
        return _json_rows(path, _json_array)
    if more and isinstance(_json_line(first.decode(errors="replace")), (dict, list)):
        return _json_rows(path, _json_lines)
    return _open_json_object(path, split)


def _json_rows(path: pathlib.Path, read: Callable[[BinaryIO], Iterator[Record]]) -> Rows:
    def records(_: Keys) -> Iterator[Record]:
        with _read_bytes(path) as file:
            yield from read(file)

    return Rows(path.name, lambda keys: _whole(records(keys)), stable=True)


def _skip_space(file: BinaryIO) -> bytes:
    while (character := file.read(1)).isspace():
        pass
    return character


def _open_json_object(path: pathlib.Path, split: str | None) -> Rows:
    with _read_bytes(path) as file:
        raw = file.read()
    try:
        value = json.loads(raw.decode()) if raw.strip() else []
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return _broken_file(path, f"is not UTF-8: byte 0x{raw[error.start]:02x} in line {line}")
    except (ValueError, RecursionError) as error:
        return _broken_file(
            path, f"is not JSON (a list of records, one record, or a record a line): {error}"
        )
    if isinstance(value, dict):
        return dataclasses.replace(_open_mapping(value, split, path.name), stable=True)
    return Rows(path.name, lambda _: _plain_records(value), length=len(value), stable=True)


def _broken_file(path: pathlib.Path, text: str) -> Rows:
    broken = Broken(f"the file {text}")
    return Rows(path.name, lambda _: _plain_records([broken]), length=1, stable=True)


def _json_array(file: BinaryIO) -> Iterator[Record]:
    """The elements of one long JSON array, parsed one at a time."""
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
    """Whether parsing may have failed only because the buffer ends."""
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


# Delimited text.


def _open_csv(path: pathlib.Path) -> Rows:
    with _read_bytes(path) as file:
        first = file.readline()
    delimiter = next((mark for mark in (",", ";", "\t") if mark.encode() in first), ",")
    return _open_delimited(path, delimiter)


def _open_tsv(path: pathlib.Path) -> Rows:
    return _open_delimited(path, "\t", _tab_separated)


def _open_delimited(
    path: pathlib.Path, delimiter: str, read: "Callable[..., Iterator[Record]] | None" = None
) -> Rows:
    read = read or _delimited
    # The limit is the process's, and 128 KiB by default, which a long document passes.
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD))
    with _read_bytes(path) as file:
        first = next(read(file, delimiter), (None, None, ()))[2]
    if isinstance(first, Broken):
        raise PairsError(f"The first line of {path.name!r} cannot be read: {first.text}.")
    columns = tuple(first)

    def records(_: Keys) -> Iterator[Record]:
        with _read_bytes(path) as file:
            rows = read(file, delimiter)
            next(rows, None)
            for _file, line, values in rows:
                if type(values) is list:
                    if len(values) != len(columns):
                        values = Broken(_field_count(len(values), columns))
                    else:
                        values = dict(zip(columns, values, strict=True))
                yield None, line, values

    return Rows(path.name, lambda keys: _whole(records(keys)), columns=columns, stable=True)


def _field_count(count: int, columns: Sequence[str]) -> str:
    fields = "1 field" if count == 1 else f"{count} fields"
    return f"{fields}, but the first line names {len(columns)} columns"


def _delimited(file: BinaryIO, delimiter: str) -> Iterator[Record]:
    """The rows of a CSV file, the first one too, each with the line it begins on."""
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


# Tables.


def _open_parquet(path: pathlib.Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PairsError(
            f"{path.name!r} needs pyarrow.", next_step="Install it with `pip install pyarrow`."
        ) from error
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowException as error:
        raise PairsError(f"{path.name!r} is not a whole Parquet file: {error}.") from error

    def records(keys: Keys) -> Iterator[Record]:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = None if keys is None else list(keys)
            yield from _arrow_records(file.iter_batches(_CHUNK_ROWS, columns=columns), keys)

    def filled(name: Any) -> int:
        with pyarrow.parquet.ParquetFile(path) as file:
            return sum(_filled(batch[0]) for batch in file.iter_batches(columns=[name]))

    return Rows(
        path.name,
        lambda keys: _whole(records(keys)),
        columns=tuple(metadata.schema.to_arrow_schema().names),
        length=metadata.num_rows,
        stable=True,
        filled=filled,
    )


def _open_arrow(source: Any) -> Rows:
    import pyarrow

    table = pyarrow.table(source)
    return Rows(
        f"the {type(source).__name__}",
        lambda keys: _arrow_records(table.to_batches(_CHUNK_ROWS), keys),
        columns=tuple(table.column_names),
        length=table.num_rows,
        stable=True,
        filled=lambda name: sum(map(_filled, table[name].chunks)),
    )


def _open_hugging_face(dataset: Any) -> Rows:
    def records(keys: Keys) -> Iterator[Record]:
        # As Arrow, so that columns of images or audio are not decoded.
        chosen = dataset if keys is None else dataset.select_columns(list(keys))
        return _arrow_records(chosen.with_format("arrow").iter(_CHUNK_ROWS), keys)

    return Rows(
        "the Dataset",
        records,
        columns=tuple(dataset.column_names),
        length=len(dataset),
        stable=True,
        filled=lambda name: sum(
            _filled(batch[name])
            for batch in dataset.select_columns([name]).with_format("arrow").iter(_CHUNK_ROWS)
        ),
    )


def _filled(column: Any) -> int:
    """Count the values of an Arrow column that hold something."""
    import pyarrow.compute as compute
    from pyarrow import types

    length = None
    if types.is_string(column.type) or types.is_large_string(column.type):
        length = compute.binary_length(compute.utf8_trim_whitespace(column))
    elif types.is_list(column.type) or types.is_large_list(column.type):
        length = compute.list_value_length(column)
    if length is None:
        return len(column) - column.null_count
    return compute.sum(compute.greater(length, 0)).as_py() or 0


def _arrow_records(batches: Iterable[Any], keys: Keys) -> Iterator[Record]:
    for batch in batches:
        names = batch.schema.names if keys is None else keys
        for values in zip(*(_arrow_column(batch[name]) for name in names), strict=True):
            yield None, None, dict(zip(names, values, strict=True))


def _arrow_column(column: Any) -> list[Any]:
    if _holds_bytes(column.type):  # Pictures and sound: only that they are there is of interest.
        return [value or None for value in column.is_valid().to_pylist()]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # Which row it is shows where each is decoded by itself.
        return column.cast("binary").to_pylist()


def _holds_bytes(kind: Any) -> bool:
    """Tell whether an Arrow type is a structure with bytes in it."""
    from pyarrow import types

    fields = [kind.field(i).type for i in range(kind.num_fields)]
    return any(types.is_binary(f) or types.is_large_binary(f) or _holds_bytes(f) for f in fields)


def _open_frame(frame: Any) -> Rows:
    def records(keys: Keys) -> Iterator[Record]:
        names = frame.columns if keys is None else keys
        for start in range(0, len(frame), _CHUNK_ROWS):
            part = frame.iloc[start : start + _CHUNK_ROWS]
            for values in zip(*(part[name].tolist() for name in names), strict=True):
                yield None, None, dict(zip(names, values, strict=True))

    def filled(name: Any) -> int:
        return sum(not is_blank(value) for value in frame[name])

    return Rows(
        "the DataFrame",
        records,
        columns=tuple(frame.columns),
        length=len(frame),
        stable=True,
        filled=filled,
    )


def _open_mapping(source: Mapping[Any, Any], split: str | None, name: str) -> Rows:
    """A dictionary of columns, of splits, of one list of records; or one record."""
    lists = all(_is_column(value) for value in source.values())
    if source and lists and all(str(key).lower() in SPLITS for key in source):
        chosen = _choose_split(list(source), split, name)
        return dataclasses.replace(open_source(source[chosen]), name=f"{name} [{chosen}]")
    if split is not None:
        _no_splits(name, split)
    if source and lists:
        values = list(source.values())
        if len(values) == 1 and isinstance(_first(values[0]), Mapping):
            return dataclasses.replace(open_source(values[0]), name=name)
        return _open_columns(source, name)
    return Rows(name, lambda _: _plain_records([source]), length=1)


def _open_columns(source: Mapping[Any, Any], name: str) -> Rows:
    lengths = {key: len(value) for key, value in source.items()}
    if len(set(lengths.values())) > 1:
        raise PairsError(
            f"The columns of {name} differ in length.",
            (f"{key!r}: {length:,} rows" for key, length in lengths.items()),
        )

    def records(keys: Keys) -> Iterator[Record]:
        names = tuple(source) if keys is None else keys
        for values in zip(*(source[key] for key in names), strict=True):
            yield None, None, dict(zip(names, values, strict=True))

    return Rows(
        name,
        records,
        columns=tuple(source),
        length=next(iter(lengths.values())),
        filled=lambda key: sum(not is_blank(value) for value in source[key]),
    )


def _is_column(value: Any) -> bool:
    """Whether a value is a list of values, and not text, a record or one conversation."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__getitem__"):
        return False
    return hasattr(value, "__len__") and not is_message(_first(value))


def _first(values: Any) -> Any:
    """The first of some values, or `None`; pandas would look for one labelled 0."""
    return next(iter(values), None)


# TensorFlow.


def _tfds() -> Any:
    """TFDS. Beside a protobuf older than its metadata's it logs an error and is an empty module."""
    import tensorflow_datasets as tfds

    if not hasattr(tfds, "builder"):
        raise PairsError(
            "TensorFlow Datasets cannot be imported: it finds tensorflow-metadata made for a newer "
            "protobuf.",
            next_step='Type: pip install "tensorflow-metadata<1.18", and start again.',
        )
    return tfds


def _open_tfds_name(name: str, split: str | None) -> Rows:
    try:
        tfds = _tfds()
    except PairsError as error:
        what = f"is not a file, and whether it is a TFDS dataset cannot be told. {error}"
        _missing(pathlib.Path(name), what.rstrip("."))
    try:
        # Hub lookups would make a mistyped path wait for the network.
        builder = tfds.builder(name, try_gcs=False)
    except (ValueError, OSError) as error:
        if isinstance(error, tfds.core.DatasetNotFoundError):
            near = difflib.get_close_matches(name, tfds.list_builders(), n=1, cutoff=0.8)
            hint = f" (TFDS has {near[0]!r})" if near else ""
            _missing(pathlib.Path(name), f"is neither a file nor the name of a TFDS dataset{hint}")
        raise PairsError(f"The TFDS dataset {name!r} cannot be opened: {error}.") from error
    return _open_tfds(builder, split)


def _open_tfds(builder: Any, split: str | None) -> Rows:
    try:
        builder.download_and_prepare()
    except Exception as error:  # It passes on what any downloader and parser may raise.
        raise PairsError(
            f"The TFDS dataset {builder.name!r} cannot be downloaded or prepared: "
            f"{type(error).__name__}: {error}"
        ) from error
    base, bracket, rest = (split or "").partition("[")
    chosen = _choose_split(list(builder.info.splits), base or None, f"TFDS {builder.name!r}")
    chosen += bracket + rest
    dataset = builder.as_dataset(split=chosen, shuffle_files=False)
    return dataclasses.replace(_open_tf(dataset, f"{builder.name} [{chosen}]"), stable=True)


def _open_tf(dataset: Any, name: str) -> Rows:
    count = int(dataset.cardinality())
    if count == -1:
        raise PairsError(
            f"{at_start(name)} repeats forever.",
            next_step="Leave out `.repeat()`, or end it with `.take(rows)`.",
        )
    spec = dataset.element_spec
    if _ranks(spec) == {1}:  # Batched, as KerasHub's own `fit` wants it.
        dataset = dataset.unbatch()
        count = -2
    return Rows(
        name,
        lambda keys: _tf_records(dataset, keys),
        columns=tuple(spec) if isinstance(spec, dict) else None,
        length=count if count >= 0 else None,
        filled=lambda _: sys.maxsize,  # A tensor is there in every row.
    )


def _ranks(spec: Any) -> set[int | None]:
    """The ranks of the tensors of one row; `None` for what is nested or no plain tensor."""
    parts = spec.values() if isinstance(spec, dict) else spec
    if not isinstance(spec, (dict, tuple)):
        parts = (spec,)
    return {part.shape.rank if type(part).__name__ == "TensorSpec" else None for part in parts}


def _tf_records(dataset: Any, keys: Keys) -> Iterator[Record]:
    if keys is not None:
        dataset = dataset.map(lambda row: {key: row[key] for key in keys})
    if _ranks(dataset.element_spec) != {0}:
        for row in dataset.as_numpy_iterator():
            yield None, None, _to_python(row)
        return
    # By the batch: a row at a time costs TensorFlow some 50 microseconds.
    for batch in dataset.batch(_CHUNK_ROWS).as_numpy_iterator():
        if isinstance(batch, dict):
            for values in zip(*(column.tolist() for column in batch.values()), strict=True):
                yield None, None, dict(zip(batch, values, strict=True))
        elif isinstance(batch, tuple):
            for values in zip(*(column.tolist() for column in batch), strict=True):
                yield None, None, values
        else:
            yield from _plain_records(batch.tolist())


def _to_python(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_python(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_to_python(part) for part in value)
    if hasattr(value, "to_list"):  # A ragged tensor.
        return value.to_list()
    return value.tolist() if hasattr(value, "tolist") else value


_OPENERS: dict[str, Callable[[pathlib.Path], Rows]] = {
    ".jsonl": _open_json_lines,
    ".ndjson": _open_json_lines,
    ".json": lambda path: _open_json(path, None),
    ".csv": _open_csv,
    ".tsv": _open_tsv,
    ".parquet": _open_parquet,
}
