"""How much of the disk a plugin's files take, as far as it can be seen from outside."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable

ENTRIES_MAX = 1_000_000
UNSEEN = 1 << 62
"""Told for a folder that hides what it holds: by far too many entries, or far too deep."""
_BLOCK = 512


def bytes_below(folder: str) -> int:
    """What the files in a folder take on disk; those that vanish meanwhile may be missed."""
    total = entries = 0
    todo = [folder]
    while todo:
        try:
            with os.scandir(todo.pop()) as found:
                for entry in found:
                    entries += 1
                    total += _taken(entry)
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    if entries > ENTRIES_MAX:
                        return UNSEEN
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return UNSEEN
    return total


def _taken(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_blocks * _BLOCK
    except OSError:
        return 0


def bytes_deleted(pids: Iterable[int], folders: Iterable[str]) -> int:
    """What files without a name take that these processes hold open beside the folders.

    Seen only by a worker that is root.
    """
    devices = set()
    for folder in folders:
        with contextlib.suppress(OSError):
            devices.add(os.stat(folder).st_dev)
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    status = os.stat(descriptor.path)
                    if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                        found[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK
    return sum(size for (device, _), size in found.items() if device in devices)
