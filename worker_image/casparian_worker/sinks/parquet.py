"""Parquet files: streamed, in row groups of a size that readers like."""

import base64
from collections.abc import Callable
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow.domain.outputs import LINEAGE_COLUMNS, SinkAddress
from casparian_worker.arrays import plain_type
from casparian_worker.sinks.base import SinkEnvironment, StageContext
from casparian_worker.sinks.durable import HashingFile
from casparian_worker.sinks.files import FileFormat, FileSink, FormatWriter

ROW_GROUP_ROWS: Final = 131_072
ROW_GROUP_BYTES: Final = 64 << 20
"""A row group is written when it reaches either; this bounds the memory of one output."""
_READ_BACK_ROWS: Final = 65_536


class ParquetFormat(FileFormat):
    extension = ".parquet"

    def __init__(self, compression: str = "zstd") -> None:
        self._compression = "NONE" if compression == "none" else compression

    def writer(
        self,
        file: HashingFile,
        schema: pa.Schema,
        ctx: StageContext,
        before: FormatWriter | None = None,
    ) -> FormatWriter:
        return ParquetFormatWriter(file, schema, self._compression, _provenance(ctx))

    def needs_rewrite(self, old: pa.Schema, new: pa.Schema) -> bool:
        return True

    def copy(
        self,
        path: str,
        writer: FormatWriter,
        conform: Callable[[pa.RecordBatch], pa.RecordBatch],
    ) -> None:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_READ_BACK_ROWS):
                writer.write(conform(batch))


class ParquetFormatWriter(FormatWriter):
    def __init__(
        self,
        file: HashingFile,
        schema: pa.Schema,
        compression: str,
        metadata: dict[str, str],
    ) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._rows = 0
        self._bytes = 0
        self._writer = pq.ParquetWriter(
            cast("Any", file),
            schema,
            compression=cast("Any", compression),
            write_statistics=True,
            store_schema=False,
        )
        # The stored Arrow schema is written by hand: lineage columns are dictionaries while they
        # are written, which is cheap, and plain text to whoever reads the file.
        stored = base64.b64encode(_stored_schema(schema).serialize().to_pybytes())
        self._writer.add_key_value_metadata({"ARROW:schema": stored.decode(), **metadata})

    def write(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes
        if self._rows >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._batches:
            table = pa.Table.from_batches(self._batches, self._schema)
            self._writer.write_table(table, row_group_size=max(self._rows, 1))
            self._batches.clear()
            self._rows = self._bytes = 0


def _stored_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema(
        [
            pa.field(f.name, plain_type(f.type), f.nullable) if f.name in LINEAGE_COLUMNS else f
            for f in schema
        ]
    )


def _provenance(ctx: StageContext) -> dict[str, str]:
    run = ctx.run
    facts = {
        "casparian.plugin": run.plugin,
        "casparian.topic": ctx.topic,
        "casparian.kind": ctx.kind.value,
        "casparian.file_version_id": str(run.version_id),
        "casparian.order_no": ".".join(map(str, run.order_no)),
        "casparian.token": run.token,
    }
    return facts | {f"casparian.{name}": text for name, text in ctx.metadata.items()}


def parquet_sink(address: SinkAddress, env: SinkEnvironment) -> FileSink:
    """The sink of a `parquet://` address."""
    return FileSink(address, env, ParquetFormat(address.compression))
