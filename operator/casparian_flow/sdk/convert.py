"""Rows of any accepted kind as a stream of plain, bounded Arrow record batches.

"Plain" means that no buffer stands for more rows than it holds: dictionary- and run-length-encoded
columns are decoded, views become ordinary strings, extension types their storage. Metadata is
dropped. What a sink writes then depends on the values alone, not on how the plugin held them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

BATCH_ROWS_MAX = 65_536
BATCH_BYTES = 8 * 1024 * 1024
"""Aimed at; a batch of one large row may exceed it."""
_FIRST_ROWS = 1_024
_ACCEPTED = (
    "a pandas or polars DataFrame, a pyarrow Table, RecordBatch or RecordBatchReader, a list of "
    "dicts, an object with the Arrow PyCapsule interface, or a list or generator of these"
)


def record_batches(data: Any) -> Iterator[pa.RecordBatch]:
    """Convert published data to record batches, as a stream.

    Yields:
        Batches of at most BATCH_ROWS_MAX rows and about BATCH_BYTES bytes. A table without rows
        yields one batch without rows, so that its topic and columns are known.

    Raises:
        TypeError: the data is of no accepted kind, or a column's values do not fit together.
    """
    for batch in _batches(data):
        plain = _plain_batch(batch)
        yield from _bounded(plain)


def _batches(data: Any) -> Iterator[pa.RecordBatch]:
    if data is None:
        return
    if isinstance(data, pa.RecordBatch):
        yield data
    elif isinstance(data, pa.Table):
        yield from _table_batches(data)
    elif isinstance(data, pa.RecordBatchReader):
        yield from _reader_batches(data)
    elif _is_pandas(data, "DataFrame"):
        yield from _pandas_batches(data)
    elif _refusal(data):
        raise TypeError(f"cannot publish {_kind(data)}: {_refusal(data)}. Give {_ACCEPTED}")
    elif hasattr(data, "__arrow_c_stream__"):
        yield from _stream_batches(data)
    elif hasattr(data, "__arrow_c_array__"):
        yield pa.record_batch(data)
    elif isinstance(data, (list, Iterator)):
        yield from _item_batches(data)
    else:
        raise TypeError(f"cannot publish {_kind(data)}. Give {_ACCEPTED}")


def _kind(data: Any) -> str:
    kind = type(data)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _is_pandas(data: Any, name: str) -> bool:
    # Told by name, so that pandas is never imported for plugins that do without it.
    return any(
        c.__name__ == name and c.__module__.partition(".")[0] == "pandas"
        for c in type(data).__mro__
    )


def _refusal(data: Any) -> str:
    """Why a common mistake is one, "" for anything else."""
    if isinstance(data, Mapping):
        return "one dict may mean a row or columns; give [row] or pyarrow.table(columns)"
    if _is_pandas(data, "Series"):
        return "a Series has no columns; use series.to_frame()"
    name = _kind(data)
    if name.startswith("polars.") and name.endswith(".LazyFrame"):
        return "call .collect() first"
    if name.startswith("polars.") and name.endswith(".Series"):
        return "a Series has no columns; use series.to_frame()"
    return ""


def _table_batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    batches = table.to_batches(max_chunksize=BATCH_ROWS_MAX)
    yield from batches or [_empty(table.schema)]


def _reader_batches(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    some = False
    for batch in reader:
        some = True
        yield batch
    if not some:
        yield _empty(reader.schema)


def _stream_batches(data: Any) -> Iterator[pa.RecordBatch]:
    try:
        reader = pa.RecordBatchReader.from_stream(data)
    except pa.ArrowInvalid as error:
        raise TypeError(f"cannot publish {_kind(data)}: no table of columns ({error})") from error
    yield from _reader_batches(reader)


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)


def _pandas_batches(frame: Any) -> Iterator[pa.RecordBatch]:
    """A pandas frame by slices; named index levels become columns, an unnamed index goes."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = [str(name) for name in frame.columns]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise TypeError(f"cannot publish a DataFrame with several columns named {twice[0]!r}")
    try:
        # Over the whole frame, since a slice of nulls alone would get another type.
        schema = pa.Schema.from_pandas(frame, preserve_index=False)
        for start in range(0, max(len(frame), 1), BATCH_ROWS_MAX):
            part = frame.iloc[start : start + BATCH_ROWS_MAX]
            yield pa.RecordBatch.from_pandas(part, schema=schema, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise TypeError(f"cannot publish {_culprit(frame)}: {_told(error)}") from error


def _culprit(frame: Any) -> str:
    """The frame's first column that has no Arrow type, for the message."""
    for name in frame.columns:
        try:
            pa.array(frame[name])
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            return f"column {str(name)!r}"
    return "this DataFrame"


def _item_batches(items: Iterable[Any]) -> Iterator[pa.RecordBatch]:
    """A list or generator: dicts are gathered as rows, anything else is converted by itself.

    A list's rows are converted at once, so that a column's type does not depend on where the list
    is cut; a generator's in chunks whose size follows that of its rows.
    """
    rows: list[Mapping[str, Any]] = []
    limit = len(items) if isinstance(items, list) else _FIRST_ROWS
    for position, item in enumerate(items):
        if isinstance(item, Mapping):
            rows.append(item)
            if len(rows) >= limit:
                table = _row_table(rows)
                rows = []
                if not isinstance(items, list):
                    limit = _rows_within(BATCH_BYTES, table)
                yield from _table_batches(table)
            continue
        if rows:
            yield from _table_batches(_row_table(rows))
            rows = []
        if isinstance(item, list) or item is None:
            raise TypeError(f"cannot publish: item {position} is {_kind(item)}. Give {_ACCEPTED}")
        yield from _batches(item)
    if rows:
        yield from _table_batches(_row_table(rows))


def _row_table(rows: list[Mapping[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"cannot publish rows with a column named {name!r}: names are text")
    columns = [_column(name, [row.get(name) for row in rows]) for name in names]
    return pa.Table.from_arrays(columns, names=names)


def _column(name: str, values: list[Any]) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise TypeError(f"cannot publish column {name!r}: {_told(error)}") from error
    except OverflowError as error:
        raise TypeError(f"cannot publish column {name!r}: a number is too large") from error


def _told(error: Exception) -> str:
    return "; ".join(str(part) for part in error.args) or type(error).__name__


def _rows_within(size: int, batch: pa.RecordBatch | pa.Table) -> int:
    """How many rows like those of `batch` take `size` bytes: 1 to BATCH_ROWS_MAX."""
    per_row = max(1, batch.nbytes // max(1, batch.num_rows))
    return max(1, min(BATCH_ROWS_MAX, size // per_row))


def _bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Cut by rows and bytes; halving copes with rows of very unequal size."""
    rows = batch.num_rows
    if rows <= BATCH_ROWS_MAX and (rows <= 1 or batch.nbytes <= BATCH_BYTES):
        yield batch
        return
    step = min(_rows_within(BATCH_BYTES, batch), (rows + 1) // 2)
    for start in range(0, rows, step):
        yield from _bounded(batch.slice(start, step))


def _plain_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    schema = batch.schema
    names = schema.names
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise TypeError(f"cannot publish several columns named {twice[0]!r}")
    fields = [pa.field(f.name, plain_type(f.type), nullable=True) for f in schema]
    columns = [
        _decoded(column, field.type) for column, field in zip(batch.columns, fields, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _decoded(column: Any, plain: pa.DataType) -> Any:
    if column.type == plain:
        return column
    while isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_run_end_encoded(column.type):
        column = pc.call_function("run_end_decode", [column])
    if pa.types.is_dictionary(column.type):
        return pc.take(_decoded(column.dictionary, plain), column.indices)
    try:
        return column if column.type == plain else column.cast(plain)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TypeError(f"cannot publish a column of type {column.type}: {error}") from error


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without encodings, views and extensions, at every depth."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        value: pa.DataType = kind.value_type
        return plain_type(value)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([(f.name, plain_type(f.type)) for f in kind])
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        fixed: pa.DataType = pa.list_(plain_type(kind.value_type), kind.list_size)
        return fixed
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind
