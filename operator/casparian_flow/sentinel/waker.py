"""Wakes a poll loop from another thread."""

import contextlib
import socket
import threading


class Waker:
    """A file descriptor that becomes readable when `wake` was called since the last `clear`.

    Calls between two clears cost one system call together. What is announced by `wake` must be in
    place before it; the loop clears before it looks.
    """

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._lock = threading.Lock()
        self._raised = False
        self._closed = False

    def fileno(self) -> int:
        return self._receiver.fileno()

    def wake(self) -> None:
        with self._lock:
            if not self._raised and not self._closed:
                self._raised = True
                self._sender.send(b"\0")

    def clear(self) -> None:
        with self._lock:
            self._raised = False
            with contextlib.suppress(BlockingIOError):
                self._receiver.recv(16)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._sender.close()
            self._receiver.close()
