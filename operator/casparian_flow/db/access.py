"""SQLAlchemy engines on the ledger, whoever has it open.

    from casparian_flow.db.access import get_engine
    from casparian_flow.config import settings
    engine = get_engine(settings.database)

Every connection is made for one use. With no Sentinel it opens the file itself, which other
processes then find locked until the Session is closed. While a Sentinel has the file, it is a
snapshot made by the Sentinel: consistent, read-only, gone when the connection is closed. In a
process that has a Ledger open on the file it is a connection beside the Ledger's.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import duckdb
import duckdb_engine
from sqlalchemy import URL, Engine, ExceptionContext, create_engine, event
from sqlalchemy.pool import NullPool

from casparian_flow.db import opening
from casparian_flow.db.engine_errors import open_error
from casparian_flow.db.highwater import check_mark
from casparian_flow.db.ledger import Ledger, open_ledger_at
from casparian_flow.db.snapshot import open_and_unlink
from casparian_flow.db.sqlcompat import complete_group_by
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import (
    LedgerLockedError,
    SentinelUnreachableError,
    UsageError,
)

SnapshotProvider = Callable[[], str]
"""Asks the Sentinel for a snapshot; returns its path, which is the caller's to delete."""


class DatabaseSettings(Protocol):
    """The part of the settings that says where the ledger is."""

    @property
    def db_location(self) -> str | Path: ...


def get_engine(
    database: DatabaseSettings | str | Path, *, snapshot_provider: SnapshotProvider | None = None
) -> Engine:
    """An engine on the ledger; the file is made by the first connection if it is not there.

    Args:
        database: `settings.database`, or the path of the ledger.
        snapshot_provider: how to ask the Sentinel that has the ledger open; by default over the
            control socket that belongs to the ledger.

    Connecting raises LedgerError, as `Ledger.open` does; writing to a snapshot UsageError.
    """
    location = database if isinstance(database, str | Path) else database.db_location
    path = Path(location).resolve()
    connector = _Connector(path, snapshot_provider or _ask_sentinel(path))
    # The URL only tells which ledger it is (Scout asks); the creator makes the connections.
    url = URL.create("duckdb", database=str(path))
    engine = create_engine(url, creator=connector.connect, poolclass=NullPool)
    event.listen(engine, "before_cursor_execute", _complete, retval=True)
    event.listen(engine, "handle_error", _explain)
    event.listen(engine.pool, "close", connector.closed)
    return engine


class _Connector:
    def __init__(self, path: Path, snapshot_provider: SnapshotProvider) -> None:
        self._path = path
        self._snapshot_provider = snapshot_provider
        self._opening = threading.Lock()

    def connect(self) -> Any:
        """A DBAPI connection.

        Raises:
            LedgerError: see get_engine.
        """
        ledger = open_ledger_at(self._path)
        connection = self._open_file() if ledger is None else _beside(ledger)
        connection.execute("SET TimeZone = 'UTC'")
        return duckdb_engine.ConnectionWrapper(connection)

    def closed(self, *_: object) -> None:
        """What was written beside a Ledger is news to its counters."""
        ledger = open_ledger_at(self._path)
        if ledger is not None:
            ledger.resync()

    def _open_file(self) -> duckdb.DuckDBPyConnection:
        # Two first connections at once must not both make the tables.
        with self._opening:
            try:
                opened = opening.connect(self._path, create=True)
            except LedgerLockedError as locked:
                return self._open_snapshot(locked)
            try:
                ledger_id = opening.prepare(opened.connection, self._path, SystemClock())
                check_mark(self._path, ledger_id, opening.read_tail(opened.connection).seq)
                opening.bring_up(opened.connection, self._path)
            except BaseException:
                opened.abandon(put_back=True)
                raise
            return opened.connection

    def _open_snapshot(self, locked: LedgerLockedError) -> duckdb.DuckDBPyConnection:
        try:
            path = Path(self._snapshot_provider())
        except SentinelUnreachableError as error:
            raise locked from error
        try:
            return open_and_unlink(path)
        except duckdb.Error as error:
            raise open_error(path, error) from error


def _beside(ledger: Ledger) -> duckdb.DuckDBPyConnection:
    ledger.fold()
    return ledger.reader()


def _ask_sentinel(path: Path) -> SnapshotProvider:
    def ask() -> str:
        # Imported late: the control client needs zmq, and this module must not.
        from casparian_flow.sentinel.control import remote
        from casparian_flow.sentinel.paths import control_address

        client = remote(control_address(path))
        try:
            return client.snapshot()
        finally:
            client.close()

    return ask


def _complete(
    _connection: object,
    _cursor: object,
    statement: str,
    parameters: Any,
    _context: object,
    _executemany: bool,
) -> tuple[str, Any]:
    return complete_group_by(statement), parameters


def _explain(context: ExceptionContext) -> None:
    error = context.original_exception
    if isinstance(error, duckdb.Error) and "read-only mode" in str(error):
        raise UsageError(
            "a Sentinel has the ledger open; this connection is a snapshot and takes no changes",
            hint="Use the `casparian` commands, which ask the Sentinel, or stop it first.",
        ) from error
