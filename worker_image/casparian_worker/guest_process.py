"""One plugin process with its family: started, watched and ended as one."""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.failures import Reason
from casparian_worker import scratch_use
from casparian_worker.bridge import FrameReader, bridge_pair
from casparian_worker.guest_log import GuestLog
from casparian_worker.sandbox import Confinement

WATCH_INTERVAL_S = 0.1
"""How often memory and processes are looked at."""
SCRATCH_INTERVAL_S = 1.0
"""How often its scratch folder is, and less if a look takes more than a twentieth of that."""
_GRACE_S = 3.0
_LOG_PIPE_BYTES = 1024 * 1024
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROCESSES_MAX = 20_000
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from casparian_worker.guest import main; main()"
)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a plugin process.

    Attributes:
        python: the base interpreter, started without site-packages.
        kit: folder with the guest's own modules (guest_kit.py).
        site: site-packages folders of the plugin's environment, searched in order.
        prefix: root of that environment.
        variables: the whole environment of the process.
        log_bytes: kept of each job's output.
    """

    python: str
    kit: str
    site: tuple[str, ...]
    prefix: str
    confinement: Confinement
    log_bytes: int = 65_536
    variables: dict[str, str] = field(default_factory=dict)


class Verdict(NamedTuple):
    """Why a process was ended, or how it ended by itself."""

    reason: Reason
    message: str
    transient: bool | None = None


class Usage(NamedTuple):
    """Of the plugin's processes together.

    Attributes:
        memory_bytes: resident; pages shared between them count once if that decides.
        tasks: processes and threads.
        processes: among them.
    """

    memory_bytes: int
    tasks: int
    processes: int = 0


class GuestProcess:
    """A running plugin process.

    Attributes:
        sock: the worker's end of the bridge, non-blocking.
        frames: reads `sock`.
        log: what the process prints.
        usage: as last looked at.
    """

    def __init__(self, launch: Launch, clock: Clock) -> None:
        """Start it.

        Raises:
            OSError: the interpreter cannot be started.
        """
        self._clock = clock
        self._limits = launch.confinement
        self._lock = threading.Lock()
        self._verdict: Verdict | None = None
        self._oom_kills = oom_kills()
        self.usage = Usage(0, 0)
        self._scratch_due = 0.0
        self.sock, bridge = bridge_pair()
        self.frames = FrameReader(self.sock)
        life, self._life = os.pipe2(os.O_CLOEXEC)
        self._status, status = os.pipe2(os.O_CLOEXEC)
        output, printed = os.pipe2(os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # fewer wake-ups for a talkative plugin
            fcntl.fcntl(printed, fcntl.F_SETPIPE_SZ, _LOG_PIPE_BYTES)
        orders = {
            "bridge": bridge.fileno(),
            "life": life,
            "status": status,
            "site": launch.site,
            "prefix": launch.prefix,
            "confinement": launch.confinement.to_json(),
        }
        try:
            self._popen = subprocess.Popen(
                [
                    launch.python,
                    "-I",
                    "-S",
                    "-B",
                    "-u",
                    "-c",
                    _BOOT,
                    launch.kit,
                    json.dumps(orders),
                ],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=(bridge.fileno(), life, status),
                env=launch.variables,
                start_new_session=True,
            )
        except OSError:
            for descriptor in (self._life, self._status, output):
                os.close(descriptor)
            self.sock.close()
            raise
        finally:
            bridge.close()
            for descriptor in (life, status, printed):
                os.close(descriptor)
        self.sock.setblocking(False)
        self.log = GuestLog(output, launch.log_bytes)
        self._watcher = threading.Thread(
            target=self._watch, args=(output,), name=f"plugin-{self._popen.pid}", daemon=True
        )
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Of the launcher, whose descendants are the plugin's processes."""
        return self._popen.pid

    def kill(self, verdict: Verdict | None = None) -> None:
        """Have all its processes end. Safe from any thread; the first verdict stands."""
        with self._lock:
            if self._verdict is None:
                self._verdict = verdict
            if self._life >= 0:
                os.close(self._life)
                self._life = -1

    def left_behind(self, own: int) -> bool:
        """Whether processes beside its first `own` ones are alive.

        Told by the watcher's last look, so one that is younger may be missed.
        """
        return self.usage.processes > own and len(descendants(self._popen.pid)) > own

    def end(self) -> Verdict:
        """Make sure that every process is gone, and say why they went.

        The verdict of `kill` comes first; else the guest's own exit status.
        """
        if self._life >= 0:
            # The bridge broke first; a crash needs a moment to show its exit status.
            try:
                self._popen.wait(_GRACE_S / 3)
            except subprocess.TimeoutExpired:
                self.kill(Verdict(Reason.TRUNCATED, "the plugin closed the bridge to the worker"))
        self.kill()
        try:
            self._popen.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self.sock.close()
        self._watcher.join(_GRACE_S)
        status = os.read(self._status, 64)
        os.close(self._status)
        return self._verdict or self._judge(status)

    def _judge(self, status: bytes) -> Verdict:
        if not status.strip().isdigit():
            return Verdict(Reason.CRASHED, "the plugin process vanished")
        code = os.waitstatus_to_exitcode(int(status))
        if code == 0:
            return Verdict(Reason.EXITED, "the plugin ended its own process (exit code 0)")
        if code > 0:
            return Verdict(Reason.EXITED, f"the plugin ended its own process (exit code {code})")
        if -code == signal.SIGKILL and oom_kills() > self._oom_kills:
            return Verdict(
                Reason.OUT_OF_MEMORY, "the kernel ended the plugin process: out of memory"
            )
        return Verdict(Reason.CRASHED, f"the plugin process was ended by {signal_name(-code)}")

    # -- the watcher thread

    def _watch(self, pipe: int) -> None:
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        due = 0.0
        while not self.log.closed:
            try:
                poll.poll(int(WATCH_INTERVAL_S * 1000))
                self.log.drain()
            except OSError:
                return
            now = self._clock.now().mono
            if now >= due:
                due = now + WATCH_INTERVAL_S
                pids = descendants(self._popen.pid)
                self._look(pids)
                self._look_at_scratch(pids, now)

    def _look(self, pids: list[int]) -> None:
        usage = usage_of(pids)
        limit = self._limits.memory_mb << 20
        if usage.memory_bytes > limit and len(pids) > 1:
            usage = usage._replace(memory_bytes=min(usage.memory_bytes, shared_once(pids)))
        self.usage = usage
        if usage.memory_bytes > limit:
            self.kill(
                Verdict(
                    Reason.OUT_OF_MEMORY,
                    f"the plugin used {usage.memory_bytes >> 20} MiB, "
                    f"more than its limit of {self._limits.memory_mb} MiB",
                )
            )
        elif usage.tasks > self._limits.pids + 1:  # one is the namespace's first process
            self.kill(too_many_processes(self._limits.pids))

    def _look_at_scratch(self, pids: list[int], now: float) -> None:
        """Its sum is bounded here only: the kernel bounds each file."""
        if now < self._scratch_due:
            return
        used = sum(map(scratch_use.bytes_below, self._limits.writes))
        used += scratch_use.bytes_deleted(pids, self._limits.writes)
        took = self._clock.now().mono - now
        self._scratch_due = now + max(SCRATCH_INTERVAL_S, 20 * took)
        if used > self._limits.scratch_bytes:
            self.kill(too_much_scratch(used, self._limits.scratch_bytes))


def too_many_processes(limit: int) -> Verdict:
    """The verdict on a fork bomb."""
    return Verdict(Reason.SANDBOX, f"the plugin reached its limit of {limit} processes and threads")


def too_much_scratch(used: int, limit: int) -> Verdict:
    """The verdict on a plugin that fills the disk."""
    return Verdict(
        Reason.SANDBOX,
        f"the plugin wrote {used >> 20} MiB into its scratch folder, "
        f"more than its limit of {limit >> 20} MiB",
    )


def signal_name(number: int) -> str:
    """`SIGSEGV` for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills() -> int:
    """How many processes this kernel has ended for want of memory, in any cgroup."""
    try:
        with open("/proc/vmstat", encoding="ascii") as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except OSError:
        return 0
    return 0


def descendants(root: int) -> list[int]:
    """Ids of all processes below `root`, without itself; those that come or go may be missed."""
    found: list[int] = []
    todo = [root]
    while todo and len(found) < _PROCESSES_MAX:
        pid = todo.pop()
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                todo += children
        except OSError:
            continue
    return found


def usage_of(pids: list[int]) -> Usage:
    """Resident memory and tasks, summed."""
    pages = tasks = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        tasks += int(fields[17])
        pages += int(fields[21])
    return Usage(pages * _PAGE, tasks, len(pids))


def shared_once(pids: list[int]) -> int:
    """Bytes resident where a page shared by n processes counts 1/n for each (PSS)."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                line = next((text for text in file if text.startswith(b"Pss:")), b"Pss: 0 kB")
        except OSError:
            total += usage_of([pid]).memory_bytes
            continue
        total += int(line.split()[1]) * 1024
    return total
