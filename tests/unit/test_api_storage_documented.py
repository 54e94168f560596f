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
