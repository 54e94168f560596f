"""What the plugin host is asked and what it answers: plain data.

The runner drives one `PluginHost` (plugin_host.py) per slot and plugin version:

    runtime = PluginRuntime(scratch_root=…, cache_root=…, policy=SandboxPolicy())
    host = runtime.host(plugin, slot=0)              # cheap: the process starts with the first job
    source = runtime.source(slot=0, path=…, content_hash=…, size=…)   # may raise SourceError
    request = RunRequest(key=token, path=source.path, in_place=source.in_place, …)

    for event in host.run(request):                  # one job at a time
        match event:
            case Started():            ...           # send DISPATCH_ACK
            case Batch(topic=topic, batch=batch): ...   # validate, stage
            case Finished():           source.verify(); ...
            case Failed():             ...           # reason, message, transient, log_tail
    source.close()

For many small files keep several in flight, so that the plugin never waits for the worker:

    host.submit(first); host.submit(second)          # any thread; up to host.depth are sent ahead
    while host.in_flight:
        event = host.next_event(timeout_s=1.0)       # None: nothing happened; event.key says whose

The events of one job come in order and never mix with another's: Started, Batch…, then exactly
one Finished or Failed. A crash is charged to the job that had started; those behind it are run
again in a fresh process by the host itself, and their Started comes only then. `host.cancel(key)`
may be called from any thread and ends that job with Failed(CANCELLED) at once.
"""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.failures import Reason


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One file to hand to the plugin.

    Attributes:
        key: names the job in every event and in `cancel`; the attempt's token.
        path: what the plugin opens (`Source.path`), as Python's os functions take it; "" to have
            it loaded and configured, and no more. Such a job has no Started.
        file_version_id: reaches the plugin as `FileEvent.file_id`.
        in_place: the path is the source itself, outside the scratch folder; such a job gets a
            process of its own, since a sandbox cannot be widened once it is in force.
        metadata: reaches the plugin as `FileEvent.metadata`; JSON-able, small.
        timeout_s: replaces the plugin's own limit, or None.
    """

    key: str
    path: str
    file_version_id: int = 0
    in_place: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The plugin has begun on this job."""

    key: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows the plugin published: at most BATCH_ROWS_MAX, possibly none (a topic without rows)."""

    key: str
    topic: str
    batch: pa.RecordBatch


@dataclass(frozen=True, slots=True)
class Finished:
    """The plugin is done with this job; every batch has been delivered."""

    key: str
    rows: int
    batches: int
    log_tail: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job failed.

    Attributes:
        transient: None = as the reason's rule says.
        log_tail: the last `limits.log_bytes` of what the plugin printed during the job.
    """

    key: str
    reason: Reason
    message: str
    transient: bool | None = None
    log_tail: str = ""


Event = Started | Batch | Finished | Failed


class LaunchError(CasparianError):
    """The plugin's process cannot even be prepared.

    Attributes:
        reason: ENVIRONMENT, SANDBOX, UNTRUSTED or PLUGIN_INVALID.
        transient: whether a later try may succeed; None = as the reason's rule says.
    """

    def __init__(
        self, message: str, *, reason: Reason, transient: bool | None = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.transient = transient
