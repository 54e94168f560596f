"""The messages, one dataclass an op. Standard library only, so that the broker may use them.

Direction is in each docstring: W is the worker, S the Sentinel, C the command line. Unknown JSON
fields are ignored by the codec, missing ones without a default are refused.
"""

from dataclasses import dataclass, field
from typing import Any

from casparian_flow.domain.outputs import OutputEntry, SinkSpec
from casparian_flow.domain.records import Limits, Sample


@dataclass(slots=True)
class Identify:
    """W→S: who I am and what I hold. Repeated whenever the Sentinel says it does not know me.

    Attributes:
        worker_id: stable name, for people.
        nonce: fresh per process; a new nonce under an old routing id is a restarted worker.
        capabilities: plugin names, or ["*"].
        held: tokens of everything the worker still works on: queued, running, staged, granted,
            or concluded and not yet acknowledged.
        root_id: id of the output root it writes to.
        slots: jobs it runs at once.
        credit: most jobs it accepts outstanding, at least `slots`.
        batch: whether it reads BATCH.
        sandbox: name → "applied", or why not.
        token: by which its pod proves which one it is; "" where nobody asks.
    """

    worker_id: str
    nonce: str
    capabilities: list[str] = field(default_factory=lambda: ["*"])
    held: list[str] = field(default_factory=list)
    root_id: str = ""
    slots: int = 1
    credit: int = 1
    hostname: str = ""
    pid: int = 0
    version: str = ""
    batch: bool = False
    sandbox: dict[str, str] = field(default_factory=dict)
    token: str = field(default="", repr=False)


@dataclass(slots=True)
class Welcome:
    """S→W: answer to IDENTIFY."""

    ledger_id: str
    epoch: int
    heartbeat_s: float
    lease_ttl_s: float
    batch: bool


@dataclass(slots=True)
class Plugin:
    """S→W: a plugin spec, sent once per worker before the first DISPATCH that names it.

    Attributes:
        manifest_json, envelope: what was signed with source and lockfile, and the signature.
        deployed_at_us: when the Sentinel recorded the deploy; keys are judged by it.
    """

    spec_id: str
    plugin_name: str
    plugin_version: str
    artifact_hash: str
    source_code: str
    lockfile: str
    env_hash: str
    sinks: tuple[SinkSpec, ...]
    parameters_json: str
    parameters_hash: str
    limits: Limits
    manifest_json: str = ""
    envelope: str = ""
    deployed_at_us: int = 0


@dataclass(slots=True)
class Trial:
    """S→W: load this plugin version and run it over its samples, without writing anything.

    Repeated until its end is told.

    Attributes:
        trial_id: names this try and no other.
        samples: with none, that the plugin loads is all that is tried.
    """

    trial_id: str
    plugin: Plugin
    samples: tuple[Sample, ...] = ()


@dataclass(slots=True)
class TrialResult:
    """W→S: how a trial stands, or how it ended.

    Attributes:
        outcome: a domain.wiring.TrialOutcome.
        reason: a domain.failures.Reason for `failed` and `again`.
        message: what went wrong; what is being done, for `running`.
        rows: of each topic, for `passed`.
        log: tail of what the plugin printed.
    """

    trial_id: str
    outcome: str
    reason: str = ""
    message: str = ""
    rows: dict[str, int] = field(default_factory=dict)
    log: str = ""


@dataclass(slots=True)
class Dispatch:
    """S→W: run this file version. The job id is in the header.

    Attributes:
        file_path: absolute, as text (domain/paths.py).
        signature: (dev, ino, size, mtime_ns, ctime_ns) recorded with the version.
        order_no: (version seq, manifest id, generation), which orders `replace`.
        sinks: replaces the spec's sinks for this job, or None.
        rehearsal: None to publish; else nothing is staged, and the report of CONCLUDE may hold so
            many rows of each topic.
    """

    token: str
    attempt: int
    spec_id: str
    plugin_name: str
    file_path: str
    file_version_id: int
    location_id: int
    content_hash: str
    signature: tuple[int, int, int, int, int]
    order_no: tuple[int, int, int]
    sinks: tuple[SinkSpec, ...] | None = None
    rehearsal: int | None = None


@dataclass(slots=True)
class DispatchAck:
    """W→S: the plugin has begun on this job."""

    token: str


@dataclass(slots=True)
class Abort:
    """S→W: stop the attempt with this token, and no other."""

    token: str
    reason: str = ""


@dataclass(slots=True)
class Heartbeat:
    """Both ways. W→S: status IDLE, BUSY or DRAINING, and what is held. S→W: status ALIVE."""

    status: str
    held: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Stage:
    """W→S: everything is staged and durable; may I publish? Repeated until answered."""

    token: str
    entries: tuple[OutputEntry, ...]


@dataclass(slots=True)
class Grant:
    """S→W: the commit is granted to this token; publish."""

    token: str


@dataclass(slots=True)
class Refuse:
    """S→W: not granted; delete your stages. `reason` is a domain.failures.Reason."""

    token: str
    reason: str
    message: str = ""


@dataclass(slots=True)
class Conclude:
    """W→S: how the attempt ended. Repeated until CONCLUDE_ACK.

    After a GRANT, FAILED means that the sink refuses for good: the job stays STAGED, shown in
    `status`, until an operator resolves it.

    Attributes:
        status: SUCCESS, PARTIAL_SUCCESS, COMPLETED_WITH_WARNINGS, FAILED, REJECTED, ABORTED or
            SKIPPED.
        reason: a domain.failures.Reason, for all but the first three.
        transient: overrides the reason's rule where the plugin knows better; None = the rule.
        log: tail of the plugin's output.
        report: what the rows were like (http_types.RowsReport); "" for nothing to tell.
    """

    token: str
    status: str
    reason: str = ""
    error_message: str = ""
    transient: bool | None = None
    metrics: dict[str, int] = field(default_factory=dict)
    log: str = ""
    report: str = ""


@dataclass(slots=True)
class ConcludeAck:
    """S→W: these conclusions are durable."""

    tokens: list[str]


@dataclass(slots=True)
class Recover:
    """S→W: another worker staged this and was granted it; publish it in its place."""

    token: str
    entries: tuple[OutputEntry, ...]


@dataclass(slots=True)
class Err:
    """Both ways: what was wrong with a message.

    Attributes:
        code: `unknown_worker`, `malformed`, `unexpected` or `refused`.
    """

    message: str
    code: str = "unexpected"


@dataclass(slots=True)
class Reload:
    """S→W: forget cached plugin specs and warm processes. C→S: read the wiring anew."""


@dataclass(slots=True)
class Deploy:
    """C→S: store this plugin version and wire it. `bundle` is a `.casparian` file's content."""

    bundle: bytes


@dataclass(slots=True)
class Ack:
    """S→C: the outcome of DEPLOY."""

    success: bool
    message: str
    plugin_id: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Stages:
    """W→S: tokens whose stages lie in my output root; which may go?"""

    tokens: list[str]


@dataclass(slots=True)
class Discard:
    """S→W: the stages of these tokens may be deleted."""

    tokens: list[str]


Message = (
    Identify
    | Welcome
    | Plugin
    | Dispatch
    | DispatchAck
    | Abort
    | Heartbeat
    | Stage
    | Grant
    | Refuse
    | Conclude
    | ConcludeAck
    | Recover
    | Err
    | Reload
    | Deploy
    | Ack
    | Stages
    | Discard
    | Trial
    | TrialResult
)
