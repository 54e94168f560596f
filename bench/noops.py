"""Many jobs that do nothing, from submit to all COMPLETED: what rows 1 to 3 share."""

from pathlib import Path

from bench import ledgers
from bench.flow import Flow, WorkerKind, only_completed
from bench.harness import Contestant, Stopwatch, Values, check
from bench.workspace import fresh

JOBS = 20_000
QUICK_JOBS = 500
WORKERS = 2
WARM_JOBS = 4
"""Run before the clock starts: plugin processes are warm, connections made."""
WIRE = "wire and ledger"
SANDBOX = "warm sandbox"


def wire_contestant(folder: Path, jobs: int) -> Contestant:
    """Sentinel, ledger and two workers without plugin processes; the files need not exist."""
    wiring = ledgers.wire(_template(folder, "wire"), folder / "none")
    ledgers.add_versions(wiring, jobs + WARM_JOBS)
    return Contestant(WIRE, lambda: run(folder, wiring.database, jobs, "noop"))


def sandbox_contestant(folder: Path, jobs: int) -> Contestant:
    """The same with real workers: each file is copied, hashed and given to the plugin."""
    root = folder / "files"
    for number in range(jobs + WARM_JOBS):
        place = root / f"folder{number % 100:03}"
        if number < 100:
            place.mkdir(parents=True)
        (place / f"file{number:06}.txt").write_text(f"file {number}\n")
    database = ledgers.scanned(_template(folder, "sandbox"), root)
    return Contestant(SANDBOX, lambda: run(folder, database, jobs, "plugin"))


def run(folder: Path, template: Path, jobs: int, kind: WorkerKind) -> Values:
    """One round on a fresh copy of the ledger, with processes of its own."""
    with fresh(folder) as inner:
        database = ledgers.copy(template, inner / "ledger.duckdb")
        with Flow(database, inner).start(WORKERS, kind) as flow:
            for version in range(1, WARM_JOBS + 1):
                flow.control.submit(
                    version_id=version, plugin=ledgers.PLUGIN, priority=None, force=False
                )
            flow.await_jobs(WARM_JOBS)
            with Stopwatch() as watch:
                flow.control.backfill(ledgers.PLUGIN, execute=True)
                flow.await_jobs(jobs + WARM_JOBS)
            check(only_completed(flow.counts(), jobs + WARM_JOBS), f"jobs: {flow.counts()}")
    return {"jobs/s": jobs / watch.seconds}


def _template(folder: Path, name: str) -> Path:
    place = folder / f"template-{name}"
    place.mkdir()
    return place / "ledger.duckdb"
