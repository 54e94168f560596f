"""What hostile plugins are after, and a look at whether they got it.

Everything here is open to any user of the machine on purpose (files 0666, folders 0777): what
holds a plugin back must be its sandbox, not the permissions of its target.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb

from casparian_worker.sandbox import seccomp

LEAKED = "leaked"
"""A secret is among the plugin's rows, its log or its error."""
CHANGED = "changed"
"""A file or folder outside of the scratch is not what it was."""
CONTACTED = "contacted"
"""Somebody listening was reached."""
KILLED = "killed"
"""A process that is none of the plugin's was ended."""
SURVIVED = "survived"
"""A process of the plugin's runs on after its host has stopped."""
ESCAPED = "escaped"
"""The plugin found itself able to do what it should not be."""

_VICTIM = """
import ctypes, os, sys, time
uid, secret, gap = int(sys.argv[1]), bytearray(os.environ["VICTIM_SECRET"].encode()), sys.argv[2]
os.chdir(gap)
held = os.open("secret.txt", os.O_RDONLY)
if uid:
    os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
print(ctypes.addressof((ctypes.c_char * len(secret)).from_buffer(secret)), len(secret), held)
sys.stdout.flush()
time.sleep(600)
"""
_ANSWER = b"HTTP/1.0 200 OK\r\nContent-Type: text/csv\r\nContent-Length: 4\r\n\r\na\n1\n"
_MORE_CALLS = {
    "x86_64": {"memfd_create": 319, "inotify_init1": 294, "inotify_add_watch": 254, "clone": 56,
               "clone3": 435, "sched_setscheduler": 144, "capset": 126, "execveat": 322},
    "aarch64": {"memfd_create": 279, "inotify_init1": 26, "inotify_add_watch": 27, "clone": 220,
                "clone3": 435, "sched_setscheduler": 119, "capset": 91, "execveat": 281},
}  # fmt: skip


def call_numbers() -> dict[str, int]:
    """System calls by name for this machine."""
    machine = os.uname().machine
    column = 0 if machine == "x86_64" else 1
    known = {name: numbers[column] for name, numbers in seccomp.DENIED.items()}
    return {n: v for n, v in known.items() if v is not None} | _MORE_CALLS.get(machine, {})


class Listeners:
    """Sockets of every kind that a plugin might reach; each contact is noted."""

    def __init__(self, folder: Path) -> None:
        self.contacts: list[str] = []
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.control = socket.socket(socket.AF_UNIX)
        self.control.bind(str(folder / "control.sock"))
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(folder / "notify.sock"))
        self.abstract_name = f"casparian-test-{secrets.token_hex(8)}"
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0" + self.abstract_name)
        for name in ("control.sock", "notify.sock"):
            (folder / name).chmod(0o666)
        self._all = {
            "tcp": self.tcp, "udp": self.udp, "control": self.control, "notify": self.notify,
            "abstract": self.abstract,
        }  # fmt: skip
        for name, sock in self._all.items():
            if sock.type == socket.SOCK_STREAM:
                sock.listen()
            threading.Thread(target=self._serve, args=(name, sock), daemon=True).start()

    def _serve(self, name: str, sock: socket.socket) -> None:
        with suppress(OSError):
            while True:
                if sock.type == socket.SOCK_DGRAM:
                    sock.recv(100)
                    self.contacts.append(name)
                    continue
                guest, _ = sock.accept()
                self.contacts.append(name)
                with guest, suppress(OSError):
                    guest.settimeout(0.5)
                    guest.recv(4096)
                    guest.sendall(_ANSWER)

    def close(self) -> None:
        for sock in self._all.values():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class World:
    """The targets, and the effects that can be seen on them.

    Attributes:
        folder: the files; world-readable and -writable.
        token: part of every name that a plugin might leave somewhere.
    """

    def __init__(self, plugin_uid: int, neighbour: Path, code: dict[str, str]) -> None:
        """Set it up.

        Args:
            plugin_uid: user that the plugins get; the victim process has the same.
            neighbour: another plugin's scratch folder.
            code: folders of code that a plugin may read and must not write, by name.
        """
        self.token = secrets.token_hex(8)
        self.folder = Path(tempfile.mkdtemp(prefix="casparian-hostile-"))
        self.folder.chmod(0o777)
        self._neighbour = neighbour
        self._code = code
        self._escaped = f"escaped-{secrets.token_hex(8)}"
        self._secrets: dict[str, str] = {}
        self._listeners = Listeners(self.folder)
        self._victim: subprocess.Popen[str] | None = None
        self._plugin_uid = plugin_uid
        self.inherited = -1
        self.environment = {f"SECRET_{self.token}": self._secret("environment")}
        os.environ.update(self.environment)
        self._fill()
        self._open_inherited()
        self._start_victim()
        self._before = self._snapshot()

    def _secret(self, name: str) -> str:
        return self._secrets.setdefault(name, f"canary-{name}-{secrets.token_hex(8)}")

    def _fill(self) -> None:
        """Files, as they were in the beginning."""
        for old in self.folder.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            elif not old.is_socket():
                old.unlink()
        texts = {
            "secret.txt": f"a\n{self._secret('file')}\n",
            "global_config.toml": f"[mssql]\npassword = '{self._secret('config')}'\n",
            "signing.key": f"-----BEGIN PRIVATE KEY-----\n{self._secret('key')}\n",
            f"named-{self._secret('name')}": "",
        }
        for name, text in texts.items():
            (self.folder / name).write_text(text)
        with suppress(OSError):  # where the file system has no extended attributes
            os.setxattr(self.folder / "secret.txt", "user.note", self._secret("xattr").encode())
        with duckdb.connect(str(self.folder / "ledger.duckdb")) as ledger:
            ledger.execute("CREATE TABLE cf_meta AS SELECT ? AS value", [self._secret("ledger")])
        for name in ("site", "mount"):
            (self.folder / name).mkdir()
        for path in self.folder.iterdir():
            path.chmod(0o777 if path.is_dir() else 0o666)
        (self._neighbour / "rows.csv").write_text(self._secret("neighbour"))

    def _open_inherited(self) -> None:
        """A descriptor that the worker forgot to close on exec."""
        self.inherited = os.open(self.folder / "secret.txt", os.O_RDONLY)
        os.set_inheritable(self.inherited, True)

    def _start_victim(self) -> None:
        secret = self._secret("memory")
        self._victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _VICTIM, str(self._plugin_uid), str(self.folder),
             self._secret("arguments")],
            env={"VICTIM_SECRET": secret},
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self._victim.stdout is not None
        self._address, self._length, self._held = map(int, self._victim.stdout.readline().split())

    def places(self, *, control: bool) -> dict[str, Any]:
        """What a plugin is told: where everything is, but none of the secrets.

        Args:
            control: for a run without a sandbox, which must not touch real code.
        """
        assert self._victim is not None
        listeners = self._listeners
        return {
            "folder": str(self.folder),
            "secret": str(self.folder / "secret.txt"),
            "config": str(self.folder / "global_config.toml"),
            "key": str(self.folder / "signing.key"),
            "ledger": str(self.folder / "ledger.duckdb"),
            "control": str(self.folder / "control.sock"),
            "notify": str(self.folder / "notify.sock"),
            "mount": str(self.folder / "mount"),
            "neighbour": str(self._neighbour),
            "abstract": listeners.abstract_name,
            "file_url": f"file://{self.folder}/secret.txt",
            "url": f"http://127.0.0.1:{listeners.tcp.getsockname()[1]}/x.csv",
            "port": listeners.tcp.getsockname()[1],
            "udp_port": listeners.udp.getsockname()[1],
            "worker": self._victim.pid,
            "address": self._address,
            "length": self._length,
            "held": self._held,
            "inherited": self.inherited,
            "token": self.token,
            "escaped": self._escaped,
            "nr": call_numbers(),
            "code": {name: str(self.folder / "site") for name in self._code}
            if control
            else self._code,
        }

    def effects(self, output: str) -> set[str]:
        """All that a plugin brought about, seen from outside."""
        assert self._victim is not None
        found: set[str] = set()
        if any(secret in output for secret in self._secrets.values()):
            found.add(LEAKED)
        if self._escaped in output:
            found.add(ESCAPED)
        if self._snapshot() != self._before or self._strays():
            found.add(CHANGED)
        if self._listeners.contacts:
            found.add(CONTACTED)
        if self._victim.poll() is not None:
            found.add(KILLED)
        if self.processes():
            found.add(SURVIVED)
        return found

    def await_effect(self, output: str, wanted: str, timeout_s: float = 5.0) -> set[str]:
        """The effects as soon as `wanted` is among them: a listener may be a moment late."""
        until = time.monotonic() + timeout_s
        while wanted not in (found := self.effects(output)) and time.monotonic() < until:
            time.sleep(0.01)
        return found

    def processes(self) -> list[int]:
        """Processes that a plugin started by this world's token."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with suppress(OSError):
                    if self.token.encode() in Path("/proc", entry, "cmdline").read_bytes():
                        found.append(int(entry))
        return found

    def repair(self) -> None:
        """As it was, after a plugin was let loose without a sandbox."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for stray in self._strays():
            stray.unlink(missing_ok=True)
        self._neighbour.chmod(0o700)
        if self._snapshot() != self._before:
            os.close(self.inherited)
            self._fill()
            self._open_inherited()
            self._before = self._snapshot()
        self._listeners.contacts.clear()
        if self._victim is not None and self._victim.poll() is not None:
            self._end_victim()
            self._start_victim()

    def _strays(self) -> list[Path]:
        """Files by this world's token in places that others read."""
        places = {"/tmp", "/var/tmp", "/dev/shm", "/run", *self._code.values()}
        return [
            path
            for place in places
            if os.path.isdir(place)
            for path in Path(place).glob(f"*{self.token}*")
        ]

    def _snapshot(self) -> list[tuple[object, ...]]:
        return sorted(
            _facts(path) for root in (self.folder, self._neighbour) for path in _all(root)
        )

    def _end_victim(self) -> None:
        if self._victim is not None:
            self._victim.kill()
            self._victim.wait()
            if self._victim.stdout is not None:
                self._victim.stdout.close()

    def close(self) -> None:
        self.repair()
        self._end_victim()
        self._listeners.close()
        os.close(self.inherited)
        for name in self.environment:
            del os.environ[name]
        shutil.rmtree(self.folder)


def _all(root: Path) -> Iterator[Path]:
    yield root
    yield from root.rglob("*")


def _facts(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    content = b""
    with suppress(OSError):  # shut, which is a change as well
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    written = (status.st_mtime_ns, status.st_ctime_ns) if path.is_file() else ()
    attributes: list[tuple[str, bytes]] = []
    if not path.is_symlink():
        with suppress(OSError):
            attributes = [(name, os.getxattr(path, name)) for name in os.listxattr(path)]
    facts = (status.st_mode, status.st_uid, status.st_nlink, status.st_ino, written)
    return (str(path), *facts, content, str(attributes))
