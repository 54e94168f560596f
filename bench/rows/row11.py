"""Row 11: what a Sentinel costs that has nothing to do, and what a queued job costs it."""

import subprocess
import time
from pathlib import Path

import psutil

from bench import ledgers, processes
from bench.flow import Flow
from bench.harness import Figure, Plan, at_most
from bench.workspace import fresh, workspace

QUEUED, QUICK_QUEUED = 500_000, 20_000
IDLE_S, QUICK_IDLE_S = 30, 3
SETTLE_S, QUICK_SETTLE_S = 5.0, 1.0


def measure(plan: Plan) -> list[Figure]:
    queued = plan.size(QUEUED, QUICK_QUEUED)
    resident, per_job, cpu = [], [], []
    with workspace("row11") as folder:
        empty = ledgers.wire(folder / "empty.duckdb", folder / "none")
        full = ledgers.wire(folder / "full.duckdb", folder / "none")
        ledgers.add_versions(full, queued)
        ledgers.add_jobs(full, queued)
        for _ in range(plan.rounds):
            idle_bytes, percent = _idle(folder, empty.database, plan)
            resident.append(idle_bytes / 1e6)
            cpu.append(percent)
            per_job.append((_loaded(folder, full.database, queued, plan) - idle_bytes) / queued)
    return [
        Figure("11a", "memory of an idle Sentinel", "MB", resident, at_most(150)),
        Figure(
            "11b", "memory per queued job", "bytes", per_job, at_most(1_000),
            notes=[f"resident memory with {queued:,} jobs queued less that of an idle Sentinel"],
        ),
        Figure("11c", "processor time of an idle Sentinel", "% of a core", cpu, at_most(1)),
    ]  # fmt: skip


def _idle(folder: Path, template: Path, plan: Plan) -> tuple[int, float]:
    """Resident bytes, and percent of a core, of a Sentinel with one idle worker."""
    with fresh(folder) as inner:
        database = ledgers.copy(template, inner / "ledger.duckdb")
        with Flow(database, inner).start(1, "noop") as flow:
            time.sleep(QUICK_SETTLE_S if plan.quick else SETTLE_S)
            sentinel = _process(flow.sentinel)
            before, began = _seconds(sentinel), time.perf_counter()
            time.sleep(plan.size(IDLE_S, QUICK_IDLE_S))
            used, took = _seconds(sentinel) - before, time.perf_counter() - began
            return _resident(sentinel), 100 * used / took


def _loaded(folder: Path, template: Path, queued: int, plan: Plan) -> int:
    """Resident bytes of a Sentinel that has read its whole queue, with nobody to run it."""
    with fresh(folder) as inner:
        database = ledgers.copy(template, inner / "ledger.duckdb")
        with Flow(database, inner) as flow:
            flow.start_sentinel()
            flow.wait_ready()
            sentinel = _process(flow.sentinel)
            last = -1.0

            def has_come_to_rest() -> bool:
                nonlocal last
                before, last = last, _seconds(sentinel)
                return last - before < 0.05 * (QUICK_SETTLE_S if plan.quick else SETTLE_S)

            processes.wait_for(
                f"{queued:,} jobs to be read", has_come_to_rest, timeout_s=600,
                poll_s=QUICK_SETTLE_S if plan.quick else SETTLE_S,
            )  # fmt: skip
            return _resident(sentinel)


def _process(popen: "subprocess.Popen[bytes] | None") -> psutil.Process:
    assert popen is not None
    return psutil.Process(popen.pid)


def _resident(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
