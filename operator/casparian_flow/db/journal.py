"""From journal entries to the queue's columns: the pure half of the fold.

`Folded` collects what the entries of one job say, in order; folding the whole journal over a
job's immutable columns gives the row of cf_processing_queue, however the entries were cut into
folds. A value of None means "as it was", except in the two groups that are written as a whole:
the lease (`lease_set`) and the outcome of the attempt (`outcome_set`).
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from casparian_flow.domain.clock import utc
from casparian_flow.domain.jobs import KIND_STATUS, CompletionStatus, JobStatus, JournalKind
from casparian_flow.domain.records import Record

_decode = msgspec.json.decode
_encoder = msgspec.json.Encoder()

_COMPLETION: dict[JournalKind, str] = {
    JournalKind.FAILED: CompletionStatus.FAILED,
    JournalKind.ABORTED: CompletionStatus.ABORTED,
    JournalKind.SKIPPED: CompletionStatus.SKIPPED,
}


def encode_data(data: dict[str, Any] | None) -> str | None:
    """A record's data as JSON text; None stays None."""
    return _encoder.encode(data).decode() if data else None


def decode_data(text: str | None) -> dict[str, Any] | None:
    """The data that `encode_data` wrote."""
    data: dict[str, Any] | None = _decode(text) if text else None
    return data


@dataclass(slots=True)
class Folded:
    """What changed for one job since the last fold."""

    job_id: int
    start: JobStatus
    """Status in the table."""
    status: JobStatus
    attempt: int = 0
    lease_set: bool = False
    lease_token: str | None = None
    lease_owner: str | None = None
    lease_expires_us: int | None = None
    outcome_set: bool = False
    error_message: str | None = None
    reason: str | None = None
    scheduled_us: int | None = None
    worker_host: str | None = None
    worker_pid: int | None = None
    claim_us: int | None = None
    end_us: int | None = None
    completion_status: str | None = None
    result_summary: str | None = None
    retry_count: int | None = None
    quarantine_rows: int | None = None
    plugin_manifest_id: int | None = None
    granted: bool = False
    """Whether the job was STAGED at any time since the last fold."""

    def apply(
        self, kind: JournalKind, attempt: int, at_us: int, data: dict[str, Any] | None
    ) -> None:
        """Take one more entry into account."""
        data = data or {}
        self.status = KIND_STATUS[kind]
        self.attempt = attempt
        match kind:
            case JournalKind.LEASED:
                self._lease(at_us, data)
            case JournalKind.GRANTED:
                self.granted = True
            case JournalKind.COMPLETED:
                self._complete(at_us, data)
            case JournalKind.STARTED | JournalKind.RELEASED:
                pass
            case _:
                self._leave(kind, at_us, data)

    def row(self) -> dict[str, Any]:
        """The columns that a fold would write, by name; times as naive UTC."""
        changed: dict[str, Any] = {"status": self.status.value, "attempt": self.attempt}
        for column, sql_type, attribute, group in COLUMNS:
            value = getattr(self, attribute)
            if getattr(self, group) if group else value is not None:
                is_time = sql_type == "TIMESTAMP" and value is not None
                changed[column] = utc(value) if is_time else value
        return changed

    def _lease(self, at_us: int, data: dict[str, Any]) -> None:
        self.lease_set = True
        self.lease_token = data.get("token")
        self.lease_owner = data.get("owner")
        self.lease_expires_us = data.get("lease_expires_us")
        self.worker_host = data.get("worker_host", self.worker_host)
        self.worker_pid = data.get("worker_pid", self.worker_pid)
        self.plugin_manifest_id = data.get("manifest_id") or self.plugin_manifest_id
        self.claim_us = at_us

    def _complete(self, at_us: int, data: dict[str, Any]) -> None:
        metrics = data.get("metrics") or {}
        self.end_us = at_us
        self.completion_status = data.get("completion", CompletionStatus.SUCCESS)
        self.result_summary = data.get("summary")
        self.quarantine_rows = metrics.get("quarantine_rows")
        self.outcome_set = True
        self.error_message = self.reason = None

    def _leave(self, kind: JournalKind, at_us: int, data: dict[str, Any]) -> None:
        """The attempt is over without a result: its token is stale from here on."""
        self.lease_set = True
        self.lease_token = self.lease_owner = self.lease_expires_us = None
        self.outcome_set = True
        self.reason = data.get("reason")
        self.error_message = data.get("message")
        self.retry_count = data.get("retry_count", self.retry_count)
        if kind in (JournalKind.RETURNED, JournalKind.RETRIED):
            self.scheduled_us = data.get("not_before_us", self.scheduled_us)
        else:
            self.end_us = at_us
            self.completion_status = _COMPLETION[kind]


COLUMNS: tuple[tuple[str, str, str, str], ...] = (
    # column, SQL type, attribute, group that is written as a whole
    ("lease_token", "VARCHAR", "lease_token", "lease_set"),
    ("lease_owner", "VARCHAR", "lease_owner", "lease_set"),
    ("lease_expires_at", "TIMESTAMP", "lease_expires_us", "lease_set"),
    ("error_message", "VARCHAR", "error_message", "outcome_set"),
    ("reason", "VARCHAR", "reason", "outcome_set"),
    ("scheduled_at", "TIMESTAMP", "scheduled_us", ""),
    ("worker_host", "VARCHAR", "worker_host", ""),
    ("worker_pid", "INTEGER", "worker_pid", ""),
    ("claim_time", "TIMESTAMP", "claim_us", ""),
    ("end_time", "TIMESTAMP", "end_us", ""),
    ("completion_status", "VARCHAR", "completion_status", ""),
    ("result_summary", "VARCHAR", "result_summary", ""),
    ("retry_count", "INTEGER", "retry_count", ""),
    ("quarantine_rows", "BIGINT", "quarantine_rows", ""),
    ("plugin_manifest_id", "BIGINT", "plugin_manifest_id", ""),
)
"""Every column of cf_processing_queue that the journal decides, beside status and attempt."""


OUTPUT_STATES = {JobStatus.COMPLETED: "PUBLISHED", JobStatus.FAILED: "ABANDONED"}
"""What becomes of a job's GRANTED outputs when it ends."""


def fold_into(pending: dict[int, Folded], record: Record, start: JobStatus) -> None:
    """Add a committed record; `start` is the job's status before it."""
    folded = pending.get(record.job_id)
    if folded is None:
        folded = pending[record.job_id] = Folded(record.job_id, start, start)
        folded.granted = start is JobStatus.STAGED
    folded.apply(record.kind, record.attempt, record.at_us, record.data)


def describe(seq: int, kind: str, attempt: int, at: object, data: str | None) -> str:
    """One line of a job's history."""
    return f"#{seq} {at} {kind} attempt {attempt}" + (f" {data}" if data else "")
