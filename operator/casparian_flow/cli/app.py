"""The root of the command line, and how errors leave it."""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from casparian_flow.cli import (
    approvals,
    events,
    files,
    init,
    jobs,
    keys,
    ledger,
    mcp,
    operator,
    plugins,
    publish,
    scout_pod,
    services,
    show,
    start,
    status,
)
from casparian_flow.cli.context import App, CommandGroup
from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.logs import start_logging

EPILOG = """\b
Exit codes: 0 done, 1 failed, 2 wrong request or configuration, 4 not found,
5 conflict with what is recorded, 6 ledger unusable, 7 no Sentinel answers,
8 not trusted, 9 not permitted.

\b
Shell completion (bash; for zsh and fish write zsh_source, fish_source):
  eval "$(_CASPARIAN_COMPLETE=bash_source casparian)"
"""


OVER_A_CLUSTER = frozenset(
    {
        "approvals", "backfill", "dead-letters", "events", "files", "job", "jobs", "mcp", "plugin",
        "plugins", "replay", "rules", "status", "topics", "versions", "workers",
    }
)  # fmt: skip
"""Commands that ask the control plane and nothing of this machine."""


class OrderedGroup(CommandGroup):
    """Lists its commands in the order in which they are usually needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=OrderedGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file. Default: $CASPARIAN_CONFIG, then ./global_config.toml.",
)
@click.option(
    "--context",
    "cluster",
    default="",
    metavar="NAME",
    help="Ask the operator on Kubernetes that this context of your kubeconfig leads to.",
)
@click.option("--debug", is_flag=True, help="Log everything, and show tracebacks of errors.")
@click.option("--die-with", type=int, hidden=True, help="End when this parent process ends.")
@click.pass_context
def cli(
    context: click.Context, config: Path | None, cluster: str, debug: bool, die_with: int | None
) -> None:
    """Watch folders, version every file, run plugins over each version once.

    \b
    A first run:
      casparian init
      casparian source add inbox
      casparian publish my_plugin.py --version 1.0.0
      casparian start
    """
    app = context.ensure_object(App)
    app.config, app.debug, app.cluster = config or app.config, debug, cluster
    if cluster and context.invoked_subcommand not in OVER_A_CLUSTER:
        raise UsageError(
            f"'{context.invoked_subcommand}' works on this machine, not on a cluster's operator",
            hint="On Kubernetes plugins and source roots are objects: kubectl apply, and "
            "'casparian publish --emit-manifest'. With --context there are: "
            + ", ".join(sorted(OVER_A_CLUSTER))
            + ".",
        )
    context.call_on_close(app.close)
    if debug:
        start_logging("DEBUG")
    if die_with is not None:
        from casparian_flow.cli.process import die_with_parent

        die_with_parent(die_with)


for command in (
    init.init,
    files.source,
    publish.publish,
    publish.deploy,
    publish.verify,
    keys.keys,
    start.start,
    services.sentinel,
    services.worker,
    services.scout,
    scout_pod.scout_pod,
    services.stop,
    files.scan,
    files.files,
    files.versions,
    jobs.jobs,
    jobs.job,
    jobs.dead_letters,
    jobs.replay,
    plugins.backfill,
    plugins.topics,
    plugins.rules,
    plugins.plugins,
    plugins.plugin,
    status.workers,
    status.status,
    ledger.sql,
    ledger.ledger,
    events.events,
    mcp.mcp,
    approvals.approvals,
    operator.operator,
    show.config,
    show.version,
):
    cli.add_command(command)
for command in (approvals.list_requests, approvals.approve):
    mcp.mcp.add_command(command)


def run(argv: Sequence[str] | None = None, app: App | None = None) -> int:
    """Run one command and turn whatever happens into an exit code and a message on stderr."""
    state = app or App()
    try:
        result = cli.main(
            args=None if argv is None else list(argv),
            prog_name="casparian",
            standalone_mode=False,
            obj=state,
        )
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except CasparianError as error:
        report(error, debug=state.debug)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last resort, which must not show a traceback
        report(error, debug=state.debug)
        return 1
    return result if isinstance(result, int) else 0


def report(error: Exception, *, debug: bool) -> None:
    """Say what went wrong, and what to do next."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, CasparianError):
        message, hint = str(error), error.hint
    else:
        message = f"{type(error).__name__}: {error}"
        hint = "This is unexpected; run it again as 'casparian --debug …' to see where."
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
