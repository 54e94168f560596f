"""Row 3: the same no-op jobs beside the bare mechanism, which shows what our rules cost."""

from pathlib import Path

from bench import noops
from bench.harness import Contestant, Figure, Plan, Values, alternate, at_least, figure
from bench.peers import bare_mechanism
from bench.workspace import fresh, workspace

NOTE = "the peer: as many messages, journal rows and jobs outstanding; no lease, check or retry"


def measure(plan: Plan) -> list[Figure]:
    jobs = plan.size(noops.JOBS, noops.QUICK_JOBS)
    with workspace("row03") as folder:
        contestants = [
            noops.wire_contestant(folder, jobs),
            Contestant(bare_mechanism.NAME, lambda: _bare(folder, jobs)),
        ]
        results = alternate(contestants, plan)
    return [
        figure(
            results, "jobs/s", "jobs/s", row="3", work=f"{jobs:,} no-op jobs, {noops.WIRE}",
            ours=noops.WIRE, peer=bare_mechanism.NAME, goal=at_least(0.6), notes=[NOTE],
        )
    ]  # fmt: skip


def _bare(folder: Path, jobs: int) -> Values:
    with fresh(folder) as inner:
        return bare_mechanism.run(inner / "journal.duckdb", jobs, inner / "log")
