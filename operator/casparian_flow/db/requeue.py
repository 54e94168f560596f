"""New jobs for work that was done, or given up, before: submit, retry, replay.

A finished job stays as it is; its successor is a new row with `retry_of`. All functions run in
the ledger's thread and return the new jobs for the broker beside their result.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from casparian_flow.db.fanout import QUEUE_TABLE, Wanted, enqueue_one
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.loading import FileFacts, file_of, select_jobs
from casparian_flow.domain.errors import ConflictError, NotFoundError, UsageError
from casparian_flow.domain.ids import JobId, ManifestId, Token
from casparian_flow.domain.jobs import TERMINAL, JobStatus
from casparian_flow.domain.records import Job, NewJob
from casparian_flow.domain.scoped_names import namespace_of
from casparian_flow.services.routing import MANUAL_PRIORITY, Match

REPLAY_MAX = 10_000
"""Dead letters replayed in one go; repeat for more."""
_LIVE = ", ".join(f"'{status}'" for status in JobStatus if status not in TERMINAL)


def submit(
    ledger: Ledger, *, version_id: int, plugin: str, priority: int | None, force: bool, now_us: int
) -> tuple[int, list[Job]]:
    """One job for a file version and the plugin's active version.

    Args:
        priority: None for that of the version's last job.
        force: also if this plugin version has done it already; raises the generation, so that
            the result is published beside the earlier one.

    Raises:
        NotFoundError: no such version, or no active version of the plugin.
        UsageError: the file is another namespace's.
        ConflictError: a job for it is under way, or has completed, without `force`.
    """
    file = _file(ledger, version_id)
    _require_one_namespace(ledger, file, plugin)
    manifest_id = _active_manifest(ledger, plugin)
    earlier = _jobs_of(ledger, version_id, plugin)
    for row in earlier:
        status = JobStatus(row["status"])
        done = status is JobStatus.COMPLETED and row["plugin_manifest_id"] == manifest_id
        if not force and (done or status not in TERMINAL):
            raise ConflictError(
                f"job {row['id']} for file version {version_id} and plugin {plugin} is "
                f"{status.value}",
                hint="With --force it runs again beside that.",
            )
    generation = max((row["generation"] for row in earlier), default=-1) + 1 if force else 0
    if priority is None:
        priority = earlier[-1]["priority"] if earlier else MANUAL_PRIORITY
    wanted = Wanted(version_id, Match(plugin, manifest_id, priority), generation)
    with ledger.transaction(folded=False) as connection:
        job = enqueue_one(ledger, connection, wanted, file, now_us)
    return int(job.job_id), [job]


def _jobs_of(ledger: Ledger, version_id: int, plugin: str) -> list[dict[str, Any]]:
    sql = (
        f"SELECT id, status, generation, priority, plugin_manifest_id FROM {QUEUE_TABLE} "
        "WHERE file_version_id = $1 AND plugin_name = $2 AND rehearsal IS NULL ORDER BY id"
    )
    rows = ledger.query(sql, [version_id, plugin], folded=False)
    # Most often there is none, and nothing whose state would have to be current.
    return ledger.query(sql, [version_id, plugin]) if rows else rows


def retry(ledger: Ledger, job_id: int, now_us: int) -> tuple[int, list[Job]]:
    """A successor for one job that ended without success.

    Raises:
        NotFoundError: no such job.
        ConflictError: it has not ended, has completed, or has a live successor already.
    """
    rows = ledger.query(f"SELECT status FROM {QUEUE_TABLE} WHERE id = $1", [job_id])
    if not rows:
        raise NotFoundError(f"no job {job_id}", hint="'casparian jobs' lists them.")
    status = JobStatus(rows[0]["status"])
    if status not in TERMINAL:
        raise ConflictError(
            f"job {job_id} is {status.value}",
            hint=f"Wait until it ends, or run 'casparian job cancel {job_id}' first.",
        )
    if status is JobStatus.COMPLETED:
        raise ConflictError(
            f"job {job_id} has completed",
            hint="To do it again, run 'casparian job submit VERSION PLUGIN --force'.",
        )
    successors = _live_successors(ledger, [job_id])
    if successors:
        raise ConflictError(
            f"job {successors[job_id]} retries job {job_id} already", hint="Wait until it ends."
        )
    jobs = _succeed(ledger, [job_id], now_us)
    return int(jobs[0].job_id), jobs


def replay(
    ledger: Ledger, *, plugin: str | None, job_ids: Sequence[int], now_us: int
) -> tuple[list[int], list[Job]]:
    """Successors for dead letters: those given, or all (of one plugin), oldest first.

    Raises:
        NotFoundError: a given job is no dead letter.
        UsageError: too many job ids.
    """
    if len(job_ids) > REPLAY_MAX:
        raise UsageError(f"at most {REPLAY_MAX} dead letters at once, got {len(job_ids)}")
    rows = ledger.query(
        f"""
        SELECT original_job_id AS id FROM cf_dead_letter
        WHERE replayed_as IS NULL AND ($1::VARCHAR IS NULL OR plugin_name = $1)
          AND (len($2::BIGINT[]) = 0 OR list_contains($2::BIGINT[], original_job_id))
        ORDER BY id LIMIT {REPLAY_MAX}
        """,
        [plugin, list(job_ids)],
    )
    found = [int(row["id"]) for row in rows]
    missing = sorted(set(job_ids) - set(found))
    if missing:
        raise NotFoundError(
            f"job {missing[0]} is no dead letter, or was replayed",
            hint="'casparian dead-letters' lists them.",
        )
    live = _live_successors(ledger, found)
    jobs = _succeed(ledger, [job_id for job_id in found if job_id not in live], now_us)
    return [int(job.job_id) for job in jobs], jobs


def _file(ledger: Ledger, version_id: int) -> FileFacts:
    file = ledger.read(lambda connection: file_of(connection, version_id))
    if file is None:
        raise NotFoundError(
            f"no file version {version_id}", hint="'casparian versions PATH' lists them."
        )
    return file


def _require_one_namespace(ledger: Ledger, file: FileFacts, plugin: str) -> None:
    (row,) = ledger.query(
        "SELECT namespace FROM cf_source_root WHERE id = $1", [file.root_id], folded=False
    )
    if row["namespace"] != namespace_of(plugin):
        raise UsageError(
            f"file version {file.version_id} is none for plugin {plugin}: their namespaces differ",
            hint="A plugin reads the source roots of its own namespace only.",
        )


def _active_manifest(ledger: Ledger, plugin: str) -> ManifestId:
    (row,) = ledger.query(
        "SELECT max(id) AS id FROM cf_plugin_manifest WHERE plugin_name = $1 AND status = 'ACTIVE'",
        [plugin],
        folded=False,
    )
    if row["id"] is None:
        raise NotFoundError(
            f"no active version of plugin {plugin!r}", hint="'casparian plugins' lists them."
        )
    return ManifestId(row["id"])


def _live_successors(ledger: Ledger, job_ids: Sequence[int]) -> dict[int, int]:
    rows = ledger.query(
        f"SELECT retry_of, max(id) AS id FROM {QUEUE_TABLE} "
        f"WHERE retry_of IN (SELECT unnest($1::BIGINT[])) AND status IN ({_LIVE}) "
        "GROUP BY retry_of",
        [list(job_ids)],
    )
    return {int(row["retry_of"]): int(row["id"]) for row in rows}


def _succeed(ledger: Ledger, job_ids: Sequence[int], now_us: int) -> list[Job]:
    """Insert one QUEUED successor for each job, in one commit.

    Outputs that the old job was granted keep their keys, so its successor gets keys of its own by
    a higher generation.
    """
    if not job_ids:
        return []
    rows = ledger.query(
        f"""
        SELECT q.id, q.config_overrides, EXISTS (
                   SELECT 1 FROM cf_output o WHERE o.job_id = q.id) AS granted
        FROM {QUEUE_TABLE} q WHERE q.id IN (SELECT unnest($1::BIGINT[]))
        """,
        [list(job_ids)],
    )
    known = {int(row["id"]): row for row in rows}
    with ledger.transaction() as connection:
        olds = select_jobs(connection, "q.id IN (SELECT unnest($1::BIGINT[]))", [sorted(job_ids)])
        ids = ledger.next_ids(QUEUE_TABLE, len(olds))
    olds.sort(key=lambda job: job.job_id)
    new = [
        NewJob(
            replace(
                old,
                job_id=JobId(number),
                status=JobStatus.QUEUED,
                generation=old.generation + bool(known[old.job_id]["granted"]),
                attempt=0,
                retry_count=0,
                losses=0,
                token=Token(""),
                owner="",
                manifest_id=ManifestId(0),
                retry_of=old.job_id,
                manifest=(),
                not_before_us=0,
                created_us=now_us,
            ),
            known[old.job_id]["config_overrides"] or "",
        )
        for number, old in zip(ids, olds, strict=True)
    ]
    ledger.commit(new)
    return [item.job for item in new]
