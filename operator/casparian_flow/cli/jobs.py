"""Jobs and dead letters."""

import threading
from typing import Any

import click

from casparian_flow.cli.context import App, CommandGroup, limit_option, output_option, pass_app
from casparian_flow.cli.output import (
    Column,
    last_line,
    many_lines,
    note,
    short_time,
    show_data,
    show_pairs,
    show_rows,
    show_table,
    to_json,
)
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import CasparianError, ConflictError, UsageError
from casparian_flow.domain.failures import RULES, Reason
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.sentinel.api import Row

JOB_COLUMNS = (
    Column("id", "ID", right=True),
    Column("status", "STATUS"),
    Column("plugin_name", "PLUGIN"),
    Column("rel_path", "FILE"),
    Column("file_version_id", "VERSION ID", right=True),
    Column("attempt", "ATTEMPT", right=True),
    Column("reason", "REASON"),
    Column("error_message", "MESSAGE", lambda v: last_line(v)[:100]),
)
DEAD_COLUMNS = (
    Column("job_id", "JOB", right=True),
    Column("plugin_name", "PLUGIN"),
    Column("rel_path", "FILE"),
    Column("reason", "REASON"),
    Column("error_message", "MESSAGE", lambda v: last_line(v)[:100]),
    Column("created_at", "SINCE", short_time),
)
OUTPUT_COLUMNS = (
    Column("topic", "TOPIC"),
    Column("kind", "KIND"),
    Column("state", "STATE"),
    Column("rows", "ROWS", right=True),
    Column("uri", "SINK"),
    Column("final", "WHERE"),
)

WAIT_PAUSE_S = 0.05
"""Between questions about a job of a queue too long to be in the Sentinel's memory."""

job_argument = click.argument("job_id", type=click.IntRange(1))


@click.command()
@click.option(
    "--status",
    type=click.Choice([s.value for s in JobStatus], case_sensitive=False),
    help="Only jobs in this status.",
)
@click.option("--plugin", metavar="NAME", help="Only jobs of this plugin.")
@click.option("--path", metavar="GLOB", help="Only jobs for files that match.")
@click.option("--offset", type=click.IntRange(0), default=0, metavar="N", help="Skip the first N.")
@limit_option()
@output_option
@pass_app
def jobs(
    app: App, status: str | None, plugin: str | None, path: str | None, offset: int, limit: int
) -> None:
    """List jobs, newest first.

    \b
    Examples:
      casparian jobs --status FAILED
      casparian jobs --plugin sales -o json
    """
    show_rows(
        app,
        app.control.list_jobs(status=status, plugin=plugin, path=path, limit=limit, offset=offset),
        JOB_COLUMNS,
        empty="no such job; 'casparian status' tells why nothing happens",
    )


@click.group(cls=CommandGroup)
def job() -> None:
    """Look at one job, or decide about it."""


@job.command("show")
@job_argument
@output_option
@pass_app
def job_show(app: App, job_id: int) -> None:
    """Show a job with its file, its outputs and everything that happened to it."""
    row = app.control.show_job(job_id)
    if app.json:
        click.echo(to_json(row))
        return
    show_pairs(_facts(row))
    outputs = row.get("outputs") or []
    if outputs:
        click.echo("\noutputs")
        cells = [[column.text(o) for column in OUTPUT_COLUMNS] for o in outputs]
        show_table([c.heading for c in OUTPUT_COLUMNS], cells, OUTPUT_COLUMNS)
    history = row.get("history") or []
    if history:
        click.echo("\nhistory")
        for entry in history:
            click.echo("  " + many_lines(_history_line(entry)))


def _facts(row: Row) -> list[tuple[str, str]]:
    facts = [
        (key.replace("_", " "), str(value))
        for key, value in row.items()
        if not isinstance(value, list | dict) and value not in {None, ""}
    ]
    reason = row.get("reason")
    if reason and reason in set(Reason):
        facts.append(("meaning", RULES[Reason(reason)].meaning))
    return facts


def _history_line(entry: Row | str) -> str:
    if isinstance(entry, str):
        return entry
    data = entry.get("data")
    told = f"  {_told(data)}" if data else ""
    at = short_time(entry.get("at") or "")
    return f"{at}  {entry.get('kind', ''):<10} attempt {entry.get('attempt', '')}{told}"


def _told(data: Any) -> str:
    """`token=…, metrics: rows=3` without the braces and quotes of a program."""
    if not isinstance(data, dict):
        return str(data)
    return ", ".join(
        f"{key}: {_told(value)}" if isinstance(value, dict) else f"{key}={value}"
        for key, value in data.items()
    )


@job.command("submit")
@click.argument("version_id", type=click.IntRange(1), metavar="VERSION")
@click.argument("plugin", metavar="PLUGIN")
@click.option("--priority", type=int, help="Higher goes first; default: as the last job for it.")
@click.option("--force", is_flag=True, help="Also if this plugin version has done it already.")
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=0.0,
    metavar="SECONDS",
    help="Wait for its end, so long; exit code 0 if it completed.",
)
@output_option
@pass_app
def job_submit(
    app: App, version_id: int, plugin: str, priority: int | None, force: bool, wait: float
) -> None:
    """Queue one file version (see 'casparian versions PATH') for a plugin.

    \b
    Examples:
      casparian job submit 17 sales
      casparian job submit 17 sales --force --wait 60
    """
    new = app.control.submit(version_id=version_id, plugin=plugin, priority=priority, force=force)
    if wait:
        _end_of(app, new, wait)
    else:
        show_data(app, {"job_id": new}, f"job {new} is queued")


@job.command("wait")
@job_argument
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up after this long.",
)
@output_option
@pass_app
def job_wait(app: App, job_id: int, timeout: float) -> None:
    """Wait until a job ends; exit code 0 if it completed or had nothing to do, 1 if not."""
    _end_of(app, job_id, timeout)


def _end_of(app: App, job_id: int, timeout_s: float) -> None:
    """Wait for a job's end and show it.

    Raises:
        CasparianError: it failed, or has not ended in time.
    """
    clock = SystemClock()
    until = clock.now().mono + timeout_s
    while True:
        left = until - clock.now().mono
        answer = app.control.await_job(job_id, timeout_s=max(left, 0.0))
        if answer["outcome"] == "ended":
            break
        if left <= 0:
            raise CasparianError(
                f"job {job_id} is still {answer['status']} after {timeout_s:g} seconds",
                hint="It goes on. 'casparian status' tells why nothing happens, if nothing does.",
            )
        threading.Event().wait(WAIT_PAUSE_S)
    status = JobStatus(answer["status"])
    show_data(app, {"job_id": job_id, "status": status.value}, f"job {job_id}: {status.value}")
    if status not in {JobStatus.COMPLETED, JobStatus.SKIPPED}:
        raise CasparianError(
            f"job {job_id} is {status.value}", hint=f"'casparian job show {job_id}' tells why."
        )


@job.command("logs")
@job_argument
@output_option
@pass_app
def job_logs(app: App, job_id: int) -> None:
    """Print what the plugin printed, attempt by attempt."""
    rows = app.control.job_log(job_id)
    if app.json:
        click.echo(to_json(rows))
        return
    for row in rows:
        if len(rows) > 1:
            click.echo(f"--- attempt {row['attempt']}")
        click.echo(many_lines(str(row["log"])).rstrip("\n"))
    if not rows:
        note(f"the plugin printed nothing in job {job_id}")


@job.command("retry")
@job_argument
@output_option
@pass_app
def job_retry(app: App, job_id: int) -> None:
    """Queue the same file version for the same plugin again, as a new job."""
    new = app.control.retry_job(job_id)
    show_data(app, {"job_id": new, "retry_of": job_id}, f"job {new} retries job {job_id}")


@job.command("cancel")
@job_argument
@output_option
@pass_app
def job_cancel(app: App, job_id: int) -> None:
    """Cancel a job, stopping its plugin if it runs.

    The answer is either "cancelled" (no output of it will ever appear) or "too late,
    committing" (its output will appear; exit code 5).
    """
    result = app.control.cancel_job(job_id)
    outcome, status = str(result.get("outcome")), str(result.get("status"))
    if outcome == "too_late":
        if app.json:
            click.echo(to_json(result))
        raise ConflictError(
            f"job {job_id}: too late, committing", hint="Its output will appear; nothing to do."
        )
    told = "cancelled" if outcome == "cancelled" else f"it has ended already ({status})"
    show_data(app, result, f"job {job_id}: {told}")


@job.command("resolve")
@job_argument
@click.option("--forward", is_flag=True, help="Publish its outputs again.")
@click.option("--abandon", is_flag=True, help="Give its outputs up.")
@output_option
@pass_app
def job_resolve(app: App, job_id: int, forward: bool, abandon: bool) -> None:
    """Decide about a STAGED job that cannot complete, because its sink refuses it for good."""
    if forward == abandon:
        raise UsageError("say what to do", hint="Give either --forward or --abandon.")
    result = app.control.resolve_job(job_id, forward=forward)
    told = "publishing again" if forward else "given up"
    show_data(app, result, f"job {job_id}: {told}")


@click.command("dead-letters")
@click.option("--plugin", metavar="NAME", help="Only those of this plugin.")
@limit_option()
@output_option
@pass_app
def dead_letters(app: App, plugin: str | None, limit: int) -> None:
    """List jobs that failed for good.

    Their error was permanent, or no retries were left.
    """
    show_rows(
        app,
        app.control.list_dead_letters(plugin=plugin, limit=limit),
        DEAD_COLUMNS,
        empty="no dead letters",
    )


@click.command()
@click.argument("job_ids", nargs=-1, type=click.IntRange(1), metavar="[JOB_ID]...")
@click.option("--plugin", metavar="NAME", help="All dead letters of this plugin.")
@click.option("--all", "everything", is_flag=True, help="All dead letters.")
@output_option
@pass_app
def replay(app: App, job_ids: tuple[int, ...], plugin: str | None, everything: bool) -> None:
    """Queue dead letters again, each as a new job.

    \b
    Examples:
      casparian replay 17 21
      casparian replay --plugin sales
    """
    if sum((bool(job_ids), plugin is not None, everything)) != 1:
        raise UsageError("say which dead letters", hint="Give job ids, or --plugin NAME, or --all.")
    new = app.control.replay(plugin=plugin, job_ids=job_ids)
    told = "nothing to replay" if not new else "queued as job " + ", ".join(map(str, new))
    show_data(app, {"jobs": new}, told)
