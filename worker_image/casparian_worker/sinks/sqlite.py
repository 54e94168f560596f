"""SQLite tables.

A stage is a SQLite file with one untyped table, so that publishing is a single INSERT … SELECT in
C while the target's write lock is held. Types map to storage classes; what SQLite has no class for
is text (docs/sinks.md has the table).
"""

import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote as url_quote

import pyarrow as pa
import pyarrow.types as pt

from casparian_flow.domain.errors import DiskFullError, SinkError
from casparian_flow.domain.outputs import OutputEntry, SinkAddress
from casparian_worker.arrays import as_text, is_bytes, plain, plain_type
from casparian_worker.lineage import rfc3339
from casparian_worker.sinks.base import (
    Receipt,
    RowWriter,
    SinkEnvironment,
    StageContext,
    StagedData,
    stage_name,
)
from casparian_worker.sinks.durable import (
    fsync_directory,
    fsync_file,
    mount_point,
    sink_error,
    unlink_if_present,
)
from casparian_worker.sinks.embedded import EmbeddedSink
from casparian_worker.sinks.root import STAGE_FOLDER, OutputRoot
from casparian_worker.sinks.tables import (
    FENCE,
    FENCE_COLUMNS,
    VIEW_SUFFIX,
    DuplicateFenceError,
    Publication,
    StagedColumn,
    TargetDatabase,
    check_columns,
    check_target,
    current_view_sql,
    entry_table,
    refusal_of,
    table_of,
)

_LONGEST_NAME: Final = 1000
_MAX_INTEGER: Final = 2**63 - 1
_TEXT: Final = "TEXT"
_ANY: Final = ""
"""No declared type: SQLite then stores values as they come."""


class SqliteSink(EmbeddedSink):
    """The sink of a `sqlite://` address."""

    def check(self) -> None:
        path = self.database_path()
        if os.path.exists(path):
            SqliteTarget(path, self._env.busy_timeout_s).close()

    def open_stage(self, ctx: StageContext) -> "SqliteStageWriter":
        table = table_of(self._address, ctx)
        path = self.database_path()
        return SqliteStageWriter(ctx, self._address, self._env, table, path)

    def publish(self, entry: OutputEntry, token: str) -> Receipt:
        """See `Sink.publish`. Readers see all of it at once, replaced rows included."""
        path = self.database_path()
        table = entry_table(self._address, entry)
        stage = self._stage_path(entry, token) if entry.rows else ""
        fresh = not os.path.exists(path)
        target = SqliteTarget(path, self._env.busy_timeout_s)
        try:
            staged = bool(stage) and target.attach(stage)
            at = rfc3339(self._env.clock.now().wall_us)
            receipt = Publication(target, entry, token).run(table, at, staged=staged)
        finally:
            target.close()
        if fresh:
            _fsync_folder_of(path)
        return receipt


class SqliteStageWriter(RowWriter):
    """Collects one output in a SQLite file of its own."""

    def __init__(
        self, ctx: StageContext, address: SinkAddress, env: SinkEnvironment, table: str, target: str
    ) -> None:
        super().__init__(ctx, address, env.root.root_id)
        self._root: OutputRoot = env.root
        self._env = env
        self._table = table
        self._target = target
        self._name = stage_name(ctx.run.token, ctx.n)
        self._path = os.path.join(self._root.stage_folder, self._name)
        self._stage: sqlite3.Connection | None = None
        self._names: list[str] = []

    def abort(self) -> None:
        if self._stage is not None:
            self._stage.close()
            self._stage = None
        unlink_if_present(self._path)

    def _where(self) -> str:
        return self._path

    def _begin(self, schema: pa.Schema) -> None:
        check_columns(schema, self._address, longest=_LONGEST_NAME)
        unlink_if_present(self._path)  # of this very attempt: nobody else has its token
        try:
            self._stage = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            # A stage that was not finished is worthless, so it needs no journal.
            self._stage.execute("PRAGMA journal_mode=OFF")
            self._stage.execute("PRAGMA synchronous=OFF")
            self._stage.execute("BEGIN")
            columns = ", ".join(f"c{position}" for position in range(len(schema)))
            self._stage.execute(f"CREATE TABLE data ({columns})")
        except sqlite3.Error as error:
            raise _wrapped(error, self._path) from error
        self._names = list(schema.names)

    def _widen(self, schema: pa.Schema) -> None:
        check_columns(schema, self._address, longest=_LONGEST_NAME)
        assert self._stage is not None
        try:
            for name in schema.names:
                if name not in self._names:
                    self._stage.execute(f"ALTER TABLE data ADD COLUMN c{len(self._names)}")
                    self._names.append(name)
        except sqlite3.Error as error:
            raise _wrapped(error, self._path) from error

    def _append(self, batch: pa.RecordBatch) -> None:
        assert self._stage is not None
        columns = [_storage_values(batch.column(name)) for name in self._names]
        markers = ", ".join("?" * len(columns))
        try:
            self._stage.executemany(
                f"INSERT INTO data VALUES ({markers})",  # noqa: S608
                zip(*columns, strict=True),
            )
        except sqlite3.Error as error:
            raise _wrapped(error, self._path) from error
        except UnicodeError as error:
            raise self._refusal(f"text that is not UTF-8 ({error})") from error

    def _end(self) -> StagedData:
        self._close_stage()
        fsync_file(self._path)
        self._root.directories.sync(self._root.stage_folder)
        stage = f"{STAGE_FOLDER}/{self._name}"
        return StagedData(stage, self._table, self._rows, os.path.getsize(self._path))

    def finish(self) -> OutputEntry:
        entry = super().finish()
        if os.path.exists(self._target):
            self._check_target(entry)
        return entry

    def _close_stage(self) -> None:
        assert self._stage is not None
        assert self._tracker.schema is not None
        types = {field.name: declared_type(field.type) for field in self._tracker.schema}
        described = [
            (position, name, types[name] if name in self._tracker.filled else _ANY)
            for position, name in enumerate(self._names)
        ]
        try:
            self._stage.execute("CREATE TABLE described (position INTEGER, name, type)")
            self._stage.executemany("INSERT INTO described VALUES (?, ?, ?)", described)
            self._stage.execute("COMMIT")
            self._stage.close()
        except sqlite3.Error as error:
            raise _wrapped(error, self._path) from error
        self._stage = None

    def _check_target(self, entry: OutputEntry) -> None:
        """Refuse now what the publishing transaction would refuse after the grant."""
        target = SqliteTarget(self._target, self._env.busy_timeout_s)
        try:
            check_target(target, entry, self._table)
            if entry.rows and target.attach(self._path):
                target.fit(self._table, target.staged_columns())
                if target.has_rules(self._table):
                    target.rehearse(self._table)
        except SinkError as error:
            if error.transient:
                raise
            raise refusal_of(error) from error
        finally:
            target.close()


class SqliteTarget(TargetDatabase):
    """A connection to a target database file."""

    def __init__(self, path: str, busy_timeout_s: float) -> None:
        self._path = path
        self._changed = 0
        try:
            self._db = sqlite3.connect(
                f"file:{url_quote(path)}?mode=rwc",
                uri=True,
                isolation_level=None,
                timeout=busy_timeout_s,
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            raise _wrapped(error, path) from error
        try:
            # EXTRA also syncs the folder once the rollback journal is gone, which is the commit.
            self._db.execute("PRAGMA synchronous=EXTRA")
            self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
        except sqlite3.Error as error:
            self._db.close()
            raise _wrapped(error, path) from error

    def attach(self, stage: str) -> bool:
        """Attach a finished stage for reading; False if it is not there."""
        if not os.path.exists(stage):
            return False
        try:
            # Nobody writes to a finished stage, and one deleted meanwhile stays readable.
            uri = f"file:{url_quote(stage)}?mode=ro&immutable=1"
            self._db.execute("ATTACH DATABASE ? AS stage", (uri,))
        except sqlite3.Error as error:
            if not os.path.exists(stage):
                return False
            raise _wrapped(error, stage) from error
        return True

    def begin(self) -> None:
        self.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self.execute("COMMIT")

    def rollback(self) -> None:
        if self._db.in_transaction:
            self.execute("ROLLBACK")

    def close(self) -> None:
        self._db.close()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            cursor = self._db.execute(sql, parameters)
            rows = cursor.fetchall()
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY and FENCE in sql:
                raise DuplicateFenceError from error
            raise _wrapped(error, self._path) from error
        except sqlite3.Error as error:
            raise _wrapped(error, self._path) from error
        self._changed = cursor.rowcount
        return rows

    def changed(self) -> int:
        return self._changed

    def quote(self, name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    def ensure_fence(self, table: str) -> str:
        columns = ", ".join(f"{name} {kind}" for name, kind in FENCE_COLUMNS)
        self.execute(f"CREATE TABLE IF NOT EXISTS {FENCE} ({columns}) WITHOUT ROWID")
        self.execute(f"CREATE INDEX IF NOT EXISTS _cf_fence_slice ON {FENCE} (slice_key)")
        return FENCE

    def fence_name(self, table: str) -> str | None:
        return FENCE if self.columns(FENCE) is not None else None

    def columns(self, table: str) -> Mapping[str, str] | None:
        kind, _ = self._object(table)
        if kind == "view":
            raise SinkError(
                f"{table!r} in {self._path} is a view, not a table",
                hint="Rename the topic, or give the sink URI a ?table=.",
            )
        if not kind:
            return None
        rows = self.execute("SELECT name, type FROM pragma_table_info(?)", (table,))
        return {str(name): str(declared) for name, declared in rows}

    def staged_columns(self) -> Sequence[StagedColumn]:
        rows = self.execute("SELECT position, name, type FROM stage.described ORDER BY position")
        return [StagedColumn(str(name), str(kind), f"c{position}") for position, name, kind in rows]

    def staged_source(self) -> str:
        return "stage.data"

    def fit(self, table: str, staged: Sequence[StagedColumn]) -> list[StagedColumn]:
        """Which staged columns the table lacks, having checked those that it has.

        Raises:
            SinkError: text would go into a numeric column, where SQLite turns "007" into 7.
        """
        known = self.columns(table)
        if known is None:
            return list(staged)
        types = {name.casefold(): kind for name, kind in known.items()}
        missing = []
        for column in staged:
            declared = types.get(column.name.casefold())
            if declared is None:
                missing.append(column)
            elif _affinity(declared) == "NUMBER" and column.type == _TEXT:
                raise SinkError(
                    f"column {column.name!r} of table {table!r} in {self._path} is {declared}, "
                    "and these rows have text for it",
                    hint="Give the topic a contract that settles the type, or another table.",
                )
        return missing

    def evolve(self, table: str, staged: Sequence[StagedColumn]) -> Sequence[StagedColumn]:
        missing = self.fit(table, staged)
        definitions = [f"{self.quote(c.name)} {c.type}".rstrip() for c in missing]
        if len(missing) == len(staged) and self.columns(table) is None:
            self.execute(f"CREATE TABLE {self.quote(table)} ({', '.join(definitions)})")
            return staged
        for definition in definitions:
            self.execute(f"ALTER TABLE {self.quote(table)} ADD COLUMN {definition}")
        return staged

    def show_current(self, table: str) -> None:
        """Make `{table}_current` unless that name is taken. SQLite expands its `*` anew each time
        the schema changes, so it need not be refreshed."""
        view = table + VIEW_SUFFIX
        if not self._object(view)[0]:
            self.execute(
                f"CREATE VIEW {self.quote(view)} AS {current_view_sql(self, table, FENCE)}"
            )

    def has_rules(self, table: str) -> bool:
        """Whether somebody gave the table rules of its own that an INSERT may break."""
        kind, sql = self._object(table)
        words = ("UNIQUE", "CHECK", "NOT NULL", "PRIMARY KEY", "REFERENCES", "STRICT")
        if kind and any(word in sql.upper() for word in words):
            return True
        rows = self.execute(
            "SELECT 1 FROM sqlite_master WHERE tbl_name = ? COLLATE NOCASE "
            "AND type IN ('index', 'trigger') LIMIT 1",
            (table,),
        )
        return bool(rows)

    def rehearse(self, table: str) -> None:
        """Insert the staged rows and take them back."""
        self.begin()
        try:
            columns = self.evolve(table, self.staged_columns())
            names = ", ".join(self.quote(column.name) for column in columns)
            sources = ", ".join(column.source for column in columns)
            self.execute(
                f"INSERT INTO {self.quote(table)} ({names}) "  # noqa: S608
                f"SELECT {sources} FROM stage.data"
            )
        finally:
            self.rollback()

    def _object(self, name: str) -> tuple[str, str]:
        """("table" or "view", its SQL), or ("", "")."""
        rows = self.execute(
            "SELECT type, sql FROM sqlite_master "
            "WHERE name = ? COLLATE NOCASE AND type IN ('table', 'view')",
            (name,),
        )
        return (str(rows[0][0]), str(rows[0][1] or "")) if rows else ("", "")


def declared_type(kind: pa.DataType) -> str:
    """The type that a column of this Arrow type is declared with."""
    kind = plain_type(kind)
    if pt.is_uint64(kind):
        return _ANY  # beyond 2**63 it is text, which NUMERIC would round to REAL
    if pt.is_integer(kind) or pt.is_boolean(kind) or pt.is_duration(kind):
        return "INTEGER"
    if pt.is_floating(kind):
        return "REAL"
    if is_bytes(kind):
        return "BLOB"
    return _ANY if pt.is_null(kind) else _TEXT


def _affinity(declared: str) -> str:
    """NUMBER if SQLite converts text that looks like a number (sqlite.org/datatype3.html)."""
    upper = declared.upper()
    if "INT" in upper:
        return "NUMBER"
    if any(word in upper for word in ("CHAR", "CLOB", "TEXT", "BLOB")) or not upper:
        return "AS IS"
    return "NUMBER"


def _storage_values(array: Any) -> Iterable[Any]:
    """Values as the sqlite3 module stores them without adapters."""
    if pt.is_dictionary(array.type) and len(array.dictionary) == 1 and not array.null_count:
        return [array.dictionary[0].as_py()] * len(array)
    values = plain(array)
    kind = values.type
    if pt.is_uint64(kind):
        return [str(n) if n is not None and n > _MAX_INTEGER else n for n in values.to_pylist()]
    if pt.is_duration(kind):
        return _listed(values.cast(pa.int64()))
    if pt.is_integer(kind) or pt.is_boolean(kind) or pt.is_floating(kind) or is_bytes(kind):
        return _listed(values)
    if pt.is_timestamp(kind):
        return _timestamps(values)
    return _listed(as_text(values))


def _timestamps(values: Any) -> Iterable[Any]:
    """ISO 8601 text with microseconds, or nanoseconds where there are any; UTC marked by Z."""
    try:
        values = values.cast(pa.timestamp("us", values.type.tz))
    except pa.ArrowInvalid:
        values = values.cast(pa.timestamp("ns", values.type.tz))
    if values.type.tz is not None:
        values = values.cast(pa.timestamp(values.type.unit, "UTC"))
    return _listed(values.cast(pa.string()))


def _listed(values: Any) -> list[Any]:
    result: list[Any] = values.to_pylist()
    return result


def _wrapped(error: sqlite3.Error, path: str) -> SinkError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return SinkError(
            f"{path} is locked by another process",
            hint="It is tried again; end long transactions in other programs that use it.",
            transient=True,
        )
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        message = f"cannot write {path}: {error} (file system mounted at {mount_point(path)})"
        if code == sqlite3.SQLITE_FULL:
            hint = "Free space there, or raise the quota; the job is retried."
            return DiskFullError(message, hint=hint)
        hint = "Look at that disk, its quota and file size limit; the job is retried."
        return SinkError(message, hint=hint, transient=True)
    if code == sqlite3.SQLITE_NOTADB:
        return SinkError(f"{path} is no SQLite database", hint="Give the sink URI another path.")
    transient = code in (sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_CANTOPEN)
    return SinkError(f"SQLite, {path}: {error}", transient=transient)


def _fsync_folder_of(path: str) -> None:
    folder = os.path.dirname(path)
    try:
        fsync_directory(folder)
    except OSError as error:
        raise sink_error(error, "fsync", folder) from error
