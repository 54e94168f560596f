"""Makes a plugin's environment before its workers start, onto a volume that they only read.

    python -m casparian_worker.provision --bundle /bundle/bundle.casparian \\
        --environments /environments

The lock file is the bundle's, and only of a bundle that `[trust]` admits. It is made once: where
the environment is there already, nothing is done. Exit code 75 says that another try may succeed.
"""

import gzip
import io
import logging
import os
import sys
from pathlib import Path

import click

from casparian_flow.config import Settings, load_settings
from casparian_flow.config_trust import trust_source
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.logs import start_logging, start_logging_from_environment
from casparian_flow.trust.bundle import BUNDLE_BYTES_MAX, Bundle, unpack
from casparian_worker.environments import EnvironmentCache, WheelSource, environment_key
from casparian_worker.plugin_events import LaunchError

log = logging.getLogger(__name__)

TERMINATION_LOG = "/dev/termination-log"
TOLD_BYTES_MAX = 4_096
"""Of the message of a container that ended; the kubelet keeps no more."""
EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h."""
_GZIP = b"\x1f\x8b"


def wheel_source(settings: Settings) -> WheelSource:
    """Where these settings have wheels come from."""
    worker = settings.worker
    return WheelSource(
        index_url=worker.index_url,
        wheelhouse=str(worker.wheelhouse or ""),
        ca_file=str(worker.ca_file or ""),
    )


def read_bundle(path: Path) -> Bundle:
    """Read a bundle, gzipped or not.

    Raises:
        CasparianError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(BUNDLE_BYTES_MAX + 1)
        if data.startswith(_GZIP):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                data = packed.read(BUNDLE_BYTES_MAX + 1)
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"the bundle {path} cannot be read: {why}") from error
    return unpack(data)


def provision(
    settings: Settings, bundle: Bundle, environments: Path, *, deployed_at_us: int
) -> str:
    """Make the bundle's environment, unless it is there; returns what was done, in a sentence.

    Args:
        environments: folder that workers have as `[worker] cache_dir`.
        deployed_at_us: when the bundle was deployed, for keys that count for a time only.

    Raises:
        LaunchError: the environment cannot be made.
        CasparianError: the bundle is not to be trusted.
    """
    trust_source(settings)().require(bundle, deployed_at_us=deployed_at_us)
    if not bundle.lockfile:
        return f"{bundle.name} {bundle.version} has no lock file: it needs no environment"
    key = environment_key(bundle.lockfile)
    cache = EnvironmentCache(
        str(environments),
        max_bytes=sys.maxsize,  # who reads them holds no locks, so none may be removed
        wheels=wheel_source(settings),
        private_downloads="UV_CACHE_DIR" not in os.environ,
    )
    try:
        cache.obtain(bundle.lockfile, log.info)
    finally:
        cache.close()
    return f"environment {key} of {bundle.name} {bundle.version} is ready"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--bundle",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The signed bundle, gzipped or not.",
)
@click.option(
    "--environments",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that workers have as [worker] cache_dir.",
)
@click.option(
    "--deployed-at-us",
    type=click.IntRange(0),
    metavar="MICROSECONDS",
    help="When the bundle was deployed, in UTC since 1970; now by default.",
)
@click.option(
    "--termination-log",
    type=click.Path(path_type=Path, dir_okay=False),
    default=TERMINATION_LOG,
    show_default=True,
    help="File for the last word, if it is there.",
)
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="Settings file.")
def main(
    bundle: Path,
    environments: Path,
    deployed_at_us: int | None,
    termination_log: Path,
    config: Path | None,
) -> None:
    """Make the environment of a plugin's lock file, once, for workers that only read it."""
    start_logging_from_environment()
    try:
        settings = load_settings(config)
        start_logging(settings.logging.level, settings.logging.format)
        now_us = SystemClock().now().wall_us
        told = provision(
            settings,
            read_bundle(bundle),
            environments.absolute(),
            deployed_at_us=now_us if deployed_at_us is None else deployed_at_us,
        )
        code = 0
    except CasparianError as error:
        told = error.with_hint()
        transient = isinstance(error, LaunchError) and error.transient is True
        code = EXIT_TRY_AGAIN if transient else error.exit_code
    (log.error if code else log.info)("%s", told)
    _leave_word(termination_log, told)
    sys.exit(code)


def _leave_word(file: Path, told: str) -> None:
    """Write the end of the message, which names the cause, where the kubelet looks for it."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    except OSError as error:
        log.debug("no termination log: %s", error)
        return
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(told.encode("utf-8", "replace")[-TOLD_BYTES_MAX:])
