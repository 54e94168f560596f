"""The Sentinel process: ledger, core, workers' socket, control socket and metrics, put together.

    Sentinel(SentinelConfig(bind_address="tcp://127.0.0.1:5555")).run()

One thread runs the loop: receive, one turn of the core, send. It never waits for the ledger, the
disk or a peer. The order of starting is what makes a restart safe: the ledger is opened and a
new epoch committed before the first socket is bound.
"""

import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import zmq

from casparian_flow.db import whitelist
from casparian_flow.db.ledger import MEMORY_LIMIT_MB, Ledger
from casparian_flow.db.retention import HistoryAges
from casparian_flow.db.writer import LedgerThread
from casparian_flow.domain.clock import Clock, SystemClock, system_random
from casparian_flow.domain.errors import (
    ConfigError,
    LedgerLockedError,
    LedgerUnavailableError,
    SentinelUnreachableError,
)
from casparian_flow.domain.ids import Identity
from casparian_flow.domain.records import Limits
from casparian_flow.domain.retry import RetryPolicy
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.curve import server_keys
from casparian_flow.sentinel.admission import Admission
from casparian_flow.sentinel.api_runner import ApiRunner
from casparian_flow.sentinel.broker import Broker, BrokerConfig
from casparian_flow.sentinel.control import remote
from casparian_flow.sentinel.control_plane import PROMPT, ControlPlane
from casparian_flow.sentinel.control_server import ControlServer
from casparian_flow.sentinel.core import SentinelCore
from casparian_flow.sentinel.events import Drain, Send, Tick, WorkerMessage
from casparian_flow.sentinel.gate import Gate
from casparian_flow.sentinel.housekeeping import Housekeeping, Retention
from casparian_flow.sentinel.loop import CoreLoop, MeteredWriter
from casparian_flow.sentinel.metrics import SentinelMetrics, gauges_of, serve
from casparian_flow.sentinel.paths import IN_MEMORY, control_address
from casparian_flow.sentinel.remote_calls import RemoteCalls
from casparian_flow.sentinel.screening import refusal
from casparian_flow.sentinel.trial_desk import TrialDesk
from casparian_flow.sentinel.waker import Waker
from casparian_flow.sentinel.wire_calls import WireCalls
from casparian_flow.sentinel.worker_socket import LOOPBACK_PREFIXES, Curve, WorkerSocket
from casparian_flow.sentinel.zap import CurveAccess
from casparian_flow.trust.rules import TrustSource, nobody

if TYPE_CHECKING:
    # Settings bring pydantic along, which this process does without unless its caller has it.
    from casparian_flow.config import Settings

log = logging.getLogger(__name__)

TICK_S = 1.0
LOCK_WAIT_S = 10.0
"""A command that runs without a Sentinel opens the ledger itself, for moments as a rule."""
LOCK_POLL_S = 0.1
START_TIMEOUT_S = 120.0
"""For the first commit and reading the queue's head; a big ledger takes a second."""
FLUSH_S = 10.0
"""How long a stopping Sentinel waits for commits under way."""
SWITCH_INTERVAL_S = 0.001
"""Threads that compute (control calls, Arrow batches) give the loop its turn after this long."""


@dataclass(frozen=True)
class SentinelConfig:
    """Everything has a default; `SentinelConfig(bind_address=…)` is enough.

    Attributes:
        bind_address: where workers connect.
        database: the ledger's file, or ":memory:".
        control_address: "" = beside the ledger (paths.control_address).
        metrics_port: 0 = no metrics.
        lease_ttl_s: silence after which a worker's leases are lost.
        heartbeat_s: between heartbeats; less than half of `lease_ttl_s`.
        max_retries, retry_base_s: delays of base, base², … seconds, each ± 20 %.
        breaker_failures: jobs failing in a row that pause a plugin.
        drain_s: how long `stop` waits for running jobs; what is left goes on after a restart.
        memory_limit_mb: mebibytes DuckDB may use for the ledger.
        limits: what one plugin run may use.
        trust: the rules by which deploys and each load of a plugin are judged; by default nothing
            is trusted.
        trials: whether a worker tries a deployed version before it becomes active.
        wire_deploy: whether DEPLOY and RELOAD are taken from the workers' socket; None = only
            while it is bound to this machine alone.
        allow_self_approval: whether who asked may approve; None = likewise.
        retention: how long history is kept; by default for ever.
        curve_dir: folder with the Sentinel's own CURVE keys (protocol/curve.py); with it only
            clients whose keys `admission` holds may connect. None = no encryption, for one machine.
        admission: whose keys are admitted; kept up to date by who made it.
        remote_control_address: where Scouts, backup jobs and MCP servers of other machines reach
            the control plane, each for what it needs; "" = nowhere. Wants `curve_dir`.
        loopback_control_address: a control socket on this machine's loopback, for those who may
            forward ports to it; "" = none.
        epoch_floor: the highest epoch known from outside the ledger; this Sentinel's is above it.
    """

    bind_address: str = "tcp://127.0.0.1:5555"
    database: str | Path = "casparian_flow.duckdb"
    control_address: str = ""
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    lease_ttl_s: float = 30.0
    heartbeat_s: float = 5.0
    max_retries: int = 3
    retry_base_s: float = 4.0
    breaker_failures: int = 5
    drain_s: float = 5.0
    memory_limit_mb: int = MEMORY_LIMIT_MB
    limits: Limits = field(default_factory=Limits)
    wire_deploy: bool | None = None
    allow_self_approval: bool | None = None
    retention: Retention = field(default_factory=Retention)
    trust: TrustSource = nobody
    trials: bool = True
    curve_dir: Path | None = None
    admission: Admission | None = None
    remote_control_address: str = ""
    loopback_control_address: str = ""
    epoch_floor: int = 0

    def broker_config(self) -> BrokerConfig:
        """Raises:
        ConfigError: the lease is too short for its heartbeats.
        """
        if self.lease_ttl_s <= 2 * self.heartbeat_s:
            raise ConfigError(
                f"a lease of {self.lease_ttl_s:g} s does not outlive two heartbeats of "
                f"{self.heartbeat_s:g} s",
                hint="Raise lease_ttl_seconds, or lower heartbeat_seconds.",
            )
        return BrokerConfig(
            lease_ttl_s=self.lease_ttl_s,
            heartbeat_s=self.heartbeat_s,
            lost_dispatch_s=2 * self.heartbeat_s + min(1.0, self.heartbeat_s),
            breaker_failures=self.breaker_failures,
            retry=RetryPolicy(max_retries=self.max_retries, base_s=self.retry_base_s),
        )


class Sentinel:
    """See the module's text. `run` blocks; `stop` may be called from anywhere."""

    _writer: MeteredWriter[Ledger]
    _core: SentinelCore[Ledger]
    _loop: CoreLoop[Ledger]
    _socket: WorkerSocket
    _curve: Curve | None
    _wire_calls: WireCalls
    _desk: TrialDesk
    _plane: ControlPlane

    def __init__(self, config: SentinelConfig, *, clock: Clock | None = None) -> None:
        self.config = config
        self.metrics = SentinelMetrics()
        self.bind_address = ""
        """The address that is bound, once `wait_started` returned True."""
        self.control_address = ""
        """Likewise; "" for an in-memory ledger without one of its own."""
        self.remote_control_address = ""
        self.loopback_control_address = ""
        """Likewise; "" where none is asked for."""
        self._broker_config = config.broker_config()
        self._clock = clock or SystemClock()
        self._waker = Waker()
        self._stops = 0
        self._started = threading.Event()

    def stop(self) -> None:
        """Make `run` drain and return; a second call makes it return without draining."""
        self._stops += 1
        self._waker.wake()

    def wait_started(self, timeout_s: float | None = None) -> bool:
        """Wait until workers and commands are served; False if that took longer."""
        return self._started.wait(timeout_s)

    @property
    def control(self) -> ControlPlane:
        """What the control socket serves, for calls from other threads of this process.

        They wait for the ledger, and may be made from `wait_started` on until `run` ends.

        Raises:
            SentinelUnreachableError: the Sentinel has not started, or has stopped.
        """
        if not self._started.is_set():
            raise SentinelUnreachableError(
                "the Sentinel of this process does not serve", hint="Wait until it has started."
            )
        return self._plane

    @property
    def epoch(self) -> int:
        """Of its tokens; durable. 0 before it has started."""
        return self._core.broker.epoch if self._started.is_set() else 0

    def run(self) -> None:
        """Serve until `stop`, SIGTERM or SIGINT; everything is released when it returns.

        Raises:
            LedgerError: the ledger cannot be used.
            ConflictError, ConfigError: an address is in use or cannot be bound.
        """
        with ExitStack() as stack:
            stack.callback(self._waker.close)
            stack.enter_context(_stop_on_signals(self.stop))
            stack.enter_context(_interpreter_tuned_for_latency())
            self._start(stack)
            stack.callback(self._started.clear)
            self._started.set()
            self._serve()
            self._drain()
            log.info("sentinel stopped")

    # -- starting ---------------------------------------------------------------------------

    def _start(self, stack: ExitStack) -> None:
        config = self.config
        thread = LedgerThread(self._open_ledger(), self._waker.wake)
        stack.callback(thread.close)
        writer = MeteredWriter(thread, self.metrics, self._clock)
        self._writer = writer
        self._core = SentinelCore(writer, self._make_broker, self._clock)
        self._loop = CoreLoop(self._core, writer, self._waker.wake)
        self._await_ledger()
        self._desk = TrialDesk(self._loop, self._clock, self._waker.wake)
        self._desk.start()
        self._curve = self._open_gate(stack)
        self._socket = WorkerSocket(
            config.bind_address, self.metrics, self._reads_batches, self._curve
        )
        stack.callback(self._socket.close)
        self.bind_address = self._socket.address
        plane = ControlPlane(
            self._loop,
            database=config.database,
            clock=self._clock,
            bind_address=self.bind_address,
            stop=self.stop,
            allow_self_approval=self._allows_self_approval(),
            trust=config.trust,
            trials=config.trials,
            desk=self._desk,
        )
        self._plane = plane
        allowed = self._socket.is_local if config.wire_deploy is None else config.wire_deploy
        allowed = allowed and self._curve is None
        plane.remove_old_snapshots()
        self._wire_calls = WireCalls(plane, self._waker.wake, allowed=allowed)
        stack.callback(self._wire_calls.close)
        self._open_control(stack, plane)
        self._open_control_by_tcp(stack, plane)
        runner = ApiRunner(self._loop, self._clock, plane.cancel_job)
        stack.callback(runner.close)
        plane.api.news = runner.wake
        keeper = Housekeeping(plane.api, plane.on_ledger, config.retention, self._clock)
        stack.callback(keeper.close)
        # First of all at the end, also after a bug: calls that wait for a turn would otherwise
        # keep the threads that serve them, and those this process, for ever.
        stack.callback(self._loop.close)
        self._open_metrics(stack)
        log.info("sentinel ready: workers at %s", self.bind_address)

    def _open_gate(self, stack: ExitStack) -> Curve | None:
        """Raises:
        ConfigError: there are no keys to serve with, or nobody to say whom to admit.
        """
        folder, admission = self.config.curve_dir, self.config.admission
        if folder is None and admission is None and not self.config.remote_control_address:
            return None
        if folder is None or admission is None:
            raise ConfigError(
                "CURVE wants both the Sentinel's keys and somebody who admits others' keys",
                hint="The operator on Kubernetes gives both; on one machine leave [wire] "
                "curve_dir empty.",
            )
        gate = Gate(admission, self.metrics, self._clock, self._waker.wake)
        stack.callback(gate.close)
        return Curve(server_keys(folder), admission, gate)

    def _allows_self_approval(self) -> bool:
        allowed = self.config.allow_self_approval
        return self._socket.is_local if allowed is None else allowed

    def _open_ledger(self) -> Ledger:
        if str(self.config.database) == IN_MEMORY:
            ledger = Ledger.in_memory(clock=self._clock)
        else:
            ledger = self._await_lock(Path(self.config.database))
        ledger.limits = self.config.limits
        ledger.epoch_floor = self.config.epoch_floor
        ledger.screen = partial(refusal, self.config.trust)
        libraries = self.config.trust().libraries
        whitelist.record(ledger, libraries, now_us=self._clock.now().wall_us)
        return ledger

    def _await_lock(self, path: Path) -> Ledger:
        """Open the ledger, once the command that has it open, if one has, is done."""
        deadline = self._clock.now().mono + LOCK_WAIT_S
        waited = False
        while True:
            try:
                return Ledger.open(
                    path, clock=self._clock, memory_limit_mb=self.config.memory_limit_mb
                )
            except LedgerLockedError as error:
                self._refuse_second(error)
                if self._stops or self._clock.now().mono >= deadline:
                    raise
                if not waited:
                    log.warning("%s; waiting for that to end", error)
                waited = True
            threading.Event().wait(LOCK_POLL_S)

    def _refuse_second(self, locked: LedgerLockedError) -> None:
        with remote(control_address(self.config.database, self.config.control_address)) as other:
            try:
                pid = other.ping().get("pid")
            except SentinelUnreachableError:
                return
        raise LedgerLockedError(
            f"a Sentinel already runs for this ledger (process {pid})",
            hint="Stop it with 'casparian stop', or add workers to it with 'casparian worker'.",
        ) from locked

    def _make_broker(self) -> Broker:
        return Broker(self._broker_config, system_random())

    def _await_ledger(self) -> None:
        """Turn the core until a new epoch is durable and the queue's head is read."""
        self._core.start()
        deadline = self._clock.now().mono + START_TIMEOUT_S
        poller = zmq.Poller()
        poller.register(self._waker.fileno(), zmq.POLLIN)
        while not self._core.ready:
            poller.poll(int(TICK_S * 1000))
            self._waker.clear()
            self._loop.turn()
            if self._core.problem is not None:
                raise self._core.problem
            if self._clock.now().mono > deadline:
                raise LedgerUnavailableError(
                    f"the ledger did not answer within {START_TIMEOUT_S:g} seconds",
                    hint="Look whether its disk is full or very slow.",
                )

    def _open_control(self, stack: ExitStack, plane: ControlPlane) -> None:
        config = self.config
        if not config.control_address and str(config.database) == IN_MEMORY:
            return
        address = control_address(config.database, config.control_address)
        server = ControlServer(address, plane.carry_out, PROMPT)
        stack.callback(server.close)
        self.control_address = server.address

    def _open_control_by_tcp(self, stack: ExitStack, plane: ControlPlane) -> None:
        """The control sockets of a pod: loopback, for forwarded ports, and CURVE for other pods.

        Raises:
            ConfigError: an address is not on loopback that ought to be, or cannot be bound.
        """
        loopback = self.config.loopback_control_address
        if loopback:
            if not loopback.startswith(LOOPBACK_PREFIXES):
                raise ConfigError(
                    f"{loopback} is no loopback address: whoever reaches it may command",
                    hint="Give tcp://127.0.0.1:PORT.",
                )
            server = ControlServer(loopback, plane.carry_out, PROMPT)
            stack.callback(server.close)
            self.loopback_control_address = server.address
        remote_address = self.config.remote_control_address
        if remote_address and self._curve is not None:
            access = CurveAccess(self._curve.pair, self._curve.admission, self.metrics)
            calls = RemoteCalls(plane)
            server = ControlServer(remote_address, calls.carry_out, PROMPT, access)
            stack.callback(server.close)
            self.remote_control_address = server.address

    def _open_metrics(self, stack: ExitStack) -> None:
        if self.config.metrics_port:
            server = serve(self.metrics, self.config.metrics_port, self.config.metrics_host)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)

    # -- the loop ---------------------------------------------------------------------------

    def _serve(self) -> None:
        gc.collect()
        # What is alive now stays alive: the collector need not look at it again.
        gc.freeze()
        poller = self._poller()
        next_tick = 0.0
        busy = False
        while not self._stops:
            poller.poll(0 if busy else self._patience_ms(next_tick))
            busy, next_tick = self._turn(next_tick)

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._socket.socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        return poller

    def _patience_ms(self, next_tick: float) -> int:
        until = next_tick
        wakeup = self._core.wakeup
        if wakeup is not None:
            until = min(until, wakeup)
        return max(0, min(1000, int((until - self._clock.now().mono) * 1000) + 1))

    def _turn(self, next_tick: float) -> tuple[bool, float]:
        """Receive, decide, send; returns whether more lies in the socket, and the next tick."""
        self._waker.clear()
        for event in self._socket.receive():
            if isinstance(event, WorkerMessage):
                kind = type(event.message)
                if kind is m.Deploy or kind is m.Reload:
                    self._wire_calls.take(event.identity, event.message)
                    continue
                if isinstance(event.message, m.TrialResult):
                    self._desk.take(event.identity, event.message)
                    continue
            self._core.feed(event)
        gate = self._curve.gate if self._curve is not None else None
        for admitted in gate.admitted() if gate is not None else ():
            self._core.feed(admitted)
        mono = self._clock.now().mono
        if mono >= next_tick:
            next_tick = mono + TICK_S
            self._core.feed(Tick())
            for revoked in gate.tick(self._core.broker.workers) if gate is not None else ():
                self._core.feed(revoked)
            self.metrics.gauges = gauges_of(self._core)
        sends = self._loop.turn()
        sends.extend(self._wire_calls.answers())
        sends.extend(self._desk.turn())
        if sends:
            self._measure(sends)
            self._socket.send(sends)
        if self._curve is not None:
            self._socket.send(self._curve.gate.answers(), to_anybody=True)
        observations = self._core.broker.observations
        if observations:
            self.metrics.observe_jobs(observations)
            observations.clear()
        return not self._socket.exhausted, next_tick

    def _measure(self, sends: Sequence[Send]) -> None:
        """Both wait for one commit and little else, so that commit's time stands for theirs."""
        dispatched = sum(type(send.message) is m.Dispatch for send in sends)
        acknowledged = sum(type(send.message) is m.ConcludeAck for send in sends)
        if dispatched:
            self.metrics.dispatch_seconds.observe(self._writer.last_commit_s, dispatched)
        if acknowledged:
            self.metrics.conclude_seconds.observe(self._writer.last_commit_s, acknowledged)

    def _reads_batches(self, identity: Identity) -> bool:
        worker = self._core.broker.workers.get(identity)
        return worker is not None and worker.batch

    # -- stopping ---------------------------------------------------------------------------

    def _drain(self) -> None:
        """Lease nothing more, wait for what runs, then for the commits under way.

        What still runs after `drain_s` goes on: its worker holds it until a Sentinel is back.
        """
        self._core.feed(Drain())
        poller = self._poller()
        start = self._clock.now().mono
        next_tick = 0.0
        while (elapsed := self._clock.now().mono - start) < FLUSH_S + self.config.drain_s:
            _, next_tick = self._turn(next_tick)
            leases = self._core.ready and self._core.broker.leases
            running = leases and self._stops < 2 and elapsed < self.config.drain_s
            if not running and not self._core.pending:
                return
            poller.poll(50)


@contextmanager
def _stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` upon SIGTERM and SIGINT while inside; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _interpreter_tuned_for_latency() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()


def run_sentinel(settings: "Settings") -> None:
    """Run the Sentinel that the settings describe, until it is told to stop.

    Raises:
        CasparianError: it cannot start; says why and what to do.
    """
    Sentinel(config_of(settings)).run()


def config_of(settings: "Settings") -> SentinelConfig:
    from casparian_flow.config_trust import trust_source

    own, worker = settings.sentinel, settings.worker
    return SentinelConfig(
        bind_address=own.bind_address,
        database=settings.database.db_location,
        memory_limit_mb=settings.database.memory_limit_mb,
        control_address=own.control_address,
        curve_dir=settings.wire.curve_dir,
        metrics_port=own.metrics_port,
        lease_ttl_s=own.lease_ttl_seconds,
        heartbeat_s=own.heartbeat_seconds,
        max_retries=own.max_retries,
        retry_base_s=own.retry_base_seconds,
        breaker_failures=own.breaker_failures,
        allow_self_approval=settings.approvals.allow_self,
        retention=_retention(settings),
        limits=Limits(
            timeout_s=worker.job_timeout_seconds,
            memory_mb=worker.memory_mb,
            pids=worker.pids,
            log_bytes=worker.log_kb * 1024,
            recycle_after=worker.recycle_after,
        ),
        trust=trust_source(settings),
    )


def _retention(settings: "Settings") -> Retention:
    kept = settings.retention
    return Retention(
        api_job_hours=kept.api_job_hours or None,
        api_event_hours=kept.api_event_hours or None,
        history=HistoryAges(
            jobs=kept.job_hours or None,
            versions=kept.version_hours or None,
            dead_letters=kept.dead_letter_hours or None,
        ),
        every_s=kept.interval_minutes * 60,
    )
