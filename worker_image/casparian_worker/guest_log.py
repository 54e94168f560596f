"""What the plugin prints, job by job: of each only the last bytes are kept."""

import os
import re
import threading

_MARK = re.compile(rb"\x1eCASPARIAN (\d{1,10})\x1e\n")
_MARK_BYTES_MAX = 24
_READ_BYTES = 1024 * 1024
_READS_MAX = 64
_JOBS_MAX = 128


class _Tail:
    """The last `limit` bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = bytearray()
        self._dropped = 0

    def add(self, data: bytes) -> None:
        excess = len(data) - self._limit
        if excess > 0:
            self._dropped += excess
            data = data[excess:]
        self._bytes += data
        if len(self._bytes) > 2 * self._limit:
            self._cut()

    def _cut(self) -> None:
        excess = len(self._bytes) - self._limit
        if excess > 0:
            del self._bytes[:excess]
            self._dropped += excess

    def text(self) -> str:
        self._cut()
        note = f"[{self._dropped} bytes before this were not kept]\n" if self._dropped else ""
        return note + self._bytes.decode("utf-8", "replace")


class GuestLog:
    """Reads the process's stdout and stderr from a pipe and keeps a tail for each job.

    The guest writes a mark before each job. A plugin could forge one and so misplace its own
    lines, nothing else. Safe for several threads.
    """

    def __init__(self, pipe: int, limit: int) -> None:
        self._pipe = pipe
        self._limit = limit
        self._lock = threading.Lock()
        self._carry = b""
        self._tails: dict[int, _Tail] = {0: _Tail(limit)}
        self._job = 0
        self.closed = False
        os.set_blocking(pipe, False)

    def drain(self) -> None:
        """Take what lies in the pipe, without waiting; sets `closed` at its end."""
        with self._lock:
            for _ in range(_READS_MAX):
                if self.closed:
                    return
                try:
                    data = os.read(self._pipe, _READ_BYTES)
                except BlockingIOError:
                    return
                if not data:
                    self.closed = True
                    os.close(self._pipe)
                    self._current().add(self._carry)
                    self._carry = b""
                    return
                self._feed(data)

    def take(self, job: int) -> str:
        """The job's tail, which is forgotten then. Job 0 is the time before the first."""
        self.drain()
        with self._lock:
            if job == self._job and self._carry:
                self._current().add(self._carry)
                self._carry = b""
            tail = self._tails.pop(job, None)
            return "" if tail is None else tail.text()

    def _current(self) -> _Tail:
        return self._tails.setdefault(self._job, _Tail(self._limit))

    def _feed(self, data: bytes) -> None:
        data = self._carry + data if self._carry else data
        while (mark := _MARK.search(data)) is not None:
            self._current().add(data[: mark.start()])
            self._job = int(mark[1])
            data = data[mark.end() :]
            while len(self._tails) > _JOBS_MAX:
                del self._tails[next(iter(self._tails))]
        begin = data.rfind(b"\x1e", max(0, len(data) - _MARK_BYTES_MAX))
        cut = len(data) if begin < 0 else begin
        self._carry = data[cut:]
        self._current().add(data[:cut])
