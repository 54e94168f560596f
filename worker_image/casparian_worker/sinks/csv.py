"""CSV files: UTF-8, one header line, text in quotes, an empty unquoted field for null.

Records are joined by Arrow's own kernels, so a batch is written as one buffer. Since a value's
text does not depend on the column's type, only a new column makes earlier rows be written again:
they are copied with empty fields at their end.
"""

from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa

from casparian_flow.domain.outputs import LINEAGE_COLUMNS, SinkAddress
from casparian_worker.arrays import (
    ArrowArray,
    as_text,
    compute,
    is_bytes,
    is_text,
    plain_type,
)
from casparian_worker.sinks.base import SinkEnvironment, StageContext
from casparian_worker.sinks.durable import HashingFile
from casparian_worker.sinks.files import FileFormat, FileSink, FormatWriter

_COPY_BUFFER: Final = 1 << 20


class CsvFormat(FileFormat):
    extension = ".csv"

    def writer(
        self,
        file: HashingFile,
        schema: pa.Schema,
        ctx: StageContext,
        before: FormatWriter | None = None,
    ) -> FormatWriter:
        known = before.names if isinstance(before, CsvFormatWriter) else []
        names = known + [name for name in schema.names if name not in known]
        return CsvFormatWriter(file, names)

    def needs_rewrite(self, old: pa.Schema, new: pa.Schema) -> bool:
        return set(old.names) != set(new.names)

    def copy(
        self,
        path: str,
        writer: FormatWriter,
        conform: Callable[[pa.RecordBatch], pa.RecordBatch],
    ) -> None:
        assert isinstance(writer, CsvFormatWriter)
        writer.copy_padded(path)


class CsvFormatWriter(FormatWriter):
    """Writes records in the order of `names`."""

    def __init__(self, file: HashingFile, names: list[str]) -> None:
        self.names = names
        self._file = file
        header = ",".join(_quote(name) for name in names) + "\n"
        file.write(header.encode())

    def write(self, batch: pa.RecordBatch) -> None:
        fields = [_fields(batch.column(name), name) for name in self.names]
        fields[-1] = compute.binary_join_element_wise(
            fields[-1], "\n", "", null_handling="replace", null_replacement=""
        )
        records = compute.binary_join_element_wise(
            *fields, ",", null_handling="replace", null_replacement=""
        )
        self._file.write(_bytes_of(records))

    def close(self) -> None:
        pass

    def copy_padded(self, path: str) -> None:
        """Append the records of an earlier file that had fewer columns, without its header."""
        with open(path, "rb", buffering=_COPY_BUFFER) as file:
            padding: bytes | None = None
            record = b""
            for line in file:
                record += line
                if record.count(b'"') % 2:
                    continue  # the line break is inside a quoted value
                if padding is None:
                    padding = b"," * (len(self.names) - _count_columns(record)) + b"\n"
                else:
                    self._file.write(record[:-1] + padding)
                record = b""


def _quote(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _count_columns(header: bytes) -> int:
    outside = header.split(b'"')[::2]
    return sum(part.count(b",") for part in outside) + 1


def _fields(array: Any, name: str) -> ArrowArray:
    if name in LINEAGE_COLUMNS and pa.types.is_dictionary(array.type):
        dictionary = pa.array(
            [_quote(value) for value in array.dictionary.to_pylist()], pa.string()
        )
        return pa.DictionaryArray.from_arrays(array.indices, dictionary).dictionary_decode()
    kind = plain_type(array.type)
    text = as_text(array)
    if not (is_text(kind) or is_bytes(kind) or pa.types.is_nested(kind)):
        return text
    escaped = compute.replace_substring(text, '"', '""')
    quoted: ArrowArray = compute.binary_join_element_wise('"', escaped, '"', "")
    return quoted


def _bytes_of(records: Any) -> memoryview:
    """The text of all records, one after the other: the array's own data buffer."""
    _, offsets, data = records.buffers()
    raw = memoryview(offsets).cast("B")
    bounds = raw.cast("q") if pa.types.is_large_string(records.type) else raw.cast("i")
    first, last = bounds[records.offset], bounds[records.offset + len(records)]
    return memoryview(data)[first:last]


def csv_sink(address: SinkAddress, env: SinkEnvironment) -> FileSink:
    """The sink of a `csv://` address."""
    return FileSink(address, env, CsvFormat())
