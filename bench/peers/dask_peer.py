"""dask.distributed: client, scheduler and two workers, each a process of its own, as ours are.

Everything is in memory: nothing of it survives a crash.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import distributed

from bench import processes
from bench.harness import Stopwatch, Values, check

NAME = "dask.distributed"
_dask: Any = distributed
"""Most of it is not annotated."""


def noop(number: int) -> int:
    """The task; its result proves that it ran."""
    return number


class Cluster:
    """Started by dask's own commands; use it as a context manager."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        address = f"tcp://127.0.0.1:{processes.free_port()}"
        dask = [processes.PYTHON, "-m", "dask"]
        log = folder / "dask.log"
        self._stack = ExitStack()
        self._stack.enter_context(
            processes.running(
                [*dask, "scheduler", "--host", address, "--no-dashboard"],
                log,
            )
        )
        for _ in range(workers):
            options = ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
            self._stack.enter_context(
                processes.running(
                    [*dask, "worker", address, *options, "--local-directory", str(folder)], log
                )
            )
        self.client: Any = self._stack.enter_context(_dask.Client(address, timeout=60))
        self.client.wait_for_workers(workers, timeout=60)

    def map_noops(self, count: int) -> Values:
        """Submit `count` tasks at once and wait until all are finished."""
        with Stopwatch() as watch:
            futures = self.client.map(noop, range(count), pure=False)
            _dask.wait(futures)
        check(self.client.gather(futures) == list(range(count)), "dask: every task ran")
        del futures
        return {"jobs/s": count / watch.seconds}

    def latencies_ms(self, count: int) -> list[float]:
        """Time from submit to result, one task after another."""
        taken = []
        for number in range(count):
            began = time.perf_counter()
            result = self.client.submit(noop, number, pure=False).result()
            taken.append((time.perf_counter() - began) * 1e3)
            check(result == number, "dask: the result is the task's")
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
