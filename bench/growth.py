"""How cost grows with the queue and with the number of files, drawn into docs/."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from bench import ledgers, noops, trees
from bench.flow import Flow
from bench.harness import Plan, Stopwatch, check
from bench.report import REPOSITORY, write_section
from bench.workspace import fresh, workspace
from casparian_flow.sentinel.local import LocalControl
from casparian_flow.services.scout import scan

QUEUES = (1_000, 10_000, 100_000, 1_000_000)
TREES = (10_000, 100_000, 1_000_000)
QUICK_QUEUES, QUICK_TREES = (200, 1_000, 5_000), (1_000, 5_000)
FILES_PER_FOLDER = 100
DOCS = REPOSITORY / "docs"
RESULTS = REPOSITORY / "bench" / "growth.json"
Series = list[tuple[int, float]]


def plot_all(plan: Plan) -> None:
    """Measure both and draw them; quick ones are only measured."""
    queue = measure_queue(QUICK_QUEUES if plan.quick else QUEUES)
    first, again = measure_scout(QUICK_TREES if plan.quick else TREES)
    if plan.quick:
        return
    series = {"jobs/s by queued jobs": queue, "first scan s": first, "rescan s": again}
    RESULTS.write_text(json.dumps(series, indent=1) + "\n")
    _draw(
        DOCS / "bench-queue.png", "jobs queued", "jobs a second",
        {"two workers, no plugin process": queue},
    )  # fmt: skip
    _draw(
        DOCS / "bench-scout.png", "files", "seconds",
        {"first scan, every file hashed": first, "rescan, nothing changed": again},
    )  # fmt: skip
    write_section(
        "growth",
        [
            f"![Jobs a second with {QUEUES[0]:,} to {QUEUES[-1]:,} queued jobs](bench-queue.png)",
            "",
            f"![Seconds of scans of {TREES[0]:,} to {TREES[-1]:,} files](bench-scout.png)",
        ],
    )


def measure_queue(sizes: Sequence[int]) -> Series:
    """Jobs a second for whole queues of each size, from the plugin's resume to all COMPLETED."""
    series = []
    with workspace("queue") as folder:
        for size in sizes:
            with fresh(folder) as inner:
                wiring = ledgers.wire(inner / "ledger.duckdb", inner / "none")
                ledgers.add_versions(wiring, size)
                ledgers.add_jobs(wiring, size)
                series.append((size, size / _drain_queue(inner, wiring.database, size)))
                print(f"    {size:,} queued: {series[-1][1]:,.0f} jobs/s", file=sys.stderr)
    return series


def _drain_queue(folder: Path, database: Path, size: int) -> float:
    with LocalControl.open(database) as control:
        control.pause_plugin(ledgers.PLUGIN, reason="until the workers are there")
    with Flow(database, folder).start(noops.WORKERS, "noop") as flow:
        time.sleep(min(10.0, size / 50_000))  # the rest of the queue is read behind the first page
        with Stopwatch() as watch:
            flow.control.resume_plugin(ledgers.PLUGIN)
            flow.await_jobs(size)
    return watch.seconds


def measure_scout(sizes: Sequence[int]) -> tuple[Series, Series]:
    """Seconds of a first scan and of one that finds nothing changed, by number of files."""
    first: Series = []
    again: Series = []
    with workspace("scout") as folder:
        for size in sizes:
            with fresh(folder) as inner:
                trees.make(inner / "tree", size, size // FILES_PER_FOLDER)
                trees.age()
                wiring = ledgers.wire(inner / "ledger.duckdb", inner / "tree")
                with LocalControl.open(wiring.database) as control:
                    fresh_report = scan(wiring.root_id, control)
                    report = scan(wiring.root_id, control)
                check((fresh_report.versions, report.unchanged) == (report.files,) * 2, "scans")
                first.append((size, fresh_report.seconds))
                again.append((size, report.seconds))
                print(
                    f"    {size:,} files: {first[-1][1]:.2f} s, then {again[-1][1]:.2f} s",
                    file=sys.stderr,
                )
    return first, again


def _draw(path: Path, x_label: str, y_label: str, curves: dict[str, Series]) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for name, series in curves.items():
        axes.plot(*zip(*series, strict=True), marker="o", label=name)
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log")
    if y_label == "seconds":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
