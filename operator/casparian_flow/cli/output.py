"""How answers are shown: tables on a terminal, plain columns in a pipe, JSON on request."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import click

from casparian_flow.cli.context import App
from casparian_flow.sentinel.api import Row


@dataclass(frozen=True)
class Column:
    """One column of a table: the row's key, the heading, and how a value is written."""

    key: str
    heading: str
    show: Callable[[Any], str] | None = None
    right: bool = False

    def text(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None:
            return ""
        return one_line(self.show(value) if self.show else str(value))


def one_line(text: str) -> str:
    """Make text safe to print: control characters, which could steer a terminal, are escaped.

    >>> one_line("a\\x1b[31m\\n")
    'a\\\\x1b[31m\\\\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def many_lines(text: str) -> str:
    """Like `one_line`, but line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def last_line(value: Any) -> str:
    """The last line of a message, which is where exceptions say what happened.

    >>> last_line("Traceback …\\nValueError: no such column\\n")
    'ValueError: no such column'
    """
    lines = str(value or "").strip().splitlines() or [""]
    return lines[-1]


def short_hash(value: Any) -> str:
    return str(value)[:12]


def short_time(value: Any) -> str:
    """Seconds are enough for people; `-o json` has it all."""
    return str(value).replace("T", " ").split(".")[0].removesuffix("+00:00").removesuffix("Z")


def size(value: Any) -> str:
    """Bytes in a unit that keeps the number short.

    >>> size(1536)
    '1.5 KiB'
    """
    number = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def yes_no(value: Any) -> str:
    return "yes" if value else "no"


def to_json(data: Any) -> str:
    return json.dumps(data, default=_plain, ensure_ascii=False, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return str(value)


def note(text: str) -> None:
    """Something worth knowing beside the answer; goes to stderr."""
    click.echo(text, err=True)


def show_data(app: App, data: Any, text: str) -> None:
    """An answer that is one fact: `data` as JSON, or `text` for people."""
    click.echo(to_json(data) if app.json else many_lines(text))


def show_rows(app: App, rows: Sequence[Row], columns: Sequence[Column], *, empty: str) -> None:
    """A list of rows; `empty` tells people what to do when there are none."""
    if app.json:
        click.echo(to_json(list(rows)))
    elif not rows:
        note(empty)
    else:
        show_table(
            [c.heading for c in columns], [[c.text(r) for c in columns] for r in rows], columns
        )


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Name and value, one pair a line."""
    known = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        click.echo(f"{name:<{width}}  {one_line(value)}")


def show_table(
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    columns: Sequence[Column] | None = None,
) -> None:
    """Print a table: framed and coloured on a terminal, aligned and untruncated elsewhere."""
    right = [bool(columns and columns[i].right) for i in range(len(headings))]
    if sys.stdout.isatty():
        _rich_table(headings, cells, right)
        return
    widths = [max(len(h), *(len(r[i]) for r in cells)) for i, h in enumerate(headings)]
    for line in [headings, *cells]:
        aligned = [
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(line, widths, right, strict=True)
        ]
        click.echo("  ".join(aligned).rstrip())


def _rich_table(
    headings: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading, flush in zip(headings, right, strict=True):
        table.add_column(heading, justify="right" if flush else "left", overflow="fold")
    for line in cells:
        table.add_row(*(Text(text, style=STATUS_STYLES.get(text, "")) for text in line))
    Console(no_color="NO_COLOR" in os.environ).print(table)


STATUS_STYLES = {
    "COMPLETED": "green",
    "ACTIVE": "green",
    "RUNNING": "cyan",
    "DISPATCHING": "cyan",
    "STAGED": "magenta",
    "FAILED": "red",
    "ABORTED": "yellow",
    "SKIPPED": "yellow",
}
