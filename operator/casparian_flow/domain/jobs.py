"""Rule 1: every status of a job, and every legal move between them, is in this file.

                       +--------- returned / retried ----------+
                       v                                        |
    PENDING --> QUEUED --> DISPATCHING --> RUNNING --> STAGED --> COMPLETED
                  |            |             |  \\                  ^
                  |            |             |   +-- no outputs ---+
                  +------------+-------------+--> FAILED | ABORTED | SKIPPED

STAGED means granted: the ledger holds the manifest, the outputs will be published, and no
cancel, retry or new attempt is possible any more (ARCHITECTURE.md, "The commit protocol").
"""

from collections.abc import Sequence
from enum import StrEnum

from casparian_flow.domain.errors import InvalidTransitionError


class JobStatus(StrEnum):
    PENDING = "PENDING"
    """Recorded, not yet allowed to run."""
    QUEUED = "QUEUED"
    """Waits for a worker (or, after a failure, for its scheduled time)."""
    DISPATCHING = "DISPATCHING"
    """Leased under a fencing token; the worker has not said that it began."""
    RUNNING = "RUNNING"
    """The worker has begun; staged but not granted outputs still count as running."""
    STAGED = "STAGED"
    """Granted: the point of no return. Only completing it is sound."""
    COMPLETED = "COMPLETED"
    """Every output is published, or there was none."""
    ABORTED = "ABORTED"
    """Cancelled before the grant; no output of it will ever appear."""
    FAILED = "FAILED"
    """Gave up: a permanent error, or its retries are used up. A dead letter tells why."""
    SKIPPED = "SKIPPED"
    """Not done on purpose: its bytes are gone or changed, or a newer result supersedes it."""


class CompletionStatus(StrEnum):
    """How a finished job went, beside its terminal status."""

    SUCCESS = "SUCCESS"
    PARTIAL_SUCCESS = "PARTIAL_SUCCESS"
    """Some rows went to quarantine, within the policy's limits."""
    COMPLETED_WITH_WARNINGS = "COMPLETED_WITH_WARNINGS"
    FAILED = "FAILED"
    REJECTED = "REJECTED"
    ABORTED = "ABORTED"
    SKIPPED = "SKIPPED"


class JournalKind(StrEnum):
    """What the journal can say of a job; each kind leads to exactly one status."""

    LEASED = "LEASED"
    STARTED = "STARTED"
    RETURNED = "RETURNED"
    """Back to the queue through no fault of the job: worker gone before it began, or busy."""
    RETRIED = "RETRIED"
    """Back to the queue after a failed or lost attempt; counts as a retry, scheduled later."""
    GRANTED = "GRANTED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    ABORTED = "ABORTED"
    SKIPPED = "SKIPPED"
    RELEASED = "RELEASED"
    """A pending job may run now."""


KIND_STATUS: dict[JournalKind, JobStatus] = {
    JournalKind.LEASED: JobStatus.DISPATCHING,
    JournalKind.STARTED: JobStatus.RUNNING,
    JournalKind.RETURNED: JobStatus.QUEUED,
    JournalKind.RETRIED: JobStatus.QUEUED,
    JournalKind.RELEASED: JobStatus.QUEUED,
    JournalKind.GRANTED: JobStatus.STAGED,
    JournalKind.COMPLETED: JobStatus.COMPLETED,
    JournalKind.FAILED: JobStatus.FAILED,
    JournalKind.ABORTED: JobStatus.ABORTED,
    JournalKind.SKIPPED: JobStatus.SKIPPED,
}

_Q = JobStatus
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    _Q.PENDING: frozenset({_Q.QUEUED, _Q.ABORTED, _Q.SKIPPED}),
    _Q.QUEUED: frozenset({_Q.DISPATCHING, _Q.ABORTED, _Q.SKIPPED, _Q.FAILED}),
    _Q.DISPATCHING: frozenset({_Q.RUNNING, _Q.QUEUED, _Q.FAILED, _Q.ABORTED, _Q.SKIPPED}),
    _Q.RUNNING: frozenset({_Q.STAGED, _Q.COMPLETED, _Q.QUEUED, _Q.FAILED, _Q.ABORTED, _Q.SKIPPED}),
    # FAILED from STAGED is only `job resolve --abandon`, an operator's decision.
    _Q.STAGED: frozenset({_Q.COMPLETED, _Q.FAILED}),
    _Q.COMPLETED: frozenset(),
    _Q.ABORTED: frozenset(),
    _Q.FAILED: frozenset(),
    _Q.SKIPPED: frozenset(),
}

TERMINAL: frozenset[JobStatus] = frozenset(s for s, nexts in TRANSITIONS.items() if not nexts)
LEASED: frozenset[JobStatus] = frozenset({_Q.DISPATCHING, _Q.RUNNING})
"""A worker holds the job and could still lose it."""


def check_transition(
    job_id: int, start: JobStatus, finish: JobStatus, history: Sequence[str] = ()
) -> None:
    """Refuse an illegal move.

    Raises:
        InvalidTransitionError: with the job's history.
    """
    if finish not in TRANSITIONS[start]:
        raise InvalidTransitionError(job_id, start, finish, history)
