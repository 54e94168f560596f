"""Ids from the single writer's counters: no gaps where a sequence would leave them.

The one gap there may be is made on purpose: a ledger whose newest commits may be lost must not
give their ids to other jobs and files, because outputs, fences and workers still bear them.
"""

from collections.abc import Iterable
from typing import Final

import duckdb

from casparian_flow.db.schema import ID_COLUMNS

ID_LEAP: Final = 1_000_000
EPOCH_LEAP: Final = 1_000
_FIRST: Final = "first_id:"


def leap(connection: duckdb.DuckDBPyConnection) -> None:
    """Within the open transaction, put ids and epochs out of reach of what may be lost."""
    for table, column in ID_COLUMNS.items():
        connection.execute(
            f"INSERT OR REPLACE INTO cf_meta SELECT $1, (greatest(coalesce(max({column}), 0), "
            "coalesce((SELECT value::BIGINT FROM cf_meta WHERE key = $1), 0)) + $2)::VARCHAR "
            f"FROM {table}",
            [_FIRST + table, ID_LEAP],
        )
    connection.execute(
        "UPDATE cf_meta SET value = (value::BIGINT + $1)::VARCHAR WHERE key = 'epoch'",
        [EPOCH_LEAP],
    )


class Counters:
    """The next id of every table with an id column."""

    def __init__(self) -> None:
        self._next: dict[str, int] = dict.fromkeys(ID_COLUMNS, 1)
        self._saved: dict[str, int] = dict(self._next)

    def seed(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Start after the largest ids that are in the tables, and after a leap."""
        largest = " UNION ALL ".join(
            f"SELECT '{table}', max({column}) FROM {table}" for table, column in ID_COLUMNS.items()
        )
        for table, top in connection.execute(largest).fetchall():
            self._next[table] = (top or 0) + 1
        leaps = connection.execute(
            "SELECT key, value FROM cf_meta WHERE starts_with(key, $1)", [_FIRST]
        ).fetchall()
        for key, first in leaps:
            table = key.removeprefix(_FIRST)
            if table in self._next:  # a ledger imported from another version may name more
                self.reach(table, int(first) - 1)
        self.commit()

    def keep(self, connection: duckdb.DuckDBPyConnection, tables: Iterable[str]) -> None:
        """Within the open transaction, note the ids given so far: their rows may be deleted now,
        and no later opening gives them again."""
        connection.executemany(
            "INSERT OR REPLACE INTO cf_meta VALUES ($1, $2)",
            [(_FIRST + table, str(self._next[table])) for table in tables],
        )

    def peek(self, table: str) -> int:
        return self._next[table]

    def take(self, table: str, count: int) -> range:
        first = self._next[table]
        self._next[table] = first + count
        return range(first, first + count)

    def reach(self, table: str, used: int) -> None:
        """Never hand out `used` or anything below it again."""
        self._next[table] = max(self._next[table], used + 1)

    def commit(self) -> None:
        self._saved = dict(self._next)

    def rollback(self) -> None:
        self._next = dict(self._saved)
