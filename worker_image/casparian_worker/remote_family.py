"""The worker's view of the plugin container: its launcher, and the families that run there.

Families are started, watched and ended by the launcher (launcher.py) as the worker's own would be;
what they need of the worker goes there as descriptors. If the container ends, so have they: every
job that ran there has failed with CRASHED, or OUT_OF_MEMORY where the kernel says so, and the next
start waits for the container to be back.
"""

import itertools
import logging
import os
import secrets
import socket
import threading
from pathlib import Path

from casparian_flow import __version__
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.failures import Reason
from casparian_worker import guest_family
from casparian_worker import launch_line as line
from casparian_worker.guest_family import EndFamily, Family, Launch, Lines, Usage, Verdict
from casparian_worker.guest_kit import base_python, kit_files, kit_name
from casparian_worker.plugin_events import LaunchError

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""For the container to start, or to be started again."""
ANSWER_S = 30.0
LOOK_S = 1.0
GRACE_S = 3.0
_RETRY_S = 0.2
_LIMITS = frozenset({Reason.OUT_OF_MEMORY, Reason.SANDBOX})
_MESSAGE_CHARS_MAX = 1_000


class RemoteFamily:
    """A family in the plugin container. Implements guest_family.Family."""

    def __init__(self, number: int, connection: "_Connection", end: EndFamily) -> None:
        self.number = number
        self.pid = 0
        self.usage = Usage(0, 0)
        self.refused = ""
        self.answered = threading.Event()
        self._connection = connection
        self._end = end
        self._oom_kills = guest_family.oom_kills()
        self._looked = threading.Event()
        self._ended = threading.Event()

    def look(self) -> None:
        """The launcher does, as often."""

    def left_behind(self, own: int) -> bool:
        if self.usage.processes <= own:
            return False
        self._looked.clear()
        self._connection.send(line.Look(self.number))
        self._looked.wait(LOOK_S)
        return self.usage.processes > own

    def wait(self, timeout_s: float) -> bool:
        return self._ended.wait(timeout_s)

    def kill(self) -> None:
        self._connection.send(line.Kill(self.number))
        if not self._ended.wait(GRACE_S):
            # It cannot be ended one by one: without its worker the launcher ends them all.
            self._connection.cut()
            self._ended.wait(GRACE_S)

    # -- told by the connection -----------------------------------------------------------------

    def take(self, report: line.Report) -> None:
        """Raises:
        LineError: no launcher would send this.
        """
        match report:
            case line.Started():
                self.pid = report.pid
                self.answered.set()
            case line.Refused():
                self.refused = _clean(report.message) or "no reason was given"
                self.answered.set()
            case line.Used():
                self.usage = Usage(report.memory_bytes, report.tasks, report.processes)
                self._looked.set()
            case line.Judged():
                if report.reason not in _LIMITS:
                    raise line.LineError("judged for no limit")
                self._end(Verdict(Reason(report.reason), _clean(report.message)))
            case line.Ended():
                self._ended.set()
            case _:
                raise line.LineError(f"sent {type(report).__name__} out of order")

    def lost(self) -> None:
        """The container is gone, and the family with it."""
        reason, why = Reason.CRASHED, "the plugin container ended"
        if guest_family.oom_kills() > self._oom_kills:
            reason, why = Reason.OUT_OF_MEMORY, f"{why}: out of memory"
        self._end(Verdict(reason, why, transient=True))
        self._ended.set()
        self.answered.set()
        self._looked.set()


class _Connection:
    """One connection to a launcher, with a thread that reads it."""

    def __init__(self, sock: socket.socket, hello: line.Hello) -> None:
        self.hello = hello
        self.lost = False
        self._sock = sock
        self._lock = threading.Lock()
        self._families: dict[int, RemoteFamily] = {}
        self._reader = threading.Thread(target=self._read, name="plugin-container", daemon=True)
        self._reader.start()

    def start(self, launch: Launch, lines: Lines, family: RemoteFamily) -> None:
        """Ask for a family; `family.answered` is set once there is an answer, or none will come."""
        with self._lock:
            if self.lost:
                return family.lost()
            self._families[family.number] = family
        try:
            line.send_start(self._sock, line.Start(family.number, launch.to_json()), lines)
        except OSError:
            self.cut()
        return None

    def send(self, request: line.Request) -> None:
        try:
            self._sock.send(line.pack(request))
        except OSError:
            self.cut()

    def cut(self) -> None:
        """End the line; the reading thread then tells the families."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("the line to the plugin container was down already: %s", error)

    def close(self) -> None:
        self.cut()
        self._reader.join(GRACE_S)

    def _read(self) -> None:
        try:
            while (report := line.receive(self._sock)) is not None:
                self._take(report)
        except (OSError, line.LineError) as error:
            log.warning("the plugin container's launcher %s; its line is cut", error)
        with self._lock:
            self.lost = True
            families, self._families = self._families, {}
        for family in families.values():
            family.lost()
        self._sock.close()

    def _take(self, report: line.Report) -> None:
        if isinstance(report, line.Hello):
            raise line.LineError("says hello again")
        gone = isinstance(report, line.Ended | line.Refused)
        with self._lock:
            family = (self._families.pop if gone else self._families.get)(report.family, None)
        if family is not None:
            family.take(report)


class PluginContainer:
    """Starts families in the plugin container of this worker's pod; for any number of threads.

    Args:
        path: the launcher's socket.
    """

    def __init__(self, path: str, clock: Clock, *, patience_s: float = PATIENCE_S) -> None:
        self._path = path
        self._clock = clock
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._hello: line.Hello | None = None
        self._closing = threading.Event()
        # A worker that was started again does not meet its predecessor's numbers.
        self._numbers = itertools.count(secrets.randbelow(1 << 40))

    def hello(self) -> line.Hello:
        """What the container's launcher says of it; waits for it to be there.

        Raises:
            LaunchError: it is not there in time, or does not fit this worker.
        """
        return self._connected().hello

    def problem(self) -> str:
        """Why no family could be started now; "" if nothing is known against it.

        A container that was started again is found by this, too.
        """
        if not self._lock.acquire(blocking=False):
            return "the plugin container is waited for"
        try:
            if self._connection is None or self._connection.lost:
                self._connection = self._connect()
        except (OSError, line.LineError, LaunchError) as error:
            return f"the plugin container is away: {error}"
        finally:
            self._lock.release()
        return ""

    def start(self, launch: Launch, lines: Lines, end: EndFamily) -> Family:
        """See guest_family.StartFamily."""
        connection = self._connected()
        family = RemoteFamily(next(self._numbers), connection, end)
        connection.start(launch, lines, family)
        if not family.answered.wait(ANSWER_S):
            connection.cut()
            raise _away(f"the launcher did not answer within {ANSWER_S:g} s")
        if family.refused:
            raise LaunchError(
                f"the plugin container refuses the plugin: {family.refused}",
                reason=Reason.ENVIRONMENT,
            )
        return family

    def stop_waiting(self) -> None:
        """Give up on a container that is not there now."""
        self._closing.set()

    def close(self) -> None:
        """End the line, and so every family."""
        self.stop_waiting()
        connection = self._connection
        if connection is not None:
            connection.close()

    def _connected(self) -> _Connection:
        with self._lock:
            if self._connection is not None and not self._connection.lost:
                return self._connection
            deadline = self._clock.now().mono + self._patience_s
            while True:
                try:
                    self._connection = self._connect()
                except (OSError, line.LineError) as error:
                    why = getattr(error, "strerror", None) or str(error)
                    if self._clock.now().mono >= deadline or self._closing.wait(_RETRY_S):
                        raise _away(f"its launcher cannot be reached: {why}") from error
                else:
                    return self._connection

    def _connect(self) -> _Connection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(ANSWER_S)
            sock.connect(self._path)
            hello = line.receive(sock)
            if not isinstance(hello, line.Hello):
                raise line.LineError(f"it admits no worker of user {os.geteuid()} now")
            self._require_fit(hello)
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        log.info("plugins run in the container of the launcher at %s", self._path)
        return _Connection(sock, hello)

    def _require_fit(self, hello: line.Hello) -> None:
        """Make sure that what was computed here holds there.

        Raises:
            LaunchError: it does not.
        """
        own = (__version__, base_python(), kit_name(kit_files()))
        if own != (hello.version, hello.python, Path(hello.kit).name):
            raise LaunchError(
                "the plugin container has another version of Casparian Flow or of Python",
                reason=Reason.ENVIRONMENT,
                hint="Run worker and plugin container from the same image.",
            )
        if not _is_plain(hello.kit) or not _is_plain(hello.scratch):
            raise line.LineError("names no folders")
        if self._hello is not None and self._hello != hello:
            raise LaunchError(
                "the plugin container is not the one that the worker began with",
                reason=Reason.ENVIRONMENT,
                transient=True,
                hint="Restart the pod.",
            )
        self._hello = hello


def shared_group(hello: line.Hello) -> int:
    """A group by which the container's plugins can read what the worker gives them; 0 if they are
    of the worker's user.

    Raises:
        LaunchError: there is none.
    """
    if hello.user == os.geteuid():
        return 0
    common = sorted({os.getegid(), *os.getgroups()} & set(hello.groups) - {0})
    if not common:
        raise LaunchError(
            "worker and plugin container share no group, so plugins could not read their input",
            reason=Reason.SANDBOX,
            hint="Set fsGroup in the pod's securityContext.",
        )
    return common[0]


def _is_plain(path: str) -> bool:
    return (
        path.startswith("/")
        and os.path.normpath(path) == path
        and len(path) < os.pathconf("/", "PC_PATH_MAX")
    )


def _away(why: str) -> LaunchError:
    return LaunchError(
        f"the plugin container is not there: {why}", reason=Reason.ENVIRONMENT, transient=True
    )


def _clean(text: str) -> str:
    return text[:_MESSAGE_CHARS_MAX].encode("utf-8", "replace").decode()
