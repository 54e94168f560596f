"""`casparian operator`: everything on Kubernetes, in the operator's pod."""

from pathlib import Path

import click

from casparian_flow.cli.context import App, CommandGroup, pass_app
from casparian_flow.cli.services import service_settings


@click.group(cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def operator(context: click.Context) -> None:
    """Run the operator on Kubernetes.

    It turns CasparianPlugins and SourceRoots into worker Deployments and Scout CronJobs, and holds
    the Sentinel with its ledger. The Helm chart runs it in a pod; outside of one it asks the
    cluster of your kubeconfig.

    \b
    Example:
      casparian --config config.toml operator
    """
    if context.invoked_subcommand is None:
        context.exit(_serve(context.find_object(App) or App()))


def _serve(app: App) -> int:
    from casparian_flow.kube.operator import run_operator

    return run_operator(service_settings(app))


@operator.command("add-key")
@pass_app
def add_key(app: App) -> None:
    """Begin to issue CURVE keys from a new master key.

    Old keys stay admitted. Pods get their new ones within minutes and use them from their next
    connection on. Once they all have, 'drop-keys' ends the old ones.

    \b
    Example:
      kubectl exec casparian-operator-0 -- casparian operator add-key
    """
    from casparian_flow.kube.curve_keys import add_master

    file = add_master(_folder(app))
    click.echo(f"made {file.name}; the operator issues from it within seconds")


@operator.command("drop-keys")
@pass_app
def drop_keys(app: App) -> None:
    """Admit keys of the newest master key only.

    Who still has an older one ends what it runs and cannot connect again.

    \b
    Example:
      kubectl exec casparian-operator-0 -- casparian operator drop-keys
    """
    from casparian_flow.kube.curve_keys import drop_old_masters

    dropped = drop_old_masters(_folder(app))
    click.echo(f"dropped {', '.join(f.name for f in dropped)}" if dropped else "there is one only")


def _folder(app: App) -> Path:
    from casparian_flow.kube.curve_keys import folder_of

    return folder_of(app.settings.database.db_location)
