"""Ids from the single writer's counters: no gaps where a sequence would leave them."""

import duckdb

from casparian_flow.db.schema import ID_TABLES


class Counters:
    """The next id of every table with an id column."""

    def __init__(self) -> None:
        self._next: dict[str, int] = dict.fromkeys(ID_TABLES, 1)
        self._saved: dict[str, int] = dict(self._next)

    def seed(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Start after the largest ids that are in the tables."""
        largest = " UNION ALL ".join(f"SELECT '{t}', max(id) FROM {t}" for t in ID_TABLES)
        for table, top in connection.execute(largest).fetchall():
            self._next[table] = (top or 0) + 1
        self.commit()

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
