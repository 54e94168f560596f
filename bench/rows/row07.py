"""Row 7: a first scan that reads every byte, beside sha256sum on two processes."""

import os
import subprocess
from pathlib import Path

from bench import ledgers, trees
from bench.harness import (
    Contestant,
    Figure,
    Plan,
    Stopwatch,
    Values,
    alternate,
    at_most,
    check,
    figure,
)
from bench.workspace import fresh, workspace
from casparian_flow.sentinel.local import LocalControl
from casparian_flow.services.scout import scan

FILES, QUICK_FILES = 5_000, 100
FILE_BYTES = 1 << 20
THREADS = 2
OURS, PEER = "first scan", "find | xargs -P2 sha256sum"
PIPE = 'find "$0" -type f -print0 | xargs -0 -P2 -n100 sha256sum'
"""-n100 spreads the files evenly over both processes; without it xargs makes few, uneven runs."""


def measure(plan: Plan) -> list[Figure]:
    files = plan.size(FILES, QUICK_FILES)
    with workspace("row07") as folder:
        root = folder / "tree"
        _make_files(root, files)
        trees.age()
        template = ledgers.wire(folder / "template.duckdb", root)
        contestants = [
            Contestant(OURS, lambda: _scan(folder, template, files)),
            Contestant(PEER, lambda: _sha256sum(root, files)),
        ]
        results = alternate(contestants, plan)
    return [
        figure(
            results, "s", "s", row="7", work=f"scan with hashing, {files:,} files of 1 MiB, warm",
            ours=OURS, peer=PEER, goal=at_most(1.2),
            notes=[f"two threads and two processes; {files:,} versions are committed by ours"],
        )
    ]  # fmt: skip


def _make_files(root: Path, files: int) -> None:
    for number in range(files):
        place = root / f"folder{number % 50:02}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file{number:05}.bin").write_bytes(os.urandom(FILE_BYTES))


def _scan(folder: Path, template: ledgers.Wiring, files: int) -> Values:
    with fresh(folder) as inner:
        database = ledgers.copy(template.database, inner / "ledger.duckdb")
        with LocalControl.open(database) as control, Stopwatch() as watch:
            report = scan(template.root_id, control, threads=THREADS)
    check(report.versions == files, f"every file has a version: {report}")
    return {"s": watch.seconds}


def _sha256sum(root: Path, files: int) -> Values:
    with Stopwatch() as watch:
        done = subprocess.run(["sh", "-c", PIPE, str(root)], capture_output=True, check=True)
    check(len(done.stdout.splitlines()) == files, "sha256sum read every file")
    return {"s": watch.seconds}
