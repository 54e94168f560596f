"""The worker's decisions, apart from its sockets, threads and files.

Rule 1: everything that decides what a worker does with an attempt is in this file. The shell
(wire.py) feeds it events with a clock reading and carries out the instructions it returns.

Each DISPATCH is one attempt, named by its fencing token; each attempt is in one phase:

                  StartJob         Began            Staged            GRANT             Published
    DISPATCH --> QUEUED --> STARTED --> RUNNING --> STAGED --> PUBLISHING --> CONCLUDING --> gone
                   |           |          |  |        |    ^        |  ^           ^    CONCLUDE_ACK
                   |           |          |  +-Ended--+----|--------|--|-----------+
                   |           +--StopJob-+           |    +-RECOVER+  +-- transient failure,
                   |               |                  |                    again after a while
                   |            STOPPING --Stopped--> gone (aborted, replaced)
                   |                                  or CONCLUDING (given back)
                   +-- given back --> CONCLUDING      +-- REFUSE, ABORT --> DeleteStages, gone

    phase        waits for                     repeated every second   ABORT            counts as
    QUEUED       a free place at the runner                            gone             credit
    STARTED      the plugin to begin                                   StopJob          credit
    RUNNING      the plugin to end                                     StopJob          credit
    STOPPING     the runner to let go                                  stays            credit
    STAGED       GRANT or REFUSE               STAGE                   DeleteStages     credit
    PUBLISHING   the sinks                                             granted: too late
    CONCLUDING   CONCLUDE_ACK                  CONCLUDE                gone

An attempt ends only by the Sentinel's word or the runner's; losing contact changes nothing, as
only the Sentinel knows whether the lease still stands. Once granted, stages are not deleted here
unless an operator has abandoned the job: another worker may publish them, and DISCARD says when
they are garbage.

Standard library only; no clock, no threads, no I/O; equal events give equal instructions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from casparian_flow.domain.clock import Now
from casparian_flow.domain.errors import require
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import parse_token
from casparian_flow.domain.jobs import CompletionStatus
from casparian_flow.domain.outputs import OutputEntry, metrics_of, output_roots
from casparian_flow.domain.wiring import TrialOutcome
from casparian_flow.protocol import messages as m
from casparian_worker.worker_events import (
    Began,
    ConnectionRenewed,
    DeleteStages,
    DrainRequested,
    Ended,
    Event,
    Exit,
    ForgetPlugins,
    FromSentinel,
    Instruction,
    ListStages,
    Published,
    PublishFailed,
    PublishOutputs,
    Reconnect,
    Send,
    Staged,
    StageListing,
    StartJob,
    StartTrial,
    StopJob,
    Stopped,
    Tick,
    TrialNews,
    Unsent,
    WorkerConfig,
)

SPECS_MAX = 256
SPEC_BYTES_MAX = 64 * 1024 * 1024
"""Plugin specs kept, by number and by the size of their source and lock; the oldest go first."""
FINISHED_MAX = 8192
"""Jobs whose last attempt is remembered, so that a repeated DISPATCH does not run again."""
STAGES_PER_MESSAGE = 1000
TRIALS_MAX = 16
"""Trials remembered with how they stand; the oldest go first."""
HEARTBEAT_S_RANGE = (0.05, 60.0)
LEASE_TTL_S_RANGE = (0.2, 3600.0)


class Phase(StrEnum):
    QUEUED = "QUEUED"
    STARTED = "STARTED"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    STAGED = "STAGED"
    PUBLISHING = "PUBLISHING"
    CONCLUDING = "CONCLUDING"


AT_RUNNER = frozenset({Phase.STARTED, Phase.RUNNING, Phase.STOPPING})
REPEATED = frozenset({Phase.STAGED, Phase.CONCLUDING})
ON_CREDIT = AT_RUNNER | {Phase.QUEUED, Phase.STAGED}


@dataclass(slots=True)
class Attempt:
    """One attempt held by this worker.

    Attributes:
        since: monotonic time of its arrival.
        dispatch, plugin: None for one taken over by RECOVER.
        entries: its manifest, once staged.
        conclusion: what to say of it, once known.
        return_reason: in STOPPING, why it goes back to the queue; "" if the Sentinel has already
            decided on it.
        publish_due: when to try again to publish, None while the runner is at it.
        abandoned: given up by an operator while the runner publishes it.
    """

    token: str
    job_id: int
    number: int
    phase: Phase
    since: float
    dispatch: m.Dispatch | None = None
    plugin: m.Plugin | None = None
    entries: tuple[OutputEntry, ...] = ()
    conclusion: m.Conclude | None = None
    return_reason: str = ""
    publish_failures: int = 0
    publish_due: float | None = None
    abandoned: bool = False


@dataclass(slots=True)
class Counts:
    """Totals since start, for metrics."""

    received: int = 0
    completed: int = 0
    failed: int = 0
    skipped: int = 0
    rejected: int = 0
    aborted: int = 0
    refused: int = 0
    recovered: int = 0
    resent: int = 0
    unexpected: int = 0


class WorkerState:
    """The pure state machine of one worker process.

    Example:
        >>> from casparian_flow.domain.clock import Now
        >>> state = WorkerState(WorkerConfig("w1", "n1"))
        >>> [type(i).__name__ for i in state.handle(Tick(), Now(0.0, 0))]
        ['Send']
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.counts = Counts()
        self.attempts: dict[str, Attempt] = {}
        self.ledger_id = ""
        self.epoch = 0
        self.batch = False
        """Whether the Sentinel reads BATCH."""
        self.welcomed = False
        self.draining = False
        self.exited = False
        self._heartbeat_s = 5.0
        self._lease_ttl_s = 30.0
        self._by_job: dict[int, str] = {}
        self._queue: dict[str, None] = {}
        self._handed: dict[str, None] = {}
        self._on_credit = 0
        self._repeat: dict[str, float] = {}
        """Token → when to repeat; in order of time, as the interval is constant."""
        self._republish: dict[str, None] = {}
        self._specs: dict[str, m.Plugin] = {}
        self._spec_bytes = 0
        self._finished: dict[int, int] = {}
        self._trials: dict[str, m.TrialResult] = {}
        """By trial id: what was last said of it."""
        self._heard: float | None = None
        self._reconnected = 0.0
        self._identify_due = 0.0
        self._heartbeat_due = 0.0
        self._listing_due: float | None = None
        self._moved = 0.0
        """When a slot last changed hands, or idle ones were given work."""
        self._give_back_due = 0.0
        self._give_back_pause = config.give_back_s
        self._drain_due: float | None = None
        self._out: list[Instruction] = []
        self._on_event: dict[type[Any], Callable[[Any, float], None]] = {
            Began: self._began,
            Staged: self._staged,
            Ended: self._ended,
            Stopped: self._stopped,
            Published: self._published,
            PublishFailed: self._publish_failed,
            StageListing: self._stage_listing,
            TrialNews: self._trial_news,
            ConnectionRenewed: self._connection_renewed,
            Tick: self._tick,
            Unsent: self._unsent,
            DrainRequested: self._drain,
        }
        self._on_message: dict[type[Any], Callable[[int, Any, float], None]] = {
            m.Welcome: self._welcome,
            m.Plugin: self._remember_plugin,
            m.Dispatch: self._dispatch,
            m.Abort: self._abort,
            m.Heartbeat: self._heartbeat,
            m.Grant: self._grant,
            m.Refuse: self._refuse,
            m.ConcludeAck: self._conclude_ack,
            m.Recover: self._recover,
            m.Err: self._err,
            m.Reload: self._reload,
            m.Discard: self._discard,
            m.Trial: self._trial,
        }

    # -- entry ----------------------------------------------------------------------------------

    def handle(self, event: Event, now: Now) -> list[Instruction]:
        """Take in one event; return what is to be done, in order."""
        if self.exited:
            return []
        mono = now.mono
        if self._heard is None:
            self._heard = self._reconnected = mono
            self._identify(mono)
        if isinstance(event, FromSentinel):
            self._heard = mono
            self._from_sentinel(event.job_id, event.message, mono)
        else:
            self._on_event[type(event)](event, mono)
        self._start_queued()
        if self.draining and not self.attempts:
            self._exit()
        out, self._out = self._out, []
        return out

    @property
    def status(self) -> str:
        """IDLE, BUSY or DRAINING, as heartbeats say it."""
        if self.draining:
            return "DRAINING"
        return "BUSY" if self.attempts else "IDLE"

    def held(self) -> list[str]:
        """Tokens of everything this worker still answers for."""
        return [t for t, a in self.attempts.items() if not _is_dropped(a)]

    def silent_s(self, now: Now) -> float:
        """Seconds since the Sentinel was last heard."""
        return 0.0 if self._heard is None else now.mono - self._heard

    @property
    def patience_s(self) -> float:
        """Silence after which the Sentinel is asked whether it is there; it answers heartbeats."""
        return 2.5 * self._heartbeat_s

    # -- messages of the Sentinel ---------------------------------------------------------------

    def _from_sentinel(self, job_id: int, message: m.Message, mono: float) -> None:
        take = self._on_message.get(type(message))
        if take is None:
            self._unexpected(job_id, f"{type(message).__name__} is not for workers")
        else:
            take(job_id, message, mono)

    def _welcome(self, _job_id: int, welcome: m.Welcome, mono: float) -> None:
        if self.ledger_id not in ("", welcome.ledger_id):
            self._forget_other_ledger()
        restarted = self.epoch not in (0, welcome.epoch)
        self.ledger_id, self.epoch = welcome.ledger_id, welcome.epoch
        self.batch = welcome.batch
        self._heartbeat_s = _clamp(welcome.heartbeat_s, HEARTBEAT_S_RANGE)
        self._lease_ttl_s = _clamp(welcome.lease_ttl_s, LEASE_TTL_S_RANGE)
        if restarted and self.welcomed:
            # A Sentinel that we did not address speaks first: it has to hear what is held.
            self._identify(mono)
            return
        self.welcomed = True
        self._heartbeat_due = mono + self._heartbeat_s
        self._say_again(mono)
        if self._listing_due is None:
            self._listing_due = mono + self.config.stage_listing_s
            self._out.append(ListStages())

    def _say_again(self, mono: float) -> None:
        """Repeat everything that a Sentinel may have missed."""
        for token in self._handed:
            attempt = self.attempts[token]
            if attempt.phase is Phase.RUNNING:
                self._send(attempt.job_id, m.DispatchAck(token))
        waiting = list(self._repeat)
        for token in waiting:
            self._request(self.attempts[token], mono)

    def _heartbeat(self, _job_id: int, _heartbeat: m.Heartbeat, _mono: float) -> None:
        """That it was heard is all there is to it."""

    def _err(self, _job_id: int, err: m.Err, mono: float) -> None:
        if err.code == "unknown_worker" and self.welcomed:
            self._identify(mono)

    def _remember_plugin(self, _job_id: int, plugin: m.Plugin, _mono: float) -> None:
        old = self._specs.pop(plugin.spec_id, None)
        if old is not None:
            self._spec_bytes -= _spec_bytes(old)
        self._specs[plugin.spec_id] = plugin
        self._spec_bytes += _spec_bytes(plugin)
        while len(self._specs) > SPECS_MAX or (
            self._spec_bytes > SPEC_BYTES_MAX and len(self._specs) > 1
        ):
            oldest = next(iter(self._specs))
            self._spec_bytes -= _spec_bytes(self._specs.pop(oldest))

    def _reload(self, _job_id: int, _reload: m.Reload, _mono: float) -> None:
        # Attempts in the queue keep the spec they were dispatched with.
        self._specs.clear()
        self._spec_bytes = 0
        self._out.append(ForgetPlugins())

    # -- taking attempts in ---------------------------------------------------------------------

    def _dispatch(self, job_id: int, dispatch: m.Dispatch, mono: float) -> None:
        token, number = dispatch.token, dispatch.attempt
        parts = parse_token(token)
        if parts is None or (parts.job_id, parts.attempt) != (job_id, number):
            self._unexpected(job_id, "DISPATCH: the token does not name this attempt", "malformed")
            return
        if parts.ledger_id != self.ledger_id:
            self._unexpected(job_id, "DISPATCH: the token is of another ledger")
            return
        if token in self.attempts or number <= self._finished.get(job_id, 0):
            return
        if not self._replace_older(job_id, number):
            return
        self.counts.received += 1
        attempt = Attempt(token, job_id, number, Phase.QUEUED, mono, dispatch)
        reason = self._reason_to_reject(attempt)
        if reason is None:
            self._queue_attempt(attempt)
        else:
            self._reject(attempt, reason, mono)

    def _queue_attempt(self, attempt: Attempt) -> None:
        if not self._handed:
            self._slot_moved(attempt.since)
        dispatch = attempt.dispatch
        require(dispatch is not None, "only dispatched attempts are queued")
        assert dispatch is not None
        plugin = self._specs.pop(dispatch.spec_id)
        self._specs[dispatch.spec_id] = plugin  # the most recently used is the last
        attempt.plugin = plugin
        self._hold(attempt)
        self._queue[attempt.token] = None

    def _replace_older(self, job_id: int, number: int) -> bool:
        """Make room for a newer attempt; False if what is held is newer, or granted."""
        token = self._by_job.get(job_id)
        if token is None:
            return True
        held = self.attempts[token]
        if number <= held.number:
            return False
        if held.phase is Phase.PUBLISHING:
            self._unexpected(job_id, "DISPATCH of a job whose commit was granted to this worker")
            return False
        self._drop(held)
        return True

    def _reason_to_reject(self, attempt: Attempt) -> Reason | None:
        dispatch = attempt.dispatch
        assert dispatch is not None
        if self.draining:
            return Reason.DRAINING
        if dispatch.spec_id not in self._specs:
            return Reason.NEED_PLUGIN
        if self._on_credit >= self.config.credit or len(self.attempts) >= self.config.held_max:
            return Reason.BUSY
        return None

    def _reject(self, attempt: Attempt, reason: str, mono: float) -> None:
        attempt.conclusion = m.Conclude(attempt.token, CompletionStatus.REJECTED, reason)
        if len(self.attempts) < self.config.held_max:
            self._hold(attempt)
            self._enter(attempt, Phase.CONCLUDING)
            self._request(attempt, mono)
        else:
            # Said once; if it is lost, the next heartbeat does not list the token.
            self._send(attempt.job_id, attempt.conclusion)
        self.counts.rejected += 1

    def _start_queued(self) -> None:
        while self._queue and len(self._handed) < self.config.handed_max:
            token = next(iter(self._queue))
            attempt = self.attempts[token]
            assert attempt.dispatch is not None
            assert attempt.plugin is not None
            self._enter(attempt, Phase.STARTED)
            self._out.append(StartJob(token, attempt.job_id, attempt.dispatch, attempt.plugin))

    # -- the runner's news ----------------------------------------------------------------------

    def _began(self, began: Began, mono: float) -> None:
        token = began.token
        attempt = self.attempts.get(token)
        if attempt is None or attempt.phase is not Phase.STARTED:
            return
        self._slot_moved(mono)
        self._enter(attempt, Phase.RUNNING)
        self._send(attempt.job_id, m.DispatchAck(token))

    def _staged(self, staged: Staged, mono: float) -> None:
        attempt = self.attempts.get(staged.token)
        if attempt is None or attempt.phase not in AT_RUNNER:
            return
        self._slot_moved(mono)
        if _is_dropped(attempt):
            self._out.append(DeleteStages(staged.token, staged.entries))
            self._forget(attempt)
            return
        attempt.entries = staged.entries
        attempt.conclusion = staged.conclusion
        self._enter(attempt, Phase.STAGED)
        self._request(attempt, mono)

    def _ended(self, ended: Ended, mono: float) -> None:
        attempt = self.attempts.get(ended.token)
        if attempt is None or attempt.phase not in AT_RUNNER:
            return
        self._slot_moved(mono)
        if _is_dropped(attempt):
            self._forget(attempt)
        else:
            self._conclude(attempt, ended.conclusion, mono)

    def _stopped(self, stopped: Stopped, mono: float) -> None:
        token = stopped.token
        attempt = self.attempts.get(token)
        if attempt is None or attempt.phase not in AT_RUNNER:
            return
        self._slot_moved(mono)
        if _is_dropped(attempt):
            self._forget(attempt)
            return
        reason = attempt.return_reason or Reason.WORKER_ERROR
        self._conclude(attempt, m.Conclude(token, CompletionStatus.REJECTED, reason), mono)

    def _slot_moved(self, mono: float) -> None:
        self._moved = mono
        self._give_back_pause = self.config.give_back_s
        self._give_back_due = mono + self._give_back_pause

    # -- the commit -----------------------------------------------------------------------------

    def _grant(self, job_id: int, grant: m.Grant, _mono: float) -> None:
        token = grant.token
        attempt = self.attempts.get(token)
        if attempt is None:
            if not self._is_finished(token):
                self._unexpected(job_id, f"GRANT: {token[:80]!r} is not held here")
        elif attempt.phase is Phase.STAGED:
            self._publish(attempt)
        elif attempt.phase not in (Phase.PUBLISHING, Phase.CONCLUDING):
            self._unexpected(job_id, f"GRANT: {token} has staged nothing yet")

    def _recover(self, job_id: int, recover: m.Recover, mono: float) -> None:
        token = recover.token
        attempt = self.attempts.get(token)
        if attempt is not None:
            if attempt.phase is Phase.STAGED:
                self._publish(attempt)
            elif attempt.phase not in (Phase.PUBLISHING, Phase.CONCLUDING):
                self._unexpected(job_id, f"RECOVER: {token} has staged nothing yet")
            return
        parts = parse_token(token)
        if parts is None or parts.job_id != job_id or parts.ledger_id != self.ledger_id:
            self._unexpected(job_id, "RECOVER: the token does not name this job", "malformed")
        elif output_roots(recover.entries) - {self.config.root_id}:
            self._unexpected(job_id, "RECOVER: staged in another output root", "refused")
        elif len(self.attempts) >= self.config.held_max or not self._replace_older(
            job_id, parts.attempt
        ):
            self._unexpected(job_id, "RECOVER: not now", "refused")
        else:
            attempt = Attempt(token, job_id, parts.attempt, Phase.PUBLISHING, mono)
            attempt.entries = recover.entries
            attempt.conclusion = conclusion_of(token, recover.entries)
            self.counts.recovered += 1
            self._hold(attempt)
            self._publish(attempt)

    def _publish(self, attempt: Attempt) -> None:
        self._enter(attempt, Phase.PUBLISHING)
        attempt.publish_due = None
        self._out.append(PublishOutputs(attempt.token, attempt.entries))

    def _published(self, published: Published, mono: float) -> None:
        attempt = self.attempts.get(published.token)
        if attempt is None or attempt.phase is not Phase.PUBLISHING:
            return
        if attempt.abandoned:
            self._delete_abandoned(attempt)
            return
        assert attempt.conclusion is not None
        self._conclude(attempt, attempt.conclusion, mono)

    def _publish_failed(self, failed: PublishFailed, mono: float) -> None:
        attempt = self.attempts.get(failed.token)
        if attempt is None or attempt.phase is not Phase.PUBLISHING:
            return
        if attempt.abandoned:
            self._delete_abandoned(attempt)
            return
        if failed.transient:
            pause = self.config.publish_retry_s * 2.0 ** min(attempt.publish_failures, 30)
            attempt.publish_failures += 1
            attempt.publish_due = mono + min(pause, self.config.publish_retry_s_max)
            self._republish[failed.token] = None
            return
        # The job stays STAGED and the stages stay where they are, for an operator to resolve.
        conclusion = m.Conclude(
            failed.token,
            CompletionStatus.FAILED,
            failed.reason,
            failed.message,
            transient=False,
            log=attempt.conclusion.log if attempt.conclusion else "",
        )
        self._conclude(attempt, conclusion, mono)

    def _delete_abandoned(self, attempt: Attempt) -> None:
        self._out.append(DeleteStages(attempt.token, attempt.entries))
        self._forget(attempt)

    def _refuse(self, _job_id: int, refuse: m.Refuse, _mono: float) -> None:
        attempt = self.attempts.get(refuse.token)
        if attempt is None or _is_dropped(attempt):
            return
        if attempt.phase is Phase.PUBLISHING and refuse.reason != Reason.ABANDONED:
            self._unexpected(attempt.job_id, f"REFUSE: {refuse.token} was granted before")
            return
        self.counts.refused += 1
        self._drop(attempt)

    def _abort(self, _job_id: int, abort: m.Abort, _mono: float) -> None:
        attempt = self.attempts.get(abort.token)
        if attempt is None or _is_dropped(attempt):
            return
        if attempt.phase is not Phase.PUBLISHING or abort.reason == Reason.ABANDONED:
            self.counts.aborted += 1
            self._drop(attempt)
        elif attempt.publish_due is not None:
            # Granted and yet stale: another worker has published it. Its stages are not ours to
            # delete any more.
            self._forget(attempt)

    def _conclude(self, attempt: Attempt, conclusion: m.Conclude, mono: float) -> None:
        attempt.conclusion = conclusion
        match conclusion.status:
            case CompletionStatus.FAILED:
                self.counts.failed += 1
            case CompletionStatus.SKIPPED:
                self.counts.skipped += 1
            case CompletionStatus.REJECTED:
                self.counts.rejected += 1
            case _:
                self.counts.completed += 1
        self._enter(attempt, Phase.CONCLUDING)
        self._request(attempt, mono)

    def _conclude_ack(self, _job_id: int, ack: m.ConcludeAck, _mono: float) -> None:
        for token in ack.tokens:
            attempt = self.attempts.get(token)
            if attempt is not None and attempt.phase is Phase.CONCLUDING:
                self._forget(attempt)

    # -- stages that nobody owns ----------------------------------------------------------------

    def _stage_listing(self, listing: StageListing, _mono: float) -> None:
        foreign = [
            t for t in listing.tokens if t not in self.attempts and parse_token(t) is not None
        ]
        for start in range(0, len(foreign), STAGES_PER_MESSAGE):
            self._send(0, m.Stages(foreign[start : start + STAGES_PER_MESSAGE]))

    def _discard(self, _job_id: int, discard: m.Discard, _mono: float) -> None:
        for token in discard.tokens:
            if token not in self.attempts and parse_token(token) is not None:
                self._out.append(DeleteStages(token))

    # -- trials ---------------------------------------------------------------------------------

    def _trial(self, _job_id: int, trial: m.Trial, _mono: float) -> None:
        """Begin a trial, or say again how it stands: TRIAL is repeated until its end is told."""
        known = self._trials.get(trial.trial_id)
        if known is None:
            if self.draining:
                known = m.TrialResult(trial.trial_id, TrialOutcome.AGAIN, Reason.DRAINING)
            else:
                known = m.TrialResult(trial.trial_id, TrialOutcome.RUNNING)
                self._out.append(StartTrial(trial))
            self._note_trial(known)
        self._send(0, known)

    def _trial_news(self, news: TrialNews, _mono: float) -> None:
        self._note_trial(news.result)
        self._send(0, news.result)

    def _note_trial(self, result: m.TrialResult) -> None:
        self._trials[result.trial_id] = result
        if len(self._trials) > TRIALS_MAX:
            del self._trials[next(iter(self._trials))]

    # -- time -----------------------------------------------------------------------------------

    def _tick(self, _event: Tick, mono: float) -> None:
        self._keep_contact(mono)
        self._repeat_unanswered(mono)
        for token in [t for t in self._republish if self._is_due(t, mono)]:
            self._publish(self.attempts[token])
        if self._drain_due is None:
            self._give_back_stuck(mono)
        elif mono >= self._drain_due + self.config.drain_grace_s:
            self._exit()
        elif mono >= self._drain_due:
            self._return_handed(Reason.DRAINING, {Phase.STARTED, Phase.RUNNING})

    def _unsent(self, _event: Unsent, mono: float) -> None:
        if not self.welcomed:
            # Nobody was bothered by it, so there is no reason to wait for a whole second.
            self._identify_due = mono

    def _is_due(self, token: str, mono: float) -> bool:
        due = self.attempts[token].publish_due
        return due is not None and mono >= due

    def _keep_contact(self, mono: float) -> None:
        heard = mono if self._heard is None else self._heard
        if mono - max(heard, self._reconnected) > self._lease_ttl_s:
            self._reconnected = mono
            self.welcomed = False
            self._identify_due = mono
            self._out.append(Reconnect())
        if not self.welcomed or mono - heard > self.patience_s:
            if mono >= self._identify_due:
                self._identify(mono)
        elif mono >= self._heartbeat_due:
            self._beat(mono)
        if self.welcomed and self._listing_due is not None and mono >= self._listing_due:
            self._listing_due = mono + self.config.stage_listing_s
            self._out.append(ListStages())

    def _connection_renewed(self, _: ConnectionRenewed, mono: float) -> None:
        self._reconnected = mono
        self._identify(mono)

    def _beat(self, mono: float) -> None:
        self._heartbeat_due = mono + self._heartbeat_s
        self._send(0, m.Heartbeat(self.status, self.held()))

    def _identify(self, mono: float) -> None:
        c = self.config
        self.welcomed = False
        self._identify_due = mono + c.resend_s
        identify = m.Identify(
            worker_id=c.worker_id,
            nonce=c.nonce,
            capabilities=list(c.capabilities),
            held=self.held(),
            root_id=c.root_id,
            slots=c.slots,
            credit=c.credit,
            hostname=c.hostname,
            pid=c.pid,
            version=c.version,
            batch=True,
            sandbox=dict(c.sandbox),
        )
        self._out.append(Send(0, identify))

    def _repeat_unanswered(self, mono: float) -> None:
        if not self.welcomed:
            return
        due = []
        for token, when in self._repeat.items():
            if when > mono:
                break
            due.append(token)
        self.counts.resent += len(due)
        for token in due:
            self._request(self.attempts[token], mono)

    def _give_back_stuck(self, mono: float) -> None:
        """Let other workers have what waits here behind jobs that take long."""
        if mono < self._give_back_due:
            return
        handed = [self.attempts[token] for token in self._handed]
        holders, ahead = handed[: self.config.slots], handed[self.config.slots :]
        if len(holders) < self.config.slots:
            return
        starting = any(attempt.phase is Phase.STARTED for attempt in holders)
        if starting and mono < self._moved + self.config.starting_s:
            return
        waited = mono - self.config.give_back_s
        stuck = [t for t in self._queue if self.attempts[t].since <= waited]
        ahead = [a for a in ahead if a.phase is Phase.STARTED and a.since <= waited]
        if not stuck and not ahead:
            return
        # With no other worker they come straight back: pause ever longer while nothing moves.
        self._give_back_pause = min(2 * self._give_back_pause, self.config.give_back_s_max)
        self._give_back_due = mono + self._give_back_pause
        for attempt in ahead:
            self._stop(attempt, Reason.BUSY)
        for token in stuck:
            attempt = self.attempts[token]
            self._conclude(attempt, m.Conclude(token, CompletionStatus.REJECTED, Reason.BUSY), mono)

    # -- drain ----------------------------------------------------------------------------------

    def _drain(self, _event: DrainRequested, mono: float) -> None:
        if self.draining:
            return
        self.draining = True
        self._drain_due = mono + self.config.drain_s
        self._beat(mono)
        for token in list(self._queue):
            conclusion = m.Conclude(token, CompletionStatus.REJECTED, Reason.DRAINING)
            self._conclude(self.attempts[token], conclusion, mono)
        self._return_handed(Reason.DRAINING, {Phase.STARTED})

    def _return_handed(self, reason: Reason, phases: set[Phase]) -> None:
        for token in self._handed:
            if self.attempts[token].phase in phases:
                self._stop(self.attempts[token], reason)

    def _exit(self) -> None:
        self.exited = True
        self._out.append(Exit())

    # -- bookkeeping ----------------------------------------------------------------------------

    def _hold(self, attempt: Attempt) -> None:
        self.attempts[attempt.token] = attempt
        self._by_job[attempt.job_id] = attempt.token
        self._on_credit += attempt.phase in ON_CREDIT

    def _enter(self, attempt: Attempt, phase: Phase) -> None:
        token, old = attempt.token, attempt.phase
        attempt.phase = phase
        self._on_credit += (phase in ON_CREDIT) - (old in ON_CREDIT)
        self._leave(token)
        if phase in AT_RUNNER:
            self._handed[token] = None

    def _leave(self, token: str) -> None:
        self._queue.pop(token, None)
        self._handed.pop(token, None)
        self._repeat.pop(token, None)
        self._republish.pop(token, None)

    def _forget(self, attempt: Attempt) -> None:
        self._leave(attempt.token)
        self._on_credit -= attempt.phase in ON_CREDIT
        del self.attempts[attempt.token]
        if self._by_job.get(attempt.job_id) == attempt.token:
            del self._by_job[attempt.job_id]
        self._remember_finished(attempt)

    def _remember_finished(self, attempt: Attempt) -> None:
        newest = max(self._finished.pop(attempt.job_id, 0), attempt.number)
        self._finished[attempt.job_id] = newest
        if len(self._finished) > FINISHED_MAX:
            del self._finished[next(iter(self._finished))]

    def _is_finished(self, token: str) -> bool:
        parts = parse_token(token)
        return parts is not None and self._finished.get(parts.job_id, 0) >= parts.attempt

    def _drop(self, attempt: Attempt) -> None:
        """The Sentinel has decided against this attempt: leave nothing of it."""
        match attempt.phase:
            case Phase.STARTED | Phase.RUNNING | Phase.STOPPING:
                self._stop(attempt, "")
                self._step_aside(attempt)
                return
            case Phase.PUBLISHING if attempt.publish_due is None:
                # Not while the runner is at it; its answer comes soon.
                attempt.abandoned = True
                self._step_aside(attempt)
                return
            case Phase.STAGED | Phase.PUBLISHING:
                self._out.append(DeleteStages(attempt.token, attempt.entries))
        self._forget(attempt)

    def _step_aside(self, attempt: Attempt) -> None:
        """A newer attempt of the job may come while the runner still lets go of this one."""
        if self._by_job.get(attempt.job_id) == attempt.token:
            del self._by_job[attempt.job_id]
        self._remember_finished(attempt)

    def _stop(self, attempt: Attempt, return_reason: str) -> None:
        if attempt.phase is not Phase.STOPPING:
            attempt.phase = Phase.STOPPING
            self._out.append(StopJob(attempt.token))
        attempt.return_reason = return_reason

    def _forget_other_ledger(self) -> None:
        self._finished.clear()
        for attempt in list(self.attempts.values()):
            if attempt.phase is not Phase.PUBLISHING:
                self._drop(attempt)
            else:
                self._forget(attempt)
        self._finished.clear()
        self._specs.clear()
        self._spec_bytes = 0

    def _request(self, attempt: Attempt, mono: float) -> None:
        """Say (again) what the Sentinel has to answer."""
        self._repeat.pop(attempt.token, None)
        self._repeat[attempt.token] = mono + self.config.resend_s
        if attempt.phase is Phase.STAGED:
            self._send(attempt.job_id, m.Stage(attempt.token, attempt.entries))
        else:
            assert attempt.conclusion is not None
            self._send(attempt.job_id, attempt.conclusion)

    def _send(self, job_id: int, message: m.Message) -> None:
        # Before WELCOME the Sentinel would only answer that it does not know us.
        if self.welcomed:
            self._out.append(Send(job_id, message))

    def _unexpected(self, job_id: int, text: str, code: str = "unexpected") -> None:
        self.counts.unexpected += 1
        self._send(job_id, m.Err(text, code))

    # -- invariants -----------------------------------------------------------------------------

    def invariants(self) -> None:
        """Check what must hold between any two events.

        Raises:
            InvariantError: names the rule that does not hold.
        """
        c = self.config
        by_phase: dict[Phase, set[str]] = {phase: set() for phase in Phase}
        for token, attempt in self.attempts.items():
            by_phase[attempt.phase].add(token)
            self._check_attempt(token, attempt)
        at_runner = set().union(*(by_phase[p] for p in AT_RUNNER))
        repeated = set().union(*(by_phase[p] for p in REPEATED))
        require(set(self._queue) == by_phase[Phase.QUEUED], "the queue holds what is QUEUED")
        require(set(self._handed) == at_runner, "handed is what is at the runner")
        require(set(self._repeat) == repeated, "every unanswered request is repeated")
        require(set(self._republish) <= by_phase[Phase.PUBLISHING], "only granted are published")
        on_credit = sum(len(by_phase[p]) for p in ON_CREDIT)
        require(self._on_credit == on_credit, "the credit is counted right")
        require(on_credit <= c.credit, "no more attempts than credit")
        require(len(self.attempts) <= c.held_max, "the number of attempts is bounded")
        require(len(self._handed) <= c.handed_max, "no more at the runner than it was told")
        idle = len(self._handed) < c.handed_max and not self.exited
        require(not (idle and self._queue), "nothing waits while there is a place")
        require(len(self._specs) <= SPECS_MAX, "the number of specs is bounded")
        require(self._spec_bytes == sum(map(_spec_bytes, self._specs.values())), "spec bytes")
        require(len(self._finished) <= FINISHED_MAX, "the memory of finished jobs is bounded")
        require(len(self._trials) <= TRIALS_MAX, "the memory of trials is bounded")
        times = list(self._repeat.values())
        require(times == sorted(times), "requests are repeated in order of time")

    def _check_attempt(self, token: str, attempt: Attempt) -> None:
        parts = parse_token(token)
        require(parts is not None and parts.job_id == attempt.job_id, "a token names its job")
        if not _is_dropped(attempt):
            require(self._by_job.get(attempt.job_id) == token, "one live attempt a job")
        if attempt.phase in (Phase.STAGED, Phase.PUBLISHING, Phase.CONCLUDING):
            require(attempt.conclusion is not None, "what is over has a conclusion")
        else:
            require(not attempt.entries, "a manifest exists only once staged")


def conclusion_of(token: str, entries: Iterable[OutputEntry], log: str = "") -> m.Conclude:
    """What to say of an attempt whose outputs are published: rows in quarantine make it partial."""
    metrics = dict(metrics_of(entries))
    partial = metrics["quarantine_rows"] > 0
    status = CompletionStatus.PARTIAL_SUCCESS if partial else CompletionStatus.SUCCESS
    return m.Conclude(token, status, metrics=metrics, log=log)


def _is_dropped(attempt: Attempt) -> bool:
    return attempt.abandoned or (attempt.phase is Phase.STOPPING and not attempt.return_reason)


def _spec_bytes(plugin: m.Plugin) -> int:
    return len(plugin.source_code) + len(plugin.lockfile) + len(plugin.parameters_json)


def _clamp(value: float, low_high: tuple[float, float]) -> float:
    low, high = low_high
    return min(max(value, low), high)
