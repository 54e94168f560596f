"""Tries new plugin versions: in the sandbox and environment of jobs, writing to no sink.

One at a time, in a thread and a bay of its own, so that a trial never waits for the slots' jobs.
A version without samples is loaded and configured. With samples it runs over each of them, and
its rows are checked against the contracts of its topics, then forgotten.
"""

import logging
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Protocol

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, OutputRefusedError
from casparian_flow.domain.failures import RULES, Reason
from casparian_flow.domain.outputs import OutputEntry, OutputKind
from casparian_flow.domain.records import Sample
from casparian_flow.domain.wiring import TrialOutcome
from casparian_flow.protocol import messages as m
from casparian_flow.trust.bundle import check_samples
from casparian_flow.trust.errors import BundleError
from casparian_worker.conclusions import described
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.lineage import Lineage, rfc3339
from casparian_worker.mailbox import Mailbox
from casparian_worker.plugin_events import Batch, Failed, Finished, LaunchError, RunRequest
from casparian_worker.pool import Pool
from casparian_worker.rehearsal import RehearsedOutputs
from casparian_worker.sinks.base import JobRun
from casparian_worker.slot import Host, Source
from casparian_worker.source import SourceError
from casparian_worker.worker_events import TrialNews

log = logging.getLogger(__name__)

SAMPLE_TIMEOUT_S = 60.0
"""For one sample, where the plugin's own limit is not shorter; samples are small."""
WAIT_S = 0.5
CLOSE_S = 10.0
BLAMELESS = frozenset(
    {
        Reason.DISK_FULL,
        Reason.WORKER_ERROR,
        Reason.DRAINING,
        Reason.SOURCE_UNREADABLE,
        Reason.UNTRUSTED,
        Reason.UNTRUSTED,  # the Sentinel trusts it, so this worker's rules are others
    }
)
"""What speaks against the worker and not against the version."""


class TrialRuntime(Protocol):
    """What a trial needs of the runtime (runtime.PluginRuntime)."""

    def host(
        self, plugin: m.Plugin, slot: int, progress: Callable[[str], None] | None = None
    ) -> Host: ...

    def sample(self, slot: int, sample: Sample) -> Source: ...


class TrialRoom:
    """See the module's text. Calls return at once; answers go to the mailbox.

    Args:
        bay: number of scratch folders that no slot uses.
    """

    def __init__(self, runtime: TrialRuntime, bay: int, mailbox: Mailbox, clock: Clock) -> None:
        self._runtime = runtime
        self._bay = bay
        self._mailbox = mailbox
        self._clock = clock
        self._pool = Pool(1, "trial")
        self._lock = Lock()
        self._host: Host | None = None
        self._closing = False

    def start(self, trial: m.Trial) -> None:
        self._pool.submit(partial(self._run, trial))

    def close(self) -> None:
        """Stop the trial under way; the Sentinel gives it to another worker."""
        with self._lock:
            self._closing = True
            host = self._host
        if host is not None:
            host.stop()
        self._pool.close(CLOSE_S)

    # -- in the trial's thread ------------------------------------------------------------------

    def _run(self, trial: m.Trial) -> None:
        if self._closing:
            return
        try:
            check_samples(trial.samples, trial.plugin.manifest_json)
            result = self._tried(trial)
        except BundleError as error:
            result = _bad(trial, Reason.UNTRUSTED, described(error))
        except (LaunchError, SourceError) as error:
            transient = error.transient if isinstance(error, LaunchError) else None
            result = _bad(trial, error.reason, described(error), transient)
        except OutputRefusedError as error:
            result = _bad(trial, Reason(error.reason), described(error), False)
        except CasparianError as error:
            result = _bad(trial, Reason.WORKER_ERROR, described(error))
        except Exception as error:  # the room outlives a bug; the trial is answered
            log.exception("the trial of %s failed", trial.plugin.plugin_name)
            result = _bad(trial, Reason.WORKER_ERROR, described(error))
        self._mailbox.post(TrialNews(result))

    def _tried(self, trial: m.Trial) -> m.TrialResult:
        host = self._runtime.host(trial.plugin, self._bay, partial(self._report, trial))
        with self._lock:
            self._host = host
        try:
            rows: dict[str, int] = {}
            log_tail = ""
            for sample in trial.samples or (None,):
                ended, found = self._run_once(host, trial, sample)
                if isinstance(ended, Failed):
                    where = f"sample {sample.name}: " if sample else ""
                    told = _bad(trial, ended.reason, where + ended.message, ended.transient)
                    told.log = ended.log_tail
                    return told
                log_tail += ended.log_tail
                for topic, count in found.items():
                    rows[topic] = rows.get(topic, 0) + count
            return m.TrialResult(trial.trial_id, TrialOutcome.PASSED, rows=rows, log=log_tail)
        finally:
            with self._lock:
                self._host = None
            host.stop()

    def _run_once(
        self, host: Host, trial: m.Trial, sample: Sample | None
    ) -> tuple[Finished | Failed, dict[str, int]]:
        """Load the plugin and run it over one sample, if there is one."""
        if sample is None:
            host.submit(RunRequest(trial.trial_id, ""))
            return self._follow(host, trial, None), {}
        source = self._runtime.sample(self._bay, sample)
        try:
            outputs = self._outputs(trial.plugin)
            told = {"content_hash": "", "source_path": sample.name}
            limit = min(SAMPLE_TIMEOUT_S, trial.plugin.limits.timeout_s)
            host.submit(RunRequest(trial.trial_id, source.path, metadata=told, timeout_s=limit))
            ended = self._follow(host, trial, outputs)
            rows = _rows(outputs.finish()) if isinstance(ended, Finished) else {}
            return ended, rows
        except OutputRefusedError as error:
            return Failed(
                trial.trial_id, Reason(error.reason), described(error), transient=False
            ), {}
        finally:
            source.close()

    def _follow(self, host: Host, trial: m.Trial, outputs: JobOutputs | None) -> Finished | Failed:
        while True:
            event = host.next_event(WAIT_S)
            match event:
                case Finished() | Failed():
                    return event
                case Batch() if outputs is not None:
                    outputs.write(event.topic, event.batch)
                case None if self._closing:
                    return Failed(trial.trial_id, Reason.DRAINING, "the worker stops")

    def _outputs(self, plugin: m.Plugin) -> JobOutputs:
        run = JobRun(
            "", 0, 0, plugin.plugin_name, plugin.artifact_hash, plugin.parameters_hash, (0, 0, 0)
        )
        now = rfc3339(self._clock.now().wall_us)
        lineage = Lineage("", "trial", now, plugin.plugin_version)
        return RehearsedOutputs(run, lineage, plugin.sinks, 0)

    def _report(self, trial: m.Trial, progress: str) -> None:
        running = m.TrialResult(trial.trial_id, TrialOutcome.RUNNING, message=progress)
        self._mailbox.post(TrialNews(running))


def _rows(entries: tuple[OutputEntry, ...]) -> dict[str, int]:
    """Rows of each topic; a topic with several sinks counts once."""
    rows: dict[str, int] = {}
    for entry in entries:
        if entry.kind is OutputKind.OUTPUT or entry.rows:
            rows[entry.topic] = max(rows.get(entry.topic, 0), entry.rows)
    return rows


def _bad(
    trial: m.Trial, reason: Reason, message: str, transient: bool | None = None
) -> m.TrialResult:
    """A trial that was not passed: the version's fault, unless what failed is the worker's."""
    passing = transient if transient is not None else RULES[reason].transient
    blameless = reason in BLAMELESS or (reason is Reason.ENVIRONMENT and passing)
    outcome = TrialOutcome.AGAIN if blameless else TrialOutcome.FAILED
    return m.TrialResult(trial.trial_id, outcome, reason, message)
