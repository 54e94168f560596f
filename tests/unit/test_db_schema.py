"""Python and SQL agree: tables, models, enums, keys."""

import re
from enum import StrEnum

import duckdb
import pytest
from sqlalchemy import UniqueConstraint, inspect
from sqlalchemy.dialects import postgresql

from casparian_flow.db import schema
from casparian_flow.db.check import RULES
from casparian_flow.db.models import Base
from casparian_flow.domain.jobs import KIND_STATUS, CompletionStatus, JobStatus, JournalKind
from casparian_flow.domain.outputs import OutputKind, OutputState, SinkMode
from casparian_flow.domain.wiring import Origin, PluginStatus, SourceType, WorkerStatus
from casparian_flow.protocol import ApprovalStatus, HttpJobStatus, HttpJobType
from casparian_flow.protocol.http_types import EVENT_TYPES, OPERATION_TYPES

MODELS = {mapper.class_.__table__.name: mapper.class_ for mapper in Base.registry.mappers}


@pytest.fixture
def database() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(":memory:")
    for statement in schema.create_statements():
        connection.execute(statement)
    return connection


def test_there_is_a_model_for_every_table() -> None:
    assert set(MODELS) == set(schema.TABLES)


@pytest.mark.parametrize("table", sorted(schema.TABLES))
def test_a_model_has_the_columns_of_its_table(
    database: duckdb.DuckDBPyConnection, table: str
) -> None:
    rows = database.execute(
        "SELECT column_name, data_type, is_nullable FROM duckdb_columns() WHERE table_name = ? "
        "ORDER BY column_index",
        [table],
    ).fetchall()
    dialect = postgresql.dialect()
    names = {"DOUBLE PRECISION": "DOUBLE", "TIMESTAMP WITHOUT TIME ZONE": "TIMESTAMP"}
    modelled = []
    for column in MODELS[table].__table__.columns:
        sql_type = column.type.compile(dialect)
        sql_type = re.sub(r"FLOAT\(53\)", "DOUBLE", sql_type)
        nullable = bool(column.nullable) or column.computed is not None
        modelled.append((column.name, names.get(sql_type, sql_type), nullable))
    assert sorted(modelled) == sorted(rows)
    assert list(schema.column_names(table)) == [row[0] for row in rows]


@pytest.mark.parametrize("table", sorted(schema.TABLES))
def test_keys_are_those_of_the_database(database: duckdb.DuckDBPyConnection, table: str) -> None:
    rows = database.execute(
        "SELECT constraint_type, constraint_column_names FROM duckdb_constraints() "
        "WHERE table_name = ? AND constraint_type IN ('PRIMARY KEY', 'UNIQUE')",
        [table],
    ).fetchall()
    keys = [tuple(names) for kind, names in rows if kind == "PRIMARY KEY"]
    assert schema.primary_key(table) == (keys[0] if keys else ())
    model = MODELS[table].__table__
    if keys:
        assert tuple(c.name for c in inspect(MODELS[table]).primary_key) == keys[0]
    unique = {tuple(names) for kind, names in rows if kind == "UNIQUE"}
    declared = {
        tuple(c.name for c in constraint.columns)
        for constraint in model.constraints
        if isinstance(constraint, UniqueConstraint)
    }
    assert declared == unique


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("cf_processing_queue", "status", JobStatus),
        ("cf_processing_queue", "completion_status", CompletionStatus),
        ("cf_journal", "kind", JournalKind),
        ("cf_output", "kind", OutputKind),
        ("cf_output", "mode", SinkMode),
        ("cf_output", "state", OutputState),
        ("cf_topic_config", "mode", SinkMode),
        ("cf_topic_config", "origin", Origin),
        ("cf_routing_rule", "origin", Origin),
        ("cf_plugin_manifest", "status", PluginStatus),
        ("cf_source_root", "type", SourceType),
        ("cf_worker_node", "status", WorkerStatus),
        ("cf_api_jobs", "job_type", HttpJobType),
        ("cf_api_jobs", "status", HttpJobStatus),
        ("cf_api_approvals", "status", ApprovalStatus),
    ],
)
def test_a_check_allows_exactly_the_enum(
    database: duckdb.DuckDBPyConnection, table: str, column: str, values: type[StrEnum]
) -> None:
    rows = database.execute(
        "SELECT constraint_text FROM duckdb_constraints() "
        "WHERE table_name = ? AND constraint_type = 'CHECK' AND constraint_column_names = [?]",
        [table, column],
    ).fetchall()
    (text,) = [row[0] for row in rows if "'" in row[0]]
    assert set(re.findall(r"'([^']*)'", text)) == {v.value for v in values}


def test_events_and_operations_may_have_exactly_the_types_there_are(
    database: duckdb.DuckDBPyConnection,
) -> None:
    for table, column, types in (
        ("cf_api_events", "event_type", EVENT_TYPES),
        ("cf_api_approvals", "operation_type", OPERATION_TYPES),
    ):
        rows = database.execute(
            "SELECT constraint_text FROM duckdb_constraints() "
            "WHERE table_name = ? AND constraint_type = 'CHECK' AND constraint_column_names = [?]",
            [table, column],
        ).fetchall()
        (text,) = [row[0] for row in rows if "'" in row[0]]
        assert set(re.findall(r"'([^']*)'", text)) == set(types)


def test_every_column_named_for_a_state_has_a_check(database: duckdb.DuckDBPyConnection) -> None:
    columns = database.execute(
        "SELECT table_name, column_name FROM duckdb_columns() "
        "WHERE column_name IN ('status', 'state', 'mode', 'origin', 'completion_status')"
    ).fetchall()
    checked = {
        (table, names[0])
        for table, names in database.execute(
            "SELECT table_name, constraint_column_names FROM duckdb_constraints() "
            "WHERE constraint_type = 'CHECK'"
        ).fetchall()
        if names
    }
    assert set(columns) <= checked


def test_the_check_of_queue_and_journal_knows_every_kind() -> None:
    (rule,) = [sql for text, sql in RULES if "its journal ends with" in text]
    known = dict(re.findall(r"WHEN '(\w+)' THEN '(\w+)'", rule))
    for kind, status in KIND_STATUS.items():
        assert known.get(kind, kind) == status


def test_the_fingerprint_ignores_white_space_and_notices_a_column(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = schema.fingerprint()
    monkeypatch.setitem(
        schema.TABLES, "cf_meta", " key VARCHAR   PRIMARY KEY,\nvalue VARCHAR NOT NULL"
    )
    assert schema.fingerprint() == before
    monkeypatch.setitem(schema.TABLES, "cf_meta", "key VARCHAR PRIMARY KEY, value VARCHAR")
    assert schema.fingerprint() != before
