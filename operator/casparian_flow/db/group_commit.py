"""Many callers' writes in one transaction.

A write is a function of a `Unit`. What is submitted while a transaction is under way is gathered
into the next one, so that the cost of a commit is shared exactly when there is something to
share; each caller's future is settled when its transaction is durable. A write that refuses
before it has changed anything fails alone; after any other failure the writes of that
transaction are tried again one by one, so that none spoils another's.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from casparian_flow.db.api_state import Unit, state_of
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, LedgerError

T = TypeVar("T")
GATHER_MAX: Final = 1_000
"""Writes in one transaction; bounds its time."""

Write = Callable[[Unit], Any]
_Pending = tuple[Write, "Future[Any]"]


class LedgerDoor(Protocol):
    """A way to the ledger for any thread: a ledger's thread, or `DirectDoor`."""

    def call(self, fn: Callable[[Ledger], T]) -> "Future[T]":
        """Run something where the ledger is; the future gets its result or error."""


class DirectDoor:
    """To a ledger that no thread owns: the caller's thread does the work."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.RLock()

    def call(self, fn: Callable[[Ledger], T]) -> "Future[T]":
        future: Future[T] = Future()
        with self._lock:
            try:
                future.set_result(fn(self._ledger))
            except BaseException as error:  # noqa: BLE001 - raised again where it is asked for
                future.set_exception(error)
        return future


class GroupCommit:
    """See the module's text."""

    def __init__(self, door: LedgerDoor, clock: Clock) -> None:
        self._door = door
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: deque[_Pending] = deque()

    def submit(self, write: Callable[[Unit], T]) -> "Future[T]":
        """Run a write in the next transaction.

        The future fails with the write's own error, or with the LedgerError of the commit.

        Raises:
            CasparianError: the ledger is being closed.
        """
        future: Future[T] = Future()
        pending = (write, future)
        with self._lock:
            self._pending.append(pending)
        try:
            # Every write asks for a round; those whose writes an earlier one took find nothing.
            self._door.call(self._round)
        except BaseException:
            with self._lock, suppress(ValueError):
                self._pending.remove(pending)
            raise
        return future

    def _round(self, ledger: Ledger) -> None:
        """Raises:
        LedgerError: the commit failed; the futures know as well.
        """
        with self._lock:
            count = min(len(self._pending), GATHER_MAX)
            taken = [self._pending.popleft() for _ in range(count)]
        if taken:
            self._commit(ledger, taken)

    def _commit(self, ledger: Ledger, writes: Sequence[_Pending]) -> None:
        try:
            results, unit = self._transact(ledger, writes)
        except BaseException as error:
            if len(writes) == 1 or isinstance(error, LedgerError):
                for _, future in writes:
                    future.set_exception(error)
                if isinstance(error, LedgerError):
                    raise
                return
        else:
            state_of(ledger).waiters.wake(unit.touched)
            for (_, future), result in zip(writes, results, strict=True):
                if isinstance(result, CasparianError):
                    future.set_exception(result)
                else:
                    future.set_result(result)
            return
        for write in writes:
            self._commit(ledger, [write])

    def _transact(self, ledger: Ledger, writes: Sequence[_Pending]) -> tuple[list[Any], Unit]:
        state = state_of(ledger)
        results: list[Any] = []
        try:
            with ledger.transaction(folded=False) as connection:
                unit = Unit(ledger, connection, state.heads, self._clock)
                for write, _ in writes:
                    changes = unit.changes
                    try:
                        results.append(write(unit))
                    except CasparianError as refusal:
                        if unit.changes != changes:
                            raise
                        results.append(refusal)
                unit.flush()
        except BaseException:
            state.heads.clear()
            raise
        return results, unit
