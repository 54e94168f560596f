"""The input a plugin gets: exactly the version's bytes, or a named reason why not."""

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.signature import signature_of
from casparian_worker import source as source_module
from casparian_worker.scratch import Scratch, SlotScratch
from casparian_worker.source import Source, SourceError, open_source


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[SlotScratch]:
    scratch = Scratch(str(tmp_path / "scratch"), uid_base=60_600)
    yield scratch.slot(0)
    scratch.close()


def opened(path: str | Path, content: bytes, slot: SlotScratch, **options: int) -> Source:
    return open_source(
        str(path),
        content_hash=hashlib.sha256(content).hexdigest(),
        size=len(content),
        scratch=slot,
        clock=SystemClock(),
        **options,
    )


def reason_of(path: str | Path, content: bytes, slot: SlotScratch, **options: int) -> Reason:
    with pytest.raises(SourceError) as caught:
        opened(path, content, slot, **options)
    assert not os.listdir(slot.input), "a failed copy must leave nothing"
    return caught.value.reason


def test_a_small_file_is_copied_under_its_own_name(tmp_path: Path, slot: SlotScratch) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"a,b\n")
    with opened(path, b"a,b\n", slot) as source:
        assert os.path.basename(source.path) == "data.csv"
        assert source.path != str(path)
        assert not source.in_place
        assert Path(source.path).read_bytes() == b"a,b\n"
        path.write_bytes(b"changed later")
        source.verify()
        assert Path(source.path).read_bytes() == b"a,b\n"
    assert os.listdir(slot.input) == []


@pytest.mark.parametrize(
    "name",
    [
        b"caf\xe9.csv",
        b"line\nbreak.csv",
        b"\xff\xfe",
        b"n" * 255,
        "日本.csv".encode(),
        b"a b'\"$.csv",
    ],
)
def test_odd_names_survive(tmp_path: Path, slot: SlotScratch, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    Path(os.fsdecode(path)).write_bytes(b"x")
    with opened(os.fsdecode(path), b"x", slot) as source:
        assert os.fsencode(os.path.basename(source.path)) == name


def test_an_empty_file_is_a_file(tmp_path: Path, slot: SlotScratch) -> None:
    (tmp_path / "empty").touch()
    with opened(tmp_path / "empty", b"", slot) as source:
        assert Path(source.path).read_bytes() == b""


def test_other_bytes_are_another_version(tmp_path: Path, slot: SlotScratch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"new!")
    assert reason_of(path, b"old!", slot) is Reason.SOURCE_CHANGED
    assert reason_of(path, b"longer than that", slot) is Reason.SOURCE_CHANGED
    assert reason_of(path, b"old!", slot, copy_limit=0) is Reason.SOURCE_CHANGED


def test_a_file_that_is_gone_is_missing(tmp_path: Path, slot: SlotScratch) -> None:
    assert reason_of(tmp_path / "gone", b"", slot) is Reason.SOURCE_MISSING
    assert reason_of(tmp_path / "gone" / "deeper", b"", slot) is Reason.SOURCE_MISSING


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path, slot: SlotScratch) -> None:
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name in ("link", "fifo", "folder", "socket"):
            assert reason_of(tmp_path / name, b"x", slot) is Reason.SOURCE_CHANGED, name


def test_a_file_that_has_grown_is_read_no_further_than_one_byte_beyond(tmp_path: Path) -> None:
    with (tmp_path / "grown").open("w+b") as grown, (tmp_path / "copy").open("wb") as copy:
        grown.write(b"x" * 5_000_000)
        grown.seek(0)
        found = source_module._copy(grown.fileno(), copy.fileno(), 1000)
    assert found == hashlib.sha256(b"x" * 1001).hexdigest()
    assert (tmp_path / "copy").stat().st_size == 1001


def test_a_large_file_is_used_in_place_and_checked_afterwards(
    tmp_path: Path, slot: SlotScratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "reachable", lambda _: True)
    path = tmp_path / "large"
    path.write_bytes(b"version 1")
    with opened(path, b"version 1", slot, copy_limit=4) as source:
        assert source.in_place
        assert source.path == str(path)
        source.verify()
        path.write_bytes(b"version 2")
        with pytest.raises(SourceError) as caught:
            source.verify()
    assert caught.value.reason is Reason.SOURCE_CHANGED
    assert path.exists()


def test_a_racy_change_behind_equal_times_is_found(
    tmp_path: Path, slot: SlotScratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "reachable", lambda _: True)
    path = tmp_path / "large"
    path.write_bytes(b"version 1")
    with opened(path, b"version 1", slot, copy_limit=4) as source:
        path.write_bytes(b"version 2")
        assert source._original is not None
        # As if the write had happened within one tick of the file system's clock.
        source._original._signature = signature_of(os.stat(path))
        with pytest.raises(SourceError):
            source.verify()


def test_a_large_file_the_slots_user_cannot_reach_is_copied(
    tmp_path: Path, slot: SlotScratch
) -> None:
    path = tmp_path / "private"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    with opened(path, b"secret", slot, copy_limit=0) as source:
        # Only a worker that is root gives its slots a user of their own.
        assert source.in_place == (os.geteuid() != 0)
        if not source.in_place:
            status = os.stat(source.path)
            assert (status.st_gid, status.st_mode & 0o777) == (slot.uid, 0o440)


def test_a_full_disk_is_named(
    tmp_path: Path, slot: SlotScratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("casparian_worker.source.os.write", full)
    with pytest.raises(SourceError) as caught:
        opened(path, b"x", slot)
    assert caught.value.reason is Reason.DISK_FULL


def test_scratch_of_dead_workers_is_removed_and_that_of_live_ones_is_not(tmp_path: Path) -> None:
    live = Scratch(str(tmp_path))
    (tmp_path / "worker-dead").mkdir()
    (tmp_path / "worker-dead" / "lock").touch()
    other = Scratch(str(tmp_path))
    assert other.cleaned == 1
    assert os.path.isdir(live.folder)
    assert not (tmp_path / "worker-dead").exists()
    live.close()
    other.close()
    assert os.listdir(tmp_path) == []
