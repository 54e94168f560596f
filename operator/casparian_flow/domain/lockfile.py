"""A plugin's uv.lock: whether a worker can make an environment from it.

The format is uv's own; only what is needed here is read, and unknown keys are left alone.
"""

import os
import re
import sys
import tomllib
from dataclasses import dataclass
from typing import Any

from casparian_flow.domain.errors import UsageError

LOCK_BYTES_MAX = 4 * 1024 * 1024
"""Far above what is met; lock and source reach a worker in one message, escaped as JSON."""
REQUIRED_PACKAGE = "pyarrow"
"""Rows travel as Arrow, so that no environment works without it."""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+!_-]{0,99}")
_SPECIFIER = re.compile(r"[0-9A-Za-z.*<>=!~, ]{0,200}")
_ADDRESS = re.compile(r"https?://[^\s]{1,1000}")
_ROOT_SOURCES = ("virtual", "editable")
_FOREIGN_SOURCES = {
    "git": "a git repository",
    "url": "a direct URL",
    "path": "a file",
    "directory": "a local folder",
    "editable": "a local folder",
    "virtual": "a local folder",
}


class LockError(UsageError):
    """The text is no usable uv.lock."""


@dataclass(frozen=True, slots=True)
class LockedPackage:
    """One `[[package]]`.

    Attributes:
        origin: "registry", or the kind of source that is none.
        wheels: whether wheels are listed; without any it would have to be built.
    """

    name: str
    version: str
    origin: str
    wheels: bool


@dataclass(frozen=True, slots=True)
class Lock:
    """What a lockfile says.

    Attributes:
        root: name of the project that was locked.
        packages: all others.
        indexes: addresses of the registries that they come from, each once.
    """

    root: str
    root_version: str
    requires_python: str
    packages: tuple[LockedPackage, ...]
    indexes: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Why a worker would refuse to make this environment, one line each; empty if it can."""
        found: list[str] = []
        if not any(package.name == REQUIRED_PACKAGE for package in self.packages):
            found.append(f"the lock lacks {REQUIRED_PACKAGE}; add it with `uv add pyarrow`")
        for package in self.packages:
            if package.origin != "registry":
                kind = _FOREIGN_SOURCES.get(package.origin, "no package registry")
                found.append(f"{package.name} comes from {kind}, which a worker cannot install")
            elif not package.wheels:
                found.append(f"{package.name} {package.version} has no wheels; choose one that has")
        return found

    def pyproject(self) -> str:
        """The least pyproject.toml that `uv sync --frozen` accepts beside the lock."""
        return (
            f'[project]\nname = "{self.root}"\nversion = "{self.root_version}"\n'
            f'requires-python = "{self.requires_python}"\ndependencies = []\n'
            "[tool.uv]\npackage = false\n"
        )


def lock_problems(text: str) -> list[str]:
    """Why no worker could make an environment from this uv.lock, one line each; empty if it can.

    Asked at deploy time, so that the author hears of it and not the first job.
    """
    try:
        return read_lock(text).problems()
    except LockError as error:
        return [str(error)]


def check_lock(text: str) -> None:
    """Raises UsageError for a lock file from which no worker could make an environment; "" is none
    at all."""
    problems = lock_problems(text) if text else []
    if problems:
        raise UsageError(
            "no worker could make an environment from the lock file: " + "; ".join(problems),
            hint="Correct the plugin's pyproject.toml, run `uv lock`, and publish again.",
        )


def read_lock(text: str) -> Lock:
    """Parse a uv.lock.

    Raises:
        LockError: no TOML, or not the shape of a uv.lock with one project at its root.
    """
    if len(text.encode("utf-8", "surrogatepass")) > LOCK_BYTES_MAX:
        raise LockError(f"the lock is larger than {LOCK_BYTES_MAX >> 20} MiB")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers without end
        raise LockError(f"the lock is no TOML: {error}", hint=_HINT) from None
    requires = data.get("requires-python", ">=3.8")
    entries = data.get("package")
    if not isinstance(requires, str) or not _SPECIFIER.fullmatch(requires):
        raise LockError("the lock's requires-python is no version specifier", hint=_HINT)
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise LockError("the lock lists no packages", hint=_HINT)
    roots = [entry for entry in entries if _is_root(entry)]
    if len(roots) != 1:
        raise LockError(f"the lock has {len(roots)} root projects, want one", hint=_HINT)
    root = _package(roots[0])
    packages = tuple(_package(entry) for entry in entries if entry is not roots[0])
    indexes = dict.fromkeys(_index(entry) for entry in entries)
    return Lock(root.name, root.version, requires, packages, tuple(filter(None, indexes)))


_HINT = "Make it with `uv lock` in the plugin's folder."


def uv_program() -> str:
    """The uv beside this interpreter, else the one on PATH."""
    beside = os.path.join(sys.prefix, "bin", "uv")
    return beside if os.path.exists(beside) else "uv"


def _is_root(entry: dict[str, Any]) -> bool:
    source = entry.get("source")
    return isinstance(source, dict) and any(source.get(kind) == "." for kind in _ROOT_SOURCES)


def _index(entry: dict[str, Any]) -> str:
    source = entry.get("source")
    address = source.get("registry") if isinstance(source, dict) else ""
    return address if isinstance(address, str) and _ADDRESS.fullmatch(address) else ""


def _package(entry: dict[str, Any]) -> LockedPackage:
    name, version = entry.get("name"), entry.get("version", "0")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LockError(f"the lock has a package with the name {name!r}", hint=_HINT)
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise LockError(f"the lock gives {name} the version {version!r}", hint=_HINT)
    source = entry.get("source")
    origin = next(iter(source), "") if isinstance(source, dict) else ""
    return LockedPackage(name, version, origin, bool(entry.get("wheels")))
