"""One simulated run: a scenario of work and faults, then healing, then judgement.

The judges look at the history from outside: what clients were answered, what the ledger made
durable, what stands in the output root. They share no code with what they judge.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from simulation.ledger import SimLedger
from simulation.options import Options
from simulation.parts import Disk, Failed, Nature, SimSentinel, SimWorker
from simulation.world import Network, Store, Stored, World

from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import LocationId, ManifestId, VersionId, parse_token
from casparian_flow.domain.jobs import KIND_STATUS, TERMINAL, TRANSITIONS, JobStatus, JournalKind
from casparian_flow.domain.outputs import OutputEntry
from casparian_flow.domain.records import Job, PluginSpec
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.broker import Broker, BrokerConfig
from casparian_worker import worker_events as w
from casparian_worker.worker_state import WorkerState

CONVERGE_SECONDS = 3000.0
SETTLE_SECONDS = 100.0
"""After the last job: long enough for three rounds of collecting left-over stages."""
PLUGINS = ("sales", "rare")
FOREIGN = "foreign"


class ViolationError(Exception):
    """A promise was broken; the message says which."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What is being tested; mutants replace one of these by a broken one."""

    broker: Callable[[BrokerConfig, random.Random], Broker] = Broker
    worker: Callable[[w.WorkerConfig], WorkerState] = WorkerState
    ledger: Callable[[], SimLedger] = SimLedger
    simulated_worker: type[SimWorker] = SimWorker


@dataclass(slots=True)
class Answers:
    """What clients were told; promises are measured by this."""

    submitted: dict[int, int] = field(default_factory=dict)
    """job id → version id"""
    cancelled: dict[int, float] = field(default_factory=dict)
    too_late: set[int] = field(default_factory=set)
    abandoned: set[int] = field(default_factory=set)


class Run:
    """Build everything of one seed; `execute` raises ViolationError if a promise does not hold."""

    def __init__(self, options: Options, parts: Parts | None = None) -> None:
        parts = parts or Parts()
        self.options = options
        self.world = World(options)
        self.rng = random.Random(f"scenario-{options.seed}")
        self.network = Network(self.world)
        self.ledger = parts.ledger()
        self.store = Store("root-a")
        self.store.on_publish = self._check_publication
        self.disk = Disk()
        self.answers = Answers()
        broker_rng = random.Random(f"broker-{options.seed}")
        self.sentinel = SimSentinel(
            self.world,
            self.network,
            self.ledger,
            lambda: parts.broker(BrokerConfig(), broker_rng),
            self._answered,
        )
        self.workers = [
            parts.simulated_worker(
                self.world, f"w{n}", self.network, self.store, self.disk, parts.worker
            )
            for n in range(options.workers)
        ]
        self.twin = parts.simulated_worker(
            self.world, "twin", self.network, self.store, self.disk, parts.worker
        )
        if options.bound:
            for number, worker in enumerate(self.workers):
                worker.binding = partial(self._version_of, PLUGINS[number % len(PLUGINS)])
        self.world.statuses = lambda: {str(s) for s in self.ledger.statuses().values()}
        self._pending_scans = 0
        self._next_version = 0
        self._sequence: dict[int, int] = defaultdict(int)
        self._foreign: set[str] = set()

    # -- the scenario -----------------------------------------------------------------------

    def execute(self) -> "Run":
        for number, plugin in enumerate(PLUGINS, 1):
            self.ledger.deploy(_spec(plugin, number))
        self.sentinel.start()
        for worker in self.workers:
            worker.start()
        for location in range(1, self.options.jobs + 1):
            self.disk.current[location] = ""
            delay = self.rng.uniform(0.0, self.options.fault_seconds * 0.8)
            self.world.after(delay, lambda location=location: self._edit(location))  # type: ignore[misc]
        self._schedule_faults()
        self.world.run(self.options.fault_seconds)
        self._heal()
        self._converge()
        self._judge()
        return self

    def _schedule_faults(self) -> None:
        options = self.options
        self._poisson("partition", options.partition, lambda: self._cut(both=True))
        self._poisson("one_way", options.one_way, lambda: self._cut(both=False))
        self._poisson("kill_worker", options.kill_worker, self._kill_worker)
        self._poisson("pause_worker", options.pause_worker, self._pause_worker)
        self._poisson("kill_sentinel", options.kill_sentinel, self._kill_sentinel)
        self._poisson("twin_identity", options.twin_identity, self._start_twin)
        self._poisson("sink_down", options.sink_down, self._sink_down)
        self._poisson("foreign_file", options.foreign_file, self._foreign_file)
        self._poisson("clock_jump", options.clock_jump, self._clock_jump)
        self._poisson("cancel", options.cancel, self._cancel)
        self._poisson("redeploy", options.redeploy, self._redeploy)
        self._poisson("pause_plugin", options.pause_plugin, self._pause_plugin)
        self._poisson("replay", options.replay, self._replay)
        self._poisson(
            "change_source",
            options.change_source,
            lambda: self._edit(self._location_to_change()),
        )

    def _poisson(self, name: str, rate: float, strike: Callable[[], None]) -> None:
        if rate <= 0:
            return

        def again() -> None:
            if not self.world.healed:
                self.world.strike(name)
                strike()
                self.world.after(self.rng.expovariate(rate), again)

        self.world.after(self.rng.expovariate(rate), again)

    def _cut(self, *, both: bool) -> None:
        worker = self.rng.choice(self.workers)
        pairs = {("sentinel", worker.identity), (worker.identity, "sentinel")}
        if not both:
            pairs = {self.rng.choice(sorted(pairs, key=repr))}
        self.network.cut |= pairs
        self.world.after(
            self.rng.uniform(0.1, 60.0), lambda: self.network.cut.difference_update(pairs)
        )

    def _kill_worker(self) -> None:
        worker = self.rng.choice(self.workers)
        if worker.alive:
            worker.kill()
            self.world.after(self.rng.uniform(0.01, 40.0), lambda: self._ensure(worker))

    def _ensure(self, worker: SimWorker) -> None:
        if not worker.alive:
            worker.start()

    def _pause_worker(self) -> None:
        worker = self.rng.choice(self.workers)
        worker.pause()
        self.world.after(self.rng.uniform(0.1, 80.0), worker.resume)

    def _kill_sentinel(self) -> None:
        if self.sentinel.alive:
            self.sentinel.kill()
            self.world.after(self.rng.uniform(0.01, 40.0), self._ensure_sentinel)

    def _ensure_sentinel(self) -> None:
        if not self.sentinel.alive:
            self.sentinel.start()

    def _start_twin(self) -> None:
        if not self.twin.alive:
            self.twin.start(self.rng.choice(self.workers).identity)
            self.world.after(self.rng.uniform(1.0, 40.0), self.twin.kill)

    def _sink_down(self) -> None:
        self.store.down = True
        self.world.after(self.rng.uniform(0.1, 20.0), self._sink_up)

    def _sink_up(self) -> None:
        self.store.down = False

    def _foreign_file(self) -> None:
        """Somebody else's data stands where a granted output is about to go."""
        granted = [
            entry
            for job_id, status in sorted(self.ledger.statuses().items())
            if status is JobStatus.STAGED
            for entry in self.ledger.manifests[job_id]
            if entry.final not in self.store.finals
        ]
        if granted:
            entry = self.rng.choice(granted)
            self.store.finals[entry.final] = Stored(FOREIGN, ("not ours",))
            self._foreign.add(entry.final)
            self.world.log(f"foreign data at {entry.final}")

    def _operate(self) -> None:
        """An operator looks at jobs whose sink refuses for good: clears the way, or gives up."""
        if not self.sentinel.alive:
            return
        for job_id, lease in list(self.sentinel.core.broker.leases.items()):
            if not lease.stuck:
                continue
            foreign = [
                entry.final
                for entry in self.ledger.manifests[job_id]
                if entry.final in self.store.finals
                and self.store.finals[entry.final].token == FOREIGN
            ]
            if not foreign:
                raise ViolationError(f"job {job_id} cannot be published: {lease.stuck}")
            forward = self.rng.random() < 0.5
            if forward:
                for final in foreign:
                    del self.store.finals[final]
                self._foreign.difference_update(foreign)
            else:
                self.answers.abandoned.add(job_id)
            self.sentinel.feed(e.Resolve(("resolve", job_id), job_id, forward))

    def _clock_jump(self) -> None:
        self.world.wall_offset += self.rng.choice((-1, 1)) * 10 ** self.rng.uniform(0, 7)

    def _some_job(self) -> int | None:
        ids = sorted(self.ledger.statuses())
        return self.rng.choice(ids) if ids else None

    def _cancel(self) -> None:
        job_id = self._some_job()
        if job_id is not None and self.sentinel.alive:
            self.sentinel.feed(e.Cancel(("cancel", job_id), job_id))  # type: ignore[arg-type]

    def _version_of(self, plugin: str) -> tuple[str, str]:
        return plugin, self.ledger.spec(plugin).artifact_hash

    def _roll_over(self) -> None:
        """Replace every worker that is bound to a version of before."""
        for worker in self.workers:
            bound = self.world.bindings.get(worker.identity)
            if bound is not None and bound != self._version_of(bound[0]) and worker.alive:
                worker.kill()
                self.world.after(self.rng.uniform(0.01, 10.0), partial(self._ensure, worker))

    def _redeploy(self) -> None:
        if self.options.bound:
            self.world.after(self.rng.uniform(0.1, 20.0), self._roll_over)
        old = self.ledger.spec(self.rng.choice(PLUGINS))
        self._in_ledger(
            lambda ledger: ledger.deploy(_spec(old.plugin, old.manifest_id + len(PLUGINS))),
            lambda specs: self.sentinel.core.feed(e.PluginsChanged(specs)),
        )

    def _pause_plugin(self) -> None:
        if self.sentinel.alive:
            plugin = self.rng.choice(PLUGINS)
            self.sentinel.feed(e.PausePlugin(("pause", plugin), plugin, "for a while"))
            self.world.after(self.rng.uniform(0.1, 20.0), lambda: self._resume_plugin(plugin))

    def _resume_plugin(self, plugin: str) -> None:
        if self.sentinel.alive:
            self.sentinel.feed(e.ResumePlugin(("resume", plugin), plugin))

    def _replay(self) -> None:
        """Ask for the same version once more: a new job, and nothing may be published twice."""
        job_id = self._some_job()
        if job_id is not None and self.ledger.statuses()[job_id] in TERMINAL:
            old = self.ledger.job(job_id)
            self._submit(replace(old, **_fresh(retry_of=old.job_id)))

    # -- files and jobs ---------------------------------------------------------------------

    def _edit(self, location: int) -> None:
        """New bytes at a path; Scout notices a little later."""
        self._next_version += 1
        version = self._next_version
        self.disk.current[location] = f"{version:064x}"
        self.disk.natures[version] = self._nature()
        self._sequence[location] += 1
        job = Job(
            job_id=0,  # type: ignore[arg-type]
            plugin=PLUGINS[location % len(PLUGINS)],
            version_id=VersionId(version),
            location_id=LocationId(location),
            root_id=1,  # type: ignore[arg-type]
            root_path="/data",
            rel_path=f"{location}",
            content_hash=f"{version:064x}",
            size=1,
            signature=(1, location, 1, version, version),
            version_seq=self._sequence[location],
            priority=self.rng.choice((10, 50, 90)),
        )
        self.world.after(self.rng.uniform(0.01, 2.0), lambda: self._submit(job))

    def _location_to_change(self) -> int:
        """Any file, but rather one that a plugin is reading now."""
        running = [
            self.ledger.job(job_id).location_id
            for job_id, status in sorted(self.ledger.statuses().items())
            if status is JobStatus.RUNNING
        ]
        if running and self.rng.random() < 0.7:
            return self.rng.choice(running)
        return self.rng.randint(1, self.options.jobs)

    def _nature(self) -> Nature:
        topics = self.rng.choice(
            ((), ("a",), ("a", "b"), ("latest",), ("latest",), ("a", "latest", "bad"))
        )
        failures = self.rng.choice((0, 0, 0, 1, 2, 5))
        return Nature(
            seconds=self.rng.choice((0.01, 0.1, 1.0, 10.0)),
            topics=topics,
            failures=failures,
            unreliable=failures > 0,
            permanent=self.rng.random() < 0.05,
            fickle=self.rng.random() < 0.3,
            quarantined=int("bad" in topics),
        )

    def _submit(self, job: Job) -> None:
        """Enqueue until it is acknowledged; asking twice must not make two jobs of one scan."""
        self._pending_scans += 1
        attempt = self._submission(job)
        attempt()

    def _submission(self, job: Job) -> Callable[[], None]:
        answered = False

        def on_done(result: tuple[int, Job | None]) -> None:
            nonlocal answered
            job_id, new = result
            self.sentinel.core.add_jobs([new] if new is not None else [])
            if not answered:
                answered = True
                self._pending_scans -= 1
                self.answers.submitted[job_id] = job.version_id

        def attempt() -> None:
            if answered:
                return
            self._in_ledger(lambda ledger: ledger.enqueue_once(job), on_done)
            self.world.after(5.0, attempt)

        return attempt

    def _in_ledger(self, fn: Callable[[SimLedger], Any], done: Callable[[Any], None]) -> None:
        if not self.sentinel.alive or not self.sentinel.core.ready:
            return

        def finished(future: Any) -> None:
            if future.exception() is None:
                done(future.result())

        self.sentinel.core.call(fn, finished)
        self.sentinel.wake()

    def _answered(self, output: Any) -> None:
        if isinstance(output, e.Rescan):
            location = int(output.rel_path)
            self.world.log(f"rescan of {location}")
            return
        if isinstance(output, Failed):
            return
        assert isinstance(output, e.Reply)
        kind, subject = output.reply  # type: ignore[misc]
        self.world.log(f"answer to {kind} {subject}: {output.result}")
        if kind != "cancel":
            return
        if output.result["outcome"] == "cancelled":
            self.answers.cancelled[subject] = self.world.time
        elif output.result["outcome"] == "too_late":
            self.answers.too_late.add(subject)

    # -- healing ----------------------------------------------------------------------------

    def _heal(self) -> None:
        world = self.world
        world.healed = True
        world.log("HEALED")
        self.network.cut.clear()
        self.store.down = False
        self.ledger.free_space()
        if self.twin.alive:
            self.twin.kill()
        for worker in self.workers:
            if worker.paused:
                worker.resume()
            self._ensure(worker)
        self._roll_over()
        self._ensure_sentinel()
        world.after(15.0, lambda: [self._resume_plugin(plugin) for plugin in PLUGINS])

    def _converge(self) -> None:
        limit = self.world.time + CONVERGE_SECONDS
        while self.world.time < limit:
            self.world.run(self.world.time + 5.0)
            self._roll_over()
            if not self._pending_scans and all(
                s in TERMINAL for s in self.ledger.statuses().values()
            ):
                self.world.run(self.world.time + SETTLE_SECONDS)
                return
            self._operate()
            if int(self.world.time) % 50 < 5:
                for plugin in PLUGINS:
                    self._resume_plugin(plugin)
        stuck = {j: str(s) for j, s in self.ledger.statuses().items() if s not in TERMINAL}
        raise ViolationError(f"not converged: jobs {stuck}, scans pending {self._pending_scans}")

    # -- judges -----------------------------------------------------------------------------

    def _check_publication(self, token: str, entry: OutputEntry) -> None:
        parts = parse_token(token)
        if parts is None or self.ledger.granted.get(parts.job_id) != token:
            raise ViolationError(f"{entry.final} published under {token}, which was not granted")
        if parts.job_id in self.answers.cancelled:
            raise ViolationError(f"{entry.final} published after job {parts.job_id} was cancelled")

    def _judge(self) -> None:
        self._judge_journal()
        self._judge_jobs()
        self._judge_outputs()
        for worker in self.workers:
            if worker.state.attempts:
                raise ViolationError(f"{worker.name} still holds {sorted(worker.state.attempts)}")
        leftovers = sorted({token for token, _ in self.store.stages})
        if leftovers:
            raise ViolationError(f"stages left behind: {leftovers}")

    def _judge_journal(self) -> None:
        for job_id, records in self.ledger.histories().items():
            status, attempt, grants = JobStatus.QUEUED, 0, 0
            for record in records:
                following = KIND_STATUS[record.kind]
                if following not in TRANSITIONS[status]:
                    raise ViolationError(f"job {job_id}: {status} -> {following}")
                if record.attempt < attempt or (
                    record.kind is JournalKind.LEASED and record.attempt <= attempt
                ):
                    raise ViolationError(f"job {job_id}: attempt {record.attempt} after {attempt}")
                status, attempt = following, record.attempt
                grants += record.kind is JournalKind.GRANTED
            if grants > 1:
                raise ViolationError(f"job {job_id} was granted {grants} times")
            if status is not self.ledger.statuses()[job_id]:
                raise ViolationError(f"job {job_id}: journal says {status}, table disagrees")

    def _judge_jobs(self) -> None:
        statuses = self.ledger.statuses()
        reasons = self.ledger.last_reasons()
        for job_id in self.answers.submitted:
            if job_id not in statuses:
                raise ViolationError(f"job {job_id} was acknowledged and is lost")
        for job_id, status in statuses.items():
            if job_id in self.answers.cancelled and status is not JobStatus.ABORTED:
                raise ViolationError(f"job {job_id} was answered cancelled and is {status}")
            completed = status is JobStatus.COMPLETED or job_id in self.answers.abandoned
            if job_id in self.answers.too_late and not completed:
                raise ViolationError(f"job {job_id} was answered too late and is {status}")
            if status is JobStatus.FAILED and job_id not in self.ledger.dead_letter_jobs():
                raise ViolationError(f"job {job_id} FAILED without a dead letter")
            if status is not JobStatus.FAILED and job_id in self.ledger.dead_letter_jobs():
                raise ViolationError(f"job {job_id} is {status} and has a dead letter")
            if status is JobStatus.ABORTED and not self._may_be_aborted(job_id):
                raise ViolationError(f"job {job_id} is ABORTED and nobody asked for it")
            if self.ledger.job(job_id).retry_count > 3:
                raise ViolationError(f"job {job_id} was retried more than three times")
            self._judge_nature(job_id, status, reasons.get(job_id, ""))

    def _may_be_aborted(self, job_id: int) -> bool:
        """A cancel whose answer was lost in a crash still counts as asked for."""
        return self.options.cancel > 0

    def _judge_nature(self, job_id: int, status: JobStatus, reason: str) -> None:
        """A job must end as its file and plugin say, or for a reason that the history shows."""
        nature = self.disk.natures[self.ledger.job(job_id).version_id]
        if status is JobStatus.COMPLETED and nature.permanent:
            raise ViolationError(f"job {job_id} COMPLETED though its plugin always fails")
        if status is JobStatus.SKIPPED and reason not in (
            Reason.SOURCE_CHANGED,
            Reason.SUPERSEDED,
            Reason.DUPLICATE_OUTPUT,
        ):
            raise ViolationError(f"job {job_id} SKIPPED for {reason}")
        if status is not JobStatus.FAILED:
            return
        explained = {
            Reason.CONTRACT: nature.permanent,
            Reason.TIMEOUT: nature.unreliable,
            # Two processes under one identity take the jobs from each other again and again.
            Reason.LEASE_LOST: self.options.twin_identity > 0,
            Reason.ABANDONED: job_id in self.answers.abandoned,
        }
        if not explained.get(Reason(reason), False):
            raise ViolationError(f"job {job_id} FAILED for {reason} though its plugin works")

    def _judge_outputs(self) -> None:
        statuses = self.ledger.statuses()
        expected: dict[str, str] = {}
        for job_id, status in statuses.items():
            manifest = self.ledger.manifests.get(job_id, ())
            nature = self.disk.natures[self.ledger.job(job_id).version_id]
            if status is JobStatus.COMPLETED and len(manifest) != len(nature.topics):
                raise ViolationError(f"job {job_id} COMPLETED with {len(manifest)} outputs")
            if job_id in self.answers.abandoned and status is JobStatus.FAILED:
                # What was published before stays; what was not never will be.
                expected.update({x.final: self.ledger.granted.get(job_id, "") for x in manifest})
                continue
            if status is not JobStatus.COMPLETED and manifest:
                raise ViolationError(f"job {job_id} is {status} and was granted")
            for entry in manifest:
                expected[entry.final] = self.ledger.granted.get(job_id, "")
                self._judge_output(job_id, entry)
        for slice_of, orders in self.ledger.replaced.items():
            if orders != sorted(orders):
                raise ViolationError(f"slice {slice_of[:8]} was replaced in the order {orders}")
        for final in self._foreign:
            if self.store.finals[final].token != FOREIGN:
                raise ViolationError(f"{final} was somebody else's and is overwritten")
        for final, stored in self.store.finals.items():
            if stored.token not in (FOREIGN, expected.get(final)):
                raise ViolationError(
                    f"{final} holds {stored.token}, granted was {expected.get(final)}"
                )

    def _judge_output(self, job_id: int, entry: OutputEntry) -> None:
        stored = self.store.finals.get(entry.final)
        if stored is None:
            raise ViolationError(f"job {job_id} COMPLETED and {entry.final} is not there")
        if repr(stored.content) != entry.sha256:
            raise ViolationError(f"job {job_id}: {entry.final} holds other data than was granted")
        if stored.content[0] != self.ledger.job(job_id).content_hash:
            raise ViolationError(f"job {job_id}: {entry.final} holds rows of another version")


def _fresh(**changes: Any) -> dict[str, Any]:
    blank: dict[str, Any] = {
        "job_id": 0,
        "status": JobStatus.QUEUED,
        "attempt": 0,
        "retry_count": 0,
        "token": "",
        "owner": "",
        "manifest": (),
        "not_before_us": 0,
        "losses": 0,
        "losses_unbegun": 0,
    }
    return blank | changes


def _spec(plugin: str, number: int) -> PluginSpec:
    return PluginSpec(
        spec_id=f"{plugin}-{number}",
        plugin=plugin,
        plugin_version=f"{number}.0",
        manifest_id=ManifestId(number),
        artifact_hash=f"{plugin}{number}",
        source_code="",
        lockfile="",
        env_hash="",
        sinks=(),
    )
