"""Export and import, over a schema that has changed in between."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_kit import ManualClock, completed, insert_jobs, run_to_grant, token_of

from casparian_flow.db import schema
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import ConflictError, NotFoundError, UsageError
from casparian_flow.domain.jobs import JobStatus

CLOCK = ManualClock()


@pytest.fixture
def export(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """An export of three jobs, one of them done and one granted, and the ledger's id."""
    with Ledger.open(tmp_path / "old.duckdb", clock=CLOCK) as ledger:
        ledger.begin_epoch()
        insert_jobs(ledger, 3)
        run_to_grant(ledger, 1)
        run_to_grant(ledger, 2)
        ledger.commit([completed(1)])
        rows = ledger.export_to(tmp_path / "export")
        assert rows["cf_processing_queue"] == 3
        yield tmp_path / "export", ledger.ledger_id


def test_history_goes_into_a_changed_schema(
    export: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, ledger_id = export
    queue = schema.TABLES["cf_processing_queue"]
    changed = queue.replace("input_file VARCHAR,", "colour VARCHAR NOT NULL DEFAULT 'grey',")
    # Another order of columns as well: they are mapped by name.
    changed = changed.replace("plugin_name VARCHAR NOT NULL,", "", 1)
    monkeypatch.setitem(
        schema.TABLES, "cf_processing_queue", changed.rstrip() + ",\n plugin_name VARCHAR NOT NULL"
    )
    monkeypatch.setitem(schema.TABLES, "cf_new_table", "\n        id BIGINT PRIMARY KEY\n    ")
    monkeypatch.delitem(schema.TABLES, "cf_worker_node")
    path = tmp_path / "new.duckdb"
    with Ledger.open(path, clock=CLOCK) as ledger:
        ledger.begin_epoch()
        result = ledger.import_from(directory)
        assert sorted(result["left_behind"]) == ["cf_processing_queue.input_file", "cf_worker_node"]
        assert ledger.ledger_id == ledger_id
        rows = ledger.query("SELECT id, plugin_name, colour FROM cf_processing_queue ORDER BY id")
        assert [tuple(row.values()) for row in rows] == [(i, "sales", "grey") for i in (1, 2, 3)]
        (staged,) = ledger.load(5).active
        assert (staged.job_id, staged.token) == (2, token_of(ledger, 2))
        assert len(staged.manifest) == 1
        assert ledger.begin_epoch() == 2
        ledger.commit([completed(2)])
        assert insert_jobs(ledger, 1)[0].job_id == 4
        assert ledger.check() == []
    with Ledger.open(path, clock=CLOCK) as ledger:
        assert ledger.status_of(2) is JobStatus.COMPLETED


def test_an_export_never_overwrites(export: tuple[Path, str], tmp_path: Path) -> None:
    with Ledger.in_memory(clock=CLOCK) as ledger, pytest.raises(ConflictError):
        ledger.export_to(export[0])


@pytest.mark.parametrize(
    "name", ["a" * 300, "a\0b", "file/below"], ids=["long", "nul", "in a file"]
)
def test_an_export_to_a_folder_that_cannot_be_is_a_mistake_of_the_caller(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    with Ledger.open(tmp_path / "ledger.duckdb", clock=CLOCK) as ledger:
        with pytest.raises(UsageError, match="cannot write to the folder"):
            ledger.export_to(tmp_path / name)
        assert ledger.check() == []


def test_an_import_wants_a_ledger_without_history(export: tuple[Path, str]) -> None:
    with Ledger.in_memory(clock=CLOCK) as ledger:
        insert_jobs(ledger, 1)
        with pytest.raises(ConflictError, match="history already"):
            ledger.import_from(export[0])


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with Ledger.in_memory(clock=CLOCK) as ledger, pytest.raises(NotFoundError):
        ledger.import_from(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 1}',
        "{" * 9000,
        '{"format": 99, "schema_fingerprint": "", "ledger_id": "", "tables": {}}',
    ],
)
def test_a_damaged_manifest_is_refused(export: tuple[Path, str], text: str) -> None:
    (export[0] / "manifest.json").write_text(text)
    with Ledger.in_memory(clock=CLOCK) as ledger, pytest.raises(UsageError):
        ledger.import_from(export[0])


def test_damaged_tables_change_nothing(export: tuple[Path, str]) -> None:
    directory, _ = export
    with Ledger.in_memory(clock=CLOCK) as ledger:
        before = ledger.ledger_id
        whole = (directory / "cf_slice.parquet").read_bytes()
        (directory / "cf_slice.parquet").write_bytes(b"rubbish")
        with pytest.raises(UsageError, match="cf_slice"):
            ledger.import_from(directory)
        (directory / "cf_slice.parquet").write_bytes(whole)
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["tables"]["cf_journal"] += 1
        (directory / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UsageError, match="cf_journal"):
            ledger.import_from(directory)
        assert ledger.ledger_id == before
        assert ledger.query("SELECT * FROM cf_processing_queue") == []
        insert_jobs(ledger, 1)
