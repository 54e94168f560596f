"""SQLite and DuckDB tables: publishing, modes, columns that change, what is refused before it
is too late."""

import sqlite3
import subprocess
import sys
import threading
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from sink_kit import Output, job_run, output_at

from casparian_flow.domain.errors import (
    OutputLostError,
    OutputRefusedError,
    SinkConflictError,
    SinkError,
)
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import OutputKind, SinkMode
from casparian_worker.sinks.garbage import list_stages

BOTH = pytest.mark.parametrize("uri", ["sqlite://sub/db.file", "duckdb://sub/db.file"])


def query(output: Output, sql: str) -> list[tuple[Any, ...]]:
    path = Path(output.env.root.path) / "sub" / "db.file"
    if output.uri.startswith("sqlite"):
        db = sqlite3.connect(path)
        try:
            return db.execute(sql).fetchall()
        finally:
            db.close()
    with duckdb.connect(str(path)) as connection:
        return connection.execute(sql).fetchall()


def values(output: Output, table: str = "sales") -> list[Any]:
    return [row[0] for row in query(output, f'SELECT a FROM "{table}" ORDER BY 1')]


@BOTH
def test_rows_appear_with_their_fence_in_one_step(tmp_path: Path, uri: str) -> None:
    output, run = output_at(tmp_path, uri), job_run()
    entry = output.stage(run, {"a": [1, 2]})
    assert not (tmp_path / "sub" / "db.file").exists()
    assert not output.sink.publish(entry, run.token).already
    assert output.sink.publish(entry, run.token).already
    output.sink.unstage(entry, run.token)
    assert output.sink.publish(entry, run.token).already
    assert values(output) == [1, 2]
    assert query(output, "SELECT token, row_count, live FROM _cf_fence") == [(run.token, 2, 1)]
    assert list_stages(output.env) == set()


@BOTH
def test_another_token_s_output_under_the_same_key_is_a_conflict(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri)
    first = output.stage(job_run(1, attempt=1), {"a": [1]})
    second = output.stage(job_run(1, attempt=2), {"a": [2]})
    assert first.output_key == second.output_key
    output.publish(job_run(1, attempt=1), first)
    with pytest.raises(SinkConflictError, match="already holds this output"):
        output.sink.publish(second, job_run(1, attempt=2).token)
    assert values(output) == [1]


@BOTH
def test_an_output_whose_stage_is_gone_is_reported_lost_and_leaves_no_fence(
    tmp_path: Path, uri: str
) -> None:
    output, run = output_at(tmp_path, uri), job_run()
    entry = output.stage(run, {"a": [1]})
    output.sink.unstage(entry, run.token)
    with pytest.raises(OutputLostError):
        output.sink.publish(entry, run.token)
    output.put(job_run(2, version=2), {"a": [2]})
    assert len(query(output, "SELECT * FROM _cf_fence")) == 1


@BOTH
def test_append_keeps_all_versions_and_the_view_shows_the_newest(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri)
    output.put(job_run(1, version=1), {"a": [1]})
    output.put(job_run(3, version=1, location=2), {"a": [7]})
    output.put(job_run(2, version=2), {"a": [2], "more": ["x"]})
    assert values(output) == [1, 2, 7]
    assert values(output, "sales_current") == [2, 7]
    output.put(job_run(4, version=3))
    assert values(output, "sales_current") == [7]


@BOTH
def test_replace_swaps_the_slice_in_the_publishing_transaction(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri, SinkMode.REPLACE)
    old = output.put(job_run(1), {"a": [1, 1]})
    output.put(job_run(9, location=2), {"a": [9]})
    run = job_run(2, version=2)
    receipt = output.publish(run, output.stage(run, {"a": [2], "new": [True]}))
    assert receipt.removed == 2
    assert values(output) == [2, 9]
    assert output.sink.publish(old, job_run(1).token).already  # a zombie brings nothing back
    output.put(job_run(3, version=3))
    assert values(output) == [9]


@BOTH
def test_an_older_version_never_replaces_a_newer_one(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri, SinkMode.REPLACE)
    late = output.stage(job_run(1), {"a": [1]})
    output.put(job_run(2, version=2), {"a": [2]})
    with pytest.raises(SinkConflictError, match="newer"):
        output.sink.publish(late, job_run(1).token)
    assert values(output) == [2]


@BOTH
def test_replace_refuses_a_table_that_two_topics_share_before_it_harms_either(
    tmp_path: Path, uri: str
) -> None:
    output = output_at(tmp_path, f"{uri}?table=everything", SinkMode.REPLACE)
    output.put(job_run(1), {"a": [1]}, topic="sales")
    output.put(job_run(1), {"a": [2]}, topic="returns")
    with pytest.raises(OutputRefusedError, match="cannot be taken out alone"):
        output.stage(job_run(2, version=2), {"a": [3]}, topic="sales")
    assert values(output, "everything") == [1, 2]


@BOTH
def test_error_mode_refuses_a_second_result_of_the_same_file(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri, SinkMode.ERROR)
    slipped = output.stage(job_run(2, version=2), {"a": [2]})
    output.put(job_run(1), {"a": [1]})
    with pytest.raises(OutputRefusedError, match="mode=error") as caught:
        output.stage(job_run(3, version=3), {"a": [3]})
    assert caught.value.reason == Reason.SINK_CONFLICT
    with pytest.raises(SinkConflictError, match="mode=error"):
        output.sink.publish(slipped, job_run(2, version=2).token)
    assert values(output) == [1]


@BOTH
def test_columns_come_and_go_from_file_to_file(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri)
    output.put(job_run(1), {"a": [1], "gone": ["x"], "empty": pa.nulls(1)})
    output.put(job_run(2, location=2), {"a": [2.5], "new": [True], "empty": ["now text"]})
    rows = query(output, "SELECT a, gone, new, empty FROM sales ORDER BY a")
    assert rows == [(1, "x", None, None), (2.5, None, True, "now text")]


@BOTH
def test_text_for_a_column_of_numbers_is_refused_before_the_grant(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri)
    output.put(job_run(1), {"a": [1]})
    with pytest.raises(OutputRefusedError, match="column 'a'") as caught:
        output.stage(job_run(2, location=2), {"a": ["007"]})
    assert caught.value.reason == Reason.CONTRACT
    assert list_stages(output.env) == set()
    output.put(job_run(3, location=3), {"a": pa.array([None], pa.string())})
    assert len(values(output)) == 2


@BOTH
def test_names_that_sql_would_trip_over_are_only_names(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri)
    column = 'a"; DROP TABLE _cf_fence; --%s?'
    output.put(job_run(1), {column: [1], "select": [2]}, topic="group.by-1")
    assert len(query(output, 'SELECT "select" FROM "group.by-1"')) == 1
    assert len(query(output, 'SELECT * FROM "group.by-1_current"')) == 1
    assert len(query(output, "SELECT * FROM _cf_fence")) == 1


@BOTH
@pytest.mark.parametrize("columns", [{"x": [1], "X": [2]}, {" ": [1]}, {"a\0b": [1]}])
def test_column_names_that_no_table_can_have_are_refused(
    tmp_path: Path, uri: str, columns: dict[str, list[int]]
) -> None:
    with pytest.raises(OutputRefusedError, match="column"):
        output_at(tmp_path, uri).stage(job_run(), columns)


@BOTH
@pytest.mark.parametrize("topic", ["_cf_fence", "_CF_x", "sqlite_master"])
def test_table_names_that_casparian_or_the_engine_needs_are_refused(
    tmp_path: Path, uri: str, topic: str
) -> None:
    with pytest.raises(OutputRefusedError, match="reserved"):
        output_at(tmp_path, uri).stage(job_run(), {"a": [1]}, topic=topic)


@BOTH
def test_a_topic_whose_table_is_a_view_is_refused_before_the_grant(
    tmp_path: Path, uri: str
) -> None:
    output = output_at(tmp_path, uri)
    output.put(job_run(1), {"a": [1]})
    with pytest.raises(OutputRefusedError, match="is a view"):
        output.stage(job_run(2), {"a": [1]}, topic="sales_current")


@BOTH
def test_quarantine_goes_to_a_table_beside_the_topic_s(tmp_path: Path, uri: str) -> None:
    for suffix, table in (("", "sales_quarantine"), ("?table=t", "t_quarantine")):
        output = output_at(tmp_path, uri + suffix)
        entry = output.stage(job_run(), {"a": ["x"]}, kind=OutputKind.QUARANTINE)
        output.publish(job_run(), entry)
        assert values(output, table) == ["x"]


@BOTH
def test_many_publishers_of_one_manifest_put_its_rows_in_once(tmp_path: Path, uri: str) -> None:
    output, run = output_at(tmp_path, uri), job_run()
    entry = output.stage(run, {"a": list(range(100))})
    receipts: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: receipts.append(output.sink.publish(entry, run.token).already)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(receipts) == [False, True, True, True]
    assert values(output) == list(range(100))


HOLD = {
    "sqlite": "import sqlite3; c = sqlite3.connect({0!r}, isolation_level=None); "
    "c.execute('BEGIN EXCLUSIVE')",
    "duckdb": "import duckdb; c = duckdb.connect({0!r})",
}


@BOTH
def test_a_database_that_another_process_holds_is_a_transient_error(
    tmp_path: Path, uri: str
) -> None:
    output = output_at(tmp_path, uri, busy_timeout_s=0.2)
    output.put(job_run(1), {"a": [1]})
    run = job_run(2, version=2)
    entry = output.stage(run, {"a": [2]})
    code = HOLD[uri.partition(":")[0]].format(str(tmp_path / "sub" / "db.file"))
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "; print('held', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(SinkError, match="process") as caught:
            output.sink.publish(entry, run.token)
        assert caught.value.transient
        holder.communicate(b"\n")
    output.publish(run, entry)
    assert values(output) == [1, 2]


@BOTH
def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path, uri: str) -> None:
    output = output_at(tmp_path, uri)
    path = tmp_path / "sub" / "db.file"
    path.parent.mkdir()
    path.write_bytes(b"just some bytes, more than a header long" * 100)
    before = path.read_bytes()
    with pytest.raises((SinkError, OutputRefusedError), match="is no "):
        output.stage(job_run(), {"a": [1]})
    assert path.read_bytes() == before


def test_the_ledger_is_refused_as_a_target_by_path_and_by_content(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.duckdb"
    with duckdb.connect(str(ledger)) as db:
        db.execute("CREATE TABLE cf_journal (seq BIGINT)")
        db.execute("CREATE TABLE cf_meta (name TEXT)")
    named = output_at(tmp_path / "out", f"duckdb://{ledger}", ledger_path=str(ledger))
    with pytest.raises(SinkError, match="own ledger"):
        named.stage(job_run(), {"a": [1]})
    found = output_at(tmp_path / "out", f"duckdb://{ledger}")
    with pytest.raises((SinkError, OutputRefusedError), match="Casparian ledger"):
        found.stage(job_run(), {"a": [1]})


def test_sqlite_stores_every_type_without_loss(tmp_path: Path) -> None:
    output = output_at(tmp_path, "sqlite://sub/db.file")
    output.put(
        job_run(),
        pa.record_batch(
            {
                "n": pa.array([2**63 - 1], pa.int64()),
                "u": pa.array([2**64 - 1], pa.uint64()),
                "d": [date(2024, 2, 29)],
                "m": [Decimal("1.10")],
                "t": pa.array([1], pa.timestamp("us", "Europe/Paris")),
                "s": ["007"],
                "b": [b"\x00\xff"],
                "l": [[1, 2]],
            }
        ),
    )
    (row,) = query(output, "SELECT n, CAST(u AS TEXT), d, m, t, s, b, l FROM sales")
    assert row[0] == 2**63 - 1
    assert row[1:] == (
        str(2**64 - 1),
        "2024-02-29",
        "1.10",
        "1970-01-01 00:00:00.000001Z",
        "007",
        b"\x00\xff",
        "[1,2]",
    )


def test_sqlite_rehearses_the_insert_where_a_table_has_rules_of_its_own(tmp_path: Path) -> None:
    output = output_at(tmp_path, "sqlite://sub/db.file")
    (tmp_path / "sub").mkdir()
    db = sqlite3.connect(tmp_path / "sub" / "db.file")
    db.execute("CREATE TABLE sales (a INTEGER CHECK (a < 10), other TEXT NOT NULL DEFAULT 'x')")
    db.commit()
    db.close()
    output.put(job_run(1), {"a": [1]})
    with pytest.raises(OutputRefusedError, match="CHECK constraint failed"):
        output.stage(job_run(2, location=2), {"a": [11]})
    assert query(output, "SELECT a, other FROM sales") == [(1, "x")]


def test_duckdb_widens_a_column_only_where_no_value_changes(tmp_path: Path) -> None:
    output = output_at(tmp_path, "duckdb://sub/db.file")
    output.put(job_run(1), {"a": [1]})
    output.put(job_run(2, location=2), {"a": [1.5]})
    assert values(output) == [1.0, 1.5]
    with pytest.raises(OutputRefusedError, match="column 'a'"):
        output.stage(job_run(3, location=3), {"a": [2**60 + 1]})


@pytest.mark.parametrize("scheme", ["sqlite", "duckdb"])
def test_a_database_outside_of_the_root_gets_its_folders_durably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    database = tmp_path / "data" / "years" / "db.file"
    output, run = output_at(tmp_path / "root", f"{scheme}://{database}"), job_run()
    synced: list[str] = []
    sync = output.env.root.directories.sync
    monkeypatch.setattr(
        output.env.root.directories, "sync", lambda folder: (synced.append(folder), sync(folder))
    )
    output.put(run, {"a": [1]})
    assert database.is_file()
    assert synced[:2] == [str(tmp_path), str(tmp_path / "data")]
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match="cannot make the folder"):
        output_at(tmp_path / "root", f"{scheme}://{tmp_path}/file/db").put(run, {"a": [1]})
