"""The high-water mark: how far the ledger has acknowledged, kept outside the ledger.

A damaged write-ahead log can lose acknowledged commits without DuckDB noticing, and a restored
backup is an older ledger that looks sound. The sidecar `<ledger>.hwm` holds the sequence number
of the last acknowledged commit; a ledger that opens below it is refused.

Two fixed slots are written in turn, each with its own checksum, so that a torn write loses at
most the newest mark and never makes a false one.
"""

import hashlib
import os
from pathlib import Path
from typing import Final

from casparian_flow.domain.errors import LedgerCorruptError

_SLOT_BYTES: Final = 512
"""One sector each: a torn write cannot touch both slots."""


class HighWater:
    """The open sidecar of one ledger. Not thread-safe; the ledger's lock covers it."""

    def __init__(self, path: Path, ledger_id: str) -> None:
        """Open or create the sidecar.

        Raises:
            LedgerCorruptError: it belongs to another ledger.
            OSError: it cannot be opened.
        """
        self._path = path
        self._ledger_id = ledger_id
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._slot = 0
        self.mark = 0
        try:
            for owner, mark, slot in _read_slots(self._fd):
                if owner != ledger_id:
                    raise LedgerCorruptError(
                        f"{path.name} belongs to ledger {owner}, the file beside it is {ledger_id}",
                        hint=f"If the ledger was replaced on purpose, delete {path}.",
                    )
                if mark >= self.mark:
                    self.mark, self._slot = mark, 1 - slot
        except LedgerCorruptError:
            self.close()
            raise

    def write(self, mark: int) -> None:
        """Record durably that everything up to `mark` is acknowledged.

        Raises:
            OSError: the mark is not on disk.
        """
        body = f"{self._ledger_id} {mark}"
        line = f"{body} {_checksum(body)}\n".encode()
        os.pwrite(self._fd, line.ljust(_SLOT_BYTES, b"\0"), self._slot * _SLOT_BYTES)
        os.fdatasync(self._fd)
        self.mark = mark
        self._slot = 1 - self._slot

    def remove(self) -> None:
        """Close and delete the sidecar: the ledger beside it becomes another one."""
        self.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _read_slots(fd: int) -> list[tuple[str, int, int]]:
    """(ledger id, mark, slot) of each slot whose checksum holds."""
    found = []
    raw = os.pread(fd, 2 * _SLOT_BYTES, 0)
    for slot in (0, 1):
        text = raw[slot * _SLOT_BYTES : (slot + 1) * _SLOT_BYTES].split(b"\n", 1)[0]
        parts = text.decode("ascii", "replace").split(" ")
        if len(parts) == 3 and parts[2] == _checksum(f"{parts[0]} {parts[1]}"):
            found.append((parts[0], int(parts[1]), slot))
    return found
