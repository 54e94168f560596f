"""A contract's bad rows on their way to the quarantine of every sink."""

import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sink_kit import job_run

from casparian_flow.domain.errors import OutputRefusedError
from casparian_flow.domain.outputs import OutputKind, QuarantinePolicy, SinkSpec
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.lineage import Lineage, global_job_id
from casparian_worker.sinks.base import SinkEnvironment
from casparian_worker.sinks.garbage import list_stages
from casparian_worker.sinks.registry import sink_for
from casparian_worker.sinks.root import OutputRoot

SCHEMA = '[{"name": "amount", "type": "int64"}]'


def outputs_of(env: SinkEnvironment, policy: QuarantinePolicy) -> JobOutputs:
    specs = [
        SinkSpec("sales", uri, schema_json=SCHEMA, quarantine=policy)
        for uri in ("parquet://sales", "sqlite://db.sqlite3")
    ]
    run = job_run()
    lineage = Lineage("ab" * 32, global_job_id(run.token), "2026-01-01T00:00:00Z", "1.0")
    return JobOutputs(run, lineage, specs, lambda uri: sink_for(uri, env))


def test_bad_rows_go_beside_the_good_ones_at_every_sink(tmp_path: Path) -> None:
    env = SinkEnvironment(OutputRoot.open(tmp_path))
    outputs = outputs_of(env, QuarantinePolicy(allow=True, max_pct=50.0))
    outputs.write("sales", pa.record_batch({"amount": ["1", "x"]}))
    outputs.write("sales", pa.record_batch({"amount": [2, 3]}))
    entries = outputs.finish()
    assert [e.kind for e in entries].count(OutputKind.QUARANTINE) == 2
    for entry in entries:
        sink_for(entry.uri, env).publish(entry, job_run().token)
    (good,) = (tmp_path / "sales").glob("*.parquet")
    assert pq.read_table(good)["amount"].to_pylist() == [1, 2, 3]
    (bad,) = (tmp_path / "sales_quarantine").glob("*.parquet")
    (row,) = pq.read_table(bad).to_pylist()
    assert (row["amount"], row["_source_row"], row["_cf_source_hash"]) == ("x", 2, "ab" * 32)
    db = sqlite3.connect(tmp_path / "db.sqlite3")
    found = db.execute("SELECT amount, _violation_type, _cf_job_id FROM sales_quarantine")
    assert found.fetchall() == [("x", "type_mismatch", "7f3ac91e-1")]
    db.close()


def test_over_the_limit_nothing_is_written_anywhere(tmp_path: Path) -> None:
    env = SinkEnvironment(OutputRoot.open(tmp_path))
    outputs = outputs_of(env, QuarantinePolicy(allow=True, max_pct=10.0))
    outputs.write("sales", pa.record_batch({"amount": ["1", "x"]}))
    with pytest.raises(OutputRefusedError, match="1 of 2 rows"):
        outputs.finish()
    outputs.abort()
    assert list_stages(env) == set()
    assert list(tmp_path.rglob("*.parquet")) == []
