"""GROUP BY a primary key: what is completed, and what is left exactly as it is."""

from pathlib import Path

import duckdb
import pytest

from casparian_flow.db import schema
from casparian_flow.db.sqlcompat import SQL_CHARS_MAX, complete_group_by

TIMELINE = (
    Path(__file__).parents[1] / "acceptance" / "snippets" / "workflow" / "timeline.sql"
).read_text()


@pytest.fixture(scope="module")
def database() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    for statement in schema.create_statements():
        connection.execute(statement)
    return connection


COMPLETED = [
    TIMELINE,
    "SELECT path FROM cf_source_root GROUP BY id",
    "SELECT path FROM main.cf_source_root AS r GROUP BY r.id",
    'SELECT R.Path, count(*) FROM CF_SOURCE_ROOT r GROUP BY R."ID" HAVING r.active = 1',
    "SELECT 'é', v.seq FROM cf_file_version v GROUP BY v.id ORDER BY v.size_bytes",
    "SELECT * FROM cf_source_root GROUP BY id",
    (
        "SELECT (SELECT max(v.seq) FROM cf_file_version v WHERE v.location_id = l.id), l.filename "
        "FROM cf_file_location l GROUP BY l.id"
    ),
    (
        "SELECT path FROM cf_source_root WHERE id IN "
        "(SELECT source_root_id FROM cf_file_location GROUP BY id) GROUP BY id"
    ),
    "SELECT path, row_number() OVER (ORDER BY type) FROM cf_source_root GROUP BY id",
    "SELECT path FROM cf_source_root GROUP BY id UNION ALL SELECT type FROM cf_source_root",
    "SELECT /* group by nothing */ path -- group by id\nFROM cf_source_root GROUP BY id",
]


@pytest.mark.parametrize("sql", COMPLETED)
def test_columns_that_depend_on_a_grouped_key_are_accepted(
    database: duckdb.DuckDBPyConnection, sql: str
) -> None:
    with pytest.raises(duckdb.BinderException):
        database.execute(sql)
    database.execute(complete_group_by(sql))


REFUSED = [
    # No key is grouped, or only a part of it, or another table's.
    "SELECT v.content_hash FROM cf_file_version v GROUP BY v.location_id",
    "SELECT v.content_hash FROM cf_file_version v GROUP BY v.location_id, v.seq",
    "SELECT t.tag FROM cf_file_tag t GROUP BY t.file_id",
    (
        "SELECT v.seq FROM cf_file_location l JOIN cf_file_version v ON v.location_id = l.id "
        "GROUP BY l.id"
    ),
    # Not base tables of the ledger.
    "WITH cf_file_version AS (SELECT 1 AS id, 2 AS s) SELECT s FROM cf_file_version GROUP BY id",
    "SELECT v.seq FROM (SELECT * FROM cf_file_version) v GROUP BY v.id",
    "SELECT path FROM cf_source_root GROUP BY id + 0",
    "SELECT path, count(*) FROM cf_source_root GROUP BY ROLLUP (id)",
    # The append-only tables have no key.
    "SELECT kind FROM cf_journal GROUP BY seq",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_columns_that_do_not_depend_are_still_refused(
    database: duckdb.DuckDBPyConnection, sql: str
) -> None:
    with pytest.raises(duckdb.BinderException):
        database.execute(complete_group_by(sql))


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "SELECT v.id, sum(v.size_bytes)  FROM cf_file_version v\tGROUP BY v.id ;",
        "SELECT v.id, count(*) FROM cf_file_version v WHERE v.seq > 1 GROUP BY v.id",
        "SELECT path, id FROM cf_source_root GROUP BY id, path",
        "SELECT path FROM cf_source_root GROUP BY ALL",
        "INSERT INTO cf_meta SELECT path, path FROM cf_source_root GROUP BY id",
        "group by",
        "SELECT 'unclosed FROM cf_source_root GROUP BY id",
        "SELECT path FROM cf_source_root GROUP BY id \x00",
        "(" * 3_000 + " GROUP BY id",
        "SELECT path FROM cf_source_root GROUP BY id" + " " * SQL_CHARS_MAX,
        "SELECT path FROM nowhere.cf_source_root GROUP BY id",
        "🦆 GROUP BY 🦆",
        "",
    ],
    ids=range(14),
)
def test_what_needs_nothing_or_is_not_understood_comes_back_unchanged(sql: str) -> None:
    assert complete_group_by(sql) == sql


def test_the_groups_stay_the_same(database: duckdb.DuckDBPyConnection) -> None:
    connection = database.cursor()
    connection.execute("BEGIN")
    connection.execute("INSERT INTO cf_source_root (id, path) VALUES (1, 'a'), (2, 'b')")
    connection.execute(
        "INSERT INTO cf_file_location (id, source_root_id, rel_path, filename, discovered_time, "
        "last_seen_time) SELECT i, 1 + i % 2, 'f' || i, 'f', now()::TIMESTAMP, now()::TIMESTAMP "
        "FROM range(1, 6) t(i)"
    )
    sql = (
        "SELECT r.path, count(l.id) FROM cf_source_root r LEFT JOIN cf_file_location l "
        "ON l.source_root_id = r.id GROUP BY r.id ORDER BY r.path"
    )
    assert connection.execute(complete_group_by(sql)).fetchall() == [("a", 2), ("b", 3)]
    connection.execute("ROLLBACK")
