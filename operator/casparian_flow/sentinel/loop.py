"""The core's loop and its door for other threads.

One thread calls `turn`; control calls come from others. They never touch the core: they leave a
function in the inbox, which runs between two turns, and wait for a future.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, CommitFailedError, SentinelUnreachableError
from casparian_flow.domain.records import BatchItem, Completion, Job, PluginSpec
from casparian_flow.sentinel.core import Failed, LedgerOps, LedgerWriter, SentinelCore
from casparian_flow.sentinel.events import Event, PluginsChanged, Reply, Rescan, Send
from casparian_flow.sentinel.metrics import SentinelMetrics

T = TypeVar("T")
L = TypeVar("L", bound=LedgerOps)
RESCANS_MAX = 100_000
"""Rescans remembered; beyond that the periodic scan finds what is left out."""


class MeteredWriter(Generic[L]):
    """A LedgerWriter that measures batches and how long they take to become durable."""

    def __init__(self, writer: LedgerWriter[L], metrics: SentinelMetrics, clock: Clock) -> None:
        self._writer = writer
        self._metrics = metrics
        self._clock = clock
        self._submitted: deque[tuple[int, float]] = deque()
        self.last_commit_s = 0.0
        """Seconds the commit completed last has taken, from its submission."""

    def commit(self, batch: Sequence[BatchItem]) -> int:
        ticket = self._writer.commit(batch)
        self._submitted.append((ticket, self._clock.now().mono))
        self._metrics.commit_records.observe(len(batch))
        return ticket

    def completed(self) -> list[Completion]:
        completions = self._writer.completed()
        if completions:
            now = self._clock.now().mono
            for completion in completions:
                self._note(completion, now)
        return completions

    def _note(self, completion: Completion, now: float) -> None:
        while self._submitted and self._submitted[0][0] <= completion.ticket:
            _, since = self._submitted.popleft()
            self.last_commit_s = now - since
            self._metrics.commit_seconds.observe(self.last_commit_s)
        if completion.error is not None:
            self._metrics.count("db_errors")

    def call(self, fn: Callable[[L], T]) -> Future[T]:
        return self._writer.call(fn)


class CoreLoop(Generic[L]):
    """Runs a core's turns and brings other threads' requests in.

    Args:
        core: driven by `turn` alone.
        writer: the core's.
        wake: makes the thread that calls `turn` do so soon.
    """

    def __init__(
        self, core: SentinelCore[L], writer: LedgerWriter[L], wake: Callable[[], None]
    ) -> None:
        self.core = core
        self._writer = writer
        self._wake = wake
        self._inbox: deque[Callable[[], None]] = deque()
        self._waiting: set[Future[Any]] = set()
        self._rescans: dict[tuple[int, str], None] = {}
        self._withheld: frozenset[str] = frozenset()
        self._closed = False

    # -- from any thread --------------------------------------------------------------------

    def command(self, make: Callable[[Future[dict[str, Any]]], Event]) -> Future[dict[str, Any]]:
        """Give the broker a command; the future gets its reply once that is durable.

        Args:
            make: builds the event around the future, which stands for the caller.
        """
        future: Future[dict[str, Any]] = Future()

        def enter() -> None:
            self._waiting.add(future)
            self.core.feed(make(future))

        self._post(future, enter)
        return future

    def call(self, fn: Callable[[L], T]) -> Future[T]:
        """Run something in the ledger's thread that neither makes jobs nor changes the wiring."""
        if self._closed:
            raise _stopping()
        future = self._writer.call(fn)
        future.add_done_callback(self._note_failed_write)
        return future

    def _note_failed_write(self, future: Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, CommitFailedError):
            self._inbox.append(lambda: self.core.suspend(error))
            self._wake()

    def enlist(self, fn: Callable[[L], tuple[T, Sequence[Job]]]) -> Future[T]:
        """Run a write in the ledger's thread that makes jobs, and tell the broker of them."""

        def done(result: tuple[T, Sequence[Job]]) -> T:
            self.core.add_jobs(result[1])
            return result[0]

        return self._call(fn, done)

    def rewire(self, fn: Callable[[L], tuple[T, Sequence[PluginSpec]]]) -> Future[T]:
        """Run a write in the ledger's thread that changes the wiring, and tell the broker."""

        def done(result: tuple[T, Sequence[PluginSpec]]) -> T:
            specs = [spec for spec in result[1] if spec.plugin not in self._withheld]
            self.core.feed(PluginsChanged(specs))
            return result[0]

        return self._call(fn, done)

    def withhold(self, plugins: frozenset[str], read: Callable[[L], Sequence[PluginSpec]]) -> None:
        """Lease no jobs of these plugins until further notice; running ones go on.

        Args:
            plugins: all of them, as they are to be from now on.
            read: the specs, for the broker to hear of the change.
        """
        self._withheld = plugins
        self.rewire(lambda ledger: (None, read(ledger)))

    def look(self, fn: Callable[[SentinelCore[L]], T]) -> Future[T]:
        """Run a function that reads the core, between two turns."""
        future: Future[T] = Future()

        def enter() -> None:
            try:
                settle(future, fn(self.core))
            except CasparianError as error:
                fail(future, error)

        self._post(future, enter)
        return future

    def _call(self, fn: Callable[[L], Any], finish: Callable[[Any], T]) -> Future[T]:
        future: Future[T] = Future()

        def done(call: Future[Any]) -> None:
            self._waiting.discard(future)
            error = call.exception()
            if error is not None:
                fail(future, error)
            else:
                settle(future, finish(call.result()))

        def enter() -> None:
            self._waiting.add(future)
            self.core.call(fn, done)

        self._post(future, enter)
        return future

    def _post(self, future: Future[Any], enter: Callable[[], None]) -> None:
        self._inbox.append(enter)
        if self._closed:
            fail(future, _stopping())
        self._wake()

    # -- from the loop's thread -------------------------------------------------------------

    def turn(self) -> list[Send]:
        """One turn of the core; returns what is to be sent to workers, in order."""
        while self._inbox:
            self._inbox.popleft()()
        sends: list[Send] = []
        for output in self.core.turn():
            match output:
                case Send():
                    sends.append(output)
                case Reply(reply, result):
                    self._waiting.discard(_future(reply))
                    settle(_future(reply), result)
                case Failed(reply, error):
                    self._waiting.discard(_future(reply))
                    fail(_future(reply), error)
                case Rescan(root_id, rel_path):
                    if len(self._rescans) < RESCANS_MAX:
                        self._rescans[root_id, rel_path] = None
        return sends

    def take_rescans(self, root_id: int | None = None) -> list[tuple[int, str]]:
        """Files to look at again, of one root or of all; each is handed out once.

        From the loop's thread, or by `look`.
        """
        taken = [rescan for rescan in self._rescans if root_id in (None, rescan[0])]
        for rescan in taken:
            del self._rescans[rescan]
        return taken

    def close(self) -> None:
        """Fail everything that still waits; nothing is taken in after this."""
        self._closed = True
        while self._inbox:
            self._inbox.popleft()()
        for future in list(self._waiting):
            fail(future, _stopping())
        self._waiting.clear()


def _future(reply: object) -> Future[Any]:
    assert isinstance(reply, Future)
    return reply


def settle(future: Future[T], result: T) -> None:
    """Set a result, unless the future is already failed by `close`."""
    with suppress(InvalidStateError):
        future.set_result(result)


def fail(future: Future[Any], error: BaseException) -> None:
    with suppress(InvalidStateError):
        future.set_exception(error)


def _stopping() -> SentinelUnreachableError:
    return SentinelUnreachableError(
        "the Sentinel is stopping",
        hint="Start it again with `casparian start`, then repeat the command.",
    )
