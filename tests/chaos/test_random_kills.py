"""Real processes, killed and stopped at random moments and at every step of the commit protocol.

`CASPARIAN_CHAOS_FAULTS` sets how many faults (`make soak` takes more), `CASPARIAN_CHAOS_SEED`
repeats the draw of a run; the moments themselves are the machine's. A seed draws which process is
killed, stopped beyond its lease or started to die at which point, and how files change meanwhile.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from chaos.faults import SERVES, Faults
from chaos.judge import Remains, attempts
from chaos.points import POINTS
from chaos.processes import Zygote, zygote
from chaos.world import CHANCE, EXACT, World, make_world, publish, wait_until

FAULTS = int(os.environ.get("CASPARIAN_CHAOS_FAULTS", "100"))
SECONDS_PER_FAULT = 6.0
"""On a machine that is busy with other things."""
CALM_S = 120.0


def seed_of_run() -> int:
    given = os.environ.get("CASPARIAN_CHAOS_SEED")
    seed = int(given) if given else random.SystemRandom().getrandbits(32)
    print(f"CASPARIAN_CHAOS_SEED={seed}")
    return seed


@pytest.mark.timeout(86_400)
def test_outputs_equal_a_clean_run_whatever_is_killed_or_stopped_and_when(tmp_path: Path) -> None:
    seed = seed_of_run()
    with zygote() as nursery:
        began = time.monotonic()
        world = make_world(tmp_path / "chaos", nursery, seed)
        publish(world, "exact", EXACT.format(pause=0.01))
        publish(world, "chance", CHANCE.format(pause=0.01))
        faults = Faults(world)
        faults.run(FAULTS, 60 + FAULTS * SECONDS_PER_FAULT)
        middle = time.monotonic()
        come_to_rest(world, faults)
        remains = Remains(world.folder)
        print(f"faults: {dict(sorted(faults.done.items()))}")
        print(f"jobs by attempts: {dict(sorted(attempts(remains.jobs).items()))}")
        print(f"jobs: {len(remains.jobs)}, Sentinel's epochs: {remains.epochs}")
        calm = time.monotonic()
        judge(world, remains)
        clean = clean_run(tmp_path / "clean", nursery, seed, world, remains)
        print(
            f"faults {middle - began:.0f} s, coming to rest {calm - middle:.0f} s, "
            f"clean run {time.monotonic() - calm:.0f} s"
        )
        assert faults.strange == []
        assert faults.count >= FAULTS
        assert all(faults.done[f"point {point.name}"] for point in POINTS)
        for folder in ("files", "newest_files"):
            assert remains.parquet_rows(folder) == clean.parquet_rows(folder)
        for table in ("rows", "newest_rows"):
            assert remains.sqlite_rows("exact.sqlite3", table) == clean.sqlite_rows(
                "exact.sqlite3", table
            )


def come_to_rest(world: World, faults: Faults) -> None:
    """Without faults all work ends, a new worker clears up, and everything stops when asked."""

    def settled() -> bool:
        faults.keep_alive()
        return world.settled()

    wait_until(world, "all work to be done", settled, CALM_S)
    sweeper = world.start("worker")
    serves = SERVES["worker"]
    wait_until(world, "a new worker to serve", lambda: serves in sweeper.text, CALM_S)
    wait_until(world, "stages to be cleared away", lambda: not world.stages(), CALM_S)
    services = [place.service for place in faults.places if place.service is not None]
    by_role = sorted([*services, sweeper], key=lambda s: s.role == "sentinel")
    for service in by_role:
        service.signal(signal.SIGTERM)
        status = world.zygote.wait(service, CALM_S)
        assert status == 0, f"{service.log.name} ended with {status}\n{world.story()}"
    wait_until(world, "every process to be gone", lambda: not world.zygote.family(), 10)


def judge(world: World, remains: Remains) -> None:
    assert world.flow.json("ledger", "check") == {"sound": True, "broken": []}
    wrong = remains.ledger_faults(world.contents)
    wrong += remains.sink_faults(replaced={"newest_files", "newest_rows"})
    files, rows = remains.draws()
    wrong += [f"{job}: outputs of two attempts" for job in files if files[job] != rows.get(job)]
    wrong += [
        f"{job}: rows of {len(draws)} attempts" for job, draws in files.items() if len(draws) > 1
    ]
    assert not wrong, "\n".join(wrong[:50])


def clean_run(folder: Path, nursery: Zygote, seed: int, world: World, remains: Remains) -> Remains:
    """The same versions of the same files, one after the other, with nothing in the way."""
    clean = make_world(folder, nursery, seed)
    publish(clean, "exact", EXACT.format(pause=0))
    services = [clean.start("sentinel"), clean.start("worker"), clean.start("worker")]
    versions = remains.completed("exact")
    wait_until(clean, "the Sentinel to answer", lambda: clean.counts() is not None, CALM_S)
    for turn in range(max(map(len, versions.values()))):
        for path, hashes in versions.items():
            if turn < len(hashes):
                clean.write(path, world.contents[hashes[turn]])
        clean.flow.json("scan")
        wait_until(clean, f"version {turn + 1} of every file to be done", clean.settled, CALM_S)
    for service in reversed(services):
        service.signal(signal.SIGTERM)
        assert nursery.wait(service, CALM_S) == 0
    found = Remains(clean.folder)
    assert found.completed("exact") == versions
    return found
