"""Starts real worker processes for tests and builds what a Sentinel sends them."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from scripted_sentinel import ScriptedSentinel
from signing_kit import KEY, SIGNER, WALL_US, signed

from casparian_flow.domain.outputs import SinkSpec
from casparian_flow.domain.records import Limits
from casparian_flow.protocol import messages as m
from casparian_flow.trust.keys import public_text
from casparian_worker.sinks.base import token_of_stage

ROWS_PLUGIN = """
import csv
from casparian_flow.sdk import BasePlugin

class Handler(BasePlugin):
    def execute(self, file_path):
        with open(file_path, newline="") as file:
            rows = [{"name": r["name"], "n": int(r["n"])} for r in csv.DictReader(file)]
        print("read", len(rows), "rows")
        self.publish("people", rows)
"""
SLOW_PLUGIN = """
import time
from casparian_flow.sdk import BasePlugin

class Handler(BasePlugin):
    def execute(self, file_path):
        seconds = float(open(file_path).read())
        time.sleep(seconds)
        self.publish("slept", [{"seconds": seconds}])
"""


def plugin_spec(
    source: str,
    sinks: Sequence[SinkSpec] = (),
    *,
    spec_id: str = "spec-1",
    limits: Limits | None = None,
) -> m.Plugin:
    bundle = signed(source, "demo", "1.2.3")
    return m.Plugin(
        spec_id, "demo", "1.2.3", bundle.artifact_hash, bundle.source, "", "", tuple(sinks), "{}",
        "params-1", limits or Limits(timeout_s=20.0), bundle.manifest_json,
        bundle.envelope.decode(), WALL_US,
    )  # fmt: skip


def dispatch_of(
    sentinel: ScriptedSentinel,
    job_id: int,
    path: Path,
    *,
    attempt: int = 1,
    spec_id: str = "spec-1",
    version_seq: int = 1,
) -> m.Dispatch:
    """A DISPATCH for the file as it now is."""
    stat = path.stat()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    signature = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    token = sentinel.token(job_id, attempt)
    return m.Dispatch(
        token, attempt, spec_id, "demo", str(path), 100 + job_id, 10 + job_id, digest, signature,
        (version_seq, 1, 0),
    )  # fmt: skip


@dataclass
class WorkerProcess:
    """A worker in a process of its own."""

    popen: "subprocess.Popen[bytes]"
    output: Path
    log: Path
    killed: bool = field(default=False)

    def stages(self) -> list[str]:
        folder = self.output / ".stage"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(name for name in names if token_of_stage(name))

    def files(self, pattern: str) -> list[Path]:
        return sorted(p for p in self.output.glob(pattern) if not p.name.startswith("."))

    def plugin_processes(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def worker_process(
    address: str,
    folder: Path,
    *options: str,
    name: str = "w1",
    within: Callable[[list[str]], list[str]] = list,
    **settings: str,
) -> Iterator[WorkerProcess]:
    """Run `python -m casparian_flow.engine.worker_client` in `folder`; killed at the end.

    Args:
        within: makes of its command one that runs it in a container.
        settings: further variables of its environment.
    """
    log = folder / f"{name}.log"
    environment = {
        **os.environ,
        "CASPARIAN_WORKER__SCRATCH": str(folder / "scratch"),
        "CASPARIAN_WORKER__CACHE_DIR": str(folder / "cache"),
        "CASPARIAN_TRUST__ALLOWED_SIGNERS": json.dumps([SIGNER]),
        "CASPARIAN_TRUST__KEYS": json.dumps({SIGNER: [{"public": public_text(KEY.public_key())}]}),
        "CASPARIAN_TRUST__GATEKEEPER": "off",
        **settings,
    }
    command = [
        sys.executable, "-m", "casparian_flow.engine.worker_client", "--connect", address,
        "--output", str(folder / "output"), "--worker-id", name, *options,
    ]  # fmt: skip
    if "--slots" not in options:
        command += ["--slots", "1"]
    with log.open("ab") as sink:
        popen = subprocess.Popen(
            within(command), stdout=sink, stderr=sink, cwd=folder, env=environment
        )
    worker = WorkerProcess(popen, folder / "output", log)
    try:
        yield worker
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait(10)
        print(worker.text())


def wait_until(condition: object, timeout_s: float = 10.0) -> None:
    """Poll a callable until it is true.

    Raises:
        TimeoutError: it never was.
    """
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} did not come true")
        time.sleep(0.02)
