"""Wakes a poll loop from another thread or from a signal handler."""

import contextlib
import socket


class Waker:
    """A file descriptor that is readable after `wake`, until `clear`.

    What is announced must be in place before `wake`; the loop calls `clear` before it looks.
    Without a lock, so that a signal handler may call `wake` while its own thread is in `clear`:
    a wake that is skipped because the flag is still up comes before the flag goes down, and so
    before the loop looks.
    """

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._raised = False

    def fileno(self) -> int:
        return self._receiver.fileno()

    def wake(self) -> None:
        if not self._raised:
            self._raised = True
            # Full: it is readable anyway. Closed: nobody polls any more.
            with contextlib.suppress(OSError):
                self._sender.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._receiver.recv(4096)
        self._raised = False

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()
