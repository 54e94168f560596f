"""What goes into the broker and what comes out of it. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from casparian_flow.domain.ids import Identity, JobId
from casparian_flow.domain.records import BatchItem, GrantOutcome, Job, PluginSpec
from casparian_flow.protocol.messages import Message

ReplyId = object
"""Opaque: the shell knows whom it stands for."""


@dataclass(slots=True)
class WorkerMessage:
    """A well-formed message of a worker; `job_id` is the header's."""

    identity: Identity
    job_id: int
    message: Message
    binding: tuple[str, str] | None = None
    """(plugin, artifact hash) that the worker has proved itself for; None where nobody is asked."""


@dataclass(slots=True)
class WorkerRevoked:
    """A worker's proof is withdrawn: it may end what it holds, and gets nothing more."""

    identity: Identity


@dataclass(slots=True)
class BadFrame:
    """Something on the workers' socket that is no message."""

    identity: Identity
    error: str


@dataclass(slots=True)
class Tick:
    """Time has passed: leases may have run out, delays may be over."""


@dataclass(slots=True)
class JobsAdded:
    """New QUEUED or PENDING jobs, already durable."""

    jobs: Sequence[Job]


@dataclass(slots=True)
class Hydrated:
    """A further page of the queue as it was at start."""

    jobs: Sequence[Job]
    more: bool


@dataclass(slots=True)
class PluginsChanged:
    """The active plugin specs, all of them, as they now are."""

    specs: Sequence[PluginSpec]


@dataclass(slots=True)
class GrantResult:
    """The ledger's answer to a GRANTED record; if it granted, the grant is durable."""

    outcome: GrantOutcome


@dataclass(slots=True)
class Cancel:
    """Stop a job if it is not granted yet. Replies {"outcome": cancelled|too_late|unknown}."""

    reply: ReplyId
    job_id: JobId
    by: str = ""


@dataclass(slots=True)
class AwaitJob:
    """Tell when a job has ended. Replies {"outcome": ended|waiting|unknown}, `waiting` when the
    time is over."""

    reply: ReplyId
    job_id: JobId
    timeout_s: float


@dataclass(slots=True)
class Resolve:
    """An operator's decision on a STAGED job. Replies {"outcome": resolved|not_staged}."""

    reply: ReplyId
    job_id: JobId
    forward: bool
    by: str = ""


@dataclass(slots=True)
class PausePlugin:
    """Lease no more jobs of a plugin. Replies {"outcome": paused}."""

    reply: ReplyId
    plugin: str
    reason: str


@dataclass(slots=True)
class ResumePlugin:
    """Close a plugin's circuit breaker. Replies {"outcome": resumed}."""

    reply: ReplyId
    plugin: str


@dataclass(slots=True)
class Drain:
    """Lease nothing any more; what runs may end."""


Event = (
    WorkerMessage
    | WorkerRevoked
    | BadFrame
    | Tick
    | JobsAdded
    | Hydrated
    | PluginsChanged
    | GrantResult
    | Cancel
    | AwaitJob
    | Resolve
    | PausePlugin
    | ResumePlugin
    | Drain
)


@dataclass(slots=True)
class Commit:
    """Make this durable. A lazy item rides along with the next commit that happens anyway."""

    item: BatchItem
    lazy: bool = False


@dataclass(slots=True)
class Send:
    """Send to a worker; with `after_commit`, once every commit asked for so far is durable."""

    identity: Identity
    job_id: int
    message: Message
    after_commit: bool = True


@dataclass(slots=True)
class Reply:
    """Answer a command, likewise once every commit asked for so far is durable."""

    reply: ReplyId
    result: dict[str, Any]


@dataclass(slots=True)
class Rescan:
    """A file's bytes are not its recorded version's; Scout should look at it."""

    root_id: int
    rel_path: str


@dataclass(slots=True)
class Hydrate:
    """Read the next page of QUEUED jobs after (priority, id) from the ledger."""

    after: tuple[int, int]


Instruction = Commit | Send | Reply | Rescan | Hydrate
