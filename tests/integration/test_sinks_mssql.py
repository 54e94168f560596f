"""mssql:// through pymssql against a loopback server that speaks TDS (tests/tds_double.py).

What is real: pymssql, FreeTDS, every byte between them and the double. What is not: SQL Server.
"""

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from sink_kit import Output, job_run, output_at
from tds_double import PASSWORD, TdsDouble, tds_double

from casparian_flow.domain.errors import (
    DiskFullError,
    OutputLostError,
    OutputRefusedError,
    SinkConflictError,
    SinkError,
)
from casparian_flow.domain.outputs import OutputKind, SinkMode
from casparian_worker.sinks.base import MssqlSettings
from casparian_worker.sinks.garbage import delete_stages, list_stages


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TdsDouble]:
    folder = tmp_path / "server"
    folder.mkdir()
    with tds_double(folder) as double:
        yield double


def output_on(
    server: TdsDouble,
    mode: SinkMode = SinkMode.APPEND,
    uri: str = "mssql://sales",
    password: str = PASSWORD,
) -> Output:
    settings = MssqlSettings("127.0.0.1", server.port, "loader", password, "casparian", 5)
    return output_at(server.folder / "out", uri, mode, mssql=settings)


def values(server: TdsDouble, table: str = "dbo.sales") -> list[Any]:
    return [row[0] for row in server.query(f'SELECT a FROM "{table}" ORDER BY 1')]


def test_rows_are_staged_by_bulk_copy_and_published_in_one_transaction(server: TdsDouble) -> None:
    output, run = output_on(server), job_run()
    entry = output.stage(run, {"a": [1, 2]})
    assert list_stages(output.env, [output.uri]) == {run.token}
    before = len(server.statements)
    assert not output.sink.publish(entry, run.token).already
    shapes = [re.sub(r"[\s(\[].*", "", sql, flags=re.DOTALL) for sql in server.statements[before:]]
    begin, commit = shapes.index("BEGIN"), shapes.index("COMMIT")
    changes = [s for s in shapes[begin:commit] if s not in ("SELECT", "IF")]
    assert changes == ["BEGIN", "INSERT", "CREATE", "INSERT"]
    assert shapes[begin - 1] == "SET"
    assert output.sink.publish(entry, run.token).already
    output.sink.unstage(entry, run.token)
    assert output.sink.publish(entry, run.token).already
    assert values(server) == [1, 2]
    assert list_stages(output.env, [output.uri]) == set()


def test_values_survive_the_wire(server: TdsDouble) -> None:
    columns = {
        "a": [1, None, -(2**63)],
        "s": ["x'é\U0001f600\r\n", "", None],
        "b": [b"\x00\xff", b"", None],
        "f": [1.5, None, float("nan")],
        "o": [True, False, None],
        "d": pa.array([date(2024, 2, 29)] * 3),
        "c": pa.array([time(1, 2, 3)] * 3),
        "t": pa.array([datetime(2024, 1, 1, tzinfo=UTC)] * 3, pa.timestamp("us", "Europe/Paris")),
        "m": [Decimal("1.10")] * 3,
        "u": pa.array([2**64 - 1] * 3, pa.uint64()),
        "l": [[1, 2]] * 3,
        "n": pa.nulls(3),
    }
    output_on(server).put(job_run(), pa.record_batch(columns))
    names = ", ".join(name for name in columns if name not in "un")
    rows = server.query(f'SELECT {names} FROM "dbo.sales"')
    same = ("2024-02-29", "01:02:03.000000", "2024-01-01 00:00:00.000000+00:00", 1.1, "[1,2]")
    assert rows == [
        (1, "x'é\U0001f600\r\n", b"\x00\xff", 1.5, 1, *same),
        (None, "", b"", None, 0, *same),
        (-(2**63), None, None, None, None, *same),
    ]
    types = dict(server.query("SELECT name, type FROM pragma_table_info('dbo.sales')"))
    assert types["t"] == "datetimeoffset(6)"
    assert types["u"] == "decimal(20,0)"
    assert "n" not in types


def test_statements_name_the_schema_and_quote_what_plugins_named(server: TdsDouble) -> None:
    output = output_on(server, uri="mssql://mart.facts")
    output.put(job_run(), {"a]b": [1], "50%s": ["x"]})
    sent = "\n".join(server.statements)
    assert "INSERT INTO [mart].[facts] ([a]]b], [50%s], " in sent
    assert "CREATE TABLE [mart].[facts] ([a]]b] bigint NULL, [50%s] nvarchar(max) NULL, " in sent
    assert "[mart].[_cf_stage_7f3ac91e-1-1-1_0]" in sent
    assert "[mart].[_cf_fence]" in sent
    assert "STUFF(c1, 1, 1, N'')" in sent


def test_replace_error_and_append_mean_what_they_mean_elsewhere(server: TdsDouble) -> None:
    append = output_on(server)
    append.put(job_run(1), {"a": [1]})
    append.put(job_run(2, version=2), {"a": [2]})
    assert values(server) == [1, 2]
    replace = output_on(server, SinkMode.REPLACE, "mssql://replaced")
    replace.put(job_run(3), {"a": [3]})
    run = job_run(4, version=2)
    assert replace.publish(run, replace.stage(run, {"a": [4]})).removed == 1
    assert values(server, "dbo.replaced") == [4]
    replace.put(job_run(5, version=3))
    assert values(server, "dbo.replaced") == []
    error = output_on(server, SinkMode.ERROR, "mssql://once")
    error.put(job_run(6), {"a": [6]})
    with pytest.raises(OutputRefusedError, match="mode=error"):
        error.stage(job_run(7, version=2), {"a": [7]})
    assert values(server, "dbo.once") == [6]


def test_a_key_that_another_token_published_is_a_conflict(server: TdsDouble) -> None:
    output = output_on(server)
    first, second = job_run(1, attempt=1), job_run(1, attempt=2)
    one, two = output.stage(first, {"a": [1]}), output.stage(second, {"a": [2]})
    output.publish(first, one)
    with pytest.raises(SinkConflictError, match="already holds this output"):
        output.sink.publish(two, second.token)
    assert values(server) == [1]


def test_a_commit_whose_answer_is_lost_is_found_by_the_next_try(server: TdsDouble) -> None:
    output, run = output_on(server), job_run()
    entry = output.stage(run, {"a": [1]})
    server.fail("COMMIT TRANSACTION", 0)
    with pytest.raises(SinkError) as caught:
        output.sink.publish(entry, run.token)
    assert caught.value.transient
    assert output.sink.publish(entry, run.token).already
    assert values(server) == [1]


def test_a_connection_lost_before_the_commit_changes_nothing(server: TdsDouble) -> None:
    output, run = output_on(server), job_run()
    entry = output.stage(run, {"a": [1]})
    server.fail("INSERT INTO [dbo].[sales]", 0)
    with pytest.raises(SinkError) as caught:
        output.sink.publish(entry, run.token)
    assert caught.value.transient
    assert not output.sink.publish(entry, run.token).already
    assert values(server) == [1]


@pytest.mark.parametrize(
    ("number", "transient"), [(1205, True), (1222, True), (2714, True), (40501, True), (229, False)]
)
def test_error_numbers_decide_whether_it_is_tried_again(
    server: TdsDouble, number: int, transient: bool
) -> None:
    output, run = output_on(server), job_run()
    entry = output.stage(run, {"a": [1]})
    server.fail("INSERT INTO [dbo].[sales]", number)
    with pytest.raises(SinkError, match=f"error {number}") as caught:
        output.sink.publish(entry, run.token)
    assert caught.value.transient is transient
    output.publish(run, entry)
    assert values(server) == [1]


def test_a_full_database_is_told_as_a_full_disk(server: TdsDouble) -> None:
    output, run = output_on(server), job_run()
    entry = output.stage(run, {"a": [1]})
    server.fail("INSERT INTO [dbo].[sales]", 1105)
    with pytest.raises(DiskFullError):
        output.sink.publish(entry, run.token)


def test_a_stage_that_is_gone_is_reported_lost(server: TdsDouble) -> None:
    output, run = output_on(server), job_run()
    entry = output.stage(run, {"a": [1]})
    output.sink.unstage(entry, run.token)
    with pytest.raises(OutputLostError):
        output.sink.publish(entry, run.token)
    assert server.query("SELECT name FROM sqlite_master") == []  # undone, the fence table too


def test_drifting_columns_go_on_in_the_same_stage(server: TdsDouble) -> None:
    output = output_on(server)
    output.put(job_run(1), {"a": [1]}, {"a": [2.5], "new": ["x"]}, {"new": [None], "a": [3]})
    assert values(server) == [1, 2.5, 3]


def test_text_for_a_column_of_numbers_is_refused_before_the_grant(server: TdsDouble) -> None:
    output = output_on(server)
    output.put(job_run(1), {"a": [1]})
    with pytest.raises(OutputRefusedError, match="'a'"):
        output.stage(job_run(2, location=2), {"a": ["x"]})
    assert list_stages(output.env, [output.uri]) == set()


def test_quarantine_and_garbage(server: TdsDouble) -> None:
    output = output_on(server)
    entry = output.stage(job_run(1), {"a": ["x"]}, kind=OutputKind.QUARANTINE)
    output.publish(job_run(1), entry)
    assert values(server, "dbo.sales_quarantine") == ["x"]
    output.stage(job_run(2), {"a": [1]})
    output.stage(job_run(3), {"a": [1]})
    assert delete_stages(output.env, {job_run(2).token}, [output.uri]) == 1
    assert list_stages(output.env, [output.uri]) == {job_run(3).token}


def test_a_wrong_password_says_which_setting_to_look_at_and_is_not_printed(
    server: TdsDouble,
) -> None:
    output = output_on(server, password="hunter2")
    with pytest.raises(SinkError) as caught:
        output.sink.check()
    assert "CASPARIAN_MSSQL_PASSWORD" in caught.value.hint
    assert not caught.value.transient
    assert "hunter2" not in str(caught.value) + repr(output.env.mssql)


def test_a_missing_server_says_which_settings_to_make(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="no server") as caught:
        output_at(tmp_path, "mssql://sales").sink.check()
    assert "CASPARIAN_MSSQL_SERVER" in caught.value.hint


def test_settings_come_from_the_environment() -> None:
    environ = {"CASPARIAN_MSSQL_SERVER": "db", "CASPARIAN_MSSQL_PORT": "14330"}
    assert MssqlSettings.from_env(environ) == MssqlSettings(server="db", port=14_330)
    with pytest.raises(SinkError, match="from 1 to 65535"):
        MssqlSettings.from_env({"CASPARIAN_MSSQL_PORT": "http"})
