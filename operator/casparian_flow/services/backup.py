"""Exports of a ledger that some Sentinel owns, kept in a folder, the newest few of them.

The Sentinel makes a consistent copy of its files and goes on; the copy is fetched in parts, opened
here and exported. What can be opened and exported is known to be sound, and an export can be
imported by any later version (`casparian ledger import`). The copy has no high-water mark, so that
its ids and its epoch leap: a ledger that is restored gives no id and no token twice that were
given after the backup.
"""

import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from casparian_flow.domain.clock import Clock, utc
from casparian_flow.domain.errors import CasparianError, LedgerError
from casparian_flow.sentinel.api import ControlApi

NAME: Final = re.compile(r"ledger-\d{8}T\d{6}Z")
COPY_NAME: Final = "ledger.duckdb"
_WAL: Final = ".wal"

log = logging.getLogger(__name__)


def backup(control: ControlApi, folder: Path, *, keep: int, clock: Clock) -> Path:
    """Export the ledger behind `control` into a new folder below `folder`.

    Args:
        keep: exports that stay, the new one included; older ones are deleted.

    Returns:
        The new folder. It has its name only once all of it is on disk.

    Raises:
        LedgerError: the copy cannot be opened, or the folder cannot be written.
        SentinelUnreachableError: the Sentinel went away.
    """
    name = f"ledger-{utc(clock.now().wall_us):%Y%m%dT%H%M%SZ}"
    draft, target = folder / f".{name}.draft", folder / name
    try:
        _remove_drafts(folder)
        draft.mkdir(parents=True)
        copy = draft / COPY_NAME
        fetch_copy(control, copy)
        _export(copy, draft / "export")
        _sync(draft / "export")
        (draft / "export").rename(target)
        _sync(folder)
        for old in sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))[:-keep]:
            shutil.rmtree(old)
    except OSError as error:
        raise LedgerError(
            f"no backup in {folder}: {error}", hint="Look at the space and rights there."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _remove_drafts(folder: Path) -> None:
    """What a backup that was killed has left."""
    for draft in folder.glob(".ledger-*.draft"):
        shutil.rmtree(draft)


def fetch_copy(control: ControlApi, target: Path) -> None:
    """Have a consistent copy of the ledger behind `control` here, with its write-ahead log beside.

    Raises:
        SentinelUnreachableError: the Sentinel went away.
        OSError: it cannot be written.
    """
    name = Path(control.snapshot()).name
    try:
        for suffix in ("", _WAL):
            _fetch_file(control, name + suffix, target.with_name(target.name + suffix))
    finally:
        # The Sentinel deletes it sooner or later; a failure before this one tells more.
        with suppress(CasparianError):
            control.remove_snapshot(name)


def _fetch_file(control: ControlApi, name: str, target: Path) -> None:
    size = 0
    with target.open("wb") as file:
        while part := control.snapshot_part(name, size):
            file.write(part)
            size += len(part)
    if not size:
        target.unlink()


def _export(copy: Path, target: Path) -> None:
    from casparian_flow.sentinel.control import connect

    log.info("exporting the copy; its ids go on further, for what comes after a restore")
    with connect(copy) as ledger:
        ledger.export(str(target))


def _sync(folder: Path) -> None:
    """Have a folder and the files in it on disk."""
    for path in (*folder.iterdir(), folder):
        if path.is_dir() and path != folder:
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
