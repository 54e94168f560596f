"""Carries out what the worker's state machine asks for: runs, stages, publishes, clears away.

    start_job ─> ReadyJobs ─> Slot (one thread each) ─> Stager threads ─> Staged | Ended
    publish, delete_stages, list_stages ─> Publisher threads ─> Published | PublishFailed | …

Each StartJob is answered by exactly one of Staged, Ended and Stopped. Calls come from the wire's
loop and return at once; answers go to the mailbox.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, OutputRefusedError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import OutputEntry
from casparian_flow.domain.paths import text_to_path
from casparian_flow.domain.records import Sample
from casparian_flow.protocol import messages as m
from casparian_worker.conclusions import described, failure, failure_of
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.lineage import Lineage, global_job_id, rfc3339
from casparian_worker.mailbox import Mailbox
from casparian_worker.pool import Pool
from casparian_worker.publishing import Publisher, Sinks
from casparian_worker.rehearsal import RehearsedOutputs
from casparian_worker.sinks.base import JobRun, SinkEnvironment
from casparian_worker.slot import WARM_MAX, Flight, Host, ReadyJobs, Slot, Source
from casparian_worker.source import SourceError
from casparian_worker.trial import TrialRoom
from casparian_worker.worker_events import Began, Ended, Staged, StartJob, Stopped
from casparian_worker.worker_state import conclusion_of

log = logging.getLogger(__name__)

STAGERS_PER_SLOT = 3
"""Threads that wait for a slot's fsyncs; together they share fsyncs of one folder."""
CLOSE_S = 10.0


class Runtime(Protocol):
    """Where plugin processes and the bytes they read come from (plugin_host.PluginRuntime)."""

    def host(
        self, plugin: m.Plugin, slot: int, progress: Callable[[str], None] | None = None
    ) -> Host: ...

    def sample(self, slot: int, sample: Sample) -> Source: ...

    def source(self, slot: int, *, path: str, content_hash: str, size: int) -> Source: ...

    def probe(self) -> Mapping[str, str]: ...

    def problem(self) -> str: ...

    def stop_waiting(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """How much runs at once."""

    slots: int = 1
    stagers: int = 0
    """Threads that stage; 0 for a number that suits the slots."""


class Runner:
    """See the module's text; implements wire.Work and slot.Workshop."""

    def __init__(
        self,
        config: RunnerConfig,
        runtime: Runtime,
        environment: SinkEnvironment,
        mailbox: Mailbox,
        clock: Clock,
    ) -> None:
        self._runtime = runtime
        self._clock = clock
        self._post: Callable[[Began | Staged | Ended | Stopped], None] = mailbox.post
        self._sinks = Sinks(environment)
        self._publisher = Publisher(self._sinks, environment, mailbox)
        stagers = config.stagers or STAGERS_PER_SLOT * config.slots
        self._stagers = Pool(stagers, "stager")
        self._ready = ReadyJobs()
        self._live: set[str] = set()
        """Tokens that still wait for their one answer."""
        self._stopped: set[str] = set()
        """Of those, the ones to be stopped."""
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._slots = [Slot(n, self._ready, self, clock) for n in range(config.slots)]
        for slot in self._slots:
            slot.start()
        self._trials = TrialRoom(runtime, config.slots * WARM_MAX, mailbox, clock)

    @property
    def counts(self) -> Counter[str]:
        """Totals since start, for metrics: executions, timeouts, {scheme}_files, {scheme}_rows."""
        with self._lock:
            return self._counts + self._publisher.counts

    # -- asked by the wire ----------------------------------------------------------------------

    def start_job(self, job: StartJob) -> None:
        with self._lock:
            self._live.add(job.token)
        self._ready.put(job)

    def stop_job(self, token: str) -> None:
        if self._ready.remove(token):
            self._answer(Stopped(token))
            return
        with self._lock:
            if token not in self._live:
                return  # answered already; the answer is on its way
            self._stopped.add(token)
        for slot in self._slots:
            slot.cancel(token)

    def publish(self, token: str, entries: tuple[OutputEntry, ...]) -> None:
        self._publisher.publish(token, entries)

    def delete_stages(self, token: str, entries: tuple[OutputEntry, ...]) -> None:
        self._publisher.delete_stages(token, entries)

    def list_stages(self) -> None:
        self._publisher.list_stages()

    def forget_plugins(self) -> None:
        for slot in self._slots:
            slot.forget_plugins()

    def start_trial(self, trial: m.Trial) -> None:
        self._trials.start(trial)

    def close(self) -> None:
        """Stop all work and end every thread and process; waits for that."""
        self._ready.close()
        self._runtime.stop_waiting()
        self._trials.close()
        for slot in self._slots:
            slot.close()
        for slot in self._slots:
            slot.join(CLOSE_S)
        self._stagers.close(CLOSE_S)
        self._publisher.close()
        self._runtime.close()

    # -- asked by the slots ---------------------------------------------------------------------

    def source(self, bay: int, job: StartJob) -> Source | m.Conclude:
        dispatch = job.dispatch
        path = text_to_path(dispatch.file_path)
        size = dispatch.signature[2]
        try:
            return self._runtime.source(
                bay, path=path, content_hash=dispatch.content_hash, size=size
            )
        except SourceError as error:
            return failure(job.token, error.reason, described(error))

    def host(self, bay: int, plugin: m.Plugin) -> Host:
        return self._runtime.host(plugin, bay)

    def outputs(self, job: StartJob) -> JobOutputs:
        dispatch, plugin = job.dispatch, job.plugin
        run = JobRun(
            job.token,
            dispatch.file_version_id,
            dispatch.location_id,
            plugin.plugin_name,
            plugin.artifact_hash,
            plugin.parameters_hash,
            dispatch.order_no,
        )
        lineage = Lineage(
            dispatch.content_hash,
            global_job_id(job.token),
            rfc3339(self._clock.now().wall_us),
            plugin.plugin_version,
        )
        sinks = plugin.sinks if dispatch.sinks is None else dispatch.sinks
        if dispatch.rehearsal is None:
            return JobOutputs(run, lineage, sinks, self._sinks.get)
        return RehearsedOutputs(run, lineage, sinks, dispatch.rehearsal)

    def is_stopped(self, token: str) -> bool:
        return token in self._stopped

    def began(self, token: str) -> None:
        with self._lock:
            self._counts["executions"] += 1
        self._post(Began(token))

    def refused(self, token: str, conclusion: m.Conclude) -> None:
        self._conclude(token, conclusion)

    def ended(self, flight: Flight, conclusion: m.Conclude) -> None:
        self._stagers.submit(partial(self._throw_away, flight, conclusion))

    def finished(self, flight: Flight, log_tail: str) -> None:
        self._stagers.submit(partial(self._stage, flight, log_tail))

    # -- in the stagers' threads ----------------------------------------------------------------

    def _stage(self, flight: Flight, log_tail: str) -> None:
        """Make what the plugin published durable, and say so."""
        token = flight.job.token
        try:
            flight.source.verify()
            entries = flight.outputs.finish()
        except SourceError as error:
            self._throw_away(flight, failure(token, error.reason, described(error), log=log_tail))
            return
        except (CasparianError, OutputRefusedError) as error:
            self._throw_away(flight, failure_of(token, error, log_tail))
            return
        except Exception as error:
            log.exception("staging %s failed", token)
            self._throw_away(flight, failure_of(token, error, log_tail))
            return
        flight.source.close()
        conclusion = conclusion_of(token, entries, log_tail)
        conclusion.report = flight.outputs.report()
        staged = entries and flight.job.dispatch.rehearsal is None
        self._answer(Staged(token, entries, conclusion) if staged else Ended(token, conclusion))

    def _throw_away(self, flight: Flight, conclusion: m.Conclude) -> None:
        """Leave nothing of a failed attempt, then say how it ended."""
        flight.source.close()
        try:
            flight.outputs.abort()
        except (CasparianError, OSError) as error:
            # They are reported as left-over stages later.
            log.warning("stages of %s were not deleted: %s", conclusion.token, error)
        except Exception:  # whatever a sink's library raises, the attempt is answered
            log.exception("stages of %s were not deleted", conclusion.token)
        self._conclude(flight.job.token, conclusion)

    def _conclude(self, token: str, conclusion: m.Conclude) -> None:
        if conclusion.reason == Reason.TIMEOUT:
            with self._lock:
                self._counts["timeouts"] += 1
        if conclusion.reason == Reason.CANCELLED and self.is_stopped(token):
            self._answer(Stopped(token))
        else:
            self._answer(Ended(token, conclusion))

    def _answer(self, event: Staged | Ended | Stopped) -> None:
        with self._lock:
            self._live.discard(event.token)
            self._stopped.discard(event.token)
        self._post(event)
