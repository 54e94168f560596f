"""Trials: a worker tries each new plugin version before it gets any job. Pure.

    STAGING ── no worker ──> waits
       └── a worker that takes the plugin ── TRIAL ──> tries it (loads it, runs its samples)
              passed, failed ──> Conclude: the ledger makes it ACTIVE or REJECTED
              again          ──> waits a while, then any worker
              worker lost    ──> another worker, `losses_max` times

`Trials.step(events, workers, now)` returns what is to be done. TRIAL is repeated until its end is
told, and so is `Conclude` until the ledger no longer lists the version as staged; either may
happen twice without harm. Versions of one plugin are tried one after the other, in the order of
their deploys, and no worker tries two at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from casparian_flow.domain.clock import Now
from casparian_flow.domain.errors import require
from casparian_flow.domain.failures import RULES, Reason
from casparian_flow.domain.ids import Identity, ManifestId
from casparian_flow.domain.records import StagedVersion
from casparian_flow.domain.wiring import TrialOutcome
from casparian_flow.domain.wording import counted
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel.broker import plugin_message
from casparian_flow.sentinel.events import Send
from casparian_flow.sentinel.leases import Worker

NOTE_CHARS_MAX = 2_000
_OUTCOMES = {outcome.value: outcome for outcome in TrialOutcome}


@dataclass(frozen=True, slots=True)
class TrialsConfig:
    repeat_s: float = 5.0
    """Between two TRIALs while its end is not told; each is answered."""
    silence_s: float = 60.0
    """A worker that says nothing of its trial for this long has lost it."""
    deadline_s: float = 1_800.0
    """For making an environment, loading, and all samples."""
    losses_max: int = 10
    """Workers lost during its trial that reject a version: it may be what kills them."""
    pause_s: float = 5.0
    pause_s_max: float = 300.0
    """The pause after `again` doubles from one to the other."""


@dataclass(frozen=True, slots=True)
class Staged:
    """The versions that the ledger has as STAGING, all of them."""

    versions: Sequence[StagedVersion]


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker says of its trial."""

    identity: Identity
    result: m.TrialResult


@dataclass(frozen=True, slots=True)
class Conclude:
    """Make the version ACTIVE, or REJECTED for the reason given."""

    manifest_id: ManifestId
    passed: bool
    message: str = ""
    rows: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True)
class _Trial:
    version: StagedVersion
    number: int = 0
    trial_id: str = ""
    """Of the try under way, "" for none."""
    worker: Identity | None = None
    nonce: str = ""
    worker_id: str = ""
    began: float = 0.0
    heard: float = 0.0
    due: float = 0.0
    """When to repeat TRIAL or Conclude, or when to try again."""
    losses: int = 0
    pauses: int = 0
    note: str = ""
    verdict: Conclude | None = None


class Trials:
    """See the module's text.

    Args:
        scope: goes into the names of tries, so that none of an earlier process is taken for one
            of this; any text.
    """

    def __init__(self, scope: str, config: TrialsConfig | None = None) -> None:
        self.config = config or TrialsConfig()
        self._scope = scope
        self._trials: dict[ManifestId, _Trial] = {}
        self._out: list[Send | Conclude] = []

    def step(
        self, events: Sequence[Staged | Told], workers: Mapping[Identity, Worker], now: Now
    ) -> list[Send | Conclude]:
        """Take in events in order, look at the clock, hand out what can be tried.

        Args:
            workers: those connected now.
        """
        for event in events:
            if isinstance(event, Staged):
                self._staged(event)
            else:
                self._told(event, workers, now.mono)
        for trial in self._trials.values():
            self._follow(trial, workers, now.mono)
        self._assign(workers, now.mono)
        out, self._out = self._out, []
        return out

    @property
    def pending(self) -> bool:
        """Whether any version waits for its trial or its end."""
        return bool(self._trials)

    def rows(self, now: Now) -> list[dict[str, object]]:
        """For people: {plugin_id, plugin_name, version, state, tries, note}."""
        return [
            {
                "plugin_id": int(trial.version.spec.manifest_id),
                "plugin_name": trial.version.spec.plugin,
                "version": trial.version.spec.plugin_version,
                "state": _state(trial, now.mono),
                "tries": trial.number,
                "note": trial.note,
            }
            for trial in self._trials.values()
        ]

    # -- events -----------------------------------------------------------------------------

    def _staged(self, event: Staged) -> None:
        known, self._trials = self._trials, {}
        for version in sorted(event.versions, key=lambda v: v.spec.manifest_id):
            trial = known.get(version.spec.manifest_id) or _Trial(version)
            if not trial.trial_id:
                # Its parameters may have been changed since.
                trial.version = version
            self._trials[version.spec.manifest_id] = trial

    def _told(self, event: Told, workers: Mapping[Identity, Worker], mono: float) -> None:
        result, teller = event.result, workers.get(event.identity)
        trial = next((t for t in self._trials.values() if t.trial_id == result.trial_id), None)
        outcome = _OUTCOMES.get(result.outcome)
        if trial is None or trial.trial_id == "" or outcome is None or trial.verdict is not None:
            return
        if teller is None or not _asked(trial, teller):
            return  # not the process that was asked
        trial.heard = mono
        trial.note = result.message[:NOTE_CHARS_MAX]
        if outcome is TrialOutcome.PASSED:
            self._conclude(trial, True, "", mono, tuple(sorted(result.rows.items())))
        elif outcome is TrialOutcome.FAILED:
            self._conclude(trial, False, _failure(result), mono)
        elif outcome is TrialOutcome.AGAIN:
            trial.trial_id = ""
            pause = min(self.config.pause_s * 2.0**trial.pauses, self.config.pause_s_max)
            trial.pauses = min(trial.pauses + 1, 30)
            trial.due = mono + pause

    # -- time -------------------------------------------------------------------------------

    def _follow(self, trial: _Trial, workers: Mapping[Identity, Worker], mono: float) -> None:
        """Repeat what has to be repeated; notice a worker that is gone."""
        config = self.config
        if trial.verdict is not None:
            if mono >= trial.due:
                trial.due = mono + config.repeat_s
                self._out.append(trial.verdict)
            return
        if not trial.trial_id:
            return
        worker = next((w for w in workers.values() if _asked(trial, w)), None)
        if worker is not None:
            trial.worker = worker.identity  # it may have connected anew
        if worker is None:
            self._lost(trial, f"worker {trial.worker_id} was lost", mono)
        elif mono - trial.heard >= config.silence_s:
            self._lost(trial, f"worker {trial.worker_id} says nothing of it", mono)
        elif mono - trial.began >= config.deadline_s:
            self._lost(trial, f"it did not end within {config.deadline_s:g} s", mono)
        elif mono >= trial.due:
            self._send(trial, mono)

    def _lost(self, trial: _Trial, why: str, mono: float) -> None:
        trial.trial_id = ""
        trial.losses += 1
        trial.note = why
        trial.due = mono
        if trial.losses >= self.config.losses_max:
            told = f"it was tried {counted(trial.losses, 'time')} in vain; the last: {why}"
            self._conclude(trial, False, told, mono)

    def _conclude(
        self,
        trial: _Trial,
        passed: bool,
        message: str,
        mono: float,
        rows: tuple[tuple[str, int], ...] = (),
    ) -> None:
        trial.verdict = Conclude(trial.version.spec.manifest_id, passed, message, rows)
        trial.due = mono

    def _assign(self, workers: Mapping[Identity, Worker], mono: float) -> None:
        busy = {t.worker for t in self._trials.values() if t.trial_id and t.verdict is None}
        seen: set[str] = set()
        for trial in self._trials.values():
            plugin, code = trial.version.spec.plugin, trial.version.spec.artifact_hash
            first = plugin not in seen
            seen.add(plugin)
            if not first or trial.trial_id or trial.verdict is not None or mono < trial.due:
                continue
            able = [
                w
                for w in workers.values()
                if w.runs(plugin, code) and not w.leaving and w.identity not in busy
            ]
            if able:
                worker = min(able, key=lambda w: w.load)
                busy.add(worker.identity)
                self._begin(trial, worker, mono)

    def _begin(self, trial: _Trial, worker: Worker, mono: float) -> None:
        trial.number += 1
        trial.trial_id = f"{self._scope}-{trial.version.spec.manifest_id}-{trial.number}"
        trial.worker, trial.nonce, trial.worker_id = worker.identity, worker.nonce, worker.worker_id
        trial.began = trial.heard = mono
        trial.note = ""
        self._send(trial, mono)

    def _send(self, trial: _Trial, mono: float) -> None:
        assert trial.worker is not None
        trial.due = mono + self.config.repeat_s
        message = m.Trial(trial.trial_id, plugin_message(trial.version.spec), trial.version.samples)
        self._out.append(Send(trial.worker, 0, message, after_commit=False))

    def invariants(self) -> None:
        """Check that the parts of the state agree; called after every step by the tests.

        Raises:
            InvariantError: naming what does not hold.
        """
        under_way = [t for t in self._trials.values() if t.trial_id and t.verdict is None]
        count = len(under_way)
        require(len({t.worker for t in under_way}) == count, "a worker tries two at once")
        plugins = {t.version.spec.plugin for t in under_way}
        require(len(plugins) == count, "two versions of a plugin are tried at once")


def _asked(trial: _Trial, worker: Worker) -> bool:
    """Whether this is the process that tries it; it may have connected anew."""
    spec = trial.version.spec
    return worker.nonce == trial.nonce and worker.runs(spec.plugin, spec.artifact_hash)


def _failure(result: m.TrialResult) -> str:
    try:
        meaning = RULES[Reason(result.reason)].meaning
    except ValueError:
        meaning = "the trial failed"
    return f"{meaning}: {result.message}" if result.message else meaning


def _state(trial: _Trial, mono: float) -> str:
    if trial.verdict is not None:
        return "tried"
    if trial.trial_id:
        return f"being tried on {trial.worker_id}"
    if trial.due > mono:
        return f"tried again in {max(1, round(trial.due - mono))} s"
    return "waits for a worker"
