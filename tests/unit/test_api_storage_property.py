"""The API's storage against a model: any order of calls, of restarts, of callers at once.

The model is what the guarantees say in their simplest form: lists and dicts. A restart closes
the ledger's file and opens it again; a clean-up moves the clock first.
"""

import random
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from ledger_kit import ManualClock

from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import ConflictError, NotFoundError
from casparian_flow.protocol import (
    ApprovalBinding,
    ApprovalOperation,
    ApprovalStatus,
    EventType,
    HttpJobStatus,
    HttpJobType,
)
from casparian_flow.protocol.http_types import HTTP_TRANSITIONS

TTL_S = 100
RUN = ApprovalOperation.Run(plugin_name="p", input_dir="/in", file_count=1)


def binding(files: int) -> ApprovalBinding:
    return ApprovalBinding(
        artifact_hash="a", files_digest=str(files), file_count=1, sink="s", parameters_hash=""
    )


@dataclass
class ModelJob:
    status: HttpJobStatus = HttpJobStatus.QUEUED
    events: list[str] = field(default_factory=list)
    removed: int = 0
    told: HttpJobStatus | None = None
    finished_s: float = 0.0
    event_s: list[float] = field(default_factory=list)


@dataclass
class ModelApproval:
    expires_s: float
    files: int | None
    status: ApprovalStatus = ApprovalStatus.PENDING
    job_id: int | None = None

    def at(self, seconds: float) -> ApprovalStatus:
        over = self.status is ApprovalStatus.PENDING and self.expires_s <= seconds
        return ApprovalStatus.EXPIRED if over else self.status


class ApiMachine(RuleBasedStateMachine):
    jobs: Bundle[int] = Bundle("jobs")
    approvals: Bundle[str] = Bundle("approvals")

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.clock = ManualClock()
        self.model: dict[int, ModelJob] = {}
        self.gone: set[int] = set()
        self.asked: dict[str, ModelApproval] = {}
        self._reopen()

    def _reopen(self) -> None:
        self.ledger = Ledger.open(Path(self.folder.name) / "l.duckdb", clock=self.clock)
        self.storage = ApiStorage(self.ledger, clock=self.clock)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            assert self.ledger.check() == []
            self.ledger.close()
            self.folder.cleanup()

    # -- time and restarts ------------------------------------------------------------------

    @rule(seconds=st.integers(1, TTL_S))
    def time_passes(self, seconds: int) -> None:
        self.clock.seconds += seconds

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self._reopen()

    # -- jobs -------------------------------------------------------------------------------

    @rule(target=jobs, kind=st.sampled_from(HttpJobType))
    def create_job(self, kind: HttpJobType) -> int:
        job_id = self.storage.create_job(kind, "p", None, "/in")
        assert job_id > max([*self.model, *self.gone], default=0)
        self.model[job_id] = ModelJob()
        return job_id

    @rule(job_id=jobs, status=st.sampled_from(HttpJobStatus))
    def update_status(self, job_id: int, status: HttpJobStatus) -> None:
        job = self.model.get(job_id)
        if job is None:
            with pytest.raises(NotFoundError):
                self.storage.update_job_status(job_id, status)
        elif job.status.is_terminal:
            assert not self.storage.update_job_status(job_id, status)
        elif status is job.status or status in HTTP_TRANSITIONS[job.status]:
            assert self.storage.update_job_status(job_id, status)
            self._ended(job, status)
        else:
            with pytest.raises(ConflictError):
                self.storage.update_job_status(job_id, status)

    def _ended(self, job: ModelJob, status: HttpJobStatus) -> None:
        job.status = status
        if status.is_terminal:
            job.finished_s = self.clock.seconds

    @rule(job_id=jobs)
    def cancel(self, job_id: int) -> None:
        job = self.model.get(job_id)
        expected = job is not None and not job.status.is_terminal
        assert self.storage.cancel_job(job_id) is expected
        if job is not None and expected:
            self._ended(job, HttpJobStatus.CANCELLED)
            if job.told is not HttpJobStatus.CANCELLED:
                self._added(job, "job_finished")
            job.told = HttpJobStatus.CANCELLED

    def _added(self, job: ModelJob, kind: str) -> None:
        job.events.append(kind)
        job.event_s.append(self.clock.seconds)

    @rule(job_id=jobs, count=st.integers(1, 40))
    def insert_events(self, job_id: int, count: int) -> None:
        job = self.model.get(job_id)
        events = [EventType.Phase(str(n)) for n in range(count)]
        if job is None or job.status.is_terminal:
            with pytest.raises((NotFoundError, ConflictError)):
                self.storage.insert_events(job_id, events)
            return
        first = len(job.events) + 1
        assert self.storage.insert_events(job_id, events) == list(range(first, first + count))
        for _ in events:
            self._added(job, "phase")

    @rule(job_id=jobs, status=st.sampled_from([s for s in HttpJobStatus if s.is_terminal]))
    def tell_the_end(self, job_id: int, status: HttpJobStatus) -> None:
        job = self.model.get(job_id)
        event = EventType.JobFinished(status)
        late = job is not None and job.status.is_terminal
        if job is None or (late and (job.told is not None or status is not job.status)):
            with pytest.raises((NotFoundError, ConflictError)):
                self.storage.insert_event(job_id, event)
            return
        assert self.storage.insert_event(job_id, event) == len(job.events) + 1
        self._added(job, "job_finished")
        job.told = status

    @rule(job_id=jobs, after=st.integers(0, 50), limit=st.one_of(st.none(), st.integers(1, 20)))
    def list_events(self, job_id: int, after: int, limit: int | None) -> None:
        job = self.model.get(job_id, ModelJob())
        first = max(after, job.removed)
        wanted = list(range(first + 1, len(job.events) + 1))[:limit]
        found = self.storage.list_events(job_id, after, limit)
        assert [e.event_id for e in found] == wanted
        assert [e.event_type for e in found] == [job.events[i - 1] for i in wanted]

    @rule(
        job_hours=st.sampled_from([0.0, 0.01, 1.0]), event_hours=st.sampled_from([0.0, 0.01, 1.0])
    )
    def clean_up(self, job_hours: float, event_hours: float) -> None:
        now, jobs, events = self.clock.seconds, 0, 0
        for job_id, job in list(self.model.items()):
            if not job.status.is_terminal:
                continue
            if job.finished_s <= now - job_hours * 3600:
                jobs, events = jobs + 1, events + len(job.events) - job.removed
                del self.model[job_id]
                self.gone.add(job_id)
                continue
            old = [n for n, at in enumerate(job.event_s, 1) if at <= now - event_hours * 3600]
            removed = max([job.removed, *old])
            events, job.removed = events + removed - job.removed, removed
            if removed and job.told is None:
                job.told = job.status  # it takes no event any more
        assert self.storage.cleanup_old_data(job_hours, event_hours) == (jobs, events)

    # -- approvals --------------------------------------------------------------------------

    @rule(
        target=approvals,
        seconds=st.integers(-1, TTL_S),
        files=st.one_of(st.none(), st.integers(1, 2)),
    )
    def ask(self, seconds: int, files: int | None) -> str:
        approval_id = self.storage.generate_approval_id()
        bound = None if files is None else binding(files)
        self.storage.create_approval(
            approval_id, RUN, "Run p", timedelta(seconds=seconds), binding=bound
        )
        self.asked[approval_id] = ModelApproval(self.clock.seconds + seconds, files)
        return approval_id

    @rule(approval_id=approvals, files=st.one_of(st.none(), st.integers(1, 2)))
    def approve(self, approval_id: str, files: int | None) -> None:
        asked = self.asked[approval_id]
        pending = asked.at(self.clock.seconds) is ApprovalStatus.PENDING
        changed = None not in (files, asked.files) and files != asked.files
        current = None if files is None else binding(files)
        assert self.storage.approve(approval_id, "ann", binding=current) is (
            pending and not changed
        )
        if pending:
            asked.status = ApprovalStatus.STALE if changed else ApprovalStatus.APPROVED

    @rule(approval_id=approvals)
    def reject(self, approval_id: str) -> None:
        asked = self.asked[approval_id]
        pending = asked.at(self.clock.seconds) is ApprovalStatus.PENDING
        assert self.storage.reject(approval_id, "bob") is pending
        if pending:
            asked.status = ApprovalStatus.REJECTED

    @rule()
    def sweep(self) -> None:
        over = [
            a
            for a in self.asked.values()
            if a.status is ApprovalStatus.PENDING and a.expires_s <= self.clock.seconds
        ]
        assert self.storage.expire_approvals() == len(over)
        for asked in over:
            asked.status = ApprovalStatus.EXPIRED

    @rule(target=jobs, approval_id=approvals, files=st.integers(1, 2))
    def start(self, approval_id: str, files: int) -> object:
        asked = self.asked[approval_id]
        job_id = self.storage.start_approved(approval_id, binding=binding(files))
        if asked.job_id is not None:
            assert job_id == asked.job_id
        elif asked.status is not ApprovalStatus.APPROVED:
            assert job_id is None
        elif asked.files not in (None, files):
            assert job_id is None
            asked.status = ApprovalStatus.STALE
        else:
            assert job_id is not None
            asked.job_id = job_id
            self.model[job_id] = ModelJob()
            return job_id
        return multiple()

    @rule(approval_id=consumes(approvals))
    def void(self, approval_id: str) -> None:
        asked = self.asked[approval_id]
        job = self.model.get(asked.job_id or 0)
        status = asked.at(self.clock.seconds)
        begun = asked.job_id is not None and (job is None or job.status is not HttpJobStatus.QUEUED)
        voidable = status in {ApprovalStatus.PENDING, ApprovalStatus.APPROVED} and not begun
        assert self.storage.mark_stale(approval_id, ["changed"]) is voidable
        if voidable:
            asked.status = ApprovalStatus.STALE
            if job is not None:
                self._ended(job, HttpJobStatus.FAILED)
                if job.told is not HttpJobStatus.FAILED:
                    self._added(job, "job_finished")
                job.told = HttpJobStatus.FAILED

    # -- what always holds --------------------------------------------------------------------

    @invariant()
    def the_tables_are_the_model(self) -> None:
        if not hasattr(self, "storage"):
            return
        assert {j.job_id: j.status for j in self.storage.list_jobs()} == {
            job_id: job.status for job_id, job in self.model.items()
        }
        assert {a.approval_id: (a.status, a.job_id) for a in self.storage.list_approvals()} == {
            approval_id: (asked.at(self.clock.seconds), asked.job_id)
            for approval_id, asked in self.asked.items()
        }


TestApiStorageMachine = ApiMachine.TestCase
TestApiStorageMachine.settings = settings(
    max_examples=8,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def test_api_storage_keeps_its_guarantees_for_callers_at_once() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    clock = ManualClock()
    with Ledger.in_memory(clock=clock) as ledger:
        storage = ApiStorage(ledger, clock=clock)
        jobs = [storage.create_job(HttpJobType.RUN, "p", None, "/in") for _ in range(4)]
        asked = [storage.generate_approval_id() for _ in range(20)]
        for approval_id in asked:
            storage.create_approval(approval_id, RUN, "Run p", timedelta(hours=1))
        told: dict[int, list[int]] = {job_id: [] for job_id in jobs}
        decided: dict[str, list[bool]] = {approval_id: [] for approval_id in asked}
        cancelled: list[bool] = []
        started: dict[str, set[int | None]] = {approval_id: set() for approval_id in asked}
        rngs = [random.Random(seed + n) for n in range(8)]

        def call(n: int) -> None:
            rng = rngs[n]
            for step in range(25):
                job_id = rng.choice(jobs)
                try:
                    told[job_id].append(storage.insert_event(job_id, EventType.Phase(str(step))))
                except ConflictError:
                    cancelled.append(False)
                approval_id = rng.choice(asked)
                decide = storage.approve if rng.random() < 0.7 else storage.reject
                decided[approval_id].append(decide(approval_id, f"caller {n}"))
                started[approval_id].add(storage.start_approved(approval_id))
                if step == 20:
                    cancelled.append(storage.cancel_job(jobs[0]))

        callers = [threading.Thread(target=call, args=(n,)) for n in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert sum(cancelled) == 1
        for job_id in jobs:
            there = [e.event_id for e in storage.list_events(job_id)]
            assert there == list(range(1, len(there) + 1))
            assert sorted(told[job_id]) == there[: len(told[job_id])]
        assert [e.event_type for e in storage.list_events(jobs[0])].count("job_finished") == 1
        assert storage.list_events(jobs[0])[-1].event_type == "job_finished"
        for approval_id in asked:
            assert sum(decided[approval_id]) <= 1
            assert len(started[approval_id] - {None}) <= 1
        assert ledger.check() == []
