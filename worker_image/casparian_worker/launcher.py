"""The launcher: process 1 of a pod's plugin container. It starts plugins for the worker beside it.

    python -m casparian_worker.launcher --socket /run/casparian/launcher.sock

The worker's container has the keys, the token and the sinks; this one has the plugin, and nothing
to steal. Which plugin runs, and how it is confined, the worker says (launch_line.py); its bridge,
its log and its life are descriptors that come from there, so that rows never pass through here.
The launcher sees the processes, which the worker does not: it holds them to their limits and tells
what they use. All of them together it keeps below the container's own memory limit, since the
kernel, once it is reached, may end the whole container.

One worker at a time, known by the user that the kernel names. When its connection ends, so do its
plugins. SIGTERM comes to both containers at once, and a worker that drains still needs its
plugins: the launcher stays until the worker has gone.
"""

import argparse
import logging
import os
import re
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from casparian_flow import __version__
from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.failures import Reason
from casparian_flow.logs import start_logging_from_environment
from casparian_worker import clearing
from casparian_worker import launch_line as line
from casparian_worker.guest_family import (
    LOOK_INTERVAL_S,
    Launch,
    Lines,
    LocalFamily,
    Usage,
    Verdict,
    children_of,
)
from casparian_worker.guest_kit import base_python, install_kit
from casparian_worker.sandbox import container_memory, libc

log = logging.getLogger("casparian_worker.launcher")

FOLDER = "casparian-plugins"
"""Below the scratch folder: what plugins write, gone with each of them."""
FAMILIES_MAX = 4_096
GRACE_S = 3.0
"""For a family to end by itself once its life is closed."""
RESERVE_BYTES_MIN = 96 << 20
"""Of the container's memory, for the launcher and for what grows between two looks; a tenth of it
if that is more."""
_BACKLOG = 8
_TOLD_BYTES = 1 << 20
"""Changes of memory below this are not reported."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PEER = struct.Struct("3i")


class Ward(threading.Thread):
    """One family, watched and reported until it is gone."""

    def __init__(
        self,
        number: int,
        launch: Launch,
        lines: Lines,
        sock: socket.socket,
        clock: Clock,
        looked: Callable[[], None],
        ended: Callable[["Ward"], None],
    ) -> None:
        """Start the family.

        Args:
            looked: called after each look at what it uses.

        Raises:
            OSError: it cannot be started, or its folder cannot be made.
        """
        super().__init__(name=f"family-{number}", daemon=True)
        self.number = number
        self._folder = launch.confinement.writes[0]
        self._sock = sock
        self._clock = clock
        self._looked = looked
        self._ended = ended
        self._told = Usage(0, 0)
        self._lock = threading.Lock()
        self._closed_at: float | None = None
        os.mkdir(self._folder, 0o700)
        life, self._life = os.pipe2(os.O_CLOEXEC)
        try:
            self.family = LocalFamily(launch, lines, self.judge, clock, more_lives=(life,))
        except BaseException:
            os.close(self._life)
            clearing.remove(self._folder)
            raise
        finally:
            os.close(life)

    def end(self) -> None:
        """Have it end; the thread sees to it."""
        with self._lock:
            if self._closed_at is None:
                self._closed_at = self._clock.now().mono
                os.close(self._life)

    @property
    def memory_bytes(self) -> int:
        """That it uses; 0 when it is ending already."""
        return 0 if self._closed_at is not None else self.family.usage.memory_bytes

    def tell_usage(self, *, waiting: bool = False) -> None:
        """Report what the family uses, if that has changed or somebody waits for it."""
        usage = self.family.usage
        grown = abs(usage.memory_bytes - self._told.memory_bytes) >= _TOLD_BYTES
        if waiting or grown or usage[1:] != self._told[1:]:
            self._told = usage
            # A worker that does not read must not keep anyone from looking.
            self._tell(line.Used(self.number, *usage), socket.MSG_DONTWAIT)

    def run(self) -> None:
        while not self.family.wait(LOOK_INTERVAL_S):
            self.family.look()
            self._looked()
            self.tell_usage()
            if self._closed_at is not None and self._clock.now().mono > self._closed_at + GRACE_S:
                self.family.kill()
        self.end()
        self._ended(self)
        clearing.remove(self._folder)
        self._tell(line.Ended(self.number))

    def judge(self, verdict: Verdict) -> None:
        """End it for breaking a limit."""
        self.end()
        self._tell(line.Judged(self.number, verdict.reason, verdict.message), socket.MSG_DONTWAIT)

    def _tell(self, message: line.Report, flags: int = 0) -> None:
        _send(self._sock, message, flags)


class Launcher:
    """See the module's text.

    Args:
        path: of the socket, made here.
        scratch: folder for what plugins write and for the kit.
        peer: user id that the worker runs as.
        memory_bytes: of the container; 0 for no limit.

    Raises:
        OSError: socket or folders cannot be made.
    """

    def __init__(
        self, path: str, *, scratch: str, peer: int, clock: Clock, memory_bytes: int = 0
    ) -> None:
        self._path = path
        reserve = max(RESERVE_BYTES_MIN, memory_bytes // 10)
        self._memory_bytes = max(memory_bytes - reserve, 0)
        self._peer = peer
        self._clock = clock
        self._folder = os.path.join(scratch, FOLDER)
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        clearing.empty(self._folder)
        self._hello = line.Hello(
            version=__version__,
            python=base_python(),
            kit=install_kit(scratch),
            scratch=self._folder,
            user=os.geteuid(),
            groups=sorted({os.getegid(), *os.getgroups()}),
        )
        self._wards: dict[int, Ward] = {}
        self._forking = threading.Lock()
        """Held while a family is started, when not every child has a ward yet."""
        self._stopping = False
        self._wakes, self._wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._listener = _listen(path)

    def run(self) -> None:
        """Serve until `stop`, and then until the worker that is connected has gone."""
        worker: socket.socket | None = None
        try:
            while worker is not None or not self._stopping:
                poll = select.poll()
                for source in (self._listener, worker, self._wakes):
                    if source is not None:
                        poll.register(source, select.POLLIN)
                ready = {descriptor for descriptor, _ in poll.poll()}
                if self._wakes in ready:
                    os.read(self._wakes, 4096)
                if worker is not None and worker.fileno() in ready and not self._take(worker):
                    self._end_all()
                    worker.close()
                    worker = None
                    log.info("the worker has gone")
                if self._listener.fileno() in ready:
                    worker = self._admit(worker)
        finally:
            self._end_all()
            if worker is not None:
                worker.close()
            self._listener.close()
            Path(self._path).unlink(missing_ok=True)

    def stop(self) -> None:
        """Safe in a signal handler."""
        self._stopping = True
        os.write(self._wake_end, b"\0")

    # -- the worker's connection ----------------------------------------------------------------

    def _admit(self, present: socket.socket | None) -> socket.socket | None:
        """Take the next connection, if it is the worker's; returns the one to serve."""
        sock, _ = self._listener.accept()
        _, user, _ = _PEER.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        )
        if user != self._peer or present is not None or self._stopping:
            what = f"user {user}" if user != self._peer else "a second worker"
            log.warning("a connection of %s was refused", what)
            sock.close()
            return present
        _send(sock, self._hello)
        log.info("the worker is connected")
        return sock

    def _take(self, worker: socket.socket) -> bool:
        """Carry out the worker's next request; False at the end of the line."""
        try:
            request, lines = line.receive_request(worker)
        except (OSError, line.LineError) as error:
            log.warning("the worker's connection is cut: %s", error)
            return False
        match request:
            case line.Start():
                try:
                    self._start(request, Lines(*lines), worker)
                finally:
                    line.close_all(lines)
            case line.Look(number):
                ward = self._wards.get(number)
                if ward is not None:
                    ward.family.look()
                    ward.tell_usage(waiting=True)
            case line.Kill(number):
                ward = self._wards.get(number)
                if ward is not None:
                    ward.end()
                    ward.family.kill()
        return request is not None

    def _start(self, start: line.Start, lines: Lines, worker: socket.socket) -> None:
        try:
            launch = self._checked(start)
            with self._forking:
                ward = Ward(
                    start.family, launch, lines, worker, self._clock, self._weigh, self._ended
                )
                self._wards[start.family] = ward
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            log.warning("family %d cannot be started: %s", start.family, error)
            _send(worker, line.Refused(start.family, str(error)[:1000]))
            return
        _send(worker, line.Started(start.family, ward.family.pid))
        ward.start()

    def _checked(self, start: line.Start) -> Launch:
        """The launch, with the interpreter, kit and folder that this container has.

        Raises:
            ValueError, TypeError, LookupError, AttributeError: it is none that can be carried out
                here.
        """
        launch = Launch.from_json(start.launch)
        rules = launch.confinement
        folder, name = os.path.split(rules.writes[0])
        if (launch.python, launch.kit) != (self._hello.python, self._hello.kit):
            raise ValueError("another interpreter or kit is asked for")
        if len(rules.writes) != 1 or folder != self._folder or not _NAME.fullmatch(name):
            raise ValueError(f"plugins write to one folder in {self._folder}")
        if start.family in self._wards or len(self._wards) >= FAMILIES_MAX:
            raise ValueError(f"there is a family {start.family} already, or too many are")
        return replace(launch, confinement=replace(rules, uid=0))

    # -- endings --------------------------------------------------------------------------------

    def _weigh(self) -> None:
        """End the largest family if all of them together have come near the container's limit."""
        if not self._memory_bytes:
            return
        sizes = [(ward.memory_bytes, ward.number, ward) for ward in list(self._wards.values())]
        total = sum(size for size, _, _ in sizes)
        if total > self._memory_bytes:
            limit, used = self._memory_bytes >> 20, total >> 20
            told = f"the plugins of this pod used {used} MiB, more than the {limit} MiB that it has"
            max(sizes)[2].judge(Verdict(Reason.OUT_OF_MEMORY, told))

    def _ended(self, ward: Ward) -> None:
        """Called by a ward's thread when its family's first process is gone."""
        with self._forking:
            del self._wards[ward.number]
            self._end_orphans()

    def _end_orphans(self) -> None:
        """Whoever is a child of this process and no family's first has lost its own."""
        own = {ward.family.pid for ward in self._wards.values()}
        while orphans := [pid for pid in children_of(os.getpid()) if pid not in own]:
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _end_all(self) -> None:
        wards = list(self._wards.values())
        for ward in wards:
            ward.end()
        for ward in wards:
            ward.join(2 * GRACE_S)


def _send(sock: socket.socket, message: line.Report, flags: int = 0) -> None:
    try:
        sock.send(line.pack(message), flags)
    except OSError as error:
        # The end of the line is seen, and acted on, where it is read.
        log.debug("%s is not told: %s", type(message).__name__, error)


def _listen(path: str) -> socket.socket:
    """A listening socket at `path`, where one of an earlier container may lie."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    new = f"{path}.new"
    Path(new).unlink(missing_ok=True)
    listener.bind(new)
    os.chmod(new, 0o666)  # noqa: S103 - who may speak is decided by the peer's user, not by this
    listener.listen(_BACKLOG)
    os.rename(new, path)
    return listener


def main() -> None:
    """Entry point of the plugin container."""
    parser = argparse.ArgumentParser(prog="python -m casparian_worker.launcher")
    parser.add_argument("--socket", required=True, help="where the worker connects")
    parser.add_argument(
        "--scratch", help="folder that plugins write below (default: the system's temporary one)"
    )
    parser.add_argument(
        "--peer-uid", type=int, default=os.geteuid(), help="the worker's user (default: this one)"
    )
    parser.add_argument(
        "--memory-mb", type=int, help="memory of this container (default: what its cgroup says)"
    )
    arguments = parser.parse_args()
    start_logging_from_environment()
    if os.geteuid() == 0:
        parser.error("plugins run as the launcher's own user: start it as one without rights")
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    try:
        launcher = Launcher(
            arguments.socket,
            scratch=os.path.realpath(arguments.scratch or tempfile.gettempdir()),
            peer=arguments.peer_uid,
            clock=SystemClock(),
            memory_bytes=(arguments.memory_mb or 0) << 20 or container_memory(),
        )
    except OSError as error:
        parser.error(f"cannot use {error.filename}: {error.strerror}")

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        launcher.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    log.info("plugins are started for user %d by %s", arguments.peer_uid, arguments.socket)
    launcher.run()
    sys.exit(0)


if __name__ == "__main__":
    main()
