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
    """The open sidecar of one ledger. Not thread-safe; the ledger's lock covers it.

    Attributes:
        mark: the newest one, 0 if there is none.
        unknown: the file holds no mark that can be read, so there is no telling how far the
            ledger had got. (A new ledger is given the mark 0.)
    """

    def __init__(self, path: Path, ledger_id: str) -> None:
        """Open or create the sidecar.

        Raises:
            LedgerCorruptError: it belongs to another ledger.
            OSError: it cannot be opened.
        """
        self._ledger_id = ledger_id
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._slot = 0
        self.mark = 0
        slots = _read_slots(os.pread(self._fd, 2 * _SLOT_BYTES, 0))
        self.unknown = not slots
        try:
            for owner, mark, slot in slots:
                if owner != ledger_id:
                    raise _foreign(path, owner, ledger_id)
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

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sidecar_path(ledger: Path) -> Path:
    return ledger.with_name(ledger.name + ".hwm")


def newest_mark(path: Path) -> tuple[str, int]:
    """(ledger id, mark) of the sidecar at `path`, ("", 0) if there is none that can be read."""
    try:
        with path.open("rb") as file:
            slots = _read_slots(file.read(2 * _SLOT_BYTES))
    except OSError:
        return "", 0
    owner, mark, _ = max(slots, key=lambda slot: slot[1], default=("", 0, 0))
    return owner, mark


def check_mark(ledger: Path, ledger_id: str, seq: int) -> None:
    """Refuse a ledger that lacks what was acknowledged.

    Args:
        seq: the newest sequence number in the ledger.

    Raises:
        LedgerCorruptError: it ends below its mark, or the mark is another ledger's.
    """
    sidecar = sidecar_path(ledger)
    owner, mark = newest_mark(sidecar)
    if owner and owner != ledger_id:
        raise _foreign(sidecar, owner, ledger_id)
    if mark > seq:
        raise LedgerCorruptError(
            f"ledger {ledger} ends at {seq}, but {mark} was acknowledged: its write-ahead log is "
            "damaged, or an older copy was restored",
            hint="Restore the newest copy, or go on without what is lost by "
            f"`casparian ledger repair`. ({sidecar} knows what was acknowledged.)",
        )


def _foreign(sidecar: Path, owner: str, ledger_id: str) -> LedgerCorruptError:
    return LedgerCorruptError(
        f"{sidecar.name} belongs to ledger {owner}, the file beside it is {ledger_id}",
        hint=f"If the ledger was replaced on purpose, move {sidecar} away.",
    )


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _read_slots(raw: bytes) -> list[tuple[str, int, int]]:
    """(ledger id, mark, slot) of each slot whose checksum holds."""
    found = []
    for slot in (0, 1):
        text = raw[slot * _SLOT_BYTES : (slot + 1) * _SLOT_BYTES].split(b"\n", 1)[0]
        parts = text.decode("ascii", "replace").split(" ")
        if len(parts) == 3 and parts[2] == _checksum(f"{parts[0]} {parts[1]}"):
            found.append((parts[0], int(parts[1]), slot))
    return found
