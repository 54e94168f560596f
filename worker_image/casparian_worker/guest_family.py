"""A plugin's family of processes, where it runs: started, looked at, ended for good.

`LocalFamily` is for whoever sees the processes: the worker itself, or the launcher of a pod's
plugin container. `remote_family.py` is the worker's view of one in that other container.
"""

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.failures import Reason
from casparian_worker import scratch_use
from casparian_worker.sandbox import Confinement

LOOK_INTERVAL_S = 0.1
"""How often memory and processes are looked at."""
SCRATCH_INTERVAL_S = 1.0
"""How often its scratch folder is, and less if a look takes more than a twentieth of that."""
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Launch":
        """Raises:
        TypeError, ValueError, KeyError: it is none.
        """
        confinement = Confinement.from_json(value["confinement"])
        return Launch(**(value | {"confinement": confinement, "site": tuple(value["site"])}))


class Lines(NamedTuple):
    """The family's ends of its lines to the worker, as descriptors.

    Attributes:
        bridge: the socket of bridge.py.
        life: a pipe at whose end the family ends.
        status: a pipe for the guest's exit status.
        printed: a pipe for what it prints.
    """

    bridge: int
    life: int
    status: int
    printed: int


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


EndFamily = Callable[[Verdict], None]
"""Told once the family breaks one of its limits, or is lost; has it end."""


class Family(Protocol):
    """A family of processes that runs, here or elsewhere.

    Attributes:
        pid: of its first process, whose descendants are the others.
        usage: as last looked at.
    """

    @property
    def pid(self) -> int: ...

    @property
    def usage(self) -> Usage: ...

    def look(self) -> None:
        """Compare what it uses with its limits; called every LOOK_INTERVAL_S."""

    def left_behind(self, own: int) -> bool:
        """Whether processes beside its first `own` ones are alive.

        Told by the last look, so one that is younger may be missed.
        """

    def wait(self, timeout_s: float) -> bool:
        """Wait until its processes are gone; False if they are not by then."""

    def kill(self) -> None:
        """The last resort, where closing `life` was in vain."""


StartFamily = Callable[[Launch, Lines, EndFamily], Family]
"""Starts a family. The lines stay the caller's, who closes them afterwards.

Raises:
    OSError: the interpreter cannot be started.
    LaunchError: it cannot be started where it should run.
"""


class LocalFamily:
    """A family whose first process is a child of this one. Implements Family."""

    def __init__(
        self,
        launch: Launch,
        lines: Lines,
        end: EndFamily,
        clock: Clock,
        *,
        more_lives: tuple[int, ...] = (),
    ) -> None:
        """Start it.

        Args:
            more_lives: further pipes at whose end it ends.

        Raises:
            OSError: the interpreter cannot be started.
        """
        self.usage = Usage(0, 0)
        self._limits = launch.confinement
        self._end = end
        self._clock = clock
        self._scratch_due = 0.0
        lives = (lines.life, *more_lives)
        orders = {
            "bridge": lines.bridge,
            "lives": lives,
            "status": lines.status,
            "site": launch.site,
            "prefix": launch.prefix,
            "confinement": launch.confinement.to_json(),
        }
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
            stdout=lines.printed,
            stderr=lines.printed,
            pass_fds=(lines.bridge, *lives, lines.status),
            env=launch.variables,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def left_behind(self, own: int) -> bool:
        return self.usage.processes > own and len(descendants(self._popen.pid)) > own

    def wait(self, timeout_s: float) -> bool:
        if self._popen.poll() is not None:
            return True
        try:
            # A pidfd tells at once; Popen.wait with a timeout looks every 50 ms.
            watch = os.pidfd_open(self._popen.pid)
        except ProcessLookupError:  # another thread has just taken its status
            return True
        try:
            poll = select.poll()
            poll.register(watch, select.POLLIN)
            poll.poll(int(timeout_s * 1000))
        finally:
            os.close(watch)
        return self._popen.poll() is not None

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def look(self) -> None:
        pids = descendants(self._popen.pid)
        self._look_at_tasks(pids)
        self._look_at_scratch(pids)

    def _look_at_tasks(self, pids: list[int]) -> None:
        usage = usage_of(pids)
        limit = self._limits.memory_mb << 20
        if usage.memory_bytes > limit and len(pids) > 1:
            usage = usage._replace(memory_bytes=min(usage.memory_bytes, shared_once(pids)))
        self.usage = usage
        if usage.memory_bytes > limit:
            self._end(
                Verdict(
                    Reason.OUT_OF_MEMORY,
                    f"the plugin used {usage.memory_bytes >> 20} MiB, "
                    f"more than its limit of {self._limits.memory_mb} MiB",
                )
            )
        elif usage.tasks > self._limits.pids + 1:  # one is the namespace's first process
            self._end(too_many_processes(self._limits.pids))

    def _look_at_scratch(self, pids: list[int]) -> None:
        """Its sum is bounded here only: the kernel bounds each file."""
        now = self._clock.now().mono
        if now < self._scratch_due:
            return
        used = sum(map(scratch_use.bytes_below, self._limits.writes))
        used += scratch_use.bytes_deleted(pids, self._limits.writes)
        took = self._clock.now().mono - now
        self._scratch_due = now + max(SCRATCH_INTERVAL_S, 20 * took)
        if used > self._limits.scratch_bytes:
            self._end(too_much_scratch(used, self._limits.scratch_bytes))


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
        children = children_of(todo.pop())
        found += children
        todo += children
    return found


def children_of(pid: int) -> list[int]:
    """Ids of a process's children; those that come or go may be missed."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found += [int(child) for child in file.read().split()]
    except OSError:
        return found
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
