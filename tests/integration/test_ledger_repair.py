"""Refusals that keep the evidence, and the way forward after them."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from ledger_kit import ManualClock, insert_jobs, leased, started

from casparian_flow.db.access import get_engine
from casparian_flow.db.counters import ID_LEAP
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.opening import close_untouched
from casparian_flow.db.repair import ATTEMPTS, repair
from casparian_flow.domain.errors import (
    LedgerCorruptError,
    LedgerLockedError,
    LedgerUnavailableError,
    NotFoundError,
)
from casparian_flow.domain.jobs import JobStatus

CLOCK = ManualClock()
DATA_START, BLOCK = 12_288, 262_144
"""Of a DuckDB file: after its three headers, and the size of what has one checksum."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.duckdb"


def beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def leave(ledger: Ledger) -> None:
    """Give the files up as a kill would: the log stays."""
    close_untouched(ledger._connection)
    ledger._release()
    ledger._forget()


def unfinished(path: Path) -> int:
    """A ledger with an acknowledged commit in its log; returns where it ends."""
    Ledger.open(path, clock=CLOCK).close()
    ledger = Ledger.open(path, clock=CLOCK)
    ledger.begin_epoch()
    insert_jobs(ledger, 3)
    ledger.commit([leased(ledger, 1), started(1)])
    end = ledger.history_end
    leave(ledger)
    return end


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}


def test_a_log_missing_from_a_young_ledger_is_noticed(path: Path) -> None:
    """Nothing had been checkpointed yet but the empty tables."""
    unfinished(path)
    beside(path, ".wal").unlink()
    with pytest.raises(LedgerCorruptError, match="was acknowledged"):
        Ledger.open(path, clock=CLOCK)


def test_a_refused_ledger_keeps_what_its_damaged_log_still_holds(path: Path) -> None:
    end = unfinished(path)
    log = beside(path, ".wal")
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) - 10])
    before = contents(path)
    for _ in range(2):
        with pytest.raises(LedgerCorruptError):
            Ledger.open(path, clock=CLOCK)
        with pytest.raises(LedgerCorruptError):
            get_engine(path).connect()
    assert contents(path) == before
    log.write_bytes(whole)
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.history_end == end


def test_a_half_written_commit_is_cut_off_if_the_mark_knows_nothing_of_it(path: Path) -> None:
    """The log has its new length, and the first bytes of the new commit, but not the last."""
    end = unfinished(path)
    log = beside(path, ".wal")
    size, mark = log.stat().st_size, beside(path, ".hwm").read_bytes()
    ledger = Ledger.open(path, clock=CLOCK)
    shutil.copy(path, beside(path, ".copy"))
    ledger.commit([leased(ledger, 2), leased(ledger, 3)])
    leave(ledger)
    longer = log.read_bytes()
    log.write_bytes(longer[: len(longer) // 2] + bytes(len(longer) - len(longer) // 2))
    beside(path, ".hwm").write_bytes(mark)
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.history_end == end
        assert ledger.status_of(2) is JobStatus.QUEUED
    assert size
    assert list(path.parent.glob("*.wal.damaged-*"))


def test_a_log_without_its_file_makes_no_new_ledger(path: Path) -> None:
    unfinished(path)
    path.unlink()
    before = contents(path)
    with pytest.raises(LedgerCorruptError, match="is missing") as caught:
        Ledger.open(path, clock=CLOCK)
    assert "backup" in caught.value.hint
    assert contents(path) == before


def test_a_missing_mark_is_said_and_ids_and_epochs_leap(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished(path)
    beside(path, ".hwm").unlink()
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert "high-water mark" in caplog.text
        assert ledger.status_of(1) is JobStatus.RUNNING
        assert ledger.begin_epoch() > 1000
    # The leap outlasts a session that made no ids.
    with Ledger.open(path, clock=CLOCK) as ledger:
        (job,) = insert_jobs(ledger, 1)
        assert job.job_id > ID_LEAP
        assert job.location_id > ID_LEAP
        assert ledger.status_of(job.job_id) is JobStatus.QUEUED
        assert ledger.check() == []


@pytest.mark.parametrize("rubbish", [b"", b"rubbish", bytes(1024)])
def test_an_unreadable_mark_is_as_good_as_none(
    path: Path, rubbish: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished(path)
    beside(path, ".hwm").write_bytes(rubbish)
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.begin_epoch() > 1000
    assert "high-water mark" in caplog.text


def test_damage_met_while_reading_is_told_as_such(path: Path) -> None:
    jobs = pa.table({"plugin_name": ["sales"] * 20_000, "file_version_id": range(20_000)})
    with Ledger.open(path, clock=CLOCK) as ledger:
        ledger.enqueue_bulk(jobs)
    sound = path.read_bytes()
    found = []
    for start in range(DATA_START, len(sound), BLOCK):
        damaged = bytearray(sound)
        damaged[start + 1000] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            with Ledger.open(path, clock=CLOCK) as ledger:
                ledger.query("SELECT * FROM cf_processing_queue")
        except (LedgerCorruptError, LedgerUnavailableError) as error:
            found.append(error)
    assert any(isinstance(error, LedgerCorruptError) for error in found)
    for error in found:
        assert "damaged" in str(error) or "checksum" in str(error)
        assert "backup" in error.hint


# -- repair ---------------------------------------------------------------------------------------


def test_repair_of_a_sound_ledger_changes_nothing(path: Path) -> None:
    unfinished(path)
    done = repair(path, CLOCK)
    assert (done.kept, done.lost) == (None, 0)


def test_repair_needs_a_ledger_that_nobody_has_open(path: Path) -> None:
    with pytest.raises(NotFoundError):
        repair(path, CLOCK)
    with Ledger.open(path, clock=CLOCK), pytest.raises(LedgerLockedError):
        repair(path, CLOCK)


def test_repair_uses_what_is_before_the_damage_and_says_what_is_lost(path: Path) -> None:
    end = unfinished(path)
    log = beside(path, ".wal")
    damaged = bytearray(log.read_bytes())
    damaged[-100] ^= 4
    log.write_bytes(bytes(damaged))
    before = contents(path)
    done = repair(path, CLOCK)
    assert (done.ends_at, done.acknowledged, done.lost) == (
        end - 2,
        end,
        2,
    )  # one commit of two records
    assert done.used == ATTEMPTS[1]
    assert done.kept is not None
    assert {p.name: p.read_bytes() for p in done.kept.iterdir()} == before
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.status_of(1) is JobStatus.QUEUED


def test_repair_without_a_readable_log_goes_back_to_the_file(path: Path) -> None:
    unfinished(path)
    log = beside(path, ".wal")
    log.write_bytes(b"d\x00\x62e\x00\x22" + log.read_bytes()[6:])
    done = repair(path, CLOCK)
    assert done.used == ATTEMPTS[2]
    assert done.lost == done.acknowledged
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.check() == []


def test_repair_leaves_a_file_alone_that_it_cannot_mend(path: Path) -> None:
    unfinished(path)
    broken = bytearray(path.read_bytes())
    broken[4096 + 500] ^= 1
    broken[8192 + 500] ^= 1
    path.write_bytes(bytes(broken))
    before = contents(path)
    with pytest.raises(LedgerCorruptError, match="cannot be repaired"):
        repair(path, CLOCK)
    assert {k: v for k, v in contents(path).items() if k in before} == before


def test_a_log_older_than_the_file_is_not_applied_twice(path: Path) -> None:
    """DuckDB 1.5 itself does not notice, so without a mark nobody would; 2.0 does."""
    unfinished(path)
    old_log = beside(path, ".wal").read_bytes()
    Ledger.open(path, clock=CLOCK).close()
    beside(path, ".wal").write_bytes(old_log)
    beside(path, ".hwm").unlink()
    with pytest.raises(
        LedgerCorruptError, match=r"older than its file|older version of this database"
    ):
        Ledger.open(path, clock=CLOCK)
    assert repair(path, CLOCK).used == ATTEMPTS[2]
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.status_of(1) is JobStatus.RUNNING
        assert ledger.check() == []
