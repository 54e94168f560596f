"""The high-water sidecar against torn and foreign contents."""

import os
from pathlib import Path

import pytest

from casparian_flow.db.highwater import HighWater
from casparian_flow.domain.errors import LedgerCorruptError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.hwm"


def reopened(path: Path) -> int:
    mark = HighWater(path, "aaaa1111")
    mark.close()
    return mark.mark


def test_the_newest_mark_survives(path: Path) -> None:
    sidecar = HighWater(path, "aaaa1111")
    for mark in (1, 2, 30, 31):
        sidecar.write(mark)
        assert reopened(path) == mark
    sidecar.close()


def test_a_torn_write_loses_at_most_the_newest_mark(path: Path) -> None:
    sidecar = HighWater(path, "aaaa1111")
    for mark in (7, 8):
        sidecar.write(mark)
    sidecar.close()
    whole = path.read_bytes()
    for slot, expected in ((0, 8), (1, 7)):
        torn = bytearray(whole)
        torn[slot * 512 + 9 : slot * 512 + 12] = b"\0\0\0"
        path.write_bytes(bytes(torn))
        assert reopened(path) == expected


def test_the_torn_slot_is_written_next(path: Path) -> None:
    sidecar = HighWater(path, "aaaa1111")
    for mark in (7, 8):
        sidecar.write(mark)
    sidecar.close()
    torn = bytearray(path.read_bytes())
    torn[512] ^= 1
    path.write_bytes(bytes(torn))
    sidecar = HighWater(path, "aaaa1111")
    sidecar.write(9)
    sidecar.close()
    assert reopened(path) == 9


@pytest.mark.parametrize("rubbish", [b"", b"\0" * 5000, os.urandom(2000), b"aaaa1111 5 zzz\n"])
def test_rubbish_is_no_mark(path: Path, rubbish: bytes) -> None:
    path.write_bytes(rubbish)
    assert reopened(path) == 0


def test_another_ledgers_sidecar_is_refused(path: Path) -> None:
    sidecar = HighWater(path, "bbbb2222")
    sidecar.write(5)
    sidecar.close()
    with pytest.raises(LedgerCorruptError, match="bbbb2222"):
        HighWater(path, "aaaa1111")
