"""Rules between tables that no constraint can hold, each as one query for its violations."""

from typing import Final

import duckdb

RULES: Final[tuple[tuple[str, str], ...]] = (
    (
        "location {} belongs to source root {}, which does not exist",
        """SELECT l.id, l.source_root_id FROM cf_file_location l
           WHERE NOT EXISTS (SELECT 1 FROM cf_source_root r WHERE r.id = l.source_root_id)""",
    ),
    (
        "location {} points to version {}, which does not exist or is of another location",
        """SELECT l.id, l.current_version_id FROM cf_file_location l
           WHERE l.current_version_id IS NOT NULL AND NOT EXISTS (
             SELECT 1 FROM cf_file_version v
             WHERE v.id = l.current_version_id AND v.location_id = l.id)""",
    ),
    (
        "location {} does not point to its newest version {}",
        """SELECT l.id, n.id FROM cf_file_location l JOIN (
             SELECT location_id, arg_max(id, seq) AS id FROM cf_file_version GROUP BY location_id
           ) n ON n.location_id = l.id
           WHERE l.current_version_id IS DISTINCT FROM n.id""",
    ),
    (
        "version {} belongs to location {}, which does not exist",
        """SELECT v.id, v.location_id FROM cf_file_version v
           WHERE NOT EXISTS (SELECT 1 FROM cf_file_location l WHERE l.id = v.location_id)""",
    ),
    (
        "location {} has versions {} to {}, but only {} of them",
        """SELECT location_id, min(seq), max(seq), count(*) FROM cf_file_version
           GROUP BY location_id HAVING max(seq) - min(seq) + 1 <> count(*)""",
    ),
    (
        "version {} has content {}, which is not in the registry",
        """SELECT v.id, v.content_hash FROM cf_file_version v WHERE NOT EXISTS (
             SELECT 1 FROM cf_file_hash_registry h WHERE h.content_hash = v.content_hash)""",
    ),
    (
        "tag {1} is on location {0}, which does not exist",
        """SELECT t.file_id, t.tag FROM cf_file_tag t
           WHERE NOT EXISTS (SELECT 1 FROM cf_file_location l WHERE l.id = t.file_id)""",
    ),
    (
        "job {} is for version {}, which does not exist",
        """SELECT q.id, q.file_version_id FROM cf_processing_queue q
           WHERE q.file_version_id IS NOT NULL
             AND NOT EXISTS (SELECT 1 FROM cf_file_version v WHERE v.id = q.file_version_id)""",
    ),
    (
        "job {} repeats job {}, which does not exist",
        """SELECT q.id, q.retry_of FROM cf_processing_queue q WHERE q.retry_of IS NOT NULL
             AND NOT EXISTS (SELECT 1 FROM cf_processing_queue o WHERE o.id = q.retry_of)""",
    ),
    (
        "job {} is {}, but its journal ends with {}",
        """SELECT q.id, q.status, j.kind FROM cf_processing_queue q JOIN (
             SELECT job_id, arg_max(kind, seq) AS kind FROM cf_journal GROUP BY job_id
           ) j ON j.job_id = q.id
           WHERE q.status <> CASE j.kind
             WHEN 'LEASED' THEN 'DISPATCHING' WHEN 'STARTED' THEN 'RUNNING'
             WHEN 'RETURNED' THEN 'QUEUED' WHEN 'RETRIED' THEN 'QUEUED'
             WHEN 'RELEASED' THEN 'QUEUED' WHEN 'GRANTED' THEN 'STAGED' ELSE j.kind END""",
    ),
    (
        "job {} is {}, but has no journal",
        """SELECT q.id, q.status FROM cf_processing_queue q
           WHERE q.status NOT IN ('PENDING', 'QUEUED')
             AND NOT EXISTS (SELECT 1 FROM cf_journal j WHERE j.job_id = q.id)""",
    ),
    (
        "the journal tells of job {}, which does not exist",
        """SELECT DISTINCT j.job_id FROM cf_journal j
           WHERE NOT EXISTS (SELECT 1 FROM cf_processing_queue q WHERE q.id = j.job_id)""",
    ),
    (
        "journal entry {} is there {} times",
        "SELECT seq, count(*) FROM cf_journal GROUP BY seq HAVING count(*) > 1",
    ),
    (
        "job {} was granted {} times",
        """SELECT job_id, count(*) FROM cf_journal WHERE kind = 'GRANTED'
           GROUP BY job_id HAVING count(*) > 1""",
    ),
    (
        "output {} is of job {}, which does not exist",
        """SELECT o.output_key, o.job_id FROM cf_output o
           WHERE NOT EXISTS (SELECT 1 FROM cf_processing_queue q WHERE q.id = o.job_id)""",
    ),
    (
        "output {} is {}, but its job {} is {}",
        """SELECT o.output_key, o.state, q.id, q.status
           FROM cf_output o JOIN cf_processing_queue q ON q.id = o.job_id
           WHERE q.status <> CASE o.state WHEN 'GRANTED' THEN 'STAGED'
             WHEN 'PUBLISHED' THEN 'COMPLETED' ELSE 'FAILED' END""",
    ),
    (
        "job {} has outputs under {} tokens",
        """SELECT job_id, count(DISTINCT token) FROM cf_output
           GROUP BY job_id HAVING count(DISTINCT token) > 1""",
    ),
    (
        "job {} is STAGED without outputs",
        """SELECT q.id FROM cf_processing_queue q WHERE q.status = 'STAGED'
             AND NOT EXISTS (SELECT 1 FROM cf_output o WHERE o.job_id = q.id)""",
    ),
    (
        "slice {} points to output {}, which does not exist",
        """SELECT s.slice_key, s.output_key FROM cf_slice s WHERE NOT EXISTS (
             SELECT 1 FROM cf_output o
             WHERE o.output_key = s.output_key AND o.slice_key = s.slice_key)""",
    ),
    (
        "dead letter of job {}, which does not exist or is not FAILED",
        """SELECT d.original_job_id FROM cf_dead_letter d WHERE NOT EXISTS (
             SELECT 1 FROM cf_processing_queue q
             WHERE q.id = d.original_job_id AND q.status = 'FAILED')""",
    ),
    (
        "plugin {} has {} ACTIVE versions",
        """SELECT plugin_name, count(*) FROM cf_plugin_manifest WHERE status = 'ACTIVE'
           GROUP BY plugin_name HAVING count(*) > 1""",
    ),
    (
        "plugin version {} needs environment {}, which does not exist",
        """SELECT m.id, m.env_hash FROM cf_plugin_manifest m WHERE m.env_hash IS NOT NULL
             AND NOT EXISTS (SELECT 1 FROM cf_plugin_environment e WHERE e.hash = m.env_hash)""",
    ),
    (
        "API job {} has events {} to {} after {} removed ones, but only {} of them",
        """SELECT j.job_id, min(e.event_id), max(e.event_id), j.events_removed_to, count(*)
           FROM cf_api_jobs j JOIN cf_api_events e ON e.job_id = j.job_id
           GROUP BY j.job_id, j.events_removed_to
           HAVING min(e.event_id) <> j.events_removed_to + 1
             OR max(e.event_id) - min(e.event_id) + 1 <> count(*)""",
    ),
    (
        "event {} is of API job {}, which does not exist",
        """SELECT e.id, e.job_id FROM cf_api_events e
           WHERE NOT EXISTS (SELECT 1 FROM cf_api_jobs j WHERE j.job_id = e.job_id)""",
    ),
    (
        "API job {} stands for job {}, and one of them does not exist",
        """SELECT t.api_job_id, t.job_id FROM cf_api_tasks t
           WHERE NOT EXISTS (SELECT 1 FROM cf_api_jobs j WHERE j.job_id = t.api_job_id)
              OR NOT EXISTS (SELECT 1 FROM cf_processing_queue q WHERE q.id = t.job_id)""",
    ),
    (
        "a plan is of API job {}, which does not exist or has not begun",
        """SELECT p.api_job_id FROM cf_api_plans p WHERE NOT EXISTS (
             SELECT 1 FROM cf_api_jobs j WHERE j.job_id = p.api_job_id AND j.status <> 'queued')""",
    ),
    (
        "API job {} is {} and was ended at {}",
        """SELECT job_id, status, finished_at FROM cf_api_jobs
           WHERE (finished_at IS NULL) = (status IN ('completed', 'failed', 'cancelled'))""",
    ),
    (
        "approval {} has started {} API jobs",
        """SELECT approval_id, count(*) FROM cf_api_jobs WHERE approval_id IS NOT NULL
           GROUP BY approval_id HAVING count(*) > 1""",
    ),
    (
        "API job {} names approval {}, which is not its own",
        """SELECT j.job_id, j.approval_id FROM cf_api_jobs j
           WHERE j.approval_id IS NOT NULL AND NOT EXISTS (
             SELECT 1 FROM cf_api_approvals a
             WHERE a.approval_id = j.approval_id AND a.job_id = j.job_id)""",
    ),
    (
        "approval {} is {}, but has started API job {}",
        """SELECT approval_id, status, job_id FROM cf_api_approvals
           WHERE job_id IS NOT NULL AND status NOT IN ('approved', 'stale')""",
    ),
)
_LINES_MAX: Final = 20
"""Violations shown of one rule; the rest is counted."""


def violations(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """One line per broken rule and row, at most 20 a rule; empty when all is sound."""
    lines = []
    for text, sql in RULES:
        rows = connection.execute(f"SELECT * FROM ({sql}) ORDER BY ALL").fetchall()
        lines += [text.format(*row) for row in rows[:_LINES_MAX]]
        if len(rows) > _LINES_MAX:
            lines.append(f"… and {len(rows) - _LINES_MAX} more like the last line")
    return lines
