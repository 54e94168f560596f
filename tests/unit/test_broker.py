"""The broker's rules, each as a scenario: events in, instructions out."""

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
from builders import (
    LEDGER_ID,
    ROOT_ID,
    at,
    identity,
    make_entry,
    make_job,
    make_spec,
    make_state,
    token,
)

from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import JobId
from casparian_flow.domain.jobs import JobStatus, JournalKind
from casparian_flow.domain.records import GrantOutcome, Health, HealthRecord, Job, Record
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.broker import Broker, BrokerConfig

T = TypeVar("T")


class Bench:
    """A broker, its clock, and what it asked for, taken apart for easy comparison."""

    def __init__(self, *jobs: Job, config: BrokerConfig | None = None, **state: Any) -> None:
        self.broker = Broker(config or BrokerConfig(), random.Random(0))
        self.time = 0.0
        self.out: list[e.Instruction] = []
        self._keep(self.broker.restore(make_state(jobs, **state), at(0.0)))

    def _keep(self, out: list[e.Instruction]) -> list[e.Instruction]:
        self.broker.invariants()
        self.out = out
        return out

    def do(self, *events: e.Event) -> list[e.Instruction]:
        return self._keep(self.broker.step(events, at(self.time)))

    def pass_time(self, seconds: float) -> list[e.Instruction]:
        self.time += seconds
        return self.do(e.Tick())

    def worker(self, name: str = "w1", **fields: Any) -> list[e.Instruction]:
        identify = m.Identify(
            name,
            fields.pop("nonce", f"nonce-{name}"),
            root_id=fields.pop("root_id", ROOT_ID),
            slots=fields.pop("slots", 4),
            credit=fields.pop("credit", 64),
            **fields,
        )
        return self.say(name, identify)

    def say(self, name: str, message: m.Message, job_id: int = 0) -> list[e.Instruction]:
        return self.do(e.WorkerMessage(identity(name), job_id, message))

    def stage(self, name: str, job: Job, *entries: Any) -> list[e.Instruction]:
        stage = m.Stage(job.token, entries or (make_entry(job),))
        return self.say(name, stage, job.job_id)

    def grant(self, job: Job, refused: str = "") -> list[e.Instruction]:
        return self.do(e.GrantResult(GrantOutcome(job.job_id, job.token, refused)))

    def conclude(self, name: str, job: Job, status: str = "SUCCESS", **fields: Any) -> Any:
        return self.say(name, m.Conclude(job.token, status, **fields), job.job_id)

    # what came out
    def sent(self, kind: type[T]) -> list[T]:
        sends = (i for i in self.out if isinstance(i, e.Send))
        return [i.message for i in sends if isinstance(i.message, kind)]

    def sent_to(self, name: str) -> list[str]:
        sends = (i for i in self.out if isinstance(i, e.Send))
        return [type(i.message).__name__ for i in sends if i.identity == identity(name)]

    @property
    def records(self) -> list[Record]:
        commits = (i for i in self.out if isinstance(i, e.Commit))
        return [i.item for i in commits if isinstance(i.item, Record)]

    @property
    def kinds(self) -> list[JournalKind]:
        return [record.kind for record in self.records]

    @property
    def replies(self) -> list[dict[str, Any]]:
        return [i.result for i in self.out if isinstance(i, e.Reply)]


def dispatched(bench: Bench) -> list[str]:
    return [d.token for d in bench.sent(m.Dispatch)]


def test_a_queued_job_is_leased_before_it_is_sent() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    assert bench.kinds == [JournalKind.LEASED]
    sends = [i for i in bench.out if isinstance(i, e.Send) and isinstance(i.message, m.Dispatch)]
    assert [s.after_commit for s in sends] == [True]
    assert dispatched(bench) == [token(1)]


def test_the_plugin_is_sent_once_before_its_first_job() -> None:
    bench = Bench(make_job(1), make_job(2))
    bench.worker()
    assert bench.sent_to("w1") == ["Welcome", "Plugin", "Dispatch", "Dispatch"]


def test_higher_priority_goes_first_then_the_older_job() -> None:
    bench = Bench(make_job(1, priority=10), make_job(2, priority=90), make_job(3, priority=90))
    bench.worker(slots=8)
    assert dispatched(bench) == [token(2), token(3), token(1)]


def test_a_job_nobody_can_run_does_not_hold_up_the_others() -> None:
    plugins = [make_spec("sales"), make_spec("rare")]
    bench = Bench(make_job(1, plugin="rare", priority=99), make_job(2), plugins=plugins)
    bench.worker(capabilities=["sales"])
    assert dispatched(bench) == [token(2)]


def test_a_job_of_a_plugin_without_an_active_version_waits_for_one() -> None:
    bench = Bench(make_job(1), plugins=[])
    bench.worker()
    assert dispatched(bench) == []
    bench.do(e.PluginsChanged([make_spec()]))
    assert dispatched(bench) == [token(1)]


def test_the_least_loaded_worker_gets_the_next_job() -> None:
    bench = Bench()
    bench.worker("w1")
    bench.worker("w2")
    bench.do(e.JobsAdded([make_job(1)]))
    bench.do(e.JobsAdded([make_job(2)]))
    owners = {lease.owner for lease in bench.broker.leases.values()}
    assert owners == {identity("w1"), identity("w2")}


def test_a_worker_never_holds_more_than_its_credit() -> None:
    bench = Bench(*(make_job(n) for n in range(1, 50)))
    bench.worker(slots=2, credit=3)
    assert len(dispatched(bench)) == 3


def test_prefetch_grows_while_jobs_are_quick_and_shrinks_when_they_are_slow() -> None:
    bench = Bench(*(make_job(n) for n in range(1, 400)))
    bench.worker(slots=1, credit=64)
    worker = bench.broker.workers[identity("w1")]
    for _ in range(80):
        bench.time += 0.01
        bench.conclude("w1", bench.broker.jobs[min(worker.held)])
    assert 20 < worker.window <= 50  # jobs of 10 ms, a queue of at most half a second
    for _ in range(80):
        bench.time += 1.0
        bench.say("w1", m.Heartbeat("BUSY", [bench.broker.jobs[j].token for j in worker.held]))
        bench.conclude("w1", bench.broker.jobs[min(worker.held)])
    assert worker.window == 1


def test_a_job_without_outputs_completes_by_its_conclusion() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    bench.conclude("w1", bench.broker.jobs[1])
    assert bench.kinds == [JournalKind.STARTED, JournalKind.COMPLETED]
    assert bench.sent(m.ConcludeAck) == [m.ConcludeAck([token(1)])]
    assert bench.broker.idle


def test_outputs_are_granted_only_when_the_ledger_has_answered() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    assert bench.kinds == [JournalKind.STARTED, JournalKind.GRANTED]
    assert bench.sent(m.Grant) == []
    bench.grant(job)
    assert bench.sent(m.Grant) == [m.Grant(token(1))]
    assert job.status is JobStatus.STAGED


def test_a_repeated_stage_gets_the_same_answer() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    bench.stage("w1", job)
    assert bench.out == []
    bench.grant(job)
    bench.stage("w1", job)
    assert bench.sent(m.Grant) == [m.Grant(token(1))]
    assert bench.records == []


def test_a_granted_job_completes_when_its_worker_concludes() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    bench.grant(job)
    bench.conclude("w1", job, "SUCCESS", metrics={"seconds_ms": 12})
    (record,) = bench.records
    assert record.kind is JournalKind.COMPLETED
    assert record.data is not None
    assert record.data["metrics"] == {
        "rows": 3,
        "bytes": 30,
        "quarantine_rows": 0,
        "seconds_ms": 12,
    }


@pytest.mark.parametrize("refusal", [Reason.SUPERSEDED, Reason.DUPLICATE_OUTPUT])
def test_a_grant_that_would_publish_old_or_known_data_skips_the_job(refusal: Reason) -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    bench.grant(job, refusal)
    assert [r.reason for r in bench.sent(m.Refuse)] == [refusal]
    assert bench.kinds == [JournalKind.SKIPPED]


def test_a_stage_waits_while_another_job_publishes_the_same_slice() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    bench.grant(job, Reason.BUSY)
    assert bench.out == []
    bench.stage("w1", job)
    assert bench.kinds == [JournalKind.GRANTED]
    bench.grant(job)
    assert bench.sent(m.Grant) == [m.Grant(token(1))]


def test_a_stage_under_a_stale_token_is_refused() -> None:
    bench = Bench(make_job(1))
    bench.worker("w1")
    first = make_entry(bench.broker.jobs[1])
    bench.pass_time(31.0)
    bench.worker("w2")
    assert dispatched(bench) == [token(1, 2)]
    bench.say("w1", m.Stage(token(1, 1), (first,)), 1)
    assert [(r.token, r.reason) for r in bench.sent(m.Refuse)] == [
        (token(1, 1), Reason.STALE_TOKEN)
    ]
    assert bench.records == []


def test_a_late_or_repeated_conclusion_changes_nothing_and_is_acknowledged() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.conclude("w1", job)
    for status in ("SUCCESS", "FAILED", "ABORTED"):
        bench.conclude("w1", job, status)
        assert bench.records == []
        assert bench.sent(m.ConcludeAck) == [m.ConcludeAck([token(1)])]


def test_an_acknowledgement_waits_for_the_commit_it_speaks_of() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    bench.conclude("w1", bench.broker.jobs[1])
    acks = [i for i in bench.out if isinstance(i, e.Send) and isinstance(i.message, m.ConcludeAck)]
    assert [a.after_commit for a in acks] == [True]


def test_a_manifest_with_a_foreign_key_is_refused_for_good() -> None:
    bench = Bench(make_job(1), make_job(2))
    bench.worker()
    bench.stage("w1", bench.broker.jobs[1], make_entry(bench.broker.jobs[2]))
    assert [r.reason for r in bench.sent(m.Refuse)] == [Reason.PROTOCOL]
    assert bench.kinds == [JournalKind.FAILED]


# -- leases ---------------------------------------------------------------------------------


def test_a_silent_workers_running_job_is_retried_by_another() -> None:
    bench = Bench(make_job(1))
    bench.worker("w1")
    bench.say("w1", m.DispatchAck(token(1)), 1)
    bench.time += 29.0
    bench.worker("w2")
    bench.pass_time(0.5)
    assert bench.kinds == []
    bench.pass_time(1.0)
    assert bench.kinds == [JournalKind.RETRIED, JournalKind.LEASED]
    assert dispatched(bench) == [token(1, 2)]


def test_heartbeats_keep_a_lease_for_as_long_as_they_come() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    for _ in range(100):
        bench.time += 5.0
        bench.say("w1", m.Heartbeat("BUSY", [token(1)]))
        assert bench.do(e.Tick()) == []


def test_an_idle_worker_stays_registered_while_it_beats() -> None:
    bench = Bench()
    bench.worker()
    for _ in range(100):
        bench.time += 5.0
        bench.say("w1", m.Heartbeat("IDLE"))
        bench.do(e.Tick())
    bench.do(e.JobsAdded([make_job(1)]))
    assert dispatched(bench) == [token(1)]


def test_a_dispatch_that_never_arrived_is_sent_again_as_a_new_attempt() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    bench.time += 5.0
    bench.say("w1", m.Heartbeat("IDLE"))
    assert bench.records == []
    bench.time += 6.0
    bench.say("w1", m.Heartbeat("IDLE"))
    assert bench.kinds == [JournalKind.RETURNED, JournalKind.LEASED]
    assert dispatched(bench) == [token(1, 2)]


def test_a_worker_is_told_to_stop_what_it_holds_without_a_lease() -> None:
    bench = Bench()
    bench.worker()
    bench.say("w1", m.Heartbeat("BUSY", [token(9)]))
    assert [a.token for a in bench.sent(m.Abort)] == [token(9)]


def test_a_replaced_process_loses_the_jobs_of_the_old_one() -> None:
    bench = Bench(make_job(1))
    bench.worker("w1", nonce="first")
    bench.worker("w1", nonce="second")
    assert bench.kinds == [JournalKind.RETURNED, JournalKind.LEASED]
    assert dispatched(bench) == [token(1, 2)]


def test_an_unknown_worker_is_asked_to_identify_and_its_words_on_a_token_count() -> None:
    active = make_job(1, status=JobStatus.RUNNING, attempt=1, token=token(1, epoch=2))
    active.owner = identity("w1").hex()
    bench = Bench(active=[active])
    bench.conclude("w1", active)
    assert [err.code for err in bench.sent(m.Err)] == ["unknown_worker"]
    assert bench.kinds == [JournalKind.COMPLETED]


def test_a_replaced_process_loses_a_job_whose_grant_has_to_wait() -> None:
    bench = Bench(make_job(1))
    bench.worker("w1", nonce="first")
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    bench.worker("w1", nonce="second")
    bench.grant(job, Reason.BUSY)
    assert bench.kinds == [JournalKind.RETRIED, JournalKind.LEASED]
    assert dispatched(bench) == [token(1, 2)]


@pytest.mark.parametrize("owner", ["", "a program"])
def test_a_lease_of_a_queue_of_its_own_runs_out_after_a_restart(owner: str) -> None:
    held = make_job(1, status=JobStatus.DISPATCHING, token=token(1), attempt=1, owner=owner)
    bench = Bench(active=[held])
    bench.worker()
    assert bench.sent_to("w1") == ["Welcome"]
    bench.time += 29.0
    bench.say("w1", m.Heartbeat("IDLE"))
    bench.pass_time(2.0)
    assert bench.kinds == [JournalKind.RETURNED, JournalKind.LEASED]


def test_a_plugin_that_no_worker_can_take_in_is_not_sent_for_ever() -> None:
    bench = Bench(make_job(1), config=BrokerConfig(losses_max=3))
    bench.worker()
    for attempt in range(1, 5):
        bench.say("w1", m.Conclude(token(1, attempt), "REJECTED", Reason.NEED_PLUGIN), 1)
    assert bench.kinds == [JournalKind.FAILED]
    assert bench.records[0].data is not None
    assert bench.records[0].data["reason"] == Reason.NEED_PLUGIN


def test_a_job_that_keeps_losing_its_worker_becomes_a_dead_letter() -> None:
    bench = Bench(make_job(1), config=BrokerConfig(losses_max=3))
    for n in range(4):
        bench.worker(f"w{n}")
        assert dispatched(bench) == [token(1, n + 1)]
        bench.say(f"w{n}", m.DispatchAck(token(1, n + 1)), 1)
        bench.pass_time(31.0)
    assert bench.kinds == [JournalKind.FAILED]
    assert bench.records[0].data is not None
    assert bench.records[0].data["dead_letter"] == "max_retries_exceeded"


def test_workers_that_break_down_before_they_begin_are_not_held_against_the_job() -> None:
    config = BrokerConfig(losses_max=3, losses_unbegun_max=6)
    bench = Bench(make_job(1), config=config)
    for n in range(6):
        bench.worker(f"w{n}")
        bench.pass_time(31.0)
        assert bench.kinds == [JournalKind.RETURNED]
    bench.worker("w6")
    bench.pass_time(31.0)
    assert bench.kinds == [JournalKind.FAILED]
    assert bench.records[0].data is not None
    assert bench.records[0].data["reason"] == Reason.LEASE_LOST


# -- restart --------------------------------------------------------------------------------


def running(number: int, owner: str, **changes: Any) -> Job:
    fields = {
        "status": JobStatus.RUNNING,
        "attempt": 1,
        "token": token(number, 1, epoch=2),
        "owner": identity(owner).hex() if owner else "",
        "manifest_id": 7,
    }
    return make_job(number, **(fields | changes))


def test_after_a_restart_a_job_still_held_goes_on() -> None:
    job = running(1, "w1")
    bench = Bench(active=[job])
    bench.worker("w1", held=[job.token])
    assert bench.records == []
    bench.pass_time(29.0)
    bench.conclude("w1", job)
    assert bench.kinds == [JournalKind.COMPLETED]


def test_after_a_restart_a_job_no_longer_held_runs_again() -> None:
    bench = Bench(active=[running(1, "w1")])
    bench.worker("w1", held=[])
    assert bench.kinds == [JournalKind.RETRIED, JournalKind.LEASED]


def test_after_a_restart_a_job_whose_worker_never_returns_runs_again() -> None:
    bench = Bench(active=[running(1, "gone")])
    bench.worker("w2")
    assert bench.records == []
    bench.pass_time(31.0)
    assert bench.kinds == [JournalKind.RETRIED]
    bench.worker("w3")
    assert bench.kinds == [JournalKind.LEASED]


def test_a_token_of_the_epoch_before_is_still_good_for_staging() -> None:
    job = running(1, "w1")
    bench = Bench(active=[job])
    bench.worker("w1", held=[job.token])
    bench.stage("w1", job)
    assert bench.kinds == [JournalKind.GRANTED]


def test_a_granted_job_whose_worker_is_gone_is_published_by_another() -> None:
    job = running(1, "gone", status=JobStatus.STAGED)
    job.manifest = (make_entry(job),)
    bench = Bench(active=[job])
    bench.worker("w2")
    bench.time += 15.0
    bench.say("w2", m.Heartbeat("IDLE"))
    bench.pass_time(16.0)
    (recover,) = bench.sent(m.Recover)
    assert (recover.token, recover.entries) == (job.token, job.manifest)
    bench.conclude("w2", job)
    assert bench.kinds == [JournalKind.COMPLETED]


def test_a_grant_is_recovered_only_by_a_worker_with_the_same_output_root() -> None:
    job = running(1, "", status=JobStatus.STAGED)
    job.manifest = (make_entry(job),)
    bench = Bench(active=[job])
    bench.worker("w2", root_id="elsewhere")
    assert bench.sent(m.Recover) == []
    bench.worker("w3")
    bench.pass_time(6.0)
    assert bench.sent_to("w3") == ["Recover"]


# -- failures -------------------------------------------------------------------------------


def test_a_transient_failure_waits_four_sixteen_and_sixty_four_seconds_then_gives_up() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    waits = []
    for _ in range(3):
        job = bench.broker.jobs[1]
        bench.conclude("w1", job, "FAILED", reason="timeout", error_message="too slow")
        (record,) = [r for r in bench.records if r.kind is JournalKind.RETRIED]
        assert record.data is not None
        waits.append((record.data["not_before_us"] - at(bench.time).wall_us) / 1e6)
        bench.time += waits[-1] + 0.01
        bench.say("w1", m.Heartbeat("IDLE"))
        assert bench.kinds == [JournalKind.LEASED]
    bench.conclude("w1", bench.broker.jobs[1], "FAILED", reason="timeout", error_message="again")
    assert bench.kinds == [JournalKind.STARTED, JournalKind.FAILED]
    assert bench.records[-1].data == {
        "reason": "timeout",
        "message": "again",
        "dead_letter": "max_retries_exceeded",
    }
    for wait, nominal in zip(waits, (4, 16, 64), strict=True):
        assert 0.8 * nominal <= wait <= 1.2 * nominal


def test_a_permanent_failure_is_a_dead_letter_at_once() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    bench.conclude("w1", bench.broker.jobs[1], "FAILED", reason="contract", error_message="bad")
    assert bench.records[-1].data == {
        "reason": "contract",
        "message": "bad",
        "dead_letter": "permanent_error",
    }


def test_the_plugins_own_word_on_transience_wins() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.conclude("w1", job, "FAILED", reason="plugin_error", transient=False)
    assert bench.kinds[-1] is JournalKind.FAILED


def fail_each(bench: Bench, jobs: Sequence[int]) -> None:
    for number in jobs:
        bench.conclude(
            "w1", bench.broker.jobs[number], "FAILED", reason="plugin_error", transient=False
        )


def test_five_failing_jobs_in_a_row_pause_the_plugin_until_it_is_resumed() -> None:
    bench = Bench(*(make_job(n) for n in range(1, 30)))
    bench.worker(slots=5, credit=5)
    fail_each(bench, range(1, 6))
    assert bench.broker.queue.lanes["sales"].health.paused
    assert dispatched(bench) == []
    health = [i.item for i in bench.out if isinstance(i, e.Commit)]
    assert any(isinstance(item, HealthRecord) and item.health.paused for item in health)
    bench.do(e.ResumePlugin("reply", "sales"))
    assert bench.replies == [{"outcome": "resumed"}]
    assert dispatched(bench)


def test_a_success_in_between_closes_the_circuit_breaker() -> None:
    bench = Bench(*(make_job(n) for n in range(1, 30)))
    bench.worker(slots=10, credit=10)
    fail_each(bench, range(1, 5))
    bench.conclude("w1", bench.broker.jobs[5])
    fail_each(bench, range(6, 10))
    assert not bench.broker.queue.lanes["sales"].health.paused


def test_one_jobs_own_retries_do_not_pause_the_plugin() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    for _ in range(4):
        bench.conclude("w1", bench.broker.jobs[1], "FAILED", reason="timeout")
        bench.time += 100.0
        bench.say("w1", m.Heartbeat("IDLE"))
    assert not bench.broker.jobs
    assert not bench.broker.queue.lanes["sales"].health.paused


def test_a_changed_source_is_skipped_without_a_dead_letter_and_scanned_again() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    bench.conclude("w1", bench.broker.jobs[1], "SKIPPED", reason="source_changed")
    (record,) = bench.records
    assert record.kind is JournalKind.SKIPPED
    assert record.data is not None
    assert "dead_letter" not in record.data
    assert [i for i in bench.out if isinstance(i, e.Rescan)] == [e.Rescan(1, "file1.csv")]


def test_a_job_given_back_goes_elsewhere_and_costs_no_retry() -> None:
    bench = Bench(make_job(1))
    bench.worker("w1")
    job = bench.broker.jobs[1]
    bench.conclude("w1", job, "REJECTED", reason="busy")
    assert bench.kinds == [JournalKind.RETURNED]
    bench.worker("w2")
    assert dispatched(bench) == [token(1, 2)]
    assert job.retry_count == 0


def test_a_worker_that_lacks_the_plugin_is_sent_it_again() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    bench.conclude("w1", bench.broker.jobs[1], "REJECTED", reason="need_plugin")
    assert bench.sent_to("w1") == ["ConcludeAck", "Plugin", "Dispatch"]


def test_a_draining_worker_gets_nothing_new() -> None:
    bench = Bench()
    bench.worker()
    bench.say("w1", m.Heartbeat("DRAINING"))
    bench.do(e.JobsAdded([make_job(1)]))
    assert dispatched(bench) == []


# -- cancel ---------------------------------------------------------------------------------


def test_cancelling_a_queued_job_aborts_it() -> None:
    bench = Bench(make_job(1))
    bench.do(e.Cancel("reply", 1, "ada"))
    assert bench.kinds == [JournalKind.ABORTED]
    assert bench.replies == [{"outcome": "cancelled", "status": JobStatus.ABORTED}]
    bench.worker()
    assert dispatched(bench) == []


def test_cancelling_a_running_job_stops_its_worker_and_refuses_its_stage() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    entry = make_entry(job)
    bench.do(e.Cancel("reply", 1))
    assert [a.token for a in bench.sent(m.Abort)] == [token(1)]
    bench.say("w1", m.Stage(token(1), (entry,)), 1)
    assert [r.reason for r in bench.sent(m.Refuse)] == [Reason.STALE_TOKEN]


def test_cancel_after_the_grant_is_too_late() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    bench.grant(job)
    bench.do(e.Cancel("reply", 1))
    assert bench.replies == [{"outcome": "too_late", "status": JobStatus.STAGED}]
    assert bench.records == []


def test_cancel_during_the_grant_is_answered_as_the_ledger_decides() -> None:
    bench = Bench(make_job(1), make_job(2))
    bench.worker()
    granted, refused = bench.broker.jobs[1], bench.broker.jobs[2]
    for job in (granted, refused):
        bench.stage("w1", job)
        bench.do(e.Cancel(job.job_id, job.job_id))
        assert bench.replies == []
    bench.grant(granted)
    assert [r["outcome"] for r in bench.replies] == ["too_late"]
    bench.grant(refused, Reason.SINK_CONFLICT)
    assert bench.kinds == [JournalKind.FAILED]
    assert [r["outcome"] for r in bench.replies] == ["unknown"]


def test_a_sink_that_refuses_for_good_leaves_the_job_staged_for_an_operator() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    bench.grant(job)
    bench.conclude("w1", job, "FAILED", reason="sink_conflict", error_message="other bytes there")
    assert bench.records == []
    assert job.status is JobStatus.STAGED
    assert bench.broker.leases[1].stuck == "other bytes there"
    bench.pass_time(10.0)
    assert bench.sent(m.Recover) == []
    bench.do(e.Resolve("reply", 1, forward=True))
    assert [r.token for r in bench.sent(m.Recover)] == [job.token]


def test_an_operator_may_abandon_a_granted_job() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.stage("w1", job)
    bench.grant(job)
    bench.do(e.Resolve("reply", 1, forward=False, by="ada"))
    assert bench.kinds == [JournalKind.FAILED]
    assert bench.replies == [{"outcome": "resolved", "forward": False}]
    assert [a.reason for a in bench.sent(m.Abort)] == [Reason.ABANDONED]


# -- odds and ends --------------------------------------------------------------------------


def test_only_stages_that_are_neither_current_nor_granted_are_garbage() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    foreign = "0123abcd-1-1-1"
    bench.say("w1", m.Stages([token(1), token(1, 9), token(77), foreign, "no token"]))
    assert bench.sent(m.Discard) == [m.Discard([token(1, 9), token(77)])]


def test_a_broken_frame_is_counted_and_answered() -> None:
    bench = Bench()
    bench.do(e.BadFrame(identity("x"), "header has 3 bytes"))
    assert [err.code for err in bench.sent(m.Err)] == ["malformed"]
    assert bench.broker.counters["protocol_errors"] == 1


def test_a_message_that_only_a_sentinel_sends_is_refused() -> None:
    bench = Bench()
    bench.worker()
    bench.say("w1", m.Grant(token(1)))
    assert [err.code for err in bench.sent(m.Err)] == ["unexpected"]


def test_hydration_never_brings_back_a_job_that_has_finished_meanwhile() -> None:
    first = make_job(1)
    bench = Bench(first, more_queued=True)
    assert bench.out == [e.Hydrate((50, 1))]
    bench.worker()
    bench.conclude("w1", bench.broker.jobs[1])
    bench.do(e.Hydrated([make_job(1), make_job(2)], more=False))
    assert dispatched(bench) == [token(2)]


def test_a_retry_waits_its_time_after_a_restart_and_no_longer_when_the_clock_was_set_back() -> None:
    soon = make_job(1, retry_count=2, not_before_us=at(5.0).wall_us)
    far = make_job(2, retry_count=2, not_before_us=at(10_000_000.0).wall_us)
    bench = Bench(soon, far)
    bench.worker()
    assert dispatched(bench) == []
    assert bench.broker.wakeup == pytest.approx(5.0)
    bench.time = 5.1
    bench.say("w1", m.Heartbeat("IDLE"))
    assert dispatched(bench) == [token(1)]
    bench.time = 16.0 * 1.2 + 0.1
    bench.worker("w2")
    assert token(2) in dispatched(bench)


def test_a_drained_broker_leases_nothing() -> None:
    bench = Bench(make_job(1))
    bench.do(e.Drain())
    bench.worker()
    assert dispatched(bench) == []


def test_a_paused_plugin_in_the_ledger_stays_paused_after_a_restart() -> None:
    bench = Bench(make_job(1), health=[Health("sales", 5, True, "broken")])
    bench.worker()
    assert dispatched(bench) == []


def test_tokens_name_ledger_epoch_job_and_attempt() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    assert bench.broker.jobs[1].token == f"{LEDGER_ID}-3-1-1"


def test_who_waits_for_a_job_is_told_with_its_end_and_not_before() -> None:
    bench = Bench(make_job(1))
    bench.worker()
    job = bench.broker.jobs[1]
    bench.do(e.AwaitJob("ada", 1, 60.0), e.AwaitJob("eve", 1, 60.0))
    bench.conclude("w1", job, "FAILED", reason="sink_unreachable", transient=True)
    assert bench.replies == []
    bench.pass_time(10.0)
    bench.conclude("w1", job)
    assert bench.replies == [{"outcome": "ended", "status": JobStatus.COMPLETED}] * 2


def test_who_has_waited_long_enough_for_a_job_is_told_where_it_is() -> None:
    bench = Bench(make_job(1))
    bench.do(e.AwaitJob("ada", 1, 5.0), e.AwaitJob("eve", 2, 5.0))
    assert bench.replies == [{"outcome": "unknown"}]
    bench.pass_time(4.0)
    assert bench.replies == []
    bench.pass_time(2.0)
    assert bench.replies == [{"outcome": "waiting", "status": JobStatus.QUEUED}]
    assert bench.broker.unanswered == []


# -- jobs that an API job has made ----------------------------------------------------------------


def rehearsal(number: int = 1) -> Bench:
    job = make_job(number)
    job.rehearsal = 5
    bench = Bench(job, config=BrokerConfig(breaker_failures=1))
    bench.worker()
    return bench


def test_a_rehearsal_is_told_so_and_its_report_is_kept() -> None:
    bench = rehearsal()
    (dispatch,) = bench.sent(m.Dispatch)
    assert dispatch.rehearsal == 5
    bench.conclude("w1", bench.broker.jobs[JobId(1)], report='{"topics":[]}', metrics={"rows": 3})
    assert bench.kinds[-1] is JournalKind.COMPLETED
    assert bench.records[-1].data == {
        "completion": "SUCCESS",
        "metrics": {"rows": 3},
        "report": '{"topics":[]}',
    }


def test_a_rehearsal_is_never_granted() -> None:
    bench = rehearsal()
    bench.stage("w1", bench.broker.jobs[JobId(1)])
    (refusal,) = bench.sent(m.Refuse)
    assert refusal.message == "a rehearsal publishes nothing"
    assert bench.sent(m.Grant) == []
    assert JournalKind.GRANTED not in bench.kinds


def test_a_failed_rehearsal_counts_for_nothing() -> None:
    bench = rehearsal()
    bench.conclude("w1", bench.broker.jobs[JobId(1)], "FAILED", reason=Reason.TIMEOUT)
    assert bench.kinds[-1] is JournalKind.FAILED
    assert "dead_letter" not in (bench.records[-1].data or {})
    assert not bench.broker.queue.lane("sales").health.paused


def test_a_pinned_job_is_left_when_other_code_is_active() -> None:
    job = make_job(1)
    job.pin = "other/code"
    bench = Bench(job)
    bench.worker()
    assert bench.sent(m.Dispatch) == []
    (record,) = bench.records
    assert (record.kind, (record.data or {})["reason"]) == (
        JournalKind.SKIPPED,
        Reason.PLUGIN_CHANGED,
    )


def test_a_pinned_job_runs_with_its_own_code() -> None:
    job = make_job(1)
    job.pin = make_spec().code
    bench = Bench(job)
    bench.worker()
    assert len(bench.sent(m.Dispatch)) == 1
