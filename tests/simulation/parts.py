"""The simulated Sentinel and workers: real pure cores in simulated shells.

Real here: broker, core, worker state machine, keys, transition table, in-memory ledger (the twin
that passes the ledger's own contract suite). Simulated: everything with a socket, thread or disk.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from simulation.ledger import SimLedger
from simulation.world import Network, Process, Store, Stored, World

from casparian_flow.domain.clock import Now
from casparian_flow.domain.errors import LedgerError, LedgerUnavailableError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import Identity
from casparian_flow.domain.jobs import CompletionStatus
from casparian_flow.domain.outputs import (
    OutputEntry,
    OutputKind,
    SinkMode,
    output_key,
    parse_sink_uri,
    sink_id,
    slice_key,
)
from casparian_flow.domain.records import BatchItem
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.broker import Broker, BrokerConfig
from casparian_flow.sentinel.core import Completion, Failed, SentinelCore
from casparian_worker import worker_events as w
from casparian_worker.worker_state import WorkerState

SENTINEL = "sentinel"


class SimWriter:
    """The ledger's thread: one commit at a time, what gathers meanwhile goes together."""

    def __init__(self, world: World, ledger: SimLedger, wake: Callable[[], None]) -> None:
        self._world = world
        self._ledger = ledger
        self._wake = wake
        self._queue: deque[tuple[int, list[BatchItem]] | tuple[Callable[[Any], Any], Future[Any]]]
        self._queue = deque()
        self._busy = False
        self._ticket = 0
        self._completed: list[Completion] = []
        self._broken: LedgerError | None = None
        """Set from a failed commit until it is told; what was built on it fails with it."""
        self.dead = False

    def commit(self, batch: Sequence[BatchItem]) -> int:
        self._ticket += 1
        if self._broken is not None:
            self._completed.append(Completion(self._ticket, (), self._broken))
            return self._ticket
        self._queue.append((self._ticket, list(batch)))
        self._begin()
        return self._ticket

    def call(self, fn: Callable[[Any], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._queue.append((fn, future))
        self._begin()
        return future

    def completed(self) -> list[Completion]:
        done, self._completed = self._completed, []
        self._broken = None
        return done

    def die(self) -> None:
        """The process is killed: the commit under way may or may not have become durable."""
        self.dead = True
        if self._busy and self._queue and self._world.rng.random() < 0.5:
            self._world.log("ledger: the commit under way was durable after all")
            self._commit_gathered(answer=False)

    def _begin(self) -> None:
        if self._busy or self.dead or not self._queue:
            return
        self._busy = True
        seconds = self._world.options.commit_seconds * self._world.rng.uniform(0.5, 2.0)
        self._world.after(seconds, self._work)

    def _work(self) -> None:
        if self.dead:
            return
        if isinstance(self._queue[0][0], int):
            self._commit_gathered(answer=True)
        else:
            self._run_call()
        self._busy = False
        self._wake()
        self._begin()

    def _run_call(self) -> None:
        fn, future = self._queue.popleft()
        assert callable(fn)
        assert isinstance(future, Future)
        try:
            if self._ledger.failing is not None:
                raise self._ledger.failing
            future.set_result(fn(self._ledger))
        except LedgerError as error:
            future.set_exception(error)

    def _commit_gathered(self, *, answer: bool) -> None:
        gathered: list[tuple[int, list[BatchItem]]] = []
        while self._queue and isinstance(self._queue[0][0], int):
            gathered.append(self._queue.popleft())  # type: ignore[arg-type]
        items = [item for _, batch in gathered for item in batch]
        error, outcomes = self._try(items)
        if not answer:
            return
        if error is not None:
            self._broken = error
            behind = [entry for entry in self._queue if isinstance(entry[0], int)]
            for entry in behind:
                self._queue.remove(entry)
            gathered.extend(behind)  # type: ignore[arg-type]
        for number, (ticket, _) in enumerate(gathered):
            mine = outcomes if number == 0 else []
            self._completed.append(Completion(ticket, mine, error))

    def _try(self, items: list[BatchItem]) -> tuple[LedgerError | None, list[Any]]:
        world = self._world
        if not self._ledger.full and world.chance(world.options.disk_full):
            world.strike("disk_full")
            self._ledger.fill_disk()
            world.after(world.rng.uniform(0.5, 10.0), self._ledger.free_space)
        if self._ledger.failing is not None:
            return self._ledger.failing, []
        if world.chance(world.options.fsync_error):
            durable = world.rng.random() < 0.5
            world.strike("fsync_error", f"durable={durable}")
            if durable:
                self._ledger.commit(items)
            return LedgerUnavailableError("fsync failed; the outcome is not known"), []
        return None, self._ledger.commit(items)


class SimSentinel(Process):
    """One Sentinel process after another over one ledger."""

    def __init__(
        self,
        world: World,
        network: Network,
        ledger: SimLedger,
        make_broker: Callable[[], Broker],
        on_output: Callable[[Any], None],
    ) -> None:
        super().__init__(world, SENTINEL)
        self.ledger = ledger
        self._network = network
        self._make_broker = make_broker
        self._on_output = on_output
        self._turn_due = False
        self._wakeup = 0.0
        self.writer: SimWriter
        self.core: SentinelCore[Any]

    def now(self) -> Now:
        return self.world.now()

    def start(self) -> None:
        self.alive = True
        self._turn_due = False
        self.writer = SimWriter(self.world, self.ledger, self.wake)
        self.core = SentinelCore(self.writer, self._make_broker, self)
        self._network.attach(SENTINEL, self, self._receive)
        self.world.log("sentinel: starts")
        self.core.start()
        self._tick()

    def kill(self) -> None:
        self.world.log("sentinel: killed")
        self.writer.die()
        self._network.detach(self)
        super().kill()

    def wake(self) -> None:
        if self.alive and not self._turn_due:
            self._turn_due = True
            self.world.after(0.0001, self._turn, self)

    def feed(self, event: e.Event) -> None:
        self.core.feed(event)
        self.wake()

    def _receive(self, source: object, message: object) -> None:
        assert isinstance(source, bytes)
        job_id, body = message  # type: ignore[misc]
        binding = self.world.bindings.get(source)
        self.feed(e.WorkerMessage(Identity(source), job_id, body, binding))

    def _tick(self) -> None:
        self.feed(e.Tick())
        self.world.after(1.0, self._tick, self)

    def _turn(self) -> None:
        self._turn_due = False
        commits = self.core.commits
        outputs = self.core.turn()
        for output in outputs:
            if isinstance(output, e.Send):
                self.world.log(f"S->{output.identity.decode()}: {output.message}")
                self._network.send(SENTINEL, output.identity, (output.job_id, output.message))
            else:
                self._on_output(output)
        if outputs or self.core.commits != commits:
            self.core.broker.invariants()
        wakeup = self.core.wakeup
        if wakeup is not None and wakeup != self._wakeup:
            self._wakeup = wakeup
            self.world.after(max(0.0, wakeup - self.world.time), self.wake, self)


@dataclass(slots=True)
class Nature:
    """How a plugin behaves on one file version; the model that outputs are compared with."""

    seconds: float
    topics: tuple[str, ...]
    failures: int = 0
    """Transient failures before it works; counted down."""
    unreliable: bool = False
    permanent: bool = False
    fickle: bool = False
    """Every run gives other rows."""
    quarantined: int = 0


@dataclass(slots=True)
class Disk:
    """Source files: what each location holds now, and how plugins behave on each version."""

    current: dict[int, str] = field(default_factory=dict)
    natures: dict[int, Nature] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Task:
    """One attempt at the runner."""

    start: w.StartJob
    running: bool = False
    over: bool = False


class SimWorker(Process):
    """One worker process after another under one name, over one output root."""

    def __init__(
        self,
        world: World,
        name: str,
        network: Network,
        store: Store,
        disk: Disk,
        make_state: Callable[[w.WorkerConfig], WorkerState],
    ) -> None:
        super().__init__(world, name)
        self.store = store
        self.state: WorkerState
        self.identity = Identity(b"")
        self._network = network
        self._disk = disk
        self._make_state = make_state
        self._tasks: dict[str, Task] = {}
        self.binding: Callable[[], tuple[str, str]] | None = None
        """What a new process is bound to; None if it is believed what it says."""
        self._connections = 0

    def start(self, identity: bytes | None = None) -> None:
        options = self.world.options
        self.alive = True
        nonce = f"{self.name}.{self.generation}"
        self.identity = Identity(identity or nonce.encode())
        config = w.WorkerConfig(
            self.name,
            nonce,
            root_id=self.store.root_id,
            slots=options.slots,
            credit=options.credit,
            lookahead=2,
            stage_listing_s=30.0,
        )
        self.state = self._make_state(config)
        self._tasks = {}
        self._network.attach(self.identity, self, self._receive)
        if self.binding is not None:
            self.world.bindings[self.identity] = self.binding()
        self.world.log(f"{self.name}: starts as {self.identity.decode()}")
        self._tick()

    def kill(self) -> None:
        self.world.log(f"{self.name}: killed")
        self._network.detach(self)
        super().kill()

    def _reconnect(self) -> None:
        """The same process under a new routing id, as CURVE wants it."""
        binding = self.world.bindings.get(self.identity)
        if binding is None:
            return
        self._connections += 1
        self._network.detach(self)
        self.identity = Identity(f"{self.name}.{self.generation}c{self._connections}".encode())
        self.world.bindings[self.identity] = binding
        self._network.attach(self.identity, self, self._receive)
        self.world.log(f"{self.name}: connects as {self.identity.decode()}")

    def _receive(self, _source: object, message: object) -> None:
        job_id, body = message  # type: ignore[misc]
        pause = self.world.rng.uniform(0.0, 0.5) if self.world.options.slow_consumer else 0.0
        if pause and not self.world.healed:
            self.world.strike("slow_consumer")
            self.world.after(pause, lambda: self._feed(w.FromSentinel(job_id, body)), self)
        else:
            self._feed(w.FromSentinel(job_id, body))

    def _tick(self) -> None:
        self._feed(w.Tick())
        self.world.after(0.25, self._tick, self)

    def _feed(self, event: w.Event) -> None:
        instructions = self.state.handle(event, self.world.now())
        if instructions or not isinstance(event, w.Tick):
            self.state.invariants()
        for instruction in instructions:
            self._carry_out(instruction)

    def _later(self, seconds: float, run: Callable[[], None]) -> None:
        self.world.after(seconds * self.world.rng.uniform(0.5, 1.5), run, self)

    def _carry_out(self, instruction: w.Instruction) -> None:
        match instruction:
            case w.Send(job_id, message):
                self.world.log(f"{self.identity.decode()}->S: {message}")
                self._network.send(self.identity, SENTINEL, (job_id, message))
            case w.StartJob(token):
                self._tasks[token] = Task(instruction)
                self._fill_slots()
            case w.StopJob(token):
                self._later(0.01, lambda: self._stop(token))
            case w.PublishOutputs(token, entries):
                self._later(0.002, lambda: self._publish(token, entries, 0))
            case w.DeleteStages(token):
                self._later(0.002, lambda: self._delete_stages(token))
            case w.Reconnect():
                self._reconnect()
            case w.ListStages():
                tokens = sorted({token for token, _ in self.store.stages})
                self._later(0.01, lambda: self._feed(w.StageListing(tokens)))
            case _:
                pass

    # -- running ----------------------------------------------------------------------------

    def _fill_slots(self) -> None:
        free = self.state.config.slots - sum(task.running for task in self._tasks.values())
        for task in [t for t in self._tasks.values() if not t.running][: max(free, 0)]:
            task.running = True
            self._later(0.001, lambda task=task: self._begin(task))  # type: ignore[misc]

    def _begin(self, task: Task) -> None:
        if task.over:
            return
        dispatch = task.start.dispatch
        self._feed(w.Began(dispatch.token))
        if self._disk.current[dispatch.location_id] != dispatch.content_hash:
            self._end(task, CompletionStatus.SKIPPED, Reason.SOURCE_CHANGED)
            return
        nature = self._disk.natures[dispatch.file_version_id]
        self._later(nature.seconds, lambda: self._finish(task, nature))

    def _finish(self, task: Task, nature: Nature) -> None:
        if task.over:
            return
        if nature.permanent:
            self._end(task, CompletionStatus.FAILED, Reason.CONTRACT)
        elif nature.failures:
            nature.failures -= 1
            self._end(task, CompletionStatus.FAILED, Reason.TIMEOUT)
        elif not nature.topics:
            self._end(task, CompletionStatus.SUCCESS, None)
        else:
            run = self.world.rng.randrange(1 << 30) if nature.fickle else 0
            self._stage(task, self._entries(task.start, nature, run), run, 0)

    def _stage(self, task: Task, entries: tuple[OutputEntry, ...], run: int, written: int) -> None:
        if task.over:
            return
        token = task.start.token
        if written < len(entries):
            entry = entries[written]
            content = (task.start.dispatch.content_hash, entry.topic, run)
            self.store.stages[token, entry.n] = Stored(token, content)
            self._later(0.002, lambda: self._stage(task, entries, run, written + 1))
            return
        task.over = True
        del self._tasks[token]
        quarantined = sum(entry.kind is OutputKind.QUARANTINE for entry in entries)
        good = CompletionStatus.PARTIAL_SUCCESS if quarantined else CompletionStatus.SUCCESS
        self._feed(w.Staged(token, entries, m.Conclude(token, good)))
        self._fill_slots()

    def _end(self, task: Task, status: CompletionStatus, reason: Reason | None) -> None:
        task.over = True
        token = task.start.token
        del self._tasks[token]
        self._feed(w.Ended(token, m.Conclude(token, status, reason or "")))
        self._fill_slots()

    def _stop(self, token: str) -> None:
        task = self._tasks.pop(token, None)
        if task is None:
            return
        task.over = True
        self._delete_stages(token)
        self._feed(w.Stopped(token))
        self._fill_slots()

    def _entries(self, start: w.StartJob, nature: Nature, run: int) -> tuple[OutputEntry, ...]:
        dispatch, plugin = start.dispatch, start.plugin
        entries = []
        for n, topic in enumerate(nature.topics):
            mode = SinkMode.REPLACE if topic == "latest" else SinkMode.APPEND
            uri = f"parquet://{topic}"
            sink = sink_id(parse_sink_uri(uri), self.store.root_id, mode)
            key = output_key(
                self.state.ledger_id,
                dispatch.file_version_id,
                plugin.artifact_hash,
                plugin.parameters_hash,
                topic,
                sink,
                dispatch.order_no[2],
            )
            slice_of = slice_key(
                self.state.ledger_id, dispatch.location_id, dispatch.plugin_name, topic, sink
            )
            kind = OutputKind.OUTPUT if n < len(nature.topics) - nature.quarantined else None
            entries.append(
                OutputEntry(
                    n=n,
                    topic=topic,
                    kind=kind or OutputKind.QUARANTINE,
                    uri=uri,
                    mode=mode,
                    root_id=self.store.root_id,
                    output_key=key,
                    slice_key=slice_of,
                    order_no=dispatch.order_no,
                    stage=f"{dispatch.token}.{n}",
                    final=f"{topic}-{key[:32]}",
                    rows=1,
                    bytes=10,
                    sha256=repr((dispatch.content_hash, topic, run)),
                )
            )
        return tuple(entries)

    # -- sinks ------------------------------------------------------------------------------

    def _publish(self, token: str, entries: tuple[OutputEntry, ...], n: int) -> None:
        if n == len(entries):
            self._unstage(token, entries, 0)
            return
        if self.store.down:
            self._feed(w.PublishFailed(token, "the sink is away", transient=True))
            return
        problem = self._link(token, entries[n])
        if problem:
            self._feed(w.PublishFailed(token, problem, False, Reason.SINK_CONFLICT))
            return
        self._later(0.002, lambda: self._publish(token, entries, n + 1))

    def _link(self, token: str, entry: OutputEntry) -> str:
        """Put-if-absent, as link(2) does it; returns why not, "" when the final is in place."""
        final = self.store.finals.get(entry.final)
        stage = self.store.stages.get((token, entry.n))
        if final is not None:
            return "" if repr(final.content) == entry.sha256 else "other data is there"
        if stage is None:
            return "stage and final are both gone"
        self.world.log(f"{self.name}: publishes {entry.final} of {token}")
        self.store.finals[entry.final] = Stored(token, stage.content)
        self.store.on_publish(token, entry)
        return ""

    def _unstage(self, token: str, entries: tuple[OutputEntry, ...], n: int) -> None:
        if n == len(entries):
            self._feed(w.Published(token))
            return
        self.store.stages.pop((token, entries[n].n), None)
        self._later(0.001, lambda: self._unstage(token, entries, n + 1))

    def _delete_stages(self, token: str) -> None:
        for key in [key for key in self.store.stages if key[0] == token]:
            del self.store.stages[key]


__all__ = ["BrokerConfig", "Disk", "Failed", "Nature", "SimSentinel", "SimWorker", "SimWriter"]
