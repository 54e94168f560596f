"""Rules of API jobs and their events, as writes of a `Unit` and reads of a connection.

Terminal states are final: no function here changes a finished job. The one thing it may still
get is its job_finished event, once, if that tells its own status.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from casparian_flow.db.api_checks import ID_MAX, checked, checked_id, checked_limit, checked_word
from casparian_flow.db.api_state import (
    CheckedEvent,
    Connection,
    Head,
    Unit,
    checked_event,
    load_head,
    rows,
)
from casparian_flow.db.api_tables import APPROVALS, EVENTS, JOBS, job_of, values_of
from casparian_flow.domain.clock import utc
from casparian_flow.domain.errors import ConflictError, NotFoundError, UsageError
from casparian_flow.domain.ids import JobId
from casparian_flow.protocol.http_types import (
    HTTP_TRANSITIONS,
    ApprovalStatus,
    Event,
    EventType,
    HttpJob,
    HttpJobStatus,
    HttpJobType,
    JobProgress,
    JobResult,
    decode_event,
)

CANCELLED_BY_USER: Final = "Cancelled by user"


# -- jobs -----------------------------------------------------------------------------------------


def new_job(
    job_type: HttpJobType | str,
    plugin_name: str,
    plugin_version: str | None,
    input_dir: str,
    output_sink: str | None,
    approval_id: str | None,
    spec_json: str | None,
) -> HttpJob:
    """A job that is about to be created; its id and time are not set yet.

    Raises:
        UsageError: a value does not fit.
    """
    return checked(
        HttpJob(
            job_id=0,
            job_type=checked_word(HttpJobType, job_type),
            status=HttpJobStatus.QUEUED,
            plugin_name=plugin_name,
            plugin_version=plugin_version,
            input_dir=input_dir,
            output_sink=output_sink,
            approval_id=approval_id,
            created_at=datetime(1970, 1, 1, tzinfo=UTC),
            spec_json=spec_json,
        )
    )


def create_job(unit: Unit, job: HttpJob) -> JobId:
    """Insert a job as queued; an approval that it names is linked with it.

    Raises:
        NotFoundError: there is no such approval.
        ConflictError: it is not approved, or has started a job already.
    """
    if job.approval_id is not None:
        _require_free(unit, job.approval_id)
    job_id = JobId(unit.ledger.next_id(JOBS))
    unit.change(
        f"""
        INSERT INTO {JOBS} (job_id, job_type, status, plugin_name, plugin_version, input_dir,
            output_sink, approval_id, created_at, spec_json)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        """,
        [
            job_id, job.job_type, job.status, job.plugin_name, job.plugin_version, job.input_dir,
            job.output_sink, job.approval_id, utc(unit.now_us()), job.spec_json,
        ],
    )  # fmt: skip
    if job.approval_id is not None:
        unit.change(
            f"UPDATE {APPROVALS} SET job_id = $1 WHERE approval_id = $2", [job_id, job.approval_id]
        )
    return job_id


def _require_free(unit: Unit, approval_id: str) -> None:
    found = unit.look(
        f"SELECT status, job_id FROM {APPROVALS} WHERE approval_id = $1", [approval_id]
    )
    if not found:
        raise no_approval(approval_id)
    status, job_id = found[0]["status"], found[0]["job_id"]
    if status != ApprovalStatus.APPROVED:
        raise ConflictError(
            f"approval {approval_id} is {status}, not approved",
            hint="A person decides: 'casparian mcp list' shows what waits.",
        )
    if job_id is not None:
        raise ConflictError(
            f"approval {approval_id} has started job {job_id} already",
            hint="One approval starts one job; ask for another approval.",
        )


def no_approval(approval_id: str) -> NotFoundError:
    return NotFoundError(
        f"there is no approval {approval_id[:80]}", hint="'casparian mcp list' shows them."
    )


def update_status(
    unit: Unit, job_id: int, status: HttpJobStatus, error_message: str | None
) -> bool:
    """Move a job on. False, and nothing changed, if it is finished already.

    Raises:
        NotFoundError: there is no such job.
        ConflictError: a move that there is none, such as from running back to queued.
    """
    head = unit.head(job_id)
    if head.status.is_terminal:
        return False
    if status is head.status:
        return True
    if status not in HTTP_TRANSITIONS[head.status]:
        raise ConflictError(f"API job {job_id} cannot go from {head.status} to {status}")
    _move(unit, job_id, head, status, error_message)
    return True


def _move(
    unit: Unit, job_id: int, head: Head, status: HttpJobStatus, error_message: str | None
) -> None:
    at = "started_at" if status is HttpJobStatus.RUNNING else "finished_at"
    unit.change(
        f"UPDATE {JOBS} SET status = $1, {at} = $2, error_message = $3 WHERE job_id = $4",
        [status, utc(unit.now_us()), error_message, job_id],
    )
    head.status = status
    unit.touched.add(job_id)


def finish_job(
    unit: Unit,
    job_id: int,
    status: HttpJobStatus,
    error_message: str | None,
    result: JobResult | None,
) -> bool:
    """End a job: its result, its status and its job_finished event, together.

    False, and nothing changed, if it is finished already.

    Raises:
        NotFoundError: there is no such job.
        UsageError: the status is none that ends a job.
    """
    if not status.is_terminal:
        raise UsageError(f"{status} does not end a job", hint="Use completed, failed or cancelled.")
    head = unit.head(job_id)
    if head.status.is_terminal:
        return False
    if result is not None:
        _set(unit, job_id, values_of("result", result))
    _move(unit, job_id, head, status, error_message)
    if head.told is not status:
        unit.add_event(job_id, checked_event(EventType.JobFinished(status, error_message)))
    return True


def cancel_job(unit: Unit, job_id: int) -> bool:
    """Cancel a job together with its job_finished event. False if it is missing or finished."""
    try:
        return finish_job(unit, job_id, HttpJobStatus.CANCELLED, CANCELLED_BY_USER, None)
    except NotFoundError:
        return False


def update_part(unit: Unit, job_id: int, field: str, part: JobProgress | JobResult) -> bool:
    """Set a job's progress or result. False, and nothing changed, if it is finished already.

    Raises:
        NotFoundError: there is no such job.
    """
    if unit.head(job_id).status.is_terminal:
        return False
    _set(unit, job_id, values_of(field, part))
    return True


def _set(unit: Unit, job_id: int, values: dict[str, Any]) -> None:
    names = ", ".join(f"{name} = ${n}" for n, name in enumerate(values, 2))
    unit.change(f"UPDATE {JOBS} SET {names} WHERE job_id = $1", [job_id, *values.values()])


def get_job(connection: Connection, job_id: int) -> HttpJob | None:
    found = rows(connection, f"SELECT * FROM {JOBS} WHERE job_id = $1", [checked_id(job_id)])
    return job_of(found[0]) if found else None


def list_jobs(
    connection: Connection, status: HttpJobStatus | None, limit: int, offset: int
) -> list[HttpJob]:
    """Jobs, newest first."""
    checked_limit(limit, offset)
    condition = "status = $1" if status else "$1 IS NULL"
    found = rows(
        connection,
        f"SELECT * FROM {JOBS} WHERE {condition} ORDER BY created_at DESC, job_id DESC "
        f"LIMIT {limit:d} OFFSET {offset:d}",
        [status],
    )
    return [job_of(row) for row in found]


# -- events ---------------------------------------------------------------------------------------


def insert_events(unit: Unit, job_id: int, events: Sequence[CheckedEvent]) -> list[int]:
    """Append events; returns their ids.

    Raises:
        NotFoundError: there is no such job.
        ConflictError: it is finished, and this is not the one event that says so.
    """
    head = unit.head(job_id)
    if head.status.is_terminal and events:
        last_word = len(events) == 1 and head.told is None and events[0].tells is head.status
        if not last_word:
            raise ConflictError(f"API job {job_id} is {head.status}: it gets no more events")
    return [unit.add_event(job_id, event) for event in events]


def next_event_id(connection: Connection, job_id: int) -> int:
    """Raises:
    NotFoundError: there is no such job.
    """
    return load_head(connection, checked_id(job_id)).last_event_id + 1


def list_events(connection: Connection, job_id: int, after: int, limit: int | None) -> list[Event]:
    """The events after `after`, in order, at most `limit` if given; empty for an unknown job."""
    if limit is not None:
        checked_limit(limit)
    page = _page(connection, checked_id(job_id), after, limit)
    if page and page[0].event_id == after + 1:
        return page
    removed = connection.execute(
        f"SELECT events_removed_to FROM {JOBS} WHERE job_id = $1", [job_id]
    ).fetchone()
    if removed is None or removed[0] <= after:
        return page
    return _page(connection, job_id, removed[0], limit)


def _page(connection: Connection, job_id: int, after: int, limit: int | None) -> list[Event]:
    """Ids have no gaps, so a page is a range of them: what lies outside is not even read."""
    last = ID_MAX if limit is None else min(after + limit, ID_MAX)
    found = connection.execute(
        f"""
        SELECT event_id, "timestamp", payload_json FROM {EVENTS}
        WHERE job_id = $1 AND event_id > $2 AND event_id <= $3
        """,
        [job_id, after, last],
    ).fetchall()
    # Sorting a page here is cheaper than the plan for it.
    return [
        Event(
            event_id=event_id,
            job_id=job_id,
            timestamp=at.replace(tzinfo=UTC),
            payload=decode_event(payload),
        )
        for event_id, at, payload in sorted(found)
    ]
