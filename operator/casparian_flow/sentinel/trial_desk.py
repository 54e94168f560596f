"""Trials in the Sentinel: between their rules (trials.py), the ledger, the workers and `status`.

Driven by the Sentinel's loop. It never waits: what the ledger answers comes back as an event of a
later turn.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from casparian_flow.db import releases
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import Clock, Now
from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.ids import Identity, ManifestId
from casparian_flow.domain.records import PluginSpec, StagedVersion
from casparian_flow.domain.wiring import TrialOutcome
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel.api import Row
from casparian_flow.sentinel.events import Send
from casparian_flow.sentinel.loop import CoreLoop
from casparian_flow.sentinel.trials import Conclude, Staged, Told, Trials

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the clock and the workers while a version is staged."""
HEAD_START_S = 15.0
"""How long, from the first worker on, jobs wait at a start for a version that is to be tried: who
publishes a correction and then starts the Sentinel wants the jobs to run with it."""


class TrialDesk:
    """See the module's text.

    Args:
        wake: makes the loop's thread call `turn` soon.
    """

    def __init__(self, loop: CoreLoop[Ledger], clock: Clock, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._clock = clock
        self._wake = wake
        self._trials: Trials | None = None
        self._events: deque[Staged | Told] = deque()
        self._unread = True
        """Whether the ledger may hold other staged versions than are known here."""
        self._reading = False
        self._concluding: set[ManifestId] = set()
        self._look_at = 0.0
        self._withheld: frozenset[str] = frozenset()
        self._withheld_until = 0.0

    def start(self) -> None:
        """Look for staged versions before any worker is served; waits for the ledger."""
        staged = self._loop.call(releases.staged_versions).result()
        self._events.append(Staged(staged))
        self._unread = False
        self._withhold(frozenset(version.spec.plugin for version in staged))

    # -- from any thread --------------------------------------------------------------------

    def wiring_changed(self) -> None:
        """A version was staged, or is no longer."""
        self._unread = True
        self._wake()

    # -- from the loop's thread -------------------------------------------------------------

    def take(self, identity: Identity, result: m.TrialResult) -> None:
        """A worker tells of its trial."""
        self._events.append(Told(identity, result))

    def turn(self) -> list[Send]:
        """Do what is due; returns what is to be sent to workers."""
        core = self._loop.core
        pending = self._trials is not None and self._trials.pending
        if not core.ready or not (self._unread or self._events or pending):
            return []
        now = self._clock.now()
        if not self._unread and not self._events and now.mono < self._look_at:
            return []
        self._look_at = now.mono + LOOK_S
        broker = core.broker
        if self._trials is None:
            self._trials = Trials(f"{broker.ledger_id}-{broker.epoch}")
        if self._unread and not self._reading:
            self._read()
        events = [self._events.popleft() for _ in range(len(self._events))]
        self._give_head_start(events, now)
        sends = []
        for instruction in self._trials.step(events, broker.workers, now):
            if isinstance(instruction, Send):
                sends.append(instruction)
            else:
                self._conclude(instruction)
        return sends

    def rows(self, now: Now) -> list[Row]:
        """Versions that are not active yet: {plugin_id, plugin_name, version, state, note}."""
        return [] if self._trials is None else self._trials.rows(now)

    # -- a head start -----------------------------------------------------------------------

    def _give_head_start(self, events: Sequence[Staged | Told], now: Now) -> None:
        """Let the jobs of a plugin go once its new version is tried, or takes too long."""
        if not self._withheld:
            return
        if not self._withheld_until and self._loop.core.broker.workers:
            self._withheld_until = now.mono + HEAD_START_S
        if self._withheld_until and now.mono >= self._withheld_until:
            self._withhold(frozenset())
            return
        for event in events:
            if isinstance(event, Staged):
                staged = {version.spec.plugin for version in event.versions}
                self._withhold(self._withheld & staged)
            elif event.result.outcome == TrialOutcome.AGAIN:
                self._withhold(frozenset())

    def _withhold(self, plugins: frozenset[str]) -> None:
        if plugins != self._withheld:
            self._withheld = plugins
            self._loop.withhold(plugins, lambda ledger: ledger.plugin_specs())

    # -- the ledger -------------------------------------------------------------------------

    def _read(self) -> None:
        self._unread, self._reading = False, True

        def done(future: "Future[list[StagedVersion]]") -> None:
            self._reading = False
            error = future.exception()
            if error is None:
                self._events.append(Staged(future.result()))
            else:
                self._unread = True
                log.warning("staged plugin versions could not be read: %s", error)
                return  # with the next look
            self._wake()

        self._loop.call(releases.staged_versions).add_done_callback(done)

    def _conclude(self, verdict: Conclude) -> None:
        if verdict.manifest_id in self._concluding:
            return
        self._concluding.add(verdict.manifest_id)
        now_us = self._clock.now().wall_us

        def write(ledger: Ledger) -> tuple[str, Sequence[PluginSpec]]:
            told = releases.conclude_trial(
                ledger,
                verdict.manifest_id,
                passed=verdict.passed,
                message=verdict.message,
                now_us=now_us,
            )
            return told, ledger.plugin_specs()

        def done(future: "Future[Any]") -> None:
            self._concluding.discard(verdict.manifest_id)
            error = future.exception()
            if error is None:
                log.info("%s", future.result())
            elif isinstance(error, CasparianError):
                log.warning("a trial's end could not be recorded: %s", error)  # it is repeated
            else:
                log.error("a trial's end could not be recorded", exc_info=error)
            self.wiring_changed()

        self._loop.rewire(write).add_done_callback(done)
