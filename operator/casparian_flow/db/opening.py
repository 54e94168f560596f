"""Opening the ledger's file: first run, refusals, and repair of a torn write-ahead log."""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Final

import duckdb

from casparian_flow.db import schema
from casparian_flow.db.engine_errors import open_error
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import (
    LedgerCorruptError,
    LedgerError,
    NotFoundError,
    SchemaMismatchError,
)

log = logging.getLogger(__name__)

CONNECT_CONFIG: Final[dict[str, str | bool | int | float | list[str]]] = {
    # Without these DuckDB tries to install an extension from the network for a SQLite file.
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
"""All connections of one process to one file must give the same; the rest is SET afterwards."""

_CORRUPT_AT = re.compile(r"Corrupt WAL file: entry at byte position (\d+)")
_ENTRY_HEADER_BYTES: Final = 16
"""Size and checksum, eight bytes each."""


def connect(path: Path, *, create: bool) -> duckdb.DuckDBPyConnection:
    """Open the file for writing, mending a zero-filled end of its write-ahead log.

    Raises:
        NotFoundError: there is no file and `create` is false.
        LedgerError: it cannot be opened; the subclass and hint tell what to do.
    """
    if not path.exists():
        if not create:
            raise NotFoundError(
                f"there is no ledger at {path}",
                hint="Start the Sentinel once, or run `casparian init`.",
            )
        log.info("creating a new ledger (a DuckDB database) at %s", path)
    try:
        return duckdb.connect(str(path), config=dict(CONNECT_CONFIG))
    except duckdb.Error as error:
        copy = mend_wal(path, str(error))
        if copy is None:
            raise open_error(path, error) from error
    try:
        return duckdb.connect(str(path), config=dict(CONNECT_CONFIG))
    except duckdb.Error as error:
        os.replace(copy, wal_path(path))
        raise open_error(path, error) from error


def wal_path(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def mend_wal(path: Path, message: str) -> Path | None:
    """Cut a zero-filled tail off the write-ahead log, keeping the original beside it.

    A file system that had allocated but not written the last blocks before power was lost
    leaves zeros there. Nothing in them was ever acknowledged. The cut is made where DuckDB stops
    to understand the log, and only if nothing but zeros follows; the high-water mark then shows
    whether anything acknowledged is missing.

    Args:
        message: DuckDB's error.

    Returns:
        The copy of the log as it was, None if nothing was cut.
    """
    wal = wal_path(path)
    found = _CORRUPT_AT.search(message)
    if found is None or not wal.is_file():
        return None
    # DuckDB reports the position behind the header of the entry that it cannot read.
    cut = int(found[1]) - _ENTRY_HEADER_BYTES
    size = wal.stat().st_size
    if not _end_of_data(wal) <= cut < size:
        return None
    copy = wal.with_name(f"{wal.name}.damaged-{size}")
    shutil.copy2(wal, copy)
    os.truncate(wal, cut)
    log.warning(
        "the write-ahead log of %s ended in %d zero bytes; kept a copy as %s and cut it at %d",
        path,
        size - cut,
        copy.name,
        cut,
    )
    return copy


def _end_of_data(wal: Path, block: int = 1 << 20) -> int:
    """Offset after the last byte that is not zero."""
    with wal.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            kept = file.read(end - start).rstrip(b"\0")
            if kept:
                return start + len(kept)
            end = start
    return 0


def prepare(connection: duckdb.DuckDBPyConnection, path: Path | None, clock: Clock) -> str:
    """Make the tables in an empty database, or check those that are there.

    Returns:
        The ledger id.

    Raises:
        SchemaMismatchError: the tables are another version's.
        LedgerError: the database is someone else's.
    """
    tables = {
        row[0]
        for row in connection.execute(
            "SELECT table_name FROM duckdb_tables() WHERE NOT internal AND NOT temporary"
        ).fetchall()
    }
    if not tables:
        _create(connection, clock)
    elif "cf_meta" not in tables:
        raise LedgerError(
            f"{path} is a DuckDB database, but no ledger; it was left untouched",
            hint="Name another file in [database] db_location.",
        )
    meta = dict(connection.execute("SELECT key, value FROM cf_meta").fetchall())
    missing = sorted(set(schema.TABLES) - tables) if tables else []
    if meta.get("schema_fingerprint") != schema.fingerprint() or missing:
        what = f"lacks {', '.join(missing)}" if missing else "was made by another version"
        raise SchemaMismatchError(
            f"ledger {path} {what}; it was left untouched",
            hint="Run `casparian ledger export DIR` with that version and "
            "`casparian ledger import DIR` with this one, into a new file.",
        )
    ledger_id = meta.get("ledger_id", "")
    if not ledger_id:
        raise LedgerCorruptError(
            f"ledger {path} has no ledger id", hint="Restore it from a backup."
        )
    return str(ledger_id)


def _create(connection: duckdb.DuckDBPyConnection, clock: Clock) -> None:
    now_us = clock.now().wall_us
    connection.execute("BEGIN")
    for statement in schema.create_statements():
        connection.execute(statement)
    meta = {
        "ledger_id": os.urandom(4).hex(),
        "schema_fingerprint": schema.fingerprint(),
        "epoch": "0",
        "folded_seq": "0",
        "transaction_seq": "0",
        "created_at_us": str(now_us),
    }
    connection.executemany("INSERT INTO cf_meta VALUES (?, ?)", list(meta.items()))
    connection.executemany(
        "INSERT INTO cf_library_whitelist VALUES (?, ?, ?, '', make_timestamp(?))",
        [(i, name, bound, now_us) for i, (name, bound) in enumerate(schema.WHITELIST, 1)],
    )
    connection.execute("COMMIT")


def sync_directory(path: Path) -> None:
    """Make renames and new files in the folder of `path` durable."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
