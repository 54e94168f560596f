"""What the worker says of an attempt that did not go well."""

from casparian_flow.domain.errors import CasparianError, OutputRefusedError, SinkError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.jobs import CompletionStatus
from casparian_flow.protocol.messages import Conclude
from casparian_worker.plugin_events import LaunchError
from casparian_worker.reports import refusal_report
from casparian_worker.sinks.base import reason_of

SKIPS = frozenset({Reason.SOURCE_CHANGED, Reason.SOURCE_MISSING})
"""Nothing went wrong: these bytes are not to be had any more, and Scout finds the new ones."""


def failure(
    token: str, reason: Reason, message: str, transient: bool | None = None, log: str = ""
) -> Conclude:
    """The conclusion of a failed attempt; SKIPPED where only the source is at fault."""
    status = CompletionStatus.SKIPPED if reason in SKIPS else CompletionStatus.FAILED
    return Conclude(token, status, reason, message, transient, log=log)


def failure_of(token: str, error: Exception, log: str = "") -> Conclude:
    """The conclusion of an attempt that an error of ours ended."""
    if isinstance(error, OutputRefusedError):
        refused = failure(token, Reason(error.reason), described(error), False, log)
        refused.report = refusal_report(error.diagnostics)
        return refused
    if isinstance(error, SinkError):
        return failure(token, reason_of(error), described(error), error.transient, log)
    if isinstance(error, LaunchError):
        return failure(token, error.reason, described(error), error.transient, log)
    return failure(token, Reason.WORKER_ERROR, described(error), None, log)


def described(error: Exception) -> str:
    """The error in one line for people, with its hint."""
    if not isinstance(error, CasparianError):
        return f"{type(error).__name__}: {error}"
    return error.with_hint()
