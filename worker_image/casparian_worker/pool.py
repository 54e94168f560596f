"""A few threads that carry out small tasks in the order given."""

import logging
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

log = logging.getLogger(__name__)

Task = Callable[[], None]


class Pool:
    """Threads for work that waits for disks, so that nothing else waits for it.

    How much is queued is bounded by whoever submits: a worker's credit.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> None:
        self._tasks.put(task)

    def close(self, timeout_s: float) -> None:
        """Let what is queued end, and wait for it at most `timeout_s` a thread."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:  # a bug in one task must not take the others' thread away
                log.exception("a task of the worker failed")
