"""The files of test plans: JSONL, CSV and YAML, as records that are not yet cases."""

import collections
import csv
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from gemma_keras_tune._support.files import write_text
from gemma_keras_tune.errors import EvaluationError, PairsError
from gemma_keras_tune.evaluation.checks import CHECKS, compares_text
from gemma_keras_tune.evaluation.values import shown
from gemma_keras_tune.pairs.sources import Broken, open_source

SUFFIXES = (".jsonl", ".csv", ".yaml", ".yml")
# Row from 1, line from 1 if it is known, and a dictionary or `Broken`.
Record = tuple[int, int | None, Any]


def read_records(path: pathlib.Path) -> Iterator[Record]:
    """Read every case of a file as raw data: `Broken` if it cannot be read, or has a key twice.

    Raises:
        EvaluationError: The file cannot be read at all.
    """
    _check_suffix(path)
    if not path.is_file():
        raise EvaluationError(f"There is no file {path}.", next_step="Check the path.")
    read = {".jsonl": _json_records, ".csv": _csv_records}.get(path.suffix, _yaml_records)
    yield from read(path)


def write_configs(
    path: pathlib.Path,
    configs: Sequence[dict[str, Any]],
    keys: Sequence[str],
    *,
    overwrite: bool,
) -> pathlib.Path:
    """Write cases as JSON data to a file; `keys` are the columns of a table.

    Raises:
        EvaluationError: The file exists, or has another suffix.
        ExportError: The disk is full.
    """
    _check_suffix(path)
    if path.exists() and not overwrite:
        raise EvaluationError(
            f"{path} already exists.",
            next_step="Choose another name, or pass `overwrite=True`.",
        )
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(config, ensure_ascii=False) + "\n" for config in configs)
    elif path.suffix == ".csv":
        text = _to_csv(configs, keys)
    else:
        text = yaml.safe_dump(list(configs), sort_keys=False, allow_unicode=True, width=100)
    return write_text(path, text)


def _check_suffix(path: pathlib.Path) -> None:
    if path.suffix not in SUFFIXES:
        raise EvaluationError(
            f"A test plan's file ends in {', '.join(SUFFIXES)}. Received: {path.name!r}"
        )


# Keys that are there twice: readers keep the last of several values and say nothing.


def _first_twice(names: Iterable[Any]) -> Any:
    counts = collections.Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


def _twice(key: Any) -> Broken:
    return Broken(f"the key {shown(key)} is there twice, so one of the two would be lost")


def _unique(pairs: Iterable[tuple[str, Any]]) -> Any:
    """Make a dictionary, or `Broken` if it has a key twice or anything in it is broken."""
    pairs = list(pairs)
    key = _first_twice(key for key, _ in pairs)
    if key is not None:
        return _twice(key)
    for _, value in pairs:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Broken):
                return item
    return dict(pairs)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


# Reading.


def _json_records(path: pathlib.Path) -> Iterator[Record]:
    """Read a case a line, or one array."""
    text = path.read_text("utf-8-sig", errors="replace")
    if text.lstrip().startswith("["):
        try:
            for row, record in enumerate(_json(text), 1):
                yield row, None, record
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{path.name} is no JSON: {error}") from error
        return
    row = 0
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row += 1
            try:
                record = _json(line)
            except (ValueError, RecursionError) as error:
                record = Broken(f"this is no JSON: {error}")
            yield row, number, record


def _csv_records(path: pathlib.Path) -> Iterator[Record]:
    try:
        rows = open_source(path)
        column = _first_twice(rows.columns or ())
        if column is not None:
            raise EvaluationError(
                f"{path.name} is no test plan.",
                [f"its first line names the column {shown(column)} twice"],
                'Several checks of one name go into `checks`: [{"contains": "a"}, '
                '{"contains": "b"}].',
            )
        for row, (_, line, record) in enumerate(rows.records(None), 1):
            yield row, line, _from_csv(record) if isinstance(record, dict) else record
    except PairsError as error:
        raise EvaluationError(error.headline, error.problems) from error


def _from_csv(record: Mapping[str, str]) -> Any:
    """Convert a CSV row to the form of a JSON one. Empty cells are left out."""
    row: dict[str, Any] = {}
    checks: list[Any] = []
    for key, text in record.items():
        if not text.strip():
            continue
        try:
            if key in CHECKS:
                checks.append(_unique([(key, _check_from_cell(key, text))]))
            elif key in ("prompt", "id", "kind", "notes"):
                row[key] = text
            elif key == "tags":
                row[key] = text.split()
            elif key == "checks":
                found = _json(text)
                checks += found if isinstance(found, list) else [found]
            elif key == "messages":
                row["prompt"] = _json(text)
            else:
                row[key] = _from_cell(text)
        except ValueError as error:
            return Broken(f"`{key}` is no JSON: {error}")
    return _unique([*row.items(), ("checks", checks)])


def _check_from_cell(name: str, text: str) -> Any:
    """Read a check's options from a cell.

    Of a check that compares texts it is a text, even if it looks like a number, unless it is a
    dictionary of options, or a list for a check that takes several texts.
    """
    kind = CHECKS[name]
    if not compares_text(kind):
        return _from_cell(text)
    try:
        value = _json(text)
    except ValueError:
        return text
    options = isinstance(value, dict) and kind.main in value
    several = isinstance(value, list) and kind.main == "texts"
    return value if options or several or isinstance(value, Broken) else text


def _from_cell(text: str) -> Any:
    """Read JSON if a cell is a number, a truth value, a list or a dictionary; else its text."""
    truth = {"true": True, "false": False}.get(text.strip().lower())  # spreadsheets write TRUE
    if truth is not None:
        return truth
    try:
        value = _json(text)
    except ValueError:
        if text.lstrip()[:1] in ("[", "{"):
            raise
        return text
    return text if value is None else value


def _yaml_records(path: pathlib.Path) -> Iterator[Record]:
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        cases = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        for case in cases:
            _keep_id(case)
        repeated = [_key_twice(case) for case in cases]
        data = loader.construct_document(node) if node else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path.name} is no YAML: {error}") from error
    if not isinstance(data, list):
        raise EvaluationError(f"{path.name} must be a list of cases. Received: {shown(data)}")
    for row, (case, record, key) in enumerate(zip(cases, data, repeated, strict=True), 1):
        yield row, case.start_mark.line + 1, record if key is None else _twice(key)


def _keep_id(case: yaml.Node) -> None:
    """Read an id as it is written: YAML takes 007 for 7, and `no` for false."""
    pairs = case.value if isinstance(case, yaml.MappingNode) else []
    for key, value in pairs:
        if key.value == "id" and isinstance(value, yaml.ScalarNode) and value.value:
            value.tag = "tag:yaml.org,2002:str"


def _key_twice(node: yaml.Node) -> str | None:
    """Find a key that a dictionary within has twice. Each is read once, however often named."""
    seen: set[int] = set()
    left = [node]
    while left:
        node = left.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = (str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if key := _first_twice(keys):
                return str(key)
            left += [part for pair in node.value for part in pair]
        else:
            left += node.value
    return None


# Writing.


def _to_csv(configs: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    flat = []
    for config in configs:
        if not isinstance(config["prompt"], str):
            config["messages"] = config.pop("prompt")
        flat.append({key: _cell(key, value) for key, value in config.items()})
    columns = [c for c in (*keys, "messages") if any(c in row for row in flat)]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _cell(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if key == "tags":
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False)
