"""Tables of rows: Parquet, Arrow, Hugging Face, pandas, and dictionaries of columns."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma_keras_tune.errors import PairsError
from gemma_keras_tune.pairs.sources.rows import CHUNK_ROWS, Keys, Record, Rows, whole
from gemma_keras_tune.pairs.values import is_blank


def open_parquet(path: pathlib.Path) -> Rows:
    """Open a Parquet file."""
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
            yield from _arrow_records(file.iter_batches(CHUNK_ROWS, columns=columns), keys)

    def filled(name: Any) -> int:
        with pyarrow.parquet.ParquetFile(path) as file:
            return sum(_filled(batch[0]) for batch in file.iter_batches(columns=[name]))

    return Rows(
        path.name,
        lambda keys: whole(records(keys)),
        columns=tuple(metadata.schema.to_arrow_schema().names),
        length=metadata.num_rows,
        stable=True,
        filled=filled,
    )


def open_arrow(source: Any) -> Rows:
    """Open a table that speaks Arrow."""
    import pyarrow

    table = pyarrow.table(source)
    return Rows(
        f"the {type(source).__name__}",
        lambda keys: _arrow_records(table.to_batches(CHUNK_ROWS), keys),
        columns=tuple(table.column_names),
        length=table.num_rows,
        stable=True,
        filled=lambda name: sum(map(_filled, table[name].chunks)),
    )


def open_hugging_face(dataset: Any) -> Rows:
    """Open a Hugging Face `Dataset`."""

    def records(keys: Keys) -> Iterator[Record]:
        # As Arrow, so that columns of images or audio are not decoded.
        chosen = dataset if keys is None else dataset.select_columns(list(keys))
        return _arrow_records(chosen.with_format("arrow").iter(CHUNK_ROWS), keys)

    return Rows(
        "the Dataset",
        records,
        columns=tuple(dataset.column_names),
        length=len(dataset),
        stable=True,
        filled=lambda name: sum(
            _filled(batch[name])
            for batch in dataset.select_columns([name]).with_format("arrow").iter(CHUNK_ROWS)
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


def open_frame(frame: Any) -> Rows:
    """Open a pandas `DataFrame`."""

    def records(keys: Keys) -> Iterator[Record]:
        names = frame.columns if keys is None else keys
        for start in range(0, len(frame), CHUNK_ROWS):
            part = frame.iloc[start : start + CHUNK_ROWS]
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


def open_columns(source: Mapping[Any, Any], name: str) -> Rows:
    """Open a dictionary of columns of the same length."""
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
