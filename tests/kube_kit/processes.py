"""Plain server processes that end with whoever started them."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

STOP_S = 10.0


@dataclass
class Process:
    """A running server; its output is in `log`."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def stop(self, *, hard: bool = False) -> None:
        """End it, by SIGKILL at once if `hard`, or if it takes more than 10 s."""
        if self.alive:
            self.popen.send_signal(signal.SIGKILL if hard else signal.SIGTERM)
        try:
            self.popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


def start(name: str, argv: Sequence[str | Path], folder: Path) -> Process:
    """Start a server that the kernel ends when the thread that called this ends."""
    tied = [setpriv, "--pdeathsig", "KILL", "--"] if (setpriv := shutil.which("setpriv")) else []
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        popen = subprocess.Popen(
            [os.fspath(part) for part in (*tied, *argv)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            # Not stopped by the Ctrl-C that is meant for the tests: they stop it in order.
            start_new_session=True,
        )
    return Process(name, popen, log)


def await_ready(process: Process, ready: Callable[[], bool], seconds: float) -> None:
    """Wait until `ready` says so.

    Raises:
        ServerFailedError: the process has ended, or the time is over.
    """
    end = time.monotonic() + seconds
    while not ready():
        if not process.alive:
            raise ServerFailedError(process, f"ended with status {process.popen.returncode}")
        if time.monotonic() > end:
            raise ServerFailedError(process, f"not ready within {seconds:.0f} s")
        time.sleep(0.05)


class ServerFailedError(Exception):
    """A server did not start; the text has the end of its log."""

    def __init__(self, process: Process, what: str) -> None:
        text = process.log.read_text(errors="replace")
        super().__init__(f"{process.name} {what}\n{text[-3000:]}")
        self.port_taken = "address already in use" in text


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listened on a moment ago, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
