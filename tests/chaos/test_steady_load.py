"""Sentinel and workers at load for a while: nothing that they hold may grow.

`CASPARIAN_SOAK_SECONDS` sets how long; `make soak` takes ten minutes, where slow leaks show. New
files come in as fast as they are worked off, old ones are deleted, and plugin processes are
replaced all the time. Each second all processes are measured.
"""

import os
import random
import signal
import time
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean

import psutil
import pytest
from chaos.processes import Service, zygote
from chaos.world import EXACT, World, make_world, publish, wait_until

from casparian_flow.cli.idle import active

SECONDS = float(os.environ.get("CASPARIAN_SOAK_SECONDS", "15"))
SAMPLE_S = 1.0
BACKLOG = 300
BATCH = 100
FILES_KEPT = 1_000
CALM_S = 120.0
RECYCLE_AFTER = 200
WARM_UP = 300
"""Jobs before the first measurement: libraries are loaded, threads started, caches filled."""
MIB = 1 << 20
SLACK = {"rss": 24 * MIB, "fds": 4, "threads": 3, "scratch": 64}
"""Growth that is none: caches that fill, connections that come and go."""
GROWTH = 1.08
"""Last quarter against the second one."""


@dataclass(frozen=True)
class Sample:
    rss: int
    fds: int
    threads: int
    scratch: int
    """Files in the worker's scratch folder; 0 for the Sentinel."""


@pytest.mark.timeout(86_400)
def test_what_sentinel_and_workers_hold_stays_flat_at_load(tmp_path: Path) -> None:
    with zygote() as nursery:
        world = make_world(
            tmp_path / "load", nursery, random.SystemRandom().getrandbits(32),
            f"recycle_after = {RECYCLE_AFTER}",
        )  # fmt: skip
        publish(world, "exact", EXACT.format(pause=0))
        services = [world.start(role) for role in ("sentinel", "worker", "worker")]
        wait_until(world, "the Sentinel to answer", lambda: world.counts() is not None, CALM_S)
        services.append(world.start("scout"))
        while completed(world) < WARM_UP:
            feed(world)
            time.sleep(SAMPLE_S)
        before = completed(world)
        watched = [s for s in services if s.role != "scout"]
        samples: list[list[Sample]] = [[] for _ in watched]
        began = time.monotonic()
        while time.monotonic() < began + SECONDS:
            feed(world)
            for service, own in zip(watched, samples, strict=True):
                own.append(measured(service, world))
            time.sleep(SAMPLE_S)
        done = completed(world) - before
        print(f"{done} jobs in {SECONDS:g} s")
        wait_until(world, "the backlog to be worked off", world.rest, CALM_S)
        for service in reversed(services):
            service.signal(signal.SIGTERM)
            assert nursery.wait(service, CALM_S) == 0, world.story()
        assert not list((world.folder / "scratch").rglob("*")), "scratch is left behind"
        assert done > 0
        grown = []
        for service, own in zip(watched, samples, strict=True):
            grown += grown_of(service, own)
        assert not grown, grown


def completed(world: World) -> int:
    return (world.counts() or {}).get("COMPLETED", 0)


def feed(world: World) -> None:
    """Keep a backlog, and the folder small."""
    counts = world.counts()
    if counts is None or active(counts) > BACKLOG:
        return
    for _ in range(BATCH):
        world.new_file()
    known = sorted(world.flow.inbox.glob("*.txt"))
    for path in known[:-FILES_KEPT]:
        path.unlink()


def measured(service: Service, world: World) -> Sample:
    process = psutil.Process(service.pid)
    scratch = 0
    if service.role == "worker":
        scratch = sum(len(files) for _, _, files in os.walk(world.folder / "scratch"))
    with process.oneshot():
        return Sample(process.memory_info().rss, process.num_fds(), process.num_threads(), scratch)


def grown_of(service: Service, samples: list[Sample]) -> list[str]:
    """What of a process has grown from the second quarter of the run to the last."""
    quarter = len(samples) // 4
    found = []
    for field in fields(Sample):
        values = [getattr(sample, field.name) for sample in samples]
        early, late = mean(values[quarter : 2 * quarter]), mean(values[-quarter:])
        unit = MIB if field.name == "rss" else 1
        told = f"{service.role} {service.pid}: {field.name} {early / unit:.1f} -> {late / unit:.1f}"
        print(f"{told} (highest {max(values) / unit:.1f})")
        if late > early * GROWTH + SLACK[field.name]:
            found.append(told)
    return found
