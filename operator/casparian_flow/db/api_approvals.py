"""Rules of approvals, as writes of a `Unit` and reads of a connection.

A request is pending until a person approves or rejects it, until its time is over, or until what
was asked for has changed. Time is judged whenever it matters: the sweep that writes `expired`
down decides nothing. An approved request starts at most one job, because the job and the link
to it are made in one transaction.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from casparian_flow.db.api_checks import checked_limit
from casparian_flow.db.api_jobs import create_job, finish_job, new_job, no_approval
from casparian_flow.db.api_state import Connection, Unit, rows
from casparian_flow.db.api_tables import APPROVALS, JOBS
from casparian_flow.domain.clock import utc
from casparian_flow.domain.errors import ConflictError, NotFoundError, NotPermittedError, UsageError
from casparian_flow.domain.ids import JobId
from casparian_flow.protocol.http_types import (
    Approval,
    ApprovalBinding,
    ApprovalOperation,
    ApprovalStatus,
    HttpJobStatus,
    HttpJobType,
    OperationPayload,
    decode_operation,
    encode_payload,
)

_DECIDABLE: Final = f"status = '{ApprovalStatus.PENDING}' AND expires_at > $2"


def create_approval(
    unit: Unit,
    approval_id: str,
    operation: OperationPayload,
    summary: str,
    expires_in_us: int,
    requester: str | None,
    binding: ApprovalBinding | None,
) -> None:
    """Raises:
    ConflictError: the id is taken.
    UsageError: the time ends beyond what can be written down.
    """
    taken = unit.look(f"SELECT 1 FROM {APPROVALS} WHERE approval_id = $1", [approval_id])
    if taken:
        raise ConflictError(f"approval {approval_id[:80]} is there already")
    now_us = unit.now_us()
    try:
        expires_at = utc(now_us + expires_in_us)
    except OverflowError:
        raise UsageError("an approval cannot wait that long") from None
    unit.change(
        f"""
        INSERT INTO {APPROVALS} (approval_id, status, operation_type, operation_json, summary,
            created_at, expires_at, requester, binding_json, digest)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        """,
        [
            approval_id, ApprovalStatus.PENDING, operation.operation_type,
            encode_payload(operation), summary, utc(now_us), expires_at, requester,
            encode_payload(binding) if binding else None, binding.digest() if binding else None,
        ],
    )  # fmt: skip


def approve(
    unit: Unit,
    approval_id: str,
    decided_by: str | None,
    binding: ApprovalBinding | None,
    *,
    allow_self: bool,
) -> bool:
    """Approve a pending request. False if it is missing, decided, expired, or has become stale.

    Args:
        binding: what would be done now; if it is not what was asked for, the request is stale.

    Raises:
        NotPermittedError: who asked may not decide.
    """
    approval = find(unit, approval_id)
    if approval is None or approval.status is not ApprovalStatus.PENDING:
        return False
    if not allow_self and approval.requester is not None and decided_by == approval.requester:
        raise NotPermittedError(
            f"{decided_by} has asked for approval {approval_id} and cannot give it",
            hint="Let somebody else decide, or set allow_self in [approvals].",
        )
    if binding is not None and _made_stale(unit, approval, binding):
        return False
    return _decide(unit, approval_id, ApprovalStatus.APPROVED, decided_by, None)


def reject(unit: Unit, approval_id: str, decided_by: str | None, reason: str | None) -> bool:
    """Reject a pending request. False if it is missing, decided or expired."""
    return _decide(unit, approval_id, ApprovalStatus.REJECTED, decided_by, reason)


def _decide(
    unit: Unit, approval_id: str, status: ApprovalStatus, by: str | None, reason: str | None
) -> bool:
    changed = unit.change(
        f"""
        UPDATE {APPROVALS}
        SET status = $3, decided_at = $2, decided_by = $4, rejection_reason = $5
        WHERE approval_id = $1 AND {_DECIDABLE}
        """,
        [approval_id, utc(unit.now_us()), status, by, reason],
    )
    return changed == 1


def start_approved(
    unit: Unit, approval_id: str, binding: ApprovalBinding | None, spec_json: str | None
) -> JobId | None:
    """Create the one job of an approved request, or find it.

    Returns:
        The job's id, the same one however often this is called; None if the request is not
        approved, or has become stale.

    Raises:
        NotFoundError: there is no such request.
        UsageError: it is bound and `binding` is missing, or its operation is no job.
    """
    approval = find(unit, approval_id)
    if approval is None:
        raise no_approval(approval_id)
    if approval.job_id is not None:
        return JobId(approval.job_id)
    if approval.status is not ApprovalStatus.APPROVED:
        return None
    if approval.binding is not None:
        if binding is None:
            raise UsageError(f"approval {approval_id} is bound: tell what would be done now")
        if _made_stale(unit, approval, binding):
            return None
    asked = approval.operation
    if not isinstance(asked, ApprovalOperation.Run):
        raise UsageError(f"{asked.operation_type} is approved, but starts no job")
    job = new_job(
        HttpJobType.RUN,
        asked.plugin_name,
        asked.plugin_version,
        asked.input_dir,
        asked.output,
        approval_id,
        spec_json,
    )
    return create_job(unit, job)


def _made_stale(unit: Unit, approval: Approval, current: ApprovalBinding) -> bool:
    if approval.binding is None or approval.digest == current.digest():
        return False
    mark_stale(unit, approval.approval_id, approval.binding.changes(current))
    return True


def mark_stale(unit: Unit, approval_id: str, changes: Sequence[str]) -> bool:
    """Void a request, because what was asked for has changed; a job of it that has not begun
    fails.

    Returns:
        False, and nothing changed, if it is neither pending nor approved, or its job has begun.

    Raises:
        NotFoundError: there is no such request.
    """
    approval = find(unit, approval_id)
    if approval is None:
        raise no_approval(approval_id)
    if approval.status not in {ApprovalStatus.PENDING, ApprovalStatus.APPROVED}:
        return False
    reason = "; ".join(changes)
    if approval.job_id is not None:
        if not _waits(unit, approval.job_id):
            return False
        message = f"approval {approval_id} is void: {reason}"
        finish_job(unit, approval.job_id, HttpJobStatus.FAILED, message, None)
    unit.change(
        f"UPDATE {APPROVALS} SET status = $1, stale_reason = $2 WHERE approval_id = $3",
        [ApprovalStatus.STALE, reason, approval_id],
    )
    return True


def _waits(unit: Unit, job_id: int) -> bool:
    """Whether a job is there and has not begun."""
    try:
        return unit.head(job_id).status is HttpJobStatus.QUEUED
    except NotFoundError:
        return False  # it was finished, and a clean-up has taken it


def expire_approvals(unit: Unit) -> int:
    """Write down which pending requests are over; returns how many."""
    return unit.change(
        f"UPDATE {APPROVALS} SET status = $1 WHERE status = $2 AND expires_at <= $3",
        [ApprovalStatus.EXPIRED, ApprovalStatus.PENDING, utc(unit.now_us())],
    )


def overdue(connection: Connection, now: datetime) -> bool:
    """Whether a pending request is over that is not written down as expired."""
    found = connection.execute(
        f"SELECT 1 FROM {APPROVALS} WHERE status = $1 AND expires_at <= $2 LIMIT 1",
        [ApprovalStatus.PENDING, now],
    ).fetchone()
    return found is not None


def link(unit: Unit, approval_id: str, job_id: int) -> bool:
    """Record which job an approved request has started. True, also if it is recorded already.

    Raises:
        NotFoundError: there is no such request, or no such job.
        ConflictError: the request is not approved, or either has another partner.
    """
    approval = find(unit, approval_id)
    if approval is None:
        raise no_approval(approval_id)
    unit.head(job_id)
    if approval.job_id == job_id:
        return True
    (job,) = unit.look(f"SELECT approval_id FROM {JOBS} WHERE job_id = $1", [job_id])
    if approval.status is not ApprovalStatus.APPROVED:
        raise ConflictError(f"approval {approval_id} is {approval.status}, not approved")
    if approval.job_id is not None or job["approval_id"] not in {None, approval_id}:
        raise ConflictError(
            f"approval {approval_id} or API job {job_id} is linked already",
            hint="One approval starts one job.",
        )
    unit.change(f"UPDATE {APPROVALS} SET job_id = $1 WHERE approval_id = $2", [job_id, approval_id])
    unit.change(f"UPDATE {JOBS} SET approval_id = $1 WHERE job_id = $2", [approval_id, job_id])
    return True


def find(unit: Unit, approval_id: str) -> Approval | None:
    found = unit.look(f"SELECT * FROM {APPROVALS} WHERE approval_id = $1", [approval_id])
    return approval_of(found[0], utc(unit.now_us())) if found else None


def get_approval(connection: Connection, approval_id: str, now: datetime) -> Approval | None:
    found = rows(connection, f"SELECT * FROM {APPROVALS} WHERE approval_id = $1", [approval_id])
    return approval_of(found[0], now) if found else None


def list_approvals(
    connection: Connection,
    status: ApprovalStatus | None,
    now: datetime,
    limit: int,
    offset: int,
) -> list[Approval]:
    """Requests, newest first, by their status at this moment."""
    checked_limit(limit, offset)
    found = rows(
        connection,
        f"""
        SELECT * FROM {APPROVALS}
        WHERE $1 IS NULL OR $1 = CASE WHEN status = 'pending' AND expires_at <= $2
                                      THEN 'expired' ELSE status END
        ORDER BY created_at DESC, approval_id LIMIT {limit:d} OFFSET {offset:d}
        """,
        [status, now],
    )
    return [approval_of(row, now) for row in found]


def approval_of(row: dict[str, Any], now: datetime) -> Approval:
    """The request in a row of `cf_api_approvals`; pending beyond its time counts as expired."""
    status = ApprovalStatus(row["status"])
    if status is ApprovalStatus.PENDING and row["expires_at"] <= now:
        status = ApprovalStatus.EXPIRED
    bound = row["binding_json"]
    return Approval(
        approval_id=row["approval_id"],
        status=status,
        operation=decode_operation(row["operation_json"]),
        summary=row["summary"],
        created_at=row["created_at"].replace(tzinfo=UTC),
        expires_at=row["expires_at"].replace(tzinfo=UTC),
        decided_at=row["decided_at"] and row["decided_at"].replace(tzinfo=UTC),
        decided_by=row["decided_by"],
        rejection_reason=row["rejection_reason"],
        job_id=row["job_id"],
        requester=row["requester"],
        binding=msgspec.json.decode(bound, type=ApprovalBinding) if bound else None,
        digest=row["digest"],
        stale_reason=row["stale_reason"],
    )
