"""A queue of jobs for programs without a Sentinel: enqueue, lease, conclude.

    queue = JobQueue(DbConnection.open_duckdb_memory())
    queue.init()
    job_id = queue.enqueue(JobDetails(plugin_name="my_parser"))
    job = queue.dequeue()
    queue.ack(job.token)
    queue.conclude_success(job.token)

It is the Sentinel's ledger under another face: every move is a journal record in a commit of its
own, under the same guards. A lease lasts for `lease_seconds` unless renewed; after that the job
goes back to the queue and its token is stale, and what is said under a stale token changes
nothing. Use either this or a Sentinel on a ledger, not both at once.
"""

import random  # noqa: TID251 - the type only
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.loading import load_counts, parse_overrides
from casparian_flow.domain.clock import Clock, Now, SystemClock, system_random
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import JobId, Token, fencing_token, parse_token
from casparian_flow.domain.jobs import (
    LEASED,
    TERMINAL,
    CompletionStatus,
    JobStatus,
    JournalKind,
)
from casparian_flow.domain.records import Record
from casparian_flow.domain.retry import RetryPolicy

LEASE_SECONDS: Final = 30.0
_NAME_CHARS_MAX: Final = 100


class DbConnection:
    """A ledger, opened by where it is."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self.ledger = ledger
        self.clock = clock

    @classmethod
    def open_duckdb(cls, path: str | Path, *, clock: Clock | None = None) -> Self:
        """The ledger in a DuckDB file, made if it is not there.

        Raises:
            LedgerError: as `Ledger.open`.
        """
        clock = clock or SystemClock()
        return cls(Ledger.open(path, clock=clock), clock)

    @classmethod
    def open_duckdb_memory(cls, *, clock: Clock | None = None) -> Self:
        """A new ledger that nothing outlives."""
        clock = clock or SystemClock()
        return cls(Ledger.in_memory(clock=clock), clock)

    def close(self) -> None:
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class JobDetails:
    """What to run.

    Attributes:
        file_version_id: the input as the ledger knows it; a Sentinel runs only jobs that have one.
        input_file: the input as a path, for programs that keep their own files.
        priority: larger goes first.
        config_overrides: {topic: sink URI or list of them} for this job only.
        not_before_us: wall clock in microseconds before which it stays in the queue.
    """

    plugin_name: str
    file_version_id: int | None = None
    input_file: str | None = None
    priority: int = 0
    config_overrides: dict[str, Any] | None = None
    not_before_us: int = 0


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A leased job."""

    job_id: JobId
    token: Token
    plugin_name: str
    attempt: int
    file_version_id: int | None
    input_file: str | None
    priority: int
    config_overrides: dict[str, Any] | None


class JobQueue:
    """See the module's text. Not thread-safe."""

    def __init__(
        self,
        connection: DbConnection | Ledger,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        retry: RetryPolicy | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        given = connection.clock if isinstance(connection, DbConnection) else SystemClock()
        self._ledger = connection.ledger if isinstance(connection, DbConnection) else connection
        self._clock = clock or given
        self._rng = rng or system_random()
        self._retry = retry or RetryPolicy()
        self._lease_seconds = lease_seconds
        self._deadlines: dict[Token, float] = {}
        self._ready = False

    def init(self) -> None:
        """Begin an epoch of tokens, and give leases found in the ledger their full time again."""
        if self._ready:
            return
        self._ledger.begin_epoch()
        deadline = self._clock.now().mono + self._lease_seconds
        for row in self._ledger.query(
            "SELECT lease_token FROM cf_processing_queue "
            "WHERE status IN ('DISPATCHING', 'RUNNING') AND lease_token IS NOT NULL"
        ):
            self._deadlines[Token(row["lease_token"])] = deadline
        self._ready = True

    # -- putting in -----------------------------------------------------------------------------

    def enqueue(self, details: JobDetails) -> JobId:
        """Add a job durably; returns its id.

        Raises:
            UsageError: the details cannot be a job.
            NotFoundError: there is no such file version.
        """
        if not 1 <= len(details.plugin_name) <= _NAME_CHARS_MAX:
            raise UsageError(f"plugin_name wants 1 to {_NAME_CHARS_MAX} characters")
        overrides = None
        if details.config_overrides is not None:
            overrides = msgspec.json.encode(details.config_overrides).decode()
            parse_overrides(overrides)
        with self._ledger.transaction() as connection:
            if details.file_version_id is not None:
                found = connection.execute(
                    "SELECT 1 FROM cf_file_version WHERE id = $1", [details.file_version_id]
                ).fetchone()
                if found is None:
                    raise NotFoundError(f"there is no file version {details.file_version_id}")
            (job_id,) = self._ledger.new_job_ids(1)
            connection.execute(
                """
                INSERT INTO cf_processing_queue (id, file_version_id, plugin_name, input_file,
                    config_overrides, status, priority, scheduled_at, created_at)
                VALUES ($1, $2, $3, $4, $5, 'QUEUED', $6, make_timestamp($7), make_timestamp($8))
                """,
                [
                    job_id,
                    details.file_version_id,
                    details.plugin_name,
                    details.input_file,
                    overrides,
                    details.priority,
                    details.not_before_us or None,
                    self._clock.now().wall_us,
                ],
            )
        return JobId(job_id)

    # -- taking out -----------------------------------------------------------------------------

    def dequeue(self, owner: str = "") -> QueuedJob | None:
        """Lease the first job that may run: by priority, then age; None if there is none.

        Plugins paused by their circuit breaker are passed over.
        """
        now = self._clock.now()
        self.requeue_expired()
        rows = self._ledger.query(
            """
            SELECT id, plugin_name, attempt, file_version_id, input_file, priority,
                   config_overrides
            FROM cf_processing_queue
            WHERE status = 'QUEUED'
              AND (scheduled_at IS NULL OR scheduled_at <= make_timestamp($1))
              AND plugin_name NOT IN (SELECT plugin_name FROM cf_plugin_health WHERE paused)
            ORDER BY priority DESC, id LIMIT 1
            """,
            [now.wall_us],
        )
        if not rows:
            return None
        return self._lease(rows[0], owner, now)

    def _lease(self, row: dict[str, Any], owner: str, now: Now) -> QueuedJob:
        job_id, attempt = JobId(row["id"]), row["attempt"] + 1
        token = fencing_token(self._ledger.ledger_id, self._ledger.epoch, job_id, attempt)
        data = {
            "token": token,
            "owner": owner,
            "lease_expires_us": now.wall_us + int(self._lease_seconds * 1e6),
        }
        self._ledger.commit([Record(job_id, JournalKind.LEASED, attempt, now.wall_us, data)])
        self._deadlines[token] = now.mono + self._lease_seconds
        overrides = row["config_overrides"]
        return QueuedJob(
            job_id=job_id,
            token=token,
            plugin_name=row["plugin_name"],
            attempt=attempt,
            file_version_id=row["file_version_id"],
            input_file=row["input_file"],
            priority=row["priority"],
            config_overrides=msgspec.json.decode(overrides) if overrides else None,
        )

    def requeue_expired(self) -> int:
        """Put jobs whose lease has run out back into the queue; returns how many."""
        now = self._clock.now()
        expired = [t for t, deadline in self._deadlines.items() if deadline <= now.mono]
        return sum(self.requeue(token, reason=Reason.LEASE_LOST) for token in expired)

    # -- under a lease --------------------------------------------------------------------------

    def ack(self, token: Token) -> bool:
        """The work has begun. False if the token is stale."""
        return self._move(token, JournalKind.STARTED, None, ensure_started=False)

    def renew(self, token: Token) -> bool:
        """Hold the job for another `lease_seconds`. False if the token is stale."""
        if token not in self._deadlines:
            return False
        self._deadlines[token] = self._clock.now().mono + self._lease_seconds
        return True

    def conclude_success(
        self, token: Token, *, summary: str = "", metrics: dict[str, int] | None = None
    ) -> bool:
        """The job is COMPLETED. False, and nothing changed, if the token is stale."""
        data = {
            "completion": CompletionStatus.SUCCESS,
            "summary": summary or None,
            "metrics": metrics or {},
        }
        return self._move(token, JournalKind.COMPLETED, data, ensure_started=True)

    def conclude_failure(
        self,
        token: Token,
        message: str,
        *,
        reason: Reason = Reason.PLUGIN_ERROR,
        transient: bool = True,
    ) -> bool:
        """The attempt failed: retried later, or FAILED with a dead letter when that is used up.

        Returns:
            False, and nothing changed, if the token is stale.
        """
        held = self._held(token)
        if held is None:
            return False
        retries = self.get(held)["retry_count"]
        if not (transient and self._retry.allows(retries)):
            letter = "max_retries_exceeded" if transient else "permanent_error"
            data: dict[str, Any] = {"reason": reason, "message": message, "dead_letter": letter}
            return self._move(token, JournalKind.FAILED, data, ensure_started=True)
        delay_us = int(self._retry.delay_s(retries + 1, self._rng) * 1e6)
        data = {
            "reason": reason,
            "message": message,
            "not_before_us": self._clock.now().wall_us + delay_us,
            "retry_count": retries + 1,
        }
        return self._move(token, JournalKind.RETRIED, data, ensure_started=True)

    def requeue(self, token: Token, *, reason: Reason = Reason.BUSY) -> bool:
        """Give the job back undone; that is no failed attempt. False if the token is stale."""
        return self._move(token, JournalKind.RETURNED, {"reason": reason}, ensure_started=False)

    def _held(self, token: Token) -> JobId | None:
        """The job whose current lease this token is."""
        parts = parse_token(token)
        if parts is None or token not in self._deadlines:
            return None
        return parts.job_id if self._ledger.status_of(parts.job_id) in LEASED else None

    def _move(
        self,
        token: Token,
        kind: JournalKind,
        data: dict[str, Any] | None,
        *,
        ensure_started: bool,
    ) -> bool:
        job_id, parts = self._held(token), parse_token(token)
        if job_id is None or parts is None:
            self._deadlines.pop(token, None)
            return False
        at_us = self._clock.now().wall_us
        begun = self._ledger.status_of(job_id) is JobStatus.RUNNING
        if kind is JournalKind.STARTED and begun:
            return True
        records = [Record(job_id, kind, parts.attempt, at_us, data)]
        if ensure_started and not begun:
            records.insert(0, Record(job_id, JournalKind.STARTED, parts.attempt, at_us))
        self._ledger.commit(records)
        if kind is not JournalKind.STARTED:
            del self._deadlines[token]
        return True

    # -- looking and cancelling -----------------------------------------------------------------

    def cancel(self, job_id: int) -> bool:
        """Abort a job that is not granted or finished; its lease, if any, turns stale.

        Raises:
            NotFoundError: there is no such job.
        """
        row = self.get(job_id)
        status = JobStatus(row["status"])
        if status in TERMINAL or status is JobStatus.STAGED:
            return False
        data = {"reason": Reason.CANCELLED, "message": "Cancelled by user"}
        at_us = self._clock.now().wall_us
        self._ledger.commit(
            [Record(JobId(job_id), JournalKind.ABORTED, row["attempt"], at_us, data)]
        )
        self._deadlines.pop(Token(row["lease_token"] or ""), None)
        return True

    def get(self, job_id: int) -> dict[str, Any]:
        """The job's row.

        Raises:
            NotFoundError: there is no such job.
        """
        rows = self._ledger.query("SELECT * FROM cf_processing_queue WHERE id = $1", [job_id])
        if not rows:
            raise NotFoundError(f"there is no job {job_id}")
        return rows[0]

    def stats(self) -> dict[JobStatus, int]:
        """How many jobs are in each status."""
        self._ledger.fold()
        with self._ledger.reader() as connection:
            return load_counts(connection)
