"""Inserting rows by columns: one row as values, small batches as lists, larger ones as Arrow.

A list parameter costs DuckDB a value object per cell, an Arrow batch costs a fixed price for the
scan (measurements: docs/ledger.md); SWITCH_ROWS is where the two meet. A plain row is planned in
half the time of either.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import duckdb
import pyarrow as pa

SWITCH_ROWS: Final = 32

Column = tuple[str, str, pa.DataType]
"""(name, SQL type, Arrow type)."""

_ARROW: dict[str, pa.DataType] = {
    "BIGINT": pa.int64(),
    "INTEGER": pa.int32(),
    "VARCHAR": pa.string(),
    "BOOLEAN": pa.bool_(),
    "DOUBLE": pa.float64(),
    "TIMESTAMP": pa.timestamp("us"),
}


class RowShape:
    """Some columns of one table, in the order in which rows give them.

    TIMESTAMP columns take integers: microseconds since the epoch, UTC.
    """

    def __init__(self, table: str, columns: Mapping[str, str]) -> None:
        self.table = table
        self.names = tuple(columns)
        self.types = tuple(columns.values())
        self.schema = pa.schema([(n, _ARROW[t]) for n, t in columns.items()])
        quoted = ", ".join(f'"{n}"' for n in self.names)
        self._from_values = (
            f"INSERT INTO {table} ({quoted}) VALUES ("
            + ", ".join(_value(i, t) for i, t in enumerate(self.types, 1))
            + ")"
        )
        self._from_lists = f"INSERT INTO {table} ({quoted}) SELECT " + ", ".join(
            _unnest(i, t) for i, t in enumerate(self.types, 1)
        )
        self._from_arrow = f"INSERT INTO {table} ({quoted}) SELECT * FROM batch"

    def insert(self, connection: duckdb.DuckDBPyConnection, rows: Sequence[Sequence[Any]]) -> None:
        """Insert all rows with one statement; none if there are none."""
        if not rows:
            return
        if len(rows) == 1:
            connection.execute(self._from_values, list(rows[0]))
            return
        columns = list(zip(*rows, strict=True))
        if len(rows) < SWITCH_ROWS:
            connection.execute(self._from_lists, [list(c) for c in columns])
            return
        batch = self.batch(columns)
        connection.execute(self._from_arrow)
        del batch

    def batch(self, columns: Iterable[Sequence[Any]]) -> pa.RecordBatch:
        """The columns as an Arrow batch; DuckDB finds it by the name of the caller's variable."""
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def _value(position: int, sql_type: str) -> str:
    if sql_type == "TIMESTAMP":
        return f"make_timestamp(${position}::BIGINT)"
    return f"${position}::{sql_type}"


def _unnest(position: int, sql_type: str) -> str:
    if sql_type == "TIMESTAMP":
        return f"make_timestamp(unnest(${position}::BIGINT[]))"
    return f"unnest(${position}::{sql_type}[])"
