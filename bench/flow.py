"""Casparian Flow as rows use it: a Sentinel process, worker processes, the control socket.

Every process is the real one (`casparian sentinel`, `casparian worker`), except that rows about
wire and ledger alone use noop_worker.py: the same worker without plugin processes.
"""

import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from bench import processes
from bench.harness import check
from casparian_flow.domain.errors import SentinelUnreachableError
from casparian_flow.sentinel.control import ControlClient, remote
from casparian_flow.sentinel.paths import control_address

POLL_S = 0.05
"""Between looks at the workers' counts; they are in memory, so looking costs the ledger nothing."""
WorkerKind = Literal["noop", "plugin"]
_CONFIG = """\
[database]
db_location = "{database}"

[sentinel]
bind_address = "{address}"

[worker]
output_root = "{folder}/output"
scratch = "{folder}/scratch"
cache_dir = "{folder}/cache"

[trust]
allow_unsigned = true
gatekeeper = "off"

[logging]
level = "WARNING"
"""


class Flow:
    """One ledger with its processes; use it as a context manager.

    Args:
        database: a closed ledger, or a path for a new one.
        folder: for outputs, scratch files and logs.
    """

    def __init__(self, database: Path, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.address = f"tcp://127.0.0.1:{processes.free_port()}"
        self.sentinel: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "config.toml"
        self._config.write_text(
            _CONFIG.format(database=database, address=self.address, folder=folder)
        )
        self._stack = ExitStack()
        self.control: ControlClient = remote(control_address(database))
        self._stack.callback(self.control.close)

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def start(self, workers: int, kind: WorkerKind = "plugin") -> Self:
        """Start the Sentinel and `workers` workers of one slot each, and wait for them."""
        self.start_sentinel()
        self.wait_ready()
        for _ in range(workers):
            self.start_worker(kind)
        processes.wait_for("the workers", lambda: len(self.control.list_workers()) == workers)
        return self

    def start_sentinel(self) -> "subprocess.Popen[bytes]":
        self.sentinel = self._run(["-m", "casparian_flow.cli", *self._options, "sentinel"])
        return self.sentinel

    def wait_ready(self) -> None:
        """Wait until the Sentinel answers on its control socket."""
        processes.wait_for("the Sentinel", self._answers)

    def start_worker(self, kind: WorkerKind) -> "subprocess.Popen[bytes]":
        if kind == "noop":
            worker = self._run(["-m", "bench.noop_worker", self.address])
        else:
            worker = self._run(
                ["-m", "casparian_flow.cli", *self._options, "worker", "--slots", "1"]
            )
        self.workers.append(worker)
        return worker

    def await_jobs(self, count: int) -> None:
        """Wait until `count` jobs of this Sentinel are COMPLETED, durably."""
        processes.wait_for(
            "the jobs",
            lambda: sum(row["done"] for row in self.control.list_workers()) >= count,
            poll_s=POLL_S,
            timeout_s=1800,
        )
        processes.wait_for("the ledger", lambda: self.counts().get("COMPLETED", 0) >= count)

    def counts(self) -> dict[str, int]:
        """Jobs by status, as the ledger has them."""
        counts: dict[str, int] = self.control.status()["jobs"]
        return counts

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def _options(self) -> list[str]:
        return ["--config", str(self._config)]

    def _run(self, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
        process = processes.start([processes.PYTHON, *arguments], self.folder / "log")
        self._stack.callback(processes.stop, process)
        return process

    def _answers(self) -> bool:
        assert self.sentinel is not None
        check(self.sentinel.poll() is None, f"the Sentinel ended:\n{self.log()}")
        try:
            self.control.ping()
        except SentinelUnreachableError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def only_completed(counts: dict[str, Any], count: int) -> bool:
    """Whether `count` jobs exist and every one is COMPLETED."""
    return {status: n for status, n in counts.items() if n} == {"COMPLETED": count}
