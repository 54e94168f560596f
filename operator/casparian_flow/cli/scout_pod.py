"""`casparian scout-pod`: one scan of one root for a Sentinel elsewhere, as in a CronJob's pod."""

import json
import logging
import threading
from typing import TYPE_CHECKING

import click

from casparian_flow.cli.context import App, pass_app
from casparian_flow.cli.process import stop_on_signals
from casparian_flow.cli.services import service_settings
from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.errors import CasparianError, NotFoundError, SentinelUnreachableError
from casparian_flow.sentinel.api import ControlApi, Row

if TYPE_CHECKING:
    from casparian_flow.sentinel.control import ControlClient

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""For a Sentinel that is being started again, before the scan begins."""
RETRY_S = 1.0


@click.command("scout-pod")
@click.option(
    "--connect",
    "address",
    required=True,
    metavar="ADDRESS",
    help="The Sentinel's control address, such as tcp://casparian-sentinel:5556.",
)
@click.option("--root", "name", required=True, metavar="NAME", help="The source root's name.")
@click.option("--rehash", is_flag=True, help="Read every file, also those that look unchanged.")
@pass_app
def scout_pod(app: App, address: str, name: str, rehash: bool) -> None:
    """Scan one source root for a Sentinel on another machine, and end.

    The folder is looked for here, at the path that the ledger has. What is found goes to the
    Sentinel in batches; the counts are recorded there and printed as a line of JSON.

    \b
    Exit codes: 0 scanned whole, 1 not whole (the report tells why), 4 no such root,
    5 another scan of it is under way, 7 no Sentinel answers.

    \b
    Example:
      casparian scout-pod --connect tcp://casparian-sentinel:5556 --root finance/inbox
    """
    from casparian_flow.sentinel.control import remote
    from casparian_flow.services import scout

    settings = service_settings(app)
    keys = settings.wire.curve_dir
    with stop_on_signals() as stop, remote(address, curve_dir=keys) as control:
        root = _root(control, name, stop, SystemClock())
        root_id = int(root["id"])
        report = scout.scan(
            root_id,
            control,
            rehash=rehash,
            settle_seconds=settings.scout.settle_seconds,
            force={str(row["rel_path"]) for row in control.next_rescans(root_id)},
            stop=stop,
        )
    for problem in report.problems:
        log.warning("%s: %s", name, problem)
    click.echo(json.dumps({"root": name, **scout.report_row(report)}))
    if not report.complete:
        raise click.exceptions.Exit(CasparianError.exit_code)


def _root(control: "ControlClient", name: str, stop: threading.Event, clock: Clock) -> Row:
    """The root of that name; waits for a Sentinel that does not answer yet.

    Raises:
        NotFoundError: none has it.
        SentinelUnreachableError: nobody answers in time.
    """
    deadline = clock.now().mono + PATIENCE_S
    while True:
        try:
            return _named(control, name)
        except SentinelUnreachableError as error:
            if clock.now().mono >= deadline or stop.wait(RETRY_S):
                raise
            log.info("%s; waiting for it", error)


def _named(control: ControlApi, name: str) -> Row:
    for row in control.list_sources():
        if row.get("name") == name and row.get("active", True):
            return row
    raise NotFoundError(
        f"no source root is named {name!r}",
        hint="A SourceRoot object makes one; 'casparian source list' lists them.",
    )
