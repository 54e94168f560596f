"""The core between broker and ledger: what a failed commit must not lose."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from builders import at, identity, make_job, make_spec

from casparian_flow.db.memory import MemoryLedger
from casparian_flow.domain.clock import Now
from casparian_flow.domain.errors import LedgerUnavailableError
from casparian_flow.domain.ids import JobId
from casparian_flow.domain.records import BatchItem, Completion
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.broker import Broker, BrokerConfig
from casparian_flow.sentinel.core import (
    BIG,
    BURST,
    CROWD,
    PACE_SECONDS,
    Failed,
    SentinelCore,
)

T = TypeVar("T")


class Writer:
    """Carries everything out at once; a commit fails while the ledger is told to."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self.ledger = ledger
        self._ticket = 0
        self._done: list[Completion] = []

    def commit(self, batch: Sequence[BatchItem]) -> int:
        self._ticket += 1
        try:
            outcomes = self.ledger.commit(batch)
        except LedgerUnavailableError as error:
            self._done.append(Completion(self._ticket, error=error))
        else:
            self._done.append(Completion(self._ticket, outcomes))
        return self._ticket

    def completed(self) -> list[Completion]:
        done, self._done = self._done, []
        return done

    def call(self, fn: Callable[[MemoryLedger], T]) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(self.ledger))
        except LedgerUnavailableError as error:
            future.set_exception(error)
        return future


class Stopwatch:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> Now:
        return at(self.time)


def started(*jobs: Any) -> tuple[SentinelCore[MemoryLedger], MemoryLedger, Stopwatch]:
    ledger, clock = MemoryLedger(), Stopwatch()
    ledger.plugins = [make_spec()]
    ledger.add_jobs(jobs)
    core = SentinelCore(Writer(ledger), lambda: Broker(BrokerConfig(), random.Random(0)), clock)
    core.start()
    core.turn()
    assert core.ready
    return core, ledger, clock


def identify(core: SentinelCore[MemoryLedger]) -> None:
    core.feed(e.WorkerMessage(identity("w1"), 0, m.Identify("w1", "nonce")))


def test_a_command_that_meets_a_failed_commit_is_answered() -> None:
    core, ledger, _ = started(make_job(1))
    ledger.failing = LedgerUnavailableError("the disk is full")
    identify(core)
    core.turn()
    waiting = object()
    core.feed(e.Cancel(waiting, JobId(1)))
    out = core.turn()
    assert not core.ready
    assert [(o.reply, str(o.error)) for o in out if isinstance(o, Failed)] == [
        (waiting, "the disk is full")
    ]


def test_a_delayed_job_does_not_keep_the_loop_spinning_while_the_ledger_fails() -> None:
    core, ledger, clock = started(make_job(1))
    identify(core)
    core.turn()
    token = core.broker.jobs[JobId(1)].token
    core.feed(e.WorkerMessage(identity("w1"), 1, m.Conclude(token, "FAILED", "timeout")))
    core.turn()
    assert core.wakeup is not None
    ledger.failing = LedgerUnavailableError("the disk is full")
    clock.time = 10.0
    core.turn()
    core.turn()
    assert not core.ready
    assert core.wakeup is None
    ledger.failing = None
    clock.time = 12.0
    core.turn()
    core.turn()
    assert core.ready


def test_a_write_of_scout_s_that_fails_stops_admission_and_is_the_problem_told() -> None:
    core, _, clock = started(make_job(1))

    def full(_: MemoryLedger) -> None:
        raise LedgerUnavailableError("the disk is full")

    answers: list[BaseException | None] = []
    core.call(full, lambda future: answers.append(future.exception()))
    core.turn()
    assert not core.ready
    assert str(core.problem) == str(answers[0]) == "the disk is full"
    clock.time = 2.0
    core.turn()
    core.turn()
    assert core.ready
    assert core.problem is None


def crowded() -> tuple[SentinelCore[MemoryLedger], Stopwatch]:
    """A core with just so many jobs under way that commits are paced; none was of late."""
    core, _, clock = started(*(make_job(number) for number in range(1, CROWD + 1)))
    core.feed(
        e.WorkerMessage(identity("w1"), 0, m.Identify("w1", "nonce", slots=CROWD, credit=CROWD))
    )
    core.turn()
    core.turn()
    assert len(core.broker.leases) == CROWD
    clock.time += 5.0
    return core, clock


def pause(core: SentinelCore[MemoryLedger], name: str) -> list[Any]:
    """Ask for a commit of one item; returns what the turn gave out."""
    core.feed(e.PausePlugin(name, name, "because"))
    return list(core.turn())


def answered(core: SentinelCore[MemoryLedger]) -> list[object]:
    return [o.reply for o in core.turn() if isinstance(o, e.Reply)]


def test_a_few_commits_go_at_once_and_more_of_them_gather() -> None:
    core, clock = crowded()
    before = core.commits
    for number in range(BURST):
        pause(core, f"p{number}")
        assert answered(core) == [f"p{number}"]
    assert core.commits == before + BURST
    assert [pause(core, name) for name in ("a", "b", "c")] == [[], [], []]
    assert answered(core) == []
    assert core.pending
    assert core.wakeup is not None
    assert 0 < core.wakeup - clock.time <= 1.01 * PACE_SECONDS
    clock.time = core.wakeup
    core.turn()
    assert answered(core) == ["a", "b", "c"]
    assert core.commits == before + BURST + 1
    assert not core.pending


def test_commits_do_not_wait_where_none_can_join_them() -> None:
    core, _, _ = started()
    for number in range(3 * BURST):
        pause(core, f"p{number}")
        assert answered(core) == [f"p{number}"]


def test_a_big_batch_waits_for_no_moment() -> None:
    core, _ = crowded()
    for number in range(BURST):
        pause(core, f"p{number}")
    answered(core)
    for number in range(BIG):
        core.feed(e.PausePlugin(number, f"p{number}", "because"))
    core.turn()
    assert answered(core) == list(range(BIG))


def test_what_gathers_when_the_ledger_fails_is_answered_with_the_failure() -> None:
    core, _ = crowded()
    for number in range(BURST):
        pause(core, f"p{number}")
    answered(core)
    pause(core, "late")
    core.suspend(LedgerUnavailableError("the disk is full"))
    assert [o.reply for o in core.turn() if isinstance(o, Failed)] == ["late"]
    assert not core.ready
    assert not core.pending
