"""One SELECT by somebody else, on a snapshot, with nothing else in reach."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from casparian_flow.domain.errors import LedgerError, UsageError

MAX_SQL_CHARS = 1 << 20
MEMORY_LIMIT = "1GB"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a query gave.

    Attributes:
        more: whether rows were left out because of the limit.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[Any, ...]]
    more: bool


def select(snapshot: Path, sql: str, *, limit: int) -> Answer:
    """Run one query on a copy of the ledger.

    The file is opened read-only, access to other files and to the network is off, and neither can
    be turned on again.

    Args:
        sql: one SELECT (or WITH, VALUES, DESCRIBE, EXPLAIN …), in DuckDB's SQL; columns that
            depend on a grouped primary key may be selected too (`db.sqlcompat`).
        limit: most rows; 0 for all.

    Raises:
        UsageError: more than one statement, one that is no query, or one that DuckDB refuses.
        LedgerError: the snapshot cannot be opened.
    """
    from casparian_flow.db.sqlcompat import complete_group_by

    if len(sql) > MAX_SQL_CHARS:
        raise UsageError(f"the query is longer than {MAX_SQL_CHARS} characters")
    try:
        connection = duckdb.connect(
            str(snapshot),
            read_only=True,
            config={
                "enable_external_access": "false",
                "autoload_known_extensions": "false",
                "autoinstall_known_extensions": "false",
                "memory_limit": MEMORY_LIMIT,
            },
        )
    except duckdb.Error as error:
        raise LedgerError(f"the copy of the ledger cannot be opened: {error}") from error
    try:
        connection.execute("SET TimeZone = 'UTC'; SET lock_configuration = true")
        _require_one_query(connection, sql)
        found = connection.execute(complete_group_by(sql))
        columns = [column[0] for column in found.description or []]
        rows = found.fetchmany(limit + 1) if limit else found.fetchall()
    except duckdb.Error as error:
        raise UsageError(
            f"the query failed: {error}",
            hint="docs/ledger.md lists the tables; 'SHOW TABLES' works as a query too.",
        ) from error
    finally:
        connection.close()
    return Answer(columns, rows[:limit] if limit else rows, bool(limit) and len(rows) > limit)


def _require_one_query(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    allowed = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}
    if len(statements) != 1 or statements[0].type not in allowed:
        raise UsageError(
            "one SELECT is wanted, and nothing else",
            hint="The ledger is changed by commands, never by SQL; see 'casparian --help'.",
        )
