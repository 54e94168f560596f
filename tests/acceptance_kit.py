"""A user's folder and terminal: everything here is real.

What goes in: command lines, files and signals. What is observed: exit codes, both output streams,
files in sinks, rows in the ledger, processes. Nothing is replaced by a double. Times that a user
would wait for (scan interval, settle time, delays of retries) are set short in the configuration.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow.cli.app import run as run_cli
from casparian_flow.config import load_settings
from casparian_flow.services.trust_file import ensure_own_key

REPOSITORY = Path(__file__).parents[1]
PLUGINS = REPOSITORY / "examples" / "plugins"
SNIPPETS = REPOSITORY / "tests" / "acceptance" / "snippets"
CASPARIAN = Path(sys.executable).with_name("casparian")
PATIENCE_S = 60.0

CONFIG = """\
[database]
db_location = "{database}"

[sentinel]
bind_address = "tcp://127.0.0.1:{port}"
heartbeat_seconds = 0.5
lease_ttl_seconds = 5
retry_base_seconds = 0.2

[worker]
slots = 1
drain_seconds = 20

[scout]
interval_seconds = 0.5
settle_seconds = 0.2
"""

SALES = """\
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow.csv

MANIFEST = PluginMetadata(pattern="*.csv", topic="sales_data", subscriptions=["csv"])

class Handler(BasePlugin):
    def execute(self, file_path: str):
        print("reading", file_path)
        self.publish("sales_data", pyarrow.csv.read_csv(file_path))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Until `condition` gives something true; returns that."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.1)
    return found


def family(pid: int) -> list[psutil.Process]:
    """A process and everything it has started."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@dataclass
class Running:
    """A command in the background, its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def finish(self, number: int = signal.SIGINT, timeout_s: float = PATIENCE_S) -> int:
        """Send a signal and wait; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=timeout_s)


@dataclass
class Flow:
    """One user's folder with a configuration of its own."""

    folder: Path
    port: int
    database: str = "casparian_flow.duckdb"
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def inbox(self) -> Path:
        return self.folder / "inbox"

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(
        self, *argv: str, code: int | None = 0, timeout_s: float = 90.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `casparian` and check its exit code."""
        return self.run_command([str(CASPARIAN), *argv], code=code, timeout_s=timeout_s)

    def run_command(
        self, argv: list[str], *, code: int | None = 0, timeout_s: float = 90.0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert code is None or done.returncode == code, (argv, done)
        return done

    def json(self, *argv: str, code: int = 0) -> Any:
        """What `casparian … -o json` prints; it must be JSON and nothing else.

        The command runs in this process, which spares most of the seconds that a suite of
        hundreds of commands would spend on starting Python. `run` is the real thing.
        """
        out, err = io.StringIO(), io.StringIO()
        config = str(self.folder / "global_config.toml")
        with chdir(self.folder), redirect_stdout(out), redirect_stderr(err):
            found = run_cli(["--config", config, *argv, "-o", "json"])
        assert found == code, (argv, found, out.getvalue(), err.getvalue())
        return json.loads(out.getvalue())

    def publish(self, name: str, source: str, version: str = "1.0.0") -> None:
        file = self.write(f"plugins/{name}.py", source)
        self.run("publish", str(file), "--version", version)

    @contextmanager
    def background(self, argv: list[str], cwd: Path | None = None) -> Iterator[Running]:
        log = self.folder / f"background-{len(list(self.folder.glob('background-*')))}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                argv,
                cwd=cwd or self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        members = []
        try:
            yield Running(process, log)
        finally:
            members = family(process.pid)
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=PATIENCE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for left in alive(members):
                left.kill()

    @contextmanager
    def start(self, *argv: str) -> Iterator[Running]:
        """`casparian start` in the background, ready for commands."""
        with self.background([str(CASPARIAN), "start", *argv]) as running:
            wait_for(
                "casparian start to be ready",
                lambda: "Ctrl-C drains" in running.output or running.process.poll() is not None,
            )
            assert running.process.poll() is None, running.output
            yield running

    def work_off(self, *argv: str, code: int = 0) -> str:
        """`casparian start --exit-when-idle`; returns what it said."""
        done = self.run("start", "--exit-when-idle", "--timeout", "80", *argv, code=code)
        return done.stdout + done.stderr

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.json("status")["jobs"]
        return {status: n for status, n in counts.items() if n}

    def table(self, folder: str) -> pa.Table:
        """All rows below output/`folder`, in the order of the files' names."""
        paths = sorted((self.folder / "output" / folder).glob("*.parquet"))
        return pa.concat_tables([pq.read_table(p) for p in paths], promote_options="default")


def make_flow(folder: Path, database: str = "casparian_flow.duckdb") -> Flow:
    folder.mkdir(exist_ok=True)
    flow = Flow(folder, free_port(), database)
    for name in list(flow.environment):
        if name.startswith("CASPARIAN_"):
            del flow.environment[name]
    config = flow.write("global_config.toml", CONFIG.format(database=database, port=flow.port))
    ensure_own_key(load_settings(config))
    flow.inbox.mkdir(exist_ok=True)
    return flow
