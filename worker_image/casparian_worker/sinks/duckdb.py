"""DuckDB tables.

A stage is a Parquet file; publishing opens the database, copies it in within one transaction, and
closes the database again, because a DuckDB file belongs to one process at a time.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from casparian_flow.domain.errors import DiskFullError, SinkError
from casparian_flow.domain.outputs import OutputEntry, SinkAddress
from casparian_worker.lineage import rfc3339
from casparian_worker.sinks.base import Receipt, SinkEnvironment, StageContext
from casparian_worker.sinks.durable import fsync_directory, mount_point, sink_error
from casparian_worker.sinks.embedded import EmbeddedSink
from casparian_worker.sinks.files import FileStageWriter
from casparian_worker.sinks.parquet import ParquetFormat
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

if TYPE_CHECKING:
    import duckdb

_LONGEST_NAME: Final = 1000
_RETRY_S: Final = 0.05
_EXACT_DOUBLE: Final = 2**53
"""Integers beyond this are not all exact as DOUBLE."""
_CONFIG: Final = {
    "threads": "2",
    "memory_limit": "1GB",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
_WIDER: Final[Mapping[str, frozenset[str]]] = {
    "TINYINT": frozenset({"SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE"}),
    "SMALLINT": frozenset({"INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE"}),
    "INTEGER": frozenset({"BIGINT", "HUGEINT", "DOUBLE"}),
    "BIGINT": frozenset({"HUGEINT", "DOUBLE"}),
    "UTINYINT": frozenset(
        {"USMALLINT", "UINTEGER", "UBIGINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "DOUBLE"}
    ),
    "USMALLINT": frozenset({"UINTEGER", "UBIGINT", "INTEGER", "BIGINT", "HUGEINT", "DOUBLE"}),
    "UINTEGER": frozenset({"UBIGINT", "BIGINT", "HUGEINT", "DOUBLE"}),
    "UBIGINT": frozenset({"HUGEINT", "DOUBLE"}),
    "FLOAT": frozenset({"DOUBLE"}),
    "DATE": frozenset({"TIMESTAMP", "TIMESTAMP_NS"}),
    "TIMESTAMP_S": frozenset({"TIMESTAMP_MS", "TIMESTAMP"}),
    "TIMESTAMP_MS": frozenset({"TIMESTAMP"}),
}
_TO_TEXT: Final = re.compile(
    r"BOOLEAN|U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*|DATE|TIME.*"
)
_DECIMAL: Final = re.compile(r"DECIMAL\((\d+),(\d+)\)")

_files: dict[str, threading.Lock] = {}
_files_lock = threading.Lock()


class DuckDbSink(EmbeddedSink):
    """The sink of a `duckdb://` address."""

    def check(self) -> None:
        _library()
        path = self.database_path()
        if os.path.exists(path):
            with _exclusive(path):
                DuckDbTarget(path, self._env, read_only=True).close()

    def open_stage(self, ctx: StageContext) -> "DuckDbStageWriter":
        table = table_of(self._address, ctx)
        return DuckDbStageWriter(ctx, self._address, self._env, table, self.database_path())

    def publish(self, entry: OutputEntry, token: str) -> Receipt:
        """See `Sink.publish`. Readers see all of it at once, replaced rows included."""
        path = self.database_path()
        table = entry_table(self._address, entry)
        stage = self._stage_path(entry, token) if entry.rows else ""
        at = rfc3339(self._env.clock.now().wall_us)
        with _exclusive(path):
            target = DuckDbTarget(path, self._env)
            try:
                target.stage = stage
                staged = bool(stage) and os.path.exists(stage)
                receipt = Publication(target, entry, token).run(table, at, staged=staged)
            finally:
                target.close()
        # Closing checkpoints and unlinks the write-ahead log; the folder has to say so, too.
        try:
            fsync_directory(os.path.dirname(path))
        except OSError as error:
            raise sink_error(error, "fsync", os.path.dirname(path)) from error
        return receipt


class DuckDbStageWriter(FileStageWriter):
    """A Parquet stage whose rows go into a table."""

    def __init__(
        self, ctx: StageContext, address: SinkAddress, env: SinkEnvironment, table: str, target: str
    ) -> None:
        super().__init__(ctx, address, env.root, table, ParquetFormat())
        self._env = env
        self._target = target
        self._table = table

    def _begin(self, schema: pa.Schema) -> None:
        check_columns(schema, self._address, longest=_LONGEST_NAME)
        super()._begin(schema)

    def finish(self) -> OutputEntry:
        entry = super().finish()
        if os.path.exists(self._target):
            with _exclusive(self._target):
                self._check_target(entry)
        return entry

    def _check_target(self, entry: OutputEntry) -> None:
        """Refuse now what the publishing transaction would refuse after the grant."""
        target = DuckDbTarget(self._target, self._env, read_only=True)
        try:
            check_target(target, entry, self._table)
            if entry.rows:
                target.stage = self._path
                target.fit(self._table, target.staged_columns())
        except SinkError as error:
            if error.transient:
                raise
            raise refusal_of(error) from error
        finally:
            target.close()


class _Fit:
    """How a table has to change for staged columns: SQL statements, and what to insert."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.columns: list[StagedColumn] = []


class DuckDbTarget(TargetDatabase):
    """A connection to a target database file.

    Attributes:
        stage: path of the Parquet file whose rows are published.
    """

    def __init__(self, path: str, env: SinkEnvironment, *, read_only: bool = False) -> None:
        self._path = path
        self._changed = 0
        self._in_transaction = False
        self.stage = ""
        self._db = _connect(path, env, read_only=read_only)
        try:
            if self.columns("cf_journal") is not None and self.columns("cf_meta") is not None:
                raise SinkError(
                    f"{path} is a Casparian ledger; no topic may be written into it",
                    hint="Give the sink URI another database file.",
                )
        except BaseException:
            self._db.close()
            raise

    def begin(self) -> None:
        self.execute("BEGIN TRANSACTION")
        self._in_transaction = True

    def commit(self) -> None:
        self._in_transaction = False  # a COMMIT that fails ends the transaction, too
        self.execute("COMMIT")

    def rollback(self) -> None:
        if self._in_transaction:
            self._in_transaction = False
            self.execute("ROLLBACK")

    def close(self) -> None:
        self._db.close()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        library = _library()
        try:
            rows = self._db.execute(sql, list(parameters)).fetchall()
        except library.ConstraintException as error:
            if FENCE in sql and "uplicate key" in str(error):
                raise DuplicateFenceError from error
            raise _wrapped(error, self._path) from error
        except library.Error as error:
            raise _wrapped(error, self._path) from error
        counted = sql.startswith(("INSERT", "DELETE")) and rows
        self._changed = int(rows[0][0]) if counted else 0
        return rows

    def changed(self) -> int:
        return self._changed

    def quote(self, name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    def ensure_fence(self, table: str) -> str:
        columns = ", ".join(f"{name} {kind}" for name, kind in FENCE_COLUMNS)
        self.execute(f"CREATE TABLE IF NOT EXISTS {FENCE} ({columns})")
        return FENCE

    def fence_name(self, table: str) -> str | None:
        return FENCE if self.columns(FENCE) is not None else None

    def columns(self, table: str) -> Mapping[str, str] | None:
        if self._views(table):
            raise SinkError(
                f"{table!r} in {self._path} is a view, not a table",
                hint="Rename the topic, or give the sink URI a ?table=.",
            )
        rows = self.execute(
            "SELECT column_name, data_type FROM duckdb_columns() "
            "WHERE lower(table_name) = lower(?) AND schema_name = 'main' "
            "AND database_name = current_database() "
            "ORDER BY column_index",
            (table,),
        )
        return {str(name): str(kind) for name, kind in rows} or None

    def staged_columns(self) -> Sequence[StagedColumn]:
        rows = self.execute(f"DESCRIBE SELECT * FROM {self.staged_source()}")  # noqa: S608
        return [StagedColumn(str(r[0]), str(r[1]), self.quote(str(r[0]))) for r in rows]

    def staged_source(self) -> str:
        escaped = self.stage.replace("'", "''")
        return f"read_parquet('{escaped}', hive_partitioning = false)"

    def evolve(self, table: str, staged: Sequence[StagedColumn]) -> Sequence[StagedColumn]:
        fit = self.fit(table, staged)
        for statement in fit.statements:
            self.execute(statement)
        return fit.columns

    def fit(self, table: str, staged: Sequence[StagedColumn]) -> _Fit:
        """Work out how the table has to change, without changing it.

        Raises:
            SinkError: a staged value and the table's column have no type in common.
        """
        fit = _Fit()
        known = self.columns(table)
        quoted = self.quote(table)
        if known is None:
            definitions = ", ".join(f"{self.quote(c.name)} {c.type}" for c in staged)
            fit.statements.append(f"CREATE TABLE {quoted} ({definitions})")
            fit.columns.extend(staged)
            return fit
        types = {name.casefold(): (name, kind) for name, kind in known.items()}
        for column in staged:
            if column.name.casefold() not in types:
                name = self.quote(column.name)
                fit.statements.append(f"ALTER TABLE {quoted} ADD COLUMN {name} {column.type}")
                fit.columns.append(column)
                continue
            name, kind = types[column.name.casefold()]
            self._fit_column(fit, table, StagedColumn(name, column.type, column.source), kind)
        return fit

    def _fit_column(self, fit: _Fit, table: str, column: StagedColumn, kind: str) -> None:
        name, source = self.quote(column.name), column.source
        if column.type == kind or (_TO_TEXT.fullmatch(column.type) and kind == "VARCHAR"):
            fit.columns.append(column)
        elif not self._has_values(source, self.staged_source()):
            fit.columns.append(StagedColumn(column.name, kind, f"CAST(NULL AS {kind})"))
        elif _holds(kind, column.type) and self._exact(source, self.staged_source(), kind):
            fit.columns.append(column)
        elif not self._has_values(name, self.quote(table)) or (
            _holds(column.type, kind) and self._exact(name, self.quote(table), column.type)
        ):
            fit.statements.append(
                f"ALTER TABLE {self.quote(table)} ALTER COLUMN {name} TYPE {column.type}"
            )
            fit.columns.append(column)
        else:
            raise SinkError(
                f"column {column.name!r} of table {table!r} in {self._path} is {kind}, and these "
                f"rows have {column.type} for it",
                hint="Give the topic a contract that settles the type, or another table.",
            )

    def _has_values(self, column: str, source: str) -> bool:
        rows = self.execute(f"SELECT count({column}) FROM {source}")  # noqa: S608
        return bool(rows[0][0])

    def _exact(self, column: str, source: str, kind: str) -> bool:
        """Whether all values keep their value as `kind`; only floats can fail at this."""
        if kind not in ("DOUBLE", "FLOAT"):
            return True
        rows = self.execute(
            f"SELECT count(*) FROM {source} "  # noqa: S608
            f"WHERE abs(TRY_CAST({column} AS HUGEINT)) > {_EXACT_DOUBLE} "
            f"AND typeof({column}) NOT IN ('DOUBLE', 'FLOAT')"
        )
        return not rows[0][0]

    def show_current(self, table: str) -> None:
        """Make `{table}_current`, anew each time: DuckDB fixes a view's columns when it is made."""
        view = table + VIEW_SUFFIX
        taken = self.execute(
            "SELECT 1 FROM duckdb_tables() WHERE lower(table_name) = lower(?)", (view,)
        )
        mine = all(FENCE in sql for sql in self._views(view))
        if mine and not taken:
            select = current_view_sql(self, table, FENCE)
            self.execute(f"CREATE OR REPLACE VIEW {self.quote(view)} AS {select}")

    def _views(self, name: str) -> list[str]:
        rows = self.execute(
            "SELECT sql FROM duckdb_views() WHERE lower(view_name) = lower(?) "
            "AND schema_name = 'main' AND database_name = current_database()",
            (name,),
        )
        return [str(row[0]) for row in rows]


def _holds(wide: str, narrow: str) -> bool:
    """Whether a column of the one type takes every value of the other."""
    if wide in _WIDER.get(narrow, frozenset()):
        return True
    a, b = _DECIMAL.fullmatch(wide), _DECIMAL.fullmatch(narrow)
    if a and b:
        whole = int(a[1]) - int(a[2]) >= int(b[1]) - int(b[2])
        return whole and int(a[2]) >= int(b[2])
    return False


@contextlib.contextmanager
def _exclusive(path: str) -> Iterator[None]:
    """One thread of this process at a time per database file."""
    with _files_lock:
        lock = _files.setdefault(os.path.realpath(path), threading.Lock())
    with lock:
        yield


def _library() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise SinkError(
            "duckdb:// needs the duckdb package, which is not installed",
            hint="Install casparian-flow[duckdb-sink] on the workers.",
        ) from error
    return duckdb


def _connect(path: str, env: SinkEnvironment, *, read_only: bool) -> "duckdb.DuckDBPyConnection":
    """Open the file, waiting a while for another process to let go of it."""
    library = _library()
    deadline = env.clock.now().mono + env.busy_timeout_s
    while True:
        try:
            connection: duckdb.DuckDBPyConnection = library.connect(
                path, read_only=read_only, config=dict(_CONFIG)
            )
        except library.IOException as error:
            locked = "lock" in str(error)
            if not locked or env.clock.now().mono >= deadline:
                raise _wrapped(error, path) from error
        except library.Error as error:
            raise _wrapped(error, path) from error
        else:
            return connection
        time.sleep(_RETRY_S)


def _wrapped(error: Exception, path: str) -> SinkError:
    text = str(error)
    first = text.splitlines()[0] if text else type(error).__name__
    if "No space left" in text or "File too large" in text or "quota" in text.lower():
        return DiskFullError(
            f"cannot write {path}: {first} (file system mounted at {mount_point(path)})",
            hint="Free space there, or raise the quota or file size limit; the job is retried.",
        )
    if "Could not set lock" in text or "Conflicting lock" in text:
        return SinkError(
            f"{path} is open in another process: {first}",
            hint="It is tried again; close other programs that have the file open.",
            transient=True,
        )
    if "not a valid DuckDB database" in text:
        return SinkError(f"{path} is no DuckDB database", hint="Give the sink URI another path.")
    library = _library()
    passing = (library.IOException, library.TransactionException, library.OutOfMemoryException)
    return SinkError(f"DuckDB, {path}: {first}", transient=isinstance(error, passing))
