"""The job queue on its own: leases, retries, and what a stale token may not do."""

import random

import pytest
from ledger_kit import ManualClock

from casparian_flow.db.job_queue import DbConnection, JobDetails, JobQueue, QueuedJob
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.domain.ids import Token
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.records import Health, HealthRecord
from casparian_flow.domain.retry import RetryPolicy


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.connection = DbConnection.open_duckdb_memory(clock=self.clock)
        self.queue = JobQueue(
            self.connection, rng=random.Random(1), retry=RetryPolicy(max_retries=1)
        )
        self.queue.init()

    def take(self) -> QueuedJob:
        job = self.queue.dequeue()
        assert job is not None
        return job


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_documented_block_runs() -> None:
    queue = JobQueue(DbConnection.open_duckdb_memory())
    queue.init()
    job_id = queue.enqueue(JobDetails(plugin_name="my_parser"))
    job = queue.dequeue()
    assert job is not None
    assert (job.job_id, job.plugin_name) == (job_id, "my_parser")
    assert queue.dequeue() is None


def test_init_may_be_repeated(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p"))
    bench.queue.init()
    assert bench.queue.stats()[JobStatus.QUEUED] == 1


def test_jobs_leave_by_priority_then_age(bench: Bench) -> None:
    for priority in (10, 50, 50, 90):
        bench.queue.enqueue(JobDetails("p", priority=priority))
    assert [bench.take().job_id for _ in range(4)] == [4, 2, 3, 1]


def test_a_lease_runs_to_completion(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p", input_file="a.csv", config_overrides={"t": "csv://x"}))
    job = bench.take()
    assert (job.input_file, job.config_overrides, job.attempt) == ("a.csv", {"t": "csv://x"}, 1)
    assert bench.queue.ack(job.token)
    assert bench.queue.conclude_success(job.token, summary="ok", metrics={"quarantine_rows": 2})
    row = bench.queue.get(job.job_id)
    assert (row["status"], row["result_summary"], row["quarantine_rows"]) == ("COMPLETED", "ok", 2)


def test_a_late_or_repeated_conclude_changes_nothing(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p"))
    token = bench.take().token
    assert bench.queue.conclude_success(token)
    assert not bench.queue.conclude_success(token)
    assert not bench.queue.conclude_failure(token, "late")
    assert bench.queue.get(1)["status"] == "COMPLETED"
    assert bench.queue.get(1)["error_message"] is None


@pytest.mark.parametrize("token", ["", "x", "../../etc", "00000000-1-1-1", "a-b-c-d"])
def test_a_made_up_token_is_stale(bench: Bench, token: str) -> None:
    bench.queue.enqueue(JobDetails("p"))
    bench.take()
    made_up = Token(token)
    assert not bench.queue.ack(made_up)
    assert not bench.queue.renew(made_up)
    assert not bench.queue.conclude_success(made_up)
    assert not bench.queue.requeue(made_up)


def test_an_expired_lease_goes_to_the_next_and_the_old_token_is_stale(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p"))
    first = bench.take()
    bench.queue.ack(first.token)
    bench.clock.seconds = 29.9
    assert bench.queue.dequeue() is None
    bench.clock.seconds = 30.0
    second = bench.take()
    assert (second.job_id, second.attempt) == (first.job_id, 2)
    assert not bench.queue.conclude_success(first.token)
    assert bench.queue.conclude_success(second.token)


def test_a_renewed_lease_lasts(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p"))
    job = bench.take()
    bench.clock.seconds = 20
    assert bench.queue.renew(job.token)
    bench.clock.seconds = 45
    assert bench.queue.dequeue() is None
    assert bench.queue.conclude_success(job.token)


def test_a_failure_is_retried_after_its_delay_then_becomes_a_dead_letter(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p"))
    assert bench.queue.conclude_failure(bench.take().token, "boom")
    assert bench.queue.get(1)["status"] == "QUEUED"
    assert bench.queue.dequeue() is None
    bench.clock.seconds = 5
    assert bench.queue.conclude_failure(bench.take().token, "boom again")
    row = bench.queue.get(1)
    assert (row["status"], row["retry_count"], row["error_message"]) == ("FAILED", 1, "boom again")
    (letter,) = bench.connection.ledger.query("SELECT * FROM cf_dead_letter")
    assert (letter["original_job_id"], letter["retry_count"]) == (1, 1)


def test_a_permanent_failure_is_not_retried(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p"))
    bench.queue.conclude_failure(bench.take().token, "bad", transient=False)
    assert bench.queue.get(1)["status"] == "FAILED"


def test_a_job_for_later_waits(bench: Bench) -> None:
    at_us = bench.clock.now().wall_us + 10_000_000
    bench.queue.enqueue(JobDetails("p", not_before_us=at_us))
    assert bench.queue.dequeue() is None
    bench.clock.seconds = 10
    assert bench.take().job_id == 1


def test_a_paused_plugin_does_not_hold_up_others(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("broken", priority=99))
    bench.queue.enqueue(JobDetails("fine"))
    bench.connection.ledger.commit([HealthRecord(Health("broken", 5, True, "x"), 1)])
    assert bench.take().plugin_name == "fine"


def test_cancel_ends_a_job_and_its_lease(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p"))
    job = bench.take()
    assert bench.queue.cancel(1)
    assert not bench.queue.cancel(1)
    assert not bench.queue.conclude_success(job.token)
    assert bench.queue.get(1)["status"] == "ABORTED"


def test_a_restarted_queue_gives_leases_their_full_time_again(bench: Bench) -> None:
    bench.queue.enqueue(JobDetails("p"))
    job = bench.take()
    bench.clock.seconds = 25
    again = JobQueue(bench.connection)
    again.init()
    bench.clock.seconds = 50
    assert again.dequeue() is None
    assert again.conclude_success(job.token)


def test_bad_details_are_refused(bench: Bench) -> None:
    with pytest.raises(UsageError):
        bench.queue.enqueue(JobDetails(""))
    with pytest.raises(UsageError):
        bench.queue.enqueue(JobDetails("p", config_overrides={"t": 5}))
    with pytest.raises(NotFoundError):
        bench.queue.enqueue(JobDetails("p", file_version_id=9))
    with pytest.raises(NotFoundError):
        bench.queue.get(1)
    assert bench.queue.enqueue(JobDetails("p")) == 1
