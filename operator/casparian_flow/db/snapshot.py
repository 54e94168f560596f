"""A consistent copy of the ledger for readers, made by its owner."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import duckdb

from casparian_flow.db import opening
from casparian_flow.domain.errors import LedgerUnavailableError

_COPY_SECONDS_MAX: Final = 600


def copy_files(source: Path, target: Path) -> None:
    """Copy a ledger's file and write-ahead log while nothing writes to them.

    Another process copies, because closing any descriptor of the file in this one would drop
    DuckDB's lock on it. A reader that opens the copy replays the log.

    Raises:
        LedgerUnavailableError: the copy could not be made; nothing of it is left.
    """
    pairs = [(source, target)]
    if opening.wal_path(source).exists():
        pairs.append((opening.wal_path(source), opening.wal_path(target)))
    cp = shutil.which("cp")
    if cp is None:
        raise LedgerUnavailableError("no snapshot: there is no cp command on PATH")
    for old, new in pairs:
        try:
            subprocess.run(
                [cp, "--reflink=auto", "--", os.fspath(old), os.fspath(new)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COPY_SECONDS_MAX,
            )
        except (subprocess.SubprocessError, OSError) as error:
            remove(target)
            detail = getattr(error, "stderr", "") or str(error)
            raise LedgerUnavailableError(
                f"no snapshot of the ledger could be made: {detail.strip()}",
                hint=f"Check the space in {target.parent}.",
            ) from error


def copy_memory(connection: duckdb.DuckDBPyConnection, target: Path) -> None:
    """Write an in-memory ledger into a new file."""
    name = connection.execute("SELECT current_database()").fetchone()
    quoted = str(target).replace("'", "''")
    connection.execute(f"ATTACH '{quoted}' AS snapshot_copy")
    try:
        connection.execute(f'COPY FROM DATABASE "{name[0] if name else "memory"}" TO snapshot_copy')
    finally:
        connection.execute("DETACH snapshot_copy")


def remove(path: Path) -> None:
    """Delete a snapshot with its log; no error if it is gone."""
    path.unlink(missing_ok=True)
    opening.wal_path(path).unlink(missing_ok=True)


def open_and_unlink(path: Path) -> duckdb.DuckDBPyConnection:
    """A read-only connection to a snapshot whose files vanish with it.

    Raises:
        duckdb.Error: the snapshot cannot be read.
    """
    try:
        return duckdb.connect(str(path), read_only=True, config=dict(opening.CONNECT_CONFIG))
    finally:
        remove(path)
