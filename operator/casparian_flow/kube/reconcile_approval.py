"""What an Approval needs: gathered state in, `Plan` out; and the objects for requests. Pure.

The ledger has the requests, the cluster the decisions: one object for each request, on which a
person decides and whose status alone the operator writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from casparian_flow.domain.scoped_names import namespace_of, plain
from casparian_flow.kube import names
from casparian_flow.kube.kinds import APPROVAL, Body, Manifest, ref_of
from casparian_flow.kube.models import Approval
from casparian_flow.kube.plan import (
    Approve,
    Command,
    Condition,
    Plan,
    Reject,
    no,
    told,
    unknown,
    written,
    yes,
)
from casparian_flow.kube.reasons import ConditionType, DecidedReason, StartedReason
from casparian_flow.protocol.http_types import Approval as Request
from casparian_flow.protocol.http_types import ApprovalStatus as Standing

OPEN: Final = frozenset({Standing.PENDING, Standing.APPROVED})
SUMMARY_CHARS_MAX: Final = 4096
_PHASES: Final = {
    Standing.PENDING: "Pending",
    Standing.APPROVED: "Approved",
    Standing.REJECTED: "Rejected",
    Standing.EXPIRED: "Expired",
    Standing.STALE: "Stale",
}


@dataclass(frozen=True, slots=True)
class ApprovalState:
    """All that decides what one Approval needs.

    Attributes:
        body: the object as it is; `approval` the same, read.
        request: of its id, None if the ledger has none.
        at: this moment, RFC 3339.
    """

    body: Body
    approval: Approval
    request: Request | None
    at: str


def reconcile_approval(state: ApprovalState) -> Plan:
    """Carry a decision into the ledger; tell what has come of the request."""
    if state.request is None or not _is_of(state.body, state.request):
        # Retention took it, and this with it; or somebody has made an object of their own for it,
        # where nothing keeps them from that, perhaps in a namespace where they may decide.
        return Plan(delete=[ref_of(state.body)])
    commands = _commands(state, state.request)
    conditions = [_decided(state, state.request), _started(state.request)]
    return Plan(
        commands=commands,
        status=_status(state, state.request, conditions),
        notes=told(conditions, state.body, ConditionType.DECIDED),
        again_s=0.0 if commands else None,
    )


def _is_of(body: Body, request: Request) -> bool:
    """Whether this is the object that is made for a request."""
    namespace = namespace_of(str(operation_of(request)["plugin"]))
    return ref_of(body) == ref_of(approval_object(request, namespace))


def _commands(state: ApprovalState, request: Request) -> list[Command]:
    spec = state.approval.spec
    if request.status is not Standing.PENDING or spec.decision is None or not spec.decided_by:
        return []
    if spec.decision == "approved":
        return [Approve(request.approval_id, spec.decided_by)]
    return [Reject(request.approval_id, spec.decided_by, spec.reason or "")]


def _decided(state: ApprovalState, request: Request) -> Condition:
    kind = ConditionType.DECIDED
    by = request.decided_by or "somebody"
    match request.status:
        case Standing.APPROVED:
            return yes(kind, DecidedReason.APPROVED, f"approved by {by}")
        case Standing.REJECTED:
            why = f": {request.rejection_reason}" if request.rejection_reason else ""
            return yes(kind, DecidedReason.REJECTED, f"rejected by {by}{why}")
        case Standing.EXPIRED:
            return no(kind, DecidedReason.EXPIRED, "nobody decided in time; ask again")
        case Standing.STALE:
            return no(
                kind,
                DecidedReason.STALE,
                f"what was asked for has changed: {request.stale_reason or 'ask again'}",
            )
        case Standing.PENDING:
            patch = '{"spec":{"decision":"approved"}}'
            return no(
                kind,
                DecidedReason.PENDING,
                f"kubectl patch approval {state.approval.metadata.name} -n "
                f"{state.approval.metadata.namespace} --type=merge -p '{patch}'",
            )


def _started(request: Request) -> Condition:
    kind = ConditionType.STARTED
    if request.job_id is not None:
        return yes(kind, StartedReason.STARTED, f"API job {request.job_id}")
    if request.status is Standing.STALE:
        return no(kind, StartedReason.STALE, request.stale_reason or "it is stale")
    if request.status is not Standing.APPROVED:
        return no(kind, StartedReason.NOT_APPROVED, "it is not approved")
    if request.operation.operation_type != "run":
        return no(kind, StartedReason.NO_JOB, "the operation is no job; the decision is all")
    return unknown(kind, StartedReason.STARTING, "its job is being made")


def _status(
    state: ApprovalState, request: Request, conditions: Sequence[Condition]
) -> dict[str, Any]:
    status: dict[str, Any] = {
        "observedGeneration": state.approval.metadata.generation,
        "conditions": written(conditions, state.body, at=state.at),
        "phase": _PHASES[request.status],
        "message": (request.stale_reason or "")[:4000],
    }
    if request.job_id is not None:
        status["jobId"] = int(request.job_id)
    return status


# -- objects for requests ---------------------------------------------------------------------


def approval_object(request: Request, namespace: str) -> Manifest:
    """The object on which a request is decided.

    Args:
        namespace: of the plugin that it is about.
    """
    operation = operation_of(request)
    name = names.approval_name(
        str(operation["type"]), plain(str(operation["plugin"])), request.approval_id
    )
    return {
        "apiVersion": APPROVAL.api_version,
        "kind": APPROVAL.name,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": dict(names.labels("approval")),
        },
        "spec": {
            "approvalId": request.approval_id,
            "operation": operation,
            "summary": request.summary[:SUMMARY_CHARS_MAX],
            "digest": request.digest or "",
            "requestedBy": request.requester or "",
            "createdAt": _instant(request.created_at),
            "expiresAt": _instant(request.expires_at),
        },
    }


def operation_of(request: Request) -> dict[str, Any]:
    """What would be done, as an Approval's `spec.operation` has it."""
    given = request.operation

    def said(*fields: str) -> str:
        return next((str(v) for f in fields if (v := getattr(given, f, None))), "")

    return {
        "type": given.operation_type,
        "plugin": said("plugin_name")[:253],
        "version": said("plugin_version")[:253],
        "inputDir": said("input_dir")[:4000],
        "fileCount": int(getattr(given, "file_count", 0) or 0),
        "output": said("output", "output_name")[:4000],
    }


def _instant(moment: datetime) -> str:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
