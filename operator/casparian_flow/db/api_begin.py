"""How an API job that the Sentinel carries out begins: from its plan to jobs of the queue.

    queued ─ begin ─> running, with the plan written down and the first slice of its jobs
                        └─ go_on, slice by slice ─> all jobs made, the plan deleted

Everything that was judged is written down in the transaction that makes the job `running`: the
file versions, the code, the sinks. What follows takes it from there, a bounded number of files a
transaction, so that a run over many files holds up nobody else's commits, and a restart goes on
where the last process was. All functions run in the ledger's thread.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import msgspec

from casparian_flow.db import api_approvals, api_jobs
from casparian_flow.db.api_runs import (
    MESSAGE_CHARS_MAX,
    PREVIEW_FILES,
    Plan,
    add_event,
    checked_spec,
    plan,
    set_progress,
)
from casparian_flow.db.api_state import Connection, Unit, rows
from casparian_flow.db.api_tables import JOBS, PLANS, TASKS
from casparian_flow.db.fanout import QUEUE_TABLE, Wanted, enqueue
from casparian_flow.db.group_commit import transaction_of
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.loading import encode_overrides, parse_overrides
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.jobs import TERMINAL, JobStatus
from casparian_flow.domain.outputs import SinkSpec, sinks_for
from casparian_flow.domain.records import Job
from casparian_flow.domain.wording import counted
from casparian_flow.protocol.http_types import (
    EventType,
    HttpJob,
    HttpJobStatus,
    HttpJobType,
    JobSpec,
    encode_payload,
)
from casparian_flow.services.routing import MANUAL_PRIORITY, Match

SLICE: Final = 500
"""Files in one transaction; bounds its time."""
PHASE: Final = "process"


class WrittenPlan(msgspec.Struct, frozen=True, dict=True):
    """What a job that has begun is to do: the code and the sinks that were judged, to the letter.

    Attributes:
        pin: the plugin's code.
        overrides: the sinks, as a job of the queue has them.
        given_sink: as of Plan.
        rehearsal: None for a run; else how many rows of a topic the task keeps.
        force: as of JobSpec.
    """

    plugin: str
    manifest_id: int
    pin: str
    overrides: str
    given_sink: bool
    rehearsal: int | None
    force: bool
    version_ids: list[int]

    @cached_property
    def sinks(self) -> tuple[SinkSpec, ...]:
        return parse_overrides(self.overrides)

    @property
    def match(self) -> Match:
        return Match(self.plugin, self.manifest_id, MANUAL_PRIORITY)


def begin(ledger: Ledger, clock: Clock, api_job_id: int) -> tuple[bool, list[Job]]:
    """Make a queued job running, with its first tasks, or let it fail or become stale.

    Returns:
        Whether it runs now, and the new jobs for the broker.
    """
    job = ledger.read(lambda connection: api_jobs.get_job(connection, api_job_id))
    if job is None or job.status is not HttpJobStatus.QUEUED:
        return False, []
    try:
        spec = checked_spec(job)
        planned = plan(
            ledger, job.plugin_name, job.plugin_version, job.input_dir, job.output_sink,
            _bounded(job, spec),
        )  # fmt: skip
    except CasparianError as error:
        with transaction_of(ledger, clock) as unit:
            _refuse(unit, job, error)
        return False, []
    written = _written(job, spec, planned)
    with transaction_of(ledger, clock, folded=True) as unit:
        if _is_stale(unit, job, planned):
            return False, []
        unit.change(
            f"INSERT INTO {PLANS} (api_job_id, plan_json) VALUES ($1, $2)",
            [api_job_id, encode_payload(written)],
        )
        api_jobs.update_status(unit, api_job_id, HttpJobStatus.RUNNING, None)
        add_event(unit, api_job_id, EventType.JobStarted())
        add_event(unit, api_job_id, EventType.Phase(PHASE))
        jobs = _next_slice(unit, api_job_id, written, first=0, done=0)
    return True, jobs


def unfinished(ledger: Ledger) -> list[int]:
    """Jobs of which not all tasks are made yet."""
    found = ledger.query(f"SELECT api_job_id FROM {PLANS} ORDER BY api_job_id", folded=False)
    return [int(row["api_job_id"]) for row in found]


def go_on(ledger: Ledger, clock: Clock, api_job_id: int) -> tuple[bool, list[Job]]:
    """Make the next slice of a job's tasks; none if it is over.

    Returns:
        Whether there are more to be made, and the new jobs for the broker.
    """
    with transaction_of(ledger, clock, folded=True) as unit:
        found = unit.look(
            f"SELECT p.plan_json, p.made, j.progress_items_done AS done FROM {PLANS} p "
            f"JOIN {JOBS} j ON j.job_id = p.api_job_id WHERE p.api_job_id = $1",
            [api_job_id],
        )
        if not found:
            return False, []
        (row,) = found
        if unit.head(api_job_id).status is not HttpJobStatus.RUNNING:
            _delete_plan(unit, api_job_id)
            return False, []
        written = msgspec.json.decode(row["plan_json"], type=WrittenPlan)
        jobs = _next_slice(unit, api_job_id, written, first=row["made"], done=row["done"])
    return row["made"] + SLICE < len(written.version_ids), jobs


def _next_slice(
    unit: Unit, api_job_id: int, written: WrittenPlan, *, first: int, done: int
) -> list[Job]:
    """The jobs of the files from `first` on, with the progress that they make."""
    versions = written.version_ids[first : first + SLICE]
    connection = unit.connection_for_change()
    if written.rehearsal is None:
        wanted, adopted = _run_jobs(connection, written, versions)
    else:
        wanted, adopted = _rehearsals(written, versions), []
    jobs = enqueue(unit.ledger, connection, wanted, unit.now_us())
    _write_tasks(connection, api_job_id, [int(j.job_id) for j in jobs], own=True)
    _write_tasks(connection, api_job_id, adopted, own=False)
    before = len(versions) - len(jobs) - len(adopted)
    total = len(written.version_ids)
    if before or not first:
        message = f"{counted(before, 'file')} done before" if before else None
        add_event(unit, api_job_id, EventType.Progress(done + before, total, message))
        set_progress(unit, api_job_id, PHASE, done + before, total)
    if first + SLICE < total:
        unit.change(
            f"UPDATE {PLANS} SET made = $1 WHERE api_job_id = $2", [first + SLICE, api_job_id]
        )
    else:
        _delete_plan(unit, api_job_id)
    return jobs


def _delete_plan(unit: Unit, api_job_id: int) -> None:
    unit.change(f"DELETE FROM {PLANS} WHERE api_job_id = $1", [api_job_id])


def _written(job: HttpJob, spec: JobSpec, planned: Plan) -> WrittenPlan:
    rehearsal = None
    if job.job_type is not HttpJobType.RUN:
        rehearsal = spec.rows_max if job.job_type is HttpJobType.PREVIEW else 0
    return WrittenPlan(
        plugin=planned.spec.plugin,
        manifest_id=int(planned.spec.manifest_id),
        pin=planned.spec.code,
        overrides=encode_overrides(planned.sinks),
        given_sink=planned.given_sink,
        rehearsal=rehearsal,
        force=spec.force,
        version_ids=[file.version_id for file in planned.files],
    )


def _bounded(job: HttpJob, spec: JobSpec) -> JobSpec:
    if job.job_type is not HttpJobType.PREVIEW or spec.files_max or spec.files:
        return spec
    return msgspec.structs.replace(spec, files_max=PREVIEW_FILES)


def _refuse(unit: Unit, job: HttpJob, error: CasparianError) -> None:
    """What was asked for cannot be done any more; an approval of it is void with it."""
    if job.approval_id is None or not api_approvals.mark_stale(unit, job.approval_id, [str(error)]):
        told = error.with_hint()[:MESSAGE_CHARS_MAX]
        api_jobs.finish_job(unit, job.job_id, HttpJobStatus.FAILED, told, None)


def _is_stale(unit: Unit, job: HttpJob, planned: Plan) -> bool:
    if job.approval_id is None:
        return False
    approval = api_approvals.find(unit, job.approval_id)
    if approval is None or approval.binding is None:
        return False
    changes = approval.binding.changes(planned.binding)
    return bool(changes) and api_approvals.mark_stale(unit, job.approval_id, changes)


def _rehearsals(written: WrittenPlan, versions: Sequence[int]) -> list[Wanted]:
    overrides = written.overrides if written.given_sink else ""
    return [
        Wanted(
            version_id, written.match, overrides=overrides, pin=written.pin,
            rehearsal=written.rehearsal,
        )
        for version_id in versions
    ]  # fmt: skip


def _run_jobs(
    connection: Connection, written: WrittenPlan, versions: Sequence[int]
) -> tuple[list[Wanted], list[int]]:
    """The jobs to be made, and live ones that do the same already. Files that this plugin version
    has done for these sinks are in neither."""
    earlier = _earlier(connection, written.plugin, versions)
    outputs = _outputs(connection, [int(r["id"]) for jobs in earlier.values() for r in jobs])
    wanted, adopted = [], []
    for version_id in versions:
        jobs = earlier.get(version_id, [])
        live = next((r for r in jobs if _does_the_same(r, written)), None)
        if written.force:
            generation = max((r["generation"] for r in jobs), default=-1) + 1
        elif live is not None:
            adopted.append(int(live["id"]))
            continue
        elif any(_is_done(r, written, outputs.get(int(r["id"]), {})) for r in jobs):
            continue
        else:
            # Outputs that were granted and given up keep their keys.
            spent = [r["generation"] for r in jobs if int(r["id"]) in outputs and _gave_up(r)]
            generation = max(spent, default=-1) + 1
        wanted.append(
            Wanted(
                version_id, written.match, generation, overrides=written.overrides, pin=written.pin
            )
        )
    return wanted, adopted


def _earlier(
    connection: Connection, plugin: str, versions: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    found = rows(
        connection,
        f"""
        SELECT id, file_version_id, status, generation, plugin_manifest_id, config_overrides, pin
        FROM {QUEUE_TABLE}
        WHERE plugin_name = $1 AND rehearsal IS NULL
          AND file_version_id IN (SELECT unnest($2::BIGINT[])) ORDER BY id
        """,
        [plugin, list(versions)],
    )
    by_version: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        by_version[row["file_version_id"]].append(row)
    return by_version


def _outputs(connection: Connection, job_ids: Sequence[int]) -> dict[int, dict[str, set[str]]]:
    """Sink URIs of each job's good rows, by topic."""
    found: defaultdict[int, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for job_id, topic, uri in connection.execute(
        "SELECT job_id, topic, sink_uri FROM cf_output "
        "WHERE kind = 'output' AND job_id IN (SELECT unnest($1::BIGINT[]))",
        [list(job_ids)],
    ).fetchall():
        found[job_id][topic].add(uri)
    return {job_id: dict(topics) for job_id, topics in found.items()}


def _does_the_same(row: Mapping[str, Any], written: WrittenPlan) -> bool:
    if JobStatus(row["status"]) in TERMINAL:
        return False
    if row["config_overrides"] is None:
        return not written.given_sink
    return row["config_overrides"] == written.overrides and row["pin"] in {None, written.pin}


def _is_done(row: Mapping[str, Any], written: WrittenPlan, outputs: Mapping[str, set[str]]) -> bool:
    if row["status"] != JobStatus.COMPLETED:
        return False
    if row["plugin_manifest_id"] != written.manifest_id:
        return False
    return all(
        uris == {sink.uri for sink in sinks_for(topic, written.sinks)}
        for topic, uris in outputs.items()
    )


def _gave_up(row: Mapping[str, Any]) -> bool:
    return str(row["status"]) == JobStatus.FAILED


def _write_tasks(
    connection: Connection, api_job_id: int, job_ids: Sequence[int], *, own: bool
) -> None:
    if job_ids:
        connection.execute(
            f"INSERT INTO {TASKS} (api_job_id, job_id, own) SELECT $1, unnest($2::BIGINT[]), $3",
            [api_job_id, list(job_ids), own],
        )
