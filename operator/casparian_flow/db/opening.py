"""Opening the ledger's file: first run, refusals, and repair of a torn write-ahead log."""

import contextlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb

from casparian_flow.db import migrations, schema
from casparian_flow.db.engine_errors import open_error
from casparian_flow.db.highwater import newest_mark, sidecar_path
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import (
    LedgerCorruptError,
    LedgerError,
    LedgerUnavailableError,
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


@dataclass(slots=True)
class Opened:
    """A connection to the ledger's file, which may still turn out to be unusable.

    Attributes:
        mended: the write-ahead log as it was, if its end had to be cut off.
    """

    path: Path
    connection: duckdb.DuckDBPyConnection
    mended: Path | None = None

    def abandon(self, *, put_back: bool) -> None:
        """Close without changing anything.

        Args:
            put_back: restore a cut log; only while nothing has been checkpointed.
        """
        close_untouched(self.connection)
        if put_back and self.mended is not None:
            os.replace(self.mended, wal_path(self.path))


def connect(path: Path, *, create: bool) -> Opened:
    """Open the file for writing, cutting a torn end off its write-ahead log.

    Raises:
        NotFoundError: there is no file and `create` is false.
        LedgerError: it cannot be opened; the subclass and hint tell what to do.
    """
    created = not path.exists()
    if created:
        _require_new_place(path, create=create)
        log.info("creating a new ledger (a DuckDB database) at %s", path)
    try:
        opened = Opened(path, duckdb.connect(str(path), config=dict(CONNECT_CONFIG)))
        if created:
            # A ledger that was deleted had its own marks; they mean nothing here.
            sidecar_path(path).unlink(missing_ok=True)
        return opened
    except duckdb.Error as error:
        copy = mend_wal(path, str(error))
        if copy is None:
            raise open_error(path, error) from error
    try:
        connection = duckdb.connect(str(path), config=dict(CONNECT_CONFIG))
    except duckdb.Error as error:
        os.replace(copy, wal_path(path))
        raise open_error(path, error) from error
    return Opened(path, connection, copy)


def _require_new_place(path: Path, *, create: bool) -> None:
    if wal_path(path).exists():
        raise LedgerCorruptError(
            f"the ledger {path} is missing, but its write-ahead log is there",
            hint="Restore the file from a backup; for a new ledger move "
            f"{wal_path(path).name} away.",
        )
    if not create:
        raise NotFoundError(
            f"there is no ledger at {path}",
            hint="Start the Sentinel once, or run `casparian init`.",
        )


def close_untouched(connection: duckdb.DuckDBPyConnection) -> None:
    """Close a database that is not to be used, leaving file and write-ahead log as they are.

    An ordinary close would checkpoint: what could be read of a damaged log would replace it.
    """
    with contextlib.suppress(duckdb.Error):  # it closes all the same
        connection.execute("PRAGMA disable_checkpoint_on_shutdown")
    connection.close()


def wal_path(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def mend_wal(path: Path, message: str) -> Path | None:
    """Cut the write-ahead log where DuckDB stops to understand it, keeping the original beside it.

    When power is lost within a commit, a file system may leave the log with its new length but
    without all of its new bytes. What is cut off was never acknowledged if nothing but zeros
    follows the cut, or if the high-water mark says so. The mark is compared after the opening; the
    log is cut here only if there is a mark.

    Args:
        message: DuckDB's error.

    Returns:
        The copy of the log as it was, None if nothing was cut.
    """
    wal = wal_path(path)
    cut = readable_bytes(message)
    if cut is None or not wal.is_file():
        return None
    size = wal.stat().st_size
    if cut >= size or (cut < _end_of_data(wal) and not newest_mark(sidecar_path(path))[1]):
        return None
    copy = wal.with_name(f"{wal.name}.damaged-{size}")
    shutil.copy2(wal, copy)
    os.truncate(wal, cut)
    log.warning(
        "the write-ahead log of %s ended in %d bytes that cannot be read; kept a copy as %s and "
        "cut it at %d",
        path,
        size - cut,
        copy.name,
        cut,
    )
    return copy


def readable_bytes(message: str) -> int | None:
    """How much of a write-ahead log DuckDB could read, by its error; None if it does not say."""
    found = _CORRUPT_AT.search(message)
    # DuckDB reports the position behind the header of the entry that it cannot read.
    return int(found[1]) - _ENTRY_HEADER_BYTES if found else None


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

    Those of an earlier version are left as they are: `bring_up` is for once all else is checked.

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
    fingerprint = meta.get("schema_fingerprint", "")
    current = fingerprint == schema.fingerprint() and not missing
    if not current and not migrations.steps_from(fingerprint):
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


def bring_up(connection: duckdb.DuckDBPyConnection, path: Path | None) -> None:
    """Bring the tables of an earlier version to this one's, with all that they hold.

    Raises:
        LedgerUnavailableError: it could not be done, and nothing is changed.
    """
    row = connection.execute(
        "SELECT value FROM cf_meta WHERE key = 'schema_fingerprint'"
    ).fetchone()
    try:
        migrations.migrate(connection, str(row[0]) if row else "")
    except duckdb.Error as error:
        raise LedgerUnavailableError(
            f"ledger {path}: its tables could not be brought to this version: {error}",
            hint="Nothing was changed. Look whether its disk is full, then start again.",
        ) from error


@dataclass(frozen=True, slots=True)
class Tail:
    """How far a ledger goes: sequence numbers of the newest commit and of the last fold."""

    epoch: int
    seq: int
    folded_seq: int


def read_tail(connection: duckdb.DuckDBPyConnection) -> Tail:
    meta = dict(connection.execute("SELECT key, value FROM cf_meta").fetchall())
    row = connection.execute("SELECT max(seq) FROM cf_journal").fetchone()
    seq = max(int(row[0] or 0) if row else 0, int(meta["transaction_seq"]))
    return Tail(int(meta["epoch"]), seq, int(meta["folded_seq"]))


def require_one_history(connection: duckdb.DuckDBPyConnection, path: Path | None) -> None:
    """Refuse a file to which an older write-ahead log was applied once more.

    Raises:
        LedgerCorruptError: entries of the journal are there twice.
    """
    row = connection.execute("SELECT count(*) - count(DISTINCT seq) FROM cf_journal").fetchone()
    if row and row[0]:
        raise LedgerCorruptError(
            f"ledger {path}: its write-ahead log is older than its file",
            hint="Restore file and log from the same backup, or go on with the file alone by "
            "`casparian ledger repair`.",
        )


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
