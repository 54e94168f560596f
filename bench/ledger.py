"""Measure the ledger: commits by size, folds, opening, loading, bulk enqueue.

    python bench/ledger.py [jobs]          (default 1,000,000)

Prints the tenth percentile and the median of each in milliseconds. The tenth percentile says
what the work costs, the median what this machine made of it.
"""

import hashlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.ids import JobId, fencing_token
from casparian_flow.domain.jobs import JournalKind
from casparian_flow.domain.outputs import OutputEntry, OutputKind, SinkMode
from casparian_flow.domain.records import Record

AT_US = 1_760_000_000_000_000


class Life:
    """The records of a job's life."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def leased(self, job_id: int) -> Record:
        token = fencing_token(self._ledger.ledger_id, self._ledger.epoch, job_id, 1)
        data = {"token": token, "owner": "00aabbccdd", "manifest_id": 1}
        return Record(JobId(job_id), JournalKind.LEASED, 1, AT_US, data)

    def started(self, job_id: int) -> Record:
        return Record(JobId(job_id), JournalKind.STARTED, 1, AT_US)

    def granted(self, job_id: int) -> Record:
        key = hashlib.sha256(str(job_id).encode()).hexdigest()
        entry = OutputEntry(
            n=0,
            topic="topic",
            kind=OutputKind.OUTPUT,
            uri="parquet://topic",
            mode=SinkMode.APPEND,
            root_id="root",
            output_key=key,
            slice_key=key,
            order_no=(1, 1, 0),
            stage=f"topic/.stage/{job_id}",
            final=f"topic/topic-{key[:32]}.parquet",
            rows=100,
            bytes=1000,
            sha256=key,
        )
        return Record(JobId(job_id), JournalKind.GRANTED, 1, AT_US, manifest=(entry,))

    def completed(self, job_id: int) -> Record:
        data = {"completion": "SUCCESS", "metrics": {"rows": 100, "quarantine_rows": 0}}
        return Record(JobId(job_id), JournalKind.COMPLETED, 1, AT_US, data)


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1e3


def report(name: str, values: list[float]) -> None:
    values.sort()
    print(f"{name:<40} {values[len(values) // 10]:9.2f} {statistics.median(values):9.2f}")


def fill(ledger: Ledger, jobs: int) -> None:
    with ledger.transaction() as connection:
        ledger.next_id("cf_source_root")
        connection.execute("INSERT INTO cf_source_root (id, path) VALUES (1, '/data')")
        ledger.next_ids("cf_file_location", jobs)
        connection.execute(
            f"""
            INSERT INTO cf_file_location (id, source_root_id, rel_path, filename,
                current_version_id, discovered_time, last_seen_time, size)
            SELECT i, 1, 'dir/f' || i, 'f' || i, i, make_timestamp(0), make_timestamp(0), 9
            FROM range(1, {jobs + 1}) t(i)
            """
        )
        ledger.next_ids("cf_file_version", jobs)
        connection.execute(
            f"""
            INSERT INTO cf_file_version (id, location_id, seq, content_hash, size_bytes,
                modified_time, detected_at)
            SELECT i, i, 1, sha256(i::VARCHAR), 9, make_timestamp(0), make_timestamp(0)
            FROM range(1, {jobs + 1}) t(i)
            """
        )
    table = pa.table(
        {
            "plugin_name": pa.array(["p"] * jobs),
            "file_version_id": pa.array(range(1, jobs + 1), pa.int64()),
        }
    )
    print(f"bulk enqueue of {jobs} jobs: {timed(lambda: ledger.enqueue_bulk(table)) / 1e3:.2f} s")


def main(jobs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.duckdb"
        ledger = Ledger.open(path, clock=SystemClock())
        ledger.begin_epoch()
        fill(ledger, jobs)
        ledger.close()
        print(f"{'':<40} {'p10 ms':>9} {'p50 ms':>9}")
        opened: list[Ledger] = []
        report("open", [timed(lambda: opened.append(Ledger.open(path, clock=SystemClock())))])
        ledger = opened[0]
        report("load, first page 1,000", [timed(lambda: ledger.load(1_000)) for _ in range(5)])
        page = [timed(lambda: ledger.hydrate((0, jobs // 2), 10_000)) for _ in range(5)]
        report("hydrate 10,000", page)
        life = Life(ledger)
        first = 1
        for size, rounds in ((1, 60), (10, 40), (100, 20), (1_000, 15)):
            folds = []
            times: dict[str, list[float]] = {}
            for _ in range(rounds):
                ids = range(first, first + size)
                first += size
                for make in (life.leased, life.started, life.granted, life.completed):
                    batch = [make(job_id) for job_id in ids]
                    spent = timed(lambda batch=batch: ledger.commit(batch))  # type: ignore[misc]
                    times.setdefault(make.__name__, []).append(spent)
                folds.append(timed(ledger.fold))
            for name, values in times.items():
                report(f"commit {size} × {name}", values)
            report(f"fold {size} jobs, adjacent", folds)
        if jobs > first + 10_000:
            folds = []
            rest = list(range(first, jobs))
            random.Random(1).shuffle(rest)
            for i in range(0, 5_000, 1_000):
                ledger.commit([life.leased(job_id) for job_id in rest[i : i + 1_000]])
                folds.append(timed(ledger.fold))
            report("fold 1,000 jobs, scattered", folds)
        ledger.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
