"""Paths: files by their suffix, folders with their splits, and names of TFDS."""

import dataclasses
import difflib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from gemma_keras_tune.errors import PairsError, warn_of_pairs
from gemma_keras_tune.pairs.sources.objects import open_mapping
from gemma_keras_tune.pairs.sources.rows import (
    SPLITS,
    SUFFIXES,
    Broken,
    Keys,
    Record,
    Rows,
    choose_split,
    no_splits,
    plain_records,
    whole,
)
from gemma_keras_tune.pairs.sources.tables import open_parquet
from gemma_keras_tune.pairs.sources.tensorflow import import_tfds, open_tfds
from gemma_keras_tune.pairs.sources.text import (
    json_array,
    json_line,
    json_lines,
    json_rows,
    open_csv,
    open_tsv,
    read_bytes,
    skip_space,
)

_LISTED = ", ".join(SUFFIXES)
_TFDS_NAME = re.compile(r"\w+(/[\w.\-]+)?(:[\d.*]+)?")


def open_path(source: str | os.PathLike[str], split: str | None) -> Rows:
    """Open a file, a folder, or the name of a TFDS dataset."""
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        if split is not None and _suffix(path) != ".json":
            no_splits(f"the file {path.name}", split)
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
    """Return the suffix of a known format, or `""`."""
    name = path.name.lower().removesuffix(".gz")
    return next((known for known in SUFFIXES if name.endswith(known)), "")


def _open_file(path: pathlib.Path, split: str | None = None) -> Rows:
    suffix = _suffix(path)
    if not suffix:
        raise PairsError(
            f"{path.name!r} is no kind of file that pairs are read from.",
            next_step=f"The suffix must be one of {_LISTED} (or these with .gz). For "
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
        tfds = import_tfds()
        return open_tfds(tfds.builder_from_directory(folder), split)
    paths = [
        path
        for path in sorted(folder.iterdir(), key=_natural)
        if path.is_file() and _suffix(path) and not path.name.startswith((".", "_"))
    ]
    if not paths:
        raise PairsError(
            f"The folder {str(folder)!r} holds no file that pairs are read from.",
            next_step=f"The suffix must be one of {_LISTED} (or these with .gz).",
        )
    name = folder.name or str(folder)
    splits = {path: _split_of(path) for path in paths}
    if split is not None and not any(splits.values()):
        no_splits(f"the folder {name}", split)
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
    """Choose the split to read of a folder, in which every file must then be of one."""
    named = [f"{path.name!r}: of the split {split!r}" for path, split in splits.items() if split]
    other = [f"{path.name!r}: of no split" for path, split in splits.items() if not split]
    found = list(dict.fromkeys(split for split in splits.values() if split))
    if not other:
        return choose_split(found, wanted, f"the folder {folder}")
    if wanted is None:
        raise PairsError(
            f"{len(named):,} of {len(splits):,} files in the folder {folder} are named like a "
            "split.",
            (*named, *other),
            f"Rename the files that are no split, pass `split={found[0]!r}` to read it alone, or "
            "pass one of the files.",
        )
    chosen = choose_split(found, wanted, f"the folder {folder}")
    warn_of_pairs(f"The folder {folder}: only the split {chosen!r} is read.", other, stacklevel=7)
    return chosen


def _folder_file(path: pathlib.Path) -> Iterator[tuple[int | None, Any]]:
    """Read line and record of a file's rows; a file that cannot be opened is one broken row."""
    try:
        rows = _open_file(path)
    except PairsError as error:
        text = " ".join((error.headline, *error.problems))
        yield None, Broken(text, fatal=True)
        return
    for _file, line, record in rows.records(rows.columns):
        yield line, record


def _natural(path: pathlib.Path) -> list[Any]:
    """Make a sorting key that puts record_2 before record_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _split_of(path: pathlib.Path) -> str | None:
    stem = re.split(r"[.\-_]", path.name.lower())[0]
    return stem if stem in SPLITS else None


def _open_json_lines(path: pathlib.Path) -> Rows:
    with read_bytes(path) as file:
        first = next((line.strip() for line in file if not line.isspace()), b"")
    if first in (b"[", b"{"):  # JSON, laid out over several lines, under the wrong suffix.
        return _open_json(path, None)

    def records(_: Keys) -> Iterator[Record]:
        with read_bytes(path) as file:
            yield from json_lines(file)

    return Rows(path.name, lambda keys: whole(records(keys)), stable=True)


def _open_json(path: pathlib.Path, split: str | None) -> Rows:
    with read_bytes(path) as file:
        start = skip_space(file)
        first = b"" if start == b"[" else start + file.readline()
        more = bool(skip_space(file))
    if start == b"[":
        if split is not None:
            no_splits(f"the file {path.name}", split)
        return json_rows(path, json_array)
    if more and isinstance(json_line(first.decode(errors="replace")), (dict, list)):
        return json_rows(path, json_lines)
    return _open_json_object(path, split)


def _open_json_object(path: pathlib.Path, split: str | None) -> Rows:
    with read_bytes(path) as file:
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
        return dataclasses.replace(open_mapping(value, split, path.name), stable=True)
    return Rows(path.name, lambda _: plain_records(value), length=len(value), stable=True)


def _broken_file(path: pathlib.Path, text: str) -> Rows:
    broken = Broken(f"the file {text}")
    return Rows(path.name, lambda _: plain_records([broken]), length=1, stable=True)


def _open_tfds_name(name: str, split: str | None) -> Rows:
    try:
        tfds = import_tfds()
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
    return open_tfds(builder, split)


_OPENERS: dict[str, Callable[[pathlib.Path], Rows]] = dict(
    zip(
        SUFFIXES,
        (
            _open_json_lines,
            _open_json_lines,
            lambda path: _open_json(path, None),
            open_csv,
            open_tsv,
            open_parquet,
        ),
        strict=True,
    )
)
