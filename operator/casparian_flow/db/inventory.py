"""The ledger's side of a scan: begin, inventory, chunks, finish.

One scan of a root at a time. A scan that is not finished and has said nothing for
SILENT_AFTER_US gives way to the next; it may still commit chunks, which are guarded file by
file, but no longer concludes anything from absence.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import duckdb
import msgspec
import pyarrow as pa

from casparian_flow.db.chunks import CHUNK_FILES_MAX, check_rel_path, commit_chunk
from casparian_flow.db.fanout import QUEUE_TABLE, Wanted, enqueue
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.sources import overlaps_of, require_root
from casparian_flow.domain.errors import ConflictError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.records import Job
from casparian_flow.sentinel.api import ChunkResult, FileFinding, Row, ScanReport
from casparian_flow.services.routing import Match

SILENT_AFTER_US = 30_000_000
SCANS_KEPT = 200
"""Reports per root; older ones are deleted."""
PROBLEMS_KEPT = 1_000
_SCAN = "cf_scan"
_GONE = (Reason.SOURCE_CHANGED.value, Reason.SOURCE_MISSING.value)


@dataclass(slots=True)
class _Running:
    scan_id: int
    active_us: int


_running: "weakref.WeakKeyDictionary[Ledger, dict[int, _Running]]" = weakref.WeakKeyDictionary()
"""Scans under way, by ledger and root. Not in the ledger: a restarted process runs none."""
_guard = threading.Lock()


def begin_scan(ledger: Ledger, root_id: int, *, now_us: int) -> Row:
    """Open a scan; see `ControlApi.begin_scan`. The row has `overlaps` too: lines for people.

    Raises:
        NotFoundError: no such root, or it is not active.
        ConflictError: another scan of this root is under way.
    """
    claim = _claim(ledger, root_id, now_us)
    try:
        with ledger.transaction() as connection:
            root = require_root(connection, root_id)
            begun = {
                "scan_id": ledger.next_id(_SCAN),
                "path": root["path"],
                "include": msgspec.json.decode(root["include_patterns"], type=list[str]),
                "ignore": _ignore_patterns(connection, root_id),
                "settle_seconds": root["settle_seconds"],
                "st_dev": root["st_dev"] or 0,
                "overlaps": overlaps_of(connection, root_id, root["path"]),
            }
            connection.execute(
                f"INSERT INTO {_SCAN} (id, source_root_id, started_at) "
                "VALUES ($1, $2, make_timestamp($3))",
                [begun["scan_id"], root_id, now_us],
            )
    except BaseException:
        _forget(ledger, root_id, claim)
        raise
    claim.scan_id = begun["scan_id"]
    return begun


def _claim(ledger: Ledger, root_id: int, now_us: int) -> _Running:
    """Take the root for this scan before it is recorded, so that two cannot both begin."""
    with _guard:
        scans = _running.setdefault(ledger, {})
        current = scans.get(root_id)
        if current is not None and now_us - current.active_us < SILENT_AFTER_US:
            raise ConflictError(
                "a scan of this source root is under way",
                hint="Wait for it to end; it is taken over if it stays silent for "
                f"{SILENT_AFTER_US // 1_000_000} seconds.",
            )
        scans[root_id] = claim = _Running(0, now_us)
    return claim


def _ignore_patterns(connection: duckdb.DuckDBPyConnection, root_id: int) -> list[str]:
    rows = connection.execute(
        "SELECT pattern FROM cf_ignore_rule "
        "WHERE active AND (source_root_id IS NULL OR source_root_id = $1) "
        "ORDER BY source_root_id NULLS FIRST, id",
        [root_id],
    ).fetchall()
    return [row[0] for row in rows]


def inventory(connection: duckdb.DuckDBPyConnection, root_id: int) -> bytes:
    """See `ControlApi.inventory`.

    Args:
        connection: any connection to the ledger, such as a reader's.
    """
    table = connection.execute(
        """
        SELECT rel_path, id AS location_id, coalesce(current_version_id, 0) AS version_id,
               dev, ino, size, mtime_ns, ctime_ns, hashed_at_us
        FROM cf_file_location WHERE source_root_id = $1 AND deleted_at IS NULL
        """,
        [root_id],
    ).to_arrow_table()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def record_chunk(
    ledger: Ledger, root_id: int, scan_id: int, findings: Sequence[FileFinding], *, now_us: int
) -> tuple[ChunkResult, list[Job]]:
    """See `ControlApi.commit_chunk`; also returns the new jobs for the broker.

    Raises:
        UsageError, LedgerUnavailableError: as `chunks.commit_chunk`; nothing is recorded.
    """
    _stay_alive(ledger, root_id, scan_id, now_us)
    return commit_chunk(ledger, root_id, findings, now_us=now_us)


def finish_scan(
    ledger: Ledger,
    root_id: int,
    scan_id: int,
    deleted: Sequence[str],
    report: ScanReport,
    *,
    now_us: int,
) -> tuple[None, list[Job]]:
    """See `ControlApi.finish_scan`; returns the jobs that can be tried again.

    A job that was skipped because its file was missing or changed gets a successor once the file
    was read again and still has this version's bytes.
    """
    for path in deleted:
        check_rel_path(path)
    with _guard:
        current = _running.get(ledger, {}).get(root_id)
        valid = current is not None and current.scan_id == scan_id
    ledger.fold()
    with ledger.transaction() as connection:
        if valid:
            _mark_deleted(connection, root_id, deleted, now_us)
            if report.st_dev:
                connection.execute(
                    "UPDATE cf_source_root SET st_dev = $2 "
                    "WHERE id = $1 AND st_dev IS DISTINCT FROM $2",
                    [root_id, report.st_dev],
                )
        _record_report(connection, scan_id, root_id, report, now_us)
        jobs = enqueue(ledger, connection, _to_repeat(connection, root_id), now_us)
    if valid and current is not None:
        _forget(ledger, root_id, current)
    return None, jobs


def _mark_deleted(
    connection: duckdb.DuckDBPyConnection, root_id: int, deleted: Sequence[str], now_us: int
) -> None:
    if deleted:
        connection.execute(
            "UPDATE cf_file_location SET deleted_at = make_timestamp($3) "
            "WHERE source_root_id = $1 AND deleted_at IS NULL "
            "AND rel_path IN (SELECT unnest($2::VARCHAR[]))",
            [root_id, list(deleted), now_us],
        )


def _record_report(
    connection: duckdb.DuckDBPyConnection,
    scan_id: int,
    root_id: int,
    report: ScanReport,
    now_us: int,
) -> None:
    row = asdict(report)
    row["problems"] = [str(line)[:2_000] for line in report.problems[:PROBLEMS_KEPT]]
    connection.execute(
        f"UPDATE {_SCAN} SET finished_at = make_timestamp($2), complete = $3, report_json = $4 "
        "WHERE id = $1 AND source_root_id = $5",
        [scan_id, now_us, report.complete, msgspec.json.encode(row).decode(), root_id],
    )
    connection.execute(
        f"DELETE FROM {_SCAN} WHERE source_root_id = $1 AND id <= ("
        f"SELECT id FROM {_SCAN} WHERE source_root_id = $1 ORDER BY id DESC LIMIT 1 OFFSET $2)",
        [root_id, SCANS_KEPT],
    )


def _to_repeat(connection: duckdb.DuckDBPyConnection, root_id: int) -> list[Wanted]:
    """Skipped jobs whose bytes turned out to be there.

    Either the file was read after the job was skipped, or it was renamed while the job, still
    knowing the old path, waited.
    """
    rows = connection.execute(
        f"""
        WITH skipped AS (
            SELECT * FROM {QUEUE_TABLE} WHERE status = 'SKIPPED' AND reason IN ($2, $3)
        )
        SELECT s.id, s.file_version_id, s.plugin_name, max(m.id), s.priority, s.generation
        FROM skipped s
        JOIN cf_file_version v ON v.id = s.file_version_id
        JOIN cf_file_location l ON l.id = v.location_id AND l.current_version_id = v.id
        JOIN cf_plugin_manifest m ON m.plugin_name = s.plugin_name AND m.status = 'ACTIVE'
        WHERE l.source_root_id = $1 AND l.deleted_at IS NULL
          AND (l.hashed_at_us > epoch_us(s.end_time)
               OR (l.renamed_from IS NOT NULL AND l.hashed_at_us > epoch_us(s.created_at)))
          AND NOT EXISTS (
              SELECT 1 FROM {QUEUE_TABLE} q
              WHERE q.file_version_id = s.file_version_id AND q.plugin_name = s.plugin_name
                AND q.id > s.id)
        GROUP BY ALL ORDER BY s.id
        """,
        [root_id, *_GONE],
    ).fetchall()
    return [
        Wanted(version, Match(plugin, manifest, priority), generation, job_id)
        for job_id, version, plugin, manifest, priority, generation in rows
    ]


def _stay_alive(ledger: Ledger, root_id: int, scan_id: int, now_us: int) -> None:
    with _guard:
        current = _running.get(ledger, {}).get(root_id)
        if current is not None and current.scan_id == scan_id:
            current.active_us = now_us


def _forget(ledger: Ledger, root_id: int, claim: _Running) -> None:
    with _guard:
        scans = _running.get(ledger, {})
        if scans.get(root_id) is claim:
            del scans[root_id]


__all__ = [
    "CHUNK_FILES_MAX",
    "begin_scan",
    "finish_scan",
    "inventory",
    "record_chunk",
]
