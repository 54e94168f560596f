"""The worker's ZeroMQ shell against a scripted Sentinel; the runner is the no-op one."""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from scripted_sentinel import ScriptedSentinel

from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.records import Limits
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.frames import HEADER, VERSION, Op
from casparian_worker.mailbox import Mailbox
from casparian_worker.noop_runner import NoopRunner
from casparian_worker.wire import Wire
from casparian_worker.worker_events import DrainRequested, WorkerConfig
from casparian_worker.worker_state import WorkerState


class RunningWire:
    """A wire in a thread of its own, with a no-op runner behind it."""

    def __init__(self, address: str) -> None:
        self.mailbox = Mailbox()
        config = WorkerConfig("w1", secrets.token_hex(8), "root-1", slots=1, credit=1024)
        self.state = WorkerState(config)
        self.wire = Wire(
            address,
            self.state,
            NoopRunner(self.mailbox),
            self.mailbox,
            SystemClock(),
            secrets.token_bytes,
        )
        self.thread = threading.Thread(target=self.wire.run)
        self.thread.start()

    def stop(self) -> None:
        self.mailbox.post(DrainRequested())
        self.thread.join(10)
        if self.thread.is_alive():
            self.wire._stop()
            self.thread.join(10)
        self.mailbox.close()
        assert not self.thread.is_alive()


Start = Callable[[str], RunningWire]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[RunningWire] = []

    def begin(address: str) -> RunningWire:
        running.append(RunningWire(address))
        return running[-1]

    yield begin
    for wire in running:
        # Whatever is still held is of no interest any more.
        wire.state.attempts.clear()
        wire.stop()


def plugin() -> m.Plugin:
    return m.Plugin("spec-1", "p", "1", "h", "src", "", "", (), "{}", "", Limits())


def dispatch(sentinel: ScriptedSentinel, job_id: int, attempt: int = 1) -> m.Dispatch:
    token = sentinel.token(job_id, attempt)
    return m.Dispatch(
        token, attempt, "spec-1", "p", "/in/a", 1, 1, "aa", (1, 2, 3, 4, 5), (1, 1, 0)
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_job_goes_through_the_wire_and_back(start: Start) -> None:
    with ScriptedSentinel() as sentinel:
        start(sentinel.address)
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin())
        sentinel.send(worker, 1, dispatch(sentinel, 1))
        conclusion = sentinel.expect(m.Conclude)
        assert (conclusion.token, conclusion.status) == (sentinel.token(1), "SUCCESS")
        sentinel.send(worker, 0, m.ConcludeAck([sentinel.token(1)]))


def test_a_job_that_ends_at_once_needs_no_dispatch_ack(start: Start) -> None:
    with ScriptedSentinel() as sentinel:
        start(sentinel.address)
        worker = sentinel.wait_for_worker()
        jobs = [(n, dispatch(sentinel, n)) for n in range(1, 101)]
        sentinel.send_batch(worker, [(0, plugin()), *jobs])
        for _ in range(100):
            sentinel.expect(m.Conclude)
        assert not any(isinstance(message, m.DispatchAck) for _, _, message in sentinel.seen)


def test_a_hostname_instead_of_an_address_connects(start: Start) -> None:
    with ScriptedSentinel() as sentinel:
        start(f"tcp://localhost:{sentinel.port}")
        sentinel.wait_for_worker()


def test_a_thousand_jobs_in_one_batch_come_back_in_batches(start: Start) -> None:
    with ScriptedSentinel() as sentinel:
        start(sentinel.address)
        worker = sentinel.wait_for_worker()
        jobs = [(n, dispatch(sentinel, n)) for n in range(1, 1001)]
        sentinel.send_batch(worker, [(0, plugin()), *jobs])
        tokens = {sentinel.expect(m.Conclude).token for _ in range(1000)}
        assert len(tokens) == 1000


def test_without_batch_the_worker_sends_single_messages(start: Start) -> None:
    with ScriptedSentinel(batch=False) as sentinel:
        start(sentinel.address)
        worker = sentinel.wait_for_worker()
        for message in [(0, plugin()), *((n, dispatch(sentinel, n)) for n in (1, 2, 3))]:
            sentinel.send(worker, *message)
        ops = set()
        for _ in range(6):
            assert sentinel.socket.poll(5000)
            _, header, _ = sentinel.socket.recv_multipart()
            ops.add(HEADER.unpack(header)[1])
        assert Op.BATCH not in ops


@pytest.mark.parametrize(
    "frames",
    [
        (b"",),
        (b"short", b"{}"),
        (HEADER.pack(3, 2, 0, 1, 2), b"{}"),
        (HEADER.pack(VERSION, 99, 0, 1, 2), b"{}"),
        (HEADER.pack(VERSION, Op.DISPATCH, 0, 1, 2), b"{}"),
        (HEADER.pack(VERSION, Op.GRANT, 0, 1, 5), b"{nope"),
        (HEADER.pack(VERSION, Op.GRANT, 0, 1, 2), b"{}", b"more"),
    ],
)
def test_a_malformed_frame_is_counted_answered_and_survived(
    start: Start, frames: tuple[bytes, ...]
) -> None:
    with ScriptedSentinel() as sentinel:
        wire = start(sentinel.address)
        worker = sentinel.wait_for_worker()
        sentinel.send_raw(worker, *frames)
        assert sentinel.expect(m.Err).code == "malformed"
        assert wire.wire.counts.protocol_errors == 1
        sentinel.send(worker, 0, plugin())
        sentinel.send(worker, 1, dispatch(sentinel, 1))
        sentinel.expect(m.Conclude)


def test_a_worker_may_start_before_the_sentinel(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "casparian_worker.wire")
    port = free_port()
    start(f"tcp://127.0.0.1:{port}")
    time.sleep(1.5)
    assert "no Sentinel answers" in caplog.text
    with ScriptedSentinel(port) as sentinel:
        sentinel.wait_for_worker()
        # What was said meanwhile did not pile up.
        sentinel.serve(0.3)
        assert sum(isinstance(message, m.Identify) for _, _, message in sentinel.seen) <= 2
    assert "connected to the Sentinel" in caplog.text


def test_a_restarted_sentinel_hears_what_is_held_and_gets_the_conclusion_again(
    start: Start,
) -> None:
    with ScriptedSentinel() as first:
        start(first.address)
        worker = first.wait_for_worker()
        first.send(worker, 0, plugin())
        first.send(worker, 1, dispatch(first, 1))
        token = first.expect(m.Conclude).token
        port = first.port
    with ScriptedSentinel(port, epoch=2) as second:
        deadline = time.monotonic() + 10
        while not any(identify.held == [token] for identify in second.workers.values()):
            assert time.monotonic() < deadline
            second.serve(0.1)
            # A Sentinel that does not know a worker says so.
            for identity, _, message in second.seen:
                if not isinstance(message, m.Identify) and identity not in second.workers:
                    second.send(identity, 0, m.Err("identify first", "unknown_worker"))
        assert second.expect(m.Conclude).token == token


def test_an_idle_worker_uses_next_to_no_processor_time(start: Start) -> None:
    with ScriptedSentinel() as sentinel:
        start(sentinel.address)
        sentinel.wait_for_worker()
        before = time.process_time()
        sentinel.serve(1.0)
        assert time.process_time() - before < 0.1


def test_an_address_that_zeromq_does_not_know_is_a_clear_error() -> None:
    mailbox = Mailbox()
    state = WorkerState(WorkerConfig("w", "n"))
    with pytest.raises(UsageError, match="nowhere") as error:
        Wire("nowhere", state, NoopRunner(mailbox), mailbox, SystemClock(), secrets.token_bytes)
    assert "tcp://" in error.value.hint
    mailbox.close()
