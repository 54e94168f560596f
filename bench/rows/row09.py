"""Row 9: what the ledger adds to DuckDB for a million jobs and a million versions."""

from pathlib import Path

import duckdb
import pyarrow as pa
from sqlalchemy import text

from bench import ledgers
from bench.harness import (
    Contestant,
    Figure,
    Plan,
    Stopwatch,
    Values,
    alternate,
    at_least,
    at_most,
    check,
    figure,
)
from bench.workspace import fresh, workspace
from casparian_flow.db.access import get_engine
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.schema import TABLES
from casparian_flow.domain.clock import SystemClock

JOBS, QUICK_JOBS = 1_000_000, 20_000
VERSIONS_PER_FILE = 4
QUEUE = "cf_processing_queue"
BULK, BARE_BULK = "Ledger.enqueue_bulk", "DuckDB INSERT … SELECT"
TIMELINE, BARE_TIMELINE = "get_engine(…)", "duckdb.connect"
TIMELINE_SQL = """
SELECT l.rel_path, v.id AS version_id, v.content_hash, v.size_bytes, v.detected_at,
       COUNT(j.id) AS jobs_processed
FROM cf_file_location l
JOIN cf_file_version v ON v.location_id = l.id
LEFT JOIN cf_processing_queue j ON j.file_version_id = v.id
GROUP BY l.rel_path, v.id
ORDER BY l.rel_path, v.detected_at
"""
"""The version timeline as the documentation prints it."""
BARE_SQL = TIMELINE_SQL.replace(
    "GROUP BY l.rel_path, v.id",
    "GROUP BY l.rel_path, v.id, v.content_hash, v.size_bytes, v.detected_at",
)
"""The same in DuckDB's dialect, which knows no dependence on a grouped key."""


def measure(plan: Plan) -> list[Figure]:
    jobs = plan.size(JOBS, QUICK_JOBS)
    with workspace("row09") as folder:
        empty = ledgers.wire(folder / "empty.duckdb", folder / "none")
        table = ledgers.job_table(jobs, empty.manifest_id)
        full = ledgers.wire(folder / "full.duckdb", folder / "none")
        ledgers.add_versions(full, jobs // VERSIONS_PER_FILE, versions=VERSIONS_PER_FILE)
        ledgers.add_jobs(full, 0, completed=jobs)
        results = alternate(
            [
                Contestant(BULK, lambda: _enqueue(folder, empty.database, table)),
                Contestant(BARE_BULK, lambda: _insert(folder, table)),
                Contestant(TIMELINE, lambda: _timeline(full.database, jobs)),
                Contestant(BARE_TIMELINE, lambda: _bare_timeline(full.database, jobs)),
            ],
            plan,
        )
    return [
        figure(
            results, "jobs/s", "jobs/s", row="9a", work=f"bulk enqueue of {jobs:,} jobs",
            ours=BULK, peer=BARE_BULK, goal=at_least(0.5),
            notes=["the peer inserts the same Arrow table into a table of the same definition"],
        ),
        figure(
            results, "s", "s", row="9b", work=f"version timeline over {jobs:,} versions",
            ours=TIMELINE, peer=BARE_TIMELINE, goal=at_most(1.2),
            notes=["both open the file, run the query and fetch every row"],
        ),
    ]  # fmt: skip


def _enqueue(folder: Path, template: Path, table: pa.Table) -> Values:
    with fresh(folder) as inner:
        database = ledgers.copy(template, inner / "ledger.duckdb")
        with Ledger.open(database, clock=SystemClock()) as ledger:
            with Stopwatch() as watch:
                ids = ledger.enqueue_bulk(table)
            (row,) = ledger.query(f"SELECT count(*) AS n FROM {QUEUE} WHERE status = 'QUEUED'")
        check(row["n"] == len(ids) == table.num_rows, "every job is queued")
    return {"jobs/s": table.num_rows / watch.seconds}


def _insert(folder: Path, table: pa.Table) -> Values:
    with fresh(folder) as inner, duckdb.connect(str(inner / "bare.duckdb")) as connection:
        connection.execute(f"CREATE TABLE {QUEUE} ({TABLES[QUEUE]})")
        numbered = table.append_column("id", pa.array(range(1, table.num_rows + 1), pa.int64()))
        with Stopwatch() as watch:
            listed = ", ".join(numbered.column_names)
            connection.execute(
                f"INSERT INTO {QUEUE} ({listed}, status, created_at) "
                f"SELECT {listed}, 'QUEUED', now()::TIMESTAMP FROM numbered"
            )
        row = connection.execute(f"SELECT count(*) FROM {QUEUE}").fetchone()
        check(row == (table.num_rows,), "every row is there")
    return {"jobs/s": table.num_rows / watch.seconds}


def _timeline(database: Path, versions: int) -> Values:
    with Stopwatch() as watch, get_engine(database).connect() as connection:
        rows = connection.execute(text(TIMELINE_SQL)).fetchall()
    check(len(rows) == versions and all(row[-1] == 1 for row in rows), "the timeline is whole")
    return {"s": watch.seconds}


def _bare_timeline(database: Path, versions: int) -> Values:
    with Stopwatch() as watch, duckdb.connect(str(database), read_only=True) as connection:
        rows = connection.execute(BARE_SQL).fetchall()
    check(len(rows) == versions and all(row[-1] == 1 for row in rows), "the timeline is whole")
    return {"s": watch.seconds}
