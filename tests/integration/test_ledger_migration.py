"""A ledger of an earlier version is opened, brought forward, and goes on; whole at every moment."""

import logging
from pathlib import Path

import duckdb
import pytest
from ledger_kit import ManualClock, leased, started

from casparian_flow.db import migrations, schema
from casparian_flow.db.access import get_engine
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.sources import add_source, list_sources
from casparian_flow.domain.errors import LedgerUnavailableError, SchemaMismatchError
from casparian_flow.domain.jobs import JobStatus

FIRST = Path(__file__).parents[1] / "data" / "ledger_first_release.sql"
"""The tables as the first release made them."""
HISTORY = """
INSERT INTO cf_meta VALUES ('ledger_id', '7f3ac91e'), ('epoch', '4'), ('folded_seq', '2'),
    ('transaction_seq', '2'), ('created_at_us', '1'), ('schema_fingerprint', '{fingerprint}');
INSERT INTO cf_source_root (id, path) VALUES (1, '/data');
INSERT INTO cf_file_location (id, source_root_id, rel_path, filename, current_version_id,
    discovered_time, last_seen_time) VALUES (1, 1, 'a.csv', 'a.csv', 1, now(), now());
INSERT INTO cf_file_hash_registry VALUES ('aa', now(), 3);
INSERT INTO cf_file_version (id, location_id, seq, content_hash, size_bytes, modified_time,
    detected_at) VALUES (1, 1, 1, 'aa', 3, now(), now());
INSERT INTO cf_routing_rule (id, pattern, tag, priority) VALUES (1, '*.csv', 'csv', 7);
INSERT INTO cf_plugin_manifest (id, plugin_name, version, source_code, source_hash, status,
    created_at, artifact_hash) VALUES (1, 'sales', '1.0.0', 'code', 'c', 'ACTIVE', now(), 'h');
INSERT INTO cf_plugin_config (plugin_name, subscription_tags) VALUES ('sales', 'csv');
INSERT INTO cf_processing_queue (id, file_version_id, plugin_name, status, created_at)
    VALUES (1, 1, 'sales', 'QUEUED', now()), (2, 1, 'sales', 'COMPLETED', now());
INSERT INTO cf_journal VALUES (1, 2, 'LEASED', 1, 1, NULL), (2, 2, 'COMPLETED', 1, 2, NULL);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of the first release with some history."""
    path = tmp_path / "ledger.duckdb"
    fingerprint = migrations.STEPS[0].before
    with duckdb.connect(str(path)) as old:
        old.execute(FIRST.read_text())
        old.execute(HISTORY.format(fingerprint=fingerprint))
    return path


def test_every_schema_is_reached_by_a_step() -> None:
    for step, following in zip(migrations.STEPS, migrations.STEPS[1:], strict=False):
        assert step.after == following.before
    assert migrations.STEPS[-1].after == schema.fingerprint(), (
        "the tables have changed: add a step to db/migrations.py"
    )


def test_steps_lead_to_the_very_tables_of_a_new_ledger(path: Path, tmp_path: Path) -> None:
    Ledger.open(path, clock=ManualClock()).close()
    Ledger.open(tmp_path / "new.duckdb", clock=ManualClock()).close()
    look = (
        "SELECT table_name, column_name, data_type, is_nullable, column_default "
        "FROM duckdb_columns() WHERE NOT internal ORDER BY table_name, column_index"
    )
    keys = (
        "SELECT table_name, constraint_type, constraint_column_names FROM duckdb_constraints() "
        "ORDER BY ALL"
    )
    with duckdb.connect(str(path)) as old, duckdb.connect(str(tmp_path / "new.duckdb")) as new:
        assert old.execute(look).fetchall() == new.execute(look).fetchall()
        assert old.execute(keys).fetchall() == new.execute(keys).fetchall()


def test_an_old_ledger_goes_on_with_its_history(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Ledger.open(path, clock=ManualClock()) as ledger:
        assert ledger.ledger_id == "7f3ac91e"
        assert ledger.begin_epoch() > 4
        assert ledger.check() == []
        assert ledger.status_of(2) is JobStatus.COMPLETED
        assert [r["kind"] for r in ledger.history(2)] == ["LEASED", "COMPLETED"]
        state = ledger.load(10)
        assert [job.job_id for job in state.queued] == [1]
        ledger.commit([leased(ledger, 1), started(1)])
        (root,) = list_sources(ledger.reader())
        assert (root["path"], root["namespace"], root["name"]) == ("/data", "", "")
        add_source(ledger, "/sources/team/in", name="in", namespace="team", now_us=1)
    assert "were brought from schema" in caplog.text
    caplog.clear()
    with Ledger.open(path, clock=ManualClock()) as ledger:
        assert ledger.status_of(1) is JobStatus.RUNNING
        assert [r["name"] for r in list_sources(ledger.reader())] == ["", "team/in"]
    assert "were brought" not in caplog.text


def test_an_engine_brings_an_old_ledger_forward_too(path: Path) -> None:
    engine = get_engine(path)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT path, namespace FROM cf_source_root").fetchall()
    engine.dispose()
    assert [tuple(row) for row in rows] == [("/data", "")]


def test_a_step_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = migrations.STEPS[0]
    broken = step._replace(statements=(*step.statements, "ALTER TABLE nowhere ADD COLUMN x INT"))
    monkeypatch.setattr(migrations, "STEPS", (broken, *migrations.STEPS[1:]))
    with pytest.raises(LedgerUnavailableError, match="could not be brought"):
        Ledger.open(path, clock=ManualClock())
    monkeypatch.undo()
    with duckdb.connect(str(path)) as old:
        columns = [row[0] for row in old.execute("DESCRIBE cf_source_root").fetchall()]
        assert "namespace" not in columns
    with Ledger.open(path, clock=ManualClock()) as ledger:
        assert ledger.status_of(1) is JobStatus.QUEUED


def test_a_schema_that_no_step_leads_from_is_refused(path: Path) -> None:
    with duckdb.connect(str(path)) as old:
        old.execute("UPDATE cf_meta SET value = 'unknown' WHERE key = 'schema_fingerprint'")
    with pytest.raises(SchemaMismatchError):
        Ledger.open(path, clock=ManualClock())
