"""Row 8: the Parquet sink with all it promises, beside pyarrow's bare writer."""

import os
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from bench import tables
from bench.harness import (
    Contestant,
    Figure,
    Plan,
    Stopwatch,
    Values,
    alternate,
    at_least,
    check,
    figure,
)
from bench.workspace import fresh, workspace
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.outputs import SinkSpec
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.lineage import Lineage
from casparian_worker.publishing import Sinks
from casparian_worker.sinks.base import JobRun, SinkEnvironment
from casparian_worker.sinks.root import OutputRoot

BYTES, QUICK_BYTES = 500_000_000, 40_000_000
TOKEN = "0123abcd-1-1-1"
OURS, PEER = "parquet sink", "pyarrow ParquetWriter"
CODEC: Literal["zstd"] = "zstd"


def measure(plan: Plan) -> list[Figure]:
    batches = tables.batches(plan.size(BYTES, QUICK_BYTES))
    megabytes = sum(batch.nbytes for batch in batches) / 1e6
    with workspace("row08") as folder:
        contestants = [
            Contestant(OURS, lambda: _sink(folder, batches, megabytes)),
            Contestant(PEER, lambda: _bare(folder, batches, megabytes)),
        ]
        results = alternate(contestants, plan)
    return [
        figure(
            results, "MB/s", "MB/s", row="8", work=f"{megabytes:,.0f} MB in batches to Parquet",
            ours=OURS, peer=PEER, goal=at_least(0.9),
            notes=[("ours: contract check, lineage columns, checksum, fsync, atomic publishing; "
                   "the peer: the rows and an fsync")],
        )
    ]  # fmt: skip


def _sink(folder: Path, batches: list[pa.RecordBatch], megabytes: float) -> Values:
    with fresh(folder) as inner:
        sinks = Sinks(SinkEnvironment(OutputRoot.open(str(inner)), SystemClock()))
        uri = f"parquet://orders?compression={CODEC}"
        spec = SinkSpec("orders", uri, schema_json=tables.CONTRACT)
        run = JobRun(TOKEN, 1, 1, "bench", "artifact", "parameters", (1, 1, 0))
        lineage = Lineage("0" * 64, "0123abcd-1", "2026-01-01T00:00:00.000000Z", "1.0.0")
        with Stopwatch() as watch:
            outputs = JobOutputs(run, lineage, [spec], sinks.get)
            for batch in batches:
                outputs.write("orders", batch)
            (entry,) = outputs.finish()
            sinks.get(entry.uri).publish(entry, TOKEN)
            sinks.get(entry.uri).unstage(entry, TOKEN)
        _verify(inner / entry.final, batches)
    return {"MB/s": megabytes / watch.seconds}


def _bare(folder: Path, batches: list[pa.RecordBatch], megabytes: float) -> Values:
    with fresh(folder) as inner:
        path = inner / "orders.parquet"
        with Stopwatch() as watch, path.open("wb") as file:
            with pq.ParquetWriter(file, batches[0].schema, compression=CODEC) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        _verify(path, batches)
    return {"MB/s": megabytes / watch.seconds}


def _verify(path: Path, batches: list[pa.RecordBatch]) -> None:
    metadata = pq.read_metadata(path)
    check(metadata.num_rows == sum(batch.num_rows for batch in batches), "every row is there")
