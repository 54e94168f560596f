"""What a Sentinel does by the clock for the API: requests expire, and what is old goes."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from casparian_flow.db.api_storage import HOURS_MAX
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.retention import HistoryAges, HistoryCleaned, clean_history
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, SentinelUnreachableError
from casparian_flow.sentinel.api import ApiStore

log = logging.getLogger(__name__)

SWEEP_S: Final = 5.0
"""Between two looks for requests whose time is over."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what is kept; hours, None for ever.

    Attributes:
        every_s: between two clean-ups; the first is one such time after the start.
    """

    api_job_hours: float | None = None
    api_event_hours: float | None = None
    history: HistoryAges = field(default_factory=HistoryAges)
    every_s: float = 3600.0


class Housekeeping:
    """A thread that sweeps and cleans until closed.

    Args:
        store: the API's.
        on_ledger: runs a function in the ledger's thread and waits for its result.
    """

    def __init__(
        self,
        store: ApiStore,
        on_ledger: Callable[[Callable[[Ledger], Any]], Any],
        retention: Retention,
        clock: Clock,
        *,
        sweep_s: float = SWEEP_S,
    ) -> None:
        self._store = store
        self._on_ledger = on_ledger
        self._retention = retention
        self._clock = clock
        self._sweep_s = sweep_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        clean_at = self._clock.now().mono + self._retention.every_s
        while not self._stopping.wait(min(self._sweep_s, self._retention.every_s)):
            try:
                self._store.expire_approvals()
                if self._clock.now().mono >= clean_at:
                    clean_at = self._clock.now().mono + self._retention.every_s
                    self.clean()
            except SentinelUnreachableError:
                return  # the Sentinel is stopping
            except CasparianError as error:
                # The ledger takes no writes; the next round may do.
                log.warning("housekeeping put off: %s", error)

    def clean(self) -> None:
        """Delete what is old.

        Raises:
            LedgerError: it could not be written.
        """
        kept = self._retention
        ages = [HOURS_MAX if h is None else h for h in (kept.api_job_hours, kept.api_event_hours)]
        jobs, events = self._store.cleanup_old_data(*ages)
        now_us = self._clock.now().wall_us
        history: HistoryCleaned = self._on_ledger(
            lambda ledger: clean_history(ledger, kept.history, now_us)
        )
        if jobs or events or history != HistoryCleaned():
            log.info("clean-up: %d API jobs, %d API events, %s", jobs, events, history)
