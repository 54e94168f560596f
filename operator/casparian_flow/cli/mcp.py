"""`casparian mcp`: serving a model's client."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from casparian_flow.cli.context import App, CommandGroup, pass_app
from casparian_flow.config import McpSettings, overridden
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import ConfigError, UsageError
from casparian_flow.logs import start_logging

if TYPE_CHECKING:
    from casparian_flow.mcp_server.serving import Guard


@click.group(cls=CommandGroup)
def mcp() -> None:
    """What language models may ask of Casparian Flow, and what people say to it."""


@mcp.command()
@click.option("--http", is_flag=True, help="Serve over streamable HTTP instead of stdio.")
@click.option("--host", help="Address to listen on; beyond loopback a token is needed.")
@click.option("--port", type=click.IntRange(0, 65_535), help="TCP port; 0 takes a free one.")
@pass_app
def serve(app: App, http: bool, host: str | None, port: int | None) -> None:
    """Serve the tools of docs/mcp.md to a model's client.

    Over stdio a client starts this command itself. Whatever would have a lasting effect waits
    for 'casparian mcp approve'; the tools cannot decide.

    \b
    Examples:
      casparian mcp serve
      casparian mcp serve --http --port 8765
    """
    if app.cluster:
        raise UsageError(
            "the MCP server asks the Sentinel of its own machine",
            hint="Leave --context out.",
        )
    try:
        from casparian_flow.mcp_server import serving
        from casparian_flow.mcp_server.audit import AuditLog
        from casparian_flow.mcp_server.desk import Desk
        from casparian_flow.mcp_server.server import ToolServer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the MCP server needs the library {error.name}",
            hint="Install it: pip install 'casparian-flow[mcp]'.",
        ) from error
    if not http and (host is not None or port is not None):
        raise click.UsageError("--host and --port go with --http")
    settings = overridden(app.settings, "mcp", host=host, port=port)
    start_logging(settings.logging.level, settings.logging.format)
    audit = AuditLog(settings.mcp.audit_log)
    audit.require()
    desk = Desk(settings, app.connector, SystemClock())
    server = ToolServer(desk, audit, "http" if http else "stdio").sdk_server()
    if not http:
        serving.serve_stdio(server)
        return
    with ExitStack() as stack:
        guard = _guard(settings.mcp, stack)
        serving.serve_http(server, settings.mcp.host, settings.mcp.port, guard, _tell)


def _guard(mcp: McpSettings, stack: ExitStack) -> "Guard":
    """Who may call over HTTP.

    Raises:
        ConfigError: everybody might, or nobody could be told from others.
    """
    from casparian_flow.mcp_server.serving import ReviewedTokens, one_token

    if not mcp.token_review:
        return one_token(mcp.token.get_secret_value(), mcp.host)
    try:
        from casparian_flow.kube.client import KubeClient
        from casparian_flow.kube.token_review import caller_reviewer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"token_review needs the library {error.name}",
            hint="Install it: pip install 'casparian-flow[kubernetes]'.",
        ) from error
    if not mcp.token_audiences:
        raise ConfigError("token_audiences is empty", hint="Name one, such as casparian-mcp.")
    client = KubeClient.connect()
    stack.callback(client.close)
    review = caller_reviewer(client, mcp.token_audiences, mcp.allowed_users, mcp.allowed_groups)
    return ReviewedTokens(review, SystemClock())


def _tell(address: str) -> None:
    click.echo(f"serving MCP at {address}", err=True)
