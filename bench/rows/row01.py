"""Row 1: no-op jobs on a durable ledger, beside dask.distributed in memory."""

from bench import noops
from bench.harness import Contestant, Figure, Plan, alternate, at_least, figure
from bench.peers import dask_peer
from bench.workspace import workspace

NOTES = (
    "ours: fenced leases, every job durable; the peer keeps everything in memory",
    "each side: client, scheduler or Sentinel, two workers; (b) adds a plugin process a worker",
)


def measure(plan: Plan) -> list[Figure]:
    jobs = plan.size(noops.JOBS, noops.QUICK_JOBS)
    with workspace("row01") as folder, dask_peer.Cluster(folder) as cluster:
        contestants = [
            noops.wire_contestant(folder, jobs),
            noops.sandbox_contestant(folder, jobs),
            Contestant(dask_peer.NAME, lambda: cluster.map_noops(jobs)),
        ]
        results = alternate(contestants, plan)
    return [
        figure(
            results, "jobs/s", "jobs/s", row=row, work=f"{jobs:,} no-op jobs, {ours}", ours=ours,
            peer=dask_peer.NAME, goal=at_least(factor), notes=NOTES,
        )
        for row, ours, factor in (("1a", noops.WIRE, 10), ("1b", noops.SANDBOX, 4))
    ]  # fmt: skip
