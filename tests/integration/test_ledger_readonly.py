"""`casparian sql`'s way to the ledger: what it answers, and everything it must not do."""

from pathlib import Path

import duckdb
import pytest

from casparian_flow.db.readonly import select
from casparian_flow.domain.errors import LedgerError, UsageError

TIMELINE = (
    Path(__file__).parents[1] / "acceptance" / "snippets" / "workflow" / "timeline.sql"
).read_text()


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """Two files; the first has two versions and three jobs."""
    path = tmp_path / "copy.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("""
            CREATE TABLE cf_file_location (id BIGINT PRIMARY KEY, rel_path VARCHAR);
            CREATE TABLE cf_file_version (id BIGINT PRIMARY KEY, location_id BIGINT,
                content_hash VARCHAR, size_bytes BIGINT, detected_at TIMESTAMP);
            CREATE TABLE cf_processing_queue (id BIGINT PRIMARY KEY, file_version_id BIGINT);
            INSERT INTO cf_file_location VALUES (1, 'a.csv'), (2, 'b.csv');
            INSERT INTO cf_file_version VALUES (1, 1, 'x', 10, '2026-01-01'),
                (2, 1, 'y', 11, '2026-01-02'), (3, 2, 'z', 12, '2026-01-03');
            INSERT INTO cf_processing_queue VALUES (1, 1), (2, 2), (3, 2);
        """)
    return path


def test_the_documented_timeline_runs_as_printed(snapshot: Path) -> None:
    answer = select(snapshot, TIMELINE, limit=0)
    assert answer.columns[:2] == ["rel_path", "version_id"]
    assert [(row[0], row[1], row[5]) for row in answer.rows] == [
        ("a.csv", 1, 1),
        ("a.csv", 2, 2),
        ("b.csv", 3, 0),
    ]


def test_the_limit_cuts_and_says_so(snapshot: Path) -> None:
    everything = "SELECT id FROM cf_file_version ORDER BY id"
    cut = select(snapshot, everything, limit=2)
    assert (list(cut.rows), cut.more) == ([(1,), (2,)], True)
    assert not select(snapshot, everything, limit=3).more
    assert len(select(snapshot, everything, limit=0).rows) == 3


@pytest.mark.parametrize("sql", ["SHOW TABLES", "DESCRIBE cf_file_version", "VALUES (1)"])
def test_other_questions_are_questions_too(snapshot: Path, sql: str) -> None:
    assert select(snapshot, sql, limit=0).rows


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM cf_file_version",
        "WITH gone AS (SELECT 1) DELETE FROM cf_file_version",
        "SELECT 1; DROP TABLE cf_file_version",
        "CREATE TABLE x (a INT)",
        "COPY cf_file_version TO 'out.csv'",
        "EXPORT DATABASE 'out'",
        "ATTACH 'other.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "PRAGMA enable_profiling",
        "CALL pragma_version()",
        "CHECKPOINT",
        "",
        "-- nothing",
    ],
)
def test_anything_but_one_query_is_refused(
    snapshot: Path, sql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        select(snapshot, sql, limit=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.duckdb"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_parquet('https://example.org/x.parquet')",
        "EXPLAIN ANALYZE COPY cf_file_version TO 'out.csv'",
        "EXPLAIN ANALYZE DELETE FROM cf_file_version",
    ],
)
def test_a_query_reaches_nothing_but_the_snapshot(
    snapshot: Path, sql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="the query failed"):
        select(snapshot, sql, limit=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.duckdb"]
    assert len(select(snapshot, "SELECT * FROM cf_file_version", limit=0).rows) == 3


def test_a_group_by_that_determines_nothing_is_still_refused(snapshot: Path) -> None:
    with pytest.raises(UsageError, match="GROUP BY"):
        select(
            snapshot, "SELECT id, content_hash FROM cf_file_version GROUP BY location_id", limit=0
        )


def test_a_mistake_is_told_in_duckdbs_words(snapshot: Path) -> None:
    with pytest.raises(UsageError, match="no_such_table"):
        select(snapshot, "SELECT * FROM no_such_table", limit=0)


def test_what_is_no_ledger_is_told(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 4096)
    with pytest.raises(LedgerError):
        select(junk, "SELECT 1", limit=0)
