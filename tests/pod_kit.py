"""Processes as a pod of the restricted profile has them, where the tests run as root.

`enter` makes this process one: an own mount namespace in which everything is read-only but the
volumes, another container's folders are not there, no capability, no new privileges, an ordinary
user, and a filter that refuses namespaces, as a container runtime's does. What a private folder
hides (a Python below root's home) is mounted where it was, so that paths are those of one image.
"""

import ctypes
import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from casparian_flow.domain.clock import SystemClock
from casparian_worker.remote_family import PluginContainer
from casparian_worker.sandbox import libc, seccomp

ROOT = os.geteuid() == 0
PLUGIN_USER, WORKER_USER, GROUP = 60_951, 60_952, 60_953
_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_NAMESPACE_FLAGS = 0x7E020080


def as_container(
    user: int, program: Sequence[str], *, volumes: Sequence[Path], hidden: Sequence[Path] = ()
) -> list[str]:
    """The command that runs `program` in such a container.

    Args:
        volumes: folders that may be written to.
        hidden: folders of which it sees nothing.
    """
    orders = [user, list(program), list(map(str, volumes)), list(map(str, hidden))]
    return [sys.executable, __file__, json.dumps(orders)]


def volume(folder: Path) -> Path:
    """An emptyDir with the pod's fsGroup."""
    folder.mkdir(parents=True)
    if ROOT:
        os.chown(folder, 0, GROUP)
        folder.chmod(0o2777)
    return folder


@dataclass
class Pod:
    """Volumes, and the process of the plugin container."""

    folder: Path
    launchers: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def socket(self) -> str:
        return str(self.folder / "run" / "launcher.sock")

    @property
    def launcher(self) -> "subprocess.Popen[bytes]":
        return self.launchers[-1]

    def launch(self, *options: str, peer: int | None = None, writable: Sequence[Path] = ()) -> None:
        peer = os.geteuid() if peer is None else peer
        run, scratch = self.folder / "run", self.folder / "plugin-tmp"
        command = [
            sys.executable, "-m", "casparian_worker.launcher", "--socket", self.socket,
            "--scratch", str(scratch), "--peer-uid", str(peer), *options,
        ]  # fmt: skip
        if ROOT:
            command = as_container(PLUGIN_USER, command, volumes=[*writable, run, scratch])
        with (self.folder / "launcher.log").open("ab") as log:
            self.launchers.append(subprocess.Popen(command, stdout=log, stderr=log))

    def container(self, patience_s: float = 30.0) -> PluginContainer:
        return PluginContainer(self.socket, SystemClock(), patience_s=patience_s)

    def families(self) -> list[psutil.Process]:
        return psutil.Process(self.launcher.pid).children(recursive=True)

    def left(self) -> list[str]:
        return os.listdir(self.folder / "plugin-tmp" / "casparian-plugins")

    def log(self) -> str:
        return (self.folder / "launcher.log").read_text()


@contextmanager
def pod_folder() -> Iterator[Pod]:
    """Volumes for one pod, gone with its launchers afterwards."""
    # pytest's own folders are this user's alone.
    with tempfile.TemporaryDirectory(prefix="casparian-pod-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("run", "scratch", "plugin-tmp", "output", "cache"):
            volume(folder / part)
        pod = Pod(folder)
        groups = os.getgroups()
        if ROOT:
            os.setgroups([*groups, GROUP])
        try:
            yield pod
        finally:
            for launcher in pod.launchers:
                launcher.kill()
                launcher.wait(10)
            print(pod.log() if pod.launchers else "")
            if ROOT:
                os.setgroups(groups)


def enter(user: int, volumes: Sequence[str], hidden: Sequence[str]) -> None:
    """Become a process of such a container."""
    libc.unshare(_CLONE_NEWNS)
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    _uncover(os.path.realpath(sys.base_prefix))
    for folder in hidden:
        _mount("none", folder, 0, "tmpfs")
    for folder in volumes:
        _mount(folder, folder, _MS_BIND)
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split()[1].encode().decode("unicode_escape")
        if place not in volumes and not place.startswith(("/proc", "/dev", "/sys")):
            _mount("none", place, _MS_REMOUNT | _MS_BIND | _MS_RDONLY)
    libc.drop_bounding_set()
    os.setgroups([GROUP])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    _refuse_namespaces()


def _uncover(prefix: str) -> None:
    """Have `prefix` be reachable for everybody, and nothing else of what hides it."""
    parents = [str(p) for p in reversed(Path(prefix).parents)]
    private = next((p for p in parents if not os.stat(p).st_mode & 0o001), "")
    if private:
        inside = os.open(prefix, os.O_PATH)
        _mount("none", private, 0, "tmpfs", "mode=0755")
        os.makedirs(prefix)
        _mount(f"/proc/self/fd/{inside}", prefix, _MS_BIND)
        os.close(inside)


def _refuse_namespaces() -> None:
    column = 0 if libc.MACHINE == "x86_64" else 1
    deny = seccomp._answer(errno.EPERM)
    flags = [seccomp._argument(0), *seccomp._deny(seccomp._JSET, _NAMESPACE_FLAGS), seccomp._PASS]
    code = b"".join(
        [
            seccomp._op(seccomp._LD_W_ABS, 0),
            *seccomp._when(seccomp.DENIED["unshare"][column] or 0, [deny]),
            *seccomp._when(seccomp._CLONE3, [seccomp._answer(errno.ENOSYS)]),
            *seccomp._when(seccomp._CLONE[column], flags),
            seccomp._PASS,
        ]
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    program = seccomp._Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    libc.syscall(seccomp._SECCOMP[libc.MACHINE], 1, 0, ctypes.byref(program))


def _mount(source: str, target: str, flags: int, kind: str = "", options: str = "") -> None:
    result = libc._libc.mount(
        source.encode(), target.encode(), kind.encode() or None,
        ctypes.c_ulong(flags), options.encode() or None,
    )  # fmt: skip
    libc._check(result, f"mount {target}")


if __name__ == "__main__":
    user, program, volumes, hidden = json.loads(sys.argv[1])
    enter(user, volumes, hidden)
    os.execv(program[0], program)
