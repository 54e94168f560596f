"""The API's storage in a running Sentinel: over the control socket, beside jobs, across kills."""

import os
import pwd
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from acceptance_kit import free_port
from worker_process import wait_until

from casparian_flow.db.api_storage import WAITERS_MAX, ApiStorage
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import (
    ConflictError,
    NotFoundError,
    NotPermittedError,
    SentinelUnreachableError,
    UsageError,
)
from casparian_flow.protocol import (
    ApprovalBinding,
    ApprovalOperation,
    ApprovalStatus,
    EventType,
    HttpJobStatus,
    HttpJobType,
    OutputInfo,
)
from casparian_flow.sentinel import Sentinel, SentinelConfig
from casparian_flow.sentinel.api import ApiClient
from casparian_flow.sentinel.api_calls import carry_out
from casparian_flow.sentinel.caller import Caller
from casparian_flow.sentinel.control import ControlClient, connect, remote
from casparian_flow.sentinel.housekeeping import Retention
from casparian_flow.sentinel.paths import control_address

ME = pwd.getpwuid(os.geteuid()).pw_name
RUN = ApprovalOperation.Run(plugin_name="p", input_dir="/in", file_count=3)
BINDING = ApprovalBinding(
    artifact_hash="a1", files_digest="f1", file_count=3, sink="s", parameters_hash="{}"
)
PATIENCE_S = 20.0


class Running:
    """A Sentinel in a thread."""

    def __init__(
        self, database: Path, bind_address: str = "tcp://127.0.0.1:*", **config: object
    ) -> None:
        self.database = database
        self.sentinel = Sentinel(
            SentinelConfig(bind_address=bind_address, database=database, **config)  # type: ignore[arg-type]
        )
        self._thread = threading.Thread(target=self.sentinel.run)
        self._thread.start()
        assert self.sentinel.wait_started(PATIENCE_S)

    def close(self) -> None:
        self.sentinel.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "casparian_flow.duckdb"


@pytest.fixture
def api(database: Path) -> Iterator[ApiClient]:
    running = Running(database)
    # The file is open in this very process: only the control socket is left.
    with ApiStorage.open(f"duckdb:{database}") as client:
        yield client
    running.close()


def new_job(api: ApiClient) -> int:
    return api.create_job(HttpJobType.RUN, "p", "1.0", "/in", "parquet://out")


def test_api_storage_is_the_same_over_the_control_socket(api: ApiClient) -> None:
    api.init_schema()
    job_id = new_job(api)
    assert api.update_job_status(job_id, HttpJobStatus.RUNNING)
    assert api.insert_event(job_id, EventType.JobStarted()) == 1
    assert api.insert_events(job_id, [EventType.Phase("a"), EventType.Phase("b")]) == [2, 3]
    assert api.next_event_id(job_id) == 4
    assert [e.payload for e in api.list_events(job_id, 1)] == [
        EventType.Phase("a"),
        EventType.Phase("b"),
    ]
    assert api.update_job_progress(job_id, "read", 1, 3)
    output = OutputInfo(name="t", sink_uri="parquet://out", rows=3)
    assert api.update_job_result(job_id, 3, 90, [output], {"files": 1})
    assert api.finish_job(job_id, HttpJobStatus.COMPLETED)
    job = api.get_job(job_id)
    assert job is not None
    assert job.result is not None
    assert (job.status, job.result.outputs) == (HttpJobStatus.COMPLETED, [output])
    assert not api.cancel_job(job_id)
    assert [j.job_id for j in api.list_jobs(HttpJobStatus.COMPLETED)] == [job_id]
    assert api.cleanup_old_data(0, 0) == (1, 4)
    with pytest.raises(NotFoundError):
        api.insert_event(job_id, EventType.JobStarted())
    with pytest.raises(UsageError):
        api.list_jobs("done")  # type: ignore[arg-type]


def test_a_decision_is_that_of_the_user_whom_the_kernel_names(api: ApiClient) -> None:
    approval_id = api.generate_approval_id()
    api.create_approval(approval_id, RUN, "Run p", timedelta(hours=1), binding=BINDING)
    assert api.approve(approval_id, "somebody else", binding=BINDING)
    approval = api.get_approval(approval_id)
    assert approval is not None
    assert (approval.decided_by, approval.requester) == (ME, ME)
    job_id = api.start_approved(approval_id, binding=BINDING)
    assert job_id == api.start_approved(approval_id, binding=BINDING)
    assert not api.reject(approval_id, None, "too late")
    assert [a.approval_id for a in api.list_approvals(ApprovalStatus.APPROVED)] == [approval_id]


def test_nobody_decides_over_a_socket_that_names_nobody() -> None:
    with Ledger.in_memory(clock=SystemClock()) as ledger:
        storage = ApiStorage(ledger)
        for method in ("approve", "reject"):
            with pytest.raises(NotPermittedError):
                carry_out(storage, method, {"approval_id": "a"}, Caller("tcp"))


def test_what_a_namespace_asks_for_is_decided_on_its_object_and_by_no_call(api: ApiClient) -> None:
    asked = ApprovalOperation.Run(plugin_name="finance/p", input_dir="/in", file_count=1)
    for approval_id in ("a", "b"):
        api.create_approval(approval_id, asked, "Run p", timedelta(hours=1), requester="rita")
    with pytest.raises(NotPermittedError, match="Approval object in the namespace finance") as told:
        api.approve("a", "ann")
    assert "kubectl patch approval" in told.value.hint
    with pytest.raises(NotPermittedError):
        api.reject("b", "ann", "no")
    assert len(api.list_approvals(ApprovalStatus.PENDING)) == 2


def test_a_sentinel_may_forbid_to_approve_ones_own_request(database: Path) -> None:
    running = Running(database, allow_self_approval=False)
    with connect(database) as control:
        approval_id = control.api.generate_approval_id()
        control.api.create_approval(approval_id, RUN, "Run p", timedelta(hours=1))
        with pytest.raises(NotPermittedError):
            control.api.approve(approval_id)
        control.api.create_approval("other", RUN, "Run p", timedelta(hours=1), requester="ann")
        assert control.api.approve("other")
    running.close()


@pytest.mark.parametrize(("host", "allowed"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_ones_own_request_is_approved_only_while_all_workers_are_on_this_machine(
    database: Path, host: str, allowed: bool
) -> None:
    running = Running(database, bind_address=f"tcp://{host}:*")
    with connect(database) as control:
        control.api.create_approval("a", RUN, "Run p", timedelta(hours=1))
        if allowed:
            assert control.api.approve("a")
        else:
            with pytest.raises(NotPermittedError):
                control.api.approve("a")
    running.close()


def test_who_waits_is_woken_by_an_insert_at_once(api: ApiClient) -> None:
    job_id = new_job(api)
    woken: list[float] = []
    waiting = threading.Event()

    def follow() -> None:
        after = 0
        while True:
            waiting.set()
            events = api.wait_events(job_id, after, PATIENCE_S)
            woken.append(time.perf_counter())
            after = events[-1].event_id
            if events[-1].event_type == "job_finished":
                return

    follower = threading.Thread(target=follow)
    follower.start()
    inserted = []
    for n in range(10):
        waiting.wait(PATIENCE_S)
        waiting.clear()
        threading.Event().wait(0.02)  # until it is really waiting, as a rule
        api.insert_event(job_id, EventType.Phase(str(n)))
        inserted.append(time.perf_counter())
    waiting.wait(PATIENCE_S)
    api.cancel_job(job_id)
    follower.join(PATIENCE_S)
    assert len(woken) == 11
    lags = sorted(w - i for w, i in zip(woken, inserted, strict=False))
    assert lags[len(lags) // 2] < 0.1


def test_a_wait_ends_without_news_and_with_those_of_the_status(api: ApiClient) -> None:
    job_id = new_job(api)
    assert api.wait_events(job_id, 0, 0.05) == []
    threading.Timer(0.1, api.update_job_status, (job_id, HttpJobStatus.RUNNING)).start()
    assert api.wait_events(job_id, 0, PATIENCE_S) == []
    job = api.get_job(job_id)
    assert job is not None
    assert job.status is HttpJobStatus.RUNNING


def test_many_may_wait_and_others_are_served_meanwhile(api: ApiClient) -> None:
    job_id = new_job(api)
    found: list[int] = []
    waiters = [
        threading.Thread(target=lambda: found.append(len(api.wait_events(job_id, 0, PATIENCE_S))))
        for _ in range(20)
    ]
    for waiter in waiters:
        waiter.start()
    other = new_job(api)
    assert [api.insert_event(other, EventType.Phase("x")) for _ in range(5)] == [1, 2, 3, 4, 5]
    api.insert_event(job_id, EventType.JobStarted())
    for waiter in waiters:
        waiter.join(PATIENCE_S)
    assert found == [1] * 20


def test_no_more_than_so_many_wait() -> None:
    with Ledger.in_memory(clock=SystemClock()) as ledger:
        storage = ApiStorage(ledger)
        job_id = storage.create_job(HttpJobType.RUN, "p", None, "/in")
        waits = [storage.events_later(job_id, 0, PATIENCE_S) for _ in range(WAITERS_MAX)]
        with pytest.raises(ConflictError):
            storage.events_later(job_id, 0, PATIENCE_S)
        storage.insert_event(job_id, EventType.JobStarted())
        assert all(len(wait.result(PATIENCE_S)) == 1 for wait in waits)
        assert storage.events_later(job_id, 1, 0.01).result(PATIENCE_S) == []


def test_requests_expire_and_old_jobs_go_by_the_clock(database: Path) -> None:
    retention = Retention(api_job_hours=0.0, api_event_hours=0.0, every_s=0.1)
    running = Running(database, retention=retention)
    with connect(database) as control:
        control.api.create_approval("a", RUN, "Run p", timedelta(milliseconds=1))
        job_id = new_job(control.api)
        control.api.cancel_job(job_id)
        for _ in range(60):
            if control.api.get_job(job_id) is None:
                break
            threading.Event().wait(0.05)
        assert control.api.get_job(job_id) is None
    running.close()
    with Ledger.open(database, clock=SystemClock()) as ledger:
        assert ledger.query("SELECT status FROM cf_api_approvals") == [{"status": "expired"}]
        assert ledger.check() == []


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_100_000_events_are_read_page_by_page_in_flat_memory(database: Path) -> None:
    with ApiStorage.open(f"duckdb:{database}") as api:
        job_id = new_job(api)
        for first in range(0, 100_000, 10_000):
            api.insert_events(
                job_id, [EventType.Phase(str(n)) for n in range(first, first + 10_000)]
            )
        after = count = 0
        before, highest = resident_mb(), 0.0
        while events := api.list_events(job_id, after, 1_000):
            highest = max(highest, resident_mb())
            assert [e.event_id for e in events] == list(range(after + 1, after + 1_001))
            after, count = events[-1].event_id, count + len(events)
        assert count == 100_000
        grown = highest - before
        assert grown < 40, grown


CALLER = """
    import sys, threading
    from casparian_flow.protocol import EventType, HttpJobType
    from casparian_flow.sentinel import ApiStorage
    storage = ApiStorage.open("duckdb:" + sys.argv[1])
    jobs = [storage.create_job(HttpJobType.RUN, "p", None, "/in") for _ in range(3)]
    def insert(n):
        while True:
            event_id = storage.insert_event(jobs[n % 3], EventType.Phase(str(n)))
            with lock:
                print(jobs[n % 3], event_id, flush=True)
    lock = threading.Lock()
    for n in range(4):
        threading.Thread(target=insert, args=(n,)).start()
"""


def test_event_ids_have_no_gaps_across_kills(database: Path) -> None:
    acknowledged: dict[int, list[int]] = {}
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CALLER), str(database)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(40)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.stdout.close()
        process.wait()
        for line in lines:
            if line.endswith("\n"):
                job_id, event_id = map(int, line.split())
                acknowledged.setdefault(job_id, []).append(event_id)
    assert len(acknowledged) == 6
    with ApiStorage.open(f"duckdb:{database}") as api:
        for job_id, told in acknowledged.items():
            there = [e.event_id for e in api.list_events(job_id)]
            assert there == list(range(1, len(there) + 1))
            assert set(told) <= set(there)
            assert len(set(told)) == len(told)
            assert api.insert_event(job_id, EventType.JobStarted()) == len(there) + 1
    with Ledger.open(database, clock=SystemClock()) as ledger:
        assert ledger.check() == []


@contextmanager
def sentinel_process(database: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`casparian sentinel` as a process of its own, once it answers."""
    config = database.with_name("global_config.toml")
    config.write_text(
        f'[database]\ndb_location = "{database}"\n'
        f'[sentinel]\nbind_address = "tcp://127.0.0.1:{free_port()}"\n'
        '[logging]\nlevel = "WARNING"\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "casparian_flow.cli", "--config", str(config), "sentinel"]
    )
    try:
        with remote(control_address(database)) as control:
            wait_until(lambda: process.poll() is not None or answers(control), 3 * PATIENCE_S)
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()


def answers(control: ControlClient) -> bool:
    try:
        return bool(control.ping())
    except SentinelUnreachableError:
        return False


class Callers:
    """Threads that use the API over one control socket until nobody answers; `acknowledged` is
    what they were told has been done."""

    def __init__(self, api: ApiClient) -> None:
        self.api = api
        self.jobs = [new_job(api) for _ in range(3)]
        self.events: dict[int, list[int]] = {job_id: [] for job_id in self.jobs}
        self.approved: list[str] = []
        self.finished: list[int] = []
        turns = [*[partial(self._insert, job_id) for job_id in self.jobs * 2], self._decide]
        self.threads = [threading.Thread(target=self._repeat, args=(turn,)) for turn in turns]
        for thread in self.threads:
            thread.start()

    @property
    def acknowledged(self) -> int:
        return sum(map(len, self.events.values())) + len(self.approved) + len(self.finished)

    def _repeat(self, turn: Callable[[], None]) -> None:
        with suppress(SentinelUnreachableError):
            while True:
                turn()

    def _insert(self, job_id: int) -> None:
        self.events[job_id].append(self.api.insert_event(job_id, EventType.Phase("x")))

    def _decide(self) -> None:
        approval_id = self.api.generate_approval_id()
        self.api.create_approval(approval_id, RUN, "Run p", timedelta(hours=1))
        assert self.api.approve(approval_id)
        self.approved.append(approval_id)
        job_id = self.api.start_approved(approval_id)
        assert job_id is not None
        assert self.api.cancel_job(job_id)
        self.finished.append(job_id)


def test_what_a_sentinel_acknowledged_is_there_after_it_was_killed(database: Path) -> None:
    rounds: list[Callers] = []
    for enough in (60, 100):
        with sentinel_process(database) as process, connect(database) as control:
            callers = Callers(control.api)
            wait_until(lambda c=callers, n=enough: c.acknowledged >= n, 3 * PATIENCE_S)
            process.send_signal(signal.SIGKILL)
            for thread in callers.threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive()
            rounds.append(callers)
    with ApiStorage.open(f"duckdb:{database}") as api:
        for callers in rounds:
            for job_id, told in callers.events.items():
                there = [event.event_id for event in api.list_events(job_id)]
                assert there == list(range(1, len(there) + 1))
                assert set(told) <= set(there)
                assert len(set(told)) == len(told)
            for approval_id in callers.approved:
                approval = api.get_approval(approval_id)
                assert approval is not None
                assert approval.status is ApprovalStatus.APPROVED
                api.start_approved(approval_id)
            for job_id in callers.finished:
                job = api.get_job(job_id)
                assert job is not None
                assert job.status is HttpJobStatus.CANCELLED
                assert [event.event_type for event in api.list_events(job_id)] == ["job_finished"]
        started = [job.approval_id for job in api.list_jobs() if job.approval_id]
        assert len(set(started)) == len(started) >= sum(len(c.approved) for c in rounds)
    with Ledger.open(database, clock=SystemClock()) as ledger:
        assert ledger.check() == []


STARTER = """
    import sys, threading
    from casparian_flow.sentinel import ApiStorage
    storage = ApiStorage.open("duckdb:" + sys.argv[1])
    print("ready", flush=True)
    for approval in storage.list_approvals():
        storage.approve(approval.approval_id, "ann")
        storage.start_approved(approval.approval_id)
"""


def test_an_approval_starts_one_job_also_across_kills(database: Path) -> None:
    with ApiStorage.open(f"duckdb:{database}") as api:
        for n in range(60):
            api.create_approval(f"a{n}", RUN, "Run p", timedelta(hours=1))
    for delay_s in (0.02, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(STARTER), str(database)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        threading.Event().wait(delay_s)
        process.kill()
        process.stdout.close()
        process.wait()
    with ApiStorage.open(f"duckdb:{database}") as api:
        for approval in api.list_approvals():
            assert approval.job_id is None or approval.status is ApprovalStatus.APPROVED
            api.approve(approval.approval_id, "bob")
            assert api.start_approved(approval.approval_id) is not None
        jobs = api.list_jobs()
        assert len({job.approval_id for job in jobs}) == len(jobs) == 60
    with Ledger.open(database, clock=SystemClock()) as ledger:
        assert ledger.check() == []
