"""The broker: who may run what, and whose result counts. Pure: no socket, clock or database.

`Broker.step(events, now)` takes what happened and returns, in order, what is to be done. The
shell (sentinel/core.py) makes the `Commit`s of one step durable together and lets a `Send` with
`after_commit` or a `Reply` go only then. The broker runs ahead of the ledger: if a commit fails,
everything unsent is dropped and a new broker is restored from the ledger.

What the broker holds of each job not yet terminal:

    queued     in its plugin's lane (ready_queue.py), or delayed until its retry is due
    leased     DISPATCHING or RUNNING, with a Lease that its worker's heartbeats renew
    granting   RUNNING, asked the ledger for the grant; the ledger's answer orders grant and cancel
    staged     granted; held by the worker that publishes, or by nobody until one can RECOVER it

A token is stale iff it is not the job's current one (docs/ARCHITECTURE.md, "The commit
protocol"). Everything a worker repeats until answered gets the same answer again.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from casparian_flow.domain.clock import Now
from casparian_flow.domain.errors import require
from casparian_flow.domain.failures import RULES, Reason
from casparian_flow.domain.ids import Identity, JobId, fencing_token, parse_token
from casparian_flow.domain.jobs import (
    KIND_STATUS,
    LEASED,
    CompletionStatus,
    JobStatus,
    JournalKind,
    check_transition,
)
from casparian_flow.domain.outputs import metrics_of, output_roots
from casparian_flow.domain.records import (
    GrantOutcome,
    Health,
    HealthRecord,
    Job,
    LedgerState,
    PluginSpec,
    Record,
)
from casparian_flow.domain.retry import RetryPolicy
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.leases import Binding, Lease, Observation, Worker
from casparian_flow.sentinel.manifest_check import manifest_problem
from casparian_flow.sentinel.ready_queue import Lane, ReadyQueue

MESSAGE_CHARS_MAX = 4000
"""Of an error message kept in the ledger."""
REFUSED = "not trusted: "
"""Begins the reason of a pause that ends by itself when the version is trusted again."""
OBSERVATIONS_MAX = 10_000
PLUGIN_FAULTS = frozenset(
    {
        Reason.PLUGIN_ERROR,
        Reason.PLUGIN_INVALID,
        Reason.TIMEOUT,
        Reason.OUT_OF_MEMORY,
        Reason.CRASHED,
        Reason.EXITED,
        Reason.TRUNCATED,
        Reason.PROTOCOL,
        Reason.RESERVED_COLUMN,
        Reason.CONTRACT,
        Reason.QUARANTINE_LIMIT,
        Reason.ENVIRONMENT,
        Reason.UNTRUSTED,
    }
)
"""Failures that speak against the plugin and so count for its circuit breaker."""
GOOD = frozenset(
    {
        CompletionStatus.SUCCESS,
        CompletionStatus.PARTIAL_SUCCESS,
        CompletionStatus.COMPLETED_WITH_WARNINGS,
    }
)

_COMPLETIONS = {status.value: status for status in CompletionStatus}
_REASONS = {reason.value: reason for reason in Reason}


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    lease_ttl_s: float = 30.0
    """A worker silent for longer loses its leases."""
    heartbeat_s: float = 5.0
    """How often a worker says that it is alive; well below the lease's time to live."""
    lost_dispatch_s: float = 11.0
    """A dispatched job that heartbeats do not list for this long never arrived."""
    credit_max: int = 1024
    """Jobs outstanding at one worker, whatever it offers."""
    turnaround_s: float = 0.25
    """Prefetch grows while dispatch to conclusion takes less, so queues at workers stay short."""
    busy_pause_s: float = 0.5
    """A worker that gave a job back as busy gets nothing for this long."""
    losses_max: int = 25
    """Times a job may lose the worker that runs it, or reach one that lacks its plugin, before it
    is a dead letter: it may be what kills them."""
    losses_unbegun_max: int = 250
    """Likewise for workers that had not said that they began on it. Most of these jobs only waited
    at a worker that broke down, but one that kills it at once would look the same."""
    breaker_failures: int = 5
    """Distinct jobs failing in a row that pause their plugin."""
    recover_retry_s: float = 5.0
    """Between looks for a worker that can publish an orphaned grant."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        require(self.lease_ttl_s > 2 * self.heartbeat_s, "a lease must outlive two heartbeats")
        require(self.lost_dispatch_s > 2 * self.heartbeat_s, "a dispatch must outlive two beats")


class Broker:
    """See the module's text.

    Args:
        config: times and bounds.
        rng: for the jitter of retries; the broker's only source of chance.
    """

    def __init__(self, config: BrokerConfig, rng: random.Random) -> None:
        self.config = config
        self._rng = rng
        self.ledger_id = ""
        self.epoch = 0
        self.jobs: dict[JobId, Job] = {}
        self.leases: dict[JobId, Lease] = {}
        self.workers: dict[Identity, Worker] = {}
        self.queue = ReadyQueue(self._is_queued)
        self.counters: Counter[str] = Counter()
        self.observations: deque[Observation] = deque(maxlen=OBSERVATIONS_MAX)
        self.draining = False
        self._hydrating = False
        self._left: set[JobId] = set()
        """Jobs finished while hydrating; a page read earlier may still show them as queued."""
        self._orphans: set[JobId] = set()
        """Granted jobs that nobody publishes."""
        self._next_recover = 0.0
        self._awaited: dict[JobId, list[tuple[float, e.AwaitJob]]] = {}
        """Who waits for a job's end, and until when."""
        self._out: list[e.Instruction] = []
        self._handlers: dict[type[Any], Callable[[Any, Now], None]] = {
            e.WorkerMessage: self._worker_message,
            e.WorkerRevoked: self._worker_revoked,
            e.BadFrame: self._bad_frame,
            e.Tick: self._tick,
            e.JobsAdded: self._jobs_added,
            e.Hydrated: self._hydrated,
            e.PluginsChanged: self._plugins_changed,
            e.GrantResult: self._grant_result,
            e.Cancel: self._cancel,
            e.AwaitJob: self._await_job,
            e.Resolve: self._resolve,
            e.PausePlugin: self._pause_plugin,
            e.ResumePlugin: self._resume_plugin,
            e.Drain: self._drain,
        }
        self._messages: dict[type[Any], Callable[[Identity, int, Any, Now], None]] = {
            m.Heartbeat: self._heartbeat,
            m.DispatchAck: self._dispatch_ack,
            m.Stage: self._stage,
            m.Conclude: self._conclude,
            m.Stages: self._stages,
            m.Err: self._err,
        }

    # -- the outside ------------------------------------------------------------------------

    def restore(self, state: LedgerState, now: Now) -> list[e.Instruction]:
        """Take over what the ledger holds. Leases get a full time to live again.

        Workers are not known yet; whoever holds a lease says so in its IDENTIFY.
        """
        require(not self.jobs, "a broker is restored once")
        self.ledger_id, self.epoch = state.ledger_id, state.epoch
        for health in state.health:
            self.queue.lane(health.plugin).health = health
        self._set_specs(state.plugins, now)
        specs = {spec.manifest_id: spec for spec in state.plugins}
        for job in state.active:
            self.jobs[job.job_id] = job
            owner = _holder(job)
            self.leases[job.job_id] = Lease(
                owner, now.mono + self.config.lease_ttl_s, now.mono, specs.get(job.manifest_id)
            )
            if owner is None:
                self._orphans.add(job.job_id)
        self._admit(state.queued, now)
        self._continue_hydration(state.queued, state.more_queued)
        return self._settle(now)

    def step(self, events: Sequence[e.Event], now: Now) -> list[e.Instruction]:
        """Take in events in order, then lease what can be leased.

        Raises:
            InvalidTransitionError, InvariantError: a bug; the process should end.
        """
        for event in events:
            self._handlers[type(event)](event, now)
        return self._settle(now)

    def handle(self, event: e.Event, now: Now) -> list[e.Instruction]:
        """`step` for one event."""
        return self.step((event,), now)

    @property
    def wakeup(self) -> float | None:
        """When a step is due without any event: the earliest delayed job, monotonic clock."""
        return self.queue.next_due

    @property
    def idle(self) -> bool:
        """Whether nothing is leased, granted or ready to be leased."""
        return not self.leases and not any(
            lane.runnable and self.queue.head(lane) for lane in self.queue.lanes.values()
        )

    # -- time -------------------------------------------------------------------------------

    def _tick(self, _: e.Tick, now: Now) -> None:
        for job_id, lease in list(self.leases.items()):
            if lease.owner is not None and lease.expires <= now.mono and lease.granting is None:
                self._lease_lost(self.jobs[job_id], lease, now, "its worker stopped answering")
        for identity, worker in list(self.workers.items()):
            if worker.last_seen + self.config.lease_ttl_s <= now.mono and not worker.held:
                del self.workers[identity]
                self.counters["workers_cleaned_up"] += 1
        for job_id, waiting in list(self._awaited.items()):
            for until, event in waiting:
                if until <= now.mono:
                    self._reply(event.reply, outcome="waiting", status=self.jobs[job_id].status)
            self._awaited[job_id] = [pair for pair in waiting if pair[0] > now.mono]
            if not self._awaited[job_id]:
                del self._awaited[job_id]

    def _settle(self, now: Now) -> list[e.Instruction]:
        self.queue.release_due(now.mono)
        if not self.draining:
            self._recover(now)
            self._dispatch(now)
        out, self._out = self._out, []
        return out

    # -- leasing ----------------------------------------------------------------------------

    def _dispatch(self, now: Now) -> None:
        available = {w.identity: w for w in self.workers.values() if w.free(now.mono) > 0}
        if not available:
            return
        chosen: list[Worker] = []

        def offer(lane: Lane) -> bool:
            code = lane.spec.artifact_hash if lane.spec is not None else ""
            capable = [w for w in available.values() if w.runs(lane.plugin, code)]
            if not capable:
                return False
            chosen[:] = [min(capable, key=lambda w: w.load)]
            return True

        for job_id in self.queue.best_first(offer):
            worker = chosen[0]
            self._lease(self.jobs[job_id], worker, now)
            if worker.free(now.mono) <= 0:
                del available[worker.identity]
                if not available:
                    return

    def _lease(self, job: Job, worker: Worker, now: Now) -> None:
        spec = self.queue.lane(job.plugin).spec
        if spec is None:
            raise AssertionError("a lane without a spec is not runnable")
        if job.pin and job.pin != spec.code:
            told = f"version {spec.plugin_version} of {job.plugin} is active now"
            self._skip(job, Reason.PLUGIN_CHANGED, told, now)
            return
        attempt = job.attempt + 1
        token = fencing_token(self.ledger_id, self.epoch, job.job_id, attempt)
        self._record(
            job,
            JournalKind.LEASED,
            now,
            {"token": token, "owner": worker.identity.hex(), "manifest_id": spec.manifest_id},
            attempt=attempt,
        )
        job.attempt, job.token, job.owner = attempt, token, worker.identity.hex()
        job.manifest_id = spec.manifest_id
        self._hold(job, worker, now, spec)
        if spec.spec_id not in worker.specs:
            worker.specs.add(spec.spec_id)
            self._send(worker.identity, 0, plugin_message(spec))
        self._send(worker.identity, job.job_id, _dispatch_message(job, spec))
        self.counters["jobs_dispatched"] += 1

    def _hold(self, job: Job, worker: Worker, now: Now, spec: PluginSpec | None) -> Lease:
        expires = now.mono + self.config.lease_ttl_s
        lease = Lease(worker.identity, expires, now.mono, spec)
        self.leases[job.job_id] = lease
        worker.held.add(job.job_id)
        return lease

    def _let_go(self, job_id: JobId, lease: Lease) -> Worker | None:
        """End a lease; returns the worker that held it, if it is connected."""
        del self.leases[job_id]
        self._orphans.discard(job_id)
        return self._unhold(job_id, lease)

    def _orphan(self, job_id: JobId, lease: Lease) -> None:
        """A granted job is without a publisher; `_recover` looks for one."""
        self._unhold(job_id, lease)
        lease.owner = None
        self._orphans.add(job_id)

    def _unhold(self, job_id: JobId, lease: Lease) -> Worker | None:
        worker = self.workers.get(lease.owner) if lease.owner is not None else None
        if worker is not None:
            worker.held.discard(job_id)
        return worker

    def _lease_lost(self, job: Job, lease: Lease, now: Now, why: str) -> None:
        """The holder is gone: a granted job is published by another, any other runs again."""
        if job.status is JobStatus.STAGED:
            self._orphan(job.job_id, lease)
            return
        began = job.status is JobStatus.RUNNING
        job.losses += began
        job.losses_unbegun += not began
        self._let_go(job.job_id, lease)
        self.counters["jobs_requeued"] += 1
        if (
            job.losses > self.config.losses_max
            or job.losses_unbegun > self.config.losses_unbegun_max
        ):
            lost = job.losses + job.losses_unbegun
            self._dead_letter(job, Reason.LEASE_LOST, f"{lost} workers were lost; {why}", now)
        elif began:
            data = {
                "reason": Reason.LEASE_LOST,
                "message": why,
                "not_before_us": 0,
                "retry_count": job.retry_count,
            }
            self._record(job, JournalKind.RETRIED, now, data)
            self.queue.push(job)
        else:
            self._record(job, JournalKind.RETURNED, now, {"reason": Reason.LEASE_LOST})
            self.queue.push(job)

    def _recover(self, now: Now) -> None:
        """Hand orphaned grants to workers that can reach the same output root.

        A bound worker gets those of its plugin's other versions as well: their code has done its
        part, and their own workers may be gone for good.
        """
        if not self._orphans or now.mono < self._next_recover:
            return
        for job_id in sorted(self._orphans):
            lease = self.leases[job_id]
            job = self.jobs[job_id]
            worker = self._publisher(job)
            if worker is None:
                self._next_recover = now.mono + self.config.recover_retry_s
                continue
            self._orphans.discard(job_id)
            self._hold(job, worker, now, lease.spec)
            job.owner = worker.identity.hex()
            self._send(worker.identity, job_id, m.Recover(job.token, job.manifest))
            self.counters["jobs_recovered"] += 1

    def _publisher(self, job: Job) -> Worker | None:
        roots = output_roots(job.manifest)
        most = 2 * self.config.credit_max
        able = [
            w
            for w in self.workers.values()
            if not w.leaving
            and w.publishes(job.plugin)
            and roots <= {w.root_id}
            and len(w.held) < most
        ]
        return min(able, key=lambda w: w.load) if able else None

    # -- messages of workers ----------------------------------------------------------------

    def _worker_message(self, event: e.WorkerMessage, now: Now) -> None:
        worker = self.workers.get(event.identity)
        if worker is not None:
            worker.last_seen = now.mono
        if isinstance(event.message, m.Identify):
            self._identify(event.identity, event.message, event.binding, now)
            return
        handler = self._messages.get(type(event.message))
        if handler is None:
            self._refuse_message(event.identity, event.job_id, "not a message for the Sentinel")
            return
        if worker is None:
            self._send_now(event.identity, 0, m.Err("identify first", "unknown_worker"))
            if event.binding is not None:
                return
            # What it says of a token still counts: it may hold a grant from before a restart.
        handler(event.identity, event.job_id, event.message, now)

    def _worker_revoked(self, event: e.WorkerRevoked, _: Now) -> None:
        worker = self.workers.get(event.identity)
        if worker is not None:
            worker.revoked = True

    def _bad_frame(self, event: e.BadFrame, _: Now) -> None:
        self.counters["protocol_errors"] += 1
        self._send_now(event.identity, 0, m.Err(event.error[:MESSAGE_CHARS_MAX], "malformed"))

    def _refuse_message(self, identity: Identity, job_id: int, why: str) -> None:
        self.counters["protocol_errors"] += 1
        self._send_now(identity, job_id, m.Err(why, "unexpected"))

    def _err(self, _: Identity, __: int, ___: m.Err, ____: Now) -> None:
        self.counters["worker_errors"] += 1

    def _identify(
        self, identity: Identity, message: m.Identify, binding: tuple[str, str] | None, now: Now
    ) -> None:
        bound = Binding(*binding) if binding is not None else None
        known = self.workers.get(identity)
        grace_s = self.config.lost_dispatch_s
        if known is None or known.nonce != message.nonce or known.bound != bound:
            if known is not None:
                self._forget(known, now, "its process was replaced")
            known = self._register(identity, message, now)
            known.bound = bound
            # Nothing is on its way to a process that was unknown until now.
            grace_s = 0.0
        known.capabilities = frozenset([bound.plugin] if bound else message.capabilities)
        known.revoked = False
        known.batch = message.batch
        known.sandbox = message.sandbox
        self._send_now(
            identity,
            0,
            m.Welcome(
                self.ledger_id,
                self.epoch,
                self.config.heartbeat_s,
                self.config.lease_ttl_s,
                message.batch,
            ),
        )
        # It may have lost what it was sent; sending a spec again is harmless.
        known.specs.clear()
        self._reconcile(known, message.held, now, grace_s)
        if bound is not None:
            self._forget_earlier_connections(known, now)

    def _forget_earlier_connections(self, worker: Worker, now: Now) -> None:
        """A process that came back under another routing id hears nothing under the old one.

        Only where that is proved: a nonce alone is no proof.
        """
        earlier = [
            other
            for other in self.workers.values()
            if other is not worker and (other.nonce, other.bound) == (worker.nonce, worker.bound)
        ]
        for other in earlier:
            self._forget(other, now, "its process connected anew")

    def _register(self, identity: Identity, message: m.Identify, now: Now) -> Worker:
        slots = max(1, min(message.slots, self.config.credit_max))
        worker = Worker(
            identity,
            message.worker_id,
            message.nonce,
            frozenset(message.capabilities),
            message.root_id,
            slots,
            max(slots, min(message.credit, self.config.credit_max)),
            float(min(2 * slots, max(slots, message.credit))),
            now.wall_us,
            now.mono,
            message.hostname,
            message.pid,
            message.version,
        )
        # After a restart the ledger knows what this process was leased.
        worker.held = {job_id for job_id, x in self.leases.items() if x.owner == identity}
        self.workers[identity] = worker
        self.counters["workers_registered"] += 1
        return worker

    def _forget(self, worker: Worker, now: Now, why: str) -> None:
        for job_id in sorted(worker.held):
            lease = self.leases[job_id]
            if lease.granting is not None:
                lease.owner = None
            else:
                self._lease_lost(self.jobs[job_id], lease, now, why)
        del self.workers[worker.identity]

    def _heartbeat(self, identity: Identity, _: int, message: m.Heartbeat, now: Now) -> None:
        worker = self.workers.get(identity)
        if worker is None:
            return
        worker.status = message.status
        worker.draining = message.status == "DRAINING"
        self._send_now(identity, 0, m.Heartbeat("ALIVE"))
        self._reconcile(worker, message.held, now, self.config.lost_dispatch_s)

    def _reconcile(self, worker: Worker, held: Sequence[str], now: Now, grace_s: float) -> None:
        """Bring what the worker says it holds and what it was leased together.

        Args:
            grace_s: a lease younger than this may still be on its way to the worker.
        """
        expires = now.mono + self.config.lease_ttl_s
        listed: set[JobId] = set()
        for text in held:
            job = self._allowed(worker, self._current(text))
            if job is None:
                parts = parse_token(text)
                self._send(worker.identity, parts.job_id if parts else 0, m.Abort(text, "stale"))
                continue
            listed.add(job.job_id)
            lease = self.leases[job.job_id]
            if lease.owner != worker.identity:
                self._unhold(job.job_id, lease)
                self._orphans.discard(job.job_id)
                lease.owner, lease.since, lease.stuck = worker.identity, now.mono, ""
                job.owner = worker.identity.hex()
                worker.held.add(job.job_id)
            lease.expires = expires
        for job_id in sorted(worker.held - listed):
            lease = self.leases[job_id]
            if lease.granting is None and lease.since + grace_s <= now.mono:
                self._lease_lost(self.jobs[job_id], lease, now, "its worker no longer holds it")

    def _dispatch_ack(
        self, identity: Identity, header: int, message: m.DispatchAck, now: Now
    ) -> None:
        job = self._current_of(identity, message.token, header)
        if job is None:
            self._send(identity, _job_id_of(message.token), m.Abort(message.token, "stale"))
        elif job.status is JobStatus.DISPATCHING:
            self._record(job, JournalKind.STARTED, now, lazy=True)

    def _stage(self, identity: Identity, header: int, message: m.Stage, now: Now) -> None:
        job = self._current_of(identity, message.token, header)
        if job is None:
            self._send(identity, header, m.Refuse(message.token, Reason.STALE_TOKEN))
            return
        lease = self.leases[job.job_id]
        if job.status is JobStatus.STAGED:
            self._send_now(identity, job.job_id, m.Grant(message.token))
            return
        if lease.granting is not None:
            return
        problem = manifest_problem(self.ledger_id, job, lease.spec, message.entries)
        if problem:
            self.counters["protocol_errors"] += 1
            self._send(identity, job.job_id, m.Refuse(message.token, Reason.PROTOCOL, problem))
            self._fail(job, Reason.PROTOCOL, problem, False, "", now)
            return
        self._ensure_started(job, now)
        lease.granting = message.entries
        item = Record(
            job.job_id, JournalKind.GRANTED, job.attempt, now.wall_us, manifest=message.entries
        )
        self._out.append(e.Commit(item))

    def _grant_result(self, event: e.GrantResult, now: Now) -> None:
        outcome: GrantOutcome = event.outcome
        job = self.jobs[outcome.job_id]
        lease = self.leases[outcome.job_id]
        entries, lease.granting = lease.granting, None
        require(entries is not None and job.token == outcome.token, "an answer nobody asked for")
        cancels, lease.cancels = lease.cancels, []
        owner = lease.owner
        if not outcome.refused:
            check_transition(job.job_id, job.status, JobStatus.STAGED)
            job.status = JobStatus.STAGED
            job.manifest = tuple(entries or ())
            self.counters["jobs_granted"] += 1
            if owner is None:
                self._orphans.add(job.job_id)
            else:
                self._send_now(owner, job.job_id, m.Grant(job.token))
            for cancel in cancels:
                self._reply(cancel.reply, outcome="too_late", status=job.status)
            return
        reason = Reason(outcome.refused)
        if reason is Reason.BUSY:
            # Another job is publishing this slice; the worker repeats its STAGE and asks again.
            if owner is None:
                self._lease_lost(job, lease, now, "its process was replaced")
            for cancel in cancels:
                self._cancel(cancel, now)
            return
        if owner is not None:
            self._send(owner, job.job_id, m.Refuse(job.token, reason, outcome.message))
        if reason in (Reason.SUPERSEDED, Reason.DUPLICATE_OUTPUT):
            self._skip(job, reason, outcome.message, now)
        else:
            self._fail(job, reason, outcome.message, False, "", now)
        for cancel in cancels:
            self._cancel(cancel, now)

    def _conclude(self, identity: Identity, header: int, message: m.Conclude, now: Now) -> None:
        job = self._current_of(identity, message.token, header)
        if job is None:
            self.counters["late_conclusions"] += 1
            self._send(identity, header, m.ConcludeAck([message.token]))
            return
        lease = self.leases[job.job_id]
        status, reason = _conclusion(message)
        if status is None:
            self._refuse_message(identity, job.job_id, f"unknown status {message.status!r:.80}")
            return
        if lease.granting is not None:
            # It is told the ledger's decision in a moment and concludes again.
            return
        if job.status is JobStatus.STAGED:
            self._conclude_granted(job, lease, status, message, now)
        else:
            self._conclude_running(job, status, reason, message, now)
        self._send(identity, job.job_id, m.ConcludeAck([message.token]))

    def _conclude_granted(
        self, job: Job, lease: Lease, status: CompletionStatus, message: m.Conclude, now: Now
    ) -> None:
        if status in GOOD:
            metrics = {**metrics_of(job.manifest), **message.metrics}
            self._complete(job, status, metrics, message, now)
            return
        # Only an operator ends a granted job; until then it is kept and shown.
        self._orphan(job.job_id, lease)
        self._orphans.discard(job.job_id)
        lease.stuck = message.error_message[:MESSAGE_CHARS_MAX] or "the sink refuses for good"
        self.counters["jobs_stuck"] += 1

    def _conclude_running(
        self, job: Job, status: CompletionStatus, reason: Reason, message: m.Conclude, now: Now
    ) -> None:
        text = message.error_message[:MESSAGE_CHARS_MAX]
        if status in GOOD:
            self._ensure_started(job, now)
            self._complete(job, status, message.metrics, message, now)
        elif status is CompletionStatus.FAILED:
            self._ensure_started(job, now)
            report = _report(message)
            self._fail(job, reason, text, message.transient, message.log, now, report)
        elif status is CompletionStatus.SKIPPED:
            self._skip(job, reason, text, now)
            self._out.append(e.Rescan(job.root_id, job.rel_path))
        else:
            self._give_back(job, reason, now)

    def _give_back(self, job: Job, reason: Reason, now: Now) -> None:
        """The worker did not do it, through no fault of the job."""
        worker = self._let_go(job.job_id, self.leases[job.job_id])
        self.counters["jobs_rejected"] += 1
        # A worker that cannot take the plugin in would be sent it again without end.
        job.losses += reason is Reason.NEED_PLUGIN
        if job.losses > self.config.losses_max:
            self._dead_letter(job, reason, f"given back {job.losses} times", now)
        else:
            self._record(job, JournalKind.RETURNED, now, {"reason": reason})
            self.queue.push(job)
        if worker is None:
            return
        if reason is Reason.NEED_PLUGIN:
            worker.specs.clear()
        elif reason is Reason.DRAINING:
            worker.draining = True
        else:
            worker.window = float(worker.slots)
            worker.blocked_until = now.mono + self.config.busy_pause_s

    def _stages(self, identity: Identity, _: int, message: m.Stages, __: Now) -> None:
        """A stage goes iff its token is neither current nor granted; age never decides."""
        garbage = []
        for text in message.tokens:
            parts = parse_token(text)
            if parts is not None and parts.ledger_id == self.ledger_id and not self._current(text):
                garbage.append(text)
        if garbage:
            self._send(identity, 0, m.Discard(garbage))

    # -- how attempts end -------------------------------------------------------------------

    def _complete(
        self, job: Job, status: CompletionStatus, metrics: Any, message: m.Conclude, now: Now
    ) -> None:
        data = {"completion": status, "metrics": dict(metrics), **_report(message)}
        self._finish(job, JournalKind.COMPLETED, now, data, message.log)
        self.counters["jobs_completed"] += 1
        if job.rehearsal is not None:
            return
        lane = self.queue.lane(job.plugin)
        lane.failed_jobs.clear()
        if lane.health.consecutive_failures:
            lane.health.consecutive_failures = 0
            self._write_health(lane.health, now, lazy=True)

    def _skip(self, job: Job, reason: Reason, message: str, now: Now) -> None:
        self._finish(job, JournalKind.SKIPPED, now, {"reason": reason, "message": message}, "")
        self.counters["jobs_skipped"] += 1

    def _fail(
        self,
        job: Job,
        reason: Reason,
        message: str,
        transient: bool | None,
        log: str,
        now: Now,
        report: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._count_against(job, reason, message, now)
        if transient is None:
            transient = RULES[reason].transient
        # Who rehearses wants to hear of a failure, not of its fourth repetition.
        transient = transient and job.rehearsal is None
        if not transient or not self.config.retry.allows(job.retry_count):
            self._let_go_and_observe(job, "failed", now)
            permanent = not transient
            self._dead_letter(job, reason, message, now, log, permanent, report)
            return
        self._let_go_and_observe(job, "retried", now)
        job.retry_count += 1
        delay = self.config.retry.delay_s(job.retry_count, self._rng)
        job.not_before_us = now.wall_us + int(delay * 1e6)
        data = {
            "reason": reason,
            "message": message,
            "not_before_us": job.not_before_us,
            "retry_count": job.retry_count,
        }
        self._record(job, JournalKind.RETRIED, now, data, log=log)
        self.queue.push_delayed(job, now.mono + delay)
        self.counters["jobs_retried"] += 1

    def _dead_letter(
        self,
        job: Job,
        reason: Reason,
        message: str,
        now: Now,
        log: str = "",
        permanent: bool = False,
        report: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        data = {"reason": reason, "message": message, **report}
        if job.rehearsal is None:
            data["dead_letter"] = "permanent_error" if permanent else "max_retries_exceeded"
        self._record(job, JournalKind.FAILED, now, data, log=log)
        self._drop(job)
        self.counters["jobs_failed"] += 1

    def _count_against(self, job: Job, reason: Reason, message: str, now: Now) -> None:
        lane = self.queue.lane(job.plugin)
        if reason not in PLUGIN_FAULTS or job.job_id in lane.failed_jobs:
            return
        if job.rehearsal is not None:
            return
        if len(lane.failed_jobs) < self.config.breaker_failures:
            lane.failed_jobs.add(job.job_id)
        health = lane.health
        health.consecutive_failures += 1
        # What a worker refuses to load is no better with the next file.
        limit = 1 if reason is Reason.UNTRUSTED else self.config.breaker_failures
        opens = health.consecutive_failures >= limit and not health.paused
        if opens:
            health.paused = True
            health.reason = f"{health.consecutive_failures} jobs failed in a row; last: {message}"
            self.counters["plugins_paused"] += 1
        self._write_health(health, now, lazy=not opens)

    def _finish(
        self, job: Job, kind: JournalKind, now: Now, data: dict[str, Any], log: str
    ) -> None:
        """Write a terminal entry and forget the job."""
        lease = self.leases.get(job.job_id)
        if lease is not None:
            self._let_go_and_observe(job, kind.lower(), now)
        self._record(job, kind, now, data, log=log)
        self._drop(job)

    def _drop(self, job: Job) -> None:
        del self.jobs[job.job_id]
        if self._hydrating:
            self._left.add(job.job_id)
        for _, event in self._awaited.pop(job.job_id, ()):
            self._reply(event.reply, outcome="ended", status=job.status)

    def _let_go_and_observe(self, job: Job, outcome: str, now: Now) -> None:
        lease = self.leases[job.job_id]
        worker = self._let_go(job.job_id, lease)
        turnaround = now.mono - lease.since
        self.observations.append(Observation(job.plugin, outcome, turnaround))
        if worker is None:
            return
        worker.done += 1
        worker.adapt(turnaround, self.config.turnaround_s)

    # -- commands ---------------------------------------------------------------------------

    def _cancel(self, event: e.Cancel, now: Now) -> None:
        job = self.jobs.get(event.job_id)
        if job is None:
            self._reply(event.reply, outcome="unknown")
            return
        lease = self.leases.get(event.job_id)
        if job.status is JobStatus.STAGED:
            self._reply(event.reply, outcome="too_late", status=job.status)
            return
        if lease is not None and lease.granting is not None:
            lease.cancels.append(event)
            return
        data = {"reason": Reason.CANCELLED, "message": "Cancelled by user", "by": event.by}
        owner = lease.owner if lease is not None else None
        self._finish(job, JournalKind.ABORTED, now, data, "")
        self.counters["jobs_aborted"] += 1
        self._reply(event.reply, outcome="cancelled", status=JobStatus.ABORTED)
        if owner is not None:
            self._send(owner, job.job_id, m.Abort(job.token, Reason.CANCELLED))

    def _await_job(self, event: e.AwaitJob, now: Now) -> None:
        if event.job_id in self.jobs:
            until = now.mono + event.timeout_s
            self._awaited.setdefault(event.job_id, []).append((until, event))
        else:
            self._reply(event.reply, outcome="unknown")

    @property
    def unanswered(self) -> list[object]:
        """Replies that are still owed."""
        return [event.reply for waiting in self._awaited.values() for _, event in waiting]

    def _resolve(self, event: e.Resolve, now: Now) -> None:
        job = self.jobs.get(event.job_id)
        if job is None or job.status is not JobStatus.STAGED:
            self._reply(event.reply, outcome="not_staged")
            return
        lease = self.leases[job.job_id]
        owner = lease.owner
        if event.forward:
            self._orphan(job.job_id, lease)
            lease.stuck = ""
            self._next_recover = 0.0
        else:
            data = {
                "reason": Reason.ABANDONED,
                "message": f"given up by {event.by or 'an operator'}",
                "dead_letter": Reason.ABANDONED,
            }
            self._finish(job, JournalKind.FAILED, now, data, "")
            self.counters["jobs_failed"] += 1
            if owner is not None:
                self._send(owner, job.job_id, m.Abort(job.token, Reason.ABANDONED))
        self._reply(event.reply, outcome="resolved", forward=event.forward)

    def _pause_plugin(self, event: e.PausePlugin, now: Now) -> None:
        health = self.queue.lane(event.plugin).health
        health.paused, health.reason = True, event.reason[:MESSAGE_CHARS_MAX]
        self._write_health(health, now)
        self._reply(event.reply, outcome="paused")

    def _resume_plugin(self, event: e.ResumePlugin, now: Now) -> None:
        lane = self.queue.lane(event.plugin)
        lane.failed_jobs.clear()
        lane.health = Health(event.plugin)
        self._write_health(lane.health, now)
        self._reply(event.reply, outcome="resumed")

    def _drain(self, _: e.Drain, __: Now) -> None:
        self.draining = True

    # -- jobs and plugins coming in ---------------------------------------------------------

    def _jobs_added(self, event: e.JobsAdded, now: Now) -> None:
        self._admit(event.jobs, now)

    def _hydrated(self, event: e.Hydrated, now: Now) -> None:
        self._hydrating = False
        # A page read before a lease or cancel was folded may show a job as it was.
        unknown = [
            job
            for job in event.jobs
            if job.job_id not in self.jobs and job.job_id not in self._left
        ]
        self._admit(unknown, now)
        self._continue_hydration(event.jobs, event.more)
        if not self._hydrating:
            self._left.clear()

    def _continue_hydration(self, page: Sequence[Job], more: bool) -> None:
        if more and page and not self._hydrating:
            self._hydrating = True
            last = page[-1]
            self._out.append(e.Hydrate((last.priority, last.job_id)))

    def _admit(self, jobs: Sequence[Job], now: Now) -> None:
        for job in jobs:
            require(job.job_id not in self.jobs, f"job {job.job_id} was admitted before")
            self.jobs[job.job_id] = job
            wait_us = job.not_before_us - now.wall_us
            if job.status is not JobStatus.QUEUED:
                continue
            if wait_us > 0:
                # The wall clock may have jumped: never wait longer than this retry could.
                seconds = min(wait_us / 1e6, self.config.retry.longest_s(job.retry_count))
                self.queue.push_delayed(job, now.mono + seconds)
            else:
                self.queue.push(job)

    def _plugins_changed(self, event: e.PluginsChanged, now: Now) -> None:
        self._set_specs(event.specs, now)

    def _set_specs(self, specs: Sequence[PluginSpec], now: Now) -> None:
        for lane in self.queue.lanes.values():
            lane.spec = None
        for spec in specs:
            lane = self.queue.lane(spec.plugin)
            if spec.refused:
                self._pause_refused(lane.health, spec.refused, now)
                continue
            lane.spec = spec
            judged = spec.refused is not None
            if judged and lane.health.paused and lane.health.reason.startswith(REFUSED):
                lane.health = Health(spec.plugin)
                self._write_health(lane.health, now)

    def _pause_refused(self, health: Health, refused: str, now: Now) -> None:
        """Show why it does not run; what somebody else has paused keeps that reason."""
        reason = f"{REFUSED}{refused}"[:MESSAGE_CHARS_MAX]
        if not health.paused or (health.reason.startswith(REFUSED) and health.reason != reason):
            health.paused, health.reason = True, reason
            self._write_health(health, now)

    # -- small helpers ----------------------------------------------------------------------

    def _is_queued(self, job_id: JobId) -> bool:
        job = self.jobs.get(job_id)
        return job is not None and job.status is JobStatus.QUEUED

    def _current_of(self, identity: Identity, token: str, header: int) -> Job | None:
        """As `_current`; None also if the job is none that this worker may speak of."""
        return self._allowed(self.workers.get(identity), self._current(token, header))

    def _allowed(self, worker: Worker | None, job: Job | None) -> Job | None:
        """The job, unless the worker is bound to something else and was not given it."""
        if worker is None or worker.bound is None or job is None:
            return job
        lease = self.leases[job.job_id]
        code = lease.spec.artifact_hash if lease.spec is not None else worker.bound.artifact_hash
        if worker.bound == (job.plugin, code):
            return job
        if worker.bound.plugin == job.plugin and lease.owner == worker.identity:
            return job  # a grant of another version, which it was sent to publish
        self.counters["foreign_tokens"] += 1
        return None

    def _current(self, token: str, header: int = 0) -> Job | None:
        """The job whose current, live attempt this token names; None if the token is stale.

        Args:
            header: the job id in the message's header, where it has one: right but for rare
                peers, and cheaper to look up than to read out of the token.
        """
        job = self.jobs.get(JobId(header))
        if job is None or job.token != token:
            parts = parse_token(token)
            job = self.jobs.get(parts.job_id) if parts is not None else None
        if job is None or job.token != token or job.job_id not in self.leases:
            return None
        return job

    def _ensure_started(self, job: Job, now: Now) -> None:
        if job.status is JobStatus.DISPATCHING:
            self._record(job, JournalKind.STARTED, now)

    def _record(
        self,
        job: Job,
        kind: JournalKind,
        now: Now,
        data: dict[str, Any] | None = None,
        *,
        attempt: int | None = None,
        log: str = "",
        lazy: bool = False,
    ) -> None:
        status = KIND_STATUS[kind]
        check_transition(job.job_id, job.status, status)
        job.status = status
        number = job.attempt if attempt is None else attempt
        self._out.append(
            e.Commit(Record(job.job_id, kind, number, now.wall_us, data, log=log), lazy)
        )

    def _write_health(self, health: Health, now: Now, *, lazy: bool = False) -> None:
        copy = Health(health.plugin, health.consecutive_failures, health.paused, health.reason)
        self._out.append(e.Commit(HealthRecord(copy, now.wall_us), lazy))

    def _send(self, identity: Identity, job_id: int, message: m.Message) -> None:
        self._out.append(e.Send(identity, job_id, message))

    def _send_now(self, identity: Identity, job_id: int, message: m.Message) -> None:
        self._out.append(e.Send(identity, job_id, message, after_commit=False))

    def _reply(self, reply: object, **result: Any) -> None:
        self._out.append(e.Reply(reply, result))

    def invariants(self) -> None:
        """Check that the parts of the state agree; called after every step by the tests.

        Raises:
            InvariantError: naming what does not hold.
        """
        for job_id, lease in self.leases.items():
            job = self.jobs.get(job_id)
            require(job is not None, f"job {job_id} is leased but unknown")
            assert job is not None
            leased = job.status in LEASED or job.status is JobStatus.STAGED
            require(leased, f"job {job_id} is leased but {job.status}")
            require(
                lease.granting is None or job.status is JobStatus.RUNNING, "granting, not running"
            )
            require(job.token, f"job {job_id} is leased without a token")
            require(
                lease.owner is not None or lease.granting is not None or job.status not in LEASED,
                f"job {job_id} is {job.status}, but nobody holds it",
            )
            worker = self.workers.get(lease.owner) if lease.owner is not None else None
            require(
                worker is None or job_id in worker.held, f"job {job_id} is not held by its owner"
            )
            require(
                worker is None or worker.publishes(job.plugin),
                f"job {job_id} is held by a worker of another plugin",
            )
        for job_id, job in self.jobs.items():
            live = job.status in LEASED or job.status is JobStatus.STAGED
            require(
                live == (job_id in self.leases), f"job {job_id}: {job.status} and lease disagree"
            )
        require(self._awaited.keys() <= self.jobs.keys(), "somebody waits for a job that is gone")
        for worker in self.workers.values():
            for job_id in worker.held:
                held = self.leases.get(job_id)
                require(
                    held is not None and held.owner == worker.identity,
                    f"worker {worker.worker_id} holds job {job_id} without a lease",
                )
            # Its credit, and grants of others that it publishes.
            require(len(worker.held) <= 2 * self.config.credit_max, "held is unbounded")


def _report(message: m.Conclude) -> dict[str, str]:
    """A conclusion's report as the journal keeps it."""
    return {"report": message.report} if message.report else {}


def _holder(job: Job) -> Identity | None:
    """Who a job was leased to when the ledger was left; None for a grant that nobody publishes."""
    if not job.owner and job.status is JobStatus.STAGED:
        return None
    try:
        return Identity(bytes.fromhex(job.owner))
    except ValueError:
        # A program with a JobQueue of its own: no worker has such a name, so the lease runs out.
        return Identity(job.owner.encode())


def _job_id_of(token: str) -> int:
    parts = parse_token(token)
    return parts.job_id if parts is not None else 0


def _conclusion(message: m.Conclude) -> tuple[CompletionStatus | None, Reason]:
    """Status and reason of a CONCLUDE; (None, …) if the status is none of ours."""
    status = _COMPLETIONS.get(message.status)
    if status is None:
        return None, Reason.PROTOCOL
    reason = _REASONS.get(message.reason)
    if reason is None:
        reason = Reason.BUSY if status is CompletionStatus.REJECTED else Reason.WORKER_ERROR
    return status, reason


def plugin_message(spec: PluginSpec) -> m.Plugin:
    """A spec as workers get it."""
    return m.Plugin(
        spec.spec_id,
        spec.plugin,
        spec.plugin_version,
        spec.artifact_hash,
        spec.source_code,
        spec.lockfile,
        spec.env_hash,
        spec.sinks,
        spec.parameters_json,
        spec.parameters_hash,
        spec.limits,
        spec.manifest_json,
        spec.envelope,
        spec.deployed_at_us,
    )


def _dispatch_message(job: Job, spec: PluginSpec) -> m.Dispatch:
    separator = "" if job.root_path.endswith("/") else "/"
    return m.Dispatch(
        job.token,
        job.attempt,
        spec.spec_id,
        job.plugin,
        f"{job.root_path}{separator}{job.rel_path}",
        job.version_id,
        job.location_id,
        job.content_hash,
        job.signature,
        (job.version_seq, spec.manifest_id, job.generation),
        job.overrides,
        job.rehearsal,
    )


__all__ = ["Broker", "BrokerConfig", "Lease", "Observation", "Worker", "plugin_message"]
