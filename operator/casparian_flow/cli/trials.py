"""Waiting for a deployed version's trial."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import click

from casparian_flow.cli.output import note
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.wiring import PluginStatus
from casparian_flow.sentinel.api import ControlApi, Row

POLL_S = 0.2
WAIT_S = 60.0
"""How long `publish` waits by default; most trials take a second."""


def wait_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--wait` and `--no-wait`; the command gets `wait_s`."""

    @click.option(
        "--wait",
        "wait_s",
        type=click.FloatRange(0),
        default=WAIT_S,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for the trial.",
    )
    @click.option("--no-wait", is_flag=True, help="Do not wait for the trial.")
    @functools.wraps(command)
    def waiting(*args: Any, wait_s: float, no_wait: bool, **kwargs: Any) -> Any:
        return command(*args, wait_s=0.0 if no_wait else wait_s, **kwargs)

    return waiting


def await_trial(control: ControlApi, deployed: Row, *, timeout_s: float, clock: Clock) -> Row:
    """Follow a version that was just deployed until it is active, and say what happens.

    Returns at once if no worker is connected that could try it.

    Args:
        deployed: what `ControlApi.deploy` returned.

    Returns:
        The same row with the `status` that the version has now, and a fitting `message`.

    Raises:
        UsageError: the trial rejected it; the message tells why.
    """
    if deployed.get("status") != PluginStatus.STAGING or timeout_s <= 0:
        return deployed
    name = f"{deployed['plugin']} {deployed['version']}"
    if not control.list_workers():
        note(
            f"no worker is connected: {name} is tried once 'casparian start' runs; its jobs are "
            "kept meanwhile"
        )
        return deployed
    told = ""
    until = clock.now().mono + timeout_s
    while clock.now().mono < until:
        row = _version(control, deployed)
        if row.get("status") == PluginStatus.REJECTED:
            raise UsageError(
                f"{name} was rejected: {row.get('validation_error')}",
                hint="Correct the plugin and publish it again; the version's number is still free.",
            )
        if row.get("status") != PluginStatus.STAGING:
            status = str(row.get("status", ""))
            return {**deployed, "status": status, "message": f"{name} is {status.lower()}"}
        state = _state(control, deployed)
        if state and state != told:
            note(f"{name}: {state}")
            told = state
        threading.Event().wait(POLL_S)
    note(f"{name} is not tried yet; 'casparian plugin show {deployed['plugin']}' tells how it goes")
    return deployed


def _version(control: ControlApi, deployed: Row) -> Row:
    rows = control.list_plugins()
    return next((row for row in rows if row.get("id") == deployed["plugin_id"]), {})


def _state(control: ControlApi, deployed: Row) -> str:
    for row in control.list_trials():
        if row["plugin_id"] == deployed["plugin_id"]:
            return f"{row['state']}: {row['note']}" if row["note"] else str(row["state"])
    return ""
