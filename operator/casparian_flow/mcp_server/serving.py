"""Serving over standard input and output, or over HTTP."""

import hmac
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio
import uvicorn
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from starlette.types import ASGIApp, Receive, Scope, Send

from casparian_flow.domain.errors import ConfigError

PATH: Final = "/mcp"
TOKEN_CHARS_MIN: Final = 32
BODY_BYTES_MAX: Final = 1 << 20
CONNECTIONS_MAX: Final = 64
log = logging.getLogger(__name__)
SdkServer = Server[dict[str, Any]]


def serve_stdio(server: SdkServer) -> None:
    """Serve one client until its end of the pipe closes."""

    async def serve() -> None:
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())

    anyio.run(serve)


def serve_http(
    server: SdkServer, host: str, port: int, token: str, listening: Callable[[str], None]
) -> None:
    """Serve clients at http://host:port/mcp until this process is asked to stop.

    Args:
        token: bearer token that every request must carry; "" asks for none.
        listening: told the address as soon as clients can connect.

    Raises:
        ConfigError: an address beyond this machine without a token, a token that could be
            guessed, or an address that cannot be taken.
    """
    check_exposure(host, token)
    listener = _listener(host, port)
    try:
        inner = server.streamable_http_app(
            streamable_http_path=PATH,
            json_response=True,
            stateless_http=True,
            max_request_body_size=BODY_BYTES_MAX,
            transport_security=_headers_checked(host),
        )
        config = uvicorn.Config(
            BearerToken(inner, token) if token else inner,
            log_config=None,
            access_log=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_graceful_shutdown=5,
            server_header=False,
            ws="none",
        )
        taken = listener.getsockname()[1]
        listening(f"http://{_in_url(host)}:{taken}{PATH}")
        anyio.run(_serve, uvicorn.Server(config), [listener])
    finally:
        listener.close()


def _headers_checked(host: str) -> TransportSecuritySettings:
    """Which Host and Origin requests may carry.

    On loopback only its own names: a page in a browser whose name was made to point here has
    another. Elsewhere the token, which no page has, does the same.
    """
    names = [f"{name}:*" for name in (_in_url(host), "127.0.0.1", "localhost", "[::1]")]
    return TransportSecuritySettings(
        enable_dns_rebinding_protection=is_loopback(host),
        allowed_hosts=names,
        allowed_origins=[f"http://{name}" for name in names],
    )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _serve(server: uvicorn.Server, sockets: Sequence[socket.socket]) -> None:
    await server.serve(sockets=list(sockets))


def check_exposure(host: str, token: str) -> None:
    """Raises:
    ConfigError: others than this machine's users could call without a sound token.
    """
    if token and (len(token) < TOKEN_CHARS_MIN or not token.isascii() or not token.isprintable()):
        raise ConfigError(
            f"the token wants at least {TOKEN_CHARS_MIN} printable ASCII characters",
            hint='Make one: python3 -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    if not token and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from elsewhere, and no token is set",
            hint="Set CASPARIAN_MCP__TOKEN, or serve on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(CONNECTIONS_MAX)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{host} port {port} cannot be taken: {error.strerror or error}",
            hint="Choose another with --port; 0 takes a free one.",
        ) from error
    return listener


class BearerToken:
    """Lets requests pass that carry the token; the others get 401 and nothing else."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = b"Bearer " + token.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._carried(scope):
            await self._app(scope, receive, send)
            return
        headers = [(b"www-authenticate", b"Bearer"), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _carried(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        # In constant time: how long a comparison takes must not tell how much of it is right.
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
