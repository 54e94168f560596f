"""Hashing many files on a few threads, in bounded batches."""

import errno
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.paths import text_to_path
from casparian_flow.domain.signature import Signature
from casparian_flow.services.hashing import BLOCK_BYTES, ChangedError, Reading, read_file

THREADS_MAX = 4
"""Hashing releases the interpreter lock; beyond a few threads a disk gains nothing."""
BATCH_FILES = 64
BATCH_BYTES = 8 << 20
"""A task is as many files as fit both: handing tiny files over one by one costs more than
reading them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that has to be read.

    Attributes:
        path: relative to the root, text.
        row: of `Known`, NO_ROW for a new file.
        signature: as last seen.
    """

    path: str
    row: int
    signature: Signature


Outcome = tuple[Candidate, Reading | OSError | ChangedError]


class Hasher:
    """A pool of hashing threads for one source root; use it as a context manager."""

    def __init__(self, root: str, clock: Clock, threads: int = 0) -> None:
        count = threads or min(THREADS_MAX, os.cpu_count() or 1)
        self._root = root.rstrip("/")
        self._clock = clock
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="hash")
        self._in_flight_max = 2 * count + 2
        self._running: deque[Future[list[Outcome]]] = deque()
        self._batch: list[Candidate] = []
        self._batch_bytes = 0
        self._buffers = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def path(self, relative: str) -> str:
        """The path of a file for the operating system."""
        return f"{self._root}/{text_to_path(relative)}"

    def add(self, candidate: Candidate) -> Iterator[Outcome]:
        """Hand a file over; yields what has been finished, and waits while too much is under way.

        The iterator must be exhausted.
        """
        self._batch.append(candidate)
        self._batch_bytes += candidate.signature[2]
        if len(self._batch) >= BATCH_FILES or self._batch_bytes >= BATCH_BYTES:
            self._submit()
        while self._running and (
            len(self._running) > self._in_flight_max or self._running[0].done()
        ):
            yield from self._running.popleft().result()

    def drain(self) -> Iterator[Outcome]:
        """Finish everything handed over."""
        self._submit()
        while self._running:
            yield from self._running.popleft().result()

    def _submit(self) -> None:
        if self._batch:
            self._running.append(self._pool.submit(self._read_all, self._batch))
            self._batch, self._batch_bytes = [], 0

    def _read_all(self, batch: Sequence[Candidate]) -> list[Outcome]:
        buffer = getattr(self._buffers, "block", None)
        if buffer is None:
            buffer = self._buffers.block = bytearray(BLOCK_BYTES)
        return [(candidate, self._read(candidate, buffer)) for candidate in batch]

    def _read(self, candidate: Candidate, buffer: bytearray) -> Reading | OSError | ChangedError:
        try:
            return read_file(self.path(candidate.path), self._clock, buffer)
        except ChangedError as error:
            return error
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENXIO}:
                # A link or a socket took its place since the walk.
                return ChangedError(candidate.path)
            return error
