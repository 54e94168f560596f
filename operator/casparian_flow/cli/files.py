"""Sources, scans, files and versions."""

import os
from pathlib import Path

import click

from casparian_flow.cli.context import (
    App,
    CommandGroup,
    absolute_text,
    limit_option,
    output_option,
    pass_app,
    source_named,
)
from casparian_flow.cli.output import (
    Column,
    note,
    one_line,
    short_hash,
    short_time,
    show_data,
    show_rows,
    size,
    yes_no,
)
from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.domain.paths import path_to_text

SOURCE_COLUMNS = (
    Column("id", "ID", right=True),
    Column("path", "PATH"),
    Column("active", "ACTIVE", yes_no),
    Column("files", "FILES", right=True),
    Column("last_scan", "LAST SCAN", short_time),
    Column("problems", "PROBLEMS", lambda v: str(len(v)) if v else "", right=True),
)
FILE_COLUMNS = (
    Column("rel_path", "FILE"),
    Column("last_known_size", "SIZE", size, right=True),
    Column("version_seq", "VERSION", right=True),
    Column("applied_tags", "TAGS"),
    Column("last_seen_time", "LAST SEEN", short_time),
    Column("deleted_at", "DELETED", short_time),
)
VERSION_COLUMNS = (
    Column("seq", "N", right=True),
    Column("id", "VERSION ID", right=True),
    Column("content_hash", "SHA-256", short_hash),
    Column("size_bytes", "SIZE", size, right=True),
    Column("detected_at", "DETECTED", short_time),
    Column("applied_tags", "TAGS"),
)


@click.group(cls=CommandGroup)
def source() -> None:
    """Folders that are watched (source roots)."""


@source.command("add")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--settle-seconds", type=click.FloatRange(0), help="Read files that stood still so long."
)
@click.option("--include", multiple=True, metavar="GLOB", help="Only such files; may be repeated.")
@click.option("--ignore", multiple=True, metavar="GLOB", help="No such files; may be repeated.")
@output_option
@pass_app
def source_add(
    app: App,
    folder: Path,
    settle_seconds: float | None,
    include: tuple[str, ...],
    ignore: tuple[str, ...],
) -> None:
    """Watch FOLDER. Patterns are written as in .gitignore files.

    \b
    Example:
      casparian source add inbox --ignore '*.bak' --ignore 'old/'
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="Make it first, or correct the path.")
    row = app.control.add_source(
        path_to_text(str(folder.resolve())),
        settle_seconds=settle_seconds,
        include=include,
        ignore=ignore,
    )
    show_data(app, row, f"watching {row.get('path', folder)}")
    for overlap in row.get("overlaps") or []:
        note(f"note: {one_line(overlap)}")


@source.command("list")
@output_option
@pass_app
def source_list(app: App) -> None:
    """List the source roots."""
    show_rows(
        app,
        app.control.list_sources(),
        SOURCE_COLUMNS,
        empty="no source root yet: add one with 'casparian source add FOLDER'",
    )


@source.command("remove")
@click.argument("folder", type=click.Path())
@output_option
@pass_app
def source_remove(app: App, folder: str) -> None:
    """Watch FOLDER no longer. Its files' history stays."""
    path = str(source_named(app.control, folder)["path"])
    app.control.remove_source(path)
    show_data(app, {"path": path, "active": False}, f"no longer watching {path}")


@click.command()
@click.argument("folders", nargs=-1, type=click.Path())
@click.option("--rehash", is_flag=True, help="Read every file, also those that look unchanged.")
@click.option("--no-wait", is_flag=True, help="Leave files alone that have not stood still yet.")
@output_option
@pass_app
def scan(app: App, folders: tuple[str, ...], rehash: bool, no_wait: bool) -> None:
    """Look for new and changed files once, and queue their jobs.

    Looks through FOLDERS, by default every source root.

    \b
    Exit code 1 if a root could not be scanned completely.
    """
    from casparian_flow.cli.progress import scan_progress
    from casparian_flow.services import scout

    control = app.control
    roots = [source_named(control, f) for f in folders] or [
        row for row in control.list_sources() if row.get("active", True)
    ]
    if not roots:
        raise UsageError(
            "there is no source root to scan",
            hint="Add one with 'casparian source add FOLDER'.",
        )
    reports = []
    for root in roots:
        with scan_progress(str(root["path"])) as progress:
            report = scout.scan(
                root,
                control,
                rehash=rehash,
                wait_for_settle=not no_wait,
                settle_seconds=app.settings.scout.settle_seconds,
                progress=progress,
            )
        reports.append({"path": root["path"], **scout.report_row(report)})
    show_rows(app, reports, SCAN_COLUMNS, empty="")
    for row in reports:
        for problem in row["problems"]:
            note(f"{one_line(str(row['path']))}: {one_line(problem)}")
    if not all(row["complete"] for row in reports):
        raise click.exceptions.Exit(CasparianError.exit_code)


SCAN_COLUMNS = (
    Column("path", "SOURCE"),
    Column("files", "FILES", right=True),
    Column("versions", "NEW VERSIONS", right=True),
    Column("jobs", "NEW JOBS", right=True),
    Column("deleted", "DELETED", right=True),
    Column("renamed", "RENAMED", right=True),
    Column("unsettled", "STILL WRITTEN", right=True),
    Column("seconds", "SECONDS", lambda v: f"{float(v):.2f}", right=True),
)


@click.command()
@click.argument("pattern", required=False)
@click.option("--source", "folder", type=click.Path(), help="Only files below this source root.")
@limit_option()
@output_option
@pass_app
def files(app: App, pattern: str | None, folder: str | None, limit: int) -> None:
    """List known files, all or those that match PATTERN.

    \b
    Example:
      casparian files '*.csv' --limit 20
    """
    root_id = int(source_named(app.control, folder)["id"]) if folder else None
    show_rows(
        app,
        app.control.list_files(root_id=root_id, pattern=pattern, limit=limit),
        FILE_COLUMNS,
        empty="no such file is known; 'casparian scan' looks through the source roots",
    )


@click.command()
@click.argument("path")
@output_option
@pass_app
def versions(app: App, path: str) -> None:
    """Show every version seen of the file at PATH, oldest first.

    PATH is a path on disk, or relative to a source root.
    """
    # A name that is not UTF-8 may be too long for the disk in the form in which it is shown.
    wanted = absolute_text(path) if os.path.exists(path) else path
    show_rows(
        app,
        app.control.versions(wanted),
        VERSION_COLUMNS,
        empty=f"no version of {path} is known; 'casparian scan' looks through the source roots",
    )
