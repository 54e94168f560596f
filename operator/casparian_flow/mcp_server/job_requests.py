"""What a client may have done: trials that publish nothing, and requests that a person decides."""

import json
import shlex
import threading
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from casparian_flow.domain.errors import ConflictError, NotFoundError, NotPermittedError
from casparian_flow.domain.paths import path_to_text
from casparian_flow.mcp_server.budget import fitting
from casparian_flow.mcp_server.desk import Desk
from casparian_flow.mcp_server.redaction import Redactor
from casparian_flow.protocol.http_types import (
    Approval,
    ApprovalStatus,
    EventType,
    HttpJob,
    HttpJobStatus,
    HttpJobType,
    JobSpec,
    TopicReport,
    ViolationSummary,
)
from casparian_flow.sentinel.api import ApiStore

Answer = dict[str, Any]
PREVIEW_FILES_MAX: Final = 10
PREVIEW_WAIT_S: Final = 60.0
"""How long a call waits for a preview's rows; they can be asked for later as well."""
POLL_S: Final = 0.25
TRIALS_MAX: Final = 4
"""Backtests and previews that are not finished; further ones are refused."""
PENDING_MAX: Final = 20
"""Requests that wait for a person; further ones are refused, so that nobody drowns in them."""
EVENT_PAGES_MAX: Final = 20
SAMPLES_MAX: Final = 5
_HIDDEN: Final = frozenset({"spec_json", "preview_json"})


def contracts(schemas: dict[str, Any]) -> dict[str, str]:
    """Contracts by topic, as a JobSpec has them; the control plane judges them."""
    return {topic: json.dumps(schema, ensure_ascii=False) for topic, schema in schemas.items()}


def run(
    desk: Desk,
    plugin: str,
    version: str | None,
    input_dir: str,
    output: str | None,
    schemas: dict[str, str],
) -> Answer:
    """Ask a person for a run: {approval_id, status, summary, expires_at, approve_command}.

    Raises:
        ConflictError: PENDING_MAX requests wait already.
        NotFoundError, UsageError: no such plugin, folder or sink.
    """
    with desk.control() as control, desk.folder(control, input_dir) as folder:
        waiting = control.api.list_approvals(ApprovalStatus.PENDING, PENDING_MAX)
        if len(waiting) >= PENDING_MAX:
            raise ConflictError(
                f"{PENDING_MAX} requests wait for a person already",
                hint="Let somebody decide on them: casparian mcp list.",
            )
        approval = control.api.request_run(
            plugin,
            version,
            folder,
            output,
            spec=JobSpec(schemas=schemas),
            expires_in=timedelta(minutes=desk.settings.mcp.approval_minutes),
            requester=desk.caller,
        )
    return {
        "approval_id": approval.approval_id,
        "status": "pending_approval",
        "summary": approval.summary,
        "expires_at": approval.expires_at.replace(tzinfo=UTC).isoformat(),
        "approve_command": approve_command(desk.settings.file, approval, on_cluster=desk.elsewhere),
    }


def approve_command(config: Path | None, approval: Approval, *, on_cluster: bool) -> str:
    """What a person types, wherever they are."""
    words = ["casparian", "mcp", "approve", approval.approval_id]
    if on_cluster:
        # The name of the cluster is the person's own.
        return shlex.join([words[0], "--context", "CONTEXT", *words[1:]])
    if config is not None and config.is_file():
        words[1:1] = ["--config", path_to_text(str(config))]
    return shlex.join(words)


def backtest(
    desk: Desk,
    plugin: str,
    version: str | None,
    input_dir: str,
    schemas: dict[str, str],
    *,
    fail_fast: bool,
) -> Answer:
    """Start a backtest: {job_id, status, note}.

    Raises:
        ConflictError: TRIALS_MAX trials are not finished.
        NotFoundError, UsageError: no such plugin or folder.
    """
    spec = JobSpec(fail_fast=fail_fast, schemas=schemas)
    job_id, runs = _start(desk, HttpJobType.BACKTEST, plugin, version, input_dir, spec)
    note = "" if runs else "It begins when a Sentinel with a worker runs: casparian start."
    return {"job_id": job_id, "status": HttpJobStatus.QUEUED.value, "note": note}


def preview(
    desk: Desk,
    plugin: str,
    version: str | None,
    input_dir: str,
    files: list[str],
    limit: int,
    redactor: Redactor,
) -> Answer:
    """Some rows of some files: {job_id, status, outputs: {topic: {columns, rows…}}, errors}.

    After PREVIEW_WAIT_S the answer has the job's status and no rows yet.

    Raises:
        ConflictError: TRIALS_MAX trials are not finished.
        NotFoundError, UsageError: no such plugin, folder or file.
    """
    most = len(files) or None
    spec = JobSpec(files=files, files_max=most, rows_max=limit)
    job_id, runs = _start(desk, HttpJobType.PREVIEW, plugin, version, input_dir, spec)
    deadline = desk.clock.now().mono + (PREVIEW_WAIT_S if runs else 0)
    while True:
        with desk.control() as control:
            job = control.api.get_job(job_id)
        if job is None:
            raise NotFoundError(f"the preview's job {job_id} is gone")
        if job.status.is_terminal or desk.clock.now().mono >= deadline:
            return _previewed(job, redactor)
        threading.Event().wait(POLL_S)


def _start(
    desk: Desk,
    kind: HttpJobType,
    plugin: str,
    version: str | None,
    input_dir: str,
    spec: JobSpec,
) -> tuple[int, bool]:
    """(the job's id, whether a Sentinel is there to carry it out)."""
    with desk.control() as control, desk.folder(control, input_dir) as folder:
        unfinished = [
            job
            for status in (HttpJobStatus.QUEUED, HttpJobStatus.RUNNING)
            for job in control.api.list_jobs(status)
            if job.job_type is not HttpJobType.RUN
        ]
        if len(unfinished) >= TRIALS_MAX:
            raise ConflictError(
                f"{TRIALS_MAX} backtests and previews are not finished",
                hint="Wait for them, or cancel one with casparian_job_cancel.",
            )
        job_id = control.api.start_job(kind, plugin, version, folder, spec=spec)
        return job_id, bool(control.status().get("sentinel"))


def _previewed(job: HttpJob, redactor: Redactor) -> Answer:
    topics = msgspec.json.decode(job.preview_json or "[]", type=list[TopicReport])
    outputs = {
        topic.topic: {
            "row_count": topic.rows,
            "bad_rows": topic.bad_rows,
            "violations": [_violation(v, redactor) for v in topic.violations],
            "rows": fitting(_redacted(row, redactor) for row in topic.sample)[0],
        }
        for topic in topics
    }
    errors = [redactor.message(job.error_message)] if job.error_message else []
    return {"job_id": job.job_id, "status": job.status, "outputs": outputs, "errors": errors}


def _redacted(row: dict[str, Any], redactor: Redactor) -> dict[str, Any]:
    return {name: redactor.value(value) for name, value in row.items()}


def _violation(violation: ViolationSummary, redactor: Redactor) -> Answer:
    plain: Answer = msgspec.to_builtins(violation)
    return plain | {"samples": [redactor.text(s) for s in violation.samples[:SAMPLES_MAX]]}


def plain_job(job: HttpJob, redactor: Redactor) -> Answer:
    """A job as a client sees it."""
    plain: Answer = {k: v for k, v in msgspec.to_builtins(job).items() if k not in _HIDDEN}
    if job.error_message is not None:
        plain["error_message"] = redactor.message(job.error_message)
    if job.progress is not None and job.progress.message is not None:
        plain["progress"]["message"] = redactor.message(job.progress.message)
    return plain


def job_shown(api: ApiStore, job_id: int, redactor: Redactor) -> Answer:
    """A job with its violations, and a finished preview's rows.

    Raises:
        NotFoundError: there is no such job.
    """
    job = api.get_job(job_id)
    if job is None:
        raise NotFoundError(f"no job {job_id}")
    shown = plain_job(job, redactor)
    if job.job_type is HttpJobType.PREVIEW:
        shown["outputs"] = _previewed(job, redactor)["outputs"]
    violations = [_violation(v, redactor) for v in _violations(api, job_id)]
    shown["violations"], shown["truncated"] = fitting(violations)
    return shown


def _violations(api: ApiStore, job_id: int) -> list[ViolationSummary]:
    """What the job's events tell, one for each kind and column."""
    merged: dict[tuple[str, str | None], ViolationSummary] = {}
    after = 0
    for _ in range(EVENT_PAGES_MAX):
        events = api.list_events(job_id, after, 1_000)
        for event in events:
            if isinstance(event.payload, EventType.Violation):
                for violation in event.payload.violations:
                    _merge(merged, violation)
        if len(events) < 1_000:
            break
        after = events[-1].event_id
    return list(merged.values())


def _merge(
    merged: dict[tuple[str, str | None], ViolationSummary], violation: ViolationSummary
) -> None:
    key = (violation.violation_type, violation.column_name)
    if (known := merged.get(key)) is not None:
        violation = ViolationSummary(
            violation_type=known.violation_type,
            column_name=known.column_name,
            count=known.count + violation.count,
            samples=[*known.samples, *violation.samples][:SAMPLES_MAX],
        )
    merged[key] = violation


def cancel(api: ApiStore, job_id: int, caller: str) -> str:
    """ "cancelled", "already_completed" or "not_found".

    Raises:
        NotPermittedError: a run that was not asked for by this user.
    """
    job = api.get_job(job_id)
    if job is None:
        return "not_found"
    if job.status.is_terminal:
        return "already_completed"
    if job.job_type is HttpJobType.RUN and not _asked_by(caller, api, job):
        raise NotPermittedError(
            f"job {job_id} is a run that was not asked for by {caller}",
            hint="A person may cancel it.",
        )
    return "cancelled" if api.cancel_job(job_id) else "already_completed"


def _asked_by(caller: str, api: ApiStore, job: HttpJob) -> bool:
    approval = api.get_approval(job.approval_id) if job.approval_id else None
    return approval is not None and approval.requester == caller
