"""Requests that wait for a person: `casparian mcp list`, `casparian mcp approve`."""

import os
from typing import Any

import click

from casparian_flow.cli.context import App, CommandGroup, limit_option, output_option, pass_app
from casparian_flow.cli.output import Column, note, short_time, show_data, show_rows
from casparian_flow.domain.errors import ConflictError, NotFoundError, UsageError
from casparian_flow.protocol.http_types import Approval, ApprovalStatus
from casparian_flow.sentinel.caller import user_name

PREFIX_CHARS_MIN = 4
"""Of an id that is given by its beginning."""
COLUMNS = (
    Column("approval_id", "ID"),
    Column("status", "STATUS"),
    Column("file_count", "FILES", right=True),
    Column("summary", "SUMMARY"),
    Column("requester", "ASKED BY"),
    Column("created_at", "SINCE", short_time),
    Column("expires_at", "UNTIL", short_time),
    Column("told", "DECISION"),
)


@click.group(cls=CommandGroup)
def approvals() -> None:
    """Requests that wait for a person; the same commands as under 'casparian mcp'."""


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Also those that are decided or over.")
@limit_option()
@output_option
@pass_app
def list_requests(app: App, everything: bool, limit: int) -> None:
    """List the requests that wait for a decision, newest first.

    \b
    Examples:
      casparian mcp list
      casparian mcp list --all -o json
    """
    wanted = None if everything else ApprovalStatus.PENDING
    found = app.api.list_approvals(wanted, min(limit, 10_000))
    show_rows(app, [_row(a) for a in found], COLUMNS, empty="no request waits for a decision")


def _row(approval: Approval) -> dict[str, Any]:
    return {
        "approval_id": approval.approval_id,
        "status": approval.status.value,
        "operation": approval.operation.operation_type,
        "file_count": getattr(approval.operation, "file_count", None),
        "summary": approval.summary,
        "requester": approval.requester,
        "created_at": approval.created_at.isoformat(),
        "expires_at": approval.expires_at.isoformat(),
        "decided_by": approval.decided_by,
        "reason": approval.stale_reason or approval.rejection_reason,
        "job_id": approval.job_id,
        "told": _decision(approval),
    }


def _decision(approval: Approval) -> str:
    """What became of a request, in a few words; "" while nothing did."""
    match approval.status:
        case ApprovalStatus.APPROVED:
            job = f", API job {approval.job_id}" if approval.job_id is not None else ""
            return f"by {approval.decided_by}{job}"
        case ApprovalStatus.REJECTED:
            why = f": {approval.rejection_reason}" if approval.rejection_reason else ""
            return f"by {approval.decided_by}{why}"
        case ApprovalStatus.STALE:
            return str(approval.stale_reason)
        case _:
            return ""


@click.command()
@click.argument("approval_id", metavar="ID")
@click.option("--reject", is_flag=True, help="Reject the request.")
@click.option("--reason", metavar="TEXT", help="Why it is rejected; who asked sees it.")
@output_option
@pass_app
def approve(app: App, approval_id: str, reject: bool, reason: str | None) -> None:
    """Approve a request, or reject it. The beginning of its id is enough.

    On Kubernetes, with --context, the decision is written into the Approval object in your name.

    What was asked for is compared with what would be done now: if the plugin's code, the files,
    the sink or the parameters have changed since, the request is void and nothing runs.

    \b
    Examples:
      casparian mcp approve 3f6c
      casparian mcp approve 3f6c --reject --reason "wrong folder"
    """
    if reason is not None and not reject:
        raise UsageError("a reason goes with --reject")
    found = _found(app, approval_id)
    if app.cluster:
        _decide_on_object(app, found, reject=reject, reason=reason)
        return
    # A Sentinel puts the name there that the kernel knows this process by.
    me = user_name(os.geteuid())
    api = app.api
    if reject:
        decided = api.reject(found.approval_id, me, reason)
    else:
        decided = api.approve(found.approval_id, me)
    after = api.get_approval(found.approval_id) or found
    if not decided:
        raise ConflictError(
            f"request {after.approval_id} is {after.status}: {_decision(after) or 'too late'}",
            hint="Nothing runs in its name; it can be asked for anew."
            if after.job_id is None
            else "",
        )
    told = f"{after.status}: {after.summary}"
    if after.job_id is not None:
        told += f"\nfollow it: casparian events {after.job_id} --follow"
    show_data(app, _row(after), told)
    if after.job_id is not None and app.control.status()["sentinel"] is None:
        note("it begins when a Sentinel with a worker runs: casparian start")


def _decide_on_object(app: App, found: Approval, *, reject: bool, reason: str | None) -> None:
    from casparian_flow.kube.context import decide

    session = app.session
    after = decide(session.client, session.control, found, reject=reject, reason=reason)
    show_data(app, _row(after), f"{after.status} by {after.decided_by}: {after.summary}")


def _found(app: App, text: str) -> Approval:
    """The request with this id, or the one whose id begins so.

    Raises:
        NotFoundError: there is none.
        UsageError: there are several.
    """
    exact = app.api.get_approval(text)
    if exact is not None:
        return exact
    beginning = text.lower()
    matching = [
        a
        for a in app.api.list_approvals(None, 10_000)
        if len(text) >= PREFIX_CHARS_MIN and a.approval_id.startswith(beginning)
    ]
    if not matching:
        raise NotFoundError(
            f"there is no request {text[:80]!r}", hint="'casparian mcp list --all' lists them."
        )
    if len(matching) > 1:
        raise UsageError(f"{len(matching)} requests begin with {text!r}", hint="Give more of it.")
    return matching[0]


approvals.add_command(list_requests)
approvals.add_command(approve)
