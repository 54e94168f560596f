"""Whether an environment's files are still those that were installed.

What was found after the installation is recorded beside the environment: every file with its
size, its times and the SHA-256 of its content. A later look compares sizes and times, and reads
only files whose times differ (a hard link to the package cache changes them).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 20
Stamp = tuple[int, int, int]
"""Size, and times of the last change of content and of the entry, in nanoseconds."""


def record(folder: Path, target: Path) -> None:
    """Write what is in `folder` to `target`.

    Raises:
        OSError: something cannot be read or written.
    """
    entries = {name: [*_stamp(path), _digest(path)] for name, path in _entries(folder)}
    target.write_text(json.dumps(entries), encoding="ascii")


class Installed:
    """What was recorded of one environment."""

    def __init__(self, folder: Path, recorded: Path) -> None:
        """Raises:
        OSError, ValueError: the record cannot be read.
        """
        self._folder = folder
        loaded = json.loads(recorded.read_text(encoding="ascii"))
        self._digests = {name: str(entry[3]) for name, entry in loaded.items()}
        self._stamps = {name: tuple(entry[:3]) for name, entry in loaded.items()}

    def change(self) -> str:
        """What is not as it was installed, as the beginning of a sentence; "" if all is.

        Raises:
            OSError: something cannot be read.
        """
        missing = set(self._digests)
        for name, path in _entries(self._folder):
            if name not in self._digests:
                return f"{name} was added"
            missing.discard(name)
            stamp = _stamp(path)
            if stamp != self._stamps[name]:
                if _digest(path) != self._digests[name]:
                    return f"{name} was changed"
                self._stamps[name] = stamp
        return f"{min(missing)} was removed" if missing else ""


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file and link below a folder, by its name relative to it."""
    start = os.path.join(str(folder), "")
    for parent, folders, names in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*names, *linked):
            path = os.path.join(parent, name)
            yield path.removeprefix(start), path


def _stamp(path: str) -> Stamp:
    found = os.lstat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(path: str) -> str:
    if os.path.islink(path):
        return f"-> {os.readlink(path)}"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
