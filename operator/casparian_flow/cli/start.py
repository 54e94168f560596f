"""`casparian start`: Sentinel, Scout and workers in one process tree."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from casparian_flow.cli.context import App, news_of_ledger, pass_app
from casparian_flow.cli.idle import IdleJudge, active
from casparian_flow.cli.output import last_line, one_line
from casparian_flow.cli.progress import JobsView, jobs_view
from casparian_flow.cli.services import metrics_option
from casparian_flow.cli.status import jobs_line
from casparian_flow.cli.supervisor import (
    Child,
    Death,
    Plan,
    State,
    Supervisor,
    command,
    told_exit,
)
from casparian_flow.cli.watcher import View, Watcher
from casparian_flow.config import (
    CONFIG_VARIABLE,
    Settings,
    config_path,
    overridden,
    worker_address,
)
from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.errors import (
    CasparianError,
    ConflictError,
    SentinelUnreachableError,
)
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.wiring import PluginStatus
from casparian_flow.domain.wording import counted
from casparian_flow.logs import LEVEL_VARIABLE
from casparian_flow.sentinel.api import ControlApi, Row

READY_TIMEOUT_S = 60.0
SCOUT_GRACE_S = 15.0
SENTINEL_GRACE_S = 30.0
POLL_S = 0.1
SCAN_NEWS = (("versions", "new version"), ("jobs", "job"))
LAST_WORDS = ("error: ", "hint: ")
"""How a child begins to say why it ends; told once, with its death."""
STALL_S = 10.0
"""Without a change for so long, a person wonders why."""
STALL_CAUSES = frozenset({"ledger", "trials", "waiting", "granted"})
TRIES_AWAITED = 3
"""Tries after which a version that no worker can try no longer keeps the run alive."""
SCOUT, WORKERS, SENTINEL = 0, 1, 2
"""Stages, in the order of stopping."""


@click.command()
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    default=1,
    show_default=True,
    metavar="N",
    help="Worker processes.",
)
@click.option("--bind", "bind_address", metavar="ADDRESS", help="Where workers connect.")
@metrics_option
@click.option("--exit-when-idle", is_flag=True, help="End when all is scanned and no job is left.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End after so long in any case; exit code 1 if there was work left.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show what the services log.")
@pass_app
def start(
    app: App,
    workers: int,
    bind_address: str | None,
    metrics_port: int | None,
    exit_when_idle: bool,
    timeout_s: float | None,
    verbose: bool,
) -> int:
    """Run Sentinel, Scout and workers, until Ctrl-C.

    The first Ctrl-C (or SIGTERM) drains: Scout stops, workers finish or give back their jobs, the
    Sentinel closes the ledger; exit code 0. The second one ends everything at once, which loses
    nothing but time.

    \b
    Examples:
      casparian start --workers 2
      casparian start --exit-when-idle    (exit code 1 if a job failed)
    """
    settings = overridden(
        app.settings, "sentinel", bind_address=bind_address, metrics_port=metrics_port
    )
    clock = SystemClock()
    control = _remote(settings)
    _refuse_second(control)
    file, _ = config_path(app.config)
    with _signals() as signals, jobs_view(clock) as view:
        if not file.exists():
            view.line(f"no {file}: every setting has its default")
        run = Run(
            settings=settings,
            control=control,
            clock=clock,
            view=view,
            signals=signals,
            environment=_environment(app, settings, verbose=verbose),
            workers=workers,
            debug=app.debug,
        )
        return run.run(exit_when_idle=exit_when_idle, timeout_s=timeout_s)


def _remote(settings: Settings) -> ControlApi:
    from casparian_flow.sentinel.control import remote
    from casparian_flow.sentinel.paths import control_address

    address = control_address(settings.database.db_location, settings.sentinel.control_address)
    return remote(address, timeout_s=30.0)


def _refuse_second(control: ControlApi) -> None:
    try:
        found = control.ping()
    except SentinelUnreachableError:
        return
    raise ConflictError(
        f"a Sentinel already runs for this ledger (process {found.get('pid')})",
        hint="Stop it with 'casparian stop', or add workers to it with 'casparian worker'.",
    )


def _environment(app: App, settings: Settings, *, verbose: bool) -> dict[str, str]:
    environment = dict(os.environ)
    file, _ = config_path(app.config)
    if file.exists():
        environment[CONFIG_VARIABLE] = str(file)
    if not verbose and settings.logging.level == "INFO":
        environment[LEVEL_VARIABLE] = "WARNING"
    return environment


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that grows with every SIGINT, SIGTERM and SIGHUP."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """One run of the process tree."""

    settings: Settings
    control: ControlApi
    clock: Clock
    view: JobsView
    signals: list[int]
    environment: dict[str, str]
    workers: int
    debug: bool = False
    make_command: Callable[[Sequence[str]], list[str]] = command
    judge: IdleJudge = field(default_factory=IdleJudge)
    _reports: tuple[int, int] = (-1, -1)
    _unread: bytes = b""
    _told: set[str] = field(default_factory=set)
    _staged: dict[tuple[str, str], bool] = field(default_factory=dict)
    """Whether a version, by name and number, was still to be tried when last seen."""
    _failed_before: int = 0
    _known_failed: set[Any] | None = None
    _last: View | None = None
    _moved: tuple[float, dict[str, int]] = field(default_factory=lambda: (0.0, {}))
    """When the counts last changed, and what they were."""

    def run(self, *, exit_when_idle: bool, timeout_s: float | None) -> int:
        """Start everything, watch over it, drain; returns the exit code."""
        for line in news_of_ledger(self.settings):
            self.view.line(line)
        supervisor = Supervisor(
            self.clock, self._say, make_command=self.make_command, environment=self.environment
        )
        watcher = Watcher(self.control, self.clock)
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        self._reports = (read_end, write_end)
        try:
            self._start_sentinel(supervisor)
            watcher.start()
            if not self.signals:
                self._start_rest(supervisor, write_end)
            code = self._watch(supervisor, watcher, exit_when_idle, timeout_s)
            self._drain(supervisor)
            watcher.stop()
            self._last = watcher.view or self._last
        except BaseException:
            supervisor.kill()
            raise
        finally:
            os.close(read_end)
            os.close(write_end)
        self._summary(code)
        return code

    # -- starting ---------------------------------------------------------------------------

    def _start_sentinel(self, supervisor: Supervisor) -> None:
        config = self.settings.sentinel
        child = supervisor.add(
            Plan(
                "sentinel",
                (
                    *self._flags(),
                    "sentinel",
                    "--bind",
                    config.bind_address,
                    "--metrics-port",
                    str(config.metrics_port),
                ),
                SENTINEL,
                SENTINEL_GRACE_S,
            )
        )
        give_up = self.clock.now().mono + READY_TIMEOUT_S
        while not self.signals:
            for death in supervisor.poll(POLL_S, restart=False):
                raise _cannot_start(death)
            try:
                self.control.ping()
            except SentinelUnreachableError:
                if self.clock.now().mono > give_up:
                    raise CasparianError(
                        f"the Sentinel did not answer within {READY_TIMEOUT_S:g} seconds",
                        hint="Look at what it says: 'casparian start -v'.",
                    ) from None
                continue
            break
        if child.state is State.RUNNING and not self.signals:
            self.view.line(f"sentinel: {config.bind_address}, ledger {self._ledger()}")

    def _ledger(self) -> str:
        return str(self.settings.database.db_location)

    def _start_rest(self, supervisor: Supervisor, write_end: int) -> None:
        counts = {str(k): int(v) for k, v in (self.control.status().get("jobs") or {}).items()}
        self._failed_before = counts.get(JobStatus.FAILED.value, 0)
        address = worker_address(self.settings)
        grace = self.settings.worker.drain_seconds + 15.0
        for number in range(1, self.workers + 1):
            arguments = (
                *self._flags(),
                "worker",
                "--connect",
                address,
                "--worker-id",
                f"worker-{number}",
            )
            supervisor.add(Plan(f"worker-{number}", arguments, WORKERS, grace))
        scout = (*self._flags(), "scout", "--report-fd", str(write_end))
        supervisor.add(Plan("scout", scout, SCOUT, SCOUT_GRACE_S, (write_end,)))
        self.view.line(f"{counted(self.workers, 'worker')}, 1 scout; Ctrl-C drains and stops")

    def _flags(self) -> tuple[str, ...]:
        return ("--debug",) if self.debug else ()

    # -- running ----------------------------------------------------------------------------

    def _watch(
        self,
        supervisor: Supervisor,
        watcher: Watcher,
        exit_when_idle: bool,
        timeout_s: float | None,
    ) -> int:
        end = None if timeout_s is None else self.clock.now().mono + timeout_s
        while not self.signals:
            for death in supervisor.poll(POLL_S):
                if self._stopped_by(death):
                    return 0
            self._read_reports()
            view = watcher.view
            if view is not None and view is not self._last:
                self._show(view)
                if exit_when_idle and self._idle(view):
                    return self._verdict(view)
            if end is not None and self.clock.now().mono > end:
                return self._out_of_time(view, exit_when_idle)
        return 0

    def _stopped_by(self, death: Death) -> bool:
        """Report a death; True if it was the Sentinel's orderly stop ('casparian stop').

        Raises:
            CasparianError: the child says that another try cannot help.
        """
        name, code = death.child.plan.name, death.exit_code
        if death.child.state is State.WAITING:
            why = _last_words(death.child, "error: ") or told_exit(code)
            self.view.line(f"{name}: {why}; starting it again in {death.child.delay_s:g} s")
        elif code == 0:
            self.view.line(f"{name}: stopped")
            return death.child.plan.stage == SENTINEL
        else:
            raise _cannot_start(death)
        return False

    def _read_reports(self) -> None:
        try:
            self._unread += os.read(self._reports[0], 1 << 20)
        except BlockingIOError:
            return
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            try:
                report = json.loads(line)
            except ValueError:
                continue  # cut short when its Scout was killed; the next one reports anew
            self._scanned(report)

    def _scanned(self, report: Row) -> None:
        # A scan that failed says nothing of files still being written: there may be some.
        self.judge.scanned(
            int(report["root_id"]), int(report.get("unsettled", 1)), self.clock.now().mono
        )
        path = one_line(str(report["path"]))
        if len(_scan_news(report)) > 1:
            self.view.line(f"scout: {path}: {', '.join(_scan_news(report))}")
        for problem in report["problems"]:
            self._once(f"scout: {path}: {one_line(problem)}")

    def _show(self, view: View) -> None:
        self._last = view
        self.judge.counted(view.counts, view.asked)
        self.view.update(view.counts)
        self._tell_trials(view)
        self._tell_stall(view)
        if self._known_failed is None:
            # Failures of earlier runs are no news.
            old = max(0, len(view.failed) - max(0, self._failures(view)))
            self._known_failed = {row["id"] for row in view.failed[len(view.failed) - old :]}
        for row in reversed(view.failed):
            if row["id"] not in self._known_failed:
                self._known_failed.add(row["id"])
                self.view.line(_failure_line(row))

    def _tell_trials(self, view: View) -> None:
        for row in view.trials:
            if row["note"]:
                self._once(
                    one_line(
                        f"{row['plugin_name']} {row['version']}: {row['state']}: {row['note']}"
                    )
                )
        for row in view.plugins:
            stands = (row["plugin_name"], row["version"]), row["status"]
            if self._staged.get(stands[0]) and stands[1] != PluginStatus.STAGING:
                why = f": {last_line(row['validation_error'])}" if row["validation_error"] else ""
                name = f"{row['plugin_name']} {row['version']}"
                self.view.line(one_line(f"{name} is {stands[1].lower()}{why}"))
            self._staged[stands[0]] = stands[1] == PluginStatus.STAGING

    def _tell_stall(self, view: View) -> None:
        """Say why jobs wait, once nothing has moved for a while."""
        if view.counts != self._moved[1]:
            self._moved = (view.asked, view.counts)
        elif view.asked - self._moved[0] >= STALL_S and active(view.counts):
            for cause in view.causes:
                if cause.get("about") in STALL_CAUSES:
                    self._once(f"{one_line(str(cause['cause']))} -> {one_line(str(cause['cure']))}")

    def _failures(self, view: View) -> int:
        return view.counts.get(JobStatus.FAILED.value, 0) - self._failed_before

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.view.line(text)

    def _idle(self, view: View) -> bool:
        if any(row["tries"] < TRIES_AWAITED or not row["note"] for row in view.trials):
            return False
        roots = [int(row["id"]) for row in view.sources if row.get("active", True)]
        idle = self.judge.idle(roots, view.counts, view.asked) and not view.api_jobs
        return idle or self._all_blocked(view)

    def _all_blocked(self, view: View) -> bool:
        """Whether every job that is left belongs to a plugin that is paused or not active."""
        paused = {row["plugin_name"] for row in view.plugins if row.get("paused")}
        able = {row["plugin_name"] for row in view.plugins if row["status"] == PluginStatus.ACTIVE}
        paused |= {row["plugin_name"] for row in view.plugins} - able
        moving = (JobStatus.DISPATCHING, JobStatus.RUNNING, JobStatus.STAGED)
        if not paused or any(view.counts.get(status.value) for status in moving):
            return False
        if view.api_jobs.get("queued"):
            return False  # its jobs are not made yet
        roots = [int(row["id"]) for row in view.sources if row.get("active", True)]
        rest = {k: v for k, v in view.counts.items() if k != JobStatus.QUEUED.value}
        if not self.judge.idle(roots, rest, view.asked):
            return False
        limit = 1000
        queued = self.control.list_jobs(status=JobStatus.QUEUED.value, limit=limit)
        return len(queued) < limit and all(row["plugin_name"] in paused for row in queued)

    def _verdict(self, view: View) -> int:
        failures = self._failures(view)
        waiting = view.counts.get(JobStatus.QUEUED.value, 0)
        if waiting:
            paused = any(row.get("paused") for row in view.plugins)
            whose = (
                "paused plugins: 'casparian plugin resume NAME'"
                if paused
                else "plugins without an active version: 'casparian status' tells why"
            )
            self.view.line(f"{counted(waiting, 'job')} left of {whose}")
        if failures > 0:
            self.view.line(
                f"{counted(failures, 'job')} failed: 'casparian dead-letters' lists them"
            )
        return 1 if failures > 0 or waiting else 0

    def _out_of_time(self, view: View | None, exit_when_idle: bool) -> int:
        if not exit_when_idle:
            return 0
        self.view.line("the time is over and there is work left")
        for cause in view.causes if view else []:
            self.view.line(f"{one_line(str(cause['cause']))} -> {one_line(str(cause['cure']))}")
        return 1

    # -- ending -----------------------------------------------------------------------------

    def _drain(self, supervisor: Supervisor) -> None:
        asked = len(self.signals)
        self.view.line("draining; Ctrl-C again ends everything at once")
        supervisor.drain(hurry=lambda: len(self.signals) > max(asked, 1))

    def _summary(self, code: int) -> None:
        told = f": {jobs_line(self._last.counts) or 'no jobs'}" if self._last else ""
        self.view.line(f"stopped{told}" + (f" (exit code {code})" if code else ""))

    def _say(self, name: str, line: str) -> None:
        if not line.startswith(LAST_WORDS):
            self.view.line(f"{name}: {one_line(line)}")


def _scan_news(report: Row) -> list[str]:
    """What a scan has found, beginning with the number of files."""
    told = [counted(report.get("files", 0), "file")]
    told += [counted(report[k], n) for k, n in SCAN_NEWS if report.get(k)]
    return told + [
        f"{report[what]:,} {what}" for what in ("deleted", "renamed") if report.get(what)
    ]


def _failure_line(row: Row) -> str:
    return one_line(
        f"job {row['id']} FAILED: {row.get('plugin_name')} on {row.get('rel_path')}: "
        f"{row.get('reason')}: {last_line(row.get('error_message'))[:200]}"
    )


def _cannot_start(death: Death) -> CasparianError:
    child: Child = death.child
    message = _last_words(child, "error: ") or told_exit(death.exit_code)
    error = CasparianError(f"{child.plan.name}: {message}", hint=_last_words(child, "hint: "))
    error.exit_code = death.exit_code if 0 < death.exit_code < 128 else 1
    return error


def _last_words(child: Child, kind: str) -> str:
    told = [line.removeprefix(kind) for line in child.tail if line.startswith(kind)]
    return one_line(told[-1]) if told else ""
