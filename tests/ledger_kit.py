"""What tests of the ledger share: jobs with their files, and the records of one job's life."""

import hashlib
from collections.abc import Sequence
from typing import Any

from builders import WALL_US, make_job

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.memory import MemoryLedger
from casparian_flow.domain.clock import Now
from casparian_flow.domain.ids import JobId, Token, fencing_token
from casparian_flow.domain.jobs import JournalKind
from casparian_flow.domain.outputs import OutputEntry, OutputKind, SinkMode
from casparian_flow.domain.records import Job, Record

AnyLedger = Ledger | MemoryLedger


class ManualClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> Now:
        return Now(self.seconds, WALL_US + int(self.seconds * 1e6))


def insert_jobs(ledger: AnyLedger, count: int, **changes: Any) -> list[Job]:
    """Add `count` jobs, each for a file of its own, as a scan would."""
    if isinstance(ledger, MemoryLedger):
        first = ledger.load(0).next_job_id
        jobs = [make_job(first + i, created_us=WALL_US, **changes) for i in range(count)]
        ledger.add_jobs(jobs)
        return jobs
    with ledger.transaction() as connection:
        if not connection.execute("SELECT 1 FROM cf_source_root").fetchone():
            root = ledger.next_id("cf_source_root")
            connection.execute("INSERT INTO cf_source_root (id, path) VALUES (?, '/data')", [root])
        jobs = []
        for job_id in ledger.new_job_ids(count):
            location = ledger.next_id("cf_file_location")
            version = ledger.next_id("cf_file_version")
            job = make_job(
                job_id,
                **(
                    {
                        "location_id": location,
                        "version_id": version,
                        "rel_path": f"file{location}.csv",
                        "content_hash": f"{location:064x}",
                        "signature": (1, location, 100, 5, 5),
                        "created_us": WALL_US,
                    }
                    | changes
                ),
            )
            _insert(connection, job)
            jobs.append(job)
    return jobs


def _insert(connection: Any, job: Job) -> None:
    dev, ino, size, mtime_ns, ctime_ns = job.signature
    connection.execute(
        """
        INSERT INTO cf_file_location (id, source_root_id, rel_path, filename,
            current_version_id, discovered_time, last_seen_time, dev, ino, size, mtime_ns, ctime_ns)
        VALUES ($1, 1, $2, $2, $3, make_timestamp($4), make_timestamp($4), $5, $6, $7, $8, $9)
        """,
        [
            job.location_id,
            job.rel_path,
            job.version_id,
            WALL_US,
            dev,
            ino,
            size,
            mtime_ns,
            ctime_ns,
        ],
    )
    connection.execute(
        "INSERT OR IGNORE INTO cf_file_hash_registry VALUES ($1, make_timestamp($2), $3)",
        [job.content_hash, WALL_US, size],
    )
    connection.execute(
        """
        INSERT INTO cf_file_version (id, location_id, seq, content_hash, size_bytes,
            modified_time, detected_at, dev, ino, mtime_ns, ctime_ns)
        VALUES ($1, $2, $3, $4, $5, make_timestamp($6), make_timestamp($6), $7, $8, $9, $10)
        """,
        [
            job.version_id,
            job.location_id,
            job.version_seq,
            job.content_hash,
            size,
            WALL_US,
            dev,
            ino,
            mtime_ns,
            ctime_ns,
        ],
    )
    connection.execute(
        """
        INSERT INTO cf_processing_queue (id, file_version_id, plugin_name, status, priority,
            generation, scheduled_at, created_at)
        VALUES ($1, $2, $3, $4, $5, $6, make_timestamp($7), make_timestamp($8))
        """,
        [
            job.job_id,
            job.version_id,
            job.plugin,
            job.status,
            job.priority,
            job.generation,
            job.not_before_us or None,
            job.created_us,
        ],
    )


# -- records ------------------------------------------------------------------------------------


def token_of(ledger: AnyLedger, job_id: int, attempt: int = 1) -> Token:
    return fencing_token(ledger.ledger_id, ledger.epoch, job_id, attempt)


def record(job_id: int, kind: JournalKind, attempt: int = 1, **data: Any) -> Record:
    return Record(JobId(job_id), kind, attempt, WALL_US + job_id, data or None)


def leased(ledger: AnyLedger, job_id: int, attempt: int = 1) -> Record:
    return record(
        job_id,
        JournalKind.LEASED,
        attempt,
        token=token_of(ledger, job_id, attempt),
        owner="aabb",
        manifest_id=7,
    )


def started(job_id: int, attempt: int = 1) -> Record:
    return record(job_id, JournalKind.STARTED, attempt)


def granted(job_id: int, *entries: OutputEntry, attempt: int = 1) -> Record:
    made = record(job_id, JournalKind.GRANTED, attempt)
    made.manifest = entries or (output(job_id),)
    return made


def completed(job_id: int, attempt: int = 1) -> Record:
    return record(
        job_id,
        JournalKind.COMPLETED,
        attempt,
        completion="SUCCESS",
        summary="3 rows",
        metrics={"rows": 3, "quarantine_rows": 1},
    )


def retried(job_id: int, attempt: int = 1, retry_count: int = 1) -> Record:
    return record(
        job_id,
        JournalKind.RETRIED,
        attempt,
        reason="timeout",
        message="too slow",
        not_before_us=WALL_US + 4_000_000,
        retry_count=retry_count,
    )


def failed(job_id: int, attempt: int = 1) -> Record:
    return record(
        job_id,
        JournalKind.FAILED,
        attempt,
        reason="plugin_error",
        message="no such column",
        dead_letter="permanent_error",
    )


def output(
    job_id: int,
    *,
    key: str = "",
    slice_name: str = "",
    mode: SinkMode = SinkMode.APPEND,
    order_no: tuple[int, int, int] = (1, 7, 0),
    n: int = 0,
) -> OutputEntry:
    key = hashlib.sha256((key or f"job {job_id} output {n}").encode()).hexdigest()
    slice_key = hashlib.sha256((slice_name or f"slice of {key}").encode()).hexdigest()
    return OutputEntry(
        n=n,
        topic="sales",
        kind=OutputKind.OUTPUT,
        uri="parquet://sales",
        mode=mode,
        root_id="root-a",
        output_key=key,
        slice_key=slice_key,
        order_no=order_no,
        stage=f"sales/.stage/{job_id}.{n}",
        final=f"sales/{key[:32]}.parquet",
        rows=3,
        bytes=30,
        sha256="f" * 64,
    )


def run_to_grant(ledger: AnyLedger, job_id: int, *entries: OutputEntry) -> Sequence[Any]:
    """Lease, start and ask for the grant in one commit; the outcomes."""
    return ledger.commit([leased(ledger, job_id), started(job_id), granted(job_id, *entries)])
