"""Listing a folder as Scout would: its walk, its ignore rules, its reading of files."""

import hashlib
import os
import stat
from collections.abc import Iterator
from datetime import UTC
from operator import itemgetter
from typing import Any, Final, Literal

from casparian_flow.domain.clock import Clock, utc
from casparian_flow.domain.paths import text_to_path
from casparian_flow.mcp_server.allow_list import OpenFolder, open_subfolder
from casparian_flow.mcp_server.budget import fitting
from casparian_flow.services.hashing import BLOCK_BYTES, ChangedError, read_file
from casparian_flow.services.ignore import compile_rules
from casparian_flow.services.patterns import compile_pattern
from casparian_flow.services.walk import WalkNotes, walk

ENTRIES_MAX: Final = 100_000
"""Files looked at in one call."""
HASH_BYTES_MAX: Final = 256 << 20
"""Read in one call; files beyond that are listed without a hash."""
FAST_BYTES: Final = 65_536
HashMode = Literal["none", "fast", "sha256"]


def scan(
    folder: OpenFolder,
    *,
    pattern: str | None,
    recursive: bool,
    hash_mode: HashMode,
    limit: int,
    clock: Clock,
) -> dict[str, Any]:
    """{path, files, total_size, file_count, truncated, problems}

    Each file is {path, size, modified_at, hash?}, `path` relative to the folder. `hash` is SHA-256
    of the whole file, or for "fast" of its size and first 64 KiB.

    Raises:
        UsageError: no such pattern.
    """
    if pattern is not None:
        compile_pattern(pattern)
    notes = WalkNotes()
    found = list[tuple[str, os.stat_result]]()
    whole = True
    for entry in _files(folder, pattern, recursive, notes):
        if len(found) >= ENTRIES_MAX:
            whole = False
            break
        found.append(entry)
    hasher = _Hasher(folder, hash_mode, clock)
    files, cut = fitting(
        (_told(*entry, hasher) for entry in sorted(found, key=itemgetter(0))), limit=limit
    )
    return {
        "path": folder.path,
        "files": files,
        "file_count": len(found),
        "total_size": sum(found_stat.st_size for _, found_stat in found),
        "truncated": cut or not whole,
        "problems": notes.problems[:20],
    }


def _files(
    folder: OpenFolder, pattern: str | None, recursive: bool, notes: WalkNotes
) -> Iterator[tuple[str, os.stat_result]]:
    rules = compile_rules((), [pattern] if pattern else [])
    # Through the open descriptor: whatever the path is made to name meanwhile, this is walked.
    for listing in walk(f"/proc/self/fd/{folder.descriptor}", rules, notes):
        for name, found in zip(listing.names, listing.stats, strict=True):
            yield listing.prefix + name, found
        if not recursive:
            return


def _told(path: str, found: os.stat_result, hasher: "_Hasher") -> dict[str, Any]:
    modified = utc(found.st_mtime_ns // 1_000).replace(tzinfo=UTC)
    row = {"path": path, "size": found.st_size, "modified_at": modified.isoformat()}
    if hasher.mode != "none":
        row["hash"] = hasher.hash(path, found.st_size)
    return row


class _Hasher:
    """Hashes files below a folder, up to a total of bytes."""

    def __init__(self, folder: OpenFolder, mode: HashMode, clock: Clock) -> None:
        self.mode = mode
        self._folder = folder
        self._clock = clock
        self._left = HASH_BYTES_MAX
        self._buffer = bytearray(BLOCK_BYTES)

    def hash(self, path: str, size: int) -> str | None:
        """64 hex digits; None if the file cannot be read, changes, or is too much."""
        cost = size if self.mode == "sha256" else min(size, FAST_BYTES)
        if cost > self._left:
            return None
        self._left -= cost
        *above, name = text_to_path(path).split("/")
        parent = open_subfolder(self._folder.descriptor, above)
        if parent is None:
            return None
        try:
            if self.mode == "fast":
                return _fast(parent, name)
            path_now = f"/proc/self/fd/{parent}/{name}"
            return read_file(path_now, self._clock, self._buffer).content_hash
        except (OSError, ChangedError):
            return None
        finally:
            os.close(parent)


def _fast(parent: int, name: str) -> str | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        digest = hashlib.sha256(found.st_size.to_bytes(8, "big"))
        digest.update(os.pread(descriptor, FAST_BYTES, 0))
        return digest.hexdigest()
    finally:
        os.close(descriptor)
