"""`casparian init`: a configuration file and the folders it names."""

from pathlib import Path

import click

from casparian_flow.cli.context import App, output_option, pass_app
from casparian_flow.cli.output import show_data
from casparian_flow.config import CONFIG_NAME
from casparian_flow.domain.errors import UsageError

TEMPLATE = """\
# Settings of Casparian Flow. Every key, with unit, default and reason: docs/configuration.md
# Relative paths are relative to this file's folder.

[database]
db_location = "casparian_flow.duckdb"

[worker]
output_root = "output"
# slots = 4                  # plugins that run at once; default: one for each processor
# job_timeout_seconds = 300

[scout]
# interval_seconds = 10
# settle_seconds = 2
"""
FOLDERS = ("inbox", "output")

NEXT_STEPS = """\
Next:
  casparian source add inbox                      watch a folder
  casparian publish my_plugin.py --version 1.0.0  deploy a plugin
  casparian start                                 run everything; Ctrl-C stops it"""


def _make_key(config: Path) -> list[str]:
    """See to it that a first publish can be signed, and is trusted here."""
    from casparian_flow.config import load_settings
    from casparian_flow.services.trust_file import ensure_own_key, key_file

    settings = load_settings(config)
    if not ensure_own_key(settings):
        return []
    return [str(key_file(settings))]


@click.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path, file_okay=False))
@output_option
@pass_app
def init(app: App, folder: Path) -> None:
    """Make a configuration file, folders and a key.

    They are made in FOLDER, by default here. What is there already stays as it is, so this may be
    run again at any time. The key signs what is published here, and is trusted here; a
    configuration that trusts somebody already is left alone.

    \b
    Example:
      casparian init ~/flow
    """
    made: list[str] = []
    try:
        for path in (folder, *(folder / name for name in FOLDERS)):
            if not path.is_dir():
                path.mkdir(parents=True)
                made.append(f"{path}/")
        config = folder / CONFIG_NAME
        try:
            with config.open("x", encoding="utf-8") as stream:
                stream.write(TEMPLATE)
            made.append(str(config))
        except FileExistsError:
            pass  # never overwritten: it is the user's
        made += _make_key(config)
    except OSError as error:
        raise UsageError(
            f"{error.filename}: {error.strerror}", hint="Choose a folder that you may write to."
        ) from error
    lines = [f"made {path}" for path in made] or [f"{config} is there already; nothing changed"]
    if folder != Path():
        lines += ["", f"  cd {folder}"]
    lines += ["", NEXT_STEPS]
    show_data(app, {"config": str(config.absolute()), "made": made}, "\n".join(lines))
