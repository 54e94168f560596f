"""The plugin's side: a family of processes that the host starts as one.

    launcher   makes the namespaces, ends everything when the worker closes its end of a `life`
      init     process 1 of the new process namespace: reaps orphans; its end ends them all
        guest  confines itself, loads the plugin, answers RUN frames

Without a process namespace there is no init; the launcher then adopts orphans and ends them
itself. The guest's exit status reaches the worker over the `status` pipe, which foreign code
never holds.

Only the standard library is on the path until the sandbox is on: a wheel can carry files that
run as soon as site-packages is looked at.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from casparian_worker import sandbox
from casparian_worker.bridge import ErrorKind, FrameReader, Kind, pack_json
from casparian_worker.sandbox import libc


@dataclass(frozen=True, slots=True)
class Orders:
    """What the host passes on the command line, as JSON; nothing of it is secret.

    Attributes:
        bridge, status: inherited descriptors.
        lives: likewise; pipes at the end of any of which the family ends.
        site: site-packages folders of the plugin's environment.
        prefix: its root folder.
        confinement: sandbox.Confinement as JSON.
    """

    bridge: int
    lives: list[int]
    status: int
    site: list[str]
    prefix: str
    confinement: dict[str, Any]


def main() -> NoReturn:
    """Entry point of the launcher."""
    orders = Orders(**json.loads(sys.argv[1]))
    report: sandbox.Report = {"environment": sandbox.APPLIED}
    report |= sandbox.isolate()
    adopts = not report["pid_namespace"].startswith(sandbox.APPLIED)
    if adopts:
        libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    this = os.pidfd_open(os.getpid())
    child = os.fork()
    if child == 0:
        if adopts:
            _be_guest(orders, report, this)
        _be_init(orders, report, this)
    os.close(orders.bridge)
    status = supervise(child, orders.lives)
    if adopts:
        os.write(orders.status, b"%d\n" % status)
        end_descendants()
    os._exit(0)


def _be_init(orders: Orders, report: sandbox.Report, launcher: int) -> NoReturn:
    sandbox.die_with(launcher)
    this = os.pidfd_open(os.getpid())
    child = os.fork()
    if child == 0:
        os.close(launcher)
        _be_guest(orders, report, this)
    os.close(orders.bridge)
    for life in orders.lives:
        os.close(life)
    status = supervise(child, [])
    os.write(orders.status, b"%d\n" % status)
    os._exit(0)


def supervise(child: int, lives: list[int]) -> int:
    """Reap until `child` ends; kill it when one of `lives` reaches its end.

    Returns:
        The child's wait status.
    """
    wakes, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    poll = select.poll()
    poll.register(wakes, select.POLLIN)
    for life in lives:
        poll.register(life, select.POLLIN | select.POLLHUP)
    while True:
        status = _reap(child)
        if status is not None:
            return status
        for descriptor, _ in poll.poll():
            if descriptor == wakes:
                os.read(wakes, 4096)
            else:
                os.kill(child, signal.SIGKILL)
                poll.unregister(descriptor)


def _reap(child: int) -> int | None:
    """Collect whoever has ended; the status of `child` if it is among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return status
        if pid == 0:
            return None


def end_descendants() -> None:
    """Kill and reap every child, until the last orphan's orphan is gone."""
    own = os.getpid()
    with contextlib.suppress(ChildProcessError):
        while True:
            with open(f"/proc/{own}/task/{own}/children", encoding="ascii") as file:
                for pid in map(int, file.read().split()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def _be_guest(orders: Orders, report: sandbox.Report, parent: int) -> NoReturn:
    for descriptor in (*orders.lives, orders.status):
        os.close(descriptor)
    os.setsid()  # a signal to its own group must not mean the launcher too
    sock = socket.socket(fileno=orders.bridge)
    rules = sandbox.Confinement.from_json(orders.confinement)
    os.chdir(rules.writes[0])
    sandbox.confine(rules, report, parent)
    os.close(parent)
    problems = sandbox.unmet(report, rules.required)
    if problems:
        fail(
            sock,
            0,
            ErrorKind.SANDBOX,
            "the sandbox is not as strict as required: " + "; ".join(problems),
        )
    sock.sendall(pack_json(Kind.CONFINED, 0, {"report": report}))
    reader = FrameReader(sock)
    hello = reader.pop()
    while hello is None:
        if not reader.fill():
            os._exit(0)
        hello = reader.pop()
    _use_environment(orders)
    try:
        from casparian_worker import guest_plugin
    except ImportError as error:
        fail(sock, 0, ErrorKind.ENVIRONMENT, f"the plugin's environment lacks pyarrow: {error}")
    guest_plugin.serve(sock, reader, hello.json(), scratch=rules.writes[0])


def _use_environment(orders: Orders) -> None:
    import site

    sys.prefix = sys.exec_prefix = orders.prefix
    for folder in orders.site:
        site.addsitedir(folder)


def fail(sock: socket.socket, job: int, kind: str, message: str) -> NoReturn:
    """Report an error that ends this process."""
    sock.sendall(pack_json(Kind.ERROR, job, {"kind": kind, "message": message}))
    os._exit(0)
