"""The worker's Prometheus metrics and its health, found out when somebody asks."""

import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Thread
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from casparian_flow.domain.errors import UsageError
from casparian_worker.wire import WireCounts
from casparian_worker.worker_state import Phase, WorkerState

log = logging.getLogger(__name__)

COUNTERS: Mapping[str, str] = {
    "jobs_received": "Jobs dispatched to this worker.",
    "jobs_completed": "Jobs that ended well and were reported.",
    "jobs_failed": "Jobs that failed here.",
    "jobs_skipped": "Jobs whose source had changed or gone.",
    "jobs_rejected": "Jobs given back unrun.",
    "jobs_aborted": "Jobs stopped on request.",
    "jobs_refused": "Staged jobs that the Sentinel did not grant.",
    "jobs_recovered": "Jobs of other workers that were published here.",
    "bridge_executions": "Runs that a plugin began.",
    "bridge_timeouts": "Runs stopped because they took too long.",
    "parquet_files_written": "Parquet files put in place.",
    "parquet_rows_written": "Rows in them.",
    "outputs_published": "Outputs put in place, by kind of sink.",
    "rows_published": "Rows in them, by kind of sink.",
    "messages_sent": "Messages sent to the Sentinel.",
    "messages_received": "Messages received from the Sentinel.",
    "messages_dropped": "Messages not sent because there was no connection.",
    "requests_repeated": "STAGE and CONCLUDE messages said again for want of an answer.",
    "protocol_errors": "Messages of the Sentinel that break the grammar or come out of turn.",
}
"""Name (between `casparian_worker_` and `_total`) and meaning of each counter."""
JOBS_HELD = "casparian_worker_jobs_held"
BY_SCHEME = {"outputs_published": "_files", "rows_published": "_rows"}


class WorkerCollector(Collector):
    """Turns the counters of state machine, wire and runner into metrics at each scrape."""

    def __init__(
        self,
        state: WorkerState,
        wire: WireCounts,
        runner: Callable[[], Counter[str]],
    ) -> None:
        self._state = state
        self._wire = wire
        self._runner = runner

    def collect(self) -> Iterable[Metric]:
        work = self._runner()
        values = self._values(work)
        for name, meaning in COUNTERS.items():
            full = f"casparian_worker_{name}"
            if name in BY_SCHEME:
                family = CounterMetricFamily(full, meaning, labels=["scheme"])
                for key, value in sorted(work.items()):
                    if key.endswith(BY_SCHEME[name]):
                        family.add_metric([key.removesuffix(BY_SCHEME[name])], value)
                yield family
            else:
                yield CounterMetricFamily(full, meaning, value=values[name])
        held = GaugeMetricFamily(JOBS_HELD, "Jobs held now, by phase.", labels=["phase"])
        phases = Counter(attempt.phase for attempt in list(self._state.attempts.values()))
        for phase in Phase:
            held.add_metric([phase.lower()], phases[phase])
        yield held

    def _values(self, work: Counter[str]) -> dict[str, int]:
        jobs, wire = self._state.counts, self._wire
        return {
            "jobs_received": jobs.received,
            "jobs_completed": jobs.completed,
            "jobs_failed": jobs.failed,
            "jobs_skipped": jobs.skipped,
            "jobs_rejected": jobs.rejected,
            "jobs_aborted": jobs.aborted,
            "jobs_refused": jobs.refused,
            "jobs_recovered": jobs.recovered,
            "bridge_executions": work["executions"],
            "bridge_timeouts": work["timeouts"],
            "parquet_files_written": work["parquet_files"],
            "parquet_rows_written": work["parquet_rows"],
            "messages_sent": wire.messages_sent,
            "messages_received": wire.messages_received,
            "messages_dropped": wire.sends_dropped,
            "requests_repeated": jobs.resent,
            "protocol_errors": wire.protocol_errors + jobs.unexpected,
        }


@dataclass(frozen=True, slots=True)
class Health:
    """What probes are told; each gives a problem in words, "" for none.

    Attributes:
        live: whether the process should go on.
        ready: whether it can take jobs now.
    """

    live: Callable[[], str]
    ready: Callable[[], str]


def serve_metrics(
    collector: Collector, host: str, port: int, health: Health
) -> tuple[int, Callable[[], None]]:
    """Answer GET of /metrics, /healthz and /readyz.

    Returns:
        The port, and what ends it.

    Raises:
        UsageError: the address cannot be used.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {
        "/metrics": lambda: (200, CONTENT_TYPE_LATEST, generate_latest(registry)),
        "/healthz": lambda: _told(health.live()),
        "/readyz": lambda: _told(health.ready()),
    }
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server_type = type("_Server", (_Server,), {"address_family": family})
    try:
        server = server_type((host, port), partial(_Handler, pages))
    except OSError as error:
        raise UsageError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}",
            hint="Choose another --metrics-port, or 0 for none, or another [worker] metrics_host.",
        ) from error
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("metrics on http://%s:%d/metrics", host, server.server_port)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return server.server_port, stop


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that keeps its connection must not keep the worker

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the resolver for this machine's name, however long it takes.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0
    """Seconds that a client may take for its request."""

    def __init__(
        self,
        pages: Mapping[str, Callable[[], tuple[int, str, bytes]]],
        *connection: Any,
    ) -> None:
        self._pages = pages
        super().__init__(*connection)

    def do_GET(self) -> None:
        page = self._pages.get(self.path.partition("?")[0])
        status, kind, body = page() if page else (404, "text/plain", b"not found\n")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        log.debug(format, *args)


def _told(problem: str) -> tuple[int, str, bytes]:
    body = f"{problem or 'ok'}\n".encode()
    return (503 if problem else 200), "text/plain; charset=utf-8", body
