"""How the API's writes share transactions, and what a failure costs whom."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import duckdb
import pytest
from ledger_kit import ManualClock

from casparian_flow.db.api_state import CheckedEvent, Unit
from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.db.deadlines import Deadlines
from casparian_flow.db.group_commit import GroupCommit
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import CommitFailedError, ConflictError
from casparian_flow.protocol import EventType, HttpJobType

PHASE = CheckedEvent("phase", '{"type":"phase","name":"x"}', None)


class SlowDoor:
    """Runs what was asked for only when it is told to, as a busy ledger thread does."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.asked: deque[Callable[[], None]] = deque()

    def call(self, fn: Callable[[Ledger], Any]) -> "Future[Any]":
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(self.ledger))
            except BaseException as error:  # noqa: BLE001 - raised again where it is asked for
                future.set_exception(error)

        self.asked.append(run)
        return future

    def run(self) -> None:
        while self.asked:
            self.asked.popleft()()


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with Ledger.in_memory(clock=ManualClock()) as ledger:
        yield ledger


@pytest.fixture
def storage(ledger: Ledger) -> ApiStorage:
    return ApiStorage(ledger, clock=ManualClock())


@pytest.fixture
def door(ledger: Ledger) -> SlowDoor:
    return SlowDoor(ledger)


@pytest.fixture
def commits(door: SlowDoor) -> GroupCommit:
    return GroupCommit(door, ManualClock())


def new_job(storage: ApiStorage) -> int:
    return storage.create_job(HttpJobType.RUN, "p", None, "/in")


def add(job_id: int) -> Callable[[Unit], int]:
    return lambda unit: unit.add_event(job_id, PHASE)


def test_writes_that_wait_share_one_transaction(
    ledger: Ledger, storage: ApiStorage, door: SlowDoor, commits: GroupCommit
) -> None:
    job_id, before = new_job(storage), ledger.history_end
    futures = [commits.submit(add(job_id)) for _ in range(5)]
    assert not any(future.done() for future in futures)
    assert len(door.asked) == 1
    door.run()
    assert [future.result() for future in futures] == [1, 2, 3, 4, 5]
    assert ledger.history_end == before + 1


def test_more_writes_than_one_transaction_takes_ask_for_another(
    storage: ApiStorage, door: SlowDoor, commits: GroupCommit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casparian_flow.db.group_commit.GATHER_MAX", 2)
    job_id = new_job(storage)
    futures = [commits.submit(add(job_id)) for _ in range(5)]
    for done in (2, 4, 5):
        assert len(door.asked) == 1
        door.asked.popleft()()
        assert sum(future.done() for future in futures) == done
    assert not door.asked


def test_a_refusal_costs_its_own_caller_only(
    ledger: Ledger, storage: ApiStorage, door: SlowDoor, commits: GroupCommit
) -> None:
    job_id, before = new_job(storage), ledger.history_end

    def refuse(_: Unit) -> None:
        raise ConflictError("no")

    first, refused = commits.submit(add(job_id)), commits.submit(refuse)
    last = commits.submit(add(job_id))
    door.run()
    assert (first.result(), last.result()) == (1, 2)
    with pytest.raises(ConflictError):
        refused.result()
    assert ledger.history_end == before + 1


@pytest.mark.parametrize("error", [ConflictError("no"), ValueError("a bug")])
def test_a_write_that_fails_half_way_leaves_nothing_and_spoils_no_other(
    storage: ApiStorage, door: SlowDoor, commits: GroupCommit, error: Exception
) -> None:
    job_id = new_job(storage)

    def fail(unit: Unit) -> None:
        unit.add_event(job_id, PHASE)
        raise error

    first, failed = commits.submit(add(job_id)), commits.submit(fail)
    last = commits.submit(add(job_id))
    door.run()
    assert (first.result(), last.result()) == (1, 2)
    with pytest.raises(type(error)):
        failed.result()
    assert [e.event_id for e in storage.list_events(job_id)] == [1, 2]


def test_after_a_failed_commit_ids_go_on_without_a_gap(
    ledger: Ledger, storage: ApiStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = new_job(storage)
    assert storage.insert_event(job_id, EventType.JobStarted()) == 1

    def full(_: Ledger) -> None:
        raise duckdb.IOException("Could not write: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_end", full)
        with pytest.raises(CommitFailedError, match="disk is full"):
            storage.insert_event(job_id, EventType.Phase("lost"))
        with pytest.raises(CommitFailedError):
            new_job(storage)
        with pytest.raises(CommitFailedError):
            storage.cancel_job(job_id)
    assert storage.insert_event(job_id, EventType.Phase("kept")) == 2
    assert new_job(storage) == job_id + 1
    assert storage.cancel_job(job_id)
    assert ledger.check() == []


def test_more_writes_than_one_transaction_takes_are_all_done(
    storage: ApiStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casparian_flow.db.group_commit.GATHER_MAX", 2)
    job_id = new_job(storage)
    commits = storage._commits
    waiting: list[Future[int]] = [Future() for _ in range(5)]
    commits._pending.extend((add(job_id), future) for future in waiting)
    assert commits.submit(add(job_id)).result(20) == 6
    assert [future.result(20) for future in waiting] == [1, 2, 3, 4, 5]


def test_a_door_that_is_closed_leaves_nothing_waiting(ledger: Ledger) -> None:
    class Closed(SlowDoor):
        def call(self, fn: Callable[[Ledger], Any]) -> "Future[Any]":
            raise ConflictError("closed")

    commits = GroupCommit(Closed(ledger), ManualClock())
    for _ in range(2):
        with pytest.raises(ConflictError):
            commits.submit(add(1)).result(0)
    assert not commits._pending


def test_what_comes_between_looking_and_waiting_is_not_missed(
    ledger: Ledger, storage: ApiStorage, door: SlowDoor
) -> None:
    job_id = new_job(storage)
    waiting = ApiStorage(door=door, clock=SystemClock())
    answer = waiting.events_later(job_id, 0, 60)
    storage.insert_event(job_id, EventType.JobStarted())
    door.run()
    assert len(answer.result()) == 1
    later = waiting.events_later(job_id, 1, 60)
    door.run()
    assert not later.done()
    storage.insert_event(job_id, EventType.Phase("x"))
    door.run()
    assert [e.event_id for e in later.result()] == [2]


def test_futures_are_cancelled_in_the_order_of_their_deadlines() -> None:
    deadlines = Deadlines(SystemClock())
    ended: list[str] = []
    futures: dict[str, Future[None]] = {name: Future() for name in ("late", "soon", "done")}
    for name, future in futures.items():
        future.add_done_callback(lambda _, name=name: ended.append(name))
    deadlines.cancel_after(0.10, futures["late"])
    deadlines.cancel_after(0.01, futures["soon"])
    deadlines.cancel_after(60, futures["done"])
    assert len(deadlines) == 3
    futures["done"].set_result(None)
    waited = Future[None]()
    futures["late"].add_done_callback(lambda _: waited.set_result(None))
    waited.result(20)
    assert ended == ["done", "soon", "late"]
    assert len(deadlines) == 0
