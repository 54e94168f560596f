"""huey with SqliteHuey(fsync=True) and its own consumer, at the best of its settings.

Which setting is best depends on the machine, so a short trial of each comes first.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import processes
from bench.harness import Stopwatch, Values, check
from bench.peers import huey_tasks
from bench.workspace import fresh

NAME = "huey"
TRIAL_JOBS = 1_000
SETTINGS: tuple[tuple[str, ...], ...] = (
    ("-k", "thread", "-w", "1"),
    ("-k", "thread", "-w", "2"),
    ("-k", "process", "-w", "2"),
)
"""Kinds and numbers of its workers, none with more processes than ours."""
POLLING = ("-d", "0.001", "-m", "0.01", "-n", "-C", "-q")
"""Its fastest polling; neither periodic tasks nor health checks."""


def best_setting(folder: Path) -> tuple[str, ...]:
    """The setting that does a short trial fastest."""
    speeds = {setting: run(folder, TRIAL_JOBS, setting)["jobs/s"] for setting in SETTINGS}
    for setting, speed in speeds.items():
        print(f"    huey {' '.join(setting)}: {speed:,.0f} jobs/s", file=sys.stderr)
    return max(speeds, key=lambda setting: speeds[setting])


def run(folder: Path, count: int, setting: Sequence[str]) -> Values:
    """Enqueue `count` tasks one by one, its only way, while its consumer works on them."""
    with fresh(folder) as inner:
        done = inner / "done"
        done.touch()
        database = str(inner / "huey.db")
        queue, noop = huey_tasks.attach(database)
        command = [
            processes.PYTHON, "-m", "huey.bin.huey_consumer", "bench.peers.huey_tasks.queue",
            *setting, *POLLING,
        ]  # fmt: skip
        variables = {
            huey_tasks.DATABASE_VARIABLE: database,
            huey_tasks.DONE_VARIABLE: str(done),
        }
        with processes.running(command, inner / "log", variables=variables):
            noop()
            processes.wait_for("huey's consumer", lambda: done.stat().st_size == 1)
            with Stopwatch() as watch:
                for _ in range(count):
                    noop()
                while done.stat().st_size <= count:
                    time.sleep(0.005)
        check(done.stat().st_size == count + 1, "huey: every task ran once")
        queue.storage.close()
    return {"jobs/s": count / watch.seconds}
