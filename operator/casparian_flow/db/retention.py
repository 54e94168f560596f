"""Deleting what is old of the history of jobs and files.

What the lineage of an output refers to stays: a job that has outputs, its version, its journal.
So does a version's job while the version is the current one, for it is what tells that the file
has been dealt with; a job that another one repeats; and one that an API job stands for. Versions
go from the oldest on, so that a location keeps an unbroken row of them. Ids of what is deleted
are never given again.
"""

from dataclasses import dataclass
from typing import Final

import duckdb

from casparian_flow.db.api_tables import PLANS, TASKS
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import utc

_US_PER_HOUR: Final = 3_600_000_000
_QUEUE: Final = "cf_processing_queue"


@dataclass(frozen=True, slots=True)
class HistoryAges:
    """Hours after which each may go; None keeps it for ever."""

    jobs: float | None = None
    versions: float | None = None
    dead_letters: float | None = None


@dataclass(frozen=True, slots=True)
class HistoryCleaned:
    """How many rows were deleted."""

    jobs: int = 0
    versions: int = 0
    dead_letters: int = 0


def clean_history(ledger: Ledger, ages: HistoryAges, now_us: int) -> HistoryCleaned:
    """Delete dead letters, jobs with journal and logs, and versions, in one transaction.

    Raises:
        LedgerUnavailableError: nothing is changed.
    """
    if ages == HistoryAges():
        return HistoryCleaned()
    with ledger.transaction() as connection:
        ledger.keep_ids(_QUEUE, "cf_file_version")
        letters = _dead_letters(connection, ages.dead_letters, now_us)
        jobs = _jobs(connection, ages.jobs, now_us)
        versions = _versions(connection, ages.versions, now_us)
    return HistoryCleaned(jobs, versions, letters)


def _dead_letters(connection: duckdb.DuckDBPyConnection, hours: float | None, now_us: int) -> int:
    if hours is None:
        return 0
    return _deleted(connection, "DELETE FROM cf_dead_letter WHERE moved_at <= $1", hours, now_us)


def _jobs(connection: duckdb.DuckDBPyConnection, hours: float | None, now_us: int) -> int:
    if hours is None:
        return 0
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE old_jobs AS
        SELECT q.id FROM {_QUEUE} q
        WHERE q.status IN ('COMPLETED', 'FAILED', 'ABORTED', 'SKIPPED') AND q.end_time <= $1
          AND NOT EXISTS (SELECT 1 FROM cf_output o WHERE o.job_id = q.id)
          AND NOT EXISTS (SELECT 1 FROM cf_slice s WHERE s.job_id = q.id)
          AND NOT EXISTS (SELECT 1 FROM cf_dead_letter d WHERE d.original_job_id = q.id)
          AND NOT EXISTS (SELECT 1 FROM {_QUEUE} r WHERE r.retry_of = q.id)
          AND NOT EXISTS (SELECT 1 FROM {TASKS} t WHERE t.job_id = q.id)
          -- A file's last job says that it was processed; a rehearsal says no such thing.
          AND (q.rehearsal IS NOT NULL OR NOT EXISTS (
              SELECT 1 FROM cf_file_location l WHERE l.current_version_id = q.file_version_id))
        """,
        [_before(hours, now_us)],
    )
    for table in ("cf_journal", "cf_job_log"):
        connection.execute(f"DELETE FROM {table} WHERE job_id IN (SELECT id FROM old_jobs)")
    row = connection.execute(
        f"DELETE FROM {_QUEUE} WHERE id IN (SELECT id FROM old_jobs)"
    ).fetchone()
    connection.execute("DROP TABLE old_jobs")
    return int(row[0]) if row else 0


def _versions(connection: duckdb.DuckDBPyConnection, hours: float | None, now_us: int) -> int:
    if hours is None:
        return 0
    return _deleted(
        connection,
        f"""
        DELETE FROM cf_file_version WHERE id IN (
            SELECT v.id FROM cf_file_version v JOIN (
                SELECT k.location_id, min(k.seq) AS first_kept FROM cf_file_version k
                WHERE k.detected_at > $1
                   OR k.id IN (SELECT current_version_id FROM cf_file_location)
                   OR k.id IN (SELECT file_version_id FROM {_QUEUE})
                   OR k.id IN (SELECT file_version_id FROM cf_dead_letter)
                   OR k.id IN (SELECT unnest((plan_json->'$.version_ids')::BIGINT[]) FROM {PLANS})
                GROUP BY k.location_id
            ) kept ON kept.location_id = v.location_id AND v.seq < kept.first_kept
        )
        """,
        hours,
        now_us,
    )


def _deleted(connection: duckdb.DuckDBPyConnection, sql: str, hours: float, now_us: int) -> int:
    row = connection.execute(sql, [_before(hours, now_us)]).fetchone()
    return int(row[0]) if row else 0


def _before(hours: float, now_us: int) -> object:
    return utc(max(0, now_us - int(hours * _US_PER_HOUR)))
