"""A thread that asks the Sentinel how things stand, so that the supervisor never waits for it."""

import threading
from contextlib import suppress
from dataclasses import dataclass, field

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.sentinel.api import ControlApi, Row

EVERY_S = 0.5
FAILED_SHOWN = 20


@dataclass(frozen=True)
class View:
    """One answer.

    Attributes:
        asked: seconds on the monotonic clock when the question was put.
        failed: the newest failed jobs.
    """

    asked: float
    counts: dict[str, int] = field(default_factory=dict)
    sources: list[Row] = field(default_factory=list)
    plugins: list[Row] = field(default_factory=list)
    causes: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    trials: list[Row] = field(default_factory=list)
    api_jobs: dict[str, int] = field(default_factory=dict)


class Watcher:
    """Keeps the newest View; None as long as no Sentinel answers."""

    def __init__(self, control: ControlApi, clock: Clock) -> None:
        self._control = control
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self.view: View | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.is_set():
            # No Sentinel just now: the supervisor knows, and starts another one.
            with suppress(CasparianError):
                self.view = self._ask()
            self._stop.wait(EVERY_S)

    def _ask(self) -> View:
        asked = self._clock.now().mono
        status = self._control.status()
        counts = {str(name): int(n) for name, n in (status.get("jobs") or {}).items()}
        known = self.view.counts if self.view else {}
        failed = self.view.failed if self.view else []
        name = JobStatus.FAILED.value
        if counts.get(name, 0) != known.get(name, 0):
            failed = self._control.list_jobs(status=name, limit=FAILED_SHOWN)
        return View(
            asked,
            counts,
            status.get("sources") or [],
            status.get("plugins") or [],
            status.get("causes") or [],
            failed,
            status.get("trials") or [],
            status.get("api_jobs") or {},
        )
