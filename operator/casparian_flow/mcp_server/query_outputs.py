"""What a query's process offers of published outputs: a table for each topic.

Files (Parquet, CSV) become views that read them. A database file belongs to its writers: while a
query reads it, nobody publishes into it. So the rows of a SQLite or DuckDB table are copied into
the process's memory, and the file is let go before the query begins; what else is in that file,
no query can name.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote as url_quote

import duckdb

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.outputs import parse_sink_uri

READERS: Final = {
    "parquet": "read_parquet({}, union_by_name = true)",
    # The first line is the header, whatever it looks like: guessing could take a row for it.
    "csv": "read_csv({}, union_by_name = true, header = true)",
}
LOADED: Final = "loaded"
"""Schema of the copies, in the process's memory."""
COPY_ROWS: Final = 10_000
LOCKED_TRIES: Final = 20
LOCKED_WAIT_S: Final = 0.1
_SQLITE_TYPES: Final = {"INTEGER": "BIGINT", "REAL": "DOUBLE", "BLOB": "BLOB"}
_SQLITE_CLASSES: Final = {
    "BIGINT": "'integer', 'null'",
    "DOUBLE": "'real', 'integer', 'null'",
    "BLOB": "'blob', 'null'",
}


class UnreadableError(Exception):
    """An output that is there and cannot be read now."""


@dataclass(frozen=True, slots=True)
class Files:
    """An output in files of one format."""

    scheme: str
    paths: list[str]


@dataclass(frozen=True, slots=True)
class Tables:
    """An output in tables of database files: (path, table) of each."""

    scheme: str
    places: list[tuple[str, str]]


def published_outputs(
    connection: duckdb.DuckDBPyConnection, output_root: str
) -> Iterator[tuple[str, Files | Tables]]:
    """(name, output) for each published topic whose files are there, below the output root.

    A topic is named as it is; with two formats, the format is added: `sales_csv`.

    Args:
        connection: has the ledger attached as `ledger`.
    """
    found = connection.execute(
        "SELECT lower(topic || CASE WHEN kind = 'quarantine' "
        "AND NOT ends_with(topic, '_quarantine') THEN '_quarantine' ELSE '' END) AS name,"
        " split_part(sink_uri, '://', 1) AS scheme,"
        " list(DISTINCT [sink_uri, final]) FROM ledger.main.cf_output WHERE state = 'PUBLISHED'"
        " AND \"rows\" > 0 AND scheme IN ('parquet', 'csv', 'sqlite', 'duckdb')"
        " GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    several = {name for i, (name, *_) in enumerate(found) if i and found[i - 1][0] == name}
    root = os.path.realpath(output_root)
    for name, scheme, places in found:
        output = _there(root, scheme, sorted(map(tuple, places)))
        if output is not None:
            yield (f"{name}_{scheme}" if name in several else name), output


def _there(root: str, scheme: str, places: Sequence[tuple[str, ...]]) -> Files | Tables | None:
    """The output, without what is not there, or not truly below the root; None without any."""
    if scheme in READERS:
        paths = [path for _, final in places if (path := _below(root, final))]
        return Files(scheme, paths) if paths else None
    with contextlib.suppress(UsageError):
        tables = [
            (path, table)
            for uri, table in places
            if (path := _below(root, parse_sink_uri(uri).path))
        ]
        return Tables(scheme, tables) if tables else None
    return None


def _below(root: str, place: str) -> str | None:
    path = os.path.realpath(os.path.join(root, place))
    return path if path.startswith(root + "/") and Path(path).is_file() else None


def offer(
    connection: duckdb.DuckDBPyConnection, name: str, output: Files | Tables, *, rows: bool
) -> None:
    """Make the view `outputs.NAME`.

    Args:
        rows: whether the query reads it; where it only lists tables, no row is copied, and
            what cannot be read is left out.

    Raises:
        UnreadableError: a database file that is locked, or that cannot be read.
        duckdb.Error: as for any query; InterruptException if its time is over.
    """
    if isinstance(output, Files):
        source = READERS[output.scheme].format(f"[{', '.join(map(quoted, output.paths))}]")
        selects = [f"SELECT * FROM {source}"]  # noqa: S608 - quoted
    else:
        copy = _copy_sqlite if output.scheme == "sqlite" else _copy_duckdb
        selects = []
        for number, (path, table) in enumerate(output.places):
            copied = f"{LOADED}.{identifier(f'{name}_{number}')}"
            try:
                found = copy(connection, path, table, copied, rows=rows)
            except UnreadableError:
                if rows:
                    raise
                continue
            if found:
                selects.append(f"SELECT * FROM {copied}")  # noqa: S608 - quoted
    if selects:
        both = " UNION ALL BY NAME ".join(selects)
        connection.execute(f"CREATE VIEW outputs.{identifier(name)} AS {both}")


# -- DuckDB ---------------------------------------------------------------------------------------


def _copy_duckdb(
    connection: duckdb.DuckDBPyConnection, path: str, table: str, copied: str, *, rows: bool
) -> bool:
    """Copy a table; whether it is there."""
    _attach(connection, path)
    try:
        found = connection.execute(
            "SELECT 1 FROM duckdb_tables() WHERE database_name = 'source' "
            "AND schema_name = 'main' AND lower(table_name) = lower($1)",
            [table],
        ).fetchone()
        if found:
            connection.execute(
                f"CREATE TABLE {copied} AS FROM source.main.{identifier(table)} "
                f"{'' if rows else 'LIMIT 0'}"
            )
        return bool(found)
    finally:
        connection.execute("DETACH source")


def _attach(connection: duckdb.DuckDBPyConnection, path: str) -> None:
    for attempt in range(LOCKED_TRIES):
        try:
            connection.execute(f"ATTACH {quoted(path)} AS source (READ_ONLY)")
            return
        except duckdb.IOException as error:
            if "lock" not in str(error) or attempt + 1 == LOCKED_TRIES:
                raise _unreadable(path) from error
        except duckdb.InterruptException:
            raise
        except duckdb.Error as error:
            raise _unreadable(path) from error
        threading.Event().wait(LOCKED_WAIT_S)


# -- SQLite ---------------------------------------------------------------------------------------


def _copy_sqlite(
    connection: duckdb.DuckDBPyConnection, path: str, table: str, copied: str, *, rows: bool
) -> bool:
    """Copy a table; whether it is there. A column whose values are not all of its declared type
    becomes text."""
    timeout_s = LOCKED_TRIES * LOCKED_WAIT_S
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{url_quote(path)}?mode=ro", uri=True, timeout=timeout_s)
        ) as source:
            source.text_factory = lambda text: text.decode(errors="replace")
            source.execute("PRAGMA trusted_schema = OFF")
            # One moment for all that is read.
            source.execute("BEGIN")
            types = _sqlite_columns(source, table, rows=rows)
            if types:
                _copy_rows(connection, source, table, copied, types, rows=rows)
            return bool(types)
    except sqlite3.Error as error:
        raise _unreadable(path) from error


def _sqlite_columns(source: sqlite3.Connection, table: str, *, rows: bool) -> dict[str, str]:
    """DuckDB's type of each column; nothing if there is no such table."""
    declared = source.execute(
        "SELECT c.name, upper(c.type) FROM sqlite_master m, pragma_table_info(m.name) c "
        "WHERE m.type = 'table' AND m.name = ? COLLATE NOCASE",
        (table,),
    ).fetchall()
    types = {str(name): _SQLITE_TYPES.get(kind, "VARCHAR") for name, kind in declared}
    narrow = [name for name, kind in types.items() if kind in _SQLITE_CLASSES]
    if rows and narrow:
        misfits = ", ".join(
            f"sum(typeof({identifier(n)}) NOT IN ({_SQLITE_CLASSES[types[n]]}))" for n in narrow
        )
        counts = source.execute(f"SELECT {misfits} FROM {identifier(table)}").fetchone()  # noqa: S608
        types |= {n: "VARCHAR" for n, count in zip(narrow, counts, strict=True) if count}
    return types


def _copy_rows(
    connection: duckdb.DuckDBPyConnection,
    source: sqlite3.Connection,
    table: str,
    copied: str,
    types: dict[str, str],
    *,
    rows: bool,
) -> None:
    import pyarrow as pa  # only few queries need it

    definitions = ", ".join(f"{identifier(name)} {kind}" for name, kind in types.items())
    connection.execute(f"CREATE TABLE {copied} ({definitions})")
    if not rows:
        return
    arrow: dict[str, pa.DataType] = {
        "BIGINT": pa.int64(), "DOUBLE": pa.float64(), "BLOB": pa.binary(), "VARCHAR": pa.string(),
    }  # fmt: skip
    schema = pa.schema([(name, arrow[kind]) for name, kind in types.items()])
    selected = ", ".join(
        f"CAST({identifier(name)} AS TEXT)" if kind == "VARCHAR" else identifier(name)
        for name, kind in types.items()
    )
    cursor = source.execute(f"SELECT {selected} FROM {identifier(table)}")  # noqa: S608 - quoted
    while some := cursor.fetchmany(COPY_ROWS):
        columns: list[tuple[Any, ...]] = list(zip(*some, strict=True))
        arrays = [
            pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)
        ]
        connection.register("some_rows", pa.Table.from_arrays(arrays, schema=schema))
        try:
            connection.execute(f"INSERT INTO {copied} FROM some_rows")
        finally:
            connection.unregister("some_rows")


def _unreadable(path: str) -> UnreadableError:
    return UnreadableError(
        f"the database {Path(path).name} of an output cannot be read now; it may just be written "
        "to: repeat the query"
    )


def quoted(text: str) -> str:
    """As a literal in SQL."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """As a name in SQL."""
    return '"' + name.replace('"', '""') + '"'
