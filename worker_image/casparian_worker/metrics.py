"""The worker's Prometheus metrics, read from its counters when somebody asks."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from casparian_flow.domain.errors import UsageError
from casparian_worker.wire import WireCounts
from casparian_worker.worker_state import Phase, WorkerState

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
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


def serve_metrics(collector: Collector, port: int) -> Callable[[], None]:
    """Answer scrapes on a loopback port; returns what ends that.

    Raises:
        UsageError: the port is taken.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    try:
        server, thread = start_http_server(port, addr=LOOPBACK, registry=registry)
    except OSError as error:
        raise UsageError(
            f"cannot serve metrics on {LOOPBACK}:{port}: {error.strerror}",
            hint="Choose another --metrics-port, or 0 for none.",
        ) from error
    log.info("metrics on http://%s:%d/metrics", LOOPBACK, port)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(5)

    return stop
