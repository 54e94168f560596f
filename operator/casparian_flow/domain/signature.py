"""A file's signature: what `stat` says that changes whenever its bytes may have changed.

Two equal signatures mean equal bytes only if the one on record is not *racy*: a write within the
same clock tick as the read leaves every field as it was (the "racy Git" problem).
"""

import os

Signature = tuple[int, int, int, int, int]
"""(dev, ino, size, mtime_ns, ctime_ns), each as a signed 64-bit number."""

NO_SIGNATURE: Signature = (0, 0, 0, 0, 0)
"""Of a file that was seen but never read."""

RACY_SLACK_US = 2_000_000
"""Coarsest timestamp among common file systems (FAT: 2 s), and room for a skewed file server."""

_FIRST, _LAST = -(1 << 63), (1 << 63) - 1


def signature_of(stat: os.stat_result) -> Signature:
    """The signature of a `stat`, `lstat` or `fstat` result.

    Everything fits a signed 64-bit column: device and inode numbers that use all 64 bits wrap to
    negative ones, and times beyond the years 1677 to 2262 stand at the nearest end.
    """
    return (
        signed_64(stat.st_dev),
        signed_64(stat.st_ino),
        stat.st_size,
        min(max(stat.st_mtime_ns, _FIRST), _LAST),
        min(max(stat.st_ctime_ns, _FIRST), _LAST),
    )


def signed_64(number: int) -> int:
    """An unsigned 64-bit number as the signed one with the same bits."""
    return number if number <= _LAST else number - (1 << 64)


def is_racy(signature: Signature, hashed_at_us: int, slack_us: int = RACY_SLACK_US) -> bool:
    """Whether a record made by hashing at `hashed_at_us` must not be trusted by signature alone.

    True if the file's last change is not clearly older than the read; so also for timestamps in
    the future.

    >>> is_racy((1, 2, 3, 5_000_000_000, 5_000_000_000), hashed_at_us=10_000_000)
    False
    >>> is_racy((1, 2, 3, 5_000_000_000, 9_000_000_000), hashed_at_us=10_000_000)
    True
    """
    changed_us = max(signature[3], signature[4]) // 1_000
    return changed_us >= hashed_at_us - slack_us
