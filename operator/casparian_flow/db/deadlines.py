"""Futures that are cancelled when their time is over, all by one thread."""

import heapq
import itertools
import threading
from concurrent.futures import Future
from typing import Any

from casparian_flow.domain.clock import Clock


class Deadlines:
    """Its thread lives only while there is something to wait for.

    Args:
        clock: its monotonic reading counts.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Future[Any]]] = []
        self._numbers = itertools.count()
        self._running = False

    def cancel_after(self, seconds: float, future: "Future[Any]") -> None:
        """Cancel the future then, if it is not done."""
        with self._changed:
            due = self._clock.now().mono + seconds
            heapq.heappush(self._due, (due, next(self._numbers), future))
            self._changed.notify()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="deadlines", daemon=True).start()

    def __len__(self) -> int:
        """How many futures are neither done nor overdue."""
        with self._changed:
            return sum(not future.done() for _, _, future in self._due)

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._due and self._due[0][2].done():
                    heapq.heappop(self._due)
                if not self._due:
                    self._running = False
                    return
                left = self._due[0][0] - self._clock.now().mono
                if left > 0:
                    self._changed.wait(left)
                    continue
                _, _, future = heapq.heappop(self._due)
            future.cancel()
