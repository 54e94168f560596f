"""Parquet and CSV files: what is written, what publishing does, what is refused."""

import os
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from sink_kit import Output, files_of, job_run, output_at

from casparian_flow.domain.errors import (
    InvariantError,
    OutputLostError,
    OutputRefusedError,
    SinkConflictError,
    SinkError,
)
from casparian_flow.domain.outputs import OutputKind, SinkMode
from casparian_worker.sinks.garbage import delete_stages, list_stages
from casparian_worker.sinks.root import OutputRoot

BOTH = pytest.mark.parametrize("uri", ["parquet://out", "csv://out"])


def read(output: Output, name: str = "*") -> list[dict[str, Any]]:
    scheme = output.uri.partition(":")[0]
    root = Path(output.env.root.path)
    rows: list[dict[str, Any]] = []
    for path in sorted(root.rglob(f"{name}.{scheme}")):
        table = pq.read_table(path) if scheme == "parquet" else pyarrow.csv.read_csv(path)
        rows += table.to_pylist()
    return rows


@BOTH
def test_nothing_is_visible_before_it_is_published(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri)
    entry = output.stage(job_run(), {"a": [1, 2]})
    assert (entry.rows, files_of(output)) == (2, [])
    assert list_stages(output.env) == {job_run().token}
    output.publish(job_run(), entry)
    assert [row["a"] for row in read(output)] == [1, 2]
    assert list_stages(output.env) == set()


@BOTH
def test_publishing_again_changes_nothing_with_or_without_the_stage(
    tmp_path: Path, uri: str
) -> None:
    output, run = output_at(tmp_path, uri), job_run()
    entry = output.stage(run, {"a": [1]})
    assert not output.sink.publish(entry, run.token).already
    assert output.sink.publish(entry, run.token).already
    output.sink.unstage(entry, run.token)
    assert output.sink.publish(entry, run.token).already
    assert len(files_of(output)) == 1


@BOTH
def test_other_bytes_under_the_final_name_are_never_overwritten(tmp_path: Path, uri: str) -> None:
    output, run = output_at(tmp_path, uri), job_run()
    entry = output.stage(run, {"a": [1]})
    output.path(entry).write_text("mine")
    with pytest.raises(SinkConflictError, match="holds other bytes"):
        output.sink.publish(entry, run.token)
    assert output.path(entry).read_text() == "mine"


def test_an_output_whose_stage_and_file_are_both_gone_is_reported_lost(tmp_path: Path) -> None:
    output, run = output_at(tmp_path, "parquet://out"), job_run()
    entry = output.put(run, {"a": [1]})
    output.path(entry).unlink()
    with pytest.raises(OutputLostError, match="neither the stage"):
        output.sink.publish(entry, run.token)


def test_a_zombie_that_publishes_late_brings_nothing_replaced_back(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out", SinkMode.REPLACE)
    old = output.put(job_run(1), {"a": [1]})
    output.put(job_run(2, version=2), {"a": [2]})
    with pytest.raises(OutputLostError):
        output.sink.publish(old, job_run(1).token)
    assert [row["a"] for row in read(output)] == [2]


def test_append_keeps_every_version_and_the_names_tell_the_newest(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out")
    for version in (1, 2, 10):
        output.put(job_run(version, version=version), {"a": [version]})
    output.put(job_run(50, version=1, location=2), {"a": [7]})
    assert sorted(row["a"] for row in read(output)) == [1, 2, 7, 10]
    query = (Path(__file__).parents[2] / "docs" / "sinks.md").read_text()
    query = query.partition("```sql\n-- newest rows of every file\n")[2].partition("```")[0]
    newest = duckdb.sql(query.replace("output/sales/*.parquet", f"{tmp_path}/out/*.parquet"))
    assert sorted(row[0] for row in newest.fetchall()) == [7, 10]


def test_replace_takes_only_the_older_files_of_its_own_slice(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out", SinkMode.REPLACE)
    output.put(job_run(1), {"a": [1]})
    output.put(job_run(2, location=2), {"a": [2]})
    output.put(job_run(3), {"a": [3]}, topic="other")
    run = job_run(4, version=2)
    receipt = output.publish(run, output.stage(run, {"a": [4]}))
    assert receipt.removed == 1
    assert sorted(row["a"] for row in read(output)) == [2, 3, 4]


def test_replace_by_a_result_without_rows_removes_the_earlier_rows(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out", SinkMode.REPLACE)
    output.put(job_run(1), {"a": [1]})
    entry = output.put(job_run(2, version=2))
    assert (entry.rows, entry.stage, entry.final) == (0, "", "")
    assert read(output) == []


def test_error_mode_refuses_a_second_result_of_the_same_file_when_it_is_staged(
    tmp_path: Path,
) -> None:
    output = output_at(tmp_path, "csv://out", SinkMode.ERROR)
    entry = output.put(job_run(1), {"a": [1]})
    assert output.sink.publish(entry, job_run(1).token).already
    with pytest.raises(SinkConflictError, match="already holds rows of this file"):
        output.stage(job_run(2, version=2), {"a": [2]})
    output.put(job_run(3, location=2), {"a": [3]})


def test_error_mode_refuses_at_publishing_what_slipped_past_staging(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out", SinkMode.ERROR)
    first = output.stage(job_run(1), {"a": [1]})
    second = output.stage(job_run(2, version=2), {"a": [2]})
    output.publish(job_run(1), first)
    with pytest.raises(SinkConflictError):
        output.sink.publish(second, job_run(2).token)
    assert [row["a"] for row in read(output)] == [1]


def test_a_path_with_the_extension_names_the_file_and_quarantine_goes_beside_it(
    tmp_path: Path,
) -> None:
    output, run = output_at(tmp_path, "parquet://daily/sales.parquet"), job_run()
    entry = output.put(run, {"a": [1]}, topic="whatever")
    assert entry.final.startswith("daily/sales-")
    bad = output.stage(run, {"a": ["x"]}, kind=OutputKind.QUARANTINE, n=1)
    assert bad.topic == "sales_quarantine"
    assert bad.final.startswith("daily/sales_quarantine/sales-")
    folder = output_at(tmp_path, "csv://folder")
    bad = folder.stage(run, {"a": ["x"]}, kind=OutputKind.QUARANTINE, n=2)
    assert bad.final.startswith("folder_quarantine/sales_quarantine-")
    assert len({entry.output_key, bad.output_key, entry.slice_key, bad.slice_key}) == 4


def test_a_topic_may_not_take_the_name_of_a_quarantine(tmp_path: Path) -> None:
    with pytest.raises(OutputRefusedError, match="kept for the rows that break"):
        output_at(tmp_path, "parquet://out").stage(job_run(), {"a": [1]}, topic="x_quarantine")


def test_parquet_readers_get_plain_text_for_lineage_and_every_type_back(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out?compression=snappy")
    columns = {
        "d": pa.array([1], pa.duration("us")),
        "t": pa.array([1], pa.timestamp("ns", "Europe/Paris")),
        "m": pa.array([None], pa.decimal128(38, 9)),
        "l": pa.array([[{"x": 1}]]),
        "c": pa.array(["x"]).dictionary_encode(),
    }
    entry = output.put(job_run(), pa.record_batch(columns))
    schema = pq.read_schema(output.path(entry))
    assert [schema.field(n).type for n in "dtml"] == [columns[n].type for n in "dtml"]
    assert schema.field("c").type == pa.string()
    assert schema.field("_cf_job_id").type == pa.string()
    assert not schema.field("_cf_job_id").nullable
    metadata = pq.ParquetFile(output.path(entry)).metadata
    assert metadata.metadata[b"casparian.token"] == job_run().token.encode()
    assert metadata.row_group(0).column(0).compression == "SNAPPY"


def test_rows_written_before_the_schema_widened_are_still_there(tmp_path: Path) -> None:
    for uri in ("parquet://out", "csv://out"):
        output = output_at(tmp_path, uri)
        batches = [{"a": [1], "s": ['x"y\n,z']}, {"a": [2.5], "n": [None]}, {"n": ["v"], "a": [3]}]
        output.put(job_run(), *batches)
        rows = [{k: v for k, v in row.items() if k[0] != "_"} for row in read(output)]
        assert [row["a"] for row in rows] == [1, 2.5, 3]
        assert rows[0]["s"] == 'x"y\n,z'
        assert [row["n"] or "" for row in rows] == ["", "", "v"]


def test_csv_tells_null_from_an_empty_text(tmp_path: Path) -> None:
    output = output_at(tmp_path, "csv://out")
    entry = output.put(job_run(), {"a": ["", None], "b": [1, None]})
    lines = output.path(entry).read_text().splitlines()
    assert lines[0].startswith('"a","b","_cf_source_hash"')
    assert lines[1].startswith('"",1,"abab')
    assert lines[2].startswith(',,"abab')


@BOTH
def test_large_outputs_stream_in_bounded_memory(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri)
    rows = {"a": list(range(65_536)), "s": ["some text of some length"] * 65_536}
    batch = pa.record_batch(rows)
    output.stage(job_run(1), batch)
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    entry = output.stage(job_run(2), *[batch] * 40)
    assert entry.rows == 40 * 65_536
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert (pool.max_memory() or 0) < 40 * batch.nbytes / 2


def test_the_digest_in_the_manifest_is_that_of_the_file(tmp_path: Path) -> None:
    import hashlib

    output = output_at(tmp_path, "parquet://out")
    entry = output.put(job_run(), {"a": list(range(1000))})
    data = output.path(entry).read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.bytes)


def test_an_aborted_output_leaves_nothing(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out")
    with pytest.raises(OutputRefusedError):
        output.stage(job_run(), {"a": [1]}, {"a": ["x"]})
    assert list_stages(output.env) == set()


def test_garbage_is_deleted_by_token_and_nothing_else_is(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out")
    output.stage(job_run(1), {"a": [1]})
    output.stage(job_run(2), {"a": [1]})
    assert delete_stages(output.env, {job_run(1).token}) == 1
    assert list_stages(output.env) == {job_run(2).token}
    with pytest.raises(InvariantError):
        delete_stages(output.env, {"../../etc"})


@pytest.mark.parametrize("change", ["final", "stage"])
def test_a_manifest_that_names_other_paths_is_not_followed(tmp_path: Path, change: str) -> None:
    from dataclasses import replace

    output, run = output_at(tmp_path, "parquet://out"), job_run()
    entry = output.stage(run, {"a": [1]})
    forged = replace(entry, **{change: "../../escape"})
    with pytest.raises(InvariantError):
        output.sink.publish(forged, run.token)
    with pytest.raises(SinkError, match="output root"):
        output.sink.publish(replace(entry, root_id="0" * 16), run.token)


def test_symbolic_links_below_the_output_root_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    output = output_at(root, "parquet://link/deeper")
    (root / "link").symlink_to(outside)
    with pytest.raises(SinkError, match="symbolic link"):
        output.stage(job_run(), {"a": [1]})
    assert list(outside.iterdir()) == []


def test_a_folder_in_whose_way_a_file_stands_is_a_clear_error(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://out/deeper")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SinkError, match="is no folder"):
        output.stage(job_run(), {"a": [1]})


@pytest.mark.parametrize("topic", ["..", ".hidden", "-rf", "a" * 100, "x.parquet", "a-b.c_d"])
def test_odd_topics_stay_inside_their_folder(tmp_path: Path, topic: str) -> None:
    output = output_at(tmp_path, "parquet://out")
    entry = output.put(job_run(), {"a": [1]}, topic=topic)
    assert output.path(entry).parent == tmp_path / "out"
    assert output.path(entry).is_file()


def test_a_name_too_long_for_the_file_system_is_refused_when_it_is_staged(tmp_path: Path) -> None:
    output = output_at(tmp_path, "parquet://" + "ä" * 100 + ".parquet")
    with pytest.raises(SinkError, match="longer than 255 bytes"):
        output.stage(job_run(), {"a": [1]})


def test_two_workers_that_open_a_new_root_at_once_agree_on_its_id(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        roots = list(pool.map(lambda _: OutputRoot.open(tmp_path / "new"), range(16)))
    assert len({root.root_id for root in roots}) == 1
    assert os.listdir(tmp_path / "new" / ".stage") == []


def test_a_damaged_root_id_is_reported_and_kept(tmp_path: Path) -> None:
    OutputRoot.open(tmp_path)
    (tmp_path / ".casparian-root").write_text("nonsense")
    with pytest.raises(SinkError, match="damaged"):
        OutputRoot.open(tmp_path)
    assert (tmp_path / ".casparian-root").read_text() == "nonsense"
