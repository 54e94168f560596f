"""The ledger's tables as SQL, and the fingerprint that tells one version of them from another.

No foreign keys: DuckDB refuses to update a referenced row's unique columns, to delete parent and
child in one transaction, and to create a cycle (location ↔ current version). Relations live in
db/models.py, integrity in db/check.py. All constraints stand in CREATE TABLE because DuckDB's
ALTER TABLE cannot add them. The queue has no secondary index: it would make every fold dearer,
and the ready queue lives in the broker.

A changed table needs a step in db/migrations.py, by which ledgers that exist follow.

Times are naive TIMESTAMP in UTC; columns ending in `_us` or `_ns` are integers since the epoch.
"""

import hashlib
import re
from typing import NamedTuple

from casparian_flow.db.api_tables import API_TABLES, JOBS
from casparian_flow.db.api_tables import one_of as _one_of
from casparian_flow.domain.jobs import CompletionStatus, JobStatus, JournalKind
from casparian_flow.domain.outputs import OutputKind, OutputState, SinkMode
from casparian_flow.domain.wiring import Origin, PluginStatus, SourceType, WorkerStatus

TABLES: dict[str, str] = {
    "cf_meta": """
        key VARCHAR PRIMARY KEY,
        value VARCHAR NOT NULL
    """,
    "cf_source_root": f"""
        id BIGINT PRIMARY KEY,
        path VARCHAR NOT NULL UNIQUE,
        type VARCHAR NOT NULL DEFAULT 'local' {_one_of("type", SourceType)},
        active INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
        settle_seconds DOUBLE,
        include_patterns VARCHAR NOT NULL DEFAULT '[]',
        st_dev BIGINT,
        created_at TIMESTAMP,
        namespace VARCHAR NOT NULL DEFAULT '',
        name VARCHAR NOT NULL DEFAULT ''
    """,
    "cf_file_location": """
        id BIGINT PRIMARY KEY,
        source_root_id BIGINT NOT NULL,
        rel_path VARCHAR NOT NULL,
        filename VARCHAR NOT NULL,
        current_version_id BIGINT,
        discovered_time TIMESTAMP NOT NULL,
        last_seen_time TIMESTAMP NOT NULL,
        dev BIGINT NOT NULL DEFAULT 0,
        ino BIGINT NOT NULL DEFAULT 0,
        size BIGINT NOT NULL DEFAULT 0,
        mtime_ns BIGINT NOT NULL DEFAULT 0,
        ctime_ns BIGINT NOT NULL DEFAULT 0,
        hashed_at_us BIGINT NOT NULL DEFAULT 0,
        last_known_size BIGINT GENERATED ALWAYS AS (size) VIRTUAL,
        last_known_mtime DOUBLE GENERATED ALWAYS AS (mtime_ns / 1e9) VIRTUAL,
        deleted_at TIMESTAMP,
        renamed_from VARCHAR,
        UNIQUE (source_root_id, rel_path)
    """,
    "cf_file_hash_registry": """
        content_hash VARCHAR PRIMARY KEY,
        first_seen TIMESTAMP NOT NULL,
        size_bytes BIGINT NOT NULL
    """,
    "cf_file_version": """
        id BIGINT PRIMARY KEY,
        location_id BIGINT NOT NULL,
        seq INTEGER NOT NULL CHECK (seq >= 1),
        content_hash VARCHAR NOT NULL,
        size_bytes BIGINT NOT NULL,
        modified_time TIMESTAMP NOT NULL,
        detected_at TIMESTAMP NOT NULL,
        applied_tags VARCHAR NOT NULL DEFAULT '',
        dev BIGINT NOT NULL DEFAULT 0,
        ino BIGINT NOT NULL DEFAULT 0,
        mtime_ns BIGINT NOT NULL DEFAULT 0,
        ctime_ns BIGINT NOT NULL DEFAULT 0,
        UNIQUE (location_id, seq)
    """,
    "cf_file_tag": """
        file_id BIGINT NOT NULL,
        tag VARCHAR NOT NULL,
        PRIMARY KEY (file_id, tag)
    """,
    "cf_ignore_rule": """
        id BIGINT PRIMARY KEY,
        source_root_id BIGINT,
        pattern VARCHAR NOT NULL,
        active BOOLEAN NOT NULL DEFAULT true,
        created_at TIMESTAMP
    """,
    "cf_routing_rule": f"""
        id BIGINT PRIMARY KEY,
        pattern VARCHAR NOT NULL,
        tag VARCHAR NOT NULL,
        priority INTEGER NOT NULL DEFAULT 0,
        origin VARCHAR NOT NULL DEFAULT 'user' {_one_of("origin", Origin)},
        plugin_name VARCHAR,
        namespace VARCHAR NOT NULL DEFAULT ''
    """,
    "cf_plugin_config": """
        plugin_name VARCHAR PRIMARY KEY,
        subscription_tags VARCHAR NOT NULL DEFAULT '',
        default_parameters VARCHAR NOT NULL DEFAULT '{}',
        last_updated TIMESTAMP
    """,
    "cf_plugin_subscription": """
        id BIGINT PRIMARY KEY,
        plugin_name VARCHAR NOT NULL,
        topic_name VARCHAR NOT NULL,
        is_active BOOLEAN NOT NULL DEFAULT true,
        UNIQUE (plugin_name, topic_name)
    """,
    "cf_topic_config": f"""
        id BIGINT PRIMARY KEY,
        plugin_name VARCHAR NOT NULL,
        topic_name VARCHAR NOT NULL,
        uri VARCHAR NOT NULL,
        mode VARCHAR NOT NULL DEFAULT 'append' {_one_of("mode", SinkMode)},
        schema_json VARCHAR,
        quarantine_allow BOOLEAN NOT NULL DEFAULT false,
        quarantine_max_pct DOUBLE NOT NULL DEFAULT 10.0
            CHECK (quarantine_max_pct BETWEEN 0 AND 100),
        quarantine_max_count BIGINT CHECK (quarantine_max_count >= 0),
        origin VARCHAR NOT NULL DEFAULT 'user' {_one_of("origin", Origin)},
        UNIQUE (plugin_name, topic_name)
    """,
    "cf_processing_queue": f"""
        id BIGINT PRIMARY KEY,
        file_version_id BIGINT,
        plugin_name VARCHAR NOT NULL,
        config_overrides VARCHAR,
        input_file VARCHAR,
        status VARCHAR NOT NULL DEFAULT 'PENDING' {_one_of("status", JobStatus)},
        priority INTEGER NOT NULL DEFAULT 0,
        attempt INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
        lease_token VARCHAR,
        lease_owner VARCHAR,
        lease_expires_at TIMESTAMP,
        scheduled_at TIMESTAMP,
        worker_host VARCHAR,
        worker_pid INTEGER,
        claim_time TIMESTAMP,
        end_time TIMESTAMP,
        completion_status VARCHAR {_one_of("completion_status", CompletionStatus)},
        result_summary VARCHAR,
        error_message VARCHAR,
        reason VARCHAR,
        retry_count INTEGER NOT NULL DEFAULT 0 CHECK (retry_count >= 0),
        quarantine_rows BIGINT NOT NULL DEFAULT 0,
        generation INTEGER NOT NULL DEFAULT 0 CHECK (generation >= 0),
        retry_of BIGINT,
        plugin_manifest_id BIGINT,
        pin VARCHAR,
        rehearsal BIGINT CHECK (rehearsal >= 0),
        created_at TIMESTAMP NOT NULL
    """,
    "cf_journal": f"""
        seq BIGINT NOT NULL,
        job_id BIGINT NOT NULL,
        kind VARCHAR NOT NULL {_one_of("kind", JournalKind)},
        attempt INTEGER NOT NULL,
        at_us BIGINT NOT NULL,
        data VARCHAR
    """,
    "cf_output": f"""
        output_key VARCHAR PRIMARY KEY,
        slice_key VARCHAR NOT NULL,
        order_version_seq INTEGER NOT NULL,
        order_manifest_id BIGINT NOT NULL,
        order_generation INTEGER NOT NULL,
        job_id BIGINT NOT NULL,
        token VARCHAR NOT NULL,
        n INTEGER NOT NULL,
        topic VARCHAR NOT NULL,
        kind VARCHAR NOT NULL {_one_of("kind", OutputKind)},
        mode VARCHAR NOT NULL {_one_of("mode", SinkMode)},
        sink_uri VARCHAR NOT NULL,
        root_id VARCHAR NOT NULL,
        stage VARCHAR NOT NULL,
        final VARCHAR NOT NULL,
        "rows" BIGINT NOT NULL,
        bytes BIGINT NOT NULL,
        sha256 VARCHAR NOT NULL,
        state VARCHAR NOT NULL DEFAULT 'GRANTED' {_one_of("state", OutputState)},
        granted_at TIMESTAMP NOT NULL
    """,
    "cf_slice": """
        slice_key VARCHAR PRIMARY KEY,
        order_version_seq INTEGER NOT NULL,
        order_manifest_id BIGINT NOT NULL,
        order_generation INTEGER NOT NULL,
        output_key VARCHAR NOT NULL,
        job_id BIGINT NOT NULL
    """,
    "cf_dead_letter": """
        original_job_id BIGINT PRIMARY KEY,
        file_version_id BIGINT,
        plugin_name VARCHAR NOT NULL,
        reason VARCHAR NOT NULL,
        error_message VARCHAR,
        retry_count INTEGER NOT NULL,
        moved_at TIMESTAMP NOT NULL,
        replayed_as BIGINT
    """,
    "cf_plugin_health": """
        plugin_name VARCHAR PRIMARY KEY,
        consecutive_failures INTEGER NOT NULL DEFAULT 0,
        paused BOOLEAN NOT NULL DEFAULT false,
        reason VARCHAR NOT NULL DEFAULT '',
        updated_at TIMESTAMP NOT NULL
    """,
    "cf_job_log": """
        job_id BIGINT NOT NULL,
        attempt INTEGER NOT NULL,
        log VARCHAR NOT NULL
    """,
    "cf_scan": """
        id BIGINT PRIMARY KEY,
        source_root_id BIGINT NOT NULL,
        started_at TIMESTAMP NOT NULL,
        finished_at TIMESTAMP,
        complete BOOLEAN,
        report_json VARCHAR
    """,
    "cf_worker_node": f"""
        hostname VARCHAR NOT NULL,
        pid INTEGER NOT NULL,
        ip_address VARCHAR,
        env_signature VARCHAR,
        started_at TIMESTAMP,
        last_heartbeat TIMESTAMP,
        status VARCHAR NOT NULL DEFAULT 'ACTIVE' {_one_of("status", WorkerStatus)},
        current_job_id BIGINT,
        PRIMARY KEY (hostname, pid)
    """,
    "cf_publisher": """
        id BIGINT PRIMARY KEY,
        azure_oid VARCHAR UNIQUE,
        name VARCHAR NOT NULL,
        email VARCHAR,
        created_at TIMESTAMP,
        last_active TIMESTAMP
    """,
    "cf_plugin_environment": """
        hash VARCHAR PRIMARY KEY,
        lockfile_content VARCHAR NOT NULL,
        size_mb DOUBLE NOT NULL DEFAULT 0,
        last_used TIMESTAMP,
        created_at TIMESTAMP
    """,
    "cf_plugin_manifest": f"""
        id BIGINT PRIMARY KEY,
        plugin_name VARCHAR NOT NULL,
        version VARCHAR NOT NULL,
        source_code VARCHAR NOT NULL,
        source_hash VARCHAR NOT NULL,
        status VARCHAR NOT NULL DEFAULT 'PENDING' {_one_of("status", PluginStatus)},
        envelope VARCHAR,
        signer VARCHAR,
        key_id VARCHAR,
        validation_error VARCHAR,
        created_at TIMESTAMP NOT NULL,
        deployed_at TIMESTAMP,
        env_hash VARCHAR,
        artifact_hash VARCHAR NOT NULL,
        publisher_id BIGINT,
        system_requirements VARCHAR,
        manifest_json VARCHAR,
        wiring_json VARCHAR,
        samples_json VARCHAR,
        UNIQUE (plugin_name, version, artifact_hash)
    """,
    "cf_library_whitelist": """
        id BIGINT PRIMARY KEY,
        library_name VARCHAR NOT NULL UNIQUE,
        version_constraint VARCHAR,
        description VARCHAR,
        added_at TIMESTAMP
    """,
    **API_TABLES,
}

ID_COLUMNS: dict[str, str] = {JOBS: "job_id"} | {
    name: "id"
    for name, columns in TABLES.items()
    if columns.lstrip().startswith("id BIGINT PRIMARY KEY")
}
"""Tables whose ids the ledger's counters hand out, with the column that holds them."""

WHITELIST: tuple[tuple[str, str], ...] = (
    ("pandas", ">=2.0.0"),
    ("pyarrow", ">=22.0.0"),
    ("numpy", ">=1.26.0"),
    ("sqlalchemy", ">=2.0.0"),
    ("pydantic", ">=2.0.0"),
    ("openpyxl", ">=3.0.0"),
    ("pypdf", ">=5.0.0"),
)
"""Libraries a plugin may import without being asked about, as a new ledger holds them."""


def create_statements() -> list[str]:
    """One CREATE TABLE per table, in the order they are made."""
    return [f"CREATE TABLE {name} ({columns})" for name, columns in TABLES.items()]


def fingerprint() -> str:
    """SHA-256 over the normalised definitions of all tables, in name order.

    White space does not count, a column, type, default or constraint does.
    """
    lines = sorted(f"{name}:{' '.join(columns.split())}" for name, columns in TABLES.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class ColumnDefinition(NamedTuple):
    name: str
    sql_type: str
    nullable: bool


def columns(table: str) -> tuple[ColumnDefinition, ...]:
    """The columns of a table, in order."""
    lines = (line.strip() for line in TABLES[table].splitlines())
    return tuple(
        ColumnDefinition(found[1], found[2], "NOT NULL" not in line and "PRIMARY KEY" not in line)
        for line in lines
        if (found := _COLUMN.match(line))
    )


def column_names(table: str) -> tuple[str, ...]:
    """The names of a table's columns, in order."""
    return tuple(column.name for column in columns(table))


def unique_lists(table: str) -> list[tuple[str, ...]]:
    """The columns of each UNIQUE constraint that has a line of its own."""
    return [
        tuple(name.strip() for name in found[1].split(","))
        for found in _UNIQUE_LIST.finditer(TABLES[table])
    ]


def primary_key(table: str) -> tuple[str, ...]:
    """The columns of a table's primary key; empty for the append-only tables."""
    definition = TABLES[table]
    listed = _KEY_LIST.search(definition)
    if listed:
        return tuple(name.strip() for name in listed[1].split(","))
    lines = (line.strip() for line in definition.splitlines())
    return tuple(
        found[1] for line in lines if "PRIMARY KEY" in line and (found := _COLUMN.match(line))
    )


_COLUMN = re.compile(r'"?([a-z_0-9]+)"? ([A-Z]+)\b')
_KEY_LIST = re.compile(r"PRIMARY KEY \(([^)]*)\)")
_UNIQUE_LIST = re.compile(r"^\s*UNIQUE \(([^)]*)\)", re.MULTILINE)
