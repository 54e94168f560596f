"""What the API remembers of a ledger between transactions, and one transaction of it.

The heads spare a look into the tables for every event: where a job stands and its last event's
id. They are filled from the tables, changed by writes, and forgotten when a transaction fails,
so the tables alone are the truth.
"""

import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

import duckdb

from casparian_flow.db.api_checks import checked
from casparian_flow.db.api_tables import EVENTS, JOBS
from casparian_flow.db.columns import RowShape
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.protocol.http_types import (
    EVENT_TYPES,
    EventPayload,
    EventType,
    HttpJobStatus,
    decode_event,
    encode_payload,
)

Connection = duckdb.DuckDBPyConnection
HEADS_MAX: Final = 10_000
_EVENT_SHAPE: Final = RowShape(
    EVENTS,
    {
        "id": "BIGINT",
        "event_id": "BIGINT",
        "job_id": "BIGINT",
        "event_type": "VARCHAR",
        "timestamp": "TIMESTAMP",
        "payload_json": "VARCHAR",
    },
)


@dataclass(frozen=True, slots=True)
class CheckedEvent:
    """An event whose fields are known to fit.

    Attributes:
        tells: how the job ended, if it tells that.
    """

    event_type: str
    json: str
    tells: HttpJobStatus | None


def checked_event(event: EventPayload) -> CheckedEvent:
    """Raises:
    UsageError: it is no event, or a field of it does not fit.
    """
    if getattr(event, "event_type", None) not in EVENT_TYPES:
        raise UsageError(
            f"{type(event).__name__} is no event", hint="Use a class of EventType, as an instance."
        )
    fitting = checked(event, decode_event)
    tells = status_told(fitting)
    if tells is not None and not tells.is_terminal:
        raise UsageError(
            f"a job does not finish as {tells}", hint="Use completed, failed or cancelled."
        )
    return CheckedEvent(fitting.event_type, encode_payload(fitting), tells)


def status_told(event: EventPayload) -> HttpJobStatus | None:
    return HttpJobStatus(event.status) if isinstance(event, EventType.JobFinished) else None


@dataclass(slots=True)
class Head:
    """Where an API job stands.

    Attributes:
        last_event_id: 0 before the first event.
        told: the status in its newest job_finished event, None before there is one.
    """

    status: HttpJobStatus
    last_event_id: int = 0
    told: HttpJobStatus | None = None


class Waiters:
    """Who waits for news of a job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[int, set[Future[None]]] = {}

    def register(self, job_id: int) -> "Future[None]":
        """A future that is done when the job has an event more, or has changed its status."""
        future: Future[None] = Future()
        with self._lock:
            self._futures.setdefault(job_id, set()).add(future)
        future.add_done_callback(lambda _: self._discard(job_id, future))
        return future

    def _discard(self, job_id: int, future: "Future[None]") -> None:
        with self._lock:
            waiting = self._futures.get(job_id, set())
            waiting.discard(future)
            if not waiting:
                self._futures.pop(job_id, None)

    def wake(self, job_ids: Iterable[int]) -> None:
        with self._lock:
            futures = [f for job_id in job_ids for f in self._futures.pop(job_id, ())]
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_result(None)


@dataclass(slots=True)
class State:
    heads: dict[int, Head] = field(default_factory=dict)
    waiters: Waiters = field(default_factory=Waiters)


_states: "weakref.WeakKeyDictionary[Ledger, State]" = weakref.WeakKeyDictionary()
_states_lock = threading.Lock()


def state_of(ledger: Ledger) -> State:
    """The one state that belongs to a ledger, whoever asks."""
    with _states_lock:
        return _states.setdefault(ledger, State())


class Unit:
    """One transaction; its writes run one after the other.

    Attributes:
        changes: grows with every change.
        touched: jobs whose waiters are woken once it is durable.
    """

    def __init__(
        self,
        ledger: Ledger,
        connection: Connection,
        heads: dict[int, Head],
        clock: Clock,
    ) -> None:
        self.ledger = ledger
        self.changes = 0
        self.touched: set[int] = set()
        self._connection = connection
        self._heads = heads
        self._clock = clock
        self._events: list[tuple[int, int, int, str, int, str]] = []

    def now_us(self) -> int:
        return self._clock.now().wall_us

    def look(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows as dicts by column name; events added in this transaction are not seen."""
        return rows(self._connection, sql, parameters)

    def change(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run a statement that changes something; returns how many rows it changed."""
        self.changes += 1
        row = self._connection.execute(sql, list(parameters)).fetchone()
        return int(row[0]) if row else 0

    def connection_for_change(self) -> Connection:
        """The transaction's connection, for changes of several statements."""
        self.changes += 1
        return self._connection

    def head(self, job_id: int) -> Head:
        """Raises:
        NotFoundError: there is no such job.
        """
        head = self._heads.get(job_id)
        if head is None:
            head = load_head(self._connection, job_id)
            if len(self._heads) >= HEADS_MAX and not self._events:
                self._heads.clear()
            self._heads[job_id] = head
        return head

    def forget_heads(self) -> None:
        """After jobs or events have been deleted; to be called without added events."""
        self._heads.clear()

    def add_event(self, job_id: int, event: "CheckedEvent") -> int:
        """Append an event to a job; returns its id, one more than the last one's.

        Raises:
            NotFoundError: there is no such job.
        """
        head = self.head(job_id)
        self.changes += 1
        head.last_event_id += 1
        head.told = event.tells or head.told
        row_id = self.ledger.next_id(EVENTS)
        self._events.append(
            (row_id, head.last_event_id, job_id, event.event_type, self.now_us(), event.json)
        )
        self.touched.add(job_id)
        return head.last_event_id

    def flush(self) -> None:
        """Write the added events."""
        _EVENT_SHAPE.insert(self._connection, self._events)
        self._events = []


def load_head(connection: Connection, job_id: int) -> Head:
    """Raises:
    NotFoundError: there is no such job.
    """
    found = rows(
        connection,
        f"""
        SELECT j.status, j.events_removed_to AS removed, e.last, e.finished
        FROM {JOBS} j, (
            SELECT max(event_id) AS last,
                   arg_max(payload_json, event_id) FILTER (event_type = 'job_finished') AS finished
            FROM {EVENTS} WHERE job_id = $1
        ) e WHERE j.job_id = $1
        """,
        [job_id],
    )
    if not found:
        raise no_api_job(job_id)
    row = found[0]
    status = HttpJobStatus(row["status"])
    told = None
    if row["finished"]:
        told = status_told(decode_event(row["finished"]))
    elif row["removed"]:
        told = status  # only a finished job's events are ever removed, its last one among them
    return Head(status, max(row["removed"], row["last"] or 0), told)


def no_api_job(job_id: int) -> NotFoundError:
    return NotFoundError(f"there is no API job {job_id}")


def rows(connection: Connection, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """The rows of one SELECT, times as the database has them."""
    cursor = connection.execute(sql, list(parameters))
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
