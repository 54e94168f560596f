"""Carries out the API's jobs in a Sentinel: db/api_begin.py and db/api_runs.py say what, this
thread says when.

    approved runs without a job ─ make it ─> queued jobs ─ begin ─> running ones ─ collect ─> over
                                                  └ go on, slice by slice, to make their tasks
                                                 cancelled ones ─ cancel what they began

All there is to know is in the ledger, so a restart goes on where the last process was. The thread
waits for news, looks often while jobs run, and now and then in any case.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, TypeVar

from casparian_flow.db import api_begin, api_runs
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, LedgerError, SentinelUnreachableError
from casparian_flow.domain.ids import JobId
from casparian_flow.sentinel import events as e
from casparian_flow.sentinel.loop import CoreLoop

log = logging.getLogger(__name__)

T = TypeVar("T")
BUSY_S: Final = 0.1
"""Between two looks while a job runs."""
IDLE_S: Final = 2.0
"""Between two looks while none does; news comes at once."""
REST: Final = 9.0
"""Rest after a look, in times of what it took, so that long lists leave the ledger to others."""
SLICES_MAX: Final = 10
"""Slices of one job's tasks in a turn, after which others have theirs."""
BY: Final = "its API job"


class ApiRunner:
    """A thread that works until closed.

    Args:
        loop: the Sentinel's, driven by another thread.
        cancel: cancels one job of the queue, also one that the broker has not read yet.
    """

    def __init__(
        self, loop: CoreLoop[Ledger], clock: Clock, cancel: Callable[[int], object]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._cancel = cancel
        self._news = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="api-runner", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do."""
        self._news.set()

    def close(self) -> None:
        self._closing = True
        self._news.set()
        self._thread.join()

    def _run(self) -> None:
        busy = True
        while not self._closing:
            began = self._clock.now().mono
            try:
                busy = self.turn()
            except SentinelUnreachableError:
                return  # the Sentinel is stopping
            except CasparianError as error:
                # The ledger takes no writes; the next round may do.
                log.warning("API jobs put off: %s", error)
            took = self._clock.now().mono - began
            self._news.wait(max(BUSY_S, min(REST * took, IDLE_S)) if busy else IDLE_S)
            self._news.clear()

    def turn(self) -> bool:
        """Do what is due; returns whether a job runs.

        Raises:
            LedgerError: something could not be read or written.
        """
        self._on_ledger(lambda ledger: api_runs.start_approved_runs(ledger, self._clock))
        for api_job_id in self._on_ledger(api_runs.waiting_jobs):
            self._or_give_up(api_job_id, partial(self._begin, api_job_id))
        for api_job_id in self._on_ledger(api_begin.unfinished):
            self._or_give_up(api_job_id, partial(self._go_on, api_job_id))
        running = self._on_ledger(api_runs.running_tasks)
        over = [
            self._or_give_up(api_job_id, partial(self._collect, api_job_id, tasks))
            for api_job_id, tasks in running.items()
        ]
        self._cancel_orphans()
        return not all(over)

    def _or_give_up(self, api_job_id: int, step: Callable[[], bool]) -> bool:
        """One step of a job, whose own fault must not hold up the others."""
        try:
            return step()
        except (LedgerError, SentinelUnreachableError):
            raise
        except CasparianError as error:
            log.error("API job %d cannot go on: %s", api_job_id, error)
            message = error.with_hint()
            self._on_ledger(
                lambda ledger: api_runs.give_up(ledger, self._clock, api_job_id, message)
            )
            return True

    def _on_ledger(self, fn: Callable[[Ledger], T]) -> T:
        return self._loop.call(fn).result()

    def _begin(self, api_job_id: int) -> bool:
        began = self._loop.enlist(
            lambda ledger: api_begin.begin(ledger, self._clock, api_job_id)
        ).result()
        log.info("API job %d %s", api_job_id, "began" if began else "did not begin")
        return not began

    def _go_on(self, api_job_id: int) -> bool:
        """Make some more tasks; the rest in the next turns, which follow at once."""
        for _ in range(SLICES_MAX):
            more = self._loop.enlist(
                lambda ledger: api_begin.go_on(ledger, self._clock, api_job_id)
            ).result()
            if not more or self._closing:
                return True
        self._news.set()
        return False

    def _collect(self, api_job_id: int, tasks: list[int]) -> bool:
        """Tell what has ended; returns whether the API job is over."""
        ended = self._on_ledger(lambda ledger: api_runs.ended_among(ledger, tasks))
        if tasks and not ended:
            return False
        for first in range(0, max(len(ended), 1), api_runs.TOLD_MAX):
            part = ended[first : first + api_runs.TOLD_MAX]
            if self._told(api_job_id, part):
                return True
        return False

    def _told(self, api_job_id: int, ended: list[int]) -> bool:
        return self._on_ledger(
            lambda ledger: api_runs.collect(ledger, self._clock, api_job_id, ended)
        )

    def _cancel_orphans(self) -> None:
        """End the jobs of API jobs that were cancelled, or stopped at their first failure."""
        orphans = self._on_ledger(api_runs.orphaned_tasks)
        for first in range(0, len(orphans), api_runs.TOLD_MAX):
            part = orphans[first : first + api_runs.TOLD_MAX]
            asked: dict[int, Future[dict[str, Any]]] = {
                n: self._loop.command(_cancel_of(n)) for n in part
            }
            for job_id, answer in asked.items():
                if answer.result()["outcome"] == "unknown":
                    self._cancel(job_id)
            self._on_ledger(partial(api_runs.forget_tasks, job_ids=part))


def _cancel_of(job_id: int) -> Callable[[Future[dict[str, Any]]], e.Event]:
    return lambda reply: e.Cancel(reply, JobId(job_id), BY)
