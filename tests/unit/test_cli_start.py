"""What `casparian start` takes from its Scout."""

import json
import os
from typing import Any

from casparian_flow.cli.start import Run
from casparian_flow.config import Settings
from casparian_flow.domain.clock import SystemClock


class Lines:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def line(self, text: str) -> None:
        self.told.append(text)


def report(path: str) -> bytes:
    row: dict[str, Any] = {"root_id": 1, "path": path, "files": 1, "versions": 1, "problems": []}
    return json.dumps(row).encode() + b"\n"


def test_a_report_cut_short_by_a_killed_scout_is_passed_over() -> None:
    view: Any = Lines()
    run = Run(
        settings=Settings(),
        control=view,
        clock=SystemClock(),
        view=view,
        signals=[],
        environment={},
        workers=1,
    )
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    run._reports = (read_end, write_end)
    try:
        os.write(write_end, report("/a")[:20])
        run._read_reports()
        os.write(write_end, report("/b") + report("/c"))
        run._read_reports()
    finally:
        os.close(read_end)
        os.close(write_end)
    assert [line.split(":")[1].strip() for line in view.told] == ["/c"]
