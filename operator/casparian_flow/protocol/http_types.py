"""Jobs, events and approvals of the control plane API: their words, fields and JSON.

One place for each of them. An event type is one class inside `EventType`, a job's field one line
of `Job`: the codec, the ledger's columns and the CHECKs on them follow (db/api_tables.py).

JSON names an operation or an event by its "type", as in `{"type": "phase", "name": "scan"}`.
Times are RFC 3339 in UTC. Optional fields of jobs and approvals that have no value are left out;
those of events are null.
"""

import functools
import hashlib
import operator
import uuid
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import msgspec

COUNT_MAX: Final = 2**63 - 1
NAME_CHARS_MAX: Final = 255
TEXT_CHARS_MAX: Final = 16_384
PAYLOAD_BYTES_MAX: Final = 1 << 20
"""Of one event, operation or result as JSON."""

Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_CHARS_MAX)]
Contract = Annotated[str, msgspec.Meta(max_length=262_144)]
"""JSON text of what the rows of a topic must look like."""


class HttpJobType(StrEnum):
    """What an API job does with the files of its folder."""

    RUN = "run"
    """Every file through the plugin, rows to the sink."""
    BACKTEST = "backtest"
    """Every file through the plugin, nothing written; tells which rows break the contract."""
    PREVIEW = "preview"
    """Some rows of some files, nothing written."""

    # The names of other languages' clients and of printed examples.
    Run = RUN
    Backtest = BACKTEST
    Preview = PREVIEW


class HttpJobStatus(StrEnum):
    """Where an API job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    Queued = QUEUED
    Running = RUNNING
    Completed = COMPLETED
    Failed = FAILED
    Cancelled = CANCELLED

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset({HttpJobStatus.COMPLETED, HttpJobStatus.FAILED, HttpJobStatus.CANCELLED})
HTTP_TRANSITIONS: Final[dict[HttpJobStatus, frozenset[HttpJobStatus]]] = {
    HttpJobStatus.QUEUED: frozenset({HttpJobStatus.RUNNING}) | _TERMINAL,
    HttpJobStatus.RUNNING: _TERMINAL,
    **{status: frozenset() for status in _TERMINAL},
}
"""Every legal move of an API job."""


class ApprovalStatus(StrEnum):
    """Where a request stands."""

    PENDING = "pending"
    """Waits for a person."""
    APPROVED = "approved"
    """It may start one job."""
    REJECTED = "rejected"
    EXPIRED = "expired"
    """Nobody decided in time."""
    STALE = "stale"
    """What was asked for is not what is there any more; it will never start a job."""


class ViolationType(StrEnum):
    """How a value, or a column, breaks its contract."""

    TYPE_MISMATCH = "type_mismatch"
    NULL_NOT_ALLOWED = "null_not_allowed"
    FORMAT_MISMATCH = "format_mismatch"
    COLUMN_MISSING = "column_missing"
    COLUMN_EXTRA = "column_extra"
    COLUMN_ORDER_MISMATCH = "column_order_mismatch"


class ViolationSummary(msgspec.Struct, frozen=True, kw_only=True):
    """All violations of one kind in one column; the column is None where none is concerned."""

    violation_type: ViolationType
    column_name: str | None = None
    count: Count
    samples: list[str] = msgspec.field(default_factory=list)


class TopicReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the rows of one topic were like in one run of a plugin over one file.

    Attributes:
        topic: "" where a whole output was refused and the message alone says which.
        rows: good and bad ones.
        sample: some good rows, values as JSON has them or else as text.
    """

    topic: str = ""
    rows: Count = 0
    bad_rows: Count = 0
    violations: list[ViolationSummary] = msgspec.field(default_factory=list)
    sample: list[dict[str, Any]] = msgspec.field(default_factory=list)


class RowsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker tells of a run's rows."""

    topics: list[TopicReport]


def _snake(qualified_name: str) -> str:
    name = qualified_name.rpartition(".")[2]
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).removeprefix("_")


class EventPayload(msgspec.Struct, frozen=True, tag_field="type", tag=_snake):
    """Base of the event types; its `event_type` is the "type" in JSON."""

    @property
    def event_type(self) -> str:
        return str(self.__struct_config__.tag)


class EventType:
    """What can happen to an API job, one class each."""

    class JobStarted(EventPayload, frozen=True):
        """The first file is about to be read."""

    class Phase(EventPayload, frozen=True):
        """The job goes on to another part of its work."""

        name: Name

    class Progress(EventPayload, frozen=True):
        """How far it is; `items_total` is None while that is not known."""

        items_done: Count
        items_total: Count | None = None
        message: Text | None = None

    class Violation(EventPayload, frozen=True):
        """Rows that break the contract."""

        violations: list[ViolationSummary]

    class Output(EventPayload, frozen=True):
        """An output is published."""

        output_name: Name
        sink_uri: Text
        rows: Count
        bytes: Count | None = None

    class JobFinished(EventPayload, frozen=True):
        """How a job ended: completed, failed or cancelled."""

        status: HttpJobStatus
        error_message: Text | None = None

    class ApprovalRequired(EventPayload, frozen=True):
        """The job waits for a person."""

        approval_id: Name


def _kinds(namespace: type, base: type[msgspec.Struct]) -> dict[str, type[Any]]:
    classes = [v for v in vars(namespace).values() if isinstance(v, type) and issubclass(v, base)]
    return {str(kind.__struct_config__.tag): kind for kind in classes}


EVENT_TYPES: Final[dict[str, type[Any]]] = _kinds(EventType, EventPayload)
"""The event types by their "type"."""


class ColumnSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A column of a schema that is to be promoted."""

    name: Name
    data_type: Name
    nullable: bool
    format: Text | None = None


class SchemaSpec(msgspec.Struct, frozen=True, kw_only=True):
    columns: list[ColumnSpec]
    mode: Literal["strict", "allow_extra", "allow_missing_optional"] = "strict"


class OperationPayload(
    msgspec.Struct, frozen=True, tag_field="type", tag=_snake, omit_defaults=True
):
    """Base of what can be asked for; its `operation_type` is the "type" in JSON."""

    @property
    def operation_type(self) -> str:
        return str(self.__struct_config__.tag)


class JobSpec(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    tag_field="carried_out_by",
    tag="sentinel",
):
    """What a job that the Sentinel carries out was asked for, beside plugin, folder and sink.

    A job without one is its maker's to carry out.

    Attributes:
        files: only these, paths below the folder; empty for all of it.
        files_max: at most so many, by name; None for all.
        rows_max: of a preview: rows of each topic that are shown, of all files together.
        fail_fast: of a backtest: the first file that fails ends it.
        force: of a run: also files that this plugin version has done already, beside that.
        schemas: contracts by topic (docs/contracts.md), in place of the topics' own.
    """

    files: list[Text] = msgspec.field(default_factory=list)
    files_max: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    rows_max: Annotated[int, msgspec.Meta(ge=0, le=1_000)] = 20
    fail_fast: bool = False
    force: bool = False
    schemas: Annotated[dict[Name, Contract], msgspec.Meta(max_length=100)] = msgspec.field(
        default_factory=dict
    )


class ApprovalOperation:
    """What a person can be asked to approve, one class each."""

    class Run(OperationPayload, frozen=True, kw_only=True):
        """Run a plugin over a folder and write its rows."""

        plugin_name: Name
        plugin_version: Name | None = None
        input_dir: Text
        file_count: Count
        output: Text | None = None
        spec: JobSpec | None = None
        """There if the Sentinel carries the run out once it is approved."""

    class SchemaPromote(OperationPayload, frozen=True, kw_only=True):
        """Make a schema the contract of an output."""

        plugin_name: Name
        output_name: Name
        schema: SchemaSpec


OPERATION_TYPES: Final[dict[str, type[Any]]] = _kinds(ApprovalOperation, OperationPayload)

if TYPE_CHECKING:
    AnyEvent = EventPayload
    AnyOperation = OperationPayload
else:
    # Built from the classes above, so that a new one is known to every decoder.
    AnyEvent = functools.reduce(operator.or_, EVENT_TYPES.values())
    AnyOperation = functools.reduce(operator.or_, OPERATION_TYPES.values())


class OutputInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An output as a job's result lists it."""

    name: Name
    sink_uri: Text
    rows: Count
    bytes: Count | None = None


class JobProgress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a job is."""

    phase: Name
    items_done: Count
    items_total: Count | None = None
    message: Text | None = None


class JobResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a job has done."""

    rows_processed: Count
    bytes_written: Count | None = None
    outputs: list[OutputInfo]
    metrics: dict[str, int]


class HttpJob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An API job. Its fields are the columns of `cf_api_jobs`, in this order.

    A field of a Struct type is one column for each of that one's fields, prefixed with its name;
    a list or dict is JSON in a column whose name ends in `_json`.
    """

    job_id: int
    job_type: HttpJobType
    status: HttpJobStatus
    plugin_name: Name
    plugin_version: Name | None = None
    input_dir: Text
    output_sink: Text | None = msgspec.field(default=None, name="output")
    approval_id: Name | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error_message: Text | None = None
    progress: JobProgress | None = None
    result: JobResult | None = None
    spec_json: str | None = None
    """What else the job was asked to do; a JobSpec if the Sentinel carries it out."""
    preview_json: str | None = None
    """The rows that a preview shows: a list of TopicReport."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event with its place: 1, 2, 3 … within its job."""

    event_id: int
    job_id: int
    timestamp: datetime
    payload: AnyEvent

    @property
    def event_type(self) -> str:
        return self.payload.event_type

    def flattened(self) -> dict[str, Any]:
        """As clients of the API see it: one object with the payload's fields beside the ids."""
        head = {"event_id": self.event_id, "job_id": self.job_id, "timestamp": self.timestamp}
        whole: dict[str, Any] = msgspec.to_builtins(head) | msgspec.to_builtins(self.payload)
        return whole


class ApprovalBinding(msgspec.Struct, frozen=True, kw_only=True):
    """What an approval is given for, so that nothing else is done in its name.

    Attributes:
        artifact_hash: of the plugin version that would run.
        files_digest: of the set of file versions (path and content hash of each).
        file_count: how many they are.
        sink: where the rows would go.
        parameters_hash: of the plugin's parameters.
    """

    artifact_hash: Text
    files_digest: Text
    file_count: Count
    sink: Text
    parameters_hash: Text

    def digest(self) -> str:
        """SHA-256, hex, over all of it."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def changes(self, current: "ApprovalBinding") -> list[str]:
        """What is different now, one line each; empty when nothing is."""
        lines = []
        for name in self.__struct_fields__:
            was, now = getattr(self, name), getattr(current, name)
            if was != now:
                told = f" from {was} to {now}" if name in _TELLING else ""
                lines.append(f"{_BINDING_WORDS[name]} changed{told}")
        return lines


_BINDING_WORDS: Final = {
    "artifact_hash": "the plugin's code",
    "files_digest": "the set of file versions",
    "file_count": "the number of files",
    "sink": "the sink",
    "parameters_hash": "the plugin's parameters",
}
_TELLING: Final = frozenset({"file_count", "sink"})
"""Fields whose values say something to a person; the others are digests."""


class Approval(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request that waits, or waited, for a person."""

    approval_id: str
    status: ApprovalStatus
    operation: AnyOperation
    summary: str
    created_at: datetime
    expires_at: datetime
    decided_at: datetime | None = None
    decided_by: str | None = None
    rejection_reason: str | None = None
    job_id: int | None = None
    requester: str | None = None
    """Who asked."""
    binding: ApprovalBinding | None = None
    digest: str | None = None
    """Of the binding."""
    stale_reason: str | None = None
    """What had changed."""


class Cleaned(NamedTuple):
    """How many rows a clean-up took."""

    jobs: int
    events: int


_event_decoder = msgspec.json.Decoder(AnyEvent)
_operation_decoder = msgspec.json.Decoder(AnyOperation)
_encoder = msgspec.json.Encoder()


def encode_payload(payload: msgspec.Struct | Mapping[str, Any] | list[Any]) -> str:
    """JSON text of an event, operation or part of a job.

    Raises:
        TypeError, ValueError: it holds what JSON cannot.
    """
    return _encoder.encode(payload).decode()


def decode_event(text: str | bytes) -> EventPayload:
    """Raises:
    msgspec.MsgspecError: not an event.
    """
    return _event_decoder.decode(text)


def decode_operation(text: str | bytes) -> OperationPayload:
    """Raises:
    msgspec.MsgspecError: not an operation.
    """
    return _operation_decoder.decode(text)


def decode_report(text: str | bytes) -> RowsReport:
    """Raises:
    msgspec.MsgspecError: not a report.
    """
    return msgspec.json.decode(text, type=RowsReport)


def new_approval_id() -> str:
    """A UUID, version 4, as 36 characters."""
    return str(uuid.uuid4())
