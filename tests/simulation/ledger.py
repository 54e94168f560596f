"""A ledger that lives as long as the run: what is in it is durable by definition."""

from collections.abc import Sequence
from copy import copy

from casparian_flow.domain.errors import LedgerUnavailableError, require
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import JobId
from casparian_flow.domain.jobs import KIND_STATUS, TERMINAL, JobStatus, JournalKind
from casparian_flow.domain.outputs import OutputEntry, SinkMode
from casparian_flow.domain.records import (
    BatchItem,
    GrantOutcome,
    Health,
    HealthRecord,
    Job,
    LedgerState,
    NewJob,
    PluginSpec,
    Record,
)


class SimLedger:
    def __init__(self) -> None:
        self.full = False
        self._epoch = 0
        self._jobs: dict[int, Job] = {}
        self._histories: dict[int, list[Record]] = {}
        self._once: dict[tuple[int, int], int] = {}
        self._keys: dict[str, int] = {}
        self._slices: dict[str, tuple[int, int, int]] = {}
        self.replaced: dict[str, list[tuple[int, int, int]]] = {}
        """Slice → the order numbers granted in it, as they were granted."""
        self._manifests: dict[int, tuple[OutputEntry, ...]] = {}
        self._granted: dict[int, str] = {}
        self._dead: set[int] = set()
        self._health: dict[str, Health] = {}
        self._specs: dict[str, PluginSpec] = {}

    # -- what the core asks -----------------------------------------------------------------

    def recover(self) -> None:
        if self.full:
            raise LedgerUnavailableError("no space left on device")

    def begin_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def load(self, page: int) -> LedgerState:
        active = [copy(j) for j in self._jobs.values() if j.status not in TERMINAL | _WAITING]
        queued, more = self.hydrate((1 << 40, 0), page)
        return LedgerState(
            ledger_id="1edeadbe",
            epoch=self._epoch,
            next_job_id=len(self._jobs) + 1,
            active=active,
            queued=queued,
            more_queued=more,
            plugins=list(self._specs.values()),
            health=[copy(h) for h in self._health.values()],
            counts={},
        )

    def hydrate(self, after: tuple[int, int], limit: int) -> tuple[list[Job], bool]:
        limit = min(limit, 5)  # small pages, so that hydration is met often
        rank = (-after[0], after[1])
        queued = sorted(
            (j for j in self._jobs.values() if j.status is JobStatus.QUEUED),
            key=lambda j: (-j.priority, j.job_id),
        )
        rest = [j for j in queued if (-j.priority, j.job_id) > rank]
        return [copy(j) for j in rest[:limit]], len(rest) > limit

    def commit(self, batch: Sequence[BatchItem]) -> list[GrantOutcome]:
        outcomes = []
        for item in batch:
            match item:
                case Record(kind=JournalKind.GRANTED):
                    outcomes.append(self._grant(item))
                case Record():
                    self._apply(item)
                case HealthRecord(health):
                    self._health[health.plugin] = copy(health)
                case NewJob(job):
                    self._add(job)
        return outcomes

    def _grant(self, record: Record) -> GrantOutcome:
        job = self._jobs[record.job_id]
        refused = ""
        for entry in record.manifest:
            if entry.output_key in self._keys:
                refused = refused or Reason.DUPLICATE_OUTPUT
            elif entry.mode is SinkMode.REPLACE:
                newest = self._slices.get(entry.slice_key)
                if newest is not None and newest > tuple(entry.order_no):
                    refused = Reason.SUPERSEDED
        if not refused:
            for entry in record.manifest:
                self._keys[entry.output_key] = record.job_id
                if entry.mode is SinkMode.REPLACE:
                    self.replaced.setdefault(entry.slice_key, []).append(entry.order_no)
                self._slices[entry.slice_key] = entry.order_no
            self._manifests[record.job_id] = tuple(record.manifest)
            self._granted[record.job_id] = job.token
            self._apply(record)
            job.manifest = tuple(record.manifest)
        return GrantOutcome(job.job_id, job.token, refused)

    def _apply(self, record: Record) -> None:
        job = self._jobs[record.job_id]
        self._histories[record.job_id].append(record)
        job.status = KIND_STATUS[record.kind]
        data = record.data or {}
        if record.kind is JournalKind.LEASED:
            job.attempt, job.token, job.owner = record.attempt, data["token"], data["owner"]
            job.manifest_id = data["manifest_id"]
        elif record.kind is JournalKind.RETRIED:
            job.retry_count, job.not_before_us = data["retry_count"], data["not_before_us"]
        elif record.kind is JournalKind.FAILED:
            require("dead_letter" in data, "a failure says why")
            self._dead.add(record.job_id)

    # -- what Scout and the Architect ask ---------------------------------------------------

    def enqueue_once(self, job: Job) -> tuple[int, Job | None]:
        """(job id, the job if this call made it): the same scan twice makes one job."""
        once = (job.version_id, job.retry_of or 0)
        known = self._once.get(once)
        if known is not None:
            return known, None
        new = copy(job)
        new.job_id = JobId(len(self._jobs) + 1)
        self._once[once] = new.job_id
        self._add(new)
        return new.job_id, copy(new)

    def _add(self, job: Job) -> None:
        self._jobs[job.job_id] = copy(job)
        self._histories[job.job_id] = []

    def deploy(self, spec: PluginSpec) -> list[PluginSpec]:
        self._specs[spec.plugin] = spec
        return list(self._specs.values())

    # -- what the judges read ---------------------------------------------------------------

    def free_space(self) -> None:
        self.full = False

    def spec(self, plugin: str) -> PluginSpec:
        return self._specs[plugin]

    def job(self, job_id: int) -> Job:
        return self._jobs[job_id]

    def statuses(self) -> dict[int, JobStatus]:
        return {job_id: job.status for job_id, job in self._jobs.items()}

    def histories(self) -> dict[int, list[Record]]:
        return self._histories

    def granted(self, job_id: int) -> str | None:
        return self._granted.get(job_id)

    def manifest(self, job_id: int) -> tuple[OutputEntry, ...]:
        return self._manifests.get(job_id, ())

    def dead_letter_jobs(self) -> set[int]:
        return self._dead

    def last_reason(self, job_id: int) -> str:
        history = self._histories[job_id]
        return str((history[-1].data or {}).get("reason", "")) if history else ""


_WAITING = frozenset({JobStatus.QUEUED, JobStatus.PENDING})
