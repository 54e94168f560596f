"""Deliberate bugs. Each breaks one rule of the design; the judges must notice every one of them."""

from collections.abc import Sequence
from typing import Any

from simulation.ledger import SimLedger
from simulation.parts import SimWorker
from simulation.run import Parts
from simulation.world import Stored

from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import Identity
from casparian_flow.domain.jobs import JobStatus, JournalKind
from casparian_flow.domain.outputs import OutputEntry
from casparian_flow.domain.records import BatchItem, GrantOutcome, Job
from casparian_flow.domain.retry import RetryPolicy
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.broker import Broker, BrokerConfig
from casparian_worker import worker_events as w
from casparian_worker.worker_state import WorkerState


class TokenNotChecked(Broker):
    """Any attempt's word counts for the current one."""

    def _current(self, token: str) -> Job | None:
        parts = token.split("-")
        job = self.jobs.get(int(parts[2]))  # type: ignore[call-overload]
        return job if job is not None and job.job_id in self.leases else None


class GrantsStaleStages(Broker):
    """A stage that comes too late is granted as well."""

    def _send(self, identity: Identity, job_id: int, message: m.Message) -> None:
        if isinstance(message, m.Refuse) and message.reason == Reason.STALE_TOKEN:
            message = m.Grant(message.token)
        super()._send(identity, job_id, message)


class GrantsBeforeCommit(Broker):
    """GRANT is sent before the ledger has answered."""

    def _stage(self, identity: Identity, header: int, message: m.Stage, now: Any) -> None:
        super()._stage(identity, header, message, now)
        if self._current(message.token) is not None:
            self._send_now(identity, header, m.Grant(message.token))


class AcknowledgesWithoutRecording(Broker):
    """A conclusion is acknowledged and then forgotten."""

    def _conclude(self, identity: Identity, header: int, message: m.Conclude, now: Any) -> None:
        self._send(identity, header, m.ConcludeAck([message.token]))


class CancelsGranted(Broker):
    """A granted job can still be cancelled."""

    def _cancel(self, event: e.Cancel, now: Any) -> None:
        job = self.jobs.get(event.job_id)
        if job is not None and job.status is JobStatus.STAGED:
            self._reply(event.reply, outcome="cancelled", status=JobStatus.ABORTED)
            return
        super()._cancel(event, now)


class AnswersCancelBeforeCommit(Broker):
    """ "Cancelled" is answered at once, and the ledger hears of it never."""

    def _cancel(self, event: e.Cancel, now: Any) -> None:
        job = self.jobs.get(event.job_id)
        if job is not None and job.status is JobStatus.RUNNING:
            self._reply(event.reply, outcome="cancelled", status=JobStatus.ABORTED)
            return
        super()._cancel(event, now)


class NoLeaseExpiry(Broker):
    """A silent worker keeps its jobs for ever."""

    def _tick(self, _: e.Tick, now: Any) -> None:
        pass


class NoRecovery(Broker):
    """A granted job whose worker is gone is left lying."""

    def _recover(self, now: Any) -> None:
        pass


class ForgetsGarbageRule(Broker):
    """Every stage that is listed may go, the granted ones too."""

    def _stages(self, identity: Identity, _: int, message: m.Stages, now: Any) -> None:
        self._send(identity, 0, m.Discard(list(message.tokens)))


class RetriesForEver(Broker):
    def __init__(self, config: BrokerConfig, rng: Any) -> None:
        super().__init__(BrokerConfig(retry=RetryPolicy(max_retries=10)), rng)


class NoDeadLetter(Broker):
    """A failed job leaves no dead letter."""

    def _dead_letter(self, job: Job, reason: Reason, message: str, now: Any, **more: Any) -> None:
        self._record(job, JournalKind.SKIPPED, now, {"reason": reason})
        self._drop(job)


class PublishesWithoutGrant(WorkerState):
    """Outputs are published as soon as they are staged."""

    def handle(self, event: w.Event, now: Any) -> list[w.Instruction]:
        out = super().handle(event, now)
        if isinstance(event, w.Staged):
            out.append(w.PublishOutputs(event.token, event.entries))
        return out


class ConcludesBeforePublishing(WorkerState):
    """Success is said when the grant arrives, not when the outputs are in place."""

    def _grant(self, job_id: int, grant: m.Grant, mono: float) -> None:
        super()._grant(job_id, grant, mono)
        self._published(w.Published(grant.token), mono)


class DropsGrantedOnAbort(WorkerState):
    """Any word of the Sentinel's about a stale token deletes the stages, granted or not."""

    def _heartbeat(self, job_id: int, heartbeat: m.Heartbeat, mono: float) -> None:
        for attempt in list(self.attempts.values()):
            if attempt.phase == "PUBLISHING":
                self._out.append(w.DeleteStages(attempt.token))


class SaysItOnce(WorkerState):
    """Nothing is repeated."""

    def _repeat_unanswered(self, mono: float) -> None:
        pass

    def _say_again(self, mono: float) -> None:
        pass


class KeysNotReserved(SimLedger):
    """Two jobs may be granted the same output."""

    def commit(self, batch: Sequence[BatchItem]) -> list[GrantOutcome]:
        self._taken.clear()
        return super().commit(batch)


class OldReplacesNew(SimLedger):
    """A late job for an old version is granted after a newer one."""

    def commit(self, batch: Sequence[BatchItem]) -> list[GrantOutcome]:
        self._heads.clear()
        return super().commit(batch)


class LosesHalfABatch(SimLedger):
    """A commit is acknowledged of which a part was never written."""

    def commit(self, batch: Sequence[BatchItem]) -> list[GrantOutcome]:
        kept = batch[: len(batch) // 2] if len(batch) > 3 else batch
        return super().commit(kept)


class DoesNotCheckSource(SimWorker):
    """The plugin reads whatever is at the path now."""

    def _begin(self, task: Any) -> None:
        dispatch = task.start.dispatch
        dispatch.content_hash = self._disk.current[dispatch.location_id]
        super()._begin(task)


class Overwrites(SimWorker):
    """Publishing replaces what is there, as a plain rename would, without asking for a grant."""

    def _link(self, token: str, entry: OutputEntry) -> str:
        stage = self.store.stages.get((token, entry.n))
        content = stage.content if stage else ("", entry.topic, 0)
        self.store.finals[entry.final] = Stored(token, content)
        return ""


MUTANTS: dict[str, Parts] = {
    **{
        broker.__name__: Parts(broker=broker)
        for broker in (
            TokenNotChecked,
            GrantsStaleStages,
            GrantsBeforeCommit,
            AcknowledgesWithoutRecording,
            CancelsGranted,
            AnswersCancelBeforeCommit,
            NoLeaseExpiry,
            NoRecovery,
            ForgetsGarbageRule,
            RetriesForEver,
            NoDeadLetter,
        )
    },
    **{
        worker.__name__: Parts(worker=worker)
        for worker in (
            PublishesWithoutGrant,
            ConcludesBeforePublishing,
            DropsGrantedOnAbort,
            SaysItOnce,
        )
    },
    **{
        ledger.__name__: Parts(ledger=ledger)
        for ledger in (KeysNotReserved, OldReplacesNew, LosesHalfABatch)
    },
    **{
        worker.__name__: Parts(simulated_worker=worker)
        for worker in (DoesNotCheckSource, Overwrites)
    },
}
