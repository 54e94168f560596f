"""`Scout(db).scan_source(root)` as the workflow prints it: a session, a root, a scan."""

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from casparian_flow.db.access import get_engine
from casparian_flow.db.models import FileLocation, FileVersion, SourceRoot
from casparian_flow.domain.errors import UsageError
from casparian_flow.services.scout import Scout


def test_scan_source_records_what_the_session_then_reads(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "finance.csv").write_text("a\n1\n")
    engine = get_engine(str(tmp_path / "ledger.duckdb"))
    with Session(engine) as db:
        db.add(SourceRoot(id=1, path=str(folder), settle_seconds=0.05))
        db.commit()
        root = db.query(SourceRoot).first()
        assert root is not None
        report = Scout(db).scan_source(root)
        assert (report.versions, report.complete) == (1, True)
        location = db.query(FileLocation).filter_by(rel_path="finance.csv").first()
        assert location is not None
        (folder / "finance.csv").write_text("a\n2\n")
        assert Scout(db).scan_source(root).versions == 1
        db.refresh(location)
        versions = db.query(FileVersion).filter_by(location_id=location.id).all()
        assert [v.seq for v in versions] == [1, 2]
        assert location.current_version_id == versions[1].id
    engine.dispose()


def test_a_root_that_was_never_stored_is_refused(tmp_path: Path) -> None:
    engine = get_engine(str(tmp_path / "ledger.duckdb"))
    with Session(engine) as db, pytest.raises(UsageError, match="not in the ledger"):
        Scout(db).scan_source(SourceRoot(path=str(tmp_path)))
    engine.dispose()
