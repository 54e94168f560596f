"""The tables of the API, as they follow from its types (protocol/http_types.py).

`cf_api_jobs` has a column for each field of `HttpJob`, with CHECKs for its enums and counts, so a
new field is one line there. The words that events, approvals and operations may use are those of
the types as well.
"""

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints

import msgspec

from casparian_flow.protocol.http_types import (
    EVENT_TYPES,
    OPERATION_TYPES,
    ApprovalStatus,
    HttpJob,
    encode_payload,
)

JOBS: Final = "cf_api_jobs"
EVENTS: Final = "cf_api_events"
APPROVALS: Final = "cf_api_approvals"
TASKS: Final = "cf_api_tasks"
PLANS: Final = "cf_api_plans"
_SQL_TYPES: Final[dict[type, str]] = {
    int: "BIGINT",
    str: "VARCHAR",
    float: "DOUBLE",
    bool: "BOOLEAN",
    datetime: "TIMESTAMP",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column and where its value is in a struct.

    Attributes:
        path: field names from the struct down to the value.
        is_json: the value is a list or dict, stored as JSON text.
    """

    name: str
    path: tuple[str, ...]
    sql_type: str
    constraint: str
    is_json: bool = False


def one_of(column: str, values: Iterable[str]) -> str:
    """A CHECK that allows these texts only."""
    listed = ", ".join(f"'{value}'" for value in values)
    return f"CHECK ({column} IN ({listed}))"


def columns_of(struct: type[msgspec.Struct]) -> tuple[Column, ...]:
    """The columns of a table whose rows are `struct`s; the first one is its key."""
    return tuple(_columns(struct, (), nullable=False))


def _columns(
    struct: type[msgspec.Struct], outer: tuple[str, ...], *, nullable: bool
) -> Iterator[Column]:
    hints = get_type_hints(struct, include_extras=True)
    for name in struct.__struct_fields__:
        kind, checks, optional = _resolved(hints[name])
        path = (*outer, name)
        column = "_".join(path)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _columns(kind, path, nullable=True)
        elif get_origin(kind) in {list, dict}:
            yield Column(f"{column}_json", path, "VARCHAR", "", is_json=True)
        else:
            rules = [] if optional or nullable else ["NOT NULL"]
            if issubclass(kind, StrEnum):
                rules.append(one_of(column, kind))
            rules += [f"CHECK ({column} >= {m.ge})" for m in checks if m.ge is not None]
            yield Column(column, path, _sql_type(kind), " ".join(rules))


def _resolved(hint: Any) -> tuple[Any, list[msgspec.Meta], bool]:
    """The plain type behind a hint, its constraints, and whether None is allowed."""
    if get_origin(hint) in {Union, types.UnionType}:
        (inner,) = [a for a in get_args(hint) if a is not type(None)]
        kind, checks, _ = _resolved(inner)
        return kind, checks, True
    if get_origin(hint) is Annotated:
        inner, *metas = get_args(hint)
        return inner, [m for m in metas if isinstance(m, msgspec.Meta)], False
    return hint, [], False


def _sql_type(kind: type) -> str:
    return next(_SQL_TYPES[base] for base in kind.__mro__ if base in _SQL_TYPES)


JOB_COLUMNS: Final = columns_of(HttpJob)


def _job_definition() -> str:
    key, *others = JOB_COLUMNS
    lines = [f"{key.name} {key.sql_type} PRIMARY KEY"]
    lines += [f"{c.name} {c.sql_type} {c.constraint}".rstrip() for c in others]
    # Where the ids of events go on, once a clean-up has taken the first ones.
    lines.append("events_removed_to BIGINT NOT NULL DEFAULT 0")
    return ",\n        ".join(lines)


API_TABLES: Final[dict[str, str]] = {
    JOBS: f"""
        {_job_definition()}
    """,
    EVENTS: f"""
        id BIGINT PRIMARY KEY,
        event_id BIGINT NOT NULL CHECK (event_id >= 1),
        job_id BIGINT NOT NULL,
        event_type VARCHAR NOT NULL {one_of("event_type", EVENT_TYPES)},
        "timestamp" TIMESTAMP NOT NULL,
        payload_json VARCHAR NOT NULL,
        UNIQUE (job_id, event_id)
    """,
    APPROVALS: f"""
        approval_id VARCHAR PRIMARY KEY,
        status VARCHAR NOT NULL {one_of("status", ApprovalStatus)},
        operation_type VARCHAR NOT NULL {one_of("operation_type", OPERATION_TYPES)},
        operation_json VARCHAR NOT NULL,
        summary VARCHAR NOT NULL,
        created_at TIMESTAMP NOT NULL,
        expires_at TIMESTAMP NOT NULL,
        decided_at TIMESTAMP,
        decided_by VARCHAR,
        rejection_reason VARCHAR,
        job_id BIGINT,
        requester VARCHAR,
        binding_json VARCHAR,
        digest VARCHAR,
        stale_reason VARCHAR
    """,
    # The jobs of the queue that an API job waits for. `own`: made for it, so that its cancel ends
    # them. `told`: their end is among its events.
    TASKS: """
        api_job_id BIGINT NOT NULL,
        job_id BIGINT NOT NULL,
        own BOOLEAN NOT NULL,
        told BOOLEAN NOT NULL DEFAULT false,
        PRIMARY KEY (api_job_id, job_id)
    """,
    # What an API job that has begun is to do, until all its jobs of the queue are made: those of
    # the first `made` files are (db/api_begin.py).
    PLANS: """
        api_job_id BIGINT PRIMARY KEY,
        plan_json VARCHAR NOT NULL,
        made BIGINT NOT NULL DEFAULT 0 CHECK (made >= 0)
    """,
}


def job_of(row: dict[str, Any]) -> HttpJob:
    """The job in a row of `cf_api_jobs`.

    `progress` is there once its phase is set, `result` once its number of rows is.
    """
    document: dict[str, Any] = {}
    for column in JOB_COLUMNS:
        value = row[column.name]
        if value is None:
            continue
        if column.is_json:
            value = msgspec.json.decode(value)
        elif isinstance(value, datetime):
            value = value.replace(tzinfo=UTC)
        *outer, last = column.path
        inner = document
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    for name, needed in _PRESENT_WITH.items():
        if name in document and needed not in document[name]:
            del document[name]
    return HttpJob(**{k: _nested(k, v) for k, v in document.items()})


_JOB_HINTS: Final = get_type_hints(HttpJob, include_extras=True)
_PRESENT_WITH: Final = {"progress": "phase", "result": "rows_processed"}


def _nested(name: str, value: Any) -> Any:
    return msgspec.convert(value, _JOB_HINTS[name]) if not isinstance(value, datetime) else value


def values_of(field: str, part: msgspec.Struct) -> dict[str, Any]:
    """The columns that hold `part`, the value of an HttpJob's field of a Struct type."""
    found = {}
    for column in JOB_COLUMNS:
        if column.path[0] == field:
            value = getattr(part, column.path[1])
            found[column.name] = encode_payload(value) if column.is_json else value
    return found
