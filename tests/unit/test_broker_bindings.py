"""Workers bound to one plugin version: what the broker sends them, and believes of them."""

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from builders import ROOT_ID, at, identity, make_entry, make_job, make_spec, make_state

from casparian_flow.domain.clock import Now
from casparian_flow.domain.ids import ManifestId
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.records import GrantOutcome, Job, PluginSpec, StagedVersion
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.broker import Broker, BrokerConfig
from casparian_flow.sentinel.leases import Binding, Worker
from casparian_flow.sentinel.trials import Staged, Told, Trials

T = TypeVar("T")
OLD, NEW, OTHER = "a" * 64, "b" * 64, "c" * 64


class Bound:
    """A broker whose workers are all bound."""

    def __init__(self, *jobs: Job, plugins: Sequence[PluginSpec] = ()) -> None:
        self.broker = Broker(BrokerConfig(), random.Random(0))
        specs = plugins or (make_spec(), make_spec("other", artifact_hash=OTHER))
        self.time = 0.0
        self.out = self.broker.restore(make_state(jobs, plugins=specs), at(0.0))

    def do(self, *events: e.Event) -> list[e.Instruction]:
        self.out = self.broker.step(events, at(self.time))
        self.broker.invariants()
        return self.out

    def worker(
        self,
        name: str,
        plugin: str = "sales",
        code: str = OLD,
        held: Sequence[str] = (),
        **more: Any,
    ) -> None:
        identify = m.Identify(
            name,
            more.get("nonce", name),
            held=list(held),
            root_id=ROOT_ID,
            slots=more.get("slots", 1),
            credit=more.get("slots", 1),
        )
        self.do(e.WorkerMessage(identity(name), 0, identify, (plugin, code)))

    def say(self, name: str, message: m.Message, binding: tuple[str, str] = ("sales", OLD)) -> None:
        self.do(e.WorkerMessage(identity(name), 0, message, binding))

    def sent(self, name: str, kind: type[T]) -> list[T]:
        sends = [i for i in self.out if isinstance(i, e.Send) and i.identity == identity(name)]
        return [send.message for send in sends if isinstance(send.message, kind)]

    def granted(self, name: str, job: Job) -> None:
        self.say(name, m.Stage(job.token, (make_entry(job),)))
        self.do(e.GrantResult(GrantOutcome(job.job_id, job.token, "")))
        assert job.status is JobStatus.STAGED


def test_jobs_go_to_workers_of_the_very_version_that_is_active() -> None:
    job = make_job(1)
    bench = Bound(job)
    bench.worker("of other", "other", OTHER)
    bench.worker("of new", "sales", NEW)
    assert bench.broker.leases == {}
    bench.worker("of old")
    assert [d.plugin_name for d in bench.sent("of old", m.Dispatch)] == ["sales"]


def test_a_new_version_moves_queued_jobs_to_its_own_workers() -> None:
    jobs = [make_job(1), make_job(2)]
    bench = Bound(*jobs)
    bench.worker("old")
    first = bench.sent("old", m.Dispatch)[0]
    new = make_spec(artifact_hash=NEW, spec_id="new", manifest_id=ManifestId(8))
    bench.do(e.PluginsChanged([new]))
    bench.say("old", m.Conclude(first.token, "SUCCESS"))
    assert bench.sent("old", m.ConcludeAck)
    assert bench.sent("old", m.Dispatch) == []
    bench.worker("new", "sales", NEW)
    assert [d.spec_id for d in bench.sent("new", m.Dispatch)] == ["new"]


def test_grants_are_recovered_by_workers_of_the_same_plugin_only() -> None:
    job = make_job(1)
    bench = Bound(job)
    bench.worker("old")
    bench.granted("old", job)
    bench.worker("of other", "other", OTHER)
    bench.time += 31
    bench.do(e.Tick())
    assert bench.sent("of other", m.Recover) == []
    bench.time += 6
    bench.worker("new", "sales", NEW)
    (recover,) = bench.sent("new", m.Recover)
    assert recover.token == job.token
    bench.say("new", m.Heartbeat("BUSY", [job.token]), ("sales", NEW))
    assert bench.sent("new", m.Abort) == []
    bench.say("new", m.Conclude(job.token, "SUCCESS"), ("sales", NEW))
    assert job.status is JobStatus.COMPLETED


def test_what_a_worker_says_of_another_plugin_s_job_changes_nothing() -> None:
    job = make_job(1)
    bench = Bound(job)
    bench.worker("old")
    thief = ("other", OTHER)
    bench.worker("thief", *thief, held=[job.token])
    assert [a.token for a in bench.sent("thief", m.Abort)] == [job.token]
    for message in (
        m.DispatchAck(job.token),
        m.Stage(job.token, (make_entry(job),)),
        m.Conclude(job.token, "SUCCESS"),
        m.Heartbeat("BUSY", [job.token]),
    ):
        bench.say("thief", message, thief)
        assert not any(isinstance(i, e.Commit) for i in bench.out)
    assert job.status is JobStatus.DISPATCHING
    assert bench.broker.leases[job.job_id].owner == identity("old")
    bench.say("thief", m.Stages([job.token]), thief)
    assert bench.sent("thief", m.Discard) == []  # the stage of a live attempt is no garbage
    assert bench.broker.counters["foreign_tokens"] == 5


def test_a_bound_worker_that_is_not_known_says_nothing_that_counts() -> None:
    job = make_job(1)
    bench = Bound(job)
    bench.worker("old")
    bench.say("unknown", m.Conclude(job.token, "SUCCESS"))
    assert [err.code for err in bench.sent("unknown", m.Err)] == ["unknown_worker"]
    assert job.status is JobStatus.DISPATCHING


def test_a_process_that_connects_anew_is_forgotten_under_its_old_routing_id() -> None:
    jobs = [make_job(1), make_job(2)]
    bench = Bound(*jobs)
    bench.worker("before", slots=2, nonce="n")
    assert len(bench.sent("before", m.Dispatch)) == 2
    bench.worker("after", slots=2, nonce="n", held=[jobs[0].token])
    assert list(bench.broker.workers) == [identity("after")]
    assert bench.broker.leases[jobs[0].job_id].owner == identity("after")
    # The other one never arrived, and is sent again at once.
    assert [d.token for d in bench.sent("after", m.Dispatch)] == [jobs[1].token]
    bench.worker("of another plugin", "other", OTHER, nonce="n")
    assert identity("after") in bench.broker.workers


def test_a_revoked_worker_ends_its_job_and_gets_nothing_more() -> None:
    jobs = [make_job(1), make_job(2)]
    bench = Bound(*jobs)
    bench.worker("old")
    bench.do(e.WorkerRevoked(identity("old")))
    bench.say("old", m.Heartbeat("BUSY", [jobs[0].token]))
    bench.granted("old", jobs[0])
    bench.say("old", m.Conclude(jobs[0].token, "SUCCESS"))
    assert jobs[0].status is JobStatus.COMPLETED
    assert bench.sent("old", m.Dispatch) == []
    bench.do(e.WorkerRevoked(identity("nobody")))
    bench.worker("old")  # admitted again
    assert len(bench.sent("old", m.Dispatch)) == 1


def test_trials_go_to_workers_bound_to_the_version_and_are_told_by_them_only() -> None:
    spec = make_spec(artifact_hash=NEW)
    trials = Trials("t")

    def bound(name: str, code: str) -> Worker:
        worker = Worker(identity(name), name, "n", frozenset(), "r", 1, 8, 8.0, 0, 0.0)
        worker.bound = Binding("sales", code)
        return worker

    workers = {w.identity: w for w in (bound("old", OLD),)}
    assert trials.step([Staged([StagedVersion(spec)])], workers, Now(0.0, 0)) == []
    workers[identity("new")] = bound("new", NEW)
    (send,) = trials.step([], workers, Now(1.0, 0))
    assert isinstance(send, e.Send)
    assert send.identity == identity("new")
    assert isinstance(send.message, m.Trial)
    passed = m.TrialResult(send.message.trial_id, "passed")
    # Another one has the same nonce, which is no proof of anything.
    assert trials.step([Told(identity("old"), passed)], workers, Now(2.0, 0)) == []
    assert len(trials.step([Told(identity("new"), passed)], workers, Now(3.0, 0))) == 1
