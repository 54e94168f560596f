"""Plugins and their wiring: topics, rules, backfill."""

from collections.abc import Sequence
from pathlib import Path

import click

from casparian_flow.cli.context import App, CommandGroup, output_option, pass_app
from casparian_flow.cli.output import (
    Column,
    many_lines,
    note,
    one_line,
    short_hash,
    short_time,
    show_data,
    show_pairs,
    show_rows,
    to_json,
    yes_no,
)
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.domain.outputs import SinkMode, parse_sink_uri
from casparian_flow.domain.wording import counted
from casparian_flow.sentinel.api import Row

PLUGIN_COLUMNS = (
    Column("plugin_name", "PLUGIN"),
    Column("version", "VERSION"),
    Column("status", "STATUS"),
    Column("paused", "PAUSED", yes_no),
    Column("subscription_tags", "TAGS"),
    Column("artifact_hash", "ARTIFACT", short_hash),
    Column("deployed_at", "DEPLOYED", short_time),
)
VERSION_COLUMNS = (
    Column("version", "VERSION"),
    Column("status", "STATUS"),
    Column("signer", "SIGNED BY"),
    Column("key_id", "KEY", short_hash),
    Column("artifact_hash", "ARTIFACT", short_hash),
    Column("env_hash", "ENVIRONMENT", short_hash),
    Column("publisher", "PUBLISHER"),
    Column("deployed_at", "DEPLOYED", short_time),
)
PLUGIN_FACTS = (
    ("tags", "subscription_tags"),
    ("parameters", "default_parameters"),
    ("paused", "pause_reason"),
    ("failures in a row", "consecutive_failures"),
)
TOPIC_COLUMNS = (
    Column("plugin_name", "PLUGIN"),
    Column("topic_name", "TOPIC"),
    Column("uri", "SINK"),
    Column("mode", "MODE"),
    Column("schema_json", "CONTRACT", yes_no),
)
RULE_COLUMNS = (
    Column("id", "ID", right=True),
    Column("pattern", "PATTERN"),
    Column("tag", "TAG"),
    Column("priority", "PRIORITY", right=True),
    Column("origin", "MADE BY"),
)
MAX_CONTRACT_BYTES = 1 << 20


@click.command()
@output_option
@pass_app
def plugins(app: App) -> None:
    """List the deployed plugins."""
    show_rows(
        app,
        app.control.list_plugins(),
        PLUGIN_COLUMNS,
        empty="no plugin yet: 'casparian publish FILE --version 1.0.0'",
    )


@click.group(cls=CommandGroup)
def plugin() -> None:
    """Look at one plugin, pause or resume it, go back to an earlier version."""


@plugin.command("show")
@click.argument("name")
@output_option
@pass_app
def plugin_show(app: App, name: str) -> None:
    """Show the versions of plugin NAME, who signed them, how they stand and why, and its topics."""
    control = app.control
    rows = [row for row in control.list_plugins() if row.get("plugin_name") == name]
    if not rows:
        raise NotFoundError(f"no plugin {name!r}", hint="'casparian plugins' lists them.")
    topics_of = [row for row in control.list_topics() if row.get("plugin_name") == name]
    trials = [row for row in control.list_trials() if row.get("plugin_name") == name]
    if app.json:
        click.echo(to_json({"versions": rows, "trials": trials, "topics": topics_of}))
        return
    show_rows(app, rows, VERSION_COLUMNS, empty="no versions")
    notes = [(row["version"], str(row["validation_error"] or "")) for row in rows]
    notes += [(row["version"], _trial(row)) for row in trials]
    for version, told in notes:
        if told:
            click.echo(f"\n{name} {version}: {many_lines(told)}")
    newest = rows[0]
    click.echo()
    show_pairs((title, str(newest.get(key))) for title, key in PLUGIN_FACTS if newest.get(key))
    click.echo()
    show_rows(app, _sinks(topics_of), TOPIC_COLUMNS, empty="no topics")


def _trial(row: Row) -> str:
    return f"{row['state']}: {row['note']}" if row["note"] else str(row["state"])


@plugin.command("rollback")
@click.argument("name")
@click.option("--to", "version", required=True, metavar="V", help="A version that was active.")
@output_option
@pass_app
def plugin_rollback(app: App, name: str, version: str) -> None:
    """Run plugin NAME with an earlier version again.

    Queued jobs move to it, running ones finish on the version they began with. What was written
    stays; versions that were still to be tried are withdrawn.
    """
    row = app.control.rollback_plugin(name, version)
    show_data(app, row, str(row["message"]))
    if row["kept"] and not app.json:
        note(f"left as somebody changed it: {', '.join(row['kept'])}")


@plugin.command("pause")
@click.argument("name")
@click.option(
    "--reason", default="paused by an operator", show_default=True, help="Kept and shown."
)
@output_option
@pass_app
def plugin_pause(app: App, name: str, reason: str) -> None:
    """Start no more jobs of plugin NAME. Running ones finish."""
    app.control.pause_plugin(name, reason=reason)
    show_data(app, {"plugin": name, "paused": True, "reason": reason}, f"{name} is paused")


@plugin.command("resume")
@click.argument("name")
@output_option
@pass_app
def plugin_resume(app: App, name: str) -> None:
    """Run plugin NAME again after a pause, or after too many failures in a row."""
    app.control.resume_plugin(name)
    show_data(app, {"plugin": name, "paused": False}, f"{name} runs again")


@click.command()
@click.argument("name", metavar="PLUGIN")
@click.option("--execute", is_flag=True, help="Queue the jobs; without it they are only counted.")
@click.option("--force", is_flag=True, help="Also for versions that this plugin version has done.")
@output_option
@pass_app
def backfill(app: App, name: str, execute: bool, force: bool) -> None:
    """Queue jobs of PLUGIN for files seen before it was deployed.

    Only a file's current version can be processed; versions whose bytes are gone are listed.
    """
    result = app.control.backfill(name, execute=execute, force=force)
    count, gone = result.get("jobs", 0), result.get("bytes_gone") or []
    if not count:
        told = f"nothing to queue: {name} has a job for every version it can process"
    elif execute:
        told = f"{counted(count, 'job')} queued"
    else:
        told = f"{counted(count, 'job')} would be queued; add --execute"
    show_data(app, result, told)
    if gone and not app.json:
        note(f"{len(gone)} versions can no longer be processed, their bytes are gone:")
        for path in gone:
            note(f"  {one_line(str(path))}")


@click.group(cls=CommandGroup, invoke_without_command=True)
@output_option
@click.pass_context
def topics(context: click.Context) -> None:
    """List where each topic goes, or change it."""
    if context.invoked_subcommand is None:
        context.invoke(topics_list)


@topics.command("list")
@output_option
@pass_app
def topics_list(app: App) -> None:
    """List the sinks of every topic."""
    rows = app.control.list_topics()
    show_rows(
        app,
        rows if app.json else _sinks(rows),
        TOPIC_COLUMNS,
        empty="no topic yet; publishing a plugin makes them",
    )


def _sinks(rows: Sequence[Row]) -> list[Row]:
    """One row for each sink of a topic, with the mode in force: a URI's own goes first."""
    return [
        row | {"uri": uri, "mode": _mode(uri, str(row["mode"]))}
        for row in rows
        for uri in str(row["uri"]).splitlines()
    ]


def _mode(uri: str, configured: str) -> str:
    try:
        given = parse_sink_uri(uri).mode
    except UsageError:  # 'casparian status' tells what is wrong with it
        return configured
    return configured if given is SinkMode.APPEND else given


@topics.command("set")
@click.argument("plugin_name", metavar="PLUGIN")
@click.argument("topic")
@click.argument("uri")
@click.option(
    "--mode",
    type=click.Choice([m.value for m in SinkMode]),
    default=SinkMode.APPEND.value,
    show_default=True,
    help="append keeps the rows of every version, replace those of the newest, error refuses.",
)
@click.option(
    "--schema",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file with the topic's contract.",
)
@output_option
@pass_app
def topics_set(
    app: App, plugin_name: str, topic: str, uri: str, mode: str, schema: Path | None
) -> None:
    """Send TOPIC of PLUGIN to the sink URI ('*' stands for topics without one of their own).

    \b
    Examples:
      casparian topics set sales sales_data parquet://sales
      casparian topics set sales sales_data sqlite:///srv/data/sales.db --mode replace
    """
    app.control.set_topic(plugin_name, topic, uri=uri, mode=mode, schema_json=_contract(schema))
    show_data(
        app,
        {"plugin_name": plugin_name, "topic_name": topic, "uri": uri, "mode": mode},
        f"{plugin_name}: {topic} goes to {uri} ({mode})",
    )


def _contract(schema: Path | None) -> str:
    if schema is None:
        return ""
    try:
        with schema.open("rb") as stream:
            raw = stream.read(MAX_CONTRACT_BYTES + 1)
        if len(raw) > MAX_CONTRACT_BYTES:
            raise UsageError(f"{schema} is larger than {MAX_CONTRACT_BYTES} bytes")
        return raw.decode()
    except OSError as error:
        raise UsageError(f"{schema}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{schema} is not UTF-8 text") from error


@click.group(cls=CommandGroup, invoke_without_command=True)
@output_option
@click.pass_context
def rules(context: click.Context) -> None:
    """List the rules that tag files, or change them."""
    if context.invoked_subcommand is None:
        context.invoke(rules_list)


@rules.command("list")
@output_option
@pass_app
def rules_list(app: App) -> None:
    """List the routing rules."""
    show_rows(
        app,
        app.control.list_rules(),
        RULE_COLUMNS,
        empty="no rule yet; publishing a plugin makes one from its MANIFEST",
    )


@rules.command("add")
@click.argument("pattern")
@click.argument("tag")
@click.option(
    "--priority", type=int, default=50, show_default=True, help="Of the jobs it leads to."
)
@click.option("--namespace", default="", help="Of the source roots whose files it matches.")
@output_option
@pass_app
def rules_add(app: App, pattern: str, tag: str, priority: int, namespace: str) -> None:
    """Give files that match PATTERN (as in .gitignore) the tag TAG.

    \b
    Example:
      casparian rules add 'sales/**/*.csv' csv
    """
    new = app.control.add_rule(pattern, tag, priority=priority, namespace=namespace)
    show_data(
        app,
        {
            "id": new,
            "pattern": pattern,
            "tag": tag,
            "priority": priority,
            "namespace": namespace,
        },
        f"rule {new}: files like {pattern} are tagged {tag}",
    )


@rules.command("remove")
@click.argument("rule_id", type=click.IntRange(1))
@output_option
@pass_app
def rules_remove(app: App, rule_id: int) -> None:
    """Remove a rule. Tags that versions already have stay."""
    app.control.remove_rule(rule_id)
    show_data(app, {"id": rule_id, "removed": True}, f"rule {rule_id} is removed")
