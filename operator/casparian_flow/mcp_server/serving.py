"""Serving over standard input and output, or over HTTP."""

import hashlib
import hmac
import ipaddress
import logging
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import anyio
import anyio.to_thread
import uvicorn
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from starlette.types import ASGIApp, Receive, Scope, Send

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError, ConfigError, NotPermittedError

PATH: Final = "/mcp"
TOKEN_CHARS_MIN: Final = 32
BODY_BYTES_MAX: Final = 1 << 20
CONNECTIONS_MAX: Final = 64
CALLER: Final = "casparian.caller"
"""Key of a request's scope: who its token says it is."""
REVIEWED_S: Final = 30.0
"""How long what was said of a token counts; so long may one that was withdrawn go on."""
REVIEWED_MAX: Final = 1024
REVIEWED_CHARS_MAX: Final = 16_384
REVIEWS_MAX: Final = 8
"""Tokens under review at a time; further ones wait."""
log = logging.getLogger(__name__)
SdkServer = Server[dict[str, Any]]
Identify = Callable[[str], str | None]
"""Says whose a token is, None if nobody's; may take its time, and be called in several threads.
Raises NotPermittedError for somebody who may not call, another CasparianError if it cannot tell."""


def serve_stdio(server: SdkServer) -> None:
    """Serve one client until its end of the pipe closes."""

    async def serve() -> None:
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())

    anyio.run(serve)


def serve_http(
    server: SdkServer,
    host: str,
    port: int,
    guard: "Guard",
    listening: Callable[[str], None],
) -> None:
    """Serve clients at http://host:port/mcp until this process is asked to stop.

    Args:
        guard: who may call.
        listening: told the address as soon as clients can connect.

    Raises:
        ConfigError: an address that cannot be taken.
    """
    listener = _listener(host, port)
    try:
        inner = server.streamable_http_app(
            streamable_http_path=PATH,
            json_response=True,
            stateless_http=True,
            max_request_body_size=BODY_BYTES_MAX,
            transport_security=_headers_checked(host, guard),
        )
        config = uvicorn.Config(
            guard(inner),
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


def _headers_checked(host: str, guard: "Guard") -> TransportSecuritySettings:
    """Which Host and Origin requests may carry.

    On loopback only its own names: a page in a browser whose name was made to point here has
    another. Elsewhere the token, which no page has, does the same.
    """
    names = [f"{name}:*" for name in (_in_url(host), "127.0.0.1", "localhost", "[::1]")]
    return TransportSecuritySettings(
        enable_dns_rebinding_protection=is_loopback(host) and not isinstance(guard, ReviewedTokens),
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


Guard = Callable[[ASGIApp], ASGIApp]
"""Wraps what is served, so that only those reach it who may."""


def one_token(token: str, host: str) -> Guard:
    """Whoever has this token may call; "" lets everybody on this machine in.

    Raises:
        ConfigError: an address beyond this machine without a token, or a token that could be
            guessed.
    """
    check_exposure(host, token)
    return lambda inner: BearerToken(inner, token) if token else inner


def caller_of(request: object) -> str:
    """Who has sent a request; "" where nobody was asked to prove it."""
    scope = getattr(request, "scope", None)
    return str(scope.get(CALLER, "")) if isinstance(scope, dict) else ""


def _bearer(scope: Scope) -> bytes | None:
    """The token that a request carries, None for none, or several."""
    given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    if len(given) != 1 or not given[0].startswith(b"Bearer "):
        return None
    return bytes(given[0].removeprefix(b"Bearer "))


async def _refuse(
    send: Send, status: int, text: str = "", headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    body = text.encode()
    length = (b"content-length", str(len(body)).encode())
    kind = (b"content-type", b"text/plain; charset=utf-8")
    await send(
        {"type": "http.response.start", "status": status, "headers": [length, kind, *headers]}
    )
    await send({"type": "http.response.body", "body": body})


_ASK = (b"www-authenticate", b"Bearer")


class BearerToken:
    """Lets requests pass that carry the token; the others get 401 and nothing else."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = token.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._carried(scope):
            await self._app(scope, receive, send)
        else:
            await _refuse(send, 401, headers=[_ASK])

    def _carried(self, scope: Scope) -> bool:
        given = _bearer(scope)
        # In constant time: how long a comparison takes must not tell how much of it is right.
        return given is not None and hmac.compare_digest(given, self._expected)


class ReviewedTokens:
    """A guard that lets requests pass whose token is somebody's who may call, in that name.

    The others get 401 (whose it is cannot be told from it), 403 (who it is may not call), or 503
    (nobody can tell at present). What was said of a token is remembered for a short while, under
    its hash.
    """

    def __init__(self, identify: Identify, clock: Clock) -> None:
        self._identify = identify
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, str | None]] = OrderedDict()

    def __call__(self, app: ASGIApp) -> ASGIApp:
        limiter = anyio.CapacityLimiter(REVIEWS_MAX)

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await app(scope, receive, send)
                return
            try:
                caller = await self._caller(_bearer(scope), limiter)
            except NotPermittedError as error:
                await _refuse(send, 403, error.with_hint())
            except CasparianError as error:
                log.warning("a caller's token could not be reviewed: %s", error.with_hint())
                await _refuse(send, 503, "tokens cannot be reviewed at present")
            else:
                if caller is None:
                    await _refuse(send, 401, headers=[_ASK])
                else:
                    await app({**scope, CALLER: caller}, receive, send)

        return guarded

    async def _caller(self, token: bytes | None, limiter: anyio.CapacityLimiter) -> str | None:
        if not token or len(token) > REVIEWED_CHARS_MAX or not token.isascii():
            return None
        digest, mono = hashlib.sha256(token).digest(), self._clock.now().mono
        known = self._known.get(digest)
        if known is not None and known[0] > mono:
            return known[1]
        found = await anyio.to_thread.run_sync(
            partial(self._identify, token.decode("ascii")), limiter=limiter
        )
        self._known[digest] = (mono + REVIEWED_S, found)
        self._known.move_to_end(digest)
        while len(self._known) > REVIEWED_MAX:
            self._known.popitem(last=False)
        return found
