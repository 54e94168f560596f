"""The ledger's tables as SQLAlchemy models, for reading and for scripts.

db/schema.py makes the tables; a test holds the two together. Relations are declared here only,
for the tables have no foreign keys (see there). What the Sentinel does not change by itself may
be written through a Session while no Sentinel runs; jobs are made by `casparian` and Scout.
"""

from datetime import UTC, datetime
from typing import Any, ClassVar, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Float,
    Integer,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.schema import SchemaItem

from casparian_flow.db import schema
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.outputs import OutputState, SinkMode
from casparian_flow.domain.wiring import Origin, PluginStatus, SourceType, WorkerStatus


def _utc_now() -> datetime:
    wall_us = SystemClock().now().wall_us
    return datetime.fromtimestamp(wall_us / 1e6, UTC).replace(tzinfo=None)


def _next_id(context: Any) -> int:
    """The next free id; the ledger's counters do the same for the Sentinel."""
    table = context.compiled.statement.table.name
    largest = context.connection.execute(text(f"SELECT coalesce(max(id), 0) FROM {table}")).scalar()
    given = context.connection.info.setdefault("ledger_ids", {})
    given[table] = max(int(largest), given.get(table, 0)) + 1
    return int(given[table])


class Base(DeclarativeBase):
    """Declarative base: `str` is VARCHAR, `int` is BIGINT, times are naive UTC."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: BigInteger,
        str: String,
        float: Float(53),
        bool: Boolean,
        datetime: DateTime,
    }


def _id() -> Mapped[int]:
    return mapped_column(primary_key=True, autoincrement=False, default=_next_id)


class Meta(Base):
    """Facts about the ledger itself: its id, epoch, schema fingerprint."""

    __tablename__ = "cf_meta"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class SourceRoot(Base):
    """A folder that Scout watches."""

    __tablename__ = "cf_source_root"
    id: Mapped[int] = _id()
    path: Mapped[str] = mapped_column(unique=True)
    type: Mapped[str] = mapped_column(default=SourceType.LOCAL)
    active: Mapped[int] = mapped_column(Integer, default=1)
    settle_seconds: Mapped[float | None]
    include_patterns: Mapped[str] = mapped_column(default="[]")
    """JSON list of gitignore-style patterns; empty takes every file."""
    st_dev: Mapped[int | None]
    """Device of the folder when it was last seen; another one means it is not mounted."""
    created_at: Mapped[datetime | None] = mapped_column(default=_utc_now)
    namespace: Mapped[str] = mapped_column(default="")
    """Only rules and plugins of the same namespace see its files; "" without namespaces."""
    name: Mapped[str] = mapped_column(default="")
    """Within the namespace; "" for a root known by its path alone."""

    locations: Mapped[list["FileLocation"]] = relationship(
        primaryjoin="SourceRoot.id == foreign(FileLocation.source_root_id)",
        back_populates="source_root",
    )


class FileLocation(Base):
    """A path below a source root, whatever its bytes are at the moment."""

    __tablename__ = "cf_file_location"
    __table_args__ = (UniqueConstraint("source_root_id", "rel_path"),)
    id: Mapped[int] = _id()
    source_root_id: Mapped[int]
    rel_path: Mapped[str]
    filename: Mapped[str]
    current_version_id: Mapped[int | None]
    discovered_time: Mapped[datetime] = mapped_column(default=_utc_now)
    last_seen_time: Mapped[datetime] = mapped_column(default=_utc_now)
    dev: Mapped[int] = mapped_column(default=0)
    ino: Mapped[int] = mapped_column(default=0)
    size: Mapped[int] = mapped_column(default=0)
    mtime_ns: Mapped[int] = mapped_column(default=0)
    ctime_ns: Mapped[int] = mapped_column(default=0)
    hashed_at_us: Mapped[int] = mapped_column(default=0)
    last_known_size: Mapped[int | None] = mapped_column(Computed("size"))
    last_known_mtime: Mapped[float | None] = mapped_column(Computed("mtime_ns / 1e9"))
    """Seconds since the epoch."""
    deleted_at: Mapped[datetime | None]
    renamed_from: Mapped[str | None]

    source_root: Mapped[SourceRoot | None] = relationship(
        primaryjoin="foreign(FileLocation.source_root_id) == SourceRoot.id",
        back_populates="locations",
    )
    versions: Mapped[list["FileVersion"]] = relationship(
        primaryjoin="FileLocation.id == foreign(FileVersion.location_id)",
        back_populates="location",
        order_by="FileVersion.seq",
    )
    current_version: Mapped["FileVersion | None"] = relationship(
        primaryjoin="foreign(FileLocation.current_version_id) == FileVersion.id", viewonly=True
    )


class FileHashRegistry(Base):
    """Every content ever seen, once."""

    __tablename__ = "cf_file_hash_registry"
    content_hash: Mapped[str] = mapped_column(primary_key=True)
    first_seen: Mapped[datetime] = mapped_column(default=_utc_now)
    size_bytes: Mapped[int]


class FileVersion(Base):
    """The content of a location at one time; never changed."""

    __tablename__ = "cf_file_version"
    __table_args__ = (UniqueConstraint("location_id", "seq"), CheckConstraint("seq >= 1"))
    id: Mapped[int] = _id()
    location_id: Mapped[int]
    seq: Mapped[int] = mapped_column(Integer)
    """1, 2, 3 … within the location."""
    content_hash: Mapped[str]
    size_bytes: Mapped[int]
    modified_time: Mapped[datetime]
    detected_at: Mapped[datetime] = mapped_column(default=_utc_now)
    applied_tags: Mapped[str] = mapped_column(default="")
    """Sorted, separated by commas."""
    dev: Mapped[int] = mapped_column(default=0)
    ino: Mapped[int] = mapped_column(default=0)
    mtime_ns: Mapped[int] = mapped_column(default=0)
    ctime_ns: Mapped[int] = mapped_column(default=0)

    location: Mapped[FileLocation | None] = relationship(
        primaryjoin="foreign(FileVersion.location_id) == FileLocation.id",
        back_populates="versions",
    )
    jobs: Mapped[list["ProcessingJob"]] = relationship(
        primaryjoin="FileVersion.id == foreign(ProcessingJob.file_version_id)",
        back_populates="file_version",
    )


class FileTag(Base):
    """A tag given to a location by hand."""

    __tablename__ = "cf_file_tag"
    file_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tag: Mapped[str] = mapped_column(primary_key=True)


class IgnoreRule(Base):
    """A gitignore pattern; without a source root it holds for all."""

    __tablename__ = "cf_ignore_rule"
    id: Mapped[int] = _id()
    source_root_id: Mapped[int | None]
    pattern: Mapped[str]
    active: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime | None] = mapped_column(default=_utc_now)


class RoutingRule(Base):
    """Files matching the pattern get the tag."""

    __tablename__ = "cf_routing_rule"
    id: Mapped[int] = _id()
    pattern: Mapped[str]
    tag: Mapped[str]
    priority: Mapped[int] = mapped_column(Integer, default=0)
    origin: Mapped[str] = mapped_column(default=Origin.USER)
    plugin_name: Mapped[str | None]
    """For rules made by a deploy: of which plugin."""
    namespace: Mapped[str] = mapped_column(default="")
    """Of the source roots whose files it may match."""


class PluginConfig(Base):
    """What a plugin subscribes to, and its parameters."""

    __tablename__ = "cf_plugin_config"
    plugin_name: Mapped[str] = mapped_column(primary_key=True)
    subscription_tags: Mapped[str] = mapped_column(default="")
    default_parameters: Mapped[str] = mapped_column(default="{}")
    last_updated: Mapped[datetime | None] = mapped_column(default=_utc_now, onupdate=_utc_now)


class PluginSubscription(Base):
    """A topic that a plugin takes part in."""

    __tablename__ = "cf_plugin_subscription"
    __table_args__ = (UniqueConstraint("plugin_name", "topic_name"),)
    id: Mapped[int] = _id()
    plugin_name: Mapped[str]
    topic_name: Mapped[str]
    is_active: Mapped[bool] = mapped_column(default=True)


class TopicConfig(Base):
    """Where a plugin's topic goes; `uri` holds one sink URI a line."""

    __tablename__ = "cf_topic_config"
    __table_args__ = (UniqueConstraint("plugin_name", "topic_name"),)
    id: Mapped[int] = _id()
    plugin_name: Mapped[str]
    topic_name: Mapped[str]
    uri: Mapped[str]
    mode: Mapped[str] = mapped_column(default=SinkMode.APPEND)
    schema_json: Mapped[str | None]
    quarantine_allow: Mapped[bool] = mapped_column(default=False)
    quarantine_max_pct: Mapped[float] = mapped_column(default=10.0)
    quarantine_max_count: Mapped[int | None]
    origin: Mapped[str] = mapped_column(default=Origin.USER)


class ProcessingJob(Base):
    """One run of one plugin over one file version. A projection of the journal."""

    __tablename__ = "cf_processing_queue"
    id: Mapped[int] = _id()
    file_version_id: Mapped[int | None]
    plugin_name: Mapped[str]
    config_overrides: Mapped[str | None]
    input_file: Mapped[str | None]
    status: Mapped[str] = mapped_column(default=JobStatus.PENDING)
    priority: Mapped[int] = mapped_column(Integer, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    lease_token: Mapped[str | None]
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    scheduled_at: Mapped[datetime | None]
    """Not to be run before."""
    worker_host: Mapped[str | None]
    worker_pid: Mapped[int | None] = mapped_column(Integer)
    claim_time: Mapped[datetime | None]
    end_time: Mapped[datetime | None]
    completion_status: Mapped[str | None]
    result_summary: Mapped[str | None]
    error_message: Mapped[str | None]
    reason: Mapped[str | None]
    retry_count: Mapped[int] = mapped_column(Integer, default=0)
    quarantine_rows: Mapped[int] = mapped_column(default=0)
    generation: Mapped[int] = mapped_column(Integer, default=0)
    retry_of: Mapped[int | None]
    plugin_manifest_id: Mapped[int | None]
    pin: Mapped[str | None]
    """Code and parameters that alone may run it."""
    rehearsal: Mapped[int | None]
    """Set for a job that publishes nothing: rows of each topic that its report may hold."""
    created_at: Mapped[datetime] = mapped_column(default=_utc_now)

    file_version: Mapped[FileVersion | None] = relationship(
        primaryjoin="foreign(ProcessingJob.file_version_id) == FileVersion.id",
        back_populates="jobs",
    )
    outputs: Mapped[list["Output"]] = relationship(
        primaryjoin="ProcessingJob.id == foreign(Output.job_id)",
        order_by="Output.n",
        viewonly=True,
    )


class JournalEntry(Base):
    """What happened to a job; append-only, the truth behind ProcessingJob."""

    __tablename__ = "cf_journal"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    job_id: Mapped[int]
    kind: Mapped[str]
    attempt: Mapped[int] = mapped_column(Integer)
    at_us: Mapped[int]
    data: Mapped[str | None]


class Output(Base):
    """A granted output: reserved under its key for ever."""

    __tablename__ = "cf_output"
    output_key: Mapped[str] = mapped_column(primary_key=True)
    slice_key: Mapped[str]
    order_version_seq: Mapped[int] = mapped_column(Integer)
    order_manifest_id: Mapped[int]
    order_generation: Mapped[int] = mapped_column(Integer)
    job_id: Mapped[int]
    token: Mapped[str]
    n: Mapped[int] = mapped_column(Integer)
    topic: Mapped[str]
    kind: Mapped[str]
    mode: Mapped[str]
    sink_uri: Mapped[str]
    root_id: Mapped[str]
    stage: Mapped[str]
    final: Mapped[str]
    rows: Mapped[int]
    bytes: Mapped[int]
    sha256: Mapped[str]
    state: Mapped[str] = mapped_column(default=OutputState.GRANTED)
    granted_at: Mapped[datetime]


class Slice(Base):
    """The newest result of one file, plugin and topic in a sink that replaces or refuses."""

    __tablename__ = "cf_slice"
    slice_key: Mapped[str] = mapped_column(primary_key=True)
    order_version_seq: Mapped[int] = mapped_column(Integer)
    order_manifest_id: Mapped[int]
    order_generation: Mapped[int] = mapped_column(Integer)
    output_key: Mapped[str]
    job_id: Mapped[int]


class DeadLetter(Base):
    """A job that was given up, until it is replayed."""

    __tablename__ = "cf_dead_letter"
    original_job_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    file_version_id: Mapped[int | None]
    plugin_name: Mapped[str]
    reason: Mapped[str]
    error_message: Mapped[str | None]
    retry_count: Mapped[int] = mapped_column(Integer)
    moved_at: Mapped[datetime]
    replayed_as: Mapped[int | None]


class PluginHealth(Base):
    """A plugin's circuit breaker."""

    __tablename__ = "cf_plugin_health"
    plugin_name: Mapped[str] = mapped_column(primary_key=True)
    consecutive_failures: Mapped[int] = mapped_column(Integer, default=0)
    paused: Mapped[bool] = mapped_column(default=False)
    reason: Mapped[str] = mapped_column(default="")
    updated_at: Mapped[datetime]


class JobLog(Base):
    """The tail of what a plugin printed during one attempt."""

    __tablename__ = "cf_job_log"
    job_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    log: Mapped[str]


class Scan(Base):
    """One scan of a source root and its report."""

    __tablename__ = "cf_scan"
    id: Mapped[int] = _id()
    source_root_id: Mapped[int]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    complete: Mapped[bool | None]
    report_json: Mapped[str | None]


class WorkerNode(Base):
    """A worker process, as last heard of."""

    __tablename__ = "cf_worker_node"
    hostname: Mapped[str] = mapped_column(primary_key=True)
    pid: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    ip_address: Mapped[str | None]
    env_signature: Mapped[str | None]
    started_at: Mapped[datetime | None]
    last_heartbeat: Mapped[datetime | None]
    status: Mapped[str] = mapped_column(default=WorkerStatus.ACTIVE)
    current_job_id: Mapped[int | None]


class Publisher(Base):
    """Who deployed plugins."""

    __tablename__ = "cf_publisher"
    id: Mapped[int] = _id()
    azure_oid: Mapped[str | None] = mapped_column(unique=True)
    name: Mapped[str]
    email: Mapped[str | None]
    created_at: Mapped[datetime | None] = mapped_column(default=_utc_now)
    last_active: Mapped[datetime | None] = mapped_column(default=_utc_now)


class PluginEnvironment(Base):
    """A lockfile under the hash of its text."""

    __tablename__ = "cf_plugin_environment"
    hash: Mapped[str] = mapped_column(primary_key=True)
    lockfile_content: Mapped[str]
    size_mb: Mapped[float] = mapped_column(default=0.0)
    last_used: Mapped[datetime | None]
    created_at: Mapped[datetime | None] = mapped_column(default=_utc_now)


class PluginManifest(Base):
    """One deployed version of a plugin; its bytes never change."""

    __tablename__ = "cf_plugin_manifest"
    __table_args__ = (UniqueConstraint("plugin_name", "version", "artifact_hash"),)
    id: Mapped[int] = _id()
    plugin_name: Mapped[str]
    version: Mapped[str]
    source_code: Mapped[str]
    source_hash: Mapped[str]
    status: Mapped[str] = mapped_column(default=PluginStatus.PENDING)
    envelope: Mapped[str | None]
    """The signature as it was deployed; None for an unsigned version."""
    signer: Mapped[str | None]
    key_id: Mapped[str | None]
    validation_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=_utc_now)
    deployed_at: Mapped[datetime | None]
    env_hash: Mapped[str | None]
    artifact_hash: Mapped[str]
    publisher_id: Mapped[int | None]
    system_requirements: Mapped[str | None]
    manifest_json: Mapped[str | None]
    """The exact text that was signed with source and lock file."""
    wiring_json: Mapped[str | None]
    """What its MANIFEST declares, for the next version's deploy to compare with."""
    samples_json: Mapped[str | None]
    """Files that it is tried on, as JSON with base64; None for none."""


class LibraryWhitelist(Base):
    """A library that plugins may import without being asked about."""

    __tablename__ = "cf_library_whitelist"
    id: Mapped[int] = _id()
    library_name: Mapped[str] = mapped_column(unique=True)
    version_constraint: Mapped[str | None]
    description: Mapped[str | None]
    added_at: Mapped[datetime | None] = mapped_column(default=_utc_now)


def _derived_table(name: str) -> Table:
    """The columns and keys of a table as db/schema.py has it."""
    keys = schema.primary_key(name)
    columns: list[SchemaItem] = [
        Column(
            column.name,
            _SQL_TYPES[column.sql_type](),
            primary_key=column.name in keys,
            autoincrement=False,
            nullable=column.nullable,
        )
        for column in schema.columns(name)
    ]
    return Table(name, Base.metadata, *columns, *map(_unique, schema.unique_lists(name)))


def _unique(names: tuple[str, ...]) -> UniqueConstraint:
    return UniqueConstraint(*names)


_SQL_TYPES: Final[dict[str, type[Any]]] = {
    "BIGINT": BigInteger,
    "VARCHAR": String,
    "TIMESTAMP": DateTime,
    "BOOLEAN": Boolean,
}


class ApiJob(Base):
    """A job of the API; its columns follow from protocol.HttpJob. For reading."""

    __table__ = _derived_table("cf_api_jobs")


class ApiEvent(Base):
    """What happened to an API job. For reading."""

    __table__ = _derived_table("cf_api_events")


class ApiTask(Base):
    """A job of the queue that an API job waits for. For reading."""

    __table__ = _derived_table("cf_api_tasks")


class ApiPlan(Base):
    """What an API job is to do whose jobs are still being made. For reading."""

    __table__ = _derived_table("cf_api_plans")


class ApiApproval(Base):
    """A request to a person, and the decision. For reading."""

    __table__ = _derived_table("cf_api_approvals")
