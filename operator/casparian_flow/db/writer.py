"""The thread that owns a ledger.

Everything submitted runs there, one thing after the other, in order. A commit starts at once
when the thread is idle; batches that arrive while it is busy are gathered into the next one, up
to GATHER_ITEMS, so that the cost of a commit is shared exactly when there is something to share.

After a failed commit everything that was submitted before the failure was observed fails as
well: those batches were decided on top of one that never happened. `completed` is where it is
observed.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import (
    InvariantError,
    LedgerError,
    LedgerUnavailableError,
)
from casparian_flow.domain.jobs import JournalKind
from casparian_flow.domain.records import BatchItem, Completion, GrantOutcome, Record

log = logging.getLogger(__name__)

T = TypeVar("T")
GATHER_ITEMS: Final = 4_000
"""Most items in one commit; bounds its time and memory."""
IDLE_SECONDS: Final = 0.05
"""Quiet time before the thread folds and checkpoints, so that a short lull does not start it."""


@dataclass(slots=True)
class _Batch:
    ticket: int
    items: Sequence[BatchItem]
    era: int


@dataclass(slots=True)
class _Call:
    run: Callable[[Ledger], Any]
    future: Future[Any]


class LedgerThread:
    """See the module's text.

    Args:
        ledger: owned from now on; nobody else calls it but through `call`.
        wake: called from the ledger's thread when something has completed; must not block.
    """

    def __init__(self, ledger: Ledger, wake: Callable[[], None]) -> None:
        self.ledger = ledger
        self._wake = wake
        self._work: deque[_Batch | _Call] = deque()
        self._done: deque[Completion] = deque()
        self._changed = threading.Condition()
        self._ticket = 0
        self._era = 0
        """Raised when a failure has been observed; batches of older eras fail unseen."""
        self._failed: LedgerError | None = None
        """The failure of this era, not observed yet."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    # -- for the main loop ----------------------------------------------------------------------

    def commit(self, batch: Sequence[BatchItem]) -> int:
        """Submit a batch; returns its ticket, one more than the last."""
        with self._changed:
            self._require_open()
            self._ticket += 1
            self._work.append(_Batch(self._ticket, batch, self._era))
            self._changed.notify()
            return self._ticket

    def completed(self) -> list[Completion]:
        """Commits that ended since the last call, in the order of submission."""
        with self._changed:
            done = list(self._done)
            self._done.clear()
            if self._failed is not None:
                done += self._void(self._failed)
        return done

    def call(self, fn: Callable[[Ledger], T]) -> "Future[T]":
        """Run something in the ledger's thread, after all that was submitted before."""
        future: Future[T] = Future()
        with self._changed:
            self._require_open()
            self._work.append(_Call(fn, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Do everything submitted, then close the ledger.

        Raises:
            LedgerError: the ledger could not be closed cleanly; nothing acknowledged is lost.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.ledger.close()

    def _require_open(self) -> None:
        if self._closing:
            raise InvariantError("the ledger's thread is closed")

    def _void(self, error: LedgerError) -> list[Completion]:
        """Fail the batches that were decided before the failure was known."""
        voided = [w for w in self._work if isinstance(w, _Batch)]
        self._work = deque(w for w in self._work if isinstance(w, _Call))
        self._failed = None
        self._era += 1
        return [Completion(batch.ticket, error=error) for batch in voided]

    # -- the ledger's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        idle = False
        while True:
            with self._changed:
                while not self._work and not self._closing:
                    if not self._changed.wait(None if idle else IDLE_SECONDS):
                        break
                if not self._work and self._closing:
                    return
                work = self._take()
            if work is None:
                self._rest()
                idle = True
                continue
            idle = False
            if isinstance(work, _Call):
                _perform(work, self.ledger)
                self._wake()
            else:
                self._commit(work)

    def _take(self) -> list[_Batch] | _Call | None:
        if not self._work:
            return None
        first = self._work.popleft()
        if isinstance(first, _Call):
            return first
        batches, size = [first], len(first.items)
        while self._work:
            following = self._work[0]
            if not isinstance(following, _Batch) or size + len(following.items) > GATHER_ITEMS:
                break
            self._work.popleft()
            batches.append(following)
            size += len(following.items)
        return batches

    def _commit(self, batches: list[_Batch]) -> None:
        with self._changed:
            error = self._failed
            if batches[0].era < self._era:
                error = LedgerUnavailableError("an earlier commit failed")
        outcomes: list[GrantOutcome] = []
        if error is None:
            try:
                outcomes = self.ledger.commit([item for b in batches for item in b.items])
            except LedgerError as failure:
                error = failure
            except Exception as bug:  # a bug may cost a batch, never the thread
                log.exception("a batch broke a rule of the ledger; nothing of it was written")
                error = LedgerUnavailableError(f"a batch was refused: {bug}")
                error.__cause__ = bug
        with self._changed:
            if error is None:
                self._done.extend(_split(batches, outcomes))
            else:
                if batches[0].era == self._era:
                    self._failed = error
                self._done.extend(Completion(b.ticket, error=error) for b in batches)
        self._wake()
        if error is None and self.ledger.fold_due:
            self._rest()

    def _rest(self) -> None:
        try:
            self.ledger.idle()
        except Exception:  # a bug may cost a fold, never the thread
            # The next commit or read meets the same trouble and reports it to those who ask.
            log.exception("the ledger could not be folded")


def _perform(call: _Call, ledger: Ledger) -> None:
    if not call.future.set_running_or_notify_cancel():
        return
    try:
        call.future.set_result(call.run(ledger))
    except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
        call.future.set_exception(error)


def _split(batches: list[_Batch], outcomes: list[GrantOutcome]) -> list[Completion]:
    """Give each batch the outcomes of its own GRANTED records."""
    completions = []
    position = 0
    for batch in batches:
        count = sum(
            1 for i in batch.items if isinstance(i, Record) and i.kind is JournalKind.GRANTED
        )
        completions.append(Completion(batch.ticket, outcomes[position : position + count]))
        position += count
    return completions
