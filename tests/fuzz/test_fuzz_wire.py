"""Frames that almost fit, thrown at a running Sentinel and at a worker's wire.

The Sentinel is a process of its own with a ledger file, jobs and plugins. Beside the strangers that
throw, one honest worker keeps asking and must be answered all along; afterwards it does a job.
"""

import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from fuzzing import FRAMES, Bodies, Fuzz, rss_mb
from scripted_sentinel import ScriptedSentinel
from scripted_worker import ScriptedWorker, job_of, seed
from signing_kit import signed_bundle

from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import ProtocolError
from casparian_flow.domain.records import Limits
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.codec import OP_OF, decode_all
from casparian_flow.protocol.frames import pack
from casparian_flow.sentinel.control import connect
from casparian_worker.mailbox import Mailbox
from casparian_worker.noop_runner import NoopRunner
from casparian_worker.wire import Wire
from casparian_worker.worker_events import WorkerConfig
from casparian_worker.worker_state import WorkerState

JOBS = 200
PEERS = 6
PULSE = 500
"""Messages between two questions of the honest peer."""
PATIENCE_S = 30.0
DISPATCHED = 500
"""Different jobs that the worker hears of."""
GROWTH_MB = 200.0
SENTINEL_SHARE = 0.7

SENTINEL = f"""
import sys, threading
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from signing_kit import lax_rules
from casparian_flow.sentinel.server import Sentinel, SentinelConfig
sentinel = Sentinel(SentinelConfig("tcp://127.0.0.1:*", sys.argv[1], lease_ttl_s=3.0,
                                   heartbeat_s=0.5, retry_base_s=0.05, max_retries=1000,
                                   breaker_failures=10**9, drain_s=0.0, trust=lax_rules))
def told():
    sentinel.wait_started()
    print(sentinel.bind_address, flush=True)
threading.Thread(target=told, daemon=True).start()
sentinel.run()
"""


@contextmanager
def sentinel_process(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    seed(folder / "ledger.duckdb", files=JOBS)
    log = folder / "sentinel.log"
    with log.open("wb") as errors:
        popen = subprocess.Popen(
            [sys.executable, "-c", SENTINEL, str(folder / "ledger.duckdb")],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert popen.stdout is not None
        address = popen.stdout.readline().strip()
        assert address, log.read_text()
        yield psutil.Process(popen.pid), address
        assert popen.poll() is None, log.read_text()[-3000:]
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(30) == 0, log.read_text()[-3000:]
        assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    finally:
        popen.kill()
        popen.communicate()


def body_of(message: m.Message) -> tuple[Any, dict[str, Any]]:
    return OP_OF[type(message)], msgspec.to_builtins(message)


def to_sentinel(token: str) -> Bodies:
    """One sound message of each kind that a Sentinel takes."""
    entry = {
        "n": 0, "topic": "sales", "kind": "output", "uri": "parquet://sales", "mode": "append",
        "root_id": "root-a", "output_key": "a" * 64, "slice_key": "b" * 64, "order_no": [1, 1, 0],
        "stage": ".stage/x", "final": "sales/x", "rows": 3, "bytes": 9, "sha256": "c" * 64,
    }  # fmt: skip
    stage, stage_body = body_of(m.Stage(token, ()))
    deploy = m.Deploy(
        signed_bundle(
            "MANIFEST = PluginMetadata(pattern='*')\nclass Handler: pass\n", "sales", "1.0.1"
        )
    )
    return [
        body_of(
            m.Identify("w9", "nonce9", ["*"], [token], "root-a", 2, 50, "h", 1, "1", batch=True)
        ),
        body_of(m.Heartbeat("BUSY", [token])),
        body_of(m.DispatchAck(token)),
        (stage, stage_body | {"entries": [entry]}),
        (stage, stage_body | {"entries": [entry, entry | {"n": 1, "topic": "b"}]}),
        body_of(m.Conclude(token, "FAILED", reason="timeout", error_message="x", log="y")),
        body_of(m.Conclude(token, "SUCCESS", metrics={"rows": 3})),
        body_of(m.Err("what", "malformed")),
        body_of(m.Stages([token])),
        body_of(m.Reload()),
        body_of(deploy),
    ]


def learn(sockets: list["zmq.Socket[bytes]"], tokens: list[str], seen: Counter[str]) -> None:
    """Take in the answers; tokens of real dispatches make the next messages more dangerous."""
    for socket in sockets:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            for _, message in decode_all(frames):
                seen[type(message).__name__] += 1
                if isinstance(message, m.Dispatch):
                    tokens.append(message.token)
    del tokens[1:-30]


def answered(honest: ScriptedWorker) -> None:
    honest.send(m.Heartbeat("IDLE"))
    honest.expect(m.Heartbeat, timeout_s=PATIENCE_S)


@pytest.mark.timeout(300 + FRAMES / 300)
def test_a_sentinel_outlives_every_frame_and_serves_the_honest_meanwhile(tmp_path: Path) -> None:
    fuzz = Fuzz("frames to a Sentinel")
    count = int(FRAMES * SENTINEL_SHARE)
    seen: Counter[str] = Counter()
    tokens = ["1edeadbe-1-1-1"]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with sentinel_process(tmp_path) as (process, address):
        sockets = []
        for number in range(PEERS):
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            socket.setsockopt(zmq.IDENTITY, f"stranger-{number}".encode())
            socket.connect(address)
            sockets.append(socket)
        with ScriptedWorker(address, "honest", capabilities=["nothing"]) as honest:
            honest.identify()
            answered(honest)
            baseline = peak = 0.0
            bodies: Bodies = []
            started = time.monotonic()
            for number in range(count):
                if number % 100 == 0:
                    learn(sockets, tokens, seen)
                    bodies = to_sentinel(fuzz.rng.choice(tokens))
                frames = fuzz.message(bodies, [0, 1, 2, JOBS, JOBS + 1, 2**63])
                sockets[fuzz.rng.randrange(PEERS)].send_multipart(frames)
                if number % PULSE == 0:
                    answered(honest)
                    peak = max(peak, rss_mb(process.pid))
                if number == count // 5:
                    baseline = peak
            answered(honest)
            rate = count / (time.monotonic() - started)
            print(f"{count} frames at {rate:.0f}/s; answers {dict(seen)}; {baseline:.0f} MB, "
                  f"at most {peak:.0f} MB")  # fmt: skip
            assert seen["Err"] > count // 20
            assert tokens[1:], "no stranger was ever given a job"
            assert peak - baseline < GROWTH_MB
        for socket in sockets:
            socket.close()
        assert_a_job_can_be_done(address, tmp_path / "ledger.duckdb")
    context.term()
    with Ledger.open(tmp_path / "ledger.duckdb", clock=SystemClock()) as ledger:
        assert ledger.check() == []


def assert_a_job_can_be_done(address: str, database: Path) -> None:
    with connect(database) as control:
        control.submit(version_id=1, plugin="sales", priority=1, force=True)
    with ScriptedWorker(address, "honest-too", nonce=secrets.token_hex(4)) as worker:
        worker.identify()
        job = None
        deadline = time.monotonic() + PATIENCE_S
        while job is None and time.monotonic() < deadline:
            # The strangers' leases have to expire first; who is silent meanwhile is forgotten.
            worker.beat()
            if not worker.gets_nothing(m.Dispatch, 0.5):
                job = worker.dispatch()
        assert job is not None, "no job for the honest"
        worker.send(m.DispatchAck(job.token), job_of(job.token))
        worker.conclude(job)
        assert job.token in worker.expect(m.ConcludeAck, timeout_s=PATIENCE_S).tokens


def to_worker(sentinel: ScriptedSentinel, number: int) -> Bodies:
    """One sound message of each kind that a worker takes."""
    token = sentinel.token(number)
    dispatch = m.Dispatch(
        token, 1, "spec-1", "p", "/in/a", 1, 1, "aa", (1, 2, 3, 4, 5), (1, 1, 0)
    )  # fmt: skip
    return [
        body_of(m.Welcome("7f3ac91e", 1, 0.5, 5.0, batch=True)),
        body_of(m.Plugin("spec-1", "p", "1", "h", "src", "", "", (), "{}", "", Limits())),
        body_of(dispatch),
        body_of(m.Abort(token, "cancelled")),
        body_of(m.Grant(token)),
        body_of(m.Refuse(token, "stale_token", "no")),
        body_of(m.ConcludeAck([token])),
        body_of(m.Recover(token, ())),
        body_of(m.Discard([token])),
        body_of(m.Heartbeat("ALIVE")),
        body_of(m.Err("what", "unknown_worker")),
        body_of(m.Reload()),
    ]


@pytest.mark.timeout(300 + FRAMES / 300)
def test_a_worker_s_wire_outlives_every_frame_and_still_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fuzz = Fuzz("frames to a worker")
    caplog.set_level("CRITICAL")
    count = int(FRAMES * (1 - SENTINEL_SHARE))
    with ScriptedSentinel() as sentinel, running_wire(sentinel.address) as (wire, crash):
        worker = sentinel.wait_for_worker()
        before = rss_mb()
        bodies: Bodies = []
        for number in range(count):
            if number % 20 == 0:
                bodies = to_worker(sentinel, number % DISPATCHED + 1)
            worker = next(reversed(sentinel.workers))
            try:
                sentinel.socket.send_multipart(
                    [worker, *fuzz.message(bodies, [0, 1, number % DISPATCHED + 1, 2**63])],
                    zmq.NOBLOCK,
                )
            except zmq.ZMQError:  # it reconnects under another name
                sentinel.serve(0.2)
            if number % PULSE == 0:
                drain(sentinel)
                assert not crash
        job = DISPATCHED + 100
        deadline = time.monotonic() + PATIENCE_S
        while wire._state.attempts.get(sentinel.token(job)) is None and not crash:
            assert time.monotonic() < deadline, "the worker takes no work any more"
            sentinel.serve(0.3)
            worker = next(reversed(sentinel.workers))
            for op, body in to_worker(sentinel, job)[:3]:
                body_bytes = msgspec.json.encode(body)
                sentinel.socket.send_multipart([worker, *pack(op, job, body_bytes)])
        print(f"{count} frames; {wire.counts}; {len(wire._state.attempts)} attempts held")
        assert wire.counts.protocol_errors > count // 20
        assert rss_mb() - before < GROWTH_MB
    assert not crash


def drain(sentinel: ScriptedSentinel) -> None:
    """Answer what must be answered and drop the rest."""
    while sentinel.socket.poll(0):
        sentinel._take()
    sentinel._pending.clear()
    sentinel.seen.clear()


@contextmanager
def running_wire(address: str) -> Iterator[tuple[Wire, list[BaseException]]]:
    mailbox = Mailbox()
    state = WorkerState(WorkerConfig("w1", secrets.token_hex(8), "root-1", slots=1, credit=1024))
    wire = Wire(address, state, NoopRunner(mailbox), mailbox, SystemClock(), secrets.token_bytes)
    crash: list[BaseException] = []

    def run() -> None:
        try:
            wire.run()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            crash.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield wire, crash
    finally:
        wire._stop()
        thread.join(20)
        mailbox.close()
        assert not thread.is_alive()


def test_every_frame_is_decoded_or_refused_as_a_protocol_error() -> None:
    fuzz = Fuzz("frames to the codec")
    bodies = to_sentinel("1edeadbe-1-1-1")
    decoded = refused = 0
    for _ in range(max(2_000, FRAMES // 10)):
        try:
            decode_all(fuzz.message(bodies, [0, 1, 2**63 - 1, 2**63]))
        except ProtocolError:
            refused += 1
        else:
            decoded += 1
    assert decoded
    assert refused
