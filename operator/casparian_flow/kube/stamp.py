"""Writes who decides an Approval, where the API server cannot do so itself.

From Kubernetes 1.34 the policy in admission/approval_stamp.yaml does it. On clusters that do not
serve such policies the API server asks this webhook instead, for this one resource. It only adds a
name and refuses nothing: the policy in admission/approval_guard.yaml judges, so that a webhook that
is wrong or missing lets nobody decide in another's name.

    python -m casparian_flow.kube.stamp --certificates FOLDER [--port 8443]
"""

import argparse
import base64
import json
import logging
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from casparian_flow.domain.errors import UsageError
from casparian_flow.logs import start_logging_from_environment

PATH = "/stamp"
PORT = 8443
BODY_BYTES_MAX = 3 << 20
"""The API server's own limit for an object."""
ANSWER_S = 10.0
"""Seconds that a caller may take for handshake and request."""
CERTIFICATE = "tls.crt"
PRIVATE_KEY = "tls.key"

log = logging.getLogger(__name__)


def answer(body: bytes) -> bytes:
    """The API server's question about one Approval, answered.

    Args:
        body: an AdmissionReview with a request, as JSON.

    Raises:
        UsageError: it is none.
    """
    try:
        review = json.loads(body)
        request = review["request"]
        uid, user = request["uid"], request["userInfo"]["username"]
        before, after = _spec(request.get("oldObject")), _spec(request.get("object"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError("this is no AdmissionReview of an update") from error
    response: dict[str, Any] = {"uid": uid, "allowed": True}
    if after.get("decision") and not before.get("decision"):
        patch = [{"op": "add", "path": "/spec/decidedBy", "value": user}]
        encoded = base64.b64encode(json.dumps(patch).encode()).decode("ascii")
        response |= {"patchType": "JSONPatch", "patch": encoded}
    reviewed = {"apiVersion": review["apiVersion"], "kind": "AdmissionReview", "response": response}
    return json.dumps(reviewed).encode()


def _spec(body: Mapping[str, Any] | None) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = (body or {}).get("spec") or {}
    return spec


class StampServer:
    """Serves `answer` by HTTPS on a thread of its own.

    Certificate and key are read for each connection, so that renewed ones are used at once;
    decisions are rare.

    Attributes:
        port: the one it listens on.
    """

    def __init__(self, folder: Path, port: int = PORT, host: str = "") -> None:
        """Begin to listen.

        Args:
            folder: holds `tls.crt` and `tls.key`, PEM.
            port: 0 takes any free one.

        Raises:
            UsageError: there is no usable certificate, or the address is taken.
        """
        context = partial(_context, folder)
        context()
        try:
            self._server = _Server((host, port), context)
        except OSError as error:
            raise UsageError(
                f"cannot listen on port {port}: {error.strerror}", hint="Choose another --port."
            ) from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="stamp", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def _context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / PRIVATE_KEY)
    except OSError as error:  # SSLError is one
        raise UsageError(
            f"{folder} holds no usable {CERTIFICATE} and {PRIVATE_KEY}: {error}",
            hint="Mount the Secret with the webhook's certificate there.",
        ) from error
    return context


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], context: Callable[[], ssl.SSLContext]) -> None:
        self._context = context
        super().__init__(address, _Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        # On the connection's own thread, so that a slow handshake holds up only itself.
        request.settimeout(ANSWER_S)
        with self._context().wrap_socket(request, server_side=True) as connection:
            _Handler(connection, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("%s broke off: %s", client_address, sys.exception())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = ANSWER_S

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        size = int(length) if length.isascii() and length.isdigit() and len(length) < 9 else -1
        if not 0 <= size <= BODY_BYTES_MAX:
            self._send(413, b"too large\n")
            return
        asked = self.rfile.read(size)
        if self.path.partition("?")[0] != PATH:
            self._send(404, b"not found\n")
            return
        try:
            self._send(200, answer(asked))
        except UsageError as error:
            self._send(400, f"{error}\n".encode())

    def do_GET(self) -> None:
        self._send(200 if self.path == "/healthz" else 404, b"\n")

    def _send(self, status: int, body: bytes) -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        log.debug(format, *args)


def main() -> None:
    """Serve until the pod ends."""
    parser = argparse.ArgumentParser(description="Write who decides an Approval.")
    parser.add_argument("--certificates", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--port", type=int, default=PORT)
    given = parser.parse_args()
    start_logging_from_environment()
    try:
        server = StampServer(given.certificates, given.port)
    except UsageError as error:
        raise SystemExit(error.with_hint()) from error
    log.info("stamping decisions on port %d", server.port)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    server.close()


if __name__ == "__main__":
    main()
