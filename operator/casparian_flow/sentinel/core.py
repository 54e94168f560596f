"""The broker and the ledger's thread, joined; still without sockets.

One `turn` takes in everything that has arrived, lets the broker decide, hands its commits to the
ledger as one batch and returns what may go out now: sends that wait for no commit, and those
whose commit has become durable since.

On a quiet system a commit starts at once, so that no timer stands between a job and its result.
A commit costs milliseconds whatever is in it, though, so where they come one after the other
they are paced (`Pace`): small ones gather for a moment, big ones go.

After a failed commit nothing unsent goes out. The broker is thrown away and a new one restored
from the ledger, once a probing write has succeeded; until then admission is stopped. Workers
notice nothing but silence: they repeat what was not answered and identify again.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, LedgerError, LedgerUnavailableError
from casparian_flow.domain.records import BatchItem, Completion, Job, LedgerState
from casparian_flow.sentinel.broker import Broker
from casparian_flow.sentinel.events import (
    Commit,
    Event,
    GrantResult,
    Hydrate,
    Hydrated,
    Instruction,
    JobsAdded,
    Reply,
    Rescan,
    Send,
    Tick,
)

T = TypeVar("T")
LAZY_MAX = 1000
BURST = 4
"""Commits that may follow each other at once; those of one job are three."""
PACE_SECONDS = 0.03
"""Between commits when there are more; far less than a worker's lookahead takes."""
BIG = 256
"""Items of a batch that is worth a commit of its own."""
CROWD = 8
"""Jobs under way from which on a commit that waits may find company."""
LAZY_SECONDS = 1.0
HYDRATE_PAGE = 10_000
FIRST_PAGE = 1_000
PROBE_SECONDS = 1.0
"""Between probing writes while the ledger cannot commit."""


class Pace:
    """A token bucket: `BURST` commits at once, then one every `PACE_SECONDS`."""

    def __init__(self) -> None:
        self._tokens = float(BURST)
        self._since = 0.0

    def due(self, mono: float) -> float:
        """When the next commit may start, monotonic clock; not later than `mono` if now."""
        self._tokens = min(float(BURST), self._tokens + (mono - self._since) / PACE_SECONDS)
        self._since = mono
        return mono + max(0.0, (1.0 - self._tokens) * PACE_SECONDS)

    def spend(self) -> None:
        """A commit starts; one that did not wait for its time puts the next ones off."""
        self._tokens = max(0.0, self._tokens - 1.0)


class LedgerOps(Protocol):
    """What this module asks of a ledger, within its thread."""

    def begin_epoch(self) -> int: ...

    def load(self, page: int) -> LedgerState: ...

    def hydrate(self, after: tuple[int, int], limit: int) -> tuple[list[Job], bool]: ...

    def recover(self) -> None:
        """Make a ledger usable again after a failed commit, reopening the file if need be."""


L = TypeVar("L", bound=LedgerOps)
L_co = TypeVar("L_co", bound=LedgerOps, covariant=True)


class LedgerWriter(Protocol[L_co]):
    """The thread that owns a ledger; everything submitted runs in order."""

    def commit(self, batch: Sequence[BatchItem]) -> int:
        """Submit a batch; returns its ticket, one more than the last."""

    def completed(self) -> list[Completion]:
        """Commits that ended since the last call, in order."""

    def call(self, fn: Callable[[L_co], T]) -> Future[T]:
        """Run something in the ledger's thread, after all that was submitted before."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A command whose commit failed; its outcome is not known to be durable."""

    reply: object
    error: CasparianError


Output = Send | Reply | Failed | Rescan


@dataclass(slots=True)
class _Call(Generic[T]):
    future: Future[T]
    done: Callable[[Future[T]], None]


class SentinelCore(Generic[L]):
    """See the module's text. Not thread-safe: one loop calls it.

    Args:
        writer: the ledger's thread.
        make_broker: called at start and after every failed commit.
        clock: read once a turn.
    """

    def __init__(
        self, writer: LedgerWriter[L], make_broker: Callable[[], Broker], clock: Clock
    ) -> None:
        self._writer = writer
        self._make_broker = make_broker
        self._clock = clock
        self.broker = make_broker()
        self.ready = False
        """Whether a broker is restored and commits are accepted."""
        self.problem: LedgerError | None = None
        """Why not, after a failed commit."""
        self.commits = 0
        self.failures = 0
        self._events: list[Event] = []
        self._out: list[Output] = []
        self._batch: list[BatchItem] = []
        """To be committed next, in order."""
        self._batch_since = 0.0
        self._eager = False
        """Whether something waits for that commit; else it may wait for company."""
        self._pace = Pace()
        self._commit_at = 0.0
        self._held: deque[tuple[int, Send | Reply]] = deque()
        self._last_ticket = 0
        self._durable = 0
        self._void_until = 0
        """Tickets up to this one belong to a broker that is gone."""
        self._calls: deque[_Call[Any]] = deque()
        self._probe_at = 0.0
        self._probing = False

    # -- input ------------------------------------------------------------------------------

    def start(self) -> None:
        """Ask the ledger for a new epoch and its state; `ready` turns true in a later turn."""
        self._probing = True
        self.call(_open_epoch, self._opened)

    def feed(self, event: Event) -> None:
        """Queue an event for the next turn."""
        self._events.append(event)

    def call(self, fn: Callable[[L], T], done: Callable[[Future[T]], None]) -> None:
        """Run `fn` in the ledger's thread; `done` is called in a turn, in submission order."""
        self._calls.append(_Call(self._writer.call(fn), done))

    def add_jobs(self, jobs: Sequence[Job]) -> None:
        """Tell the broker of jobs that a call has just made durable.

        Only for use in the `done` of that call: a broker restored in between knows them already,
        and completions come in the ledger's order.
        """
        if self.ready and jobs:
            self._events.append(JobsAdded(jobs))

    def suspend(self, error: LedgerError) -> None:
        """Stop admission because a write elsewhere has failed; it is tried again as ever."""
        if self.ready:
            self._suspend(error)

    # -- one turn ---------------------------------------------------------------------------

    def turn(self) -> list[Output]:
        """Do everything that can be done now; returns what is to go out, in order."""
        now = self._clock.now()
        self._collect()
        while self._calls and self._calls[0].future.done():
            call = self._calls.popleft()
            call.done(call.future)
            error = call.future.exception()
            if isinstance(error, LedgerUnavailableError):
                # What a scan or a deploy could not write, no job's record can either.
                self.suspend(error)
        if self.ready:
            events, self._events = self._events, []
            if events or self._due(now.mono):
                self._carry_out(self.broker.step(events or (Tick(),), now), now.mono)
            self._submit(now.mono)
            self._release()
        else:
            self._refuse_events()
            if not self._probing and now.mono >= self._probe_at:
                self.start()
        out, self._out = self._out, []
        return out

    @property
    def pending(self) -> bool:
        """Whether the ledger still works on something that this core waits for."""
        return bool(self._calls) or self._eager or self._durable < self._last_ticket

    @property
    def wakeup(self) -> float | None:
        """When a turn is due without any event, monotonic clock; None while commits fail."""
        if not self.ready:
            return None
        wakeup = self.broker.wakeup
        if not self._eager:
            return wakeup
        return self._commit_at if wakeup is None else min(wakeup, self._commit_at)

    def _due(self, mono: float) -> bool:
        wakeup = self.broker.wakeup
        return wakeup is not None and wakeup <= mono

    def _collect(self) -> None:
        for completion in self._writer.completed():
            if completion.ticket <= self._void_until:
                continue
            if completion.error is not None:
                self._suspend(completion.error)
                continue
            self._durable = completion.ticket
            self._events.extend(GrantResult(outcome) for outcome in completion.outcomes)

    def _carry_out(self, instructions: Sequence[Instruction], mono: float) -> None:
        held: list[Send | Reply] = []
        for instruction in instructions:
            match instruction:
                case Commit(item, lazy):
                    if not self._batch:
                        self._batch_since = mono
                    self._batch.append(item)
                    self._eager = self._eager or not lazy
                case Send(after_commit=False) | Rescan():
                    self._out.append(instruction)
                case Send() | Reply():
                    held.append(instruction)
                case Hydrate(after):
                    self.call(_hydrate(after), self._hydrated)
        ticket = self._last_ticket + self._eager
        self._held.extend((ticket, instruction) for instruction in held)

    def _submit(self, mono: float) -> None:
        """Hand the batch to the ledger if its time has come."""
        if not self._batch:
            return
        if self._eager and len(self._batch) < BIG and len(self.broker.leases) >= CROWD:
            self._commit_at = self._pace.due(mono)
            if self._commit_at > mono:
                return
        elif not self._eager:
            overdue = len(self._batch) >= LAZY_MAX or mono - self._batch_since >= LAZY_SECONDS
            if not overdue:
                return
        self._pace.spend()
        self._last_ticket = self._writer.commit(self._batch)
        self._batch = []
        self._eager = False
        self.commits += 1

    def _release(self) -> None:
        while self._held and self._held[0][0] <= self._durable:
            self._out.append(self._held.popleft()[1])

    # -- failed commits ---------------------------------------------------------------------

    def _suspend(self, error: LedgerError) -> None:
        self.failures += 1
        self.problem = error
        self.ready = False
        for _, instruction in self._held:
            if isinstance(instruction, Reply):
                self._out.append(Failed(instruction.reply, error))
        self._out.extend(Failed(reply, error) for reply in self.broker.unanswered)
        self._held.clear()
        self._batch = []
        self._eager = False
        # What came in since is refused in this very turn (`_refuse_events`), as commands among it
        # wait for an answer.
        self._void_until = self._durable = self._last_ticket
        self._probe_at = self._clock.now().mono + PROBE_SECONDS

    def _refuse_events(self) -> None:
        """Drop what workers repeat anyway; tell those who wait for an answer."""
        error = self.problem or LedgerUnavailableError("the Sentinel is still starting")
        for event in self._events:
            reply = getattr(event, "reply", None)
            if reply is not None:
                self._out.append(Failed(reply, error))
        self._events.clear()

    def _opened(self, future: Future[LedgerState]) -> None:
        self._probing = False
        now = self._clock.now()
        error = future.exception()
        if isinstance(error, LedgerError):
            self.problem = error
            self._probe_at = now.mono + PROBE_SECONDS
            return
        state = future.result()
        counters = self.broker.counters
        self.broker = self._make_broker()
        self.broker.counters.update(counters)
        self.problem = None
        self.ready = True
        self._carry_out(self.broker.restore(state, now), now.mono)

    def _hydrated(self, future: Future[tuple[list[Job], bool]]) -> None:
        if not self.ready:
            return
        error = future.exception()
        if isinstance(error, LedgerError):
            self._suspend(error)
            return
        jobs, more = future.result()
        self._events.append(Hydrated(jobs, more))


def _open_epoch(ledger: LedgerOps) -> LedgerState:
    ledger.recover()
    ledger.begin_epoch()
    return ledger.load(FIRST_PAGE)


def _hydrate(after: tuple[int, int]) -> Callable[[LedgerOps], tuple[list[Job], bool]]:
    return lambda ledger: ledger.hydrate(after, HYDRATE_PAGE)


__all__ = ["Completion", "Failed", "LedgerOps", "LedgerWriter", "Output", "SentinelCore"]
