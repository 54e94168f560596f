"""Confinement of a plugin's process, put on by the process itself before foreign code loads.

Two steps, in this order: `isolate` (namespaces, in the process that forks the plugin's) and
`confine` (everything else, in the plugin's process, while it has one thread). Each measure writes
one line into the report: "applied…", or "not applied: why". docs/sandbox.md tells what each is for.

Standard library only: site-packages are foreign code and come on the path later.
"""

import os
import resource
import select
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from casparian_worker.sandbox import landlock, libc, seccomp

Report = dict[str, str]

APPLIED = "applied"
MEASURES = (
    "environment",
    "pid_namespace",
    "network_namespace",
    "ipc_namespace",
    "limits",
    "process_limit",
    "oom_score",
    "no_new_privs",
    "landlock",
    "landlock_network",
    "landlock_scope",
    "user",
    "capabilities",
    "parent_death",
    "not_dumpable",
    "seccomp",
)
_SYSTEM_CODE = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_SYSTEM_READS = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/timezone",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/fonts",
    "/etc/ssl/openssl.cnf",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/kernel/random",
    "/sys/devices/system/cpu",
    "/sys/kernel/mm/transparent_hugepage",
)
_CGROUPS = "/sys/fs/cgroup"
_CGROUP_LIMITS = (
    "memory.max",
    "memory.high",
    "memory.limit_in_bytes",
    "cpu.max",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
)
_NO_LIMIT = 1 << 60
"""What control groups of version 1 say for none is above this."""
_OPEN_FILES_MAX = 1024
_DATA_SLACK_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Confinement:
    """What one plugin process may do; JSON-able.

    Attributes:
        code: folders it may read and run programs from: interpreter, environment, guest kit.
        reads: further files and folders it may read: its input.
        writes: the folders it may write to.
        uid: what to become when started as root, 0 to stay.
        memory_mb: the supervisor's limit; private memory is refused beyond twice it plus 2 GiB,
            for what grows between two looks.
        pids: most processes and threads, where a user of its own makes that countable.
        file_bytes: largest file it may write.
        scratch_bytes: of all that it has written, by the supervisor's looks.
        required: measures without which no plugin runs.
    """

    code: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    uid: int = 0
    memory_mb: int = 2048
    pids: int = 64
    file_bytes: int = 8 << 30
    scratch_bytes: int = 16 << 30
    required: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Confinement":
        lists = {k: tuple(v) for k, v in value.items() if isinstance(v, list)}
        return Confinement(**(value | lists))


def unmet(report: Report, required: tuple[str, ...]) -> list[str]:
    """One line for each required measure that is not in force."""
    return [
        f"{name}: {report.get(name, 'unknown measure')}"
        for name in required
        if not report.get(name, "").startswith(APPLIED)
    ]


def isolate() -> Report:
    """Give the next child namespaces of its own: processes, network, System V IPC.

    Without root a user namespace is tried, which grants the right to the others.
    """
    report: Report = {}
    base = 0
    if os.geteuid() != 0:
        base = libc.CLONE_NEWUSER
    flags = {
        "pid_namespace": libc.CLONE_NEWPID,
        "network_namespace": libc.CLONE_NEWNET,
        "ipc_namespace": libc.CLONE_NEWIPC,
    }
    uid, gid = os.geteuid(), os.getegid()
    try:
        libc.unshare(base | sum(flags.values()))
        if base:
            _map_user(uid, gid)
    except OSError as error:
        if base:
            return dict.fromkeys(flags, f"not applied: {_told(error)} (no root, no user namespace)")
        for name, flag in flags.items():
            _measure(report, name, lambda flag=flag: libc.unshare(flag))  # type: ignore[misc]
        return report
    return dict.fromkeys(flags, f"{APPLIED} in a user namespace" if base else APPLIED)


def _map_user(uid: int, gid: int) -> None:
    """Stay who we are within the new user namespace."""
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


def confine(rules: Confinement, report: Report, parent: int) -> None:
    """Confine this process for good, and write down how far that went.

    Args:
        parent: pidfd of the process whose end must be this one's.
    """
    own_user = _is_root() and rules.uid > 0
    countable = own_user or report.get("pid_namespace", "").endswith("user namespace")
    _measure(report, "oom_score", lambda: _write("/proc/self/oom_score_adj", "1000"))
    _measure(report, "limits", lambda: _limit(rules))
    if countable:
        _measure(report, "process_limit", lambda: _set_limit(resource.RLIMIT_NPROC, rules.pids))
    else:
        report["process_limit"] = "not applied: the plugin shares the worker's user"
    _measure(report, "no_new_privs", lambda: libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1))
    _restrict_files(rules, report)
    if own_user:
        _become(rules, report)
    else:
        why = "not root" if not _is_root() else "no user id is configured"
        report["user"] = f"not applied: the worker is {why}"
        _measure(report, "capabilities", lambda: libc.capset(0))
    _measure(report, "parent_death", lambda: die_with(parent))
    _measure(report, "not_dumpable", lambda: libc.prctl(libc.PR_SET_DUMPABLE, 0))
    shared_user = not report["user"].startswith(APPLIED)
    _measure(report, "seccomp", lambda: seccomp.install(shared_user=shared_user))


def _is_root() -> bool:
    return os.geteuid() == 0


def _limit(rules: Confinement) -> None:
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_NOFILE, _OPEN_FILES_MAX)
    _set_limit(resource.RLIMIT_FSIZE, rules.file_bytes)
    _set_limit(resource.RLIMIT_RTPRIO, 0)
    _set_limit(resource.RLIMIT_DATA, 2 * (rules.memory_mb << 20) + _DATA_SLACK_BYTES)


def _set_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _restrict_files(rules: Confinement, report: Report) -> None:
    """Landlock, with the two measures that newer kernels add to it."""
    wanted = [landlock.Rule(path, landlock.CODE) for path in (*_SYSTEM_CODE, *rules.code)]
    reads = (*_SYSTEM_READS, *_own_limits(), *rules.reads)
    wanted += [landlock.Rule(path, landlock.READ) for path in reads]
    wanted += [landlock.Rule(path, landlock.SCRATCH) for path in rules.writes]
    wanted.append(landlock.Rule("/dev/null", landlock.DEVICE))
    try:
        version = landlock.restrict(wanted)
    except OSError as error:
        why = f"not applied: {_told(error)}"
        report |= dict.fromkeys(("landlock", "landlock_network", "landlock_scope"), why)
        return
    report["landlock"] = f"{APPLIED} (ABI {version})"
    old = f"not applied: Landlock ABI {version} is too old"
    report["landlock_network"] = APPLIED if version >= 4 else old
    report["landlock_scope"] = APPLIED if version >= 6 else old


def container_memory() -> int:
    """Bytes that the control groups of this process allow; 0 for no limit."""
    found: list[int] = []
    for path in _own_limits():
        if os.path.basename(path) in {"memory.max", "memory.limit_in_bytes"}:
            try:
                with open(path, encoding="ascii") as file:
                    text = file.read().strip()
            except OSError:
                continue
            found += [int(text)] if text.isdigit() and int(text) < _NO_LIMIT else []
    return min(found, default=0)


def _own_limits() -> list[str]:
    """Where a library (DuckDB, for one) finds out how much memory and processor it has.

    These files alone, as the folders tell of everybody else.
    """
    folders: list[str] = []
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                hierarchy = os.path.join(_CGROUPS, controllers)
                folders += [hierarchy, os.path.normpath(hierarchy + path)]
    except (OSError, ValueError):
        return []
    return [os.path.join(folder, name) for folder in folders for name in _CGROUP_LIMITS]


def _become(rules: Confinement, report: Report) -> None:
    """Leave root for the slot's own user.

    Where that user could not reach the interpreter or its input (a Python under a private home,
    for instance), it keeps CAP_DAC_READ_SEARCH, provided that Landlock confines what it reads.
    """
    hidden = next((p for p in (*rules.code, *rules.reads) if not reachable(p)), "")
    if hidden and not report["landlock"].startswith(APPLIED):
        report["user"] = f"not applied: without Landlock it could not be let into {hidden}"
        _measure(report, "capabilities", lambda: libc.capset(0))
        return
    keep = 1 << libc.CAP_DAC_READ_SEARCH if hidden else 0

    def become() -> None:
        libc.drop_bounding_set()
        libc.prctl(libc.PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(rules.uid, rules.uid, rules.uid)
        os.setresuid(rules.uid, rules.uid, rules.uid)

    _measure(report, "user", become)
    _measure(report, "capabilities", lambda: libc.capset(keep))
    if hidden and report["capabilities"] == APPLIED:
        report["capabilities"] += f" (keeps CAP_DAC_READ_SEARCH to reach {hidden})"


def reachable(path: str) -> bool:
    """Whether a user without any right of its own can read `path`, by its permission bits."""
    path = os.path.realpath(path)
    try:
        mode = os.stat(path).st_mode
        if mode & 0o004 == 0:
            return False
        while path != "/":
            path = os.path.dirname(path)
            if os.stat(path).st_mode & 0o001 == 0:
                return False
    except OSError:
        return False
    return True


def die_with(parent: int) -> None:
    """Have the kernel end this process when its parent (a pidfd) ends, even if it has already."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    if poll.poll(0):
        os._exit(1)


def _measure(report: Report, name: str, apply: Callable[[], object]) -> None:
    try:
        apply()
    except (OSError, ValueError) as error:
        report[name] = f"not applied: {_told(error)}"
    else:
        report[name] = APPLIED


def _told(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
