"""Carrying a ledger's history from one schema to another: a Parquet file per table.

An import maps columns by name. A column that is new gets its default, one that is gone is left
behind and named in the result. The ledger id goes along, since it is part of every derived name.
"""

from pathlib import Path
from typing import Any, Final

import duckdb
import msgspec

from casparian_flow.db import schema
from casparian_flow.domain.errors import ConflictError, NotFoundError, UsageError

FORMAT: Final = 1
_MANIFEST: Final = "manifest.json"
_MANIFEST_BYTES_MAX: Final = 1 << 20
_OWN_META: Final = ("schema_fingerprint",)
"""Facts that belong to a file, not to its history."""


class Manifest(msgspec.Struct):
    """What an export says about itself."""

    format: int
    schema_fingerprint: str
    ledger_id: str
    tables: dict[str, int]
    """Rows by table."""


def export_tables(
    connection: duckdb.DuckDBPyConnection, directory: Path, ledger_id: str
) -> dict[str, int]:
    """Write every table to `directory`, which must be new or empty. Call on folded tables.

    Returns:
        Rows by table.

    Raises:
        ConflictError: the folder holds something already.
        UsageError: there can be no such folder, or it may not be used.
    """
    _make_empty(directory)
    rows = {}
    for table in _tables(connection):
        target = _quote(str(directory / f"{table}.parquet"))
        copied = connection.execute(
            f"COPY (SELECT {_listed(stored_columns(connection, table))} FROM {table}) "
            f"TO {target} (FORMAT parquet, COMPRESSION zstd)"
        ).fetchone()
        rows[table] = int(copied[0]) if copied else 0
    manifest = Manifest(FORMAT, schema.fingerprint(), ledger_id, rows)
    # Last, so that a broken export has none and is not taken for a whole one.
    (directory / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return rows


def _make_empty(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        used = any(directory.iterdir())
    except (OSError, ValueError) as error:  # a name may hold a NUL
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"cannot write to the folder {str(directory)[:200]!r}: {why}",
            hint="Give a new folder, in one that may be written.",
        ) from error
    if used:
        raise ConflictError(
            f"{directory} is not empty", hint="Give a new folder; nothing is overwritten."
        )


def import_tables(connection: duckdb.DuckDBPyConnection, directory: Path) -> dict[str, Any]:
    """Fill the tables of a new ledger from an export, inside the caller's transaction.

    Returns:
        {"tables": rows by table, "left_behind": ["table.column" or "table"]}.

    Raises:
        NotFoundError: the folder holds no export.
        UsageError: the export is damaged or of an unknown format.
    """
    manifest = read_manifest(directory)
    own = _tables(connection)
    left_behind = [table for table in manifest.tables if table not in own]
    counts = {}
    for table in own:
        if table not in manifest.tables:
            continue
        counts[table] = _import_table(connection, directory, table, left_behind)
        if counts[table] != manifest.tables[table]:
            raise UsageError(
                f"{table}: {counts[table]} rows in the export, {manifest.tables[table]} expected",
                hint="The export is damaged; make it again.",
            )
    return {"tables": counts, "left_behind": left_behind}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an export.

    Raises:
        NotFoundError: there is none.
        UsageError: it cannot be read.
    """
    path = directory / _MANIFEST
    if not path.is_file():
        raise NotFoundError(
            f"{directory} holds no ledger export", hint="Give the folder named at the export."
        )
    if path.stat().st_size > _MANIFEST_BYTES_MAX:
        raise UsageError(f"{path} is too large to be a manifest")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no manifest: {error}") from error
    if manifest.format != FORMAT:
        raise UsageError(f"{directory} has export format {manifest.format}, this one is {FORMAT}")
    return manifest


def _import_table(
    connection: duckdb.DuckDBPyConnection, directory: Path, table: str, left_behind: list[str]
) -> int:
    source = f"read_parquet({_quote(str(directory / f'{table}.parquet'))})"
    try:
        given = [
            row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
        ]
        taken = stored_columns(connection, table)
        shared = [column for column in given if column in taken]
        left_behind += [f"{table}.{column}" for column in given if column not in taken]
        if table == "cf_meta":
            kept = ", ".join(_quote(key) for key in _OWN_META)
            source += f" WHERE key NOT IN ({kept})"
            # What a newer schema notes besides stays as it is.
            connection.execute(f"DELETE FROM cf_meta WHERE key IN (SELECT key FROM {source})")
        else:
            connection.execute(f"DELETE FROM {table}")
        row = connection.execute(
            f"INSERT INTO {table} ({_listed(shared)}) SELECT {_listed(shared)} FROM {source}"
        ).fetchone()
    except (duckdb.IOException, duckdb.InvalidInputException, duckdb.DataError) as error:
        raise UsageError(
            f"the export's {table} cannot be taken over: {error}",
            hint="The export is damaged, or a column has no value that the new schema asks for.",
        ) from error
    except duckdb.ConstraintException as error:
        raise UsageError(
            f"the export's {table} breaks a rule of this schema: {error}",
            hint="Run `casparian ledger check` on the old ledger.",
        ) from error
    count = int(row[0]) if row else 0
    return count + len(_OWN_META) if table == "cf_meta" else count


def stored_columns(connection: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    """The columns of a table that hold values, without generated ones."""
    rows = connection.execute(
        "SELECT column_name FROM duckdb_columns() WHERE table_name = $1 AND NOT internal "
        "ORDER BY column_index",
        [table],
    ).fetchall()
    generated = _generated(connection, table)
    return [row[0] for row in rows if row[0] not in generated]


def _generated(connection: duckdb.DuckDBPyConnection, table: str) -> set[str]:
    rows = connection.execute(f"PRAGMA table_info('{table}')").fetchall()
    sql = connection.execute(
        "SELECT sql FROM duckdb_tables() WHERE table_name = $1", [table]
    ).fetchone()
    text = str(sql[0]) if sql else ""
    return {row[1] for row in rows if f" {row[1]} {row[2]} GENERATED" in text}


def _tables(connection: duckdb.DuckDBPyConnection) -> list[str]:
    rows = connection.execute(
        "SELECT table_name FROM duckdb_tables() WHERE NOT internal AND NOT temporary "
        "AND table_name LIKE 'cf\\_%' ESCAPE '\\' ORDER BY table_name"
    ).fetchall()
    return [row[0] for row in rows]


def _listed(columns: list[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
