"""Full and failing disks under a whole running flow: what is said, and that nothing is lost.

`casparian start` runs as a user starts it, with ledger, output and scratch in folders of their
own; the calls that reach the disk below one of them are made to fail by a preloaded library.
"""

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from acceptance_kit import SALES, Flow, make_flow, wait_for
from faulty_disk import Calls, FaultyDisk

from casparian_worker.sinks.base import token_of_stage

ROWS = 20
OUTAGE_S = 1.3
"""Longer than between two probing writes."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(tmp_path)
    yield disk
    disk.close()


@pytest.fixture
def flow(tmp_path: Path, disk: FaultyDisk) -> Flow:
    flow = make_flow(tmp_path / "flow", database="ledger/ledger.duckdb")
    (flow.folder / "ledger").mkdir()
    config = flow.folder / "global_config.toml"
    config.write_text(
        config.read_text()
        .replace("retry_base_seconds = 0.2", "retry_base_seconds = 1.5")
        .replace("[worker]", '[worker]\nscratch = "scratch"')
    )
    flow.publish("sales", SALES)
    flow.run("source", "add", str(flow.inbox))
    flow.environment |= disk.environment
    return flow


def feed(flow: Flow, first: int, count: int) -> None:
    for number in range(first, first + count):
        rows = "\n".join(f"{number},{row}" for row in range(ROWS))
        flow.write(f"inbox/f{number}.csv", f"file,row\n{rows}\n")


def done(flow: Flow, count: int) -> bool:
    return flow.counts().get("COMPLETED", 0) == count


def assert_everything_is_there(flow: Flow, files: int) -> None:
    table = flow.table("sales_data")
    found = sorted(zip(table["file"].to_pylist(), table["row"].to_pylist(), strict=True))
    assert found == [(file, row) for file in range(files) for row in range(ROWS)]
    assert flow.counts() == {"COMPLETED": files}
    assert flow.json("ledger", "check")["sound"]


def causes(flow: Flow) -> str:
    return " ".join(f"{c['cause']} {c['cure']}" for c in flow.json("status")["causes"])


LEDGER_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"error": errno.ENOSPC}, "the disk is full"),
    "full within a write": ({"error": errno.ENOSPC, "budget": 700}, "the disk is full"),
    "I/O error": ({"error": errno.EIO}, "I/O error"),
    "fsync error": ({"error": errno.EIO, "calls": Calls.SYNC}, "whether it reached the disk"),
    "read-only": ({"error": errno.EROFS}, "read-only"),
}


def test_a_ledger_s_disk_that_fails_stops_admission_and_work_goes_on_afterwards(
    flow: Flow, disk: FaultyDisk
) -> None:
    files = 0
    with flow.start() as running:
        for name, (fault, said) in LEDGER_FAULTS.items():
            with disk.failing(flow.folder / "ledger", **fault):
                feed(flow, files, 3)
                files += 3
                text = wait_for(f"{name}: what status says", lambda: _ledger_problem(flow), 30)
                assert said in text, (name, text)
                before = time.monotonic()
                while time.monotonic() - before < OUTAGE_S:
                    assert running.process.poll() is None, running.output
                    time.sleep(0.3)
                assert disk.met() > 0
            wait_for(f"{name}: the work to go on", _completed(flow, files), 45)
            assert "takes no commits" not in causes(flow)
        assert running.finish() == 0
    assert_everything_is_there(flow, files)


def _ledger_problem(flow: Flow) -> str:
    found = causes(flow)
    return found if "ledger" in found and "commit" in found else ""


def _completed(flow: Flow, count: int) -> Callable[[], bool]:
    return lambda: done(flow, count)


OTHER_FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "output full": ("output", {"error": errno.ENOSPC}),
    "output full within a write": ("output", {"error": errno.ENOSPC, "budget": 1000}),
    "output fsync error": ("output", {"error": errno.EIO, "calls": Calls.SYNC}),
    "scratch full": ("scratch", {"error": errno.ENOSPC}),
    "scratch full within a write": ("scratch", {"error": errno.ENOSPC, "budget": 100}),
}


def test_full_output_and_scratch_fail_jobs_by_name_and_lose_none(
    flow: Flow, disk: FaultyDisk
) -> None:
    files = 0
    with flow.start() as running:
        feed(flow, 0, 1)
        wait_for("a first job", _completed(flow, 1))
        files = 1
        for name, (where, fault) in OTHER_FAULTS.items():
            with disk.failing(flow.folder / where, **fault):
                feed(flow, files, 2)
                wait_for(f"{name}: a failed attempt", _retried(flow, files + 1), 30)
                assert disk.met() > 0
                said = flow.json("job", "show", str(files + 1))
                text = str(said)
                assert "disk_full" in text or "I/O" in text or "Input/output" in text, text
            files += 2
            wait_for(f"{name}: the work to go on", _completed(flow, files), 45)
        assert running.finish() == 0
    assert_everything_is_there(flow, files)
    stages = (flow.folder / "output" / ".stage").iterdir()
    assert not [p for p in stages if token_of_stage(p.name)]


def _retried(flow: Flow, job_id: int) -> Callable[[], bool]:
    def check() -> bool:
        rows = [row for row in flow.json("jobs") if row["id"] == job_id]
        return bool(rows) and rows[0].get("retry_count", 0) > 0

    return check
