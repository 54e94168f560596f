"""SQLAlchemy on the ledger: alone, beside a Ledger in one process, and while another holds it."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from ledger_kit import ManualClock, insert_jobs, leased
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from casparian_flow.db.access import get_engine
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.models import FileLocation, FileVersion, ProcessingJob, SourceRoot
from casparian_flow.domain.errors import LedgerLockedError, SentinelUnreachableError, UsageError

TIMELINE = (
    Path(__file__).parents[1] / "acceptance" / "snippets" / "workflow" / "timeline.sql"
).read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "casparian_flow.sqlite3"


def add_history(db: Session) -> None:
    """One file with two versions."""
    db.add(SourceRoot(path="/data"))
    db.flush()
    location = FileLocation(
        source_root_id=1,
        rel_path="data/finance.csv",
        filename="finance.csv",
        size=5,
        mtime_ns=1_500_000_000,
    )
    db.add(location)
    db.flush()
    for seq in (1, 2):
        db.add(
            FileVersion(
                location_id=location.id,
                seq=seq,
                content_hash=str(seq) * 64,
                size_bytes=5,
                modified_time=datetime(2026, 1, seq, tzinfo=UTC).replace(tzinfo=None),
            )
        )
        db.flush()
    db.commit()


def test_the_first_connection_makes_the_ledger(path: Path) -> None:
    engine = get_engine(SimpleNamespace(db_location=str(path)))
    with Session(engine) as db:
        assert db.query(SourceRoot).first() is None
    with Ledger.open(path, clock=ManualClock()) as ledger:
        assert ledger.check() == []


def test_documented_queries_run_as_printed(path: Path) -> None:
    engine = get_engine(path)
    with Session(engine) as db:
        add_history(db)
        location = db.query(FileLocation).filter_by(rel_path="data/finance.csv").first()
        assert location is not None
        assert (location.last_known_size, location.last_known_mtime) == (5, 1.5)
        versions = (
            db.query(FileVersion)
            .filter_by(location_id=location.id)
            .order_by(FileVersion.detected_at)
            .all()
        )
        assert [v.content_hash[:8] for v in versions] == ["1" * 8, "2" * 8]
        assert [v.seq for v in location.versions] == [1, 2]
        assert location.source_root is not None
        timeline = db.execute(text(TIMELINE)).all()
        assert [(row.rel_path, row.version_id, row.jobs_processed) for row in timeline] == [
            ("data/finance.csv", 1, 0),
            ("data/finance.csv", 2, 0),
        ]


def test_a_column_that_depends_on_nothing_grouped_is_still_refused(path: Path) -> None:
    with Session(get_engine(path)) as db, pytest.raises(ProgrammingError, match="GROUP BY"):
        db.execute(text("SELECT seq FROM cf_file_version GROUP BY location_id"))


def test_a_closed_session_lets_go_of_the_file(path: Path) -> None:
    with Session(get_engine(path)) as db:
        db.query(SourceRoot).all()
    code = "import duckdb, sys; duckdb.connect(sys.argv[1]).close()"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_beside_a_ledger_both_see_each_others_work(path: Path) -> None:
    engine = get_engine(path)
    with Ledger.open(path, clock=ManualClock()) as ledger:
        ledger.begin_epoch()
        insert_jobs(ledger, 2)
        ledger.commit([leased(ledger, 1)])
        with Session(engine) as db:
            statuses = [job.status for job in db.query(ProcessingJob).order_by(ProcessingJob.id)]
            assert statuses == ["DISPATCHING", "QUEUED"]
            db.add(SourceRoot(path="/second"))
            db.commit()
        assert ledger.next_id("cf_source_root") == 3


HOLDER = """
import sys
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
ledger = Ledger.open(sys.argv[1], clock=SystemClock())
with ledger.transaction() as connection:
    connection.execute("INSERT INTO cf_source_root (id, path) VALUES (1, '/held')")
for line in sys.stdin:
    print(ledger.snapshot(line.strip()), flush=True)
"""


def test_while_another_process_holds_it_reads_come_from_snapshots(
    path: Path, tmp_path: Path
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    folder = tmp_path / "snapshots"

    def snapshot() -> str:
        assert holder.stdin is not None
        assert holder.stdout is not None
        print(folder, file=holder.stdin, flush=True)
        return holder.stdout.readline().strip()

    def unreachable() -> str:
        raise SentinelUnreachableError("nobody answers")

    try:
        snapshot()  # the holder is ready
        for file in folder.iterdir():
            file.unlink()
        with Session(get_engine(path, snapshot_provider=snapshot)) as db:
            assert [root.path for root in db.query(SourceRoot)] == ["/held"]
            assert list(folder.iterdir()) == []
            db.add(SourceRoot(path="/mine"))
            with pytest.raises(UsageError, match="snapshot") as refused:
                db.commit()
            assert refused.value.hint
        with (
            Session(get_engine(path, snapshot_provider=unreachable)) as db,
            pytest.raises(LedgerLockedError, match=str(holder.pid)),
        ):
            db.query(SourceRoot).all()
    finally:
        holder.stdin.close()
        holder.stdout.close()
        assert holder.wait(30) == 0
