"""kill -9 between any two steps of staging and publishing, then what recovery does.

The driver (tests/sink_driver.py) is a real process per kill point. Whatever the point, the target
afterwards holds the rows exactly once, and nothing is left in the staging place.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent.parent / "sink_driver.py"
FIRST = [[1, n] for n in range(5)]
SECOND = [[2, n] for n in range(5)]


@pytest.mark.parametrize(
    ("uri", "mode", "step"),
    [
        ("parquet://out", "append", 1),
        ("parquet://out", "replace", 3),
        ("parquet://out", "error", 5),
        ("csv://out", "append", 7),
        ("sqlite://db.sqlite3", "append", 2),
        ("sqlite://db.sqlite3", "replace", 3),
        ("duckdb://db.duckdb", "append", 5),
        ("duckdb://db.duckdb", "replace", 6),
    ],
)
def test_rows_appear_exactly_once_wherever_a_worker_is_killed(
    uri: str, mode: str, step: int
) -> None:
    command = [sys.executable, str(DRIVER), uri, mode, str(step)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    trials = [json.loads(line) for line in run.stdout.splitlines()]
    expected = FIRST + SECOND if mode == "append" else SECOND
    wrong = [
        t
        for t in trials
        if t.get("rows") != expected or t.get("stages") != [] or t.get("strays") != []
    ]
    assert not wrong, run.stderr[-2000:]
    # Staging alone takes more steps than this; fewer mean that the driver counts nothing.
    assert len(trials) > 12 / step
