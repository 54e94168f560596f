"""What the broker knows of a worker process and of a job that one works on. Stdlib only."""

from dataclasses import dataclass, field
from typing import NamedTuple

from casparian_flow.domain.ids import Identity, JobId
from casparian_flow.domain.outputs import OutputEntry
from casparian_flow.domain.records import PluginSpec
from casparian_flow.sentinel.events import Cancel

ANY_PLUGIN = "*"


class Binding(NamedTuple):
    """The one plugin version that a worker's proof of who it is entitles it to."""

    plugin: str
    artifact_hash: str


@dataclass(slots=True)
class Worker:
    """One connected worker process."""

    identity: Identity
    worker_id: str
    nonce: str
    capabilities: frozenset[str]
    root_id: str
    slots: int
    credit: int
    window: float
    """Jobs it may hold now; grows with its speed up to `credit`."""
    since_us: int
    last_seen: float
    hostname: str = ""
    pid: int = 0
    version: str = ""
    status: str = "IDLE"
    batch: bool = False
    draining: bool = False
    blocked_until: float = 0.0
    held: set[JobId] = field(default_factory=set)
    specs: set[str] = field(default_factory=set)
    """Plugin specs it has been sent."""
    sandbox: dict[str, str] = field(default_factory=dict)
    done: int = 0
    bound: Binding | None = None
    """None: it is believed what its capabilities say."""
    revoked: bool = False
    """What it was entitled by is withdrawn: it ends what it holds and gets nothing more."""

    def free(self, now_mono: float) -> int:
        if self.leaving or now_mono < self.blocked_until:
            return 0
        return int(self.window) - len(self.held)

    @property
    def leaving(self) -> bool:
        """Whether it takes nothing new any more."""
        return self.draining or self.revoked

    def runs(self, plugin: str, artifact_hash: str) -> bool:
        """Whether it may be sent this plugin version."""
        if self.bound is not None:
            return self.bound == (plugin, artifact_hash)
        return ANY_PLUGIN in self.capabilities or plugin in self.capabilities

    def publishes(self, plugin: str) -> bool:
        """Whether it may be sent granted outputs of this plugin, of whichever version."""
        return self.bound is None or self.bound.plugin == plugin

    @property
    def load(self) -> float:
        """Jobs held per slot."""
        return len(self.held) / self.slots

    def adapt(self, turnaround_s: float, target_s: float) -> None:
        """Widen the window while jobs come back quickly, narrow it when they queue.

        The delay is the signal, as in TCP Vegas (Brakmo and Peterson, 1995).
        """
        if turnaround_s < target_s:
            self.window = min(self.window + 1.0, float(self.credit))
        elif turnaround_s > 2 * target_s:
            self.window = max(self.window * 0.75, float(self.slots))


@dataclass(slots=True)
class Lease:
    """Who works on a job, and until when that is believed without news."""

    owner: Identity | None
    """None: a granted job that nobody publishes at the moment."""
    expires: float
    since: float
    spec: PluginSpec | None
    granting: tuple[OutputEntry, ...] | None = None
    """The manifest while the ledger decides about the grant."""
    cancels: list[Cancel] = field(default_factory=list)
    """Cancel requests that wait for that decision."""
    stuck: str = ""
    """Why a granted job cannot be published; an operator decides (`job resolve`)."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One finished attempt, for the metrics."""

    plugin: str
    outcome: str
    seconds: float
