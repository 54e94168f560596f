"""Queries of an MCP client: one SELECT, in a process that reaches the ledger and outputs only.

What goes in: SQL as a hostile client would write it, over a real ledger's copy and real Parquet
and CSV outputs. What is observed: answers, refusals, and the files around. Most of it runs
`answer_to` in this process, where only DuckDB's own guards hold; a few run the whole child.
"""

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import pytest

from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import UsageError
from casparian_flow.mcp_server.budget import ANSWER_BYTES_MAX
from casparian_flow.mcp_server.query import QueryFailedError, QueryLimits, select
from casparian_flow.mcp_server.query_child import answer_to
from casparian_flow.mcp_server.redaction import RedactionMode, Redactor
from casparian_worker.sandbox import landlock

KEY = b"k" * 32
OUTPUT = (
    "INSERT INTO cf_output VALUES (?, 's', 1, 1, 0, 1, 't', 0, ?, ?, 'append', ?, 'r', 'st', ?, "
    "?, 10, 'x', ?, TIMESTAMP '2026-01-01')"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ledger.duckdb, out/ with outputs, and secret.csv and secret.parquet that nobody may read."""
    place = tmp_path_factory.mktemp("query")
    Ledger.open(place / "ledger.duckdb", clock=SystemClock()).close()
    (place / "out" / "sales").mkdir(parents=True)
    (place / "out" / "linked").mkdir()
    with duckdb.connect() as memory:
        memory.execute(f"COPY (SELECT 1 AS id, 'Ann' AS name) TO '{place}/out/sales/a.parquet'")
        memory.execute(f"COPY (SELECT 2 AS id, 'Bob' AS name) TO '{place}/out/sales/b.parquet'")
        memory.execute(f"COPY (SELECT 3 AS id, 'Cyd' AS name) TO '{place}/out/sales/c.csv'")
        memory.execute(f"COPY (SELECT 'hidden' AS x) TO '{place}/secret.parquet'")
        memory.execute(f"COPY (SELECT 'hidden' AS x) TO '{place}/secret.csv'")
        memory.execute(f"COPY (SELECT 'hidden' AS x) TO '{place}/out/unpublished.parquet'")
    (place / "out" / "linked" / "x.parquet").symlink_to(place / "secret.parquet")
    _databases(place)
    rows = [
        ("1", "sales", "output", "parquet://sales", "sales/a.parquet", 1, "PUBLISHED"),
        ("2", "sales", "output", "parquet://sales", "sales/b.parquet", 1, "PUBLISHED"),
        ("3", "bills", "output", "csv://sales", "sales/c.csv", 1, "PUBLISHED"),
        ("4", "sales", "output", "parquet://sales", "unpublished.parquet", 1, "GRANTED"),
        ("5", "sales", "output", "parquet://sales", "sales/gone.parquet", 1, "PUBLISHED"),
        ("6", "evil", "output", "parquet://x", "linked/x.parquet", 1, "PUBLISHED"),
        ("7", "evil", "output", "parquet://x", "../secret.parquet", 1, "PUBLISHED"),
        ("8", 'odd"; DROP', "output", "parquet://x", "sales/a.parquet", 1, "PUBLISHED"),
        ("9", "trips", "output", "sqlite://db/t.sqlite3", "trips", 2, "PUBLISHED"),
        ("a", "tolls", "output", "duckdb://db/t.duckdb?table=paid", "paid", 2, "PUBLISHED"),
        ("b", "hidden", "output", f"sqlite://{place}/other.sqlite3", "hidden", 1, "PUBLISHED"),
        ("c", "missing", "output", "duckdb://db/t.duckdb", "missing", 1, "PUBLISHED"),
        ("d", "noise", "output", "sqlite://db/noise.sqlite3", "noise", 1, "PUBLISHED"),
        ("e", "both", "output", "sqlite://db/t.sqlite3", "trips", 2, "PUBLISHED"),
        ("f", "both", "output", "parquet://sales", "sales/a.parquet", 1, "PUBLISHED"),
        ("g", "big", "output", "duckdb://db/t.duckdb", "big", 2, "PUBLISHED"),
    ]
    with duckdb.connect(str(place / "ledger.duckdb")) as ledger:
        for row in rows:
            ledger.execute(OUTPUT, list(row))
        ledger.execute("CHECKPOINT")
    return place


def _databases(place: Path) -> None:
    (place / "out" / "db").mkdir()
    for path, table in ((place / "out/db/t.sqlite3", "trips"), (place / "other.sqlite3", "hidden")):
        with closing(sqlite3.connect(path)) as sqlite, sqlite:
            sqlite.execute(
                f"CREATE TABLE {table} (n INTEGER, x REAL, odd INTEGER, who TEXT, b BLOB)"
            )
            sqlite.execute(f"INSERT INTO {table} VALUES (1, 0.5, 7, 'Ann', x'00ff')")
            sqlite.execute(f"INSERT INTO {table} VALUES (2, 2, 'seven', NULL, NULL)")
            sqlite.execute("CREATE TABLE private (secret)")
    (place / "out/db/noise.sqlite3").write_bytes(b"no database")
    with duckdb.connect(str(place / "out/db/t.duckdb")) as other:
        other.execute("CREATE TABLE paid AS SELECT 1 AS id, DATE '2026-01-02' AS day")
        other.execute("INSERT INTO paid VALUES (2, NULL)")
        other.execute("CREATE TABLE private AS SELECT 'hidden' AS x")
        other.execute(
            "CREATE TABLE big AS SELECT sha256(i::VARCHAR) || sha256((i + 1)::VARCHAR) AS x "
            "FROM range(300_000) t(i)"
        )


Asked = Callable[..., dict[str, Any]]


def asked(world: Path, sql: str, limit: int, mode: RedactionMode) -> dict[str, Any]:
    return {
        "snapshot": str(world / "ledger.duckdb"),
        "output_root": str(world / "out"),
        "sql": sql,
        "limit": limit,
        "timeout_s": 5,
        "memory_mb": 128,
        "redaction": mode,
        "key": KEY.hex(),
    }


@pytest.fixture
def ask(world: Path) -> Asked:
    def ask(sql: str, *, limit: int = 100, mode: RedactionMode = RedactionMode.NONE) -> Any:
        return answer_to(asked(world, sql, limit, mode))

    return ask


def test_the_ledger_and_published_outputs_are_tables(ask: Asked) -> None:
    assert ask("SELECT id, name FROM sales ORDER BY id")["rows"] == [[1, "Ann"], [2, "Bob"]]
    assert ask("SELECT name FROM bills")["rows"] == [["Cyd"]]
    assert ask('SELECT name FROM "odd""; drop"')["rows"] == [["Ann"]]
    joined = "SELECT count(*) FROM cf_output o JOIN sales s ON s.id = o.n + 1"
    assert ask(joined)["rows"] == [[16]]
    assert {"bills", "sales", "cf_output"} <= {row[0] for row in ask("SHOW TABLES")["rows"]}
    shown = ask("DESCRIBE sales", mode=RedactionMode.HASH)["rows"]
    assert [row[:2] for row in shown] == [["id", "INTEGER"], ["name", "VARCHAR"]]


def test_published_tables_of_sqlite_and_duckdb_are_tables(ask: Asked) -> None:
    trips = ask("SELECT n, x, odd, who, hex(b) FROM trips ORDER BY n")
    assert trips["types"] == ["BIGINT", "DOUBLE", "VARCHAR", "VARCHAR", "VARCHAR"]
    assert trips["rows"] == [[1, 0.5, "7", "Ann", "00FF"], [2, 2.0, "seven", None, None]]
    assert ask("SELECT * FROM tolls ORDER BY id")["rows"] == [[1, "2026-01-02"], [2, None]]
    joined = "SELECT count(*) FROM trips t JOIN tolls p ON p.id = t.n JOIN trips u USING (n)"
    assert ask(joined)["rows"] == [[2]]
    assert ask("SELECT n FROM both_sqlite ORDER BY n")["rows"] == [[1], [2]]
    assert ask("SELECT id FROM both_parquet")["rows"] == [[1]]
    assert ask("SUMMARIZE tolls")["rows"][0][:2] == ["id", "INTEGER"]
    shown = {row[0] for row in ask("SHOW TABLES")["rows"]}
    assert {"trips", "tolls", "both_sqlite"} <= shown
    assert not shown & {"private", "paid", "hidden", "missing"}


def test_what_else_is_in_an_outputs_database_is_out_of_reach(ask: Asked) -> None:
    for table in ("private", "paid", "source.main.paid", "source.private", "loaded.trips_0",
                  "memory.loaded.tolls_0", "hidden", "missing", "noise"):  # fmt: skip
        answer = ask(f"SELECT * FROM {table}")
        assert answer.keys() <= {"refused", "failed"}, (table, answer)


def test_a_database_that_is_being_written_to_is_told_of_and_not_waited_for(
    ask: Asked, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casparian_flow.mcp_server.query_outputs.LOCKED_TRIES", 2)
    writer = (
        "import duckdb, sqlite3, sys; d = duckdb.connect(sys.argv[1]);"
        "s = sqlite3.connect(sys.argv[2]); s.execute('BEGIN EXCLUSIVE');"
        "print(1, flush=True); sys.stdin.readline()"
    )
    databases = [str(world / "out/db" / name) for name in ("t.duckdb", "t.sqlite3")]
    with subprocess.Popen(
        [sys.executable, "-c", writer, *databases], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for table in ("tolls", "trips"):
            assert "repeat the query" in ask(f"SELECT * FROM {table}")["failed"]
        assert ask("SELECT count(*) FROM sales")["rows"] == [[2]]
        process.communicate(b"\n")
    assert ask("SELECT count(*) FROM tolls JOIN trips ON n = id")["rows"] == [[2]]


def test_a_table_beyond_the_memory_limit_is_refused(world: Path) -> None:
    answer = answer_to(
        asked(world, "SELECT count(*) FROM big", 100, RedactionMode.NONE) | {"memory_mb": 24}
    )
    assert answer == {"failed": "the query needs more than 24 MiB"}


ALLOWED = (
    "WITH a AS (SELECT 1 x), b AS (SELECT * FROM a) SELECT * FROM b",
    "WITH RECURSIVE t AS (SELECT 1 n UNION ALL SELECT n + 1 FROM t WHERE n < 5) SELECT * FROM t",
    "FROM sales",
    "TABLE sales",
    "VALUES (1), (2)",
    "(SELECT 1) UNION ALL SELECT 2",
    "SELECT * FROM range(3)",
    "SELECT unnest([1, 2])",
    "SELECT 'INSERT INTO x; DROP TABLE y' -- DELETE",
    '/* COPY */ SELECT 1 AS "update";',
    "SELECT * FROM information_schema.tables",
    "SUMMARIZE sales",
    "SELECT * FROM (PIVOT sales ON name IN ('Ann'))",
)


@pytest.mark.parametrize("sql", ALLOWED)
def test_one_select_is_answered_whatever_words_are_in_it(ask: Asked, sql: str) -> None:
    assert ask(sql)["rows"]


REFUSED = (
    "",
    ";",
    "-- nothing",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE cf_output",
    "INSERT INTO cf_output SELECT * FROM cf_output",
    "WITH x AS (INSERT INTO cf_output SELECT 1 RETURNING *) SELECT * FROM x",
    "UPDATE cf_output SET state = 'PUBLISHED'",
    "DELETE FROM cf_output",
    "CREATE TABLE memory.main.x AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "COPY sales TO '{0}/stolen.csv'",
    "COPY (SELECT 1) TO '{0}/out/stolen.parquet'",
    "EXPORT DATABASE '{0}/out/stolen'",
    "ATTACH '{0}/new.duckdb'",
    "DETACH ledger",
    "USE memory",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PRAGMA enable_external_access",
    "PRAGMA version",
    "CALL range(3)",
    "INSTALL httpfs",
    "LOAD httpfs",
    "EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
    "PIVOT sales ON name",
    "SELECT * FROM read_csv('{0}/secret.csv')",
    "SELECT * FROM read_parquet('{0}/secret.parquet')",
    "SELECT * FROM read_parquet('{0}/out/unpublished.parquet')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('{0}/out/sales/a.parquet')",
    "SELECT * FROM read_json('{0}/secret.csv')",
    "SELECT * FROM parquet_scan('{0}/secret.parquet')",
    "SELECT * FROM parquet_metadata('{0}/secret.parquet')",
    "SELECT * FROM sniff_csv('{0}/secret.csv')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM '{0}/secret.csv'",
    "SELECT * FROM '{0}/secret.parquet'",
    "SELECT * FROM '{0}/ledger.duckdb'",
    "SELECT * FROM '{0}/out/../secret.parquet'",
    'SELECT * FROM "/etc/passwd"',
    "SELECT * FROM 'https://example.org/x.csv'",
    "SELECT * FROM evil",
    "SELECT (SELECT max(content) FROM read_text('/etc/passwd'))",
    "SELECT * FROM sales WHERE id IN (SELECT 1 FROM read_csv('{0}/secret.csv'))",
    "WITH s AS (SELECT * FROM read_csv('{0}/secret.csv')) SELECT * FROM s",
    "SELECT * FROM sales, LATERAL (SELECT * FROM glob('{0}/*'))",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('sales')",
    "SELECT * FROM json_execute_serialized_sql('x')",
    "SELECT * FROM sqlite_scan('{0}/x', 'y')",
    "SELECT * FROM postgres_scan('host=127.0.0.1', 'a', 'b')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM pragma_database_list()",
    "SELECT * FROM python_variable",
    "SELECT * FROM world",
    "DESCRIBE '{0}/secret.csv'",
    "SUMMARIZE '{0}/secret.csv'",
    "SELECT $1",
    "SELECT nextval('x')",
    "SELECT getenv('HOME')",
    "SELECT '\0'",
    "\ud800",
    'SELECT "',
    "SELECT " + "(" * 20_000,
)


def digests(place: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def test_whatever_else_is_asked_is_refused_and_changes_nothing(ask: Asked, world: Path) -> None:
    before = digests(world)
    for sql in REFUSED:
        text = sql.replace("{0}", str(world))
        answer = ask(text)
        assert answer.keys() <= {"refused", "failed"}, (text[:200], answer)
        assert "hidden" not in json.dumps(answer).replace(text, ""), text[:200]
    assert digests(world) == before


def test_no_value_comes_out_by_way_of_an_error_or_a_column_name(ask: Asked) -> None:
    for sql in (
        "SELECT error(name) FROM sales",
        "SELECT name::INT FROM sales",
        "SELECT CAST(name AS DATE) FROM sales",
        "SELECT strptime(name, '%Y') FROM sales",
        "SELECT regexp_matches('x', name || '(') FROM sales",
        "SELECT list_aggregate([1], name) FROM sales",
        "SELECT name FROM sales",
        "SELECT {'name': name} FROM sales",
        "SELECT [name] FROM sales",
        "SELECT map([name], [1]) FROM sales",
        "SELECT encode(name) FROM sales",
        "SUMMARIZE sales",
        "SELECT json_object('a', name) FROM sales",
    ):
        told = json.dumps(ask(sql, mode=RedactionMode.HASH))
        assert "Ann" not in told, sql
        assert "Bob" not in told, sql
        assert b"Ann".hex() not in told, sql


def test_an_answer_is_cut_at_its_rows_and_at_a_mebibyte(ask: Asked) -> None:
    few = ask("SELECT range FROM range(50)", limit=10)
    assert (len(few["rows"]), few["truncated"]) == (10, True)
    exact = ask("SELECT range FROM range(10)", limit=10)
    assert (len(exact["rows"]), exact["truncated"]) == (10, False)
    much = ask("SELECT repeat(chr(10), 9000) FROM range(9000)", limit=10_000)
    assert much["truncated"]
    assert len(json.dumps(much).encode()) <= ANSWER_BYTES_MAX


@pytest.fixture
def child(world: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(sql: str, timeout_s: float = 5, memory_mb: int = 128) -> dict[str, Any]:
        def snapshot() -> str:
            return str(shutil.copy(world / "ledger.duckdb", tmp_path / "copy.duckdb"))

        limits = QueryLimits(timeout_s, memory_mb, world / "out")
        return select(snapshot, sql, 10, limits, Redactor(RedactionMode.HASH, KEY))

    return run


def test_a_child_answers_and_leaves_no_copy(child: Asked, tmp_path: Path) -> None:
    answer = child("SELECT count(*) AS n, max(name) AS name FROM sales")
    assert answer["columns"] == ["n", "name"]
    assert answer["rows"][0][0] == 2
    assert answer["rows"][0][1].startswith("[hash:")
    databases = "SELECT sum(n) AS n, count(day) AS days FROM trips JOIN tolls ON id = n"
    assert child(databases)["rows"] == [[3, 1]]
    with pytest.raises(UsageError):
        child("DELETE FROM cf_output")
    assert list(tmp_path.iterdir()) == []


INTRUDER = """
import json, sys
from casparian_flow.mcp_server.query_child import _confine
request = json.load(sys.stdin)
_confine(request)
for path in (request["snapshot"], *request["read"]):
    open(path, "rb").read()
for path in request["denied"]:
    try:
        open(path, "rb").read()
    except PermissionError:
        print("denied")
try:
    with open(request["write"], "wb", buffering=0) as file:
        file.write(b"x")
except OSError:
    print("not written")
"""


def test_a_child_reads_what_it_must_and_writes_nothing_even_past_duckdb(
    world: Path, tmp_path: Path
) -> None:
    """What an intruder in the child's place could do after it has confined itself."""
    denied = [str(world / "secret.csv"), str(world / "out" / "linked" / "x.parquet"), "/etc/passwd"]
    request = {
        "snapshot": str(world / "ledger.duckdb"),
        "output_root": str(world / "out"),
        "timeout_s": 5,
        "memory_mb": 128,
        "read": [str(world / "out" / "sales" / "a.parquet")],
        "denied": denied,
        "write": str(tmp_path / "stolen"),
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", INTRUDER],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    try:
        landlock.abi()
    except OSError:
        confined = 0  # such a kernel leaves reading to DuckDB's own guards
    else:
        confined = len(denied)
    assert done.stdout.split("\n")[:-1] == ["denied"] * confined + ["not written"]
    written = tmp_path / "stolen"
    assert not written.exists() or written.read_bytes() == b""


def test_a_query_without_end_and_one_that_is_too_large_are_stopped(
    child: Asked, tmp_path: Path
) -> None:
    with pytest.raises(QueryFailedError, match=r"within 1 seconds|time is over"):
        child("SELECT sum(a.range * b.range) FROM range(10000000000) a, range(99999) b", 1)
    with pytest.raises(QueryFailedError, match=r"MiB|limits|memory"):
        child("SELECT list(range) FROM range(10000000000)", 30, 64)
    assert list(tmp_path.iterdir()) == []
