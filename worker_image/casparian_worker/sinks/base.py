"""What every sink offers: stage now, publish after the grant.

    sink = sink_for(spec.uri, env)                       # sinks/registry.py
    writer = sink.open_stage(StageContext(run, n=0, topic="sales", mode=spec.mode))
    writer.write(batch)                                  # as many as there are
    entry = writer.finish()                              # durable; goes into the manifest
    ...                                                  # STAGE, GRANT
    sink.publish(entry, run.token)                       # once or many times, by one or many
    sink.unstage(entry, run.token)                       # all of them, before CONCLUDE

`docs/sinks.md` states the guarantees. Publishing follows docs/ARCHITECTURE.md, "The commit
protocol": it is idempotent, allowed to any holder of the manifest, and never overwrites.
"""

import abc
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from casparian_flow.domain.clock import Clock, SystemClock
from casparian_flow.domain.errors import (
    DiskFullError,
    OutputLostError,
    OutputRefusedError,
    SinkConflictError,
    SinkError,
    require,
)
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import TokenParts, parse_token
from casparian_flow.domain.outputs import (
    QUARANTINE_SUFFIX,
    OutputEntry,
    OutputKind,
    SinkAddress,
    SinkMode,
    output_key,
    sink_id,
    slice_key,
)
from casparian_worker.sinks.durable import sink_error
from casparian_worker.sinks.root import OutputRoot
from casparian_worker.sinks.schema import SchemaTracker


@dataclass(frozen=True, slots=True)
class JobRun:
    """What all outputs of one attempt share.

    Attributes:
        token: the attempt's fencing token.
        order_no: (version seq, manifest id, generation); orders `replace`.
    """

    token: str
    version_id: int
    location_id: int
    plugin: str
    artifact_hash: str
    parameters_hash: str
    order_no: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class StageContext:
    """One output of an attempt at one sink.

    Attributes:
        n: index in the job's manifest; (token, n) names the stage.
        topic: as the plugin published it, without the quarantine suffix.
        mode: from the topic's configuration.
        metadata: text kept beside the rows where the format has room for it (Parquet).
    """

    run: JobRun
    n: int
    topic: str
    kind: OutputKind = OutputKind.OUTPUT
    mode: SinkMode = SinkMode.APPEND
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What publishing one output did.

    Attributes:
        already: the output was in place before, published by this token.
        removed: earlier results of the slice that were taken away (files, or rows in tables).
    """

    output_key: str
    already: bool
    removed: int = 0


@dataclass(frozen=True, slots=True)
class MssqlSettings:
    """Where the SQL Server is; from configuration or environment, never from a URI."""

    server: str = ""
    port: int = 1433
    user: str = ""
    password: str = field(default="", repr=False)
    database: str = ""
    timeout_s: float = 30.0

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "MssqlSettings":
        """Read CASPARIAN_MSSQL_SERVER, _PORT, _USER, _PASSWORD and _DATABASE.

        Raises:
            SinkError: the port is no number from 1 to 65535.
        """
        port = environ.get("CASPARIAN_MSSQL_PORT", "1433")
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535):
            raise SinkError(f"CASPARIAN_MSSQL_PORT is {port!r}: want a number from 1 to 65535")
        return cls(
            server=environ.get("CASPARIAN_MSSQL_SERVER", ""),
            port=int(port),
            user=environ.get("CASPARIAN_MSSQL_USER", ""),
            password=environ.get("CASPARIAN_MSSQL_PASSWORD", ""),
            database=environ.get("CASPARIAN_MSSQL_DATABASE", ""),
        )


@dataclass(frozen=True, slots=True)
class SinkEnvironment:
    """What sinks need from the worker.

    Attributes:
        ledger_path: the ledger's file, which no sink may write to; "" if unknown.
        busy_timeout_s: how long a locked database is waited for before a transient error.
    """

    root: OutputRoot
    clock: Clock = field(default_factory=SystemClock)
    mssql: MssqlSettings = field(default_factory=MssqlSettings)
    ledger_path: str = ""
    busy_timeout_s: float = 10.0


class StageWriter(Protocol):
    """Rows on their way into a stage. After an error, call `abort`."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows, lineage columns included; batches may differ in schema.

        Raises:
            OutputRefusedError: the rows cannot become this output, however often tried.
            SinkError: the sink failed.
        """

    def finish(self) -> OutputEntry:
        """Make the stage durable and describe it. Zero rows leave no stage.

        Raises:
            OutputRefusedError, SinkError: as `write`; also what publishing would surely hit.
        """

    def abort(self) -> None:
        """Drop what was staged. May be called at any time, more than once."""


class Sink(Protocol):
    """One sink URI."""

    @property
    def address(self) -> SinkAddress: ...

    def check(self) -> None:
        """Raises SinkError if the sink cannot work: a missing library, an unreachable server."""

    def open_stage(self, ctx: StageContext) -> StageWriter:
        """Begin an output.

        Raises:
            OutputRefusedError, SinkError: it can be seen now that it would fail.
        """

    def publish(self, entry: OutputEntry, token: str) -> Receipt:
        """Put a granted output in place, durably, unless it is there already.

        Raises:
            SinkConflictError: other data is there under its name; nothing was changed.
            OutputLostError: neither the stage nor the published data exists.
            SinkError: it failed; transient ones may be tried again.
        """

    def unstage(self, entry: OutputEntry, token: str) -> None:
        """Delete the entry's stage, if it is still there.

        Raises:
            SinkError: it could not be deleted.
        """

    def list_stages(self) -> AbstractSet[str]:
        """Tokens that have a stage at this sink's staging place."""

    def delete_stages(self, tokens: AbstractSet[str]) -> int:
        """Delete all stages of these tokens at this sink's staging place; returns how many."""


def reason_of(error: SinkError) -> Reason:
    """The reason that a job ends with when this error ends it."""
    if isinstance(error, DiskFullError):
        return Reason.DISK_FULL
    if isinstance(error, SinkConflictError | OutputLostError):
        return Reason.SINK_CONFLICT
    return Reason.SINK


def token_parts(token: str) -> TokenParts:
    """Read a token that goes into names of stages.

    Raises:
        InvariantError: it is none that a Sentinel makes.
    """
    parts = parse_token(token)
    require(parts is not None, f"not a fencing token: {token!r}")
    assert parts is not None
    return parts


def stage_name(token: str, n: int) -> str:
    """The name of a stage, whatever the sink; `token_of_stage` reads it back."""
    token_parts(token)
    return f"{token}.{n}"


def token_of_stage(name: str) -> str:
    """The token in a stage's name, "" for names that are no stage's."""
    token, dot, _ = name.partition(".")
    return token if dot and parse_token(token) is not None else ""


def topic_name(ctx: StageContext) -> str:
    """The topic as outputs are named by it: with its suffix for quarantined rows."""
    return ctx.topic + (QUARANTINE_SUFFIX if ctx.kind is OutputKind.QUARANTINE else "")


@dataclass(frozen=True, slots=True)
class Keys:
    output: str
    slice: str


def keys_of(ctx: StageContext, address: SinkAddress, root_id: str) -> Keys:
    """The keys of an output (domain/outputs.py); the Sentinel works them out again.

    Raises:
        OutputRefusedError: the topic's name is kept for another topic's quarantine.
    """
    if ctx.kind is OutputKind.OUTPUT and ctx.topic.endswith(QUARANTINE_SUFFIX):
        raise OutputRefusedError(
            f"topic {ctx.topic!r}: names that end in {QUARANTINE_SUFFIX!r} are kept for the rows "
            "that break a topic's contract",
            reason=Reason.PLUGIN_ERROR,
            hint="Publish under another name.",
        )
    run, topic = ctx.run, topic_name(ctx)
    ledger_id = token_parts(run.token).ledger_id
    sink = sink_id(address, root_id, ctx.mode)
    return Keys(
        output_key(
            ledger_id,
            run.version_id,
            run.artifact_hash,
            run.parameters_hash,
            topic,
            sink,
            run.order_no[2],
        ),
        slice_key(ledger_id, run.location_id, run.plugin, topic, sink),
    )


@dataclass(frozen=True, slots=True)
class StagedData:
    """What a writer knows of its stage once it is durable."""

    stage: str
    final: str
    rows: int
    bytes: int
    sha256: str = ""


class RowWriter(abc.ABC):
    """Shared part of the stage writers: schema drift, counting, errors.

    Subclasses write rows of one schema at a time. `_begin` comes before all else, once, at the
    first row; `_widen` whenever the schema changed since.
    """

    def __init__(self, ctx: StageContext, address: SinkAddress, root_id: str) -> None:
        self._ctx = ctx
        self._address = address
        self._root_id = root_id
        self._topic = topic = topic_name(ctx)
        self._keys = keys_of(ctx, address, root_id)
        self._tracker = SchemaTracker(topic)
        self._rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        try:
            self._write(batch)
        except OSError as error:
            raise self._failure(error) from error
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise self._refusal(str(error)) from error
        self._rows += batch.num_rows

    def finish(self) -> OutputEntry:
        if not self._rows:
            self.abort()
            return self._entry(StagedData("", "", 0, 0))
        try:
            return self._entry(self._end())
        except OSError as error:
            raise self._failure(error) from error
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise self._refusal(str(error)) from error

    @abc.abstractmethod
    def abort(self) -> None: ...

    @abc.abstractmethod
    def _begin(self, schema: pa.Schema) -> None: ...

    @abc.abstractmethod
    def _widen(self, schema: pa.Schema) -> None: ...

    @abc.abstractmethod
    def _append(self, batch: pa.RecordBatch) -> None: ...

    @abc.abstractmethod
    def _end(self) -> StagedData: ...

    @abc.abstractmethod
    def _where(self) -> str:
        """What an operating system's error is about."""

    def _write(self, batch: pa.RecordBatch) -> None:
        first = self._tracker.schema is None
        changed = self._tracker.admit(batch)
        schema = self._tracker.schema
        assert schema is not None
        if first:
            self._begin(schema)
        elif changed:
            self._widen(schema)
        self._append(self._tracker.conform(batch))

    def _refusal(self, message: str) -> OutputRefusedError:
        return OutputRefusedError(
            f"topic {self._topic!r} cannot be written to {self._address.uri}: {message}",
            reason=Reason.CONTRACT,
            hint="Convert the column in the plugin, or send the topic to another kind of sink.",
        )

    def _failure(self, error: OSError) -> SinkError:
        return sink_error(error, "write", self._where())

    def _entry(self, data: StagedData) -> OutputEntry:
        ctx = self._ctx
        return OutputEntry(
            n=ctx.n,
            topic=self._topic,
            kind=ctx.kind,
            uri=self._address.uri,
            mode=ctx.mode,
            root_id=self._root_id,
            output_key=self._keys.output,
            slice_key=self._keys.slice,
            order_no=ctx.run.order_no,
            stage=data.stage,
            final=data.final,
            rows=data.rows,
            bytes=data.bytes,
            sha256=data.sha256,
        )
