"""`casparian config show` and `casparian version`."""

import platform

import click

from casparian_flow import __version__
from casparian_flow.cli.context import App, CommandGroup, output_option, pass_app
from casparian_flow.cli.output import show_data, show_table, to_json
from casparian_flow.config import config_path, keys


@click.group(cls=CommandGroup)
def config() -> None:
    """The settings in force."""


@config.command("show")
@output_option
@pass_app
def config_show(app: App) -> None:
    """Show every setting with its value, and which file it comes from. Secrets stay hidden."""
    file, _ = config_path(app.config)
    settings = app.settings
    values = settings.model_dump(mode="json")
    if app.json:
        shown = str(file) if file.exists() else None
        click.echo(to_json({"file": shown, "settings": values}))
        return
    click.echo(f"file: {file}" if file.exists() else f"no {file}: every setting has its default")
    cells = []
    for section, key, _field in keys():
        node = values
        for part in section.split("."):
            node = node[part]
        cells.append([f"[{section}]", key, _text(node[key])])
    click.echo()
    show_table(["SECTION", "KEY", "VALUE"], cells)


def _text(value: object) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@click.command()
@output_option
@pass_app
def version(app: App) -> None:
    """Print the version."""
    found = {"version": __version__, "python": platform.python_version()}
    show_data(app, found, f"casparian {found['version']} (Python {found['python']})")
