"""A real Sentinel (ledger file, sockets, loop) and workers whose every message the test writes."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from scripted_worker import ScriptedWorker, job_of, seed
from signing_kit import lax_rules

from casparian_flow.domain.errors import (
    ConfigError,
    ConflictError,
    InvariantError,
    LedgerLockedError,
    NotFoundError,
    SentinelUnreachableError,
)
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.codec import encode
from casparian_flow.protocol.frames import HEADER, PAYLOAD_BYTES_MAX, Op, pack
from casparian_flow.sentinel.control import ControlClient, connect, remote
from casparian_flow.sentinel.server import Sentinel, SentinelConfig

FAST = {"lease_ttl_s": 1.5, "heartbeat_s": 0.2, "retry_base_s": 0.05, "drain_s": 0.0}


class Place:
    """One ledger file and the Sentinel that serves it, which may be stopped and started again."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.database = folder / "ledger.duckdb"
        self._stack = stack
        self._sentinel: Sentinel | None = None
        self._thread: threading.Thread | None = None
        self.crash: BaseException | None = None

    def start(self, **config: Any) -> Sentinel:
        settings: dict[str, Any] = {
            "bind_address": "tcp://127.0.0.1:*",
            "database": self.database,
            "trust": lax_rules,
        }
        sentinel = Sentinel(SentinelConfig(**(settings | FAST | config)))
        self._sentinel = sentinel
        self._thread = threading.Thread(target=self._run, args=(sentinel,))
        self._thread.start()
        assert sentinel.wait_started(20), self.crash
        return sentinel

    def _run(self, sentinel: Sentinel) -> None:
        try:
            sentinel.run()
        except BaseException as error:
            self.crash = error
            raise

    def stop(self) -> None:
        if self._sentinel is not None and self._thread is not None:
            self._sentinel.stop()
            self._thread.join(30)
            assert not self._thread.is_alive()
            self._sentinel = self._thread = None
        assert self.crash is None

    def worker(self, name: str = "w1", **more: Any) -> ScriptedWorker:
        """A worker that has identified itself."""
        worker = self.stranger(name, **more)
        worker.identify()
        return worker

    def stranger(self, name: str = "w1", **more: Any) -> ScriptedWorker:
        assert self._sentinel is not None
        return self._stack.enter_context(ScriptedWorker(self._sentinel.bind_address, name, **more))

    def control(self) -> ControlClient:
        return self._stack.enter_context(connect(self.database))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        place = Place(tmp_path, stack)
        stack.callback(place.stop)
        yield place


def status(control: ControlClient, job_id: int) -> str:
    return str(control.show_job(job_id)["status"])


def eventually(check: Callable[[], Any], seconds: float = 5.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"{check} did not become true"
        time.sleep(0.02)
    return found


def complete(worker: ScriptedWorker, job: m.Dispatch) -> None:
    worker.send(m.DispatchAck(job.token), job_of(job.token))
    worker.stage(job)
    assert worker.expect(m.Grant).token == job.token
    worker.conclude(job)
    assert worker.expect(m.ConcludeAck).tokens == [job.token]


# -- the walk of a job ---------------------------------------------------------------------------


def test_a_job_is_dispatched_staged_granted_and_concluded(place: Place) -> None:
    seed(place.database)
    place.start()
    worker, control = place.worker(), place.control()
    job = worker.dispatch()
    assert (job.file_path, job.attempt, job.plugin_name) == ("/data/f0.csv", 1, "sales")
    assert worker.plugins[job.spec_id].source_code == "code"
    assert status(control, 1) == "DISPATCHING"
    worker.send(m.DispatchAck(job.token), 1)
    entry = worker.stage(job)
    assert worker.expect(m.Grant).token == job.token
    assert status(control, 1) == "STAGED"
    worker.conclude(job, metrics={"seconds": 1}, log="hello")
    worker.expect(m.ConcludeAck)
    row = control.show_job(1)
    assert (row["status"], row["completion_status"]) == ("COMPLETED", "SUCCESS")
    assert [h["kind"] for h in row["history"]] == ["LEASED", "STARTED", "GRANTED", "COMPLETED"]
    assert [(o["state"], o["output_key"]) for o in row["outputs"]] == [
        ("PUBLISHED", entry.output_key)
    ]
    assert control.job_log(1) == [{"attempt": 1, "log": "hello"}]


def test_many_wait_for_a_job_without_keeping_others_from_their_answers(place: Place) -> None:
    seed(place.database)
    place.start()
    worker, control = place.worker(), place.control()
    job = worker.dispatch()
    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(control.await_job, 1, timeout_s=20.0) for _ in range(12)]
        assert status(control, 1) == "DISPATCHING"
        complete(worker, job)
        answers = [future.result(30) for future in waiting]
    assert answers == [{"outcome": "ended", "status": "COMPLETED"}] * 12
    assert control.await_job(1, timeout_s=20.0) == answers[0]
    with pytest.raises(NotFoundError, match="no job 99"):
        control.await_job(99, timeout_s=20.0)


def test_a_job_is_shown_as_it_is_folded_or_not(place: Place) -> None:
    seed(place.database)
    place.start()
    worker, control = place.worker(), place.control()
    complete(worker, worker.dispatch())
    fresh = control.show_job(1)
    (listed,) = control.list_jobs(status="COMPLETED")  # folds
    folded = control.show_job(1)
    assert fresh == folded
    assert {name: fresh[name] for name in listed} == listed


def test_a_job_without_outputs_needs_no_grant(place: Place) -> None:
    seed(place.database)
    place.start()
    worker = place.worker()
    job = worker.dispatch()
    worker.conclude(job)
    worker.expect(m.ConcludeAck)
    assert status(place.control(), 1) == "COMPLETED"


def test_an_acknowledged_conclusion_is_in_the_file_after_a_restart(place: Place) -> None:
    seed(place.database, files=20)
    place.start()
    worker = place.worker(slots=4, credit=32, batch=True)
    for _ in range(20):
        complete(worker, worker.dispatch())
    place.stop()
    with connect(place.database) as local:
        assert local.status()["jobs"]["COMPLETED"] == 20
        assert local.check() == []


def test_a_repeated_stage_and_a_duplicate_conclude_get_the_same_answers(place: Place) -> None:
    seed(place.database)
    place.start()
    worker, control = place.worker(), place.control()
    job = worker.dispatch()
    for _ in range(3):
        worker.stage(job)
        assert worker.expect(m.Grant).token == job.token
    worker.conclude(job)
    worker.expect(m.ConcludeAck)
    before = control.show_job(1)
    worker.conclude(job, "FAILED", reason="plugin_error", error_message="late")
    assert worker.expect(m.ConcludeAck).tokens == [job.token]
    assert control.show_job(1) == before


def test_a_transient_failure_is_retried_and_then_becomes_a_dead_letter(place: Place) -> None:
    seed(place.database)
    place.start()
    worker, control = place.worker(), place.control()
    for attempt in range(1, 5):
        job = worker.dispatch()
        assert job.attempt == attempt
        worker.conclude(job, "FAILED", reason="timeout", error_message=f"try {attempt}")
        worker.expect(m.ConcludeAck)
    (letter,) = control.list_dead_letters()
    assert (letter["job_id"], letter["reason"], letter["retry_count"]) == (1, "timeout", 3)
    (new,) = control.replay(plugin="sales")
    assert control.list_dead_letters() == []
    job = worker.dispatch()
    assert (job_of(job.token), job.attempt) == (new, 1)
    complete(worker, job)
    assert control.show_job(new)["retry_of"] == 1


def test_dispatches_come_in_batches_where_the_worker_reads_them(place: Place) -> None:
    seed(place.database, files=30)
    place.start()
    worker = place.worker(slots=20, credit=20, batch=True)
    jobs = [worker.dispatch() for _ in range(20)]
    worker.send_batch([(job_of(j.token), m.Conclude(j.token, "SUCCESS")) for j in jobs])
    acknowledged: set[str] = set()
    while len(acknowledged) < 20:
        acknowledged |= set(worker.expect(m.ConcludeAck).tokens)
    assert acknowledged == {job.token for job in jobs}


# -- workers that come and go --------------------------------------------------------------------


def test_two_workers_share_the_jobs_and_none_is_given_twice(place: Place) -> None:
    seed(place.database, files=40)
    place.start()
    workers = [place.worker("w1"), place.worker("w2")]
    done: dict[int, str] = {}

    def work(worker: ScriptedWorker) -> None:
        while len(done) < 40:
            try:
                job = worker.dispatch(1.0)
            except AssertionError:
                return
            assert job_of(job.token) not in done
            done[job_of(job.token)] = worker.me.worker_id
            worker.conclude(job)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 40
    assert set(done.values()) == {"w1", "w2"}


def test_a_stale_worker_s_job_goes_to_another_and_its_late_result_changes_nothing(
    place: Place,
) -> None:
    """Earlier versions left the job RUNNING for ever, and let the late result overwrite."""
    seed(place.database)
    place.start()
    lost = place.worker("lost")
    job = lost.dispatch()
    lost.send(m.DispatchAck(job.token), 1)
    other = place.worker("other")
    again = None
    deadline = time.monotonic() + 10
    while again is None and time.monotonic() < deadline:
        other.beat()
        try:
            again = other.dispatch(0.2)
        except AssertionError:
            continue
    assert again is not None
    assert again.attempt == 2
    lost.stage(job)
    assert lost.expect(m.Refuse).reason == "stale_token"
    lost.conclude(job)
    lost.expect(m.ConcludeAck)
    control = place.control()
    assert status(control, 1) == "DISPATCHING"
    complete(other, again)
    assert control.show_job(1)["attempt"] == 2


def test_an_idle_worker_that_sends_heartbeats_is_never_forgotten(place: Place) -> None:
    """Earlier versions dropped it after 60 seconds; here that is twenty leases' time."""
    seed(place.database, files=0)
    place.start(lease_ttl_s=0.15, heartbeat_s=0.05)
    worker, control = place.worker(), place.control()
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline:
        worker.beat()
        time.sleep(0.04)
    assert [w["worker_id"] for w in control.list_workers()] == ["w1"]
    assert worker.gets_nothing(m.Err)
    # A silent one is, in the end, and learns of it with its next word.
    eventually(lambda: control.list_workers() == [])
    worker.send(m.Heartbeat("IDLE"))
    assert worker.expect(m.Err).code == "unknown_worker"


def test_a_job_no_worker_can_run_holds_up_no_other(place: Place) -> None:
    """Head-of-line blocking: the urgent plugin has no worker, the other one has."""
    seed(
        place.database, files=3, plugins=("urgent", "sales"), priorities={"urgent": 99, "sales": 1}
    )
    place.start()
    worker = place.worker(capabilities=["sales"])
    for _ in range(3):
        job = worker.dispatch()
        assert job.plugin_name == "sales"
        complete(worker, job)
    control = place.control()
    assert control.status()["jobs"]["QUEUED"] == 3
    causes = [cause["cause"] for cause in control.status()["causes"]]
    assert any("urgent, which no connected worker takes" in cause for cause in causes)
    assert place.worker("late").dispatch().plugin_name == "urgent"


def test_a_granted_job_is_finished_by_another_worker_of_the_same_root(place: Place) -> None:
    seed(place.database)
    place.start()
    first = place.worker("first")
    job = first.dispatch()
    entry = first.stage(job)
    first.expect(m.Grant)
    second = place.worker("second")
    deadline = time.monotonic() + 10
    recover = None
    while recover is None and time.monotonic() < deadline:
        second.beat()
        try:
            recover = second.expect(m.Recover, 0.2)
        except AssertionError:
            continue
    assert recover is not None
    assert recover.entries == (entry,)
    second.conclude(job)
    second.expect(m.ConcludeAck)
    assert status(place.control(), 1) == "COMPLETED"


# -- cancelling ----------------------------------------------------------------------------------


def test_cancel_of_a_running_job_stops_it_and_refuses_its_outputs(place: Place) -> None:
    seed(place.database)
    place.start()
    worker, control = place.worker(), place.control()
    job = worker.dispatch()
    worker.send(m.DispatchAck(job.token), 1)
    assert control.cancel_job(1) == {"outcome": "cancelled", "status": "ABORTED"}
    assert worker.expect(m.Abort).token == job.token
    worker.stage(job)
    assert worker.expect(m.Refuse).token == job.token
    row = control.show_job(1)
    assert row["status"] == "ABORTED"
    assert f"uid {os.getuid()}" in row["history"][-1]["data"]["by"]
    assert control.cancel_job(1) == {"outcome": "already", "status": "ABORTED"}


def test_cancel_of_a_granted_job_comes_too_late(place: Place) -> None:
    seed(place.database)
    place.start()
    worker, control = place.worker(), place.control()
    job = worker.dispatch()
    worker.stage(job)
    worker.expect(m.Grant)
    assert control.cancel_job(1)["outcome"] == "too_late"
    worker.conclude(job)
    worker.expect(m.ConcludeAck)
    assert status(control, 1) == "COMPLETED"


# -- peers that break the rules ------------------------------------------------------------------


def test_malformed_messages_are_answered_and_counted_and_end_nothing(place: Place) -> None:
    seed(place.database)
    sentinel = place.start()
    worker = place.worker()
    bad: list[tuple[bytes, ...]] = [
        (b"x",),
        (b"", b""),
        (b"1", b"2", b"3"),
        (HEADER.pack(3, Op.HEARTBEAT, 0, 0, 0), b""),
        (HEADER.pack(4, 99, 0, 0, 0), b""),
        (HEADER.pack(4, Op.HEARTBEAT, 7, 0, 2), b"{}"),
        (HEADER.pack(4, Op.HEARTBEAT, 0, 0, 9), b"{}"),
        (HEADER.pack(4, Op.HEARTBEAT, 0, 0, 2), b"{]"),
        (HEADER.pack(4, Op.BATCH, 0, 0, 4), b"1234"),
    ]
    for frames in bad:
        worker.send_raw(*frames)
        assert worker.expect(m.Err).code == "malformed"
    worker.send(m.Grant("t"))
    assert worker.expect(m.Err).code == "unexpected"
    worker.send(m.Conclude("nonsense", "SUCCESS"))
    assert worker.expect(m.ConcludeAck).tokens == ["nonsense"]
    worker.send(m.Stage("../../etc", ()))
    assert worker.expect(m.Refuse).reason == "stale_token"
    complete(worker, worker.dispatch())
    counters = eventually(
        lambda: (c := sentinel.metrics.gauges.counters).get("jobs_completed") and c
    )
    assert counters["protocol_errors"] == len(bad) + 1


def test_an_oversized_message_is_answered_and_a_huge_one_cut_off(place: Place) -> None:
    seed(place.database)
    place.start()
    worker = place.worker()
    job = worker.dispatch()
    worker.send_raw(
        HEADER.pack(4, Op.HEARTBEAT, 0, 0, PAYLOAD_BYTES_MAX + 1), b"x" * (PAYLOAD_BYTES_MAX + 1)
    )
    assert "exceeds" in worker.expect(m.Err).message
    with place.stranger("huge") as huge:
        huge.send_raw(b"h" * HEADER.size, b"x" * (2 * PAYLOAD_BYTES_MAX + 1))
        assert huge.gets_nothing(m.Err)
    complete(worker, job)


def test_a_stranger_is_asked_to_identify_first(place: Place) -> None:
    seed(place.database)
    place.start()
    stranger = place.stranger("x")
    for message in (m.Heartbeat("IDLE"), m.DispatchAck("t"), m.Conclude("t", "SUCCESS")):
        stranger.send(message)
        assert stranger.expect(m.Err).code == "unknown_worker"


def test_a_peer_that_never_reads_does_not_stop_the_others(place: Place) -> None:
    seed(place.database)
    place.start()
    deaf = place.stranger("deaf")
    frames = b"".join(b"".join(pack(*encode(0, m.Heartbeat("IDLE")))) for _ in range(4000))
    for _ in range(30):
        deaf.send_raw(HEADER.pack(4, Op.BATCH, 0, 0, len(frames)), frames)
    worker = place.worker()
    complete(worker, worker.dispatch())


# -- restarts ------------------------------------------------------------------------------------

CHILD = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parents[1])!r})
    from signing_kit import lax_rules
    from casparian_flow.sentinel import Sentinel, SentinelConfig
    import threading
    sentinel = Sentinel(SentinelConfig(
        bind_address=sys.argv[2], database=sys.argv[1], lease_ttl_s=3, heartbeat_s=0.3,
        drain_s=0.0, trust=lax_rules))
    def tell():
        assert sentinel.wait_started(20)
        print(sentinel.bind_address, flush=True)
    threading.Thread(target=tell).start()
    sentinel.run()
    print("ended", flush=True)
"""


class Child:
    """A Sentinel in a process of its own, which can be killed."""

    def __init__(self, database: Path, address: str = "tcp://127.0.0.1:*") -> None:
        code = textwrap.dedent(CHILD)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(database), address],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("tcp://"), "the Sentinel did not start"

    def end(self, number: int) -> str:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        self.process.wait(20)
        self.process.stdout.close()
        return rest


def test_a_killed_sentinel_keeps_the_running_jobs_its_workers_still_hold(tmp_path: Path) -> None:
    database = tmp_path / "ledger.duckdb"
    seed(database, files=3)
    first = Child(database)
    with ScriptedWorker(first.address, slots=3, credit=3) as worker:
        old = worker.identify()
        running, granted, dropped = (worker.dispatch() for _ in range(3))
        worker.send(m.DispatchAck(running.token))
        worker.stage(granted)
        worker.expect(m.Grant)
        first.end(signal.SIGKILL)
        second = Child(database, first.address)
        try:
            # The worker does not know of the restart; its next word tells it.
            worker.send(m.Heartbeat("BUSY", [running.token, granted.token]))
            assert worker.expect(m.Err, 10).code == "unknown_worker"
            welcome = worker.identify([running.token, granted.token])
            assert welcome.epoch == old.epoch + 1
            again = worker.dispatch()
            assert job_of(again.token) == job_of(dropped.token)
            assert (again.attempt, again.token != dropped.token) == (2, True)
            worker.stage(running)
            assert worker.expect(m.Grant).token == running.token
            for job in (running, granted, again):
                worker.conclude(job)
                worker.expect(m.ConcludeAck)
            with connect(database) as control:
                assert control.status()["jobs"]["COMPLETED"] == 3
                assert [control.show_job(i)["attempt"] for i in (1, 2, 3)] == [1, 1, 2]
        finally:
            assert "ended" in second.end(signal.SIGTERM)
    assert second.process.returncode == 0


def test_a_lease_committed_but_never_sent_is_leased_anew(tmp_path: Path) -> None:
    """Killed between commit and send: the worker has never heard of the attempt."""
    database = tmp_path / "ledger.duckdb"
    seed(database)
    first = Child(database)
    with ScriptedWorker(first.address) as gone:
        gone.identify()
        gone.dispatch()
        first.end(signal.SIGKILL)
    second = Child(database)
    try:
        with ScriptedWorker(second.address, identity=b"id-w1", nonce="fresh") as worker:
            worker.identify([])
            job = worker.dispatch()
            assert job.attempt == 2
            complete(worker, job)
    finally:
        second.end(signal.SIGINT)
    assert second.process.returncode == 0


# -- control, wiring, metrics --------------------------------------------------------------------


def test_control_calls_are_answered_while_jobs_run(place: Place) -> None:
    seed(place.database, files=300)
    place.start()
    worker, control = place.worker(slots=8, credit=64, batch=True), place.control()
    stop = threading.Event()
    slowest: list[float] = []

    def ask() -> None:
        while not stop.is_set():
            started = time.monotonic()
            control.status()
            control.list_jobs(limit=20)
            slowest.append(time.monotonic() - started)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(300):
        worker.conclude(worker.dispatch())
    stop.set()
    thread.join()
    eventually(lambda: control.status()["jobs"]["COMPLETED"] == 300)
    assert slowest
    assert max(slowest) < 5


def test_a_paused_plugin_gets_no_jobs_until_it_is_resumed(place: Place) -> None:
    seed(place.database, files=2)
    place.start()
    control = place.control()
    control.pause_plugin("sales", reason="look first")
    worker = place.worker()
    assert worker.gets_nothing(m.Dispatch)
    (cause,) = [c for c in control.status()["causes"] if "paused" in c["cause"]]
    assert "look first" in cause["cause"]
    assert "casparian plugin resume sales" in cause["cure"]
    control.resume_plugin("sales")
    complete(worker, worker.dispatch())


def test_submit_refuses_done_work_unless_it_is_forced(place: Place) -> None:
    seed(place.database)
    place.start()
    worker, control = place.worker(), place.control()
    complete(worker, worker.dispatch())
    with pytest.raises(ConflictError, match=r"job 1 .* is COMPLETED"):
        control.submit(version_id=1, plugin="sales", priority=None, force=False)
    with pytest.raises(ConflictError, match="has completed"):
        control.retry_job(1)
    new = control.submit(version_id=1, plugin="sales", priority=7, force=True)
    job = worker.dispatch()
    assert (job_of(job.token), job.order_no[2]) == (new, 1)
    complete(worker, job)


def test_metrics_are_served_on_their_port(place: Place) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seed(place.database)
    place.start(metrics_port=port)
    worker = place.worker()
    complete(worker, worker.dispatch())

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            return str(answer.read().decode())

    text = eventually(lambda: (t := scrape()).count("casparian_jobs_completed_total 1.0") and t)
    assert 'casparian_job_duration_seconds_count{outcome="completed",plugin="sales"} 1.0' in text
    assert "casparian_commit_batch_records_count" in text


# -- starting and stopping -----------------------------------------------------------------------


def test_a_second_sentinel_on_the_same_ledger_or_address_is_refused(
    place: Place, tmp_path: Path
) -> None:
    sentinel = place.start()
    other = SentinelConfig(bind_address="tcp://127.0.0.1:*", database=place.database)
    with pytest.raises(LedgerLockedError, match="a Sentinel already runs"):
        Sentinel(other).run()
    taken = SentinelConfig(bind_address=sentinel.bind_address, database=tmp_path / "b.duckdb")
    with pytest.raises(ConflictError, match="is in use") as caught:
        Sentinel(taken).run()
    assert "bind_address" in caught.value.hint
    with connect(tmp_path / "b.duckdb") as local:
        assert local.ping()["bind_address"] == ""


def test_a_starting_sentinel_waits_for_a_command_that_has_the_ledger_open(place: Place) -> None:
    with connect(place.database) as command:
        threading.Timer(0.5, command.close).start()
        began = time.monotonic()
        place.start()
        assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("address", ["tcp://nowhere", "nonsense", "tcp://8.8.8.8:5555"])
def test_an_address_that_cannot_be_bound_is_said_clearly(tmp_path: Path, address: str) -> None:
    config = SentinelConfig(bind_address=address, database=tmp_path / "x.duckdb")
    with pytest.raises(ConfigError, match="cannot bind"):
        Sentinel(config).run()


def test_a_lease_shorter_than_two_heartbeats_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not outlive two heartbeats"):
        Sentinel(SentinelConfig(lease_ttl_s=1, heartbeat_s=1))


def test_stop_by_the_control_socket_ends_run_and_frees_everything(place: Place) -> None:
    seed(place.database)
    place.start()
    control = place.control()
    control.stop()
    place.stop()
    place.start()
    complete(worker := place.worker(), worker.dispatch())


def test_the_bind_address_alone_makes_a_whole_configuration() -> None:
    assert SentinelConfig(bind_address="tcp://127.0.0.1:5555").broker_config().lease_ttl_s == 30.0


def test_a_bug_in_the_loop_ends_the_process_and_answers_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that wait for a turn must not keep the Sentinel from stopping."""
    answers: list[BaseException] = []

    def ask(address: str) -> None:
        with remote(address) as control:
            try:
                control.cancel_job(1)
            except SentinelUnreachableError as error:
                answers.append(error)

    def fail_while_somebody_waits(sentinel: Sentinel) -> None:
        caller = threading.Thread(target=ask, args=(sentinel.control_address,))
        caller.start()
        eventually(lambda: sentinel._loop._inbox)
        callers.append(caller)
        raise InvariantError("a bug")

    callers: list[threading.Thread] = []
    monkeypatch.setattr(Sentinel, "_serve", fail_while_somebody_waits)
    sentinel = Sentinel(
        SentinelConfig(bind_address="tcp://127.0.0.1:*", database=tmp_path / "ledger.duckdb")
    )
    crash: list[BaseException] = []

    def run() -> None:
        try:
            sentinel.run()
        except InvariantError as error:
            crash.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    callers[0].join(10)
    assert [str(error) for error in crash] == ["a bug"]
    assert [str(error) for error in answers] == ["the Sentinel is stopping"]
