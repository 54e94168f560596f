"""The ledger's in-memory twin, as long-lived as the run: what is in it is durable by definition."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from casparian_flow.db.memory import MemoryLedger
from casparian_flow.domain.errors import LedgerUnavailableError
from casparian_flow.domain.ids import JobId
from casparian_flow.domain.jobs import JobStatus, JournalKind
from casparian_flow.domain.outputs import OutputEntry, SinkMode
from casparian_flow.domain.records import BatchItem, GrantOutcome, Job, NewJob, PluginSpec, Record

PAGE = 5
"""Small pages of the queue, so that hydration is met often."""


class SimLedger(MemoryLedger):
    """Adds what Scout and the Architect ask, a disk that fills up, and the judges' view."""

    def __init__(self) -> None:
        super().__init__("1edeadbe")
        self.granted: dict[int, str] = {}
        """Job → the token it was granted under."""
        self.manifests: dict[int, tuple[OutputEntry, ...]] = {}
        self.replaced: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        """Slice → the order numbers granted in it, as they were granted."""
        self._once: dict[tuple[int, int], int] = {}

    @property
    def full(self) -> bool:
        return self.failing is not None

    def fill_disk(self) -> None:
        self.failing = LedgerUnavailableError("no space left on device")

    def free_space(self) -> None:
        self.failing = None

    def hydrate(self, after: tuple[int, int], limit: int) -> tuple[list[Job], bool]:
        return super().hydrate(after, min(limit, PAGE))

    def commit(self, batch: Sequence[BatchItem]) -> list[GrantOutcome]:
        outcomes = super().commit(batch)
        refused = {outcome.job_id for outcome in outcomes if outcome.refused}
        for item in batch:
            granted = isinstance(item, Record) and item.kind is JournalKind.GRANTED
            if granted and item.job_id not in refused:
                self._note_grant(item)
        return outcomes

    def _note_grant(self, record: Record) -> None:
        self.granted[record.job_id] = self.job(record.job_id).token
        self.manifests[record.job_id] = record.manifest
        for entry in record.manifest:
            if entry.mode is SinkMode.REPLACE:
                self.replaced[entry.slice_key].append(entry.order_no)

    # -- what Scout and the Architect ask ---------------------------------------------------

    def enqueue_once(self, job: Job) -> tuple[int, Job | None]:
        """(job id, the job if this call made it): the same scan twice makes one job."""
        once = (job.version_id, job.retry_of or 0)
        known = self._once.get(once)
        if known is not None:
            return known, None
        new = replace(job, job_id=JobId(len(self._jobs) + 1))
        self._once[once] = new.job_id
        self.commit([NewJob(new)])
        return new.job_id, replace(new)

    def deploy(self, spec: PluginSpec) -> list[PluginSpec]:
        self.plugins = [p for p in self.plugins if p.plugin != spec.plugin] + [spec]
        return list(self.plugins)

    # -- what the judges read ---------------------------------------------------------------

    def spec(self, plugin: str) -> PluginSpec:
        return next(p for p in self.plugins if p.plugin == plugin)

    def job(self, job_id: int) -> Job:
        return self._jobs[job_id]

    def statuses(self) -> dict[int, JobStatus]:
        return {job_id: job.status for job_id, job in self._jobs.items()}

    def histories(self) -> dict[int, list[Record]]:
        histories: dict[int, list[Record]] = {job_id: [] for job_id in self._jobs}
        for record in self.journal:
            histories[record.job_id].append(record)
        return histories

    def dead_letter_jobs(self) -> set[int]:
        return {letter["original_job_id"] for letter in self.dead_letters}

    def last_reasons(self) -> dict[int, str]:
        """Job → the reason in its last journal entry, "" if there is none."""
        return {r.job_id: str((r.data or {}).get("reason", "")) for r in self.journal}
