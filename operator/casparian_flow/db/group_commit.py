"""Many callers' writes in one transaction.

A write is a function of a `Unit`. What is submitted while a transaction is under way is gathered
into the next one, so that the cost of a commit is shared exactly when there is something to
share; each caller's future is settled when its transaction is durable. A write that refuses
before it has changed anything fails alone; after any other failure the writes of that
transaction are tried again one by one, so that none spoils another's.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

from casparian_flow.db.api_state import Unit, state_of
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, LedgerError

T = TypeVar("T")
GATHER_MAX: Final = 1_000
"""Writes in one transaction; bounds its time."""
PATIENCE: Final = 0.5
"""Wait for those who shared the last transaction, in times of what it took."""
PATIENCE_S_MAX: Final = 0.005

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

    def call(self, fn: Callable[[Ledger], T]) -> "Future[T]":
        future: Future[T] = Future()
        try:
            future.set_result(fn(self._ledger))
        except BaseException as error:  # noqa: BLE001 - raised again where it is asked for
            future.set_exception(error)
        return future


@contextmanager
def transaction_of(ledger: Ledger, clock: Clock, *, folded: bool = False) -> Iterator[Unit]:
    """One transaction as a `Unit`; who waits for news of its jobs is woken once it is durable.

    Args:
        folded: as of `Ledger.transaction`.
    """
    state = state_of(ledger)
    try:
        with ledger.transaction(folded=folded) as connection:
            unit = Unit(ledger, connection, state.heads, clock)
            yield unit
            unit.flush()
    except BaseException:
        state.heads.clear()
        raise
    state.waiters.wake(unit.touched)


class GroupCommit:
    """See the module's text."""

    def __init__(self, door: LedgerDoor, clock: Clock) -> None:
        self._door = door
        self._clock = clock
        self._changed = threading.Condition()
        self._pending: deque[_Pending] = deque()
        self._leading = False
        """Whether a caller's own thread is at work on a round."""
        self._asked = False
        """Whether a round is on its way to the ledger's thread; what is pending goes with it."""
        self._last_size = 0
        self._last_s = 0.0

    def submit(self, write: Callable[[Unit], T]) -> "Future[T]":
        """Run a write in the next transaction.

        The future fails with the write's own error, with the LedgerError of the commit, or with
        what the door says once the ledger is being closed.
        """
        future: Future[T] = Future()
        pending = (write, future)
        with self._changed:
            self._pending.append(pending)
            self._changed.notify_all()
        if isinstance(self._door, DirectDoor):
            self._lead(future)
            return future
        self._ask()
        return future

    def _ask(self) -> None:
        """See that a round is on its way to the ledger's thread."""
        with self._changed:
            if self._asked:
                return
            self._asked = True
        try:
            self._door.call(self._asked_round)
        except Exception as error:  # noqa: BLE001 - raised again where the results are asked for
            # The ledger is being closed: nobody will ever take what is pending.
            with self._changed:
                self._asked = False
                abandoned = list(self._pending)
                self._pending.clear()
            for _, future in abandoned:
                future.set_exception(error)

    def _asked_round(self, ledger: Ledger) -> None:
        try:
            self._round(ledger)
        finally:
            if self._pending:
                # Asked for anew, so that others who use the ledger have their turn in between.
                self._ask()

    def _lead(self, future: "Future[Any]") -> None:
        """Wait for the rounds that another caller's thread works on, or do them."""
        while True:
            with self._changed:
                while self._leading and not future.done():
                    self._changed.wait()
                if future.done():
                    return
                self._leading = True
            try:
                done = self._door.call(self._round)
            finally:
                with self._changed:
                    self._leading = False
                    self._changed.notify_all()
            error = done.exception()
            if error is not None and not future.done():
                raise error

    def _round(self, ledger: Ledger) -> None:
        """Raises:
        LedgerError: the commit failed; the futures know as well.
        """
        taken = self._take()
        if taken:
            began = self._clock.now().mono
            self._commit(ledger, taken)
            self._last_s = self._clock.now().mono - began

    def _take(self) -> list[_Pending]:
        with self._changed:
            if 0 < len(self._pending) < self._last_size:
                # Those who shared the last transaction are about to be back: a moment's patience
                # saves them a transaction of their own.
                patience_s = min(PATIENCE * self._last_s, PATIENCE_S_MAX)
                self._changed.wait_for(lambda: len(self._pending) >= self._last_size, patience_s)
            self._asked = False
            count = min(len(self._pending), GATHER_MAX)
            if count:
                self._last_size = count
            return [self._pending.popleft() for _ in range(count)]

    def _commit(self, ledger: Ledger, writes: Sequence[_Pending]) -> None:
        try:
            results = self._transact(ledger, writes)
        except BaseException as error:
            if len(writes) == 1 or isinstance(error, LedgerError):
                for _, future in writes:
                    future.set_exception(error)
                if isinstance(error, LedgerError):
                    raise
                return
        else:
            for (_, future), result in zip(writes, results, strict=True):
                if isinstance(result, CasparianError):
                    future.set_exception(result)
                else:
                    future.set_result(result)
            return
        for write in writes:
            self._commit(ledger, [write])

    def _transact(self, ledger: Ledger, writes: Sequence[_Pending]) -> list[Any]:
        results: list[Any] = []
        with transaction_of(ledger, self._clock) as unit:
            for write, _ in writes:
                changes = unit.changes
                try:
                    results.append(write(unit))
                except CasparianError as refusal:
                    if unit.changes != changes:
                        raise
                    results.append(refusal)
        return results
