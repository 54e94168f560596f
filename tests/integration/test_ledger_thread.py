"""The thread that owns the ledger: order, gathering, and what a failed commit takes with it."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import ManualClock, completed, granted, insert_jobs, leased, output, started

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.writer import LedgerThread
from casparian_flow.domain.errors import InvariantError, LedgerUnavailableError
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.records import Completion, Record


class Bench:
    """A thread whose ledger can be held up and made to fail."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger.open(path, clock=ManualClock())
        self.ledger.begin_epoch()
        insert_jobs(self.ledger, 20)
        self.woken = threading.Event()
        self.batches: list[int] = []
        self.error: LedgerUnavailableError | None = None
        real = self.ledger.commit

        def commit(batch: Sequence[Any]) -> Any:
            self.batches.append(len(batch))
            if self.error is not None:
                raise self.error
            return real(batch)

        self.ledger.commit = commit  # type: ignore[method-assign]
        self.thread = LedgerThread(self.ledger, self.woken.set)

    def hold(self) -> threading.Event:
        """Keep the thread busy until the event is set."""
        begun, gate = threading.Event(), threading.Event()

        def wait(_: Ledger) -> None:
            begun.set()
            gate.wait(10)

        self.thread.call(wait)
        begun.wait(10)
        return gate

    def completions(self, count: int) -> list[Completion]:
        done: list[Completion] = []
        deadline = time.monotonic() + 10
        while len(done) < count and time.monotonic() < deadline:
            self.woken.wait(0.05)
            self.woken.clear()
            done += self.thread.completed()
        return done

    def lease(self, job_id: int) -> list[Record]:
        return [leased(self.ledger, job_id)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "ledger.duckdb")
    yield made
    made.error = None
    made.thread.close()


def test_a_lone_commit_is_made_at_once(bench: Bench) -> None:
    assert bench.thread.commit(bench.lease(1)) == 1
    assert bench.completions(1) == [Completion(1, [])]
    assert bench.ledger.status_of(1) is JobStatus.DISPATCHING


def test_batches_gather_while_the_ledger_is_busy(bench: Bench) -> None:
    gate = bench.hold()
    tickets = [bench.thread.commit(bench.lease(job_id)) for job_id in range(1, 11)]
    gate.set()
    assert [c.ticket for c in bench.completions(10)] == tickets == list(range(1, 11))
    assert bench.batches == [10]


def test_each_batch_gets_its_own_outcomes(bench: Bench) -> None:
    gate = bench.hold()
    for job_id, key in ((1, "k"), (2, "k"), (3, "z")):
        bench.thread.commit(
            [
                leased(bench.ledger, job_id),
                started(job_id),
                granted(job_id, output(job_id, key=key)),
            ]
        )
    bench.thread.commit([leased(bench.ledger, 4)])
    gate.set()
    outcomes = [[(o.job_id, o.refused) for o in c.outcomes] for c in bench.completions(4)]
    assert outcomes == [[(1, "")], [(2, "duplicate_output")], [(3, "")], []]


def test_calls_keep_their_place_between_commits(bench: Bench) -> None:
    gate = bench.hold()
    bench.thread.commit(bench.lease(1))
    seen = bench.thread.call(lambda ledger: ledger.load(50))
    bench.thread.commit(bench.lease(2))
    gate.set()
    assert [job.job_id for job in seen.result(10).active] == [1]
    bench.completions(2)
    assert bench.batches == [1, 1]


def test_a_calls_error_is_its_own(bench: Bench) -> None:
    future = bench.thread.call(lambda ledger: ledger.query("SELECT nonsense"))
    with pytest.raises(Exception, match="nonsense"):
        future.result(10)
    bench.thread.commit(bench.lease(1))
    assert bench.completions(1)[0].error is None


def test_a_failure_takes_along_what_was_submitted_before_it_was_seen(bench: Bench) -> None:
    bench.error = LedgerUnavailableError("disk full")
    bench.thread.commit(bench.lease(1))
    bench.woken.wait(10)
    # Decided on top of the failed one; the disk has space again.
    bench.error = None
    bench.thread.commit(bench.lease(2))
    time.sleep(0.1)
    done = bench.completions(2)
    assert [c.ticket for c in done] == [1, 2]
    assert all(c.error is not None and "disk full" in str(c.error) for c in done)
    assert bench.ledger.status_of(2) is JobStatus.QUEUED
    # Decided after the failure was seen.
    bench.thread.commit(bench.lease(3))
    assert bench.completions(1) == [Completion(3, [])]


def test_batches_still_waiting_fail_as_soon_as_the_failure_is_seen(bench: Bench) -> None:
    bench.error = LedgerUnavailableError("disk full")
    bench.thread.commit(bench.lease(1))
    bench.woken.wait(10)
    gate = bench.hold()
    bench.error = None
    bench.thread.commit(bench.lease(2))
    assert [c.ticket for c in bench.completions(2)] == [1, 2]
    bench.thread.commit(bench.lease(2))
    gate.set()
    assert bench.completions(1) == [Completion(3, [])]


def test_a_batch_that_breaks_a_rule_fails_like_a_lost_disk(bench: Bench) -> None:
    bench.thread.commit([completed(1)])
    (done,) = bench.completions(1)
    assert isinstance(done.error, LedgerUnavailableError)
    assert "not a legal move" in str(done.error)


def test_a_quiet_ledger_folds_by_itself(bench: Bench) -> None:
    bench.thread.commit(bench.lease(1))
    bench.completions(1)
    deadline = time.monotonic() + 10
    with bench.ledger.reader() as reader:
        status = ("QUEUED",)
        while status != ("DISPATCHING",) and time.monotonic() < deadline:
            time.sleep(0.02)
            (status,) = reader.execute(
                "SELECT status FROM cf_processing_queue WHERE id = 1"
            ).fetchall()
    assert status == ("DISPATCHING",)


def test_close_does_everything_submitted_and_takes_nothing_more(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "ledger.duckdb")
    for job_id in range(1, 6):
        bench.thread.commit(bench.lease(job_id))
    bench.thread.close()
    with pytest.raises(InvariantError):
        bench.thread.commit([])
    with Ledger.open(tmp_path / "ledger.duckdb", clock=ManualClock()) as ledger:
        assert {ledger.status_of(i) for i in range(1, 6)} == {JobStatus.DISPATCHING}
