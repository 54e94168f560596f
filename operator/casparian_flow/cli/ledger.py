"""`casparian sql` and `casparian ledger`."""

import csv
import io
import sys
from pathlib import Path

import click

from casparian_flow.cli.context import App, CommandGroup, output_option, pass_app
from casparian_flow.cli.output import note, one_line, show_data, show_table, to_json
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import CasparianError, ConflictError

STDIN_CHARS_MAX = 2 << 20
"""More than a query may have, so that one too long is refused and not cut."""


@click.command()
@click.argument("query")
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    metavar="N",
    help="Show at most N rows; 0 shows all.",
)
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    help="Form of the answer.",
)
@pass_app
def sql(app: App, query: str, limit: int, form: str) -> None:
    """Ask the ledger with one SELECT. QUERY '-' is read from standard input.

    The query runs on a consistent copy, read-only and without access to other files. DuckDB's
    SQL is understood; grouping by a table's primary key allows its other columns as well.

    \b
    Examples:
      casparian sql "SELECT status, count(*) FROM cf_processing_queue GROUP BY status"
      casparian sql -o csv - < timeline.sql
    """
    from casparian_flow.db import snapshot as snapshots
    from casparian_flow.db.readonly import select

    text = sys.stdin.read(STDIN_CHARS_MAX) if query == "-" else query
    snapshot = Path(app.control.snapshot())
    try:
        answer = select(snapshot, text, limit=limit)
    finally:
        snapshots.remove(snapshot)
    if form == "json":
        names = answer.columns
        click.echo(to_json([dict(zip(names, row, strict=True)) for row in answer.rows]))
    elif form == "csv":
        text_rows = io.StringIO()
        writer = csv.writer(text_rows, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(answer.rows)
        click.echo(text_rows.getvalue(), nl=False)
    else:
        cells = [["" if v is None else one_line(str(v)) for v in row] for row in answer.rows]
        show_table(answer.columns, cells)
    if answer.more:
        note(f"only the first {limit} rows are shown; --limit 0 shows all")


@click.group(cls=CommandGroup)
def ledger() -> None:
    """Check the ledger, or carry its history elsewhere."""


@ledger.command("check")
@output_option
@pass_app
def ledger_check(app: App) -> None:
    """Check the rules that hold between the ledger's tables. Exit code 1 if one is broken."""
    broken = app.control.check()
    show_data(
        app,
        {"sound": not broken, "broken": broken},
        "\n".join(broken) if broken else "the ledger is sound",
    )
    if broken:
        raise click.exceptions.Exit(CasparianError.exit_code)


@ledger.command("export")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@output_option
@pass_app
def ledger_export(app: App, folder: Path) -> None:
    """Write the whole history to FOLDER, as Parquet files that any version can import."""
    result = app.control.export(str(folder.absolute()))
    tables = result.get("tables") or {}
    rows = sum(tables.values())
    show_data(app, result, f"{rows} rows of {len(tables)} tables are in {folder}")


@ledger.command("backup")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--connect",
    "address",
    metavar="ADDRESS",
    help="The control address of a Sentinel elsewhere, such as tcp://casparian-sentinel:5556.",
)
@click.option(
    "--keep",
    type=click.IntRange(1, 1000),
    default=7,
    show_default=True,
    metavar="N",
    help="Keep the newest N exports in FOLDER.",
)
@output_option
@pass_app
def ledger_backup(app: App, folder: Path, address: str | None, keep: int) -> None:
    """Export the ledger into a new folder below FOLDER, and delete the oldest ones there.

    The Sentinel goes on meanwhile: what is exported is a copy of one moment.

    \b
    Example:
      casparian ledger backup --keep 14 /srv/backups
    """
    from casparian_flow.services.backup import backup

    if address is None:
        made = backup(app.control, folder, keep=keep, clock=SystemClock())
    else:
        from casparian_flow.sentinel.control import remote

        with remote(address, curve_dir=app.settings.wire.curve_dir) as control:
            made = backup(control, folder, keep=keep, clock=SystemClock())
    show_data(app, {"folder": str(made)}, f"the ledger's history is in {made}")


@ledger.command("import")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@output_option
@pass_app
def ledger_import(app: App, folder: Path) -> None:
    """Make a new ledger from what 'ledger export' wrote to FOLDER.

    The ledger named in the configuration must not exist yet, and no Sentinel may run.
    """
    location = app.settings.database.db_location
    if location.exists():
        raise ConflictError(
            f"{location} exists already",
            hint="Move it away, or name another file as [database] db_location.",
        )
    from casparian_flow.db.ledger import Ledger

    ledger_file = Ledger.open(location, clock=SystemClock())
    try:
        tables = ledger_file.import_from(folder)
    finally:
        ledger_file.close()
    show_data(app, {"ledger": str(location), "tables": tables}, f"imported into {location}")


@ledger.command("repair")
@output_option
@pass_app
def ledger_repair(app: App) -> None:
    """Go on with a damaged or outdated ledger, without what is lost of it.

    For a ledger that is refused at the start and of which there is no better copy. The files are
    first copied into a folder beside them. Jobs whose end was lost run again, and what they had
    published already may then be there twice. No Sentinel may run.
    """
    from casparian_flow.db.repair import repair

    location = app.settings.database.db_location
    done = repair(location, SystemClock())
    if done.kept is None:
        text = f"{location} opens as it is; nothing was changed"
    else:
        lost = (
            f"{done.lost} acknowledged commits are lost" if done.lost else "nothing known is lost"
        )
        text = (
            f"{location} can be used again, from {done.used}: {lost}\n"
            f"the files as they were are in {done.kept}\n"
            "now run 'casparian scan', so that what was seen since is seen again"
        )
    show_data(
        app,
        {
            "ledger": str(location),
            "ends_at": done.ends_at,
            "acknowledged": done.acknowledged,
            "lost": done.lost,
            "used": done.used,
            "kept": None if done.kept is None else str(done.kept),
        },
        text,
    )
