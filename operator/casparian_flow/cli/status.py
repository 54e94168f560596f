"""`casparian status` and `casparian workers`."""

from typing import Any

import click

from casparian_flow.cli.context import App, output_option, pass_app
from casparian_flow.cli.output import (
    Column,
    one_line,
    short_time,
    show_pairs,
    show_rows,
    show_table,
    to_json,
)
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.wiring import PluginStatus
from casparian_flow.sentinel.api import Row


def _items(value: Any) -> str:
    return str(value) if isinstance(value, int | str) else str(len(value))


WORKER_COLUMNS = (
    Column("worker_id", "WORKER"),
    Column("hostname", "HOST"),
    Column("pid", "PID", right=True),
    Column("status", "STATUS"),
    Column("slots", "SLOTS", right=True),
    Column("held", "HOLDS", _items, right=True),
    Column("last_heartbeat", "LAST HEARTBEAT", short_time),
    Column("root_id", "OUTPUT ROOT"),
)


@click.command()
@output_option
@pass_app
def workers(app: App) -> None:
    """List the connected workers."""
    show_rows(
        app,
        app.control.list_workers(),
        WORKER_COLUMNS,
        empty="no worker is connected: 'casparian start' runs one, or 'casparian worker'",
    )


@click.command()
@output_option
@pass_app
def status(app: App) -> None:
    """Tell how things stand, and why if nothing happens."""
    found = app.control.status()
    if app.json:
        click.echo(to_json(found))
        return
    show_pairs(
        [
            ("sentinel", _told(found.get("sentinel"), "not running")),
            ("ledger", _told(found.get("ledger"), "")),
            ("sources", _sources(found.get("sources") or [])),
            ("plugins", _plugins(found.get("plugins") or [])),
            ("workers", _workers(found.get("workers") or [])),
            ("jobs", jobs_line(found.get("jobs") or {}) or "none yet"),
            ("API jobs", _api_jobs(found.get("api_jobs") or {})),
            ("requests", _requests(found.get("requests") or 0)),
        ]
    )
    _sandbox(found.get("workers") or [])
    causes = found.get("causes") or []
    for cause in causes:
        click.echo(f"\n{one_line(str(cause['cause']))}\n  -> {one_line(str(cause['cure']))}")


def jobs_line(counts: dict[str, int]) -> str:
    """Counts by status, in the order of a job's life: `3 queued, 1 running`."""
    return ", ".join(
        f"{counts[s.value]} {s.value.lower()}" for s in JobStatus if counts.get(s.value)
    )


def _api_jobs(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {status}" for status, n in counts.items())


def _requests(count: int) -> str:
    return f"{count} for a person to decide: casparian mcp list" if count else ""


def _told(part: Any, nothing: str) -> str:
    if not part:
        return nothing
    if isinstance(part, dict):
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in part.items())
    return str(part)


def _sources(rows: list[Row]) -> str:
    return ", ".join(str(row.get("path")) for row in rows) or "none"


def _plugins(rows: list[Row]) -> str:
    """The versions that get jobs, and those that are to be tried."""
    told = []
    for row in rows:
        notes = ["staging"] if row.get("status") == PluginStatus.STAGING else []
        notes += ["paused"] if row.get("paused") else []
        if row.get("status") in (PluginStatus.ACTIVE, PluginStatus.STAGING):
            name = f"{row.get('plugin_name')} {row.get('version', '')}".rstrip()
            told.append(f"{name} ({', '.join(notes)})" if notes else name)
    return ", ".join(told) or "none"


def _workers(rows: list[Row]) -> str:
    return ", ".join(f"{row.get('worker_id')} ({row.get('status')})" for row in rows) or "none"


def _sandbox(rows: list[Row]) -> None:
    """What could not be applied around plugins, by worker."""
    gaps = [
        (str(row.get("worker_id")), measure, state)
        for row in rows
        for measure, state in (row.get("sandbox") or {}).items()
        if not state.startswith("applied")
    ]
    if gaps:
        click.echo("\nsandbox measures that do not apply")
        show_table(["WORKER", "MEASURE", "WHY NOT"], [[one_line(t) for t in gap] for gap in gaps])
