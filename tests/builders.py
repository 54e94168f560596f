"""Test data, stating only what matters to the test; everything else has a plain default."""

from collections.abc import Sequence
from typing import Any

from casparian_flow.domain.clock import Now
from casparian_flow.domain.ids import (
    Identity,
    JobId,
    LocationId,
    ManifestId,
    RootId,
    Token,
    VersionId,
)
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.outputs import (
    OutputEntry,
    OutputKind,
    SinkMode,
    SinkSpec,
    output_key,
    parse_sink_uri,
    sink_id,
    slice_key,
)
from casparian_flow.domain.records import Health, Job, LedgerState, PluginSpec

LEDGER_ID = "1edeadbe"
EPOCH = 3
ROOT_ID = "root-a"
WALL_US = 1_760_000_000_000_000


def at(seconds: float) -> Now:
    """A clock reading so many seconds after the test began."""
    return Now(seconds, WALL_US + int(seconds * 1e6))


def make_job(number: int, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "job_id": JobId(number),
        "plugin": "sales",
        "version_id": VersionId(number),
        "location_id": LocationId(number),
        "root_id": RootId(1),
        "root_path": "/data",
        "rel_path": f"file{number}.csv",
        "content_hash": f"{number:064x}",
        "size": 100,
        "signature": (1, number, 100, 5, 5),
        "version_seq": 1,
        "priority": 50,
    }
    return Job(**(fields | changes))


def make_spec(plugin: str = "sales", **changes: Any) -> PluginSpec:
    fields: dict[str, Any] = {
        "spec_id": f"spec-{plugin}",
        "plugin": plugin,
        "plugin_version": "1.0.0",
        "manifest_id": ManifestId(7),
        "artifact_hash": "a" * 64,
        "source_code": "…",
        "lockfile": "",
        "env_hash": "",
        "sinks": (SinkSpec(plugin, f"parquet://{plugin}"),),
        "parameters_hash": "p" * 64,
    }
    return PluginSpec(**(fields | changes))


def make_state(
    queued: Sequence[Job] = (),
    active: Sequence[Job] = (),
    plugins: Sequence[PluginSpec] | None = None,
    **changes: Any,
) -> LedgerState:
    fields: dict[str, Any] = {
        "ledger_id": LEDGER_ID,
        "epoch": EPOCH,
        "next_job_id": 1_000_000,
        "active": list(active),
        "queued": list(queued),
        "more_queued": False,
        "plugins": [make_spec()] if plugins is None else list(plugins),
        "health": list[Health](),
        "counts": dict[JobStatus, int](),
    }
    return LedgerState(**(fields | changes))


def make_entry(
    job: Job,
    *,
    n: int = 0,
    topic: str = "sales",
    uri: str = "parquet://sales",
    mode: SinkMode = SinkMode.APPEND,
    spec: PluginSpec | None = None,
    rows: int = 3,
) -> OutputEntry:
    """The manifest entry that an honest worker would stage for a leased job."""
    spec = spec or make_spec(job.plugin)
    sink = sink_id(parse_sink_uri(uri), ROOT_ID, mode)
    key = output_key(
        LEDGER_ID,
        job.version_id,
        spec.artifact_hash,
        spec.parameters_hash,
        topic,
        sink,
        job.generation,
    )
    return OutputEntry(
        n=n,
        topic=topic,
        kind=OutputKind.OUTPUT,
        uri=uri,
        mode=mode,
        root_id=ROOT_ID,
        output_key=key,
        slice_key=slice_key(LEDGER_ID, job.location_id, job.plugin, topic, sink),
        order_no=(job.version_seq, spec.manifest_id, job.generation),
        stage=f"{topic}/.stage/{job.token}.{n}",
        final=f"{topic}/{topic}-{key[:32]}.parquet",
        rows=rows,
        bytes=rows * 10,
        sha256="f" * 64,
    )


def identity(name: str) -> Identity:
    return Identity(name.encode())


def token(job: int, attempt: int = 1, epoch: int = EPOCH) -> Token:
    return Token(f"{LEDGER_ID}-{epoch}-{job}-{attempt}")
