"""Defects of earlier versions that no other test keeps away by name.

docs/testing.md lists all of them with the tests that hold each; that list is checked here.
"""

import importlib
import pkgutil
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sink_kit import job_run

import casparian_flow
import casparian_worker
from casparian_flow.db.inventory import begin_scan, record_chunk
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.sources import add_source
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.outputs import SinkSpec
from casparian_flow.sentinel.api import FileFinding
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.lineage import Lineage, global_job_id
from casparian_worker.publishing import Sinks
from casparian_worker.sinks.base import JobRun, SinkEnvironment
from casparian_worker.sinks.root import OutputRoot

T0 = 1_800_000_000_000_000
REPOSITORY = Path(__file__).parents[2]


class Job:
    """One job's outputs below a root of its own, without a plugin or a Sentinel."""

    def __init__(self, folder: Path, *specs: SinkSpec) -> None:
        self.run: JobRun = job_run()
        self.folder = folder
        self.sinks = Sinks(SinkEnvironment(OutputRoot.open(folder)))
        lineage = Lineage("ab" * 32, global_job_id(self.run.token), "2026-01-01T00:00:00Z", "1")
        self.outputs = JobOutputs(self.run, lineage, specs, self.sinks.get)

    def parquet(self, folder: str) -> list[int]:
        """The numbers in the files of a folder below the root."""
        found: list[int] = []
        for path in sorted((self.folder / folder).glob("*.parquet")):
            found += pq.read_table(path).column("n").to_pylist()
        return found


def rows(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"n": list(numbers)})


def test_each_sink_gets_the_rows_of_its_own_topic_and_no_others(tmp_path: Path) -> None:
    job = Job(tmp_path, SinkSpec("even", "parquet://evens"), SinkSpec("odd", "parquet://odds"))
    for number in range(6):
        job.outputs.write("odd" if number % 2 else "even", rows(number))
    for entry in job.outputs.finish():
        job.sinks.get(entry.uri).publish(entry, job.run.token)
    assert job.parquet("evens") == [0, 2, 4]
    assert job.parquet("odds") == [1, 3, 5]


def test_what_a_killed_worker_published_in_part_is_completed_once_by_another(
    tmp_path: Path,
) -> None:
    uris = ("parquet://files", "sqlite://db/rows.sqlite3")
    job = Job(tmp_path, *(SinkSpec("t", uri) for uri in uris))
    job.outputs.write("t", rows(1, 2))
    entries = job.outputs.finish()
    job.sinks.get(entries[0].uri).publish(entries[0], job.run.token)  # and then it is killed
    other = Sinks(SinkEnvironment(OutputRoot.open(tmp_path)))
    for _ in range(2):
        for entry in entries:
            other.get(entry.uri).publish(entry, job.run.token)
    for entry in entries:
        other.get(entry.uri).unstage(entry, job.run.token)
    assert job.parquet("files") == [1, 2]
    with closing(sqlite3.connect(tmp_path / "db" / "rows.sqlite3")) as database:
        assert database.execute("SELECT n FROM t ORDER BY n").fetchall() == [(1,), (2,)]


def test_two_scans_that_find_the_same_new_file_make_one_location() -> None:
    finding = FileFinding("a.csv", (1, 1, 1, 1, 1), "a" * 64, T0)
    with Ledger.in_memory(clock=SystemClock()) as ledger:
        root = add_source(ledger, "/data", now_us=T0)["id"]
        first = begin_scan(ledger, root, now_us=T0)["scan_id"]
        later = T0 + 60_000_000
        second = begin_scan(ledger, root, now_us=later)["scan_id"]
        results = [
            record_chunk(ledger, root, scan, [finding], now_us=later)[0] for scan in (first, second)
        ]
        assert [(r.locations, r.versions, r.conflicts) for r in results] == [
            (1, 1, []),
            (0, 0, ["a.csv"]),
        ]
        assert len(ledger.query("SELECT id FROM cf_file_location")) == 1


def test_every_module_can_be_imported() -> None:
    for package in (casparian_flow, casparian_worker):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)


def test_every_defect_on_the_list_is_held_by_a_test_that_exists() -> None:
    page = (REPOSITORY / "docs" / "testing.md").read_text("utf-8")
    listed = page.partition("## Defects of earlier versions")[2]
    named = re.findall(r"`(test_\w+)`", listed)
    sources = "".join(p.read_text("utf-8") for p in (REPOSITORY / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in sources] == []
