"""One worker process: its parts put together, its signals, its end.

SIGTERM or SIGINT asks for a drain: nothing new is taken, what runs may end, the rest is given
back, then the process exits with 0. A second signal ends it at once. However it ends, plugin
processes end with it: the kernel sees to that (sandbox).
"""

import logging
import os
import platform
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType

from casparian_flow import __version__
from casparian_flow.domain.clock import Clock, SystemClock
from casparian_worker.mailbox import Mailbox
from casparian_worker.metrics import Health, WorkerCollector, serve_metrics
from casparian_worker.runner import Runner, RunnerConfig, Runtime
from casparian_worker.sinks.base import MssqlSettings, SinkEnvironment
from casparian_worker.sinks.root import OutputRoot
from casparian_worker.wire import Wire, WireFiles
from casparian_worker.worker_events import DrainRequested, WorkerConfig
from casparian_worker.worker_state import WorkerState

log = logging.getLogger(__name__)

CREDIT = 1024
"""Most jobs held at once; how many it gets is the Sentinel's to decide, by the worker's speed."""
LOOKAHEAD = 16
"""Jobs handed to a slot ahead of time; the slot decides how many go to the plugin."""
SWITCH_INTERVAL_S = 0.001
"""So that the wire's loop answers heartbeats while other threads compute."""
EXIT_AT_ONCE = 130
STUCK_S = 30.0
"""Of the wire's loop, which turns ten times a second, before it counts as stuck."""


@dataclass(frozen=True, slots=True)
class ProcessConfig:
    """What a worker process is told.

    Attributes:
        address: the Sentinel's, such as tcp://localhost:5555.
        output_root: folder below which file sinks write; made if it is missing.
        slots: plugin processes at work at once; 0 for one a processor.
        worker_id: for people; "" for one made of host name and process id.
        metrics_port: for Prometheus and probes, 0 for none.
        metrics_host: address on which it is opened.
        drain_s: how long running jobs may take after a signal.
        ledger_path: the ledger's file, which no sink may write to; "" if unknown.
        wire_files: for a Sentinel with CURVE.
    """

    address: str
    output_root: str = "output"
    slots: int = 0
    worker_id: str = ""
    metrics_port: int = 0
    metrics_host: str = "127.0.0.1"
    drain_s: float = 60.0
    ledger_path: str = ""
    mssql: MssqlSettings = field(default_factory=MssqlSettings)
    wire_files: WireFiles | None = None


RuntimeFactory = Callable[[], Runtime]


def run(config: ProcessConfig, make_runtime: RuntimeFactory, clock: Clock | None = None) -> int:
    """Work until a signal asks for the end; returns the exit code.

    Args:
        make_runtime: called once; what starts plugin processes.

    Raises:
        UsageError: the address or the metrics port cannot be used.
        SinkError: the output root cannot be used.
    """
    clock = clock or SystemClock()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    slots = config.slots or os.cpu_count() or 1
    with ExitStack() as cleanup:
        root = OutputRoot.open(config.output_root)
        environment = SinkEnvironment(root, clock, config.mssql, config.ledger_path)
        mailbox = Mailbox()
        cleanup.callback(mailbox.close)
        cleanup.enter_context(_drain_on_signals(mailbox))
        runtime = make_runtime()
        identity = _worker_config(config, slots, root.root_id, runtime.probe())
        state = WorkerState(identity)
        runner = Runner(RunnerConfig(slots), runtime, environment, mailbox, clock)
        cleanup.callback(runner.close)
        wire = Wire(
            config.address,
            state,
            runner,
            mailbox,
            clock,
            secrets.token_bytes,
            config.wire_files,
        )
        cleanup.callback(wire.close)
        if config.metrics_port:
            collector = WorkerCollector(state, wire.counts, lambda: runner.counts)
            health = _health(wire, runtime, clock)
            _, stop = serve_metrics(collector, config.metrics_host, config.metrics_port, health)
            cleanup.callback(stop)
        log.info("worker %s: %d slot(s), output in %s", state.config.worker_id, slots, root.path)
        wire.run()
    log.info("worker %s ends", state.config.worker_id)
    return 0


def _health(wire: Wire, runtime: Runtime, clock: Clock) -> Health:
    def live() -> str:
        silent_s = clock.now().mono - wire.counts.turned_at
        return f"the loop has not turned for {silent_s:.0f} s" if silent_s > STUCK_S else ""

    def ready() -> str:
        if wire.counts.refusal:
            return f"the Sentinel refuses this worker: {wire.counts.refusal}"
        if not wire.counts.contact:
            return "no Sentinel answers"
        return live() or runtime.problem()

    return Health(live, ready)


def _worker_config(
    config: ProcessConfig, slots: int, root_id: str, sandbox: Mapping[str, str]
) -> WorkerConfig:
    host = platform.node()[:200]
    return WorkerConfig(
        worker_id=config.worker_id or f"{host}-{os.getpid()}",
        nonce=secrets.token_hex(16),
        root_id=root_id,
        slots=slots,
        credit=max(CREDIT, slots),
        lookahead=LOOKAHEAD,
        hostname=host,
        pid=os.getpid(),
        version=__version__,
        sandbox=dict(sandbox),
        drain_s=config.drain_s,
    )


@contextmanager
def _drain_on_signals(mailbox: Mailbox) -> Iterator[None]:
    asked = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(EXIT_AT_ONCE)
        asked = True
        mailbox.post(DrainRequested())

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
