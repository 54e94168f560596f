"""The control plane without a Sentinel: the same operations on a ledger opened in this process.

A thread turns the core, as the Sentinel's loop does, only that no worker is there to send to.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from casparian_flow.db.ledger import MEMORY_LIMIT_MB, Ledger
from casparian_flow.db.writer import LedgerThread
from casparian_flow.domain.clock import Clock, SystemClock, system_random
from casparian_flow.domain.records import Limits
from casparian_flow.sentinel.broker import Broker, BrokerConfig
from casparian_flow.sentinel.control_plane import ControlPlane
from casparian_flow.sentinel.core import SentinelCore
from casparian_flow.sentinel.events import Event
from casparian_flow.sentinel.loop import CoreLoop
from casparian_flow.trust.rules import TrustSource, nobody

TURN_S = 0.5
"""Between turns that nothing asked for."""
START_POLL_S = 0.005


class LocalControl(ControlPlane):
    """ControlApi on a ledger that nobody else has open. Close it, or use it in a `with`.

    Args:
        ledger: closed with this object.
        trust: the rules by which deploys are judged.
        trials: whether a deployed version waits for the trial by a Sentinel's worker.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Clock | None = None,
        limits: Limits | None = None,
        trust: TrustSource = nobody,
        trials: bool = True,
    ) -> None:
        clock = clock or SystemClock()
        ledger.limits = limits or ledger.limits
        self._changed = threading.Event()
        self._closing = False
        self._writer = LedgerThread(ledger, self._changed.set)
        core: SentinelCore[Ledger] = SentinelCore(
            self._writer, lambda: Broker(BrokerConfig(), system_random()), clock
        )
        loop = CoreLoop(core, self._writer, self._changed.set)
        super().__init__(
            loop, database=ledger.path or ":memory:", clock=clock, trust=trust, trials=trials
        )
        self._thread = threading.Thread(target=self._turn, name="local-control", daemon=True)
        core.start()
        self._thread.start()

    @classmethod
    def open(
        cls,
        database: str | Path,
        *,
        clock: Clock | None = None,
        memory_limit_mb: int = MEMORY_LIMIT_MB,
        trust: TrustSource = nobody,
        trials: bool = True,
    ) -> Self:
        """Raises:
        LedgerLockedError: another process has the ledger open.
        LedgerError: it cannot be used.
        """
        clock = clock or SystemClock()
        ledger = Ledger.open(Path(database), clock=clock, memory_limit_mb=memory_limit_mb)
        return cls(ledger, clock=clock, trust=trust, trials=trials)

    def _turn(self) -> None:
        try:
            while not self._closing:
                self._changed.wait(self._patience_s())
                self._changed.clear()
                # No worker is connected, so there is nobody to send to.
                self._loop.turn()
        finally:
            # Also after a bug in a turn: nobody may wait for an answer that cannot come.
            self._loop.close()

    def _patience_s(self) -> float:
        wakeup = self._loop.core.wakeup
        left = TURN_S if wakeup is None else wakeup - self._clock.now().mono
        return min(max(left, 0.0), TURN_S)

    def _command(self, make: Callable[[Future[dict[str, Any]]], Event]) -> dict[str, Any]:
        self._await_broker()
        return super()._command(make)

    def _await_broker(self) -> None:
        """A broker that is still being restored from the ledger knows no job yet."""
        while True:
            ready, problem = self._look(lambda core: (core.ready, core.problem))
            if ready:
                return
            if problem is not None:
                raise problem
            threading.Event().wait(START_POLL_S)

    def close(self) -> None:
        """Let what was asked for become durable, then close the ledger; harmless when repeated."""
        if self._closing:
            return
        self._closing = True
        self._changed.set()
        self._thread.join()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
