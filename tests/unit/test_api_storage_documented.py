"""The printed examples of the API's storage, one to one."""

from datetime import timedelta
from pathlib import Path

import pytest

from casparian_flow.protocol import ApprovalOperation, EventType, HttpJobStatus, HttpJobType
from casparian_flow.sentinel import (
    ApiStorage,
    DbConnection,
    JobDetails,
    JobQueue,
    Sentinel,
    SentinelConfig,
)


def setup_storage() -> ApiStorage:
    conn = DbConnection.open_duckdb_memory()
    storage = ApiStorage(conn)
    storage.init_schema()
    return storage


def test_api_storage_is_used_as_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    storage = ApiStorage.open("duckdb:casparian_flow.duckdb")
    storage.init_schema()
    storage.init_schema()

    job_id = storage.create_job(
        HttpJobType.Run,
        "my_parser",
        "1.0.0",
        "/data/input",
        "parquet://./output",
        None,  # approval_id
    )

    storage.update_job_status(job_id, HttpJobStatus.Running)

    event_id = storage.insert_event(job_id, EventType.JobStarted())
    assert event_id == 1

    event_id = storage.insert_event(
        job_id, EventType.Progress(items_done=50, items_total=100, message="Processing")
    )
    assert event_id == 2

    events = storage.list_events(job_id, 1)
    assert len(events) == 1

    approval_id = ApiStorage.generate_approval_id()
    storage.create_approval(
        approval_id,
        ApprovalOperation.Run(
            plugin_name="my_parser",
            plugin_version=None,
            input_dir="/data",
            file_count=100,
            output=None,
        ),
        "Run my_parser on 100 files",
        timedelta(hours=1),
    )

    assert storage.approve(approval_id, "user@example.com")
    assert not storage.reject(approval_id, "admin", "Too risky")
    assert storage.next_event_id(job_id) == 3
    storage.close()
    assert (tmp_path / "casparian_flow.duckdb").is_file()


def test_api_storage_creates_and_gets_a_job() -> None:
    storage = setup_storage()
    job_id = storage.create_job(HttpJobType.Run, "test_parser", None, "/data")
    job = storage.get_job(job_id)
    assert job is not None
    assert job.plugin_name == "test_parser"


PRINTED = {
    "cf_api_jobs": """
        job_id BIGINT, job_type TEXT!, status TEXT!, plugin_name TEXT!, plugin_version TEXT,
        input_dir TEXT!, output_sink TEXT, approval_id TEXT, created_at TIMESTAMP,
        started_at TIMESTAMP, finished_at TIMESTAMP, error_message TEXT, progress_phase TEXT,
        progress_items_done BIGINT, progress_items_total BIGINT, progress_message TEXT,
        result_rows_processed BIGINT, result_bytes_written BIGINT, result_outputs_json TEXT,
        result_metrics_json TEXT
    """,
    "cf_api_events": """
        id BIGINT, event_id BIGINT!, job_id BIGINT!, event_type TEXT!, timestamp TIMESTAMP,
        payload_json TEXT!
    """,
    "cf_api_approvals": """
        approval_id TEXT, status TEXT!, operation_type TEXT!, operation_json TEXT!, summary TEXT!,
        created_at TIMESTAMP, expires_at TIMESTAMP!, decided_at TIMESTAMP, decided_by TEXT,
        rejection_reason TEXT, job_id BIGINT
    """,
}
"""Columns as printed; "!" for NOT NULL."""
WORDS = {
    "cf_api_jobs": {
        "job_type": "run backtest preview",
        "status": "queued running completed failed cancelled",
    },
    "cf_api_events": {
        "event_type": "job_started phase progress violation output job_finished approval_required",
    },
    "cf_api_approvals": {"status": "pending approved rejected expired"},
}


def tables_of(storage: ApiStorage) -> dict[str, dict[str, tuple[str, bool]]]:
    """(type, whether it may be null) by table and column."""
    found = storage._read(
        lambda connection: connection.execute(
            "SELECT table_name, column_name, data_type, is_nullable FROM duckdb_columns()"
        ).fetchall()
    )
    tables: dict[str, dict[str, tuple[str, bool]]] = {}
    for table, column, kind, nullable in found:
        tables.setdefault(table, {})[column] = (kind, nullable)
    return tables


def test_api_storage_has_the_printed_columns() -> None:
    tables = tables_of(setup_storage())
    for table, printed in PRINTED.items():
        for entry in printed.split(","):
            name, kind = entry.split()
            found, nullable = tables[table][name]
            assert found == kind.rstrip("!").replace("TEXT", "VARCHAR"), (table, name)
            assert not (nullable and kind.endswith("!")), (table, name)


def test_api_storage_checks_every_word_in_its_tables() -> None:
    storage = setup_storage()
    for table, columns in WORDS.items():
        rules = storage._read(
            lambda connection: connection.execute(
                "SELECT table_name, constraint_text FROM duckdb_constraints() "
                "WHERE constraint_type = 'CHECK'"
            ).fetchall()
        )
        for column, words in columns.items():
            (rule,) = [
                text for of, text in rules if of == table and text.startswith(f"CHECK(({column} ")
            ]
            assert all(f"'{word}'" in rule for word in words.split()), rule


def test_api_storage_numbers_events_as_the_printed_query_does() -> None:
    storage = setup_storage()
    job_id = storage.create_job(HttpJobType.Run, "test_parser", None, "/data")
    query = "SELECT COALESCE(MAX(event_id), 0) + 1 FROM cf_api_events WHERE job_id = ?"
    for _ in range(3):
        found = storage._read(lambda connection: connection.execute(query, [job_id]).fetchall())
        printed = found[0][0]
        assert storage.next_event_id(job_id) == printed
        assert storage.insert_event(job_id, EventType.JobStarted()) == printed


def test_beside_the_api_storage_the_queue_is_used_as_printed() -> None:
    conn = DbConnection.open_duckdb_memory()
    queue = JobQueue(conn)
    queue.init()
    job_id = queue.enqueue(JobDetails(plugin_name="my_parser"))
    job = queue.dequeue()
    assert job is not None
    assert job.job_id == job_id


def test_beside_the_api_storage_a_sentinel_is_made_as_printed(tmp_path: Path) -> None:
    config = SentinelConfig(
        bind_address="tcp://127.0.0.1:0", database=tmp_path / "casparian_flow.duckdb"
    )
    sentinel = Sentinel(config)
    sentinel.stop()
    sentinel.run()  # returns, as it was told to stop before
