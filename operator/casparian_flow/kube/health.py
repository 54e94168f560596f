"""`/livez` and `/readyz` of the operator.

Alive: every part runs, and watches prove that they bring news. Not alive means that a new process
would do better, so what only waits (an API server that is away, a full disk) is no reason.
Ready: workers and commands are served.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from casparian_flow.domain.errors import ConflictError

log = logging.getLogger(__name__)

Check = Callable[[], str]
"""Returns what is wrong, "" if nothing is. It must not wait."""
ANSWER_S = 5.0


class HealthServer:
    """Answers 200 while no check of a path finds anything wrong, else 503 with what it is.

    Args:
        checks: by path, then by name.

    Raises:
        ConflictError: the port is in use or not ours to take.
    """

    def __init__(self, host: str, port: int, checks: Mapping[str, Mapping[str, Check]]) -> None:
        self._checks = checks
        try:
            self._server = ThreadingHTTPServer((host, port), self._handler())
        except OSError as error:
            raise ConflictError(
                f"cannot serve health on {host}:{port}: {error.strerror or error}",
                hint="Choose another [operator] health_port, or 0 for none.",
            ) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="health", daemon=True
        )
        self._thread.start()

    def answer(self, path: str) -> tuple[int, str]:
        """Status and text for a path."""
        checks = self._checks.get(path)
        if checks is None:
            return 404, "there are " + " and ".join(sorted(self._checks))
        wrong = {name: found for name, check in checks.items() if (found := check())}
        if wrong:
            return 503, "\n".join(f"{name}: {text}" for name, text in wrong.items())
        return 200, "ok"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            timeout = ANSWER_S

            def do_GET(self) -> None:
                status, text = outer.answer(self.path.partition("?")[0])
                body = f"{text}\n".encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's
                log.debug(format, *args)

        return Handler
