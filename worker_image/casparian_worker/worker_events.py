"""What goes into the worker's state machine and what comes out of it. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from casparian_flow.domain.errors import require
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import OutputEntry
from casparian_flow.protocol import messages as m


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker is and how patient it is.

    Attributes:
        worker_id: stable name, for people.
        nonce: fresh per process.
        root_id: id of the output root; only manifests staged there can be recovered here.
        slots: plugin processes at work at once.
        credit: most attempts accepted at once, at least `slots`.
        lookahead: attempts handed to the runner per slot, so that a slot need not wait for the
            next one between two short jobs.
        resend_s: how often unanswered requests are repeated.
        give_back_s: how long a job may wait behind the same long jobs before it is given back.
        starting_s: how long it may wait while a plugin's process is started, or its environment
            made.
        give_back_s_max: the pause between give-backs doubles up to this while nothing moves.
        drain_s: how long running jobs may take to end once a drain was asked for.
        drain_grace_s: how long the goodbye may take after that.
        publish_retry_s, publish_retry_s_max: first and longest pause between two attempts to
            publish to a sink that is not reachable.
        stage_listing_s: how often left-over stages are reported.
    """

    worker_id: str
    nonce: str
    root_id: str = ""
    slots: int = 1
    credit: int = 64
    lookahead: int = 4
    capabilities: tuple[str, ...] = ("*",)
    hostname: str = ""
    pid: int = 0
    version: str = ""
    sandbox: dict[str, str] = field(default_factory=dict)
    resend_s: float = 1.0
    give_back_s: float = 1.0
    starting_s: float = 10.0
    give_back_s_max: float = 60.0
    drain_s: float = 30.0
    drain_grace_s: float = 5.0
    publish_retry_s: float = 0.5
    publish_retry_s_max: float = 30.0
    stage_listing_s: float = 3600.0

    def __post_init__(self) -> None:
        require(self.slots >= 1, "a worker has at least one slot")
        require(self.credit >= self.slots, "credit is at least the number of slots")
        require(self.lookahead >= 1, "lookahead is at least 1")

    @property
    def handed_max(self) -> int:
        """Most attempts at the runner at once."""
        return self.slots * self.lookahead

    @property
    def held_max(self) -> int:
        """Most attempts held in all phases; acknowledgements may lag behind the credit."""
        return 4 * self.credit + 1024


# -- events -------------------------------------------------------------------------------------


@dataclass(slots=True)
class FromSentinel:
    """A well-formed message of the Sentinel; `job_id` is the header's."""

    job_id: int
    message: m.Message


@dataclass(slots=True)
class ConnectionRenewed:
    """The connection is a new one, of which the Sentinel knows nothing yet."""


@dataclass(slots=True)
class Began:
    """The plugin has begun on this attempt."""

    token: str


@dataclass(slots=True)
class Staged:
    """Every output is staged and durable; `conclusion` is what to say once it is published."""

    token: str
    entries: tuple[OutputEntry, ...]
    conclusion: m.Conclude


@dataclass(slots=True)
class Ended:
    """The attempt is over without outputs, or failed; its stages are deleted."""

    token: str
    conclusion: m.Conclude


@dataclass(slots=True)
class Stopped:
    """The attempt was stopped as asked, nothing of it is left."""

    token: str


@dataclass(slots=True)
class Published:
    """Every output of a granted attempt is at its place, the stages are gone."""

    token: str


@dataclass(slots=True)
class PublishFailed:
    """A sink did not take a granted output; `reason` is a domain.failures.Reason."""

    token: str
    message: str
    transient: bool
    reason: str = Reason.SINK


@dataclass(slots=True)
class StageListing:
    """The tokens of all stages that lie in the output root."""

    tokens: Sequence[str]


@dataclass(slots=True)
class TrialNews:
    """How a trial stands, or how it ended."""

    result: m.TrialResult


@dataclass(slots=True)
class Tick:
    """Time has passed; wanted every 100 ms or so."""


@dataclass(slots=True)
class Unsent:
    """There is no connection: what was to be sent just now was dropped."""


@dataclass(slots=True)
class DrainRequested:
    """Take nothing new, end what runs, then exit."""


Event = (
    FromSentinel
    | ConnectionRenewed
    | Began
    | Staged
    | Ended
    | Stopped
    | Published
    | PublishFailed
    | StageListing
    | TrialNews
    | Tick
    | Unsent
    | DrainRequested
)


# -- instructions -------------------------------------------------------------------------------


@dataclass(slots=True)
class Send:
    """Send to the Sentinel, or drop if there is no connection: what matters is repeated."""

    job_id: int
    message: m.Message


@dataclass(slots=True)
class StartJob:
    """Run the plugin and stage its outputs. Answered by exactly one of Staged, Ended, Stopped."""

    token: str
    job_id: int
    dispatch: m.Dispatch
    plugin: m.Plugin


@dataclass(slots=True)
class StopJob:
    """Stop this attempt, and no other. Answered as StartJob is."""

    token: str


@dataclass(slots=True)
class PublishOutputs:
    """Publish a granted manifest. Answered by Published or PublishFailed."""

    token: str
    entries: tuple[OutputEntry, ...]


@dataclass(slots=True)
class DeleteStages:
    """Delete whatever is staged under this token; not answered."""

    token: str
    entries: tuple[OutputEntry, ...] = ()


@dataclass(slots=True)
class ListStages:
    """Look for stages in the output root. Answered by StageListing."""


@dataclass(slots=True)
class ForgetPlugins:
    """Warm plugin processes that are not at work are to be replaced."""


@dataclass(slots=True)
class StartTrial:
    """Try a plugin version. Answered by TrialNews, the last of which is not `running`."""

    trial: m.Trial


@dataclass(slots=True)
class Reconnect:
    """Nothing was heard for a whole lease: make the connection anew."""


@dataclass(slots=True)
class Exit:
    """All is said and done."""


Instruction = (
    Send
    | StartJob
    | StopJob
    | PublishOutputs
    | DeleteStages
    | ListStages
    | ForgetPlugins
    | StartTrial
    | Reconnect
    | Exit
)
