"""Reading a file's bytes for their hash, and proving that they held still meanwhile."""

import hashlib
import os
import stat
from typing import NamedTuple

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.signature import Signature, signature_of

BLOCK_BYTES = 1 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class Reading(NamedTuple):
    """One file, read whole while its signature stood still."""

    signature: Signature
    content_hash: str
    """SHA-256, 64 hex digits."""
    hashed_at_us: int
    """Wall clock when reading began."""


class ChangedError(Exception):
    """The file changed while it was read, or is no regular file any more."""


def read_file(path: str, clock: Clock, buffer: bytearray) -> Reading:
    """Hash the regular file at `path`.

    The file is opened without following a link and without blocking on a FIFO put in its place;
    it is statted before and after reading, and its path once more at the end.

    Args:
        buffer: scratch space of any size, one per thread; BLOCK_BYTES is a good size.

    Raises:
        ChangedError: the bytes read are not known to be one state of the file.
        OSError: it cannot be opened or read; FileNotFoundError if it is gone.
    """
    hashed_at_us = clock.now().wall_us
    descriptor = os.open(path, _OPEN)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ChangedError(path)
        signature = signature_of(before)
        content_hash = _digest(descriptor, buffer, before.st_size)
        if signature_of(os.fstat(descriptor)) != signature:
            raise ChangedError(path)
    finally:
        os.close(descriptor)
    if signature_of(os.lstat(path)) != signature:
        raise ChangedError(path)
    return Reading(signature, content_hash, hashed_at_us)


def _digest(descriptor: int, buffer: bytearray, size: int) -> str:
    digest = hashlib.sha256()
    view = memoryview(buffer)
    total = 0
    while count := os.readv(descriptor, [buffer]):
        digest.update(view[:count])
        total += count
        if total > size:
            # Growing while it is read: the stat afterwards would say so, but perhaps never come.
            raise ChangedError(descriptor)
    return digest.hexdigest()
