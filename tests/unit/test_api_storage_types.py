"""The API's types: their JSON, and that columns and checks follow from them."""

from collections.abc import Iterator
from datetime import timedelta

import msgspec
import pytest
from ledger_kit import ManualClock

from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.db.api_tables import JOB_COLUMNS, columns_of, values_of
from casparian_flow.db.ledger import Ledger
from casparian_flow.protocol import (
    ApprovalBinding,
    ApprovalOperation,
    HttpJob,
    HttpJobStatus,
    HttpJobType,
    JobProgress,
    OutputInfo,
)
from casparian_flow.protocol.http_types import (
    ColumnSpec,
    Count,
    SchemaSpec,
    decode_operation,
    encode_payload,
)


@pytest.fixture
def storage() -> Iterator[ApiStorage]:
    with Ledger.in_memory(clock=ManualClock()) as ledger:
        yield ApiStorage(ledger, clock=ManualClock())


def test_a_job_is_json_without_what_it_lacks(storage: ApiStorage) -> None:
    job_id = storage.create_job(HttpJobType.BACKTEST, "p", None, "/in", "parquet://out")
    job = msgspec.to_builtins(storage.get_job(job_id))
    assert job.pop("created_at").endswith("Z")
    assert job == {
        "job_id": 1,
        "job_type": "backtest",
        "status": "queued",
        "plugin_name": "p",
        "input_dir": "/in",
        "output": "parquet://out",
    }


def test_a_finished_job_is_json_with_progress_and_result(storage: ApiStorage) -> None:
    job_id = storage.create_job(HttpJobType.RUN, "p", "1.0", "/in")
    storage.update_job_progress(job_id, "read", 1, 2)
    storage.update_job_result(job_id, 3, None, [OutputInfo(name="t", sink_uri="u", rows=3)])
    storage.update_job_status(job_id, HttpJobStatus.FAILED, "no")
    job = msgspec.to_builtins(storage.get_job(job_id))
    assert (job["status"], job["error_message"]) == ("failed", "no")
    assert job["progress"] == {"phase": "read", "items_done": 1, "items_total": 2}
    assert job["result"] == {
        "rows_processed": 3,
        "outputs": [{"name": "t", "sink_uri": "u", "rows": 3}],
        "metrics": {},
    }
    assert msgspec.convert(job, HttpJob, strict=False) == storage.get_job(job_id)


def test_operations_have_their_json(storage: ApiStorage) -> None:
    promote = ApprovalOperation.SchemaPromote(
        plugin_name="p",
        output_name="t",
        schema=SchemaSpec(columns=[ColumnSpec(name="a", data_type="int64", nullable=False)]),
    )
    text = encode_payload(promote)
    assert text == (
        '{"type":"schema_promote","plugin_name":"p","output_name":"t","schema":{"columns":'
        '[{"name":"a","data_type":"int64","nullable":false}],"mode":"strict"}}'
    )
    assert decode_operation(text) == promote
    run = ApprovalOperation.Run(plugin_name="p", input_dir="/in", file_count=5)
    assert encode_payload(run) == (
        '{"type":"run","plugin_name":"p","input_dir":"/in","file_count":5}'
    )
    storage.create_approval("a", promote, "Promote", timedelta(hours=1))
    approval = storage.get_approval("a")
    assert approval is not None
    assert approval.operation == promote
    assert set(msgspec.to_builtins(approval)) == {
        "approval_id",
        "status",
        "operation",
        "summary",
        "created_at",
        "expires_at",
    }


def test_a_new_field_of_a_job_becomes_a_column() -> None:
    class Grown(HttpJob, frozen=True, kw_only=True, omit_defaults=True):
        attempts: Count = 0
        labels: dict[str, str] | None = None

    known = columns_of(HttpJob)
    assert known == JOB_COLUMNS
    *same, attempts, labels = columns_of(Grown)
    assert tuple(same) == known
    assert (attempts.name, attempts.sql_type) == ("attempts", "BIGINT")
    assert attempts.constraint == "NOT NULL CHECK (attempts >= 0)"
    assert (labels.name, labels.sql_type, labels.is_json) == ("labels_json", "VARCHAR", True)


def test_a_part_of_a_job_is_spread_over_its_columns() -> None:
    assert values_of("progress", JobProgress(phase="x", items_done=1)) == {
        "progress_phase": "x",
        "progress_items_done": 1,
        "progress_items_total": None,
        "progress_message": None,
    }


def test_a_digest_is_of_everything_that_is_bound() -> None:
    first = ApprovalBinding(
        artifact_hash="a", files_digest="f", file_count=1, sink="s", parameters_hash="p"
    )
    digests = {first.digest()}
    for name in first.__struct_fields__:
        changed = msgspec.structs.replace(first, **{name: 2 if name == "file_count" else "z"})
        assert len(first.changes(changed)) == 1
        digests.add(changed.digest())
    assert len(digests) == 6
    assert first.changes(first) == []
