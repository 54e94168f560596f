"""What people ask of the ledger: jobs, their history and outputs, and why nothing happens.

Each function takes a connection of `Ledger.reader` (fold first) and returns plain rows: dicts by
column name, times as ISO 8601 text in UTC.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import duckdb
import msgspec

from casparian_flow.db.journal import OUTPUT_STATES, Folded
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.domain.jobs import JobStatus

Row = dict[str, Any]
Connection = duckdb.DuckDBPyConnection
LIMIT_MAX = 100_000
"""Rows that one call returns at most; further ones by offset."""

_FILE_JOINS = """
    LEFT JOIN cf_file_version v ON v.id = q.file_version_id
    LEFT JOIN cf_file_location l ON l.id = v.location_id
    LEFT JOIN cf_source_root r ON r.id = l.source_root_id
"""


def rows(connection: Connection, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
    """The rows of one SELECT."""
    cursor = connection.execute(sql, list(parameters))
    names = [column[0] for column in cursor.description or ()]
    return [
        {name: _plain(value) for name, value in zip(names, row, strict=True)}
        for row in cursor.fetchall()
    ]


def _plain(value: Any) -> Any:
    return f"{value.isoformat()}Z" if isinstance(value, datetime) else value


def list_jobs(
    connection: Connection,
    *,
    status: str | None,
    plugin: str | None,
    path: str | None,
    limit: int,
    offset: int,
) -> list[Row]:
    """Jobs, newest first, with `rel_path` and `source_root`.

    Args:
        path: glob over the path relative to its root, or over the absolute path.

    Raises:
        UsageError: an unknown status, or bounds out of range.
    """
    _check_bounds(limit, offset)
    conditions, parameters = ["true"], list[Any]()
    if status is not None:
        if status not in set(JobStatus):
            raise UsageError(
                f"unknown status {status!r}", hint="Use one of " + ", ".join(JobStatus) + "."
            )
        conditions.append("q.status = ?")
        parameters.append(status)
    if plugin is not None:
        conditions.append("q.plugin_name = ?")
        parameters.append(plugin)
    where, cut = " AND ".join(conditions), f"ORDER BY q.id DESC LIMIT {limit:d} OFFSET {offset:d}"
    if path is None:
        # Cutting before the joins keeps a page cheap however long the queue is.
        queue, tail = (
            f"(SELECT * FROM cf_processing_queue q WHERE {where} {cut})",
            "ORDER BY q.id DESC",
        )
    else:
        queue, tail = "cf_processing_queue", f"WHERE {where} AND {_PATH_MATCHES} {cut}"
        parameters += [path, path]
    return rows(
        connection,
        f"SELECT q.*, l.rel_path, r.path AS source_root FROM {queue} q {_FILE_JOINS} {tail}",
        parameters,
    )


_PATH_MATCHES = "(l.rel_path GLOB ? OR (r.path || '/' || l.rel_path) GLOB ?)"


def _check_bounds(limit: int, offset: int = 0) -> None:
    if not 1 <= limit <= LIMIT_MAX or not 0 <= offset < 2**62:
        raise UsageError(f"limit must be 1 to {LIMIT_MAX}, offset not negative")


def show_job(connection: Connection, job_id: int, unfolded: Folded | None = None) -> Row:
    """One job with its file, `history` (oldest first) and `outputs`.

    Args:
        unfolded: what the journal says of it beyond the table.

    Raises:
        NotFoundError: no such job.
    """
    job = _one(connection, "SELECT * FROM cf_processing_queue WHERE id = ?", job_id)
    if not job:
        raise no_job(job_id)
    if unfolded is not None:
        job.update((name, _plain(value)) for name, value in unfolded.row().items())
    # Lookups by key, one table at a time: planning their join takes DuckDB longer than all of them.
    version = _one(
        connection,
        "SELECT location_id, seq AS version_seq, content_hash, size_bytes "
        "FROM cf_file_version WHERE id = ?",
        job["file_version_id"],
    )
    place = _one(
        connection,
        "SELECT rel_path, source_root_id FROM cf_file_location WHERE id = ?",
        version.get("location_id"),
    )
    root = _one(
        connection,
        "SELECT path AS source_root FROM cf_source_root WHERE id = ?",
        place.pop("source_root_id", None),
    )
    release = _one(
        connection,
        "SELECT version AS plugin_version FROM cf_plugin_manifest WHERE id = ?",
        job["plugin_manifest_id"],
    )
    job |= dict.fromkeys(_OF_ITS_FILE) | version | place | root | release
    job["history"] = _history(connection, job_id)
    job["outputs"] = rows(
        connection,
        """
        SELECT n, topic, kind, state, mode, sink_uri AS uri, root_id, stage, final, "rows", bytes,
               sha256, output_key, granted_at
        FROM cf_output WHERE job_id = ? ORDER BY n
        """,
        [job_id],
    )
    state = OUTPUT_STATES.get(unfolded.status) if unfolded is not None else None
    for output in job["outputs"]:
        if state and output["state"] == "GRANTED":
            output["state"] = state
    return job


_OF_ITS_FILE = (
    "rel_path", "source_root", "location_id", "version_seq", "content_hash", "size_bytes",
    "plugin_version",
)  # fmt: skip


def _one(connection: Connection, sql: str, key: int | None) -> Row:
    """The row with a key; empty if there is none."""
    return next(iter(rows(connection, sql, [key])), {})


def _history(connection: Connection, job_id: int) -> list[Row]:
    entries = rows(
        connection,
        "SELECT seq, kind, attempt, make_timestamp(at_us) AS at, data FROM cf_journal "
        "WHERE job_id = ? ORDER BY seq",
        [job_id],
    )
    for entry in entries:
        entry["data"] = msgspec.json.decode(entry["data"]) if entry["data"] else {}
    return entries


def no_job(job_id: int) -> NotFoundError:
    return NotFoundError(f"no job {job_id}", hint="'casparian jobs' lists them.")


def job_log(connection: Connection, job_id: int) -> list[Row]:
    """{attempt, log} of each attempt that said something.

    Raises:
        NotFoundError: no such job.
    """
    if not rows(connection, "SELECT 1 FROM cf_processing_queue WHERE id = ?", [job_id]):
        raise no_job(job_id)
    return rows(
        connection,
        "SELECT attempt, log FROM cf_job_log WHERE job_id = ? ORDER BY attempt",
        [job_id],
    )


def list_dead_letters(connection: Connection, *, plugin: str | None, limit: int) -> list[Row]:
    """Dead letters not replayed yet, newest first."""
    _check_bounds(limit)
    return rows(
        connection,
        f"""
        SELECT d.original_job_id AS job_id, d.file_version_id, d.plugin_name, l.rel_path,
               r.path AS source_root, d.reason, d.error_message, d.retry_count, d.moved_at,
               d.moved_at AS created_at
        FROM cf_dead_letter d JOIN cf_processing_queue q ON q.id = d.original_job_id {_FILE_JOINS}
        WHERE d.replayed_as IS NULL AND (?::VARCHAR IS NULL OR d.plugin_name = ?)
        ORDER BY d.original_job_id DESC LIMIT {limit:d}
        """,
        [plugin, plugin],
    )


def standing(connection: Connection, now_us: int) -> Row:
    """The facts behind `status`' causes that only the ledger knows (sentinel/causes.py)."""
    (totals,) = rows(
        connection,
        """
        SELECT (SELECT count(*) FROM cf_source_root WHERE active = 1) AS sources,
               (SELECT count(*) FROM cf_file_location WHERE deleted_at IS NULL) AS files,
               (SELECT count(*) FROM cf_scan WHERE finished_at IS NOT NULL) AS scans,
               (SELECT count(*) FROM cf_dead_letter WHERE replayed_as IS NULL) AS dead_letters
        """,
    )
    totals["plugins"] = rows(connection, _PLUGIN_STANDING, [now_us])
    totals["staged"] = rows(
        connection,
        "SELECT plugin_name, version FROM cf_plugin_manifest WHERE status = 'STAGING' ORDER BY id",
    )
    totals["rejected"] = rows(
        connection,
        """
        SELECT plugin_name, version, validation_error FROM cf_plugin_manifest m
        WHERE status = 'REJECTED' AND NOT EXISTS (
            SELECT 1 FROM cf_plugin_manifest n
            WHERE n.plugin_name = m.plugin_name AND n.status IN ('ACTIVE', 'STAGING')
                AND n.id > m.id)
        ORDER BY id
        """,
    )
    totals["last_failure"] = rows(
        connection,
        """
        SELECT original_job_id AS job_id, plugin_name, reason, error_message FROM cf_dead_letter
        WHERE replayed_as IS NULL ORDER BY original_job_id DESC LIMIT 1
        """,
    )
    return totals


_PLUGIN_STANDING = """
    WITH jobs AS (
        SELECT plugin_name, count(*) AS jobs,
               count(*) FILTER (status = 'QUEUED') AS queued,
               count(*) FILTER (status = 'QUEUED' AND scheduled_at > make_timestamp($1)) AS delayed,
               count(*) FILTER (status = 'COMPLETED') AS completed,
               any_value(id) FILTER (status = 'COMPLETED') AS a_completed_job
        FROM cf_processing_queue GROUP BY plugin_name
    ), outputs AS (
        SELECT q.plugin_name, count(*) AS outputs
        FROM cf_output o JOIN cf_processing_queue q ON q.id = o.job_id GROUP BY q.plugin_name
    ), active AS (
        SELECT plugin_name, any_value(version) FILTER (status = 'ACTIVE') AS version
        FROM cf_plugin_manifest WHERE status IN ('ACTIVE', 'STAGING') GROUP BY plugin_name
    ), topics AS (
        SELECT plugin_name, list(uri ORDER BY topic_name) AS uris
        FROM cf_topic_config GROUP BY plugin_name
    )
    SELECT name AS plugin_name, active.version, active.plugin_name IS NOT NULL AS wired,
           coalesce(jobs, 0) AS jobs,
           coalesce(queued, 0) AS queued, coalesce(delayed, 0) AS delayed,
           coalesce(completed, 0) AS completed, a_completed_job, coalesce(outputs, 0) AS outputs,
           coalesce(uris, []) AS uris, coalesce(h.paused, false) AS paused,
           coalesce(h.reason, '') AS pause_reason
    FROM (SELECT plugin_name AS name FROM active UNION SELECT plugin_name FROM jobs) names
    LEFT JOIN jobs ON jobs.plugin_name = name
    LEFT JOIN outputs ON outputs.plugin_name = name
    LEFT JOIN active ON active.plugin_name = name
    LEFT JOIN topics ON topics.plugin_name = name
    LEFT JOIN cf_plugin_health h ON h.plugin_name = name
    ORDER BY name
"""
