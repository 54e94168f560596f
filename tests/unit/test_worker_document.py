"""docs/worker.md says what the code does."""

import re
from pathlib import Path

from casparian_worker.metrics import COUNTERS, JOBS_HELD
from casparian_worker.process import CREDIT
from casparian_worker.worker_events import WorkerConfig
from casparian_worker.worker_state import FINISHED_MAX, SPECS_MAX, Phase

TEXT = (Path(__file__).parents[2] / "docs" / "worker.md").read_text()


def rows_of(heading: str) -> dict[str, str]:
    section = TEXT.split(f"## {heading}")[1].split("\n## ")[0]
    cells = re.findall(r"^\| `?([^|`]+)`? \| ([^|]+) \|", section, re.MULTILINE)
    return {name.strip(): text.strip() for name, text in cells if name.strip() not in ("Name",)}


def test_every_metric_is_documented_with_its_meaning() -> None:
    assert rows_of("Metrics") == dict(COUNTERS)
    assert JOBS_HELD in TEXT


def test_every_phase_is_in_the_table() -> None:
    assert [name for name in rows_of("An attempt's life") if name != "Phase"] == list(Phase)


def test_the_bounds_are_the_codes() -> None:
    bounds = rows_of("Bounds")
    assert f"{CREDIT:,}" in bounds["attempts accepted"]
    held = WorkerConfig("w", "n", credit=CREDIT).held_max
    assert held == 4 * CREDIT + 1024
    assert str(SPECS_MAX) in bounds["plugin specs"]
    assert f"{FINISHED_MAX:,}" in bounds["finished jobs remembered against repeated DISPATCH"]
