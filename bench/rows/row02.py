"""Row 2: the same no-op jobs beside durable queues: huey on SQLite, procrastinate on PostgreSQL."""

import sys
from contextlib import ExitStack

from bench import noops
from bench.harness import Contestant, Figure, Plan, alternate, at_least, figure
from bench.peers import huey_peer, postgres, procrastinate_peer
from bench.workspace import workspace

GOALS = {huey_peer.NAME: at_least(2), procrastinate_peer.NAME: at_least(5)}


def measure(plan: Plan) -> list[Figure]:
    jobs = plan.size(noops.JOBS, noops.QUICK_JOBS)
    notes = {}
    with workspace("row02") as folder, ExitStack() as stack:
        setting = huey_peer.best_setting(folder)
        notes[huey_peer.NAME] = f"huey's consumer: {' '.join(setting)}, fsync on"
        contestants = [
            noops.wire_contestant(folder, jobs),
            Contestant(huey_peer.NAME, lambda: huey_peer.run(folder, jobs, setting)),
        ]
        try:
            connection = stack.enter_context(postgres.server())
        except postgres.UnavailableError as error:
            print(f"    procrastinate is left out: {error}", file=sys.stderr)
        else:
            concurrency = procrastinate_peer.best_concurrency(connection, folder)
            notes[procrastinate_peer.NAME] = f"two workers, concurrency {concurrency}, fsync on"
            workers = stack.enter_context(
                procrastinate_peer.Workers(connection, folder, concurrency)
            )
            contestants.append(Contestant(procrastinate_peer.NAME, lambda: workers.run(jobs)))
        results = alternate(contestants, plan)
    return [
        figure(
            results, "jobs/s", "jobs/s", row="2", work=f"{jobs:,} no-op jobs, {noops.WIRE}",
            ours=noops.WIRE, peer=peer, goal=GOALS[peer], notes=[note],
        )
        for peer, note in notes.items()
    ]  # fmt: skip
