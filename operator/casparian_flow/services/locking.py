"""The lock file of a plugin: kept while it is fresh, otherwise made by `uv lock`.

Where a plugin says what it needs decides:

    a script block in its source (PEP 723)   locked into NAME.uv.lock beside it
    pyproject.toml with [project] beside it  locked into uv.lock beside it
    only a uv.lock beside it                 taken as it is
    none of these                            no lock: it runs with the worker's own packages
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.lockfile import LOCK_BYTES_MAX, REQUIRED_PACKAGE, uv_program

LOCKFILE = "uv.lock"
PROJECT = "pyproject.toml"
UV_TIMEOUT_S = 600.0
_MESSAGE_CHARS_MAX = 8_000
_SCRIPT_BLOCK = re.compile(
    r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
)
"""As PEP 723 defines it."""
_PACKAGE = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True, slots=True)
class Locked:
    """A plugin's lock file, and what was done to have it.

    Attributes:
        text: "" for a plugin that runs with the worker's packages.
        told: in a few words.
    """

    text: str
    told: str


def lock(plugin: Path, source: str, read: Callable[[Path, int], str]) -> Locked:
    """See to a fresh lock file for a plugin; uv's resolver is asked only if it is not fresh.

    Args:
        source: the plugin's text.
        read: reads a text file of at most so many bytes, or raises UsageError.

    Raises:
        UsageError: what the plugin says cannot be read, or uv could not lock it; with uv's words.
    """
    project, kept = plugin.with_name(PROJECT), plugin.with_name(LOCKFILE)
    script = script_block(source)
    if script is not None:
        return _lock_script(plugin, script, read)
    if project.is_file() and "project" in _toml(read(project, LOCK_BYTES_MAX), project):
        fresh = kept.is_file() and _is_fresh(plugin.parent)
        if not fresh:
            _uv(plugin.parent, "lock", told_of=project)
        return Locked(read(kept, LOCK_BYTES_MAX), f"{LOCKFILE} {'is fresh' if fresh else 'made'}")
    if kept.is_file():
        return Locked(read(kept, LOCK_BYTES_MAX), f"{LOCKFILE} taken as it is")
    return Locked("", "no lock: it runs with the worker's packages")


def script_block(source: str) -> str | None:
    """The TOML of a source's PEP 723 block, None if it has none.

    Raises:
        UsageError: it has more than one.

    >>> script_block("# /// script\\n# dependencies = ['polars']\\n# ///\\n")
    "dependencies = ['polars']\\n"
    """
    found = [match for match in _SCRIPT_BLOCK.finditer(source) if match["type"] == "script"]
    if len(found) > 1:
        raise UsageError("the source has more than one script block (PEP 723)")
    if not found:
        return None
    lines = found[0]["content"].splitlines(keepends=True)
    return "".join(line[2:] if line.startswith("# ") else line[1:] for line in lines)


def _lock_script(plugin: Path, script: str, read: Callable[[Path, int], str]) -> Locked:
    kept = plugin.with_name(f"{plugin.stem}.{LOCKFILE}")
    with tempfile.TemporaryDirectory(prefix="casparian-lock-") as name:
        folder = Path(name)
        (folder / PROJECT).write_text(_project_of(plugin, script), encoding="utf-8")
        before = read(kept, LOCK_BYTES_MAX) if kept.is_file() else ""
        if before:
            (folder / LOCKFILE).write_text(before, encoding="utf-8")
            if _is_fresh(folder):
                return Locked(before, f"{kept.name} is fresh")
        _uv(folder, "lock", told_of=plugin)
        text = read(folder / LOCKFILE, LOCK_BYTES_MAX)
    try:
        kept.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{kept} cannot be written: {error.strerror or error}",
            hint="The lock is kept beside the plugin, so that the next publish needs no network.",
        ) from error
    return Locked(text, f"{kept.name} made")


def _project_of(plugin: Path, script: str) -> str:
    """A pyproject.toml with what a script block asks for, and what every plugin needs."""
    data = _toml(script, plugin)
    wanted = data.get("dependencies", [])
    requires = data.get("requires-python", f">={sys.version_info.major}.{sys.version_info.minor}")
    if not isinstance(wanted, list) or not all(isinstance(item, str) for item in wanted):
        raise UsageError(f"{plugin}: the script block's dependencies are no list of text")
    if not isinstance(requires, str):
        raise UsageError(f"{plugin}: the script block's requires-python is no text")
    names = {found[1].lower() for item in wanted if (found := _PACKAGE.match(item))}
    if REQUIRED_PACKAGE not in names:
        wanted = [*wanted, REQUIRED_PACKAGE]
    lines = ["[project]", 'name = "plugin"', 'version = "0"']
    lines += [f"requires-python = {_quoted(requires)}"]
    lines += ["dependencies = [", *(f"  {_quoted(item)}," for item in wanted), "]"]
    lines += ["[tool.uv]", "package = false", ""]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{escaped}"'


def _toml(text: str, where: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid TOML: {error}") from error


def _is_fresh(folder: Path) -> bool:
    """Whether uv finds nothing to change, without asking the network."""
    return _run(folder, "lock", "--check", "--offline").returncode == 0


def _uv(folder: Path, *arguments: str, told_of: Path) -> None:
    done = _run(folder, *arguments)
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip()[-_MESSAGE_CHARS_MAX:]
        raise UsageError(
            f"uv could not lock what {told_of} needs:\n{words}",
            hint="Correct its dependencies. Without network, publish with a fresh lock beside it.",
        )


def _run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    variables = {k: v for k, v in os.environ.items() if k not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    variables["UV_PYTHON_DOWNLOADS"] = "never"
    command = [uv_program(), "--quiet", *arguments, "--project", str(folder), "--no-progress"]
    try:
        return subprocess.run(
            [*command, "--color", "never"],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=UV_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"uv did not finish within {UV_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise UsageError(
            f"uv cannot be run: {error.strerror or error}",
            hint="Install casparian-flow[worker], which brings it.",
        ) from error
