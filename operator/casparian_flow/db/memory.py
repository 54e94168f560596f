"""The ledger's in-memory twin: what the broker's side of a Ledger does, in plain Python.

For simulations and unit tests. tests/contract runs one suite over both.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from casparian_flow.db.grants import SliceHead, advance, judge
from casparian_flow.db.guard import StatusMap
from casparian_flow.db.journal import Folded, describe, encode_data
from casparian_flow.domain.errors import LedgerUnavailableError
from casparian_flow.domain.ids import Token
from casparian_flow.domain.jobs import KIND_STATUS, LEASED, JobStatus, JournalKind
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


class MemoryLedger:
    """Holds jobs as the ledger would; every method behaves as the Ledger's of that name.

    Attributes:
        failing: set to make the next commits fail with this error and change nothing.
        plugins: what `load` gives back; changed at will.
        journal, logs, dead_letters: everything committed, in order, for tests to look at.
    """

    def __init__(self, ledger_id: str = "00000000") -> None:
        self.ledger_id = ledger_id
        self.epoch = 0
        self.failing: LedgerUnavailableError | None = None
        self.plugins: list[PluginSpec] = []
        self.journal: list[Record] = []
        self.logs: list[tuple[int, int, str]] = []
        self.dead_letters: list[dict[str, Any]] = []
        self._jobs: dict[int, Job] = {}
        self._health: dict[str, Health] = {}
        self._statuses = StatusMap()
        self._taken: set[str] = set()
        self._heads: dict[str, SliceHead] = {}

    def add_jobs(self, jobs: Sequence[Job]) -> None:
        """Jobs as a scan's transaction would have made them."""
        for job in jobs:
            self._statuses.add(job.job_id, job.status)
            self._jobs[job.job_id] = replace(job)
        self._statuses.commit()

    def begin_epoch(self) -> int:
        self._fail_if_told()
        self.epoch += 1
        return self.epoch

    def recover(self) -> None:
        self._fail_if_told()

    def load(self, page: int) -> LedgerState:
        queued = self._queued()
        counts = dict.fromkeys(JobStatus, 0)
        for job in self._jobs.values():
            counts[job.status] += 1
        live = LEASED | {JobStatus.STAGED}
        active = sorted(
            (job for job in self._jobs.values() if job.status in live),
            key=lambda job: (-job.priority, job.job_id),
        )
        return LedgerState(
            ledger_id=self.ledger_id,
            epoch=self.epoch,
            next_job_id=max(self._jobs, default=0) + 1,
            active=[replace(job) for job in active],
            queued=[replace(job) for job in queued[:page]],
            more_queued=len(queued) > page,
            plugins=list(self.plugins),
            health=[replace(self._health[name]) for name in sorted(self._health)],
            counts=counts,
        )

    def hydrate(self, after: tuple[int, int], limit: int) -> tuple[list[Job], bool]:
        priority, job_id = after
        rest = [job for job in self._queued() if (-job.priority, job.job_id) > (-priority, job_id)]
        return [replace(job) for job in rest[:limit]], len(rest) > limit

    def commit(self, batch: Sequence[BatchItem]) -> list[GrantOutcome]:
        self._fail_if_told()
        taken, heads = set(self._taken), dict(self._heads)
        tokens: dict[int, Token] = {}
        outcomes: list[GrantOutcome] = []
        accepted: list[BatchItem] = []
        try:
            for item in batch:
                if isinstance(item, NewJob):
                    self._statuses.add(item.job.job_id, item.job.status)
                elif isinstance(item, Record) and not self._check(
                    item, tokens, taken, heads, outcomes
                ):
                    continue
                accepted.append(item)
        except BaseException:
            self._statuses.rollback()
            raise
        self._statuses.commit()
        self._taken, self._heads = taken, heads
        for item in accepted:
            self._apply(item)
        return outcomes

    def status_of(self, job_id: int) -> JobStatus | None:
        return self._statuses.get(job_id)

    def history(self, job_id: int) -> list[str]:
        """One line per journal entry of the job."""
        return [
            describe(seq, r.kind, r.attempt, r.at_us, encode_data(r.data))
            for seq, r in enumerate(self.journal, 1)
            if r.job_id == job_id
        ]

    # -- inside ---------------------------------------------------------------------------------

    def _check(
        self,
        record: Record,
        tokens: dict[int, Token],
        taken: set[str],
        heads: dict[str, SliceHead],
        outcomes: list[GrantOutcome],
    ) -> bool:
        """Judge and move one record; False if it is a refused grant."""
        job_id = record.job_id
        if record.kind is JournalKind.LEASED:
            tokens[job_id] = Token((record.data or {}).get("token", ""))
        if record.kind is JournalKind.GRANTED:
            job = self._jobs.get(job_id)
            token = tokens.get(job_id, job.token if job else Token(""))
            outcome = judge(record, token, taken, heads, self._is_staged)
            outcomes.append(outcome)
            if outcome.refused:
                return False
            advance(record, taken, heads)
        if record.kind is JournalKind.FAILED and self._is_staged(job_id):
            for key in [key for key, head in heads.items() if head.job_id == job_id]:
                del heads[key]
        self._statuses.move(job_id, KIND_STATUS[record.kind], self.history)
        return True

    def _is_staged(self, job_id: int) -> bool:
        return self._statuses.get(job_id) is JobStatus.STAGED

    def _apply(self, item: BatchItem) -> None:
        if isinstance(item, NewJob):
            self._jobs[item.job.job_id] = replace(item.job)
            for letter in self.dead_letters:
                if letter["original_job_id"] == item.job.retry_of:
                    letter["replayed_as"] = item.job.job_id
        elif isinstance(item, HealthRecord):
            self._health[item.health.plugin] = replace(item.health)
        else:
            self._apply_record(item)

    def _apply_record(self, record: Record) -> None:
        job = self._jobs[record.job_id]
        folded = Folded(record.job_id, job.status, job.status)
        folded.apply(record.kind, record.attempt, record.at_us, record.data)
        job.status, job.attempt = folded.status, folded.attempt
        if folded.lease_set:
            job.token, job.owner = Token(folded.lease_token or ""), folded.lease_owner or ""
        if folded.scheduled_us is not None:
            job.not_before_us = folded.scheduled_us
        if folded.retry_count is not None:
            job.retry_count = folded.retry_count
        if folded.plugin_manifest_id is not None:
            job.manifest_id = type(job.manifest_id)(folded.plugin_manifest_id)
        job.manifest = record.manifest if job.status is JobStatus.STAGED else ()
        self.journal.append(record)
        if record.log:
            self.logs.append((record.job_id, record.attempt, record.log))
        if record.kind is JournalKind.FAILED and (record.data or {}).get("dead_letter"):
            self.dead_letters.append(
                {
                    "original_job_id": int(record.job_id),
                    "plugin_name": job.plugin,
                    "reason": str((record.data or {}).get("reason", "")),
                    "replayed_as": None,
                }
            )

    def _queued(self) -> list[Job]:
        return sorted(
            (job for job in self._jobs.values() if job.status is JobStatus.QUEUED),
            key=lambda job: (-job.priority, job.job_id),
        )

    def _fail_if_told(self) -> None:
        if self.failing is not None:
            raise self.failing
