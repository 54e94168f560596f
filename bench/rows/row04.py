"""Row 4: one job on an idle system, from submit to its result."""

import time
from pathlib import Path

from bench import ledgers, noops
from bench.flow import Flow, WorkerKind
from bench.harness import Contestant, Figure, Plan, Values, alternate, at_most, check, figure
from bench.peers import dask_peer
from bench.workspace import fresh, workspace
from casparian_flow.sentinel.api import AWAIT_MAX_S

JOBS, QUICK_JOBS = 300, 30
GOALS = (("p50 ms", 0.5), ("p99 ms", 0.7))
NOTE = "ours over the control socket: submit, wait for the durable end, read the job's row"


def measure(plan: Plan) -> list[Figure]:
    jobs = plan.size(JOBS, QUICK_JOBS)
    with workspace("row04") as folder, dask_peer.Cluster(folder) as cluster:
        root = folder / "files"
        root.mkdir()
        for number in range(jobs + noops.WARM_JOBS):
            (root / f"file{number:06}.txt").write_text(f"file {number}\n")
        template = ledgers.scanned(folder / "template.duckdb", root)
        contestants = [
            Contestant(noops.WIRE, lambda: _ours(folder, template, jobs, "noop")),
            Contestant(noops.SANDBOX, lambda: _ours(folder, template, jobs, "plugin")),
            Contestant(dask_peer.NAME, lambda: _percentiles(cluster.latencies_ms(jobs))),
        ]
        results = alternate(contestants, plan)
    return [
        figure(
            results, metric, "ms", row=row, work=f"one job when idle, {ours}, {metric[:3]}",
            ours=ours, peer=dask_peer.NAME, goal=at_most(factor), notes=[NOTE],
        )
        for row, ours in (("4a", noops.WIRE), ("4b", noops.SANDBOX))
        for metric, factor in GOALS
    ]  # fmt: skip


def _ours(folder: Path, template: Path, jobs: int, kind: WorkerKind) -> Values:
    with fresh(folder) as inner:
        database = ledgers.copy(template, inner / "ledger.duckdb")
        with Flow(database, inner).start(noops.WORKERS, kind) as flow:
            taken = [_one_job(flow, number) for number in range(1, jobs + noops.WARM_JOBS + 1)]
    return _percentiles(taken[noops.WARM_JOBS :])


def _one_job(flow: Flow, number: int) -> float:
    """Milliseconds of the job for the `number`th file."""
    began = time.perf_counter()
    job_id = flow.control.submit(
        version_id=number, plugin=ledgers.PLUGIN, priority=None, force=False
    )
    flow.control.await_job(job_id, timeout_s=AWAIT_MAX_S)
    row = flow.control.show_job(job_id)
    taken = (time.perf_counter() - began) * 1e3
    check(row["status"] == "COMPLETED", f"job {job_id} is {row['status']}")
    time.sleep(0.005)  # lets the ledger come to rest: the next job shall meet an idle system
    return taken


def _percentiles(values: list[float]) -> Values:
    ordered = sorted(values)
    return {
        "p50 ms": ordered[len(ordered) // 2],
        "p99 ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }
