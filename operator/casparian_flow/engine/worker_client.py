"""Entry point of a worker process.

    python -m casparian_flow.engine.worker_client --connect tcp://127.0.0.1:5555

`casparian worker` calls the same `run_worker`. This module joins settings and worker, which
itself knows nothing of configuration files.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path

import click

from casparian_flow.config import (
    Settings,
    load_settings,
    overridden,
    worker_address,
)
from casparian_flow.config_trust import trust_source
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.engine.provision import wheel_source
from casparian_flow.logs import start_logging, start_logging_from_environment
from casparian_flow.trust.rules import TrustSource
from casparian_worker.environments import EnvironmentCache
from casparian_worker.process import ProcessConfig, run
from casparian_worker.remote_family import PluginContainer
from casparian_worker.runtime import POD_REQUIRED, PluginRuntime, SandboxPolicy
from casparian_worker.sinks.base import MssqlSettings
from casparian_worker.wire import WireFiles

log = logging.getLogger(__name__)


def run_worker(settings: Settings, *, address: str, worker_id: str = "") -> int:
    """Work for the Sentinel at `address` until a signal asks for the end; returns the exit code.

    Raises:
        CasparianError: an address, folder or port cannot be used, or the sandbox falls short of
            what `[sandbox] require` lists.
    """
    worker = settings.worker
    config = ProcessConfig(
        address=address,
        output_root=str(worker.output_root),
        slots=worker.slots,
        worker_id=worker_id,
        metrics_port=worker.metrics_port,
        metrics_host=worker.metrics_host,
        drain_s=worker.drain_seconds,
        ledger_path=str(settings.database.db_location),
        mssql=_mssql(settings),
        wire_files=_wire_files(settings),
    )
    return run(config, lambda: _runtime(settings))


def _wire_files(settings: Settings) -> WireFiles | None:
    wire = settings.wire
    return WireFiles(wire.curve_dir, wire.token_file) if wire.curve_dir else None


def _runtime(settings: Settings) -> PluginRuntime:
    worker = settings.worker
    scratch = worker.scratch or Path(tempfile.gettempdir()) / f"casparian-{os.geteuid()}"
    cache = worker.cache_dir or _user_cache()
    clock = SystemClock()
    container = PluginContainer(str(worker.launcher), clock) if worker.launcher else None
    required = settings.sandbox.require
    if required is None:
        required = POD_REQUIRED if container else ()
    try:
        return PluginRuntime(
            scratch_root=str(scratch),
            cache_root=str(cache),
            policy=SandboxPolicy(required=required),
            clock=clock,
            progress=log.info,
            trust=_trust(settings),
            environments=EnvironmentCache(
                str(cache),
                wheels=wheel_source(settings),
                read_only=worker.environments_read_only,
            ),
            container=container,
        )
    except OSError as error:
        raise UsageError(
            f"cannot use {error.filename or scratch}: {error.strerror}",
            hint="Set [worker] scratch and cache_dir to folders that can be written.",
        ) from error


def _trust(settings: Settings) -> TrustSource:
    if not settings.trust.allowed_signers and not settings.trust.allow_unsigned:
        log.warning(
            "this worker trusts nobody, so it will run no plugin: copy the section [trust] of the "
            "Sentinel's configuration into %s",
            settings.file or "its own",
        )
    return trust_source(settings)


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "casparian"


def _mssql(settings: Settings) -> MssqlSettings:
    """The configured server; what is not configured comes from CASPARIAN_MSSQL_*."""
    given = settings.sinks.mssql
    environment = MssqlSettings.from_env(os.environ)
    if not given.server:
        return environment
    return MssqlSettings(
        server=given.server,
        port=given.port,
        user=given.user or environment.user,
        password=given.password.get_secret_value() or environment.password,
        database=given.database or environment.database,
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--connect", metavar="ADDRESS", help="The Sentinel's, such as tcp://127.0.0.1:5555.")
@click.option(
    "--output",
    "--output-root",
    "output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder below which file sinks write.",
)
@click.option("--slots", type=click.IntRange(1, 1024), help="Plugins that run at a time.")
@click.option("--worker-id", default="", metavar="NAME", help="Name shown by 'casparian workers'.")
@click.option("--launcher", type=click.Path(path_type=Path, dir_okay=False), metavar="SOCKET")
@click.option("--metrics-port", type=click.IntRange(0, 65_535), metavar="PORT")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="Settings file.")
def main(
    connect: str | None,
    output: Path | None,
    slots: int | None,
    worker_id: str,
    launcher: Path | None,
    metrics_port: int | None,
    config: Path | None,
) -> None:
    """Run one worker until SIGTERM or Ctrl-C; it waits for a Sentinel that is not there yet."""
    try:
        start_logging_from_environment()
        settings = overridden(
            load_settings(config),
            "worker",
            connect=connect,
            output_root=output.absolute() if output else None,
            slots=slots,
            launcher=launcher.absolute() if launcher else None,
            metrics_port=metrics_port,
        )
        start_logging(settings.logging.level, settings.logging.format)
        code = run_worker(settings, address=worker_address(settings), worker_id=worker_id)
    except CasparianError as error:
        click.echo(f"error: {error}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    sys.exit(code)


if __name__ == "__main__":
    main()
