"""DuckDB's exceptions as errors that people can act on.

DuckDB tells failures apart by message text only; the texts below are those of 1.5 and 2.0.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from casparian_flow.domain.errors import (
    CommitFailedError,
    LedgerCorruptError,
    LedgerError,
    LedgerLockedError,
    LedgerUnavailableError,
)

_PID = re.compile(r"\(PID (\d+)\)")
_SQLITE_MAGIC = b"SQLite format 3\0"

_RESTORE_HINT = (
    "Keep the file and its .wal as they are, and restore both from a backup; "
    "`casparian ledger repair` can mend the log only."
)
_COMMIT_CAUSES: tuple[tuple[str, str, str], ...] = (
    ("No space left on device", "the disk is full", "Free space on the ledger's disk."),
    ("Disk quota exceeded", "the disk quota is used up", "Free space or raise the quota."),
    ("File too large", "the ledger may not grow", "Raise the file size limit of the process."),
    ("Read-only file system", "the file system is read-only", "Mount it writable again."),
    ("read-only mode", "the ledger is open read-only", "Open it for writing."),
    ("Permission denied", "writing is not permitted", "Check the owner and mode of the file."),
    ("fsync failed", "the disk cannot be synced", "Check the disk before going on."),
    ("Input/output error", "the disk reports an I/O error", "Check the disk before going on."),
    (
        "Corrupt database file",
        "the ledger's file is damaged",
        "Stop the Sentinel and restore the ledger from a backup.",
    ),
    ("Out of Memory", "the memory limit is used up", "Raise the ledger's memory limit."),
)


def commit_error(error: duckdb.Error, outcome_unknown: bool) -> CommitFailedError:
    """What a failed commit means: nothing of it may be acknowledged."""
    text = str(error)
    cause, hint = _cause(text)
    if outcome_unknown:
        cause += ", and whether it reached the disk is unknown"
        hint += " A running Sentinel opens the ledger anew by itself."
    return CommitFailedError(f"commit failed: {cause} ({_first_line(text)})", hint=hint)


def export_error(folder: Path, error: duckdb.Error | OSError) -> LedgerUnavailableError:
    """Why an export could not be written to `folder`."""
    cause, _ = _cause(str(error))
    return LedgerUnavailableError(
        f"the export to {folder} failed: {cause} ({_first_line(str(error))})",
        hint="Choose a folder with room that may be written, and repeat the export.",
    )


def _cause(text: str) -> tuple[str, str]:
    for needle, cause, hint in _COMMIT_CAUSES:
        if needle in text:
            return cause, hint
    return "the database refused it", "See the message; nothing was acknowledged."


def read_error(path: Path | None, error: duckdb.Error) -> LedgerError:
    """What a failed read means."""
    text = str(error)
    if "Corrupt database file" in text or "Could not read enough bytes" in text:
        return LedgerCorruptError(
            f"ledger {path} is damaged: {_first_line(text)}", hint=_RESTORE_HINT
        )
    return LedgerUnavailableError(
        f"the ledger cannot be read: {_first_line(text)}",
        hint="Look at the disk and at the memory limit, then repeat this.",
    )


@contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """Reads of a ledger: whatever the engine says in here is raised as a LedgerError.

    A cursor opened before a failed commit meets a database that the failure has invalidated.
    """
    try:
        yield
    except duckdb.Error as error:
        raise read_error(path, error) from error


def side_file_error(path: Path, error: OSError) -> LedgerUnavailableError:
    """Why the sidecar or the folder of the ledger at `path` cannot be used."""
    return LedgerUnavailableError(
        f"ledger {path}: {error}",
        hint="Free space, or check the owner and mode of the folder and the files beside it.",
    )


def is_fatal(error: duckdb.Error) -> bool:
    """Whether the database can only be used again after it has been closed and opened."""
    text = str(error)
    return isinstance(error, duckdb.FatalException) or any(
        mark in text for mark in ("has been invalidated", "fsync", "FATAL")
    )


def open_error(path: Path, error: duckdb.Error) -> LedgerError:
    """Why the ledger at `path` cannot be opened. Call only while no DuckDB of this process has
    the file open: looking into it would release that one's lock (POSIX locks fall with any close).
    """
    text = str(error)
    if "Could not set lock" in text:
        return _locked(path, text)
    if "different configuration" in text:
        return LedgerLockedError(
            f"ledger {path} is open in this process with other settings",
            hint="Close the other DuckDB connection, or use the ledger that is open.",
        )
    if path.is_dir():
        return LedgerError(f"ledger {path} is a directory", hint="Give the path of a file.")
    if _starts_with(path, _SQLITE_MAGIC):
        return LedgerError(
            f"{path} is a SQLite database, not a ledger of this system; it was left untouched",
            hint="Name another file in [database] db_location, or move this one away.",
        )
    if "not a valid DuckDB database file" in text:
        return LedgerCorruptError(
            f"{path} is no DuckDB database; it was left untouched",
            hint="Name another file in [database] db_location, or restore it from a backup.",
        )
    return _file_error(path, text)


def _file_error(path: Path, text: str) -> LedgerError:
    if "No such file or directory" in text:
        return LedgerError(
            f"ledger {path}: the folder does not exist", hint=f"Create {path.parent}."
        )
    if "Permission denied" in text or "Read-only file system" in text:
        return LedgerError(
            f"ledger {path} cannot be opened for writing: {_first_line(text)}",
            hint="Check the owner and mode of the file and its folder, or choose another place.",
        )
    for needle, cause, hint in _COMMIT_CAUSES:
        if needle in text and needle != "Corrupt database file":
            return LedgerUnavailableError(f"ledger {path}: {cause}", hint=hint)
    if "WAL" in text:
        return LedgerCorruptError(
            f"ledger {path}: its write-ahead log is damaged: {_first_line(text)}",
            hint="Restore the ledger from a backup, or go on with what can be read by "
            "`casparian ledger repair`.",
        )
    return LedgerCorruptError(
        f"ledger {path} cannot be opened: {_first_line(text)}", hint=_RESTORE_HINT
    )


def _locked(path: Path, text: str) -> LedgerLockedError:
    found = _PID.search(text)
    who = f"process {found[1]}" if found else "another process"
    return LedgerLockedError(
        f"ledger {path} is open in {who}",
        hint="If a Sentinel runs there, ask it over its control socket; else stop that process.",
    )


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:300]
