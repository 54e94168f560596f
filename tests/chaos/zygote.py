"""Run as a script: imports everything once and forks a real service process per request.

Starting an interpreter and importing Arrow, DuckDB and pandas costs more than a second, which a
hundred kills would spend a hundred times. One JSON object per line comes in on the socket whose
descriptor is the only argument: `{argv, cwd, log, environment, point, nth, met}`. Out go
`{pid: n}` for each, and `{died: n, status: n}` when one has ended.

It is the reaper of all that it started, directly or not: what outlives its parent becomes its
child, and so can be found.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from chaos.points import BY_NAME, arm

from casparian_flow.cli.app import run

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
UNEXPECTED = 70
LATE_IMPORTS = (
    "casparian_flow.engine.worker_client",
    "casparian_flow.sentinel.server",
    "casparian_flow.services.watch",
    "pandas",
)
"""What the services import when they start; DuckDB would import pandas even later."""


class Zygote:
    """Forks, reaps and reports, until the other end of its socket is closed."""

    def __init__(self, descriptor: int) -> None:
        self._libc = ctypes.CDLL(None)
        self._die_with_parent()
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._control = socket.socket(fileno=descriptor)
        self._wakes, self._wake = socket.socketpair()
        self._wakes.setblocking(False)
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._children: set[int] = set()

    def serve(self) -> None:
        self._say(pid=os.getpid())
        pending = b""
        while True:
            ready, _, _ = select.select([self._control, self._wakes], [], [])
            if self._wakes in ready:
                self._wakes.recv(4096)
                self._reap()
            if self._control not in ready:
                continue
            chunk = self._control.recv(65_536)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._fork(json.loads(line))

    def _fork(self, order: dict[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            code = UNEXPECTED
            try:
                code = self._child(order)
            finally:
                os._exit(code)
        self._children.add(pid)
        self._say(pid=pid)

    def _child(self, order: dict[str, Any]) -> int:
        self._die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for own in (self._control, self._wakes, self._wake):
            own.close()
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["cwd"])
        if order["point"]:
            arm(BY_NAME[order["point"]], order["nth"], Path(order["met"]))
        return run(order["argv"])

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._children:
                self._children.discard(pid)
                self._say(died=pid, status=os.waitstatus_to_exitcode(status))

    def _say(self, **facts: int) -> None:
        self._control.sendall(json.dumps(facts).encode() + b"\n")

    def _die_with_parent(self) -> None:
        self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    for name in LATE_IMPORTS:
        import_module(name)
    Zygote(int(sys.argv[1])).serve()
