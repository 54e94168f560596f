"""How much there is to do for each plugin version."""

import duckdb

from casparian_flow.db.queries import rows
from casparian_flow.sentinel.api import Row


def workload(connection: duckdb.DuckDBPyConnection) -> list[Row]:
    """{plugin_id, plugin_name, version, artifact_hash, status, queued, under_way, failed} of every
    version that is active, staged, or has jobs under way.

    Jobs that wait belong to the plugin: they are told with its active version, or else with the
    first staged one.
    """
    return rows(connection, _WORKLOAD)


_WORKLOAD = """
    WITH queue AS (
        SELECT plugin_name, plugin_manifest_id AS id, status, count(*) AS jobs
        FROM cf_processing_queue
        WHERE status IN ('QUEUED', 'DISPATCHING', 'RUNNING', 'STAGED')
        GROUP BY ALL
    ), waiting AS (
        SELECT plugin_name, sum(jobs)::BIGINT AS jobs FROM queue
        WHERE status = 'QUEUED' GROUP BY plugin_name
    ), under_way AS (
        SELECT id, sum(jobs)::BIGINT AS jobs FROM queue WHERE status <> 'QUEUED' GROUP BY id
    ), failed AS (
        SELECT q.plugin_manifest_id AS id, count(*) AS jobs
        FROM cf_dead_letter d JOIN cf_processing_queue q ON q.id = d.original_job_id
        WHERE d.replayed_as IS NULL GROUP BY 1
    ), versions AS (
        SELECT m.id, m.plugin_name, m.version, m.artifact_hash, m.status,
               row_number() OVER (
                   PARTITION BY m.plugin_name ORDER BY
                   CASE m.status WHEN 'ACTIVE' THEN 0 WHEN 'STAGING' THEN 1 ELSE 2 END, m.id
               ) = 1 AS next
        FROM cf_plugin_manifest m
        WHERE m.status IN ('ACTIVE', 'STAGING', 'SUPERSEDED')
    )
    SELECT v.id AS plugin_id, v.plugin_name, v.version, v.artifact_hash, v.status,
           CASE WHEN v.next AND v.status <> 'SUPERSEDED' THEN coalesce(w.jobs, 0) ELSE 0 END
               AS queued,
           coalesce(u.jobs, 0) AS under_way, coalesce(f.jobs, 0) AS failed
    FROM versions v
    LEFT JOIN waiting w ON w.plugin_name = v.plugin_name
    LEFT JOIN under_way u ON u.id = v.id
    LEFT JOIN failed f ON f.id = v.id
    WHERE v.status <> 'SUPERSEDED' OR u.jobs > 0
    ORDER BY v.plugin_name, v.id
"""


def workload_of_roots(connection: duckdb.DuckDBPyConnection) -> list[Row]:
    """{root_id, versions, queued, last_scan_seconds} of every source root: file versions known,
    jobs that wait for one of its files, and how long its last scan took, None without one."""
    return rows(connection, _ROOTS)


_ROOTS = """
    WITH versions AS (
        SELECT l.source_root_id AS root, count(*) AS n
        FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id GROUP BY 1
    ), waiting AS (
        SELECT l.source_root_id AS root, count(*) AS n
        FROM cf_processing_queue q
        JOIN cf_file_version v ON v.id = q.file_version_id
        JOIN cf_file_location l ON l.id = v.location_id
        WHERE q.status = 'QUEUED' GROUP BY 1
    ), scans AS (
        SELECT source_root_id AS root, epoch(max_by(finished_at - started_at, id)) AS seconds
        FROM cf_scan WHERE finished_at IS NOT NULL GROUP BY 1
    )
    SELECT r.id AS root_id, coalesce(v.n, 0) AS versions, coalesce(w.n, 0) AS queued,
           s.seconds AS last_scan_seconds
    FROM cf_source_root r
    LEFT JOIN versions v ON v.root = r.id
    LEFT JOIN waiting w ON w.root = r.id
    LEFT JOIN scans s ON s.root = r.id
    ORDER BY r.id
"""
