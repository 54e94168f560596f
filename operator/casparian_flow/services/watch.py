"""Watch mode: scan the source roots again and again until told to stop.

The periodic scan is the truth. File system events only make the next one sooner, since they can
be lost, and are not to be had on network file systems; so do files that a job found changed.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from watchfiles import watch

from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.errors import (
    CasparianError,
    ConflictError,
    SentinelUnreachableError,
)
from casparian_flow.domain.paths import text_to_path
from casparian_flow.sentinel.api import ControlApi, Row
from casparian_flow.services.scout import DEFAULT_SETTLE_S, Observed, report_row, scan

log = logging.getLogger(__name__)

SOONEST_S = 0.5
"""Between two scans of a root, however many events arrive."""
REST_FACTOR = 2.0
"""An early scan waits at least this many times the last one's duration, so that scanning never
takes more than a third of the time, however fast a file changes."""
POLL_S = 0.25
RESCANS_EVERY_S = 0.5
HINT_STEP_MS = 200
HINT_RETRY_S = 5.0

OnReport = Callable[[Row], None]


@dataclass(slots=True)
class _Root:
    """A root's schedule; times on the monotonic clock."""

    row: Row
    due: float
    soonest: float = 0.0
    force: set[str] = field(default_factory=set)
    observed: Observed = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    """Problems already logged."""


def run_scout(
    control: ControlApi,
    roots: Sequence[int] | None = None,
    *,
    interval_s: float,
    stop: threading.Event,
    on_report: OnReport | None = None,
    settle_seconds: float | None = None,
    hints: bool = True,
    clock: Clock | None = None,
) -> None:
    """Scan until `stop` is set; returns then, after the scan under way.

    Roots added or removed meanwhile are taken up within an interval.

    Args:
        roots: ids of source roots, None for every active one.
        interval_s: seconds between the beginnings of two scans of a root.
        on_report: called after every scan with its report as a row, with `path`; after one that
            failed with {root_id, path, complete: False, problems}. Without it problems are logged.
        settle_seconds: for roots without a value of their own.
        hints: whether to watch for file system events.

    Raises:
        SentinelUnreachableError: nobody answers any more.
    """
    loop = _Loop(
        control=control,
        wanted=None if roots is None else frozenset(roots),
        interval_s=interval_s,
        stop=stop,
        on_report=on_report,
        settle_seconds=DEFAULT_SETTLE_S if settle_seconds is None else settle_seconds,
        clock=clock or SystemClock(),
    )
    with _hinting(loop, stop) if hints else _no_hints():
        loop.run()


@dataclass(slots=True)
class _Loop:
    control: ControlApi
    wanted: frozenset[int] | None
    interval_s: float
    stop: threading.Event
    on_report: OnReport | None
    settle_seconds: float
    clock: Clock
    roots: dict[int, _Root] = field(default_factory=dict)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        refresh_at = rescans_at = 0.0
        while not self.stop.is_set():
            mono = self.clock.now().mono
            if mono >= refresh_at:
                self._try(lambda: self._refresh(self.clock.now().mono))
                refresh_at = mono + self.interval_s
            if mono >= rescans_at:
                self._try(self._take_rescans)
                rescans_at = mono + RESCANS_EVERY_S
            root = self._most_due(mono)
            if root is None:
                self.stop.wait(POLL_S)
            else:
                self._scan(root)

    def _try(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except SentinelUnreachableError:
            raise
        except CasparianError as error:
            # Its ledger may be full or failing: `status` says so, and the next interval asks again.
            log.info("the Sentinel does not answer as it should: %s", error)

    def paths(self) -> list[str]:
        """Of all roots, for the operating system."""
        with self.guard:
            return [text_to_path(str(root.row["path"])) for root in self.roots.values()]

    def hurry(self, paths: Sequence[str]) -> None:
        """Something happened at these paths: scan their roots soon."""
        mono = self.clock.now().mono
        with self.guard:
            for root in self.roots.values():
                folder = text_to_path(str(root.row["path"])).rstrip("/") + "/"
                if any(path.startswith(folder) for path in paths):
                    self._bring_forward(root, mono)

    def _bring_forward(self, root: _Root, mono: float) -> None:
        # A file that has just changed has to settle first; the scan after that takes it.
        settle = root.row.get("settle_seconds")
        wait = float(self.settle_seconds if settle is None else settle)
        root.due = min(root.due, max(mono + wait, root.soonest))

    def _refresh(self, mono: float) -> None:
        rows = {
            int(row["id"]): row
            for row in self.control.list_sources()
            if row.get("active", True) and (self.wanted is None or int(row["id"]) in self.wanted)
        }
        with self.guard:
            for root_id in set(self.roots) - set(rows):
                del self.roots[root_id]
            for root_id, row in rows.items():
                if root_id in self.roots:
                    self.roots[root_id].row = row
                else:
                    self.roots[root_id] = _Root(row, mono)

    def _take_rescans(self) -> None:
        rescans = self.control.next_rescans()
        mono = self.clock.now().mono
        with self.guard:
            for rescan in rescans:
                root = self.roots.get(int(rescan["root_id"]))
                if root is not None:
                    root.force.add(str(rescan["rel_path"]))
                    self._bring_forward(root, mono)

    def _most_due(self, mono: float) -> _Root | None:
        with self.guard:
            due = [root for root in self.roots.values() if root.due <= mono]
        return min(due, key=lambda root: root.due, default=None)

    def _scan(self, root: _Root) -> None:
        started = self.clock.now().mono
        with self.guard:
            force, root.force = root.force, set()
            root.due = started + self.interval_s
        row: Row
        try:
            report = scan(
                root.row,
                self.control,
                wait_for_settle=False,
                settle_seconds=self.settle_seconds,
                force=force,
                observed=root.observed,
                stop=self.stop,
                clock=self.clock,
            )
            row = {"path": root.row["path"], **report_row(report)}
        except SentinelUnreachableError:
            raise
        except CasparianError as error:
            root.force |= force
            row = {
                "root_id": root.row["id"],
                "path": root.row["path"],
                "complete": False,
                "problems": [_problem(error)],
            }
        ended = self.clock.now().mono
        with self.guard:
            root.soonest = ended + max(SOONEST_S, REST_FACTOR * (ended - started))
            if row.get("unsettled"):
                self._bring_forward(root, ended)
        if self.on_report is None:
            self._log_problems(root, row)
        else:
            self.on_report(row)

    def _log_problems(self, root: _Root, row: Row) -> None:
        problems = set(row["problems"])
        for problem in sorted(problems - root.told):
            log.warning("%s: %s", row["path"], problem)
        root.told = problems


@contextmanager
def _no_hints() -> Iterator[None]:
    yield


def _problem(error: CasparianError) -> str:
    if isinstance(error, ConflictError):  # somebody else scans just now
        return str(error)
    return f"scan failed: {error.with_hint()}"


@contextmanager
def _hinting(loop: _Loop, stop: threading.Event) -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(
        target=_watch_events, args=(loop, stop, done), name="file-events", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2.0)


def _watch_events(loop: _Loop, stop: threading.Event, done: threading.Event) -> None:
    while not (stop.is_set() or done.is_set()):
        paths = loop.paths()
        if not paths:
            done.wait(POLL_S)
            continue
        try:
            _follow(loop, paths, stop, done)
        except (OSError, RuntimeError) as error:
            # No inotify, no watches left (a RuntimeError from watchfiles), or a root is missing:
            # the periodic scan goes on alone.
            log.debug("no file system events: %s", error)
            done.wait(HINT_RETRY_S)


def _follow(
    loop: _Loop, paths: Sequence[str], stop: threading.Event, done: threading.Event
) -> None:
    for changes in watch(
        *paths,
        watch_filter=None,
        step=HINT_STEP_MS,
        rust_timeout=500,
        yield_on_timeout=True,
        stop_event=done,
        raise_interrupt=False,
    ):
        if stop.is_set() or loop.paths() != list(paths):
            return
        if changes:
            loop.hurry([path for _, path in changes])
