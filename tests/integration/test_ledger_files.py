"""Opening a ledger's file: every refusal leaves it untouched and says what to do."""

import hashlib
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pytest
from ledger_kit import ManualClock, insert_jobs, leased, started

from casparian_flow.db import schema
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import (
    LedgerCorruptError,
    LedgerError,
    LedgerLockedError,
    NotFoundError,
    SchemaMismatchError,
)
from casparian_flow.domain.jobs import JobStatus

CLOCK = ManualClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "casparian_flow.sqlite3"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def killed_ledger(path: Path) -> Iterator[None]:
    """A ledger whose owner was killed right after it had acknowledged a commit."""
    code = """
import os, signal, sys
from casparian_flow.db.ledger import Ledger
from ledger_kit import ManualClock, insert_jobs, leased, started
ledger = Ledger.open(sys.argv[1], clock=ManualClock())
ledger.begin_epoch()
insert_jobs(ledger, 3)
ledger.commit([leased(ledger, 1), started(1), leased(ledger, 2)])
print(ledger.ledger_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    yield


def test_the_first_run_makes_the_file_and_says_so(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Ledger.open(path, clock=CLOCK) as ledger:
        first_id = ledger.ledger_id
        assert len(first_id) == 8
        assert ledger.query("SELECT count(*) AS n FROM cf_library_whitelist")[0]["n"] == 7
    assert f"creating a new ledger (a DuckDB database) at {path}" in caplog.text
    caplog.clear()
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.ledger_id == first_id
    assert "creating" not in caplog.text


def test_without_create_a_missing_ledger_stays_missing(path: Path) -> None:
    with pytest.raises(NotFoundError):
        Ledger.open(path, clock=CLOCK, create=False)
    assert not path.exists()


def test_a_real_sqlite_file_is_refused_and_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE cf_source_root (id INTEGER)")
    database.close()
    before = digest(path)
    with pytest.raises(LedgerError, match="is a SQLite database") as caught:
        Ledger.open(path, clock=CLOCK)
    assert "db_location" in caught.value.hint
    assert digest(path) == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_of_something_else_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"name,price\n" * 5_000)
    before = digest(path)
    with pytest.raises(LedgerCorruptError, match="no DuckDB database"):
        Ledger.open(path, clock=CLOCK)
    assert digest(path) == before


def test_a_foreign_duckdb_database_is_refused_and_left_alone(path: Path) -> None:
    with duckdb.connect(str(path)) as foreign:
        foreign.execute("CREATE TABLE sales AS SELECT 1 AS price")
    with pytest.raises(LedgerError, match="but no ledger"):
        Ledger.open(path, clock=CLOCK)
    with duckdb.connect(str(path)) as foreign:
        assert foreign.execute("SELECT * FROM sales").fetchall() == [(1,)]
        assert foreign.execute("SELECT count(*) FROM duckdb_tables()").fetchone() == (1,)


def test_an_empty_duckdb_database_becomes_a_ledger(path: Path) -> None:
    duckdb.connect(str(path)).close()
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.check() == []


@pytest.mark.parametrize("place", ["missing/ledger.duckdb", "."])
def test_an_impossible_place_is_named(tmp_path: Path, place: str) -> None:
    with pytest.raises(LedgerError) as caught:
        Ledger.open(tmp_path / place, clock=CLOCK)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


def test_an_unwritable_place_is_named() -> None:
    # sysfs refuses new files even to root.
    with pytest.raises(LedgerError, match="cannot be opened for writing"):
        Ledger.open("/sys/kernel/ledger.duckdb", clock=CLOCK)


def test_a_locked_ledger_names_the_process(path: Path) -> None:
    code = """
import sys
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import LedgerLockedError
try:
    Ledger.open(sys.argv[1], clock=SystemClock())
except LedgerLockedError as error:
    print(error)
"""
    with Ledger.open(path, clock=CLOCK):
        assert f"process {os.getpid()}" in run_python(code, path)


def test_a_snapshot_does_not_drop_the_lock(path: Path, tmp_path: Path) -> None:
    code = """
import sys, duckdb
try:
    duckdb.connect(sys.argv[1])
    print("opened")
except duckdb.IOException:
    print("locked")
"""
    with Ledger.open(path, clock=CLOCK) as ledger:
        ledger.snapshot(tmp_path / "snapshots")
        ledger.idle()
        ledger.check()
        ledger.export_to(tmp_path / "export")
        assert run_python(code, path) == "locked"


def test_a_second_ledger_in_one_process_is_refused(path: Path) -> None:
    with (
        Ledger.open(path, clock=CLOCK),
        pytest.raises(LedgerLockedError, match="in this process"),
    ):
        Ledger.open(path, clock=CLOCK)
    Ledger.open(path, clock=CLOCK).close()


def test_another_schema_is_refused_and_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger.open(path, clock=CLOCK).close()
    monkeypatch.setitem(schema.TABLES, "cf_meta", "key VARCHAR PRIMARY KEY, value VARCHAR")
    with pytest.raises(SchemaMismatchError, match="another version") as caught:
        Ledger.open(path, clock=CLOCK)
    assert "ledger export" in caught.value.hint
    monkeypatch.undo()
    Ledger.open(path, clock=CLOCK).close()


def test_a_missing_table_is_named(path: Path) -> None:
    Ledger.open(path, clock=CLOCK).close()
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP TABLE cf_slice")
    with pytest.raises(SchemaMismatchError, match="cf_slice"):
        Ledger.open(path, clock=CLOCK)


# -- what a killed owner leaves -------------------------------------------------------------------


def test_a_killed_owner_loses_nothing_acknowledged(path: Path) -> None:
    with killed_ledger(path), Ledger.open(path, clock=CLOCK) as ledger:
        assert [ledger.status_of(i) for i in (1, 2, 3)] == [
            JobStatus.RUNNING,
            JobStatus.DISPATCHING,
            JobStatus.QUEUED,
        ]
        assert ledger.begin_epoch() == 2
        assert ledger.check() == []


def test_a_zero_filled_end_of_the_log_is_cut_and_a_copy_kept(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with killed_ledger(path):
        wal = path.with_name(path.name + ".wal")
        with wal.open("ab") as file:
            file.write(b"\0" * 4096)
        torn = wal.read_bytes()
        with Ledger.open(path, clock=CLOCK) as ledger:
            assert ledger.status_of(1) is JobStatus.RUNNING
        if duckdb.__version__.startswith("1."):  # 2.0 opens such a log by itself
            (copy,) = path.parent.glob("*.damaged-*")
            assert copy.read_bytes() == torn
            assert "4096 bytes that cannot be read" in caplog.text


def test_a_damaged_log_is_never_taken_for_the_whole(path: Path) -> None:
    with killed_ledger(path):
        wal = path.with_name(path.name + ".wal")
        whole = wal.read_bytes()
        # From half way on: what is lost was acknowledged.
        wal.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(LedgerCorruptError) as caught:
            Ledger.open(path, clock=CLOCK)
        assert caught.value.hint


def test_a_restored_backup_is_refused_until_that_is_wanted(path: Path, tmp_path: Path) -> None:
    with Ledger.open(path, clock=CLOCK) as ledger:
        insert_jobs(ledger, 2)
    backup = tmp_path / "backup"
    shutil.copy(path, backup)
    with Ledger.open(path, clock=CLOCK) as ledger:
        ledger.begin_epoch()
        ledger.commit([leased(ledger, 1), started(1)])
    shutil.copy(backup, path)
    with pytest.raises(LedgerCorruptError, match="older copy was restored") as caught:
        Ledger.open(path, clock=CLOCK)
    assert ".hwm" in caught.value.hint
    path.with_name(path.name + ".hwm").unlink()
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.status_of(1) is JobStatus.QUEUED


def test_another_ledger_under_the_same_name_is_refused(path: Path, tmp_path: Path) -> None:
    for name in (path, tmp_path / "other"):
        with Ledger.open(name, clock=CLOCK) as ledger:
            ledger.begin_epoch()
    shutil.copy(tmp_path / "other", path)
    with pytest.raises(LedgerCorruptError, match="belongs to ledger"):
        Ledger.open(path, clock=CLOCK)


def test_a_deleted_ledger_starts_anew_under_another_id(path: Path) -> None:
    with Ledger.open(path, clock=CLOCK) as ledger:
        ledger.begin_epoch()
        first = ledger.ledger_id
    path.unlink()
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.ledger_id != first
        assert ledger.begin_epoch() == 1
