"""Python environments for plugins: the worker's own, or one per lockfile, built by uv and cached.

    <cache>/environments/<sha256 of the lock and the interpreter>/
        venv/          made by `uv venv`, `uv export --frozen` and `uv pip install --require-hashes`
        files.json     every file in it, with its SHA-256
        ready.json     written last; its modification time says when it was last used
    <cache>/environments/<the same>.lock    exclusive while building or removing, shared while used

A build happens in a folder of another name and is renamed when complete, so that a killed worker
leaves nothing that looks usable. Only wheels are installed: building from source would run the
package's code outside of any sandbox. The index may be another than the lock names, since every
wheel must have a hash that the lock gives; `uv sync` would insist on the lock's.

Where environments are provisioned beforehand (provision.py), workers only read them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.lockfile import Lock, LockError, read_lock, uv_program
from casparian_worker.guest_kit import base_python
from casparian_worker.installed import Installed, record
from casparian_worker.plugin_events import LaunchError

BUILD_TIMEOUT_S = 900.0
CACHE_BYTES_MAX = 10 << 30
"""Least recently used environments go beyond this, down to 80 % of it."""
_MESSAGE_BYTES_MAX = 4_000
_NETWORK_SIGNS = (
    "error sending request",
    "failed to fetch",
    "failed to download",
    "dns error",
    "connection refused",
    "connection reset",
    "timed out",
    "network",
    "503 service unavailable",
    "502 bad gateway",
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WheelSource:
    """Where wheels come from; by default from where the lock says.

    Attributes:
        index_url: of a package index.
        wheelhouse: folder of wheels, used without any index.
        ca_file: certificates by which the index is trusted, in PEM.
    """

    index_url: str = ""
    wheelhouse: str = ""
    ca_file: str = ""

    def options(self, lock: Lock) -> list[str]:
        """For `uv pip install`."""
        if self.wheelhouse:
            return ["--no-index", "--find-links", self.wheelhouse]
        # uv's own variables stand above what the lock says, and below the settings.
        if self.index_url or not _INDEX_VARIABLES & os.environ.keys():
            first, *more = [self.index_url] if self.index_url else lock.indexes or ("",)
            options = ["--default-index", first] if first else []
            options += [option for url in more for option in ("--index", url)]
            # Of several, any may have the locked bytes; which bytes they are, the hashes say.
            return [*options, "--index-strategy", "unsafe-best-match"] if more else options
        return []

    def variables(self) -> dict[str, str]:
        return {"SSL_CERT_FILE": self.ca_file} if self.ca_file else {}


_INDEX_VARIABLES = frozenset({"UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_NO_INDEX", "UV_FIND_LINKS"})


@dataclass(frozen=True, slots=True)
class Environment:
    """What a plugin's process is started with.

    Attributes:
        python: the base interpreter.
        site: site-packages folders.
        prefix: the environment's root.
        code: every folder the process must be able to read for all this.
    """

    python: str
    site: tuple[str, ...]
    prefix: str
    code: tuple[str, ...]


def own_environment() -> Environment:
    """The worker's environment, for plugins without a lockfile."""
    paths = sysconfig.get_paths()
    # Distributions patch these: what sysconfig names need not be where packages are.
    named = dict.fromkeys((paths["purelib"], paths["platlib"], *site.getsitepackages()))
    folders = tuple(folder for folder in named if os.path.isdir(folder))
    return Environment(base_python(), folders, sys.prefix, _code(sys.prefix, folders))


def _code(prefix: str, folders: tuple[str, ...]) -> tuple[str, ...]:
    base = os.path.realpath(sys.base_prefix)
    return tuple(dict.fromkeys((base, os.path.realpath(prefix), *map(os.path.realpath, folders))))


class EnvironmentCache:
    """Builds and keeps the environments of one cache folder, which several workers may share.

    An environment handed out stays in place until `close`.
    """

    def __init__(
        self,
        cache: str,
        *,
        max_bytes: int = CACHE_BYTES_MAX,
        uv: str = "",
        timeout_s: float = BUILD_TIMEOUT_S,
        wheels: WheelSource | None = None,
        read_only: bool = False,
        private_downloads: bool = False,
    ) -> None:
        """Nothing is made yet.

        Args:
            uv: the program; by default the one beside the worker's interpreter, else on PATH.
            read_only: use what was provisioned; make, lock, mark and remove nothing.
            private_downloads: keep uv's cache beside the build and remove it with that.
        """
        self._folder = Path(cache, "environments")
        self._max_bytes = max_bytes
        self._uv = uv or uv_program()
        self._timeout_s = timeout_s
        self._wheels = wheels or WheelSource()
        self._read_only = read_only
        self._private_downloads = private_downloads
        self._held: dict[str, int] = {}
        self._installed: dict[str, Installed] = {}
        self._turns: dict[str, threading.Lock] = {}
        """By key: the file locks tell processes apart, not the threads of one."""

    def obtain(self, lockfile: str, progress: Progress = lambda _: None) -> Environment:
        """The environment for a lockfile, built if this cache lacks it; "" is the worker's own.

        Waits while another worker, or another slot of this one, builds the same one.

        Args:
            progress: told in one line each what is being done.

        Raises:
            LaunchError: the lock cannot be used, uv failed (with its own message), or a file is
                not the one that was installed.
        """
        if not lockfile:
            return own_environment()
        key = environment_key(lockfile)
        try:
            with self._turns.setdefault(key, threading.Lock()):
                final = self._ready(key, lockfile, progress)
                self._require_unchanged(key, final)
        except OSError as error:
            raise _refusal(f"the environment cannot be kept: {error}", transient=True) from error
        venv = os.path.realpath(final / "venv")
        folders = tuple(map(str, sorted(Path(venv, "lib").glob("python*/site-packages"))))
        return Environment(base_python(), folders, venv, _code(venv, folders))

    def _ready(self, key: str, lockfile: str, progress: Progress) -> Path:
        """The lock's folder, with a complete environment that stays while this cache is open."""
        final = self._folder / key
        if self._read_only:
            if not _complete(final):
                raise _refusal(
                    f"the environment of this lock file is not provisioned (no {final})",
                    transient=True,
                    hint="Provision it: python -m casparian_worker.provision.",
                )
            return final
        self._folder.mkdir(parents=True, exist_ok=True)
        held = self._held.get(key, -1)
        if held < 0:
            held = self._held[key] = _open_lock(self._folder / f"{key}.lock")
        fcntl.flock(held, fcntl.LOCK_SH)
        if not _complete(final):
            fcntl.flock(held, fcntl.LOCK_EX)
            if not _complete(final):
                self._build(lockfile, final, progress)
                self.clean(keep=key)
            fcntl.flock(held, fcntl.LOCK_SH)
        os.utime(final / "ready.json")
        return final

    def _require_unchanged(self, key: str, final: Path) -> None:
        try:
            if key not in self._installed:
                self._installed[key] = Installed(final / "venv", final / "files.json")
            change = self._installed[key].change()
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise _refusal(
                f"the record of the environment {final} cannot be read: {error}",
                hint="Stop the worker and delete this folder: it is made again.",
            ) from error
        if change:
            raise _refusal(
                f"the environment is not the one that was installed: {change} in {final / 'venv'}",
                hint="Stop the worker and delete this folder: it is made again.",
            )

    def close(self) -> None:
        """Let go of every environment handed out."""
        self._installed.clear()
        for held in self._held.values():
            os.close(held)
        self._held.clear()

    def clean(self, keep: str = "") -> list[str]:
        """Remove least recently used environments beyond the size limit, none that is in use.

        Returns:
            The keys of those removed.
        """
        ready = sorted(self._folder.glob("*/ready.json"), key=lambda p: p.stat().st_mtime)
        sizes = {path: _size_of(path) for path in ready}
        total = sum(sizes.values())
        removed: list[str] = []
        if total <= self._max_bytes:
            return removed
        for path in ready:
            key = path.parent.name
            if total <= self._max_bytes * 0.8:
                break
            if key != keep and key not in self._held and self._remove(key):
                total -= sizes[path]
                removed.append(key)
        return removed

    def _remove(self, key: str) -> bool:
        with _exclusive(self._folder / f"{key}.lock") as free:
            if free:
                # The marker goes first: a half-removed environment must not look usable.
                (self._folder / key / "ready.json").unlink(missing_ok=True)
                shutil.rmtree(self._folder / key, ignore_errors=True)
            return free

    def _build(self, lockfile: str, final: Path, progress: Progress) -> None:
        try:
            lock = read_lock(lockfile)
        except LockError as error:
            raise _refusal(str(error), hint=error.hint) from error
        problems = lock.problems()
        if problems:
            raise _refusal("; ".join(problems), hint="Lock again and publish a new version.")
        staged = Path(tempfile.mkdtemp(prefix=".build-", dir=self._folder))
        try:
            staged.chmod(0o755)
            project = staged / "project"
            project.mkdir()
            (project / "uv.lock").write_text(lockfile, encoding="utf-8")
            (project / "pyproject.toml").write_text(lock.pyproject(), encoding="utf-8")
            progress(f"building an environment of {len(lock.packages)} packages")
            self._install(project, staged / "venv", lock)
            shutil.rmtree(project)  # with uv's cache, whose hard links change the files' times
            size = _bytes_below(staged / "venv")
            record(staged / "venv", staged / "files.json")
            shutil.rmtree(final, ignore_errors=True)  # of a removal that was cut short
            (staged / "ready.json").write_text(json.dumps({"bytes": size}), encoding="ascii")
            staged.rename(final)
            progress(f"the environment is ready ({size >> 20} MiB)")
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _install(self, project: Path, venv: Path, lock: Lock) -> None:
        """Install what the lock lists: wheels only, each with a hash that stands there."""
        deadline = SystemClock().now().mono + self._timeout_s
        wanted = project / "requirements.txt"
        run = partial(self._run, project, deadline)
        # Of the commands that need no index, this one refuses an interpreter that does not fit.
        run("tree", "--frozen", "--quiet", "--project", str(project), "--python", base_python())
        run("venv", str(venv), "--no-project", "--python", base_python())
        run(
            "export", "--frozen", "--project", str(project), "--output-file", str(wanted),
            "--format", "requirements.txt", "--no-default-groups", "--no-emit-project",
            "--no-header", "--no-annotate", "--quiet",
        )  # fmt: skip
        run(
            "pip", "install", "--python", str(venv), "--requirements", str(wanted),
            "--require-hashes", "--only-binary", ":all:", "--no-deps", "--compile-bytecode",
            *self._wheels.options(lock),
        )  # fmt: skip

    def _run(self, project: Path, deadline: float, *command: str) -> None:
        dropped = {"VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT"}
        variables = {k: v for k, v in os.environ.items() if k not in dropped}
        variables |= {"UV_PYTHON_DOWNLOADS": "never"} | self._wheels.variables()
        if self._private_downloads:
            variables["UV_CACHE_DIR"] = str(project / "cache")
        try:
            done = subprocess.run(
                [self._uv, *command, "--no-config", "--no-progress", "--color", "never"],
                cwd=project,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=max(deadline - SystemClock().now().mono, 1.0),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _refusal(
                f"uv did not finish within {self._timeout_s:g} s", transient=True
            ) from error
        except OSError as error:
            raise _refusal(
                f"uv cannot be run: {error}", hint="Install casparian-flow[worker]."
            ) from error
        if done.returncode:
            told = done.stderr[-_MESSAGE_BYTES_MAX:].decode("utf-8", "replace").strip()
            words = told.lower()
            network = "hash mismatch" not in words and any(s in words for s in _NETWORK_SIGNS)
            named = "pip install" if command[0] == "pip" else command[0]
            raise _refusal(f"uv {named} failed: {told}", transient=network)


def _complete(final: Path) -> bool:
    return (final / "ready.json").exists() and (final / "files.json").exists()


def environment_key(lockfile: str) -> str:
    """Name of a lock's environment under this interpreter."""
    parts = (lockfile, base_python(), sys.version, sysconfig.get_platform())
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()[:40]


def _refusal(message: str, *, transient: bool = False, hint: str = "") -> LaunchError:
    return LaunchError(message, reason=Reason.ENVIRONMENT, transient=transient, hint=hint)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Whether the lock could be had without waiting; released at the end."""
    lock = _open_lock(path)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def _size_of(marker: Path) -> int:
    try:
        size = json.loads(marker.read_text(encoding="ascii")).get("bytes", 0)
    except (OSError, ValueError, AttributeError):
        return 0
    return size if isinstance(size, int) else 0


def _bytes_below(folder: Path) -> int:
    """Sum of the files' sizes; files shared with uv's cache count in full."""
    return sum(
        os.lstat(os.path.join(parent, name)).st_size
        for parent, _, names in os.walk(folder)
        for name in names
    )
