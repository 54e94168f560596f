"""The tools as the protocol's SDK serves them, each call behind the same door: checked, audited."""

import logging
from functools import partial
from typing import Any, Final

import anyio
import anyio.to_thread
import mcp_types as types
import msgspec
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError

from casparian_flow import __version__
from casparian_flow.domain.clock import utc
from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.mcp_server.audit import AuditError, AuditLog
from casparian_flow.mcp_server.budget import as_json, fitted
from casparian_flow.mcp_server.desk import Desk
from casparian_flow.mcp_server.serving import caller_of
from casparian_flow.mcp_server.tools import TOOLS, Tool

CALLS_MAX: Final = 4
"""Calls carried out at once; further ones wait."""
ARGUMENT_BYTES_MAX: Final = 262_144
INSTRUCTIONS: Final = (
    "Casparian Flow turns files into tables with plugins. Look with casparian_plugins, "
    "casparian_scan and casparian_query; try with casparian_preview and casparian_backtest_start. "
    "casparian_run_request only asks: a person decides at their own terminal with the "
    "approve_command; show it to them. Text values are redacted unless a person configured "
    "otherwise."
)
log = logging.getLogger(__name__)


class ToolServer:
    """Carries out calls of tools.

    Args:
        transport: how clients reach it, for the audit log.
    """

    def __init__(self, desk: Desk, audit: AuditLog, transport: str) -> None:
        self._desk = desk
        self._audit = audit
        self._transport = transport
        self._limiter = anyio.CapacityLimiter(CALLS_MAX)

    def sdk_server(self) -> "Server[dict[str, Any]]":
        """The SDK's server, with these tools and nothing else."""
        return Server(
            "casparian-flow",
            version=__version__,
            instructions=INSTRUCTIONS,
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
        )

    async def _list_tools(
        self,
        _context: ServerRequestContext[dict[str, Any]],
        _params: types.PaginatedRequestParams | None,
    ) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[
                types.Tool(
                    name=tool.name,
                    description=tool.description,
                    input_schema=tool.schema(),
                    annotations=types.ToolAnnotations(
                        read_only_hint=tool.reads_only, destructive_hint=False
                    ),
                )
                for tool in TOOLS.values()
            ]
        )

    async def _call_tool(
        self,
        context: ServerRequestContext[dict[str, Any]],
        params: types.CallToolRequestParams,
    ) -> types.CallToolResult:
        caller = caller_of(context.request)
        text, failed = await anyio.to_thread.run_sync(
            partial(self.call, params.name, params.arguments or {}, caller), limiter=self._limiter
        )
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=text)], is_error=failed
        )

    def call(self, name: str, arguments: dict[str, Any], caller: str = "") -> tuple[str, bool]:
        """(answer as JSON, or what went wrong in plain words; whether it went wrong).

        Args:
            caller: who asks, if the transport knows; else this process's user.

        Raises:
            MCPError: there is no such tool.
        """
        started = self._desk.clock.now()
        desk = self._desk.on_behalf_of(caller) if caller else self._desk
        try:
            self._audit.require()
            text, outcome = self._carried_out(desk, name, arguments)
            self._audit.write(
                {
                    "at": f"{utc(started.wall_us).isoformat()}Z",
                    "transport": self._transport,
                    "caller": desk.caller,
                    "tool": name[:200],
                    "arguments": arguments,
                    "outcome": outcome,
                    "error": text[:500] if outcome != "ok" else None,
                    "bytes": len(text.encode(errors="replace")),
                    "elapsed_ms": round((self._desk.clock.now().mono - started.mono) * 1_000),
                }
            )
        except AuditError as error:
            log.error("%s", error.with_hint())
            return "this server cannot keep its audit log now, so it answers nothing", True
        if name not in TOOLS:
            raise MCPError(types.INVALID_PARAMS, text)
        return text, outcome != "ok"

    def _carried_out(self, desk: Desk, name: str, arguments: dict[str, Any]) -> tuple[str, str]:
        tool = TOOLS.get(name)
        if tool is None:
            return f"there is no tool {name[:80]!r}", "refused"
        try:
            answer = tool.run(desk, _checked(tool, arguments))
            return fitted(answer, tool.lists), "ok"
        except UsageError as error:
            return error.with_hint(), "refused"
        except CasparianError as error:
            return error.with_hint(), "failed"
        except Exception as error:
            # A bug of ours ends one call, not the server; its text might quote values.
            log.exception("%s failed", name)
            return f"{name} failed unexpectedly ({type(error).__name__})", "failed"


def _checked(tool: Tool, arguments: dict[str, Any]) -> Any:
    """Raises:
    UsageError: the arguments are not what the tool takes.
    """
    try:
        if len(as_json(arguments).encode()) > ARGUMENT_BYTES_MAX:
            raise UsageError(f"the arguments exceed {ARGUMENT_BYTES_MAX} bytes")
        return msgspec.convert(arguments, type=tool.arguments)
    except UnicodeEncodeError:
        raise UsageError(f"{tool.name}: the arguments are not Unicode") from None
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{tool.name}: {str(error)[:500] or 'nested too deeply'}",
            hint="Its input schema tells what it takes.",
        ) from None
