"""`casparian mcp`: serving a model's client."""

import click

from casparian_flow.cli.context import App, CommandGroup, pass_app
from casparian_flow.config import overridden
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import ConfigError, UsageError
from casparian_flow.logs import start_logging


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
    token = settings.mcp.token.get_secret_value()
    serving.serve_http(server, settings.mcp.host, settings.mcp.port, token, _tell)


def _tell(address: str) -> None:
    click.echo(f"serving MCP at {address}", err=True)
