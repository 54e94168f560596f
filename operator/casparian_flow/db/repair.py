"""Going on with a damaged ledger, knowingly: what can be read is kept, the rest is set aside.

A ledger that is damaged or ends below its high-water mark is refused, since opening it would
forget what was acknowledged. Where there is no better copy, `repair` opens what there is. Before
anything is changed, file, log and mark are copied into a folder beside them.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import duckdb

from casparian_flow.db.engine_errors import side_file_error
from casparian_flow.db.highwater import newest_mark, sidecar_path
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.opening import (
    CONNECT_CONFIG,
    close_untouched,
    readable_bytes,
    sync_directory,
    wal_path,
)
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import LedgerCorruptError, NotFoundError

log = logging.getLogger(__name__)

ATTEMPTS: tuple[str, ...] = ("the whole log", "the readable part of the log", "no log")


@dataclass(frozen=True, slots=True)
class Repair:
    """How a repair went.

    Attributes:
        ends_at: sequence number of the newest commit that is left.
        acknowledged: that of the newest one ever acknowledged, as far as it is known; 0 if not.
        kept: folder with the files as they were; None if the ledger was sound.
        used: which of ATTEMPTS it was made from.
    """

    ends_at: int
    acknowledged: int
    kept: Path | None = None
    used: str = ATTEMPTS[0]

    @property
    def lost(self) -> int:
        """How many acknowledged sequence numbers (a record or transaction each) are gone."""
        return max(0, self.acknowledged - self.ends_at)


def repair(path: Path, clock: Clock) -> Repair:
    """Make the ledger at `path` usable from what can be read of it.

    The first that gives a sound ledger is taken: the whole write-ahead log, its part before the
    damage, none of it. Ids and epochs then leap (counters.py), so that what is forgotten here
    but lives on in sinks and workers meets no namesake.

    Raises:
        NotFoundError: there is no file.
        LedgerLockedError: a process has the ledger open.
        LedgerCorruptError: the file itself is damaged; everything is as it was.
        LedgerError: it cannot be opened for another reason than damage; nothing is changed.
        LedgerUnavailableError: no space for the copies.
    """
    path = path.resolve()
    if not path.exists():
        raise NotFoundError(f"there is no ledger at {path}", hint="Restore it from a backup.")
    try:
        Ledger.open(path, clock=clock, create=False).close()
        _, mark = newest_mark(sidecar_path(path))
        return Repair(ends_at=mark, acknowledged=mark)
    except LedgerCorruptError as error:
        damage = error
    _, acknowledged = newest_mark(sidecar_path(path))
    try:
        kept = _set_aside(path)
        for attempt, prepare in zip(ATTEMPTS, (_leave, _cut_log, _drop_log), strict=True):
            _put_back(kept, path)
            prepare(path)
            sidecar_path(path).unlink(missing_ok=True)
            try:
                ends_at = _open_without_mark(path, clock)
            except LedgerCorruptError as error:
                log.info("with %s: %s", attempt, error)
                continue
            return Repair(ends_at, acknowledged, kept, attempt)
        _put_back(kept, path)
    except OSError as error:
        raise side_file_error(path, error) from error
    raise LedgerCorruptError(
        f"ledger {path} cannot be repaired: {damage}",
        hint="Restore it from a backup. Nothing was changed.",
    ) from damage


def _open_without_mark(path: Path, clock: Clock) -> int:
    """Where the ledger ends, once it has opened and been found sound."""
    with Ledger.open(path, clock=clock, create=False) as ledger:
        broken = ledger.check()
        if broken:
            raise LedgerCorruptError(f"it contradicts itself: {broken[0]}")
    _, mark = newest_mark(sidecar_path(path))
    return max(0, mark - 1)  # the leap was a commit of its own


def _files(path: Path) -> tuple[Path, ...]:
    return path, wal_path(path), sidecar_path(path)


def _set_aside(path: Path) -> Path:
    number = 1
    while (folder := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    folder.mkdir(mode=0o700)
    for file in _files(path):
        if file.exists():
            _copy(file, folder / file.name)
    sync_directory(folder / path.name)
    return folder


def _put_back(kept: Path, path: Path) -> None:
    for file in _files(path):
        if (kept / file.name).exists():
            _copy(kept / file.name, file)
        else:
            file.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _leave(path: Path) -> None:
    """Nothing but the mark stood in the way."""


def _cut_log(path: Path) -> None:
    try:
        close_untouched(duckdb.connect(str(path), config=dict(CONNECT_CONFIG)))
    except duckdb.Error as error:
        readable = readable_bytes(str(error))
        if readable is not None:
            os.truncate(wal_path(path), readable)


def _drop_log(path: Path) -> None:
    wal_path(path).unlink(missing_ok=True)
