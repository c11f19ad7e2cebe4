"""Reads rows of Parquet and Arrow files with pyarrow: only the needed columns, one batch at a time.

Features that Hugging Face `datasets` records in a file, such as images and audio, are not decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.data.files import DataError, Kind
from megatron_rl.data.json_lines import parse_json
from megatron_rl.data.numbers import from_decimal, from_float

BATCH_ROWS = 1024
_JSON = "arrow.json"  # the extension type of Json features
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

Row = dict[str, Any]


def read_tables(
    paths: Sequence[Path], kind: Kind, fields: Collection[str] | None
) -> Iterator[tuple[Path, int, Row, list[str]]]:
    """Yields file, row in the file from 0, values by column, and the names of all columns of the file.

    Values are of the columns in `fields`; None reads all columns. Raises DataError, which names the file, if a file is
    damaged or cut off, or if the columns of the files differ.
    """
    types: dict[str, str | None] = {}
    for path in paths:
        with _errors(path, kind), pa.OSFile(str(path)) as file:
            schema, batches = _open(path, file, kind, fields)
            found = {name: _type(schema.field(name).type) for name in schema.names if _wanted(name, fields)}
            _check_alike(paths[0], types or found, path, found)
            types = {**found, **{name: known for name, known in types.items() if known}}
            row = 0
            for batch in batches:
                for values in _rows(batch):
                    yield path, row, values, schema.names
                    row += 1


@contextmanager
def _errors(path: Path, kind: Kind) -> Iterator[None]:
    """Turns pyarrow's errors into DataError: many kinds for damaged bytes, some for values that Python cannot hold."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{path}: cannot be read as {kind.title()}: {reason}; it may be damaged or cut off") from None


def _wanted(name: str, fields: Collection[str] | None) -> bool:
    return fields is None or name in fields


def _open(
    path: Path, file: pa.NativeFile, kind: Kind, fields: Collection[str] | None
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    if kind == "parquet":
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        columns = _columns(path, parquet.schema_arrow, fields)
        batches = parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)
        return parquet.schema_arrow, batches
    # Arrow comes as a file with an index, or as the stream that `datasets` writes.
    streamed = file.read(6) != b"ARROW1"
    if streamed:
        file.seek(max(file.size() - len(_STREAM_END), 0))
        if file.read() != _STREAM_END:
            raise DataError(f"{path}: does not end as an Arrow stream does; it is cut off or damaged")
    opener = pa.ipc.open_stream if streamed else pa.ipc.open_file
    file.seek(0)
    schema = opener(file).schema
    columns = _columns(path, schema, fields)
    options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=[schema.names.index(name) for name in columns])
    file.seek(0)
    reader = opener(file, options=options)
    return schema, iter(reader) if streamed else map(reader.get_batch, range(reader.num_record_batches))


def _columns(path: Path, schema: pa.Schema, fields: Collection[str] | None) -> list[str]:
    """Columns to read. If none is wanted, the first is read: a batch without columns has no row count."""
    columns = [name for name in schema.names if _wanted(name, fields)] or schema.names[:1]
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise DataError(f"{path}: has two columns {twice!r}; expected one")
    return columns


def _check_alike(first: Path, types: dict[str, str | None], path: Path, found: dict[str, str | None]) -> None:
    for name in sorted(types.keys() | found.keys()):
        if name not in types or name not in found:
            has, lacks = (path, first) if name in found else (first, path)
            raise DataError(
                f"{lacks}: has no column {name!r}, but {has.name} has; expected the same columns in all files"
            )
        if types[name] and found[name] and types[name] != found[name]:
            raise DataError(
                f"{path}: column {name!r} holds {found[name]}, but in {first.name} {types[name]}; "
                "expected one type in all files"
            )


def _type(column: pa.DataType) -> str | None:
    """Name of a column's type in errors and in the comparison of files; None for a column of nulls, which fits any."""
    if pa.types.is_null(column):
        return None
    if pa.types.is_dictionary(column):
        return _type(column.value_type)
    if pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_string_view(column):
        return "text"
    if pa.types.is_integer(column) or pa.types.is_floating(column) or pa.types.is_decimal(column):
        return "numbers"
    return str(column)


def _rows(batch: pa.RecordBatch) -> Iterator[Row]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        part = batch.slice(start, BATCH_ROWS)
        part.validate(full=True)  # offsets within the data, text in UTF-8: pyarrow does not check what it reads
        columns = {name: _values(array) for name, array in zip(part.schema.names, part.columns, strict=True)}
        for row in range(part.num_rows):
            yield {name: values[row] for name, values in columns.items()}


def _values(array: pa.Array) -> list[Any]:
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    if isinstance(kind, pa.BaseExtensionType):
        stored = _values(array.storage)
        return [_loads(text) for text in stored] if _is_json(kind) else stored
    if pa.types.is_floating(kind):
        # pandas writes a missing number as NaN
        return [None if v is None or v != v else from_float(v, kind.bit_width) for v in array.to_pylist()]
    if pa.types.is_decimal(kind):
        return [None if v is None else from_decimal(v) for v in array.to_pylist()]
    if pa.types.is_nested(kind) and _JSON in str(kind):
        return [_nested(scalar) for scalar in array]
    return array.to_pylist()


def _nested(scalar: pa.Scalar) -> Any:
    """The value of a list or struct with JSON text inside, such as the messages of a chat."""
    if not scalar.is_valid:
        return None
    if pa.types.is_struct(scalar.type):
        return {name: _nested(value) for name, value in scalar.items()}
    if pa.types.is_list(scalar.type) or pa.types.is_large_list(scalar.type):
        return [_nested(value) for value in scalar.values]
    return _loads(scalar.as_py()) if _is_json(scalar.type) else scalar.as_py()


def _is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == _JSON


def _loads(text: str | None) -> Any:
    return None if text is None else parse_json(text)
