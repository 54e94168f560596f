"""procrastinate on a local PostgreSQL: tasks deferred in one batch, two worker processes."""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

from bench import processes
from bench.harness import Stopwatch, Values, check

NAME = "procrastinate"
CONNECTION_VARIABLE = "BENCH_PROCRASTINATE"
CONCURRENCIES = (1, 4, 16)
"""Jobs under way at once in each of its workers; the best in a trial is taken."""
TRIAL_JOBS = 500
_LEFT = "SELECT EXISTS (SELECT 1 FROM procrastinate_jobs WHERE status IN ('todo', 'doing'))"


class Workers:
    """Its schema and two of its workers on a database; use it as a context manager."""

    def __init__(self, connection: str, folder: Path, concurrency: int) -> None:
        os.environ[CONNECTION_VARIABLE] = connection
        from bench.peers import procrastinate_tasks as tasks

        self._tasks: Any = tasks
        self._stack = ExitStack()
        self._database = self._stack.enter_context(psycopg.connect(connection, autocommit=True))
        self._stack.enter_context(tasks.sync_app.open())
        exists = self._one("SELECT to_regclass('procrastinate_jobs') IS NOT NULL")
        if not exists:
            tasks.sync_app.schema_manager.apply_schema()
        arguments = [processes.PYTHON, "-m", "bench.peers.procrastinate_tasks", str(concurrency)]
        for _ in range(2):
            self._stack.enter_context(
                processes.running(
                    arguments, folder / "procrastinate.log",
                    variables={CONNECTION_VARIABLE: connection},
                )
            )  # fmt: skip
        self.run(20)

    def run(self, count: int) -> Values:
        """Defer `count` tasks in one batch and wait until all are done."""
        self._database.execute("TRUNCATE procrastinate_jobs CASCADE")
        with Stopwatch() as watch:
            self._tasks.noop.batch_defer(*({} for _ in range(count)))
            while self._one(_LEFT):
                time.sleep(0.02)
        done = self._one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'")
        check(done == count, "procrastinate: every task succeeded")
        return {"jobs/s": count / watch.seconds}

    def _one(self, sql: str) -> Any:
        row = self._database.execute(sql).fetchone()
        assert row is not None
        return row[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def best_concurrency(connection: str, folder: Path) -> int:
    """The concurrency that does a short trial fastest."""
    speeds = {}
    for concurrency in CONCURRENCIES:
        with Workers(connection, folder, concurrency) as workers:
            speeds[concurrency] = workers.run(TRIAL_JOBS)["jobs/s"]
        told = f"{speeds[concurrency]:,.0f} jobs/s"
        print(f"    procrastinate, concurrency {concurrency}: {told}", file=sys.stderr)
    return max(speeds, key=lambda concurrency: speeds[concurrency])
