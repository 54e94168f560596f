"""Events from the runner's threads to the wire's loop, and the byte that wakes it."""

import contextlib
import socket
from collections import deque

from casparian_worker.worker_events import Event


class Mailbox:
    """Many threads post, one loop drains. Bounded by what the state machine has handed out."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._signalled = False

    def fileno(self) -> int:
        """Readable when there is something to drain."""
        return self._reader.fileno()

    def post(self, event: Event) -> None:
        """Hand an event over; from any thread, and from signal handlers."""
        self._events.append(event)
        # Set only after the append, cleared only before the events are taken: none is missed.
        if not self._signalled:
            self._signalled = True
            # Full of wake-ups already, or closed because nobody listens any more.
            with contextlib.suppress(OSError):
                self._writer.send(b"\0")

    def drain(self) -> list[Event]:
        """Everything posted so far, in order."""
        # The byte may come later than its event; it is then taken by the next drain.
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        self._signalled = False
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
