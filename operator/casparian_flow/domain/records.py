"""What the broker asks the ledger to make durable, and what the ledger hands back at start.

A `Record` is one journal entry. A tick's records are committed together; nothing that depends on
them is sent before (docs/ARCHITECTURE.md, "Group commit").
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from casparian_flow.domain.errors import LedgerError
from casparian_flow.domain.ids import (
    Identity,
    JobId,
    LocationId,
    ManifestId,
    RootId,
    Token,
    VersionId,
)
from casparian_flow.domain.jobs import JobStatus, JournalKind
from casparian_flow.domain.outputs import OutputEntry, SinkSpec


@dataclass(slots=True)
class Job:
    """A job as the broker holds it; the ledger's row holds the same and more.

    Attributes:
        root_path, rel_path: where the bytes are, as text (domain/paths.py).
        content_hash: SHA-256 of the version, hex.
        signature: (dev, ino, size, mtime_ns, ctime_ns) when the version was recorded.
        version_seq: 1, 2, 3 … within the location; orders `replace`.
        overrides: sinks that replace the topic configuration for this job only, or None.
        not_before_us: wall clock, microseconds; 0 = at once.
        attempt: number of leases so far; the current one's while leased.
        token: of the current attempt, "" if never leased.
        owner: routing id of the leaseholder as hex, "" if none; informative after a restart.
        manifest: the granted outputs, only while STAGED.
        pin: code and parameters that alone may run it (PluginSpec.code); "" for the active ones.
        rehearsal: None for a job that publishes; else it never does, and its report holds at most
            so many rows of each topic.
    """

    job_id: JobId
    plugin: str
    version_id: VersionId
    location_id: LocationId
    root_id: RootId
    root_path: str
    rel_path: str
    content_hash: str
    size: int
    signature: tuple[int, int, int, int, int]
    version_seq: int
    priority: int
    generation: int = 0
    overrides: tuple[SinkSpec, ...] | None = None
    not_before_us: int = 0
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    retry_count: int = 0
    token: Token = Token("")
    owner: str = ""
    manifest_id: ManifestId = ManifestId(0)
    retry_of: JobId | None = None
    manifest: tuple[OutputEntry, ...] = ()
    created_us: int = 0
    losses: int = 0
    """Workers lost while they ran it, or that lacked its plugin; kept in memory only."""
    losses_unbegun: int = 0
    """Likewise, before they said that they had begun on it."""
    pin: str = ""
    rehearsal: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What one plugin run may use."""

    timeout_s: float = 300.0
    memory_mb: int = 2048
    pids: int = 64
    log_bytes: int = 65_536
    recycle_after: int = 1000
    """Files served by one warm process before it is replaced."""


@dataclass(frozen=True, slots=True)
class PluginSpec:
    """An active plugin version with its wiring: all that a worker needs beside the file.

    Attributes:
        spec_id: digest of everything below; equal ids mean equal specs.
        lockfile: text of uv.lock, "" to run in the worker's own environment.
        parameters_json: canonical JSON object handed to `configure`.
        manifest_json, envelope: what was signed with the source, and the signature; the envelope is
            "" where there is none.
        deployed_at_us: when the deploy was recorded, microseconds since the epoch.
        refused: why the version may not run, "" if it may, None if nobody has judged it; never
            sent to a worker.
    """

    spec_id: str
    plugin: str
    plugin_version: str
    manifest_id: ManifestId
    artifact_hash: str
    source_code: str
    lockfile: str
    env_hash: str
    sinks: tuple[SinkSpec, ...]
    parameters_json: str = "{}"
    parameters_hash: str = ""
    limits: Limits = field(default_factory=Limits)
    manifest_json: str = ""
    envelope: str = ""
    deployed_at_us: int = 0
    refused: str | None = None

    @property
    def code(self) -> str:
        """What would run: the artifact's hash and that of its parameters."""
        return f"{self.artifact_hash}/{self.parameters_hash}"


@dataclass(frozen=True, slots=True)
class Sample:
    """A file that an author ships with a plugin, so that it can be tried on something.

    Attributes:
        name: the plugin sees it under this name; one that domain.samples lets through.
    """

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class StagedVersion:
    """A plugin version that waits for its trial.

    Attributes:
        spec: with the sinks that its own MANIFEST declares.
    """

    spec: PluginSpec
    samples: tuple[Sample, ...] = ()


@dataclass(slots=True)
class Health:
    """A plugin's circuit breaker."""

    plugin: str
    consecutive_failures: int = 0
    paused: bool = False
    reason: str = ""


@dataclass(slots=True)
class Record:
    """One journal entry.

    `data` holds JSON-able fields by kind:
        LEASED    token, owner, manifest_id
        RETURNED  reason
        RETRIED   reason, message, not_before_us, retry_count
        GRANTED   (manifest below)
        COMPLETED completion, summary, metrics, report
        FAILED    reason, message, dead_letter (none for a rehearsal), report
        ABORTED   reason, message, by
        SKIPPED   reason, message
    """

    job_id: JobId
    kind: JournalKind
    attempt: int
    at_us: int
    data: dict[str, Any] | None = None
    manifest: tuple[OutputEntry, ...] = ()
    log: str = ""
    """Tail of the plugin's output, kept for `job logs`; "" keeps nothing."""


@dataclass(slots=True)
class HealthRecord:
    """A plugin's circuit breaker, written as it now stands."""

    health: Health
    at_us: int


@dataclass(slots=True)
class NewJob:
    """A job made by the broker (submit, retry, replay); becomes a row in the same commit."""

    job: Job
    config_overrides: str = ""


BatchItem = Record | HealthRecord | NewJob


@dataclass(frozen=True, slots=True)
class GrantOutcome:
    """The ledger's answer to one GRANTED record."""

    job_id: JobId
    token: Token
    refused: str = ""
    """A Reason value, or "" where granted."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """How one submitted commit ended, in the order of submission."""

    ticket: int
    outcomes: Sequence[GrantOutcome] = ()
    error: LedgerError | None = None


@dataclass(slots=True)
class LedgerState:
    """What the broker is rebuilt from: at start, and after a failed commit."""

    ledger_id: str
    epoch: int
    next_job_id: int
    active: list[Job]
    """Every DISPATCHING, RUNNING and STAGED job."""
    queued: list[Job]
    """The first page of QUEUED jobs, by priority then id; the rest is hydrated later."""
    more_queued: bool
    plugins: list[PluginSpec]
    health: list[Health]
    counts: dict[JobStatus, int]


__all__ = [
    "BatchItem",
    "Completion",
    "GrantOutcome",
    "Health",
    "HealthRecord",
    "Identity",
    "Job",
    "LedgerState",
    "Limits",
    "NewJob",
    "PluginSpec",
    "Record",
    "Sample",
    "StagedVersion",
]
