"""Row 6: Scout over many unchanged files, and the walk alone."""

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
from bench.workspace import workspace
from casparian_flow.sentinel.control import ControlClient
from casparian_flow.sentinel.local import LocalControl
from casparian_flow.services.ignore import compile_rules
from casparian_flow.services.scout import scan
from casparian_flow.services.walk import WalkNotes, walk

FILES, QUICK_FILES = 200_000, 5_000
FOLDERS, QUICK_FOLDERS = 2_000, 50
RESCAN, WALK = "unchanged rescan", "walk"
BARE, FIND = "os.scandir + stat loop", "find -printf"


def measure(plan: Plan) -> list[Figure]:
    files = plan.size(FILES, QUICK_FILES)
    with workspace("row06") as folder:
        root = folder / "tree"
        trees.make(root, files, plan.size(FOLDERS, QUICK_FOLDERS))
        trees.age()
        wiring = ledgers.wire(folder / "ledger.duckdb", root, ignore=trees.IGNORED)
        with LocalControl.open(wiring.database) as control:
            check(scan(wiring.root_id, control).versions == files, "the first scan saw all files")
            contestants = [
                Contestant(RESCAN, lambda: _rescan(control, wiring.root_id, files)),
                Contestant(BARE, lambda: _bare_loop(root, files)),
                Contestant(WALK, lambda: _walk(root, files)),
                Contestant(FIND, lambda: _find(root)),
            ]
            results = alternate(contestants, plan)
    return [
        figure(
            results, "s", "s", row="6a", work=f"rescan of {files:,} unchanged files, ignore rules",
            ours=RESCAN, peer=BARE, goal=at_most(1.5),
            notes=["with reading the inventory, comparing, and committing the scan's report"],
        ),
        figure(
            results, "s", "s", row="6b", work=f"walk alone, {files:,} files",
            ours=WALK, peer=FIND, goal=at_most(1.6), notes=["find's output goes to /dev/null"],
        ),
    ]  # fmt: skip


def _rescan(control: ControlClient, root_id: int, files: int) -> Values:
    with Stopwatch() as watch:
        report = scan(root_id, control)
    check((report.unchanged, report.versions) == (files, 0), f"nothing has changed: {report}")
    return {"s": watch.seconds}


def _walk(root: Path, files: int) -> Values:
    with Stopwatch() as watch:
        rules = compile_rules(trees.IGNORED, ())
        found = sum(len(listing.names) for listing in walk(str(root), rules, WalkNotes()))
    check(found == files, f"the walk found {found} files")
    return {"s": watch.seconds}


def _bare_loop(root: Path, files: int) -> Values:
    with Stopwatch() as watch:
        found = _count(str(root))
    check(found >= files, f"the loop found {found} files")
    return {"s": watch.seconds}


def _count(path: str) -> int:
    found = 0
    pending = [path]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    entry.stat(follow_symlinks=False)
                    found += 1
    return found


def _find(root: Path) -> Values:
    with Stopwatch() as watch:
        subprocess.run(
            ["find", str(root), "-printf", "%p %s %T@ %i\n"],
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return {"s": watch.seconds}
