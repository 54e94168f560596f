"""Row 5: CSV files to Parquet, from an empty ledger to all COMPLETED."""

from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from bench import ledgers, noops, tables
from bench.flow import Flow, only_completed
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
from bench.peers import pool_script
from bench.workspace import fresh, workspace
from casparian_flow.services.scout import scan

FILES, QUICK_FILES = 5_000, 100
FILE_BYTES = 50_000
OURS = "scan, version, run, publish"
PLUGIN = """\
import pyarrow.csv
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.csv", topic="orders")

class Handler(BasePlugin):
    def execute(self, file_path):
        self.publish("orders", pyarrow.csv.read_csv(file_path))
"""
NOTE = (
    "two worker processes each; the peer has no ledger, no sandbox, no second read, no checksum "
    "of its outputs; both write the lineage columns and fsync"
)
LINEAGE = ("_cf_source_hash", "_cf_job_id", "_cf_processed_at", "_cf_parser_version")


def measure(plan: Plan) -> list[Figure]:
    files = plan.size(FILES, QUICK_FILES)
    with workspace("row05") as folder:
        root = folder / "csv"
        rows = tables.write_csv_files(root, files, FILE_BYTES)
        contestants = [
            Contestant(OURS, lambda: _ours(folder, root, files, rows)),
            Contestant(pool_script.NAME, lambda: _peer(folder, root, files, rows)),
        ]
        results = alternate(contestants, plan)
    return [
        figure(
            results, "files/s", "files/s", row="5", work=f"{files:,} CSVs of 50 kB → Parquet",
            ours=OURS, peer=pool_script.NAME, goal=at_least(0.8), notes=[NOTE],
        )
    ]  # fmt: skip


def _ours(folder: Path, root: Path, files: int, rows: int) -> Values:
    with fresh(folder) as inner:
        wiring = ledgers.wire(inner / "ledger.duckdb", root, PLUGIN)
        with Flow(wiring.database, inner).start(noops.WORKERS) as flow:
            with Stopwatch() as watch:
                scan(wiring.root_id, flow.control)
                flow.await_jobs(files)
            check(only_completed(flow.counts(), files), f"jobs: {flow.counts()}")
        _verify(flow.output / "orders", files, rows)
    return {"files/s": files / watch.seconds}


def _peer(folder: Path, root: Path, files: int, rows: int) -> Values:
    with fresh(folder) as inner:
        seconds, converted = pool_script.run(root, inner / "output")
        check(converted == rows, "pool script: every row was converted")
        _verify(inner / "output", files, rows)
    return {"files/s": files / seconds}


def _verify(output: Path, files: int, rows: int) -> None:
    """Every file is there, every row once, with its lineage."""
    paths = [str(path) for path in output.glob("*.parquet")]
    check(len(paths) == files, f"{len(paths)} output files")
    table = ds.dataset(paths).to_table(columns=["order_id", *LINEAGE])
    ids: list[Any] = table.column("order_id").to_pylist()
    check(sorted(ids) == list(range(rows)), f"{table.num_rows} rows of {rows}")
    check(not any(table.column(name).null_count for name in LINEAGE), "lineage has no nulls")
    sources = table.column("_cf_source_hash").unique()
    check(len(sources) == files, "every source has its hash")
