"""The Sentinel's Prometheus metrics; docs/metrics.md lists them.

The hot path adds to plain integers; Prometheus' own objects are made only when somebody scrapes.
What would need a look into the broker is laid out by the loop once a second (`Gauges`), so that
the HTTP thread never reads a structure that the loop is changing.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from casparian_flow.domain.errors import ConflictError
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.sentinel.broker import Observation
from casparian_flow.sentinel.core import SentinelCore

LOOPBACK = "127.0.0.1"
PLUGINS_MAX = 1000
"""Plugins with a histogram of their own; the rest share one named OTHER."""
OTHER = "(other)"

COUNTERS: dict[str, str] = {
    "jobs_dispatched": "Jobs leased and sent to a worker.",
    "jobs_completed": "Jobs whose outputs are all published, or that had none.",
    "jobs_failed": "Jobs that gave up and became dead letters.",
    "jobs_aborted": "Jobs cancelled before their grant.",
    "jobs_skipped": "Jobs not done on purpose (source changed, superseded, duplicate).",
    "jobs_rejected": "Jobs that a worker gave back undone.",
    "jobs_requeued": "Jobs taken back from a worker that was lost.",
    "jobs_retried": "Failed attempts that will run again.",
    "jobs_granted": "Grants: from here on a job can only be completed.",
    "jobs_recovered": "Granted jobs handed to another worker to publish.",
    "jobs_stuck": "Granted jobs whose sink refused for good.",
    "late_conclusions": "Conclusions of attempts no longer current; they changed nothing.",
    "plugins_paused": "Times a circuit breaker paused a plugin.",
    "connections_refused": "Connections refused for their keys.",
    "workers_refused": "IDENTIFY messages refused for their keys or tokens.",
    "messages_foreign": "Messages under another worker's routing id; dropped.",
    "foreign_tokens": "Messages about jobs of another plugin version than the worker's own.",
    "workers_registered": "Worker processes that identified themselves.",
    "workers_cleaned_up": "Workers forgotten after a lease's time without a word.",
    "worker_errors": "ERR messages received from workers.",
    "messages_sent": "Messages sent to workers.",
    "messages_received": "Messages received on the workers' socket, malformed ones included.",
    "messages_dropped": "Messages not sent because the worker was gone or did not read.",
    "protocol_errors": "Malformed, unexpected or refused messages.",
    "db_errors": "Commits that failed.",
}
"""Name without `casparian_` and `_total` → help. Names of earlier versions are kept."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
JOB_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
RECORDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)


class Histogram:
    """Counts per bucket; `observe` takes less than a microsecond."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        rows: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            rows.append((bound, running))
        return rows


@dataclass(frozen=True, slots=True)
class Gauges:
    """The state of the moment, replaced as a whole."""

    queue: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(plugin, status) → jobs."""
    workers: int = 0
    paused: int = 0
    ledger_up: bool = False
    counters: Mapping[str, int] = field(default_factory=dict)
    """The broker's counters."""


class SentinelMetrics(Collector):
    """All metrics of one Sentinel, in a registry of their own."""

    def __init__(self) -> None:
        self.gauges = Gauges()
        self.commit_records = Histogram(RECORDS)
        self.commit_seconds = Histogram(SECONDS)
        self.dispatch_seconds = Histogram(SECONDS)
        self.conclude_seconds = Histogram(SECONDS)
        self._jobs: dict[tuple[str, str], Histogram] = {}
        self._own: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter that the shell keeps; the broker's come with the gauges."""
        self._own[name] += by

    def observe_jobs(self, observations: Iterable[Observation]) -> None:
        for seen in observations:
            key = (seen.plugin, seen.outcome)
            histogram = self._jobs.get(key)
            if histogram is None:
                known = len(self._jobs) < PLUGINS_MAX
                key = key if known else (OTHER, seen.outcome)
                histogram = self._jobs.setdefault(key, Histogram(JOB_SECONDS))
            histogram.observe(seen.seconds)

    def collect(self) -> Iterator[Metric]:
        gauges = self.gauges
        for name, text in COUNTERS.items():
            value = gauges.counters.get(name, 0) + self._own[name]
            yield CounterMetricFamily(f"casparian_{name}", text, value=value)
        depth = GaugeMetricFamily(
            "casparian_queue_depth", "Jobs not yet ended.", labels=["plugin", "status"]
        )
        for (plugin, status), jobs in sorted(gauges.queue.items()):
            depth.add_metric([plugin, status], jobs)
        yield depth
        yield GaugeMetricFamily(
            "casparian_workers", "Workers connected and identified.", value=gauges.workers
        )
        yield GaugeMetricFamily(
            "casparian_plugins_paused", "Plugins now paused.", value=gauges.paused
        )
        yield GaugeMetricFamily(
            "casparian_ledger_up", "1 while the ledger takes commits.", value=int(gauges.ledger_up)
        )
        yield from self._histograms()

    def _histograms(self) -> Iterator[Metric]:
        jobs = HistogramMetricFamily(
            "casparian_job_duration_seconds",
            "From lease to conclusion of one attempt.",
            labels=["plugin", "outcome"],
        )
        for (plugin, outcome), histogram in sorted(self._jobs.copy().items()):
            jobs.add_metric([plugin, outcome], histogram.buckets(), histogram.total)
        yield jobs
        for name, text, histogram in (
            ("dispatch_time_seconds", "From lease to DISPATCH.", self.dispatch_seconds),
            ("conclude_time_seconds", "From CONCLUDE to CONCLUDE_ACK.", self.conclude_seconds),
            ("commit_duration_seconds", "Of one commit, with its wait.", self.commit_seconds),
            ("commit_batch_records", "Records in one commit.", self.commit_records),
        ):
            family = HistogramMetricFamily(f"casparian_{name}", text)
            family.add_metric([], histogram.buckets(), histogram.total)
            yield family


def gauges_of(core: SentinelCore[Any]) -> Gauges:
    """The state of the moment; for the loop's thread. Costs a look at each lease."""
    broker = core.broker
    queue: Counter[tuple[str, str]] = Counter()
    for plugin, ready in broker.queue.depth().items():
        queue[plugin, JobStatus.QUEUED.value] += ready
    for job_id in broker.leases:
        job = broker.jobs[job_id]
        queue[job.plugin, job.status.value] += 1
    return Gauges(
        queue,
        len(broker.workers),
        sum(lane.health.paused for lane in broker.queue.lanes.values()),
        core.ready,
        dict(broker.counters),
    )


def serve(metrics: SentinelMetrics, port: int, host: str = LOOPBACK) -> WSGIServer:
    """Serve the metrics over HTTP in a thread of their own.

    Raises:
        ConflictError: the port is in use or not ours to take.
    """
    try:
        server, _ = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise ConflictError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}",
            hint="Choose another --metrics-port, or 0 for none.",
        ) from error
    return server
