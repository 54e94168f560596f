"""Service processes that can be started cheaply, stopped, continued and killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

TESTS = Path(__file__).parents[1]
START_S = 60.0


@dataclass
class Service:
    """One process; `status` is its exit code once it has ended (negative: a signal)."""

    role: str
    pid: int
    log: Path
    status: int | None = None

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        # The zygote may have reaped it a moment ago, which is known only with the next message.
        if self.alive and psutil.pid_exists(self.pid):
            os.kill(self.pid, number)


@dataclass
class Zygote:
    """See zygote.py. Not for several threads."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    environment: dict[str, str]
    services: dict[int, Service] = field(default_factory=dict)
    _unread: bytes = b""
    _born: list[int] = field(default_factory=list)

    def start(
        self,
        role: str,
        argv: Sequence[str],
        folder: Path,
        *,
        point: str = "",
        nth: int = 1,
    ) -> Service:
        """Run `casparian ARGV` in `folder`; with `point`, until it meets that point."""
        log = folder / "logs" / f"{len(self.services):04}-{role}.log"
        log.parent.mkdir(exist_ok=True)
        order = {
            "argv": list(argv),
            "cwd": str(folder),
            "log": str(log),
            "environment": self.environment,
            "point": point,
            "nth": nth,
            "met": str(folder / "met.log"),
        }
        self.control.sendall(json.dumps(order).encode() + b"\n")
        while not self._born:
            self._hear(START_S)
        service = Service(role, self._born.pop(), log)
        self.services[service.pid] = service
        return service

    def poll(self) -> None:
        """Take note of who has ended."""
        while self._hear(0.0):
            pass

    def wait(self, service: Service, timeout_s: float) -> int | None:
        """Its exit code, or None if it goes on."""
        while service.alive and self._hear(timeout_s):
            pass
        return service.status

    def family(self) -> list[psutil.Process]:
        """All services and what they have started; what outlived its parent is among them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def _hear(self, timeout_s: float) -> bool:
        self.control.settimeout(timeout_s)
        try:
            chunk = self.control.recv(65_536)
        except (TimeoutError, BlockingIOError):
            return False
        if not chunk:
            raise RuntimeError("the zygote has ended")
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return True

    def _take(self, news: dict[str, Any]) -> None:
        if "pid" in news:
            self._born.append(news["pid"])
        else:
            self.services[news["died"]].status = news["status"]


@contextmanager
def zygote() -> Iterator[Zygote]:
    """A zygote, and at the end nothing of what it started."""
    ours, theirs = socket.socketpair()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CASPARIAN_")}
    # Threads of a numeric library would be there before the fork.
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), *filter(None, [environment.get("PYTHONPATH")])]
    )
    with subprocess.Popen(
        [sys.executable, "-m", "chaos.zygote", str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        env=environment,
        cwd=TESTS,
    ) as process:
        theirs.close()
        found = Zygote(process, ours, environment)
        try:
            while not found._born:
                found._hear(START_S)
            found._born.clear()
            yield found
        finally:
            for member in found.family():
                try:
                    member.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            process.kill()
            ours.close()
