"""Figures as JSON, and as the table between two marks of docs/benchmarks.md."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine
from bench.harness import Figure, Goal, Plan, Spread
from bench.workspace import base

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "bench" / "results.json"
DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"
HEADER = (
    "| # | Work | Ours | Peer | Peer's | Ratio (lowest–highest) | Goal | |\n"
    "|---|---|---|---|---|---|---|---|"
)


def record(number: int, figures: Sequence[Figure], plan: Plan) -> None:
    """Put a row's figures in the place of its earlier ones, and write the table anew."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[str(number)] = {
        "taken_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": plan.quick,
        "rounds": plan.rounds,
        "load_after": round(machine.load_average(), 2),
        "machine": machine.describe(base()),
        "figures": [asdict(figure) for figure in figures],
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    _write_table(results)


def line(figure: Figure, *, remark: str = "") -> str:
    """A figure as a line of the table."""
    ratio = _told(Spread.of(figure.ratios), "" if figure.peer else figure.unit)
    theirs = _told(Spread.of(figure.theirs), figure.unit) if figure.theirs else "–"
    goal = str(figure.goal) + ("×" if figure.peer else f" {figure.unit}")
    verdict = ("met" if figure.met else "**short**") + remark
    cells = (
        figure.row, figure.work, _told(Spread.of(figure.ours), figure.unit), figure.peer or "–",
        theirs, ratio, goal, verdict,
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _told(spread: Spread, unit: str) -> str:
    mark = unit or "×"
    low, high = _number(spread.low), _number(spread.high)
    return f"{_number(spread.median)} {mark} ({low}–{high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def _write_table(results: dict[str, Any]) -> None:
    lines, notes = [HEADER], []
    for number in sorted(results, key=int):
        entry = results[number]
        for saved in entry["figures"]:
            figure = Figure(**{**saved, "goal": Goal(**saved["goal"])})
            lines.append(line(figure, remark=" (small size)" if entry["quick"] else ""))
            notes += [f"- {figure.row}: {note}" for note in figure.notes]
        notes.append(
            f"- row {number} was taken at {entry['taken_at']}, {entry['rounds']} rounds, "
            f"load average after it {entry['load_after']}"
        )
    newest = max(results.values(), key=lambda entry: str(entry["taken_at"]))
    facts = [f"- {name}: {fact}" for name, fact in newest["machine"].items()]
    parts = [*lines, "", *dict.fromkeys(notes), "", "Machine and versions:", "", *facts]
    write_section("figures", parts)


def write_section(name: str, lines: Sequence[str]) -> None:
    """Replace what stands between the two marks of that name in the document."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = DOCUMENT.read_text().partition(begin)
    _, _, after = rest.partition(end)
    DOCUMENT.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}")
