"""Progress on a terminal; plain lines, and few of them, elsewhere."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

import click

from casparian_flow.cli.output import one_line
from casparian_flow.cli.status import jobs_line
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.jobs import TERMINAL

PLAIN_EVERY_S = 5.0


class JobsView(Protocol):
    """What `casparian start` shows while it runs."""

    def line(self, text: str) -> None:
        """Print a line above the progress."""

    def update(self, counts: dict[str, int]) -> None:
        """Show these counts of jobs by status."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def ended(counts: dict[str, int]) -> int:
    """Jobs that will not change any more."""
    return sum(counts.get(status.value, 0) for status in TERMINAL)


def live() -> bool:
    """Whether somebody watches: a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


class PlainView:
    """One line whenever the counts have changed, at most every few seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._shown = ""
        self._next = 0.0

    def line(self, text: str) -> None:
        click.echo(text, err=True)

    def update(self, counts: dict[str, int]) -> None:
        text = jobs_line(counts)
        now = self._clock.now().mono
        if text and text != self._shown and now >= self._next:
            self._shown, self._next = text, now + PLAIN_EVERY_S
            self.line(f"jobs: {text}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class LiveView:
    """A bar that grows with the jobs that have ended, and their counts beside it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(stderr=True, no_color="NO_COLOR" in os.environ, highlight=False)
        self._progress = Progress(
            TextColumn("jobs"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._console,
            transient=False,
        )
        self._task = self._progress.add_task("jobs", total=None, detail="waiting for files")

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, counts: dict[str, int]) -> None:
        total = sum(counts.values())
        if total:
            self._progress.update(
                self._task, total=total, completed=ended(counts), detail=jobs_line(counts)
            )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


def jobs_view(clock: Clock) -> JobsView:
    return LiveView() if live() else PlainView(clock)


@contextmanager
def scan_progress(path: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, total) for a scan's progress; None where nobody watches."""
    if not live():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True, no_color="NO_COLOR" in os.environ),
        transient=True,
    ) as progress:
        task = progress.add_task(one_line(path), total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        yield advance
