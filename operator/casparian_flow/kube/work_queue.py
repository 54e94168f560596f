"""Keys that wait to be worked on: each at most once, never twice at the same time."""

import heapq
import threading
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from casparian_flow.domain.clock import Clock

K = TypeVar("K", bound=Hashable)
RETRY_BASE_S = 0.5
RETRY_MAX_S = 30.0


class WorkQueue(Generic[K]):
    """For any number of threads.

    A key that is added while it is worked on is worked on once more after that.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._ready: deque[K] = deque()
        self._wanted: set[K] = set()
        self._busy: set[K] = set()
        self._later: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._serial = 0
        self._closed = False

    def add(self, key: K, delay_s: float = 0.0) -> None:
        """Work on this, at once or after a while; the earliest of several wishes counts."""
        with self._changed:
            if delay_s > 0:
                self._add_later(key, delay_s)
            else:
                self._add(key)
            self._changed.notify()

    def _add(self, key: K) -> None:
        self._due.pop(key, None)
        if key in self._wanted:
            return
        self._wanted.add(key)
        if key not in self._busy:
            self._ready.append(key)

    def _add_later(self, key: K, delay_s: float) -> None:
        due = self._clock.now().mono + delay_s
        if key in self._wanted or self._due.get(key, due) < due:
            return
        self._due[key] = due
        self._serial += 1
        heapq.heappush(self._later, (due, self._serial, key))

    def take(self) -> K | None:
        """The next key, once there is one; None when the queue is closed. Say `done` for it."""
        with self._changed:
            while not self._closed:
                patience = self._promote()
                if self._ready:
                    key = self._ready.popleft()
                    self._wanted.discard(key)
                    self._busy.add(key)
                    return key
                self._changed.wait(patience)
            return None

    def _promote(self) -> float | None:
        """Make ready what is due; returns the seconds until more is."""
        now = self._clock.now().mono
        while self._later:
            due, _, key = self._later[0]
            if self._due.get(key) != due:
                heapq.heappop(self._later)  # has been worked on since, or is due earlier
            elif due <= now:
                heapq.heappop(self._later)
                self._add(key)
            else:
                return due - now
        return None

    def done(self, key: K, *, failed: bool = False) -> None:
        """A key that was taken has been worked on; after a failure it comes again, later each
        time."""
        with self._changed:
            self._busy.discard(key)
            if failed:
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                delay = min(RETRY_MAX_S, RETRY_BASE_S * 2 ** min(failures - 1, 10))
                self._add_later(key, delay)
            else:
                self._failures.pop(key, None)
            if key in self._wanted:
                self._ready.append(key)
            self._changed.notify()

    def idle(self) -> bool:
        """Whether nothing is ready or under way; what waits for its time does not count."""
        with self._changed:
            self._promote()
            return not (self._ready or self._busy)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
