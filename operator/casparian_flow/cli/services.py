"""The services one by one: sentinel, worker, scout; and how a running Sentinel is stopped."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import click

from casparian_flow.cli.context import App, output_option, pass_app
from casparian_flow.cli.output import show_data
from casparian_flow.cli.process import stop_on_signals
from casparian_flow.config import Settings, overridden, worker_address
from casparian_flow.logs import start_logging, start_logging_from_environment
from casparian_flow.sentinel.api import Row

metrics_option = click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    help="Serve Prometheus metrics on this loopback port; 0 serves none.",
)


def service_settings(app: App) -> Settings:
    """Read the settings, and have what this process says go to stderr as they ask."""
    # Reading the settings has something to say already, so logging begins before it.
    start_logging_from_environment()
    settings = app.settings
    start_logging("DEBUG" if app.debug else settings.logging.level, settings.logging.format)
    return settings


@click.command()
@click.option("--bind", "bind_address", metavar="ADDRESS", help="Such as tcp://127.0.0.1:5555.")
@metrics_option
@pass_app
def sentinel(app: App, bind_address: str | None, metrics_port: int | None) -> None:
    """Run the Sentinel alone.

    It owns the ledger and hands jobs to workers.

    \b
    Example:
      casparian sentinel --bind tcp://127.0.0.1:5555 --metrics-port 9100
    """
    from casparian_flow.sentinel.server import run_sentinel

    settings = service_settings(app)
    run_sentinel(
        overridden(settings, "sentinel", bind_address=bind_address, metrics_port=metrics_port)
    )


@click.command()
@click.option("--connect", metavar="ADDRESS", help="The Sentinel's, such as tcp://127.0.0.1:5555.")
@click.option(
    "--output-root",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder below which file sinks write.",
)
@click.option("--slots", type=click.IntRange(1, 1024), help="Plugins that run at a time.")
@click.option("--worker-id", default="", metavar="NAME", help="Name shown by 'casparian workers'.")
@click.option(
    "--launcher",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="SOCKET",
    help="Run plugins in the container whose launcher listens there.",
)
@metrics_option
@pass_app
def worker(
    app: App,
    connect: str | None,
    output_root: Path | None,
    slots: int | None,
    worker_id: str,
    launcher: Path | None,
    metrics_port: int | None,
) -> int:
    """Run one worker.

    It takes jobs from the Sentinel and runs plugins. It waits for a Sentinel that is not there yet,
    and for jobs. SIGTERM or Ctrl-C lets running jobs finish and gives the others back.

    \b
    Example:
      casparian worker --connect tcp://127.0.0.1:5555 --slots 4
    """
    from casparian_flow.engine.worker_client import run_worker

    settings = overridden(
        service_settings(app),
        "worker",
        connect=connect,
        output_root=output_root.absolute() if output_root else None,
        slots=slots,
        launcher=launcher.absolute() if launcher else None,
        metrics_port=metrics_port,
    )
    return run_worker(settings, address=worker_address(settings), worker_id=worker_id)


@click.command()
@click.option("--report-fd", type=int, hidden=True, help="Write one JSON line per scan here.")
@pass_app
def scout(app: App, report_fd: int | None) -> None:
    """Run the Scout alone.

    It scans the source roots again and again. It needs a running Sentinel. To look once, use
    'casparian scan'.
    """
    from casparian_flow.sentinel.control import remote
    from casparian_flow.sentinel.paths import control_address
    from casparian_flow.services.watch import run_scout

    settings = service_settings(app)
    address = control_address(settings.database.db_location, settings.sentinel.control_address)
    with stop_on_signals() as stop, remote(address) as control:
        control.ping()
        run_scout(
            control,
            interval_s=settings.scout.interval_seconds,
            settle_seconds=settings.scout.settle_seconds,
            stop=stop,
            on_report=None if report_fd is None else _reporter(report_fd),
        )


def _reporter(descriptor: int) -> Callable[[Row], None]:
    def report(row: Row) -> None:
        os.write(descriptor, json.dumps(row).encode() + b"\n")

    return report


@click.command()
@output_option
@pass_app
def stop(app: App) -> None:
    """Drain and stop the running Sentinel.

    What 'casparian start' runs beside it stops too.
    """
    from casparian_flow.sentinel.control import remote
    from casparian_flow.sentinel.paths import control_address

    settings = app.settings
    address = control_address(settings.database.db_location, settings.sentinel.control_address)
    with remote(address) as control:
        pid = control.ping().get("pid")
        control.stop()
    show_data(app, {"stopping": pid}, f"the Sentinel (process {pid}) is stopping")
