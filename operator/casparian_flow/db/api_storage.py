"""Jobs, events and approvals of the control plane API, in the ledger.

    storage = ApiStorage.open("duckdb:casparian_flow.duckdb")
    job_id = storage.create_job(HttpJobType.RUN, "my_parser", "1.0.0", "/data/input")
    storage.update_job_status(job_id, HttpJobStatus.RUNNING)
    storage.insert_event(job_id, EventType.JobStarted())

What a method returns is durable. Events of a job are numbered 1, 2, 3 … without a gap; a finished
job is not changed any more; of two decisions on one request exactly one counts. The rules are in
api_jobs.py and api_approvals.py, how calls share a transaction in group_commit.py.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from casparian_flow.db import api_approvals, api_jobs, api_retention, api_runs
from casparian_flow.db.api_checks import checked, checked_id, checked_text, checked_word
from casparian_flow.db.api_state import Connection, Unit, checked_event, rows, state_of
from casparian_flow.db.api_tables import API_TABLES
from casparian_flow.db.deadlines import Deadlines
from casparian_flow.db.group_commit import DirectDoor, GroupCommit, LedgerDoor
from casparian_flow.db.job_queue import DbConnection
from casparian_flow.db.ledger import Ledger, open_ledger_at
from casparian_flow.domain.clock import Clock, SystemClock, utc
from casparian_flow.domain.errors import (
    CasparianError,
    ConflictError,
    LedgerLockedError,
    SentinelUnreachableError,
    UsageError,
)
from casparian_flow.domain.ids import JobId
from casparian_flow.protocol.http_types import (
    NAME_CHARS_MAX,
    Approval,
    ApprovalBinding,
    ApprovalOperation,
    ApprovalStatus,
    Cleaned,
    Event,
    EventPayload,
    HttpJob,
    HttpJobStatus,
    HttpJobType,
    JobProgress,
    JobResult,
    JobSpec,
    OperationPayload,
    OutputInfo,
    decode_operation,
    new_approval_id,
)

if TYPE_CHECKING:
    from casparian_flow.sentinel.api import ApiClient

T = TypeVar("T")
WAIT_S_MAX: Final = 60.0
"""Longest wait for news in one call; who follows a job asks again."""
WAITERS_MAX: Final = 128
"""Calls that wait for news without a thread of their own."""
APPROVAL_AGE: Final = timedelta(hours=1)
"""How long a request waits for a decision, if nothing else is said."""
OPEN_WAIT_S: Final = 10.0
OPEN_POLL_S: Final = 0.1
_SCHEME: Final = "duckdb:"
_US_PER_HOUR: Final = 3_600_000_000
HOURS_MAX: Final = 1e7
"""An age beyond every ledger's."""


class ApiStorage:
    """See the module's text. Safe for several threads.

    Args:
        connection: a ledger that is open in this process; closed with this object only if it
            was opened by `open`.
        clock: by default the connection's, or the system's.
        allow_self_approval: whether who asked may also decide.
        door: another way to the ledger than the calling thread, such as the ledger's thread.
    """

    def __init__(
        self,
        connection: DbConnection | Ledger | None = None,
        *,
        clock: Clock | None = None,
        allow_self_approval: bool = True,
        door: LedgerDoor | None = None,
    ) -> None:
        if connection is None and door is None:
            raise UsageError("ApiStorage wants a connection, or a door to one")
        own_clock = connection.clock if isinstance(connection, DbConnection) else SystemClock()
        ledger = connection.ledger if isinstance(connection, DbConnection) else connection
        self._clock = clock or own_clock
        self._allow_self = allow_self_approval
        self._door: LedgerDoor = door or DirectDoor(_required(ledger))
        self._commits = GroupCommit(self._door, self._clock)
        self._deadlines = Deadlines(self._clock)
        self._owned: Ledger | None = None
        self.news: Callable[[], None] = _nobody
        """Called after what may give a Sentinel something to do."""

    @classmethod
    def open(
        cls,
        url: str | Path,
        *,
        clock: Clock | None = None,
        allow_self_approval: bool = True,
        control_address: str = "",
    ) -> "ApiClient":
        """The storage in a ledger file: `duckdb:PATH`, or `duckdb::memory:`.

        If a Sentinel has the file open, the same calls go over its control socket, and it
        decides who may approve.

        Args:
            control_address: where that Sentinel listens, if not beside the ledger.

        Raises:
            UsageError: no such URL.
            LedgerLockedError: somebody has the ledger open and answers to nobody.
            LedgerError: the ledger cannot be used.
        """
        clock = clock or SystemClock()
        place = str(url).removeprefix(_SCHEME)
        if not place or "://" in place:
            raise UsageError(
                f"{str(url)[:200]!r} is no ledger", hint="Use duckdb:PATH or duckdb::memory:."
            )
        if place == ":memory:":
            opened: Ledger | ApiClient = Ledger.in_memory(clock=clock)
        else:
            opened = _open_or_ask(Path(place), control_address, clock)
        if not isinstance(opened, Ledger):
            return opened
        storage = cls(opened, clock=clock, allow_self_approval=allow_self_approval)
        storage._owned = opened
        return storage

    def close(self) -> None:
        """Close the ledger, if `open` opened it; harmless when repeated."""
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, write: Callable[[Unit], T]) -> T:
        return self._commits.submit(write).result()

    def _read(self, look: Callable[[Connection], T]) -> T:
        return self._door.call(lambda ledger: ledger.read(look)).result()

    def _on_ledger(self, fn: Callable[[Ledger], T]) -> T:
        return self._door.call(fn).result()

    def init_schema(self) -> None:
        """See that the tables are there; a ledger makes them when it is made. Idempotent."""
        tables = ", ".join(API_TABLES)
        self._read(lambda connection: rows(connection, f"SELECT 1 FROM {tables} LIMIT 0"))

    # -- jobs -----------------------------------------------------------------------------------

    def create_job(
        self,
        job_type: HttpJobType,
        plugin_name: str,
        plugin_version: str | None,
        input_dir: str,
        output_sink: str | None = None,
        approval_id: str | None = None,
        *,
        spec_json: str | None = None,
    ) -> JobId:
        job = api_jobs.new_job(
            job_type, plugin_name, plugin_version, input_dir, output_sink, approval_id, spec_json
        )
        return self._write(lambda unit: api_jobs.create_job(unit, job))

    def start_job(
        self,
        job_type: HttpJobType,
        plugin_name: str,
        plugin_version: str | None,
        input_dir: str,
        output_sink: str | None = None,
        *,
        spec: JobSpec | None = None,
    ) -> JobId:
        asked, kind = checked(spec or JobSpec()), checked_word(HttpJobType, job_type)
        job = self._on_ledger(
            lambda ledger: api_runs.new_run(
                ledger, kind, plugin_name, plugin_version, input_dir, output_sink, asked
            )
        )
        job_id = self._write(lambda unit: api_jobs.create_job(unit, job))
        self.news()
        return job_id

    def get_job(self, job_id: int) -> HttpJob | None:
        return self._read(lambda connection: api_jobs.get_job(connection, job_id))

    def list_jobs(
        self, status: HttpJobStatus | None = None, limit: int = 1_000, offset: int = 0
    ) -> list[HttpJob]:
        word = None if status is None else checked_word(HttpJobStatus, status)
        return self._read(lambda connection: api_jobs.list_jobs(connection, word, limit, offset))

    def update_job_status(
        self, job_id: int, status: HttpJobStatus, error_message: str | None = None
    ) -> bool:
        checked_id(job_id)
        word = checked_word(HttpJobStatus, status)
        message = checked_text(error_message, "error_message")
        return self._write(lambda unit: api_jobs.update_status(unit, job_id, word, message))

    def update_job_progress(
        self,
        job_id: int,
        phase: str,
        items_done: int,
        items_total: int | None = None,
        message: str | None = None,
    ) -> bool:
        checked_id(job_id)
        progress = checked(
            JobProgress(
                phase=phase, items_done=items_done, items_total=items_total, message=message
            )
        )
        return self._write(lambda unit: api_jobs.update_part(unit, job_id, "progress", progress))

    def update_job_result(
        self,
        job_id: int,
        rows_processed: int,
        bytes_written: int | None = None,
        outputs: Sequence[OutputInfo] = (),
        metrics: dict[str, int] | None = None,
    ) -> bool:
        checked_id(job_id)
        result = checked(
            JobResult(
                rows_processed=rows_processed,
                bytes_written=bytes_written,
                outputs=list(outputs),
                metrics=metrics or {},
            )
        )
        return self._write(lambda unit: api_jobs.update_part(unit, job_id, "result", result))

    def finish_job(
        self,
        job_id: int,
        status: HttpJobStatus,
        error_message: str | None = None,
        result: JobResult | None = None,
    ) -> bool:
        checked_id(job_id)
        word = checked_word(HttpJobStatus, status)
        message = checked_text(error_message, "error_message")
        sound = None if result is None else checked(result)
        return self._write(lambda unit: api_jobs.finish_job(unit, job_id, word, message, sound))

    def cancel_job(self, job_id: int) -> bool:
        checked_id(job_id)
        cancelled = self._write(lambda unit: api_jobs.cancel_job(unit, job_id))
        self.news()
        return cancelled

    # -- events ---------------------------------------------------------------------------------

    def next_event_id(self, job_id: int) -> int:
        return self._read(lambda connection: api_jobs.next_event_id(connection, job_id))

    def insert_event(self, job_id: int, event: EventPayload) -> int:
        return self.insert_later(job_id, event).result()

    def insert_later(self, job_id: int, event: EventPayload) -> "Future[int]":
        """`insert_event` without a thread that waits for the commit.

        Raises:
            UsageError: an argument does not fit.
        """
        checked_id(job_id)
        sound = checked_event(event)
        return self._commits.submit(lambda unit: api_jobs.insert_events(unit, job_id, [sound])[0])

    def insert_events(self, job_id: int, events: Sequence[EventPayload]) -> list[int]:
        checked_id(job_id)
        sound = [checked_event(event) for event in events]
        return self._write(lambda unit: api_jobs.insert_events(unit, job_id, sound))

    def list_events(
        self, job_id: int, after: int | None = None, limit: int | None = None
    ) -> list[Event]:
        first = checked_id(after or 0)
        return self._read(lambda connection: api_jobs.list_events(connection, job_id, first, limit))

    def wait_events(
        self, job_id: int, after: int, timeout_seconds: float, limit: int = 1_000
    ) -> list[Event]:
        timeout_s = checked_wait(timeout_seconds)
        first = checked_id(after)
        events, news = self._door.call(_watching(job_id, first, limit)).result()
        if news is None:
            return events
        try:
            news.result(timeout_s)
        except FutureTimeoutError:
            news.cancel()
        return self._door.call(_listing(job_id, first, limit)).result()

    def events_later(
        self, job_id: int, after: int, timeout_seconds: float, limit: int = 1_000
    ) -> "Future[list[Event]]":
        """`wait_events` without a thread that waits.

        Raises:
            UsageError: an argument does not fit.
            ConflictError: WAITERS_MAX calls wait already.
        """
        timeout_s, first = checked_wait(timeout_seconds), checked_id(after)
        if len(self._deadlines) >= WAITERS_MAX:
            raise ConflictError(
                f"{WAITERS_MAX} callers wait for news already",
                hint="Ask without waiting, or later.",
            )
        answer: Future[list[Event]] = Future()
        again = _listing(job_id, first, limit)

        def looked(call: "Future[tuple[list[Event], Future[None] | None]]") -> None:
            if (error := call.exception()) is not None:
                answer.set_exception(error)
                return
            events, news = call.result()
            if news is None:
                answer.set_result(events)
                return
            news.add_done_callback(self._then(again, answer))
            self._deadlines.cancel_after(timeout_s, news)

        self._door.call(_watching(job_id, first, limit)).add_done_callback(looked)
        return answer

    def _then(
        self, fn: Callable[[Ledger], T], answer: "Future[T]"
    ) -> "Callable[[Future[None]], None]":
        """What asks the ledger once more, and answers."""

        def done(call: "Future[T]") -> None:
            if (error := call.exception()) is not None:
                answer.set_exception(error)
            else:
                answer.set_result(call.result())

        def ask(_: "Future[None]") -> None:
            try:
                self._door.call(fn).add_done_callback(done)
            except CasparianError as error:
                answer.set_exception(error)

        return ask

    # -- approvals ------------------------------------------------------------------------------

    @staticmethod
    def generate_approval_id() -> str:
        """A new id, UUID version 4."""
        return new_approval_id()

    def create_approval(
        self,
        approval_id: str,
        operation: OperationPayload,
        summary: str,
        expires_in: timedelta,
        *,
        requester: str | None = None,
        binding: ApprovalBinding | None = None,
    ) -> None:
        if not checked_text(approval_id, "approval_id", chars_max=NAME_CHARS_MAX):
            raise UsageError("approval_id wants some text", hint="Use generate_approval_id().")
        if not isinstance(operation, OperationPayload):
            raise UsageError(
                f"{type(operation).__name__} is no operation",
                hint="Use a class of ApprovalOperation, as an instance.",
            )
        if not isinstance(expires_in, timedelta):
            raise UsageError("expires_in wants a timedelta")
        asked = checked(operation, decode_operation)
        told = checked_text(summary, "summary") or ""
        who = checked_text(requester, "requester", chars_max=NAME_CHARS_MAX)
        bound = None if binding is None else checked(binding)
        age_us = expires_in // timedelta(microseconds=1)
        self._write(
            lambda unit: api_approvals.create_approval(
                unit, approval_id, asked, told, age_us, who, bound
            )
        )

    def request_run(
        self,
        plugin_name: str,
        plugin_version: str | None,
        input_dir: str,
        output_sink: str | None = None,
        *,
        spec: JobSpec | None = None,
        expires_in: timedelta = APPROVAL_AGE,
        requester: str | None = None,
    ) -> Approval:
        operation = checked(
            ApprovalOperation.Run(
                plugin_name=plugin_name,
                plugin_version=plugin_version,
                input_dir=input_dir,
                file_count=0,
                output=output_sink,
                spec=checked(spec or JobSpec()),
            ),
            decode_operation,
        )
        who = checked_text(requester, "requester", chars_max=NAME_CHARS_MAX)
        return self._on_ledger(
            lambda ledger: api_runs.request_run(ledger, self._clock, operation, expires_in, who)
        )

    def get_approval(self, approval_id: str) -> Approval | None:
        now = utc(self._clock.now().wall_us)
        return self._read(lambda c: api_approvals.get_approval(c, _word(approval_id), now))

    def list_approvals(
        self, status: ApprovalStatus | None = None, limit: int = 1_000, offset: int = 0
    ) -> list[Approval]:
        word = None if status is None else checked_word(ApprovalStatus, status)
        now = utc(self._clock.now().wall_us)
        return self._read(lambda c: api_approvals.list_approvals(c, word, now, limit, offset))

    def approve(
        self,
        approval_id: str,
        decided_by: str | None = None,
        *,
        binding: ApprovalBinding | None = None,
    ) -> bool:
        who = checked_text(decided_by, "decided_by", chars_max=NAME_CHARS_MAX)
        word, allow = _word(approval_id), self._allow_self
        if binding is None:
            approved = self._on_ledger(
                lambda ledger: api_runs.approve(ledger, self._clock, word, who, allow_self=allow)
            )
            self.news()
            return approved
        bound = checked(binding)
        return self._write(
            lambda unit: api_approvals.approve(unit, word, who, bound, allow_self=allow)
        )

    def reject(
        self, approval_id: str, decided_by: str | None = None, reason: str | None = None
    ) -> bool:
        who = checked_text(decided_by, "decided_by", chars_max=NAME_CHARS_MAX)
        why = checked_text(reason, "reason")
        return self._write(lambda unit: api_approvals.reject(unit, _word(approval_id), who, why))

    def expire_approvals(self) -> int:
        now = utc(self._clock.now().wall_us)
        if not self._read(lambda connection: api_approvals.overdue(connection, now)):
            return 0
        return self._write(api_approvals.expire_approvals)

    def link_approval_to_job(self, approval_id: str, job_id: int) -> bool:
        checked_id(job_id)
        return self._write(lambda unit: api_approvals.link(unit, _word(approval_id), job_id))

    def start_approved(
        self,
        approval_id: str,
        *,
        binding: ApprovalBinding | None = None,
        spec_json: str | None = None,
    ) -> JobId | None:
        bound = None if binding is None else checked(binding)
        return self._write(
            lambda unit: api_approvals.start_approved(unit, _word(approval_id), bound, spec_json)
        )

    def mark_stale(self, approval_id: str, changes: Sequence[str]) -> bool:
        told = [checked_text(line, "changes") or "" for line in changes]
        return self._write(lambda unit: api_approvals.mark_stale(unit, _word(approval_id), told))

    # -- retention ------------------------------------------------------------------------------

    def cleanup_old_data(self, job_ttl_hours: float, event_ttl_hours: float) -> Cleaned:
        ages = [_age_us(job_ttl_hours), _age_us(event_ttl_hours)]
        return self._write(lambda unit: api_retention.clean_up(unit, *ages))


def _listing(job_id: int, after: int, limit: int) -> Callable[[Ledger], list[Event]]:
    return lambda ledger: ledger.read(lambda c: api_jobs.list_events(c, job_id, after, limit))


def _watching(
    job_id: int, after: int, limit: int
) -> "Callable[[Ledger], tuple[list[Event], Future[None] | None]]":
    """The events after `after`; if there is none, a future that is done when one may be."""
    listing = _listing(job_id, after, limit)

    def look(ledger: Ledger) -> "tuple[list[Event], Future[None] | None]":
        # In this order, so that what comes between the two is not missed.
        news = state_of(ledger).waiters.register(job_id)
        found = listing(ledger)
        if found:
            news.cancel()
        return found, None if found else news

    return look


def _nobody() -> None:
    """Nobody carries jobs out here."""


def _required(ledger: Ledger | None) -> Ledger:
    assert ledger is not None
    return ledger


def _word(approval_id: str) -> str:
    return checked_text(approval_id, "approval_id", chars_max=NAME_CHARS_MAX) or ""


def checked_wait(seconds: object) -> float:
    """Raises:
    UsageError: no time that a call may wait.
    """
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not 0 <= seconds <= WAIT_S_MAX
    ):
        raise UsageError(f"a wait is 0 to {WAIT_S_MAX:g} seconds, not {str(seconds)[:80]}")
    return float(seconds)


def _age_us(hours: object) -> int:
    if isinstance(hours, bool) or not isinstance(hours, int | float) or not 0 <= hours <= HOURS_MAX:
        raise UsageError(f"{str(hours)[:80]} is no number of hours")
    return int(hours * _US_PER_HOUR)


def _open_or_ask(path: Path, control_address: str, clock: Clock) -> "Ledger | ApiClient":
    """The ledger, once whoever has it open lets it go, or the Sentinel that has it.

    A Sentinel that is just starting or stopping holds it without answering.
    """
    deadline = clock.now().mono + OPEN_WAIT_S
    while True:
        try:
            return Ledger.open(path, clock=clock)
        except LedgerLockedError:
            client = _sentinel(path, control_address)
            if client is not None:
                return client
            if open_ledger_at(path) is not None or clock.now().mono >= deadline:
                raise
        threading.Event().wait(OPEN_POLL_S)


def _sentinel(path: Path, control_address: str) -> "ApiClient | None":
    # Imported late: the control client needs zmq, and this module must not.
    from casparian_flow.sentinel import paths
    from casparian_flow.sentinel.control import remote

    client = remote(paths.control_address(path, control_address))
    try:
        client.ping()
    except SentinelUnreachableError:
        client.close()
        return None
    return client.api
