"""One record batch as bytes and back, where the bytes come from foreign code.

Arrow lets a few bytes stand for very many rows (compressed bodies, dictionaries, run ends, null
columns of any length) and lets offsets point anywhere. `decode` therefore takes only what the SDK
makes: an uncompressed stream of one schema and one batch of plain columns with a bounded number of
rows, and validates every offset and every string before anyone computes with them.
"""

import struct
from collections.abc import Callable

import pyarrow as pa

from casparian_flow.sdk import BATCH_ROWS_MAX

COLUMNS_MAX = 10_000
VALUES_PER_BYTE = 8
"""A list of booleans has as many; what has more stands for values without holding them."""
_FREE_CELLS = 1 << 26
"""Null columns hold nothing: rows times columns that need no bytes."""
_FREE_VALUES = 1 << 22
"""Likewise for values within lists and structs, which become Python objects on their way."""
_DEPTH_MAX = 32


class HostileBatchError(Exception):
    """The bytes are no plain, bounded record batch."""


def encode(batch: pa.RecordBatch) -> memoryview:
    """A batch as an Arrow IPC stream."""
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(out.getvalue())


def decode(body: bytes | bytearray) -> pa.RecordBatch:
    """The one batch of an Arrow IPC stream; its columns are views of `body`.

    Raises:
        HostileBatchError: anything else than what `encode` makes from plain batches.
    """
    try:
        reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
        schema = _read_schema(reader)
        message = _read(reader, "record batch")
        if message.type != "record batch":
            raise HostileBatchError(f"want a record batch, got a {message.type}")
        _check_batch(message.metadata.to_pybytes(), len(body), len(schema))
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise HostileBatchError(f"no Arrow batch: {error}") from error
    return batch


def _read_schema(reader: pa.ipc.MessageReader) -> pa.Schema:
    message = _read(reader, "schema")
    if message.type != "schema":
        raise HostileBatchError("the stream does not begin with a schema")
    schema = pa.ipc.read_schema(message)
    if len(schema) > COLUMNS_MAX:
        raise HostileBatchError(f"{len(schema)} columns exceed {COLUMNS_MAX}")
    if len(set(schema.names)) != len(schema):
        raise HostileBatchError("several columns have the same name")
    for field in schema:
        _check_type(field.type, _DEPTH_MAX)
    return schema


def _read(reader: pa.ipc.MessageReader, what: str) -> pa.ipc.Message:
    try:
        return reader.read_next_message()
    except StopIteration:
        raise HostileBatchError(f"the stream ends before its {what}") from None


_ENCODED: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_dictionary,
    pa.types.is_run_end_encoded,
    pa.types.is_string_view,
    pa.types.is_binary_view,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def _check_type(kind: pa.DataType, depth: int) -> None:
    if depth == 0:
        raise HostileBatchError("a type is nested too deeply")
    if isinstance(kind, pa.BaseExtensionType) or any(test(kind) for test in _ENCODED):
        raise HostileBatchError(f"a column of type {kind} is not plain")
    if pa.types.is_fixed_size_list(kind) and kind.list_size > BATCH_ROWS_MAX:
        raise HostileBatchError(f"a list of {kind.list_size} values is too long")
    for index in range(kind.num_fields):
        _check_type(kind.field(index).type, depth - 1)


# -- FlatBuffers: just enough to know a RecordBatch's sizes and compression before it is read.
# Message: version, header_type, header, bodyLength. RecordBatch: length, nodes, buffers,
# compression. (format/Message.fbs of Apache Arrow; the table layout is FlatBuffers' own.)

_HEADER_SLOT = 2
_LENGTH_SLOT = 0
_NODES_SLOT = 1
_COMPRESSION_SLOT = 3
_NODE = struct.Struct("<qq")  # length, null count


def _check_batch(message: bytes, size: int, columns: int) -> None:
    """Refuse a batch that stands for more than its `size` in bytes may hold."""
    root = struct.unpack_from("<I", message, 0)[0]
    header = _slot(message, root, _HEADER_SLOT)
    if header is None:
        raise HostileBatchError("a message has no header")
    batch = header + struct.unpack_from("<I", message, header)[0]
    length = _slot(message, batch, _LENGTH_SLOT)
    rows = 0 if length is None else struct.unpack_from("<q", message, length)[0]
    if not 0 <= rows <= BATCH_ROWS_MAX:
        raise HostileBatchError(f"{rows} rows are not within 0 to {BATCH_ROWS_MAX}")
    if _slot(message, batch, _COMPRESSION_SLOT) is not None:
        raise HostileBatchError("the batch is compressed")
    cells = rows * columns
    if cells > VALUES_PER_BYTE * size + _FREE_CELLS:
        raise HostileBatchError(f"{size} bytes stand for {cells} cells")
    nested = sum(_lengths(message, batch)) - cells
    if nested > VALUES_PER_BYTE * size + _FREE_VALUES:
        raise HostileBatchError(f"{size} bytes stand for {nested} values within lists and structs")


def _lengths(message: bytes, batch: int) -> list[int]:
    """The lengths of all arrays of a batch, children after their parents."""
    nodes = _slot(message, batch, _NODES_SLOT)
    if nodes is None:
        return []
    vector = nodes + struct.unpack_from("<I", message, nodes)[0]
    count = struct.unpack_from("<I", message, vector)[0]
    if count * _NODE.size > len(message):
        raise HostileBatchError("a batch has more arrays than its message holds")
    lengths = [_NODE.unpack_from(message, vector + 4 + _NODE.size * n)[0] for n in range(count)]
    if any(length < 0 for length in lengths):
        raise HostileBatchError("an array has a negative length")
    return lengths


def _slot(buffer: bytes, table: int, slot: int) -> int | None:
    """Where a table keeps a field, or None if it lacks it."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if vtable < 0:
        raise HostileBatchError("a table points before its message")
    entry = 4 + 2 * slot
    if entry + 2 > struct.unpack_from("<H", buffer, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", buffer, vtable + entry)[0]
    return table + offset if offset else None
