"""What is old goes, what an output needs stays; the history travels with the ledger."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import duckdb
import pytest
from ledger_kit import (
    ManualClock,
    completed,
    failed,
    insert_jobs,
    leased,
    run_to_grant,
    started,
)

from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.migrations import STEPS
from casparian_flow.db.retention import HistoryAges, HistoryCleaned, clean_history
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.protocol import ApprovalOperation, EventType, HttpJobType

RUN = ApprovalOperation.Run(plugin_name="p", input_dir="/in", file_count=1)
ALL = HistoryAges(jobs=1, versions=1, dead_letters=1)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def ledger(tmp_path: Path, clock: ManualClock) -> Iterator[Ledger]:
    """Jobs 1 (with an output), 2 (dead letter), 3 (completed without output), 4 (still queued),
    5 (completed, its version is current); the versions of 1 to 4 are followed by newer ones."""
    with Ledger.open(tmp_path / "l.duckdb", clock=clock) as ledger:
        ledger.begin_epoch()
        insert_jobs(ledger, 5)
        run_to_grant(ledger, 1)
        ledger.commit([completed(1)])
        for job_id, end in ((2, failed(2)), (3, completed(3)), (5, completed(5))):
            ledger.commit([leased(ledger, job_id), started(job_id), end])
        with ledger.transaction() as connection:
            for location in range(1, 5):
                version = ledger.next_id("cf_file_version")
                connection.execute(
                    "INSERT INTO cf_file_version BY NAME SELECT * REPLACE ($1 AS id, 2 AS seq, "
                    "detected_at + INTERVAL 9 HOUR AS detected_at) "
                    "FROM cf_file_version WHERE location_id = $2",
                    [version, location],
                )
                connection.execute(
                    "UPDATE cf_file_location SET current_version_id = $1 WHERE id = $2",
                    [version, location],
                )
        assert ledger.check() == []
        yield ledger


def ids(ledger: Ledger, table: str) -> list[int]:
    return [row["id"] for row in ledger.query(f"SELECT id FROM {table} ORDER BY id")]


def now_us(clock: ManualClock, hours: float) -> int:
    clock.seconds = hours * 3600
    return clock.now().wall_us


def test_nothing_goes_unless_that_is_set(ledger: Ledger, clock: ManualClock) -> None:
    assert clean_history(ledger, HistoryAges(), now_us(clock, 1e4)) == HistoryCleaned()
    assert clean_history(ledger, ALL, now_us(clock, 0.5)) == HistoryCleaned()
    assert len(ids(ledger, "cf_processing_queue")) == 5


def test_old_jobs_go_but_for_those_that_outputs_or_current_versions_need(
    ledger: Ledger, clock: ManualClock
) -> None:
    assert clean_history(ledger, ALL, now_us(clock, 2)) == HistoryCleaned(2, 2, 1)
    assert ids(ledger, "cf_processing_queue") == [1, 4, 5]
    kept = ledger.query("SELECT location_id, seq FROM cf_file_version ORDER BY ALL")
    assert [(row["location_id"], row["seq"]) for row in kept] == [
        (1, 1), (1, 2), (2, 2), (3, 2), (4, 1), (4, 2), (5, 1),
    ]  # fmt: skip
    assert ledger.check() == []
    assert clean_history(ledger, ALL, now_us(clock, 3)) == HistoryCleaned()


def test_a_job_stays_as_long_as_its_dead_letter(ledger: Ledger, clock: ManualClock) -> None:
    ages = HistoryAges(jobs=1)
    assert clean_history(ledger, ages, now_us(clock, 2)) == HistoryCleaned(jobs=1)
    assert 2 in ids(ledger, "cf_processing_queue")
    assert ledger.check() == []


def test_a_job_stays_as_long_as_an_api_job_stands_for_it(
    ledger: Ledger, clock: ManualClock
) -> None:
    storage = ApiStorage(ledger, clock=clock)
    api_job = storage.create_job(HttpJobType.RUN, "p", None, "/in")
    with ledger.transaction() as connection:
        connection.execute("INSERT INTO cf_api_tasks VALUES ($1, 3, true, true)", [api_job])
    clean_history(ledger, ALL, now_us(clock, 2))
    assert 3 in ids(ledger, "cf_processing_queue")
    storage.cancel_job(api_job)
    clock.seconds += 3600
    storage.cleanup_old_data(1, 1)
    assert clean_history(ledger, ALL, clock.now().wall_us).jobs == 1
    assert ledger.check() == []


def test_after_a_clean_up_jobs_go_on_and_no_id_comes_twice(
    ledger: Ledger, clock: ManualClock, tmp_path: Path
) -> None:
    newest = insert_jobs(ledger, 1)[0].job_id
    ledger.commit([leased(ledger, newest), started(newest), completed(newest)])
    with ledger.transaction() as connection:
        connection.execute(
            "UPDATE cf_file_location SET current_version_id = NULL WHERE id = 6; "
            "DELETE FROM cf_file_location WHERE id = 6; "
            "DELETE FROM cf_file_version WHERE location_id = 6; "
        )
    clean_history(ledger, ALL, now_us(clock, 2))
    assert newest not in ids(ledger, "cf_processing_queue")
    ledger.close()
    with Ledger.open(tmp_path / "l.duckdb", clock=clock) as again:
        assert again.status_of(newest) is None
        assert insert_jobs(again, 1)[0].job_id == newest + 1
        again.begin_epoch()
        again.commit([leased(again, 4), started(4), completed(4)])
        assert again.status_of(4) is JobStatus.COMPLETED
        assert again.check() == []


def fill(storage: ApiStorage) -> int:
    job_id = storage.create_job(HttpJobType.RUN, "p", None, "/in")
    storage.insert_events(job_id, [EventType.Phase(str(n)) for n in range(5)])
    storage.create_approval("a", RUN, "Run p", timedelta(hours=1), requester="ann")
    storage.approve("a", "bob")
    storage.start_approved("a")
    storage.cancel_job(job_id)
    return job_id


def test_api_storage_goes_along_with_an_export(tmp_path: Path, clock: ManualClock) -> None:
    with Ledger.open(tmp_path / "a.duckdb", clock=clock) as old:
        storage = ApiStorage(old, clock=clock)
        job_id = fill(storage)
        before = storage.list_jobs(), storage.list_events(job_id), storage.list_approvals()
        storage.cleanup_old_data(0, 0)
        assert storage.list_events(job_id) == []
        last = storage.create_job(HttpJobType.RUN, "p", None, "/in")
        rows = old.export_to(tmp_path / "export")
        assert (rows["cf_api_jobs"], rows["cf_api_approvals"]) == (2, 1)
        after = storage.list_jobs(), storage.list_approvals()
        assert before[2] == after[1]
    with Ledger.open(tmp_path / "b.duckdb", clock=clock) as new:
        new.import_from(tmp_path / "export")
        storage = ApiStorage(new, clock=clock)
        assert (storage.list_jobs(), storage.list_approvals()) == after
        assert storage.create_job(HttpJobType.RUN, "p", None, "/in") == last + 1
        assert new.check() == []


def test_a_ledger_without_plans_of_api_jobs_gets_their_table(
    tmp_path: Path, clock: ManualClock
) -> None:
    path = tmp_path / "old.duckdb"
    with Ledger.open(path, clock=clock) as ledger:
        job_id = fill(ApiStorage(ledger, clock=clock))
        before, step = ledger.query("SELECT * FROM cf_api_events"), STEPS[1]
        made = "SELECT sql FROM duckdb_tables() WHERE table_name = 'cf_api_plans'"
        (table,) = ledger.query(made)
        with ledger.transaction() as connection:
            connection.execute("DROP TABLE cf_api_plans")
            connection.execute(
                "UPDATE cf_meta SET value = $1 WHERE key = 'schema_fingerprint'", [step.before]
            )
    with Ledger.open(path, clock=clock) as ledger:
        assert ledger.query(made) == [table]
        assert ledger.query("SELECT * FROM cf_api_events") == before
        assert ApiStorage(ledger, clock=clock).next_event_id(job_id) == 7
        assert ledger.check() == []


def test_a_snapshot_has_the_api_storage_in_it(tmp_path: Path, clock: ManualClock) -> None:
    with Ledger.open(tmp_path / "a.duckdb", clock=clock) as ledger:
        job_id = fill(ApiStorage(ledger, clock=clock))
        copy = ledger.snapshot(tmp_path / "copies")
    with duckdb.connect(str(copy), read_only=True) as connection:
        rows = connection.execute(
            "SELECT event_id, event_type FROM cf_api_events WHERE job_id = ? ORDER BY event_id",
            [job_id],
        ).fetchall()
    assert rows == [(n, "phase") for n in range(1, 6)] + [(6, "job_finished")]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("DELETE FROM cf_api_events WHERE event_id = 3", "API job 1 has events 1 to 6"),
        ("DELETE FROM cf_api_events WHERE event_id = 1", "API job 1 has events 2 to 6"),
        ("UPDATE cf_api_jobs SET finished_at = NULL WHERE job_id = 1", "API job 1 is cancelled"),
        ("UPDATE cf_api_approvals SET job_id = NULL", "API job 2 names approval a"),
        ("UPDATE cf_api_approvals SET status = 'pending'", "approval a is pending, but"),
        ("UPDATE cf_api_jobs SET approval_id = 'a' WHERE job_id = 1", "approval a has started 2"),
        ("INSERT INTO cf_api_tasks VALUES (1, 5, true, true)", "API job 1 stands for job 5"),
        ("INSERT INTO cf_api_plans VALUES (5, '{}', 0)", "a plan is of API job 5"),
        ("DELETE FROM cf_api_jobs WHERE job_id = 1", "of API job 1, which does not exist"),
    ],
)
def test_a_broken_rule_of_the_api_storage_is_found(
    clock: ManualClock, damage: str, told: str
) -> None:
    with Ledger.in_memory(clock=clock) as ledger:
        fill(ApiStorage(ledger, clock=clock))
        assert ledger.check() == []
        with ledger.transaction() as connection:
            connection.execute(damage)
        assert any(told in line for line in ledger.check()), ledger.check()
