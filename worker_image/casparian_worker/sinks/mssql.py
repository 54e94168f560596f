"""SQL Server tables, through pymssql.

A stage is a committed table of its own, filled by bulk copy in chunks. It has columns of five
plain types only; publishing converts them to the target's types on the server. Staged text and
bytes begin with one extra character, because the bulk copy API takes an empty value for NULL.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.types as pt

from casparian_flow.domain.errors import DiskFullError, SinkError, require
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
    token_of_stage,
    token_parts,
)
from casparian_worker.sinks.tables import (
    FENCE,
    FENCE_COLUMNS,
    DuplicateFenceError,
    Publication,
    StagedColumn,
    TargetDatabase,
    check_columns,
    check_target,
    entry_table,
    refusal_of,
    table_of,
)

if TYPE_CHECKING:
    import pymssql

_LONGEST_NAME: Final = 128
_STAGE_PREFIX: Final = "_cf_stage_"
_DESCRIBED: Final = "_columns"
_DEFAULT_SCHEMA: Final = "dbo"
_DUPLICATE_KEY: Final = frozenset({2627, 2601})
_TRANSIENT: Final = frozenset(
    {1205, 1222, 2705, 2714, 10928, 10929, 40197, 40501, 40613, 49918, 49919, 49920}
)
"""Deadlock victim, lock timeout; a table or column that another publisher made meanwhile; and
Azure SQL's "try again later" numbers."""
_FULL: Final = frozenset({1101, 1105, 9002})
"""No room in a filegroup or in the log."""

_INTEGER: Final = "bigint"
_FLOAT: Final = "float"
_BIT: Final = "bit"
_TEXT: Final = "nvarchar(max)"
_BYTES: Final = "varbinary(max)"
_JOB_ID: Final = "nvarchar(64)"
_PAD_TEXT: Final = "="
_PAD_BYTES: Final = b"="
_FENCE_TYPES: Final = {
    "TEXT NOT NULL PRIMARY KEY": "nvarchar(64) NOT NULL PRIMARY KEY",
    "TEXT NOT NULL": "nvarchar(300) NOT NULL",
    "BIGINT NOT NULL": "bigint NOT NULL",
    "INTEGER NOT NULL": "int NOT NULL",
}
_FITS: Final[Mapping[str, frozenset[str]]] = {
    "bit": frozenset({"bit", "tinyint", "smallint", "int", "bigint", "nvarchar"}),
    "bigint": frozenset({"bigint", "numeric", "decimal", "nvarchar"}),
    "float": frozenset({"float", "nvarchar"}),
    "decimal": frozenset({"nvarchar"}),
    "date": frozenset({"date", "datetime2", "nvarchar"}),
    "time": frozenset({"time", "nvarchar"}),
    "datetime2": frozenset({"datetime2", "nvarchar"}),
    "datetimeoffset": frozenset({"datetimeoffset", "nvarchar"}),
    "varbinary": frozenset({"varbinary"}),
    "nvarchar": frozenset({"nvarchar"}),
}
"""Target types (names without lengths) that take every value of a staged one."""


class MssqlSink:
    """The sink of an `mssql://` address."""

    def __init__(self, address: SinkAddress, env: SinkEnvironment) -> None:
        self._address = address
        self._env = env

    @property
    def address(self) -> SinkAddress:
        return self._address

    @property
    def server_id(self) -> str:
        """What stands for the root id in keys: the server and database, without credentials."""
        settings = self._env.mssql
        return f"{settings.server}:{settings.port}/{settings.database}"

    def check(self) -> None:
        MssqlTarget(self._env).close()

    def open_stage(self, ctx: StageContext) -> "MssqlStageWriter":
        table = table_of(self._address, ctx)
        return MssqlStageWriter(ctx, self._address, self._env, table, self.server_id)

    def publish(self, entry: OutputEntry, token: str) -> Receipt:
        """See `Sink.publish`. Readers see all of it at once, replaced rows included."""
        table = entry_table(self._address, entry)
        self._check_entry(entry, token)
        at = rfc3339(self._env.clock.now().wall_us)
        target = MssqlTarget(self._env)
        try:
            staged = entry.rows > 0 and target.attach(entry.stage)
            return Publication(target, entry, token).run(table, at, staged=staged)
        finally:
            target.close()

    def unstage(self, entry: OutputEntry, token: str) -> None:
        if not entry.rows:
            return
        self._check_entry(entry, token)
        target = MssqlTarget(self._env)
        try:
            target.drop(entry.stage)
        finally:
            target.close()

    def list_stages(self) -> AbstractSet[str]:
        target = MssqlTarget(self._env)
        try:
            names = target.stage_tables(_schema_of(self._address.path))
        finally:
            target.close()
        return {token for token in map(_token_of_table, names) if token}

    def delete_stages(self, tokens: AbstractSet[str]) -> int:
        for token in tokens:
            token_parts(token)
        schema = _schema_of(self._address.path)
        target = MssqlTarget(self._env)
        try:
            names = [n for n in target.stage_tables(schema) if _token_of_table(n) in tokens]
            for name in names:
                target.drop(f"{schema}.{name}")
        finally:
            target.close()
        return len(names)

    def _check_entry(self, entry: OutputEntry, token: str) -> None:
        """Insist that the manifest is about this server and names the stage as we would."""
        if entry.root_id != self.server_id:
            raise SinkError(
                f"output {entry.output_key[:12]} was staged on {entry.root_id}, this worker is "
                f"configured for {self.server_id}",
                hint="Set CASPARIAN_MSSQL_SERVER, _PORT and _DATABASE as they were.",
            )
        if entry.rows:
            expected = _stage_table(self._address.path, token, entry.n)
            require(entry.stage == expected, f"manifest names {entry.stage!r}, not {expected!r}")


class MssqlStageWriter(RowWriter):
    """Fills a staging table."""

    def __init__(
        self, ctx: StageContext, address: SinkAddress, env: SinkEnvironment, table: str, root: str
    ) -> None:
        super().__init__(ctx, address, root)
        self._env = env
        self._table = table
        self._stage = _stage_table(address.path, ctx.run.token, ctx.n)
        self._server = root
        self._target: MssqlTarget | None = None
        self._names: list[str] = []
        self._types: list[str] = []
        self._bytes = 0

    def abort(self) -> None:
        if self._target is not None:
            self._target.close()
            self._target = None
        if self._names:
            # On a connection of its own: the other one may be what failed.
            target = MssqlTarget(self._env)
            try:
                target.drop(self._stage)
            finally:
                target.close()
            self._names = []

    def _where(self) -> str:
        return self._server

    def _begin(self, schema: pa.Schema) -> None:
        check_columns(schema, self._address, longest=_LONGEST_NAME)
        self._target = MssqlTarget(self._env)
        self._names = list(schema.names)
        self._types = [staged_type(field.type) for field in schema]
        self._target.drop(self._stage)  # of this very attempt: nobody else has its token
        columns = ", ".join(f"c{i} {kind} NULL" for i, kind in enumerate(self._types))
        self._target.execute(f"CREATE TABLE {self._target.quote_table(self._stage)} ({columns})")

    def _widen(self, schema: pa.Schema) -> None:
        check_columns(schema, self._address, longest=_LONGEST_NAME)
        assert self._target is not None
        stage = self._target.quote_table(self._stage)
        for field in schema:
            kind = staged_type(field.type)
            if field.name not in self._names:
                self._target.execute(f"ALTER TABLE {stage} ADD c{len(self._names)} {kind} NULL")
                self._names.append(field.name)
                self._types.append(kind)
                continue
            position = self._names.index(field.name)
            if self._types[position] != kind:
                self._change_type(position, kind)

    def _change_type(self, position: int, kind: str) -> None:
        """Rows so far have other values in this column, or none."""
        assert self._target is not None
        stage, column = self._target.quote_table(self._stage), f"c{position}"
        self._target.execute(f"ALTER TABLE {stage} ALTER COLUMN {column} {kind} NULL")
        if kind == _TEXT:
            self._target.execute(
                f"UPDATE {stage} SET {column} = N'{_PAD_TEXT}' + {column} "  # noqa: S608
                f"WHERE {column} IS NOT NULL"
            )
        self._types[position] = kind

    def _append(self, batch: pa.RecordBatch) -> None:
        assert self._target is not None
        columns = [
            _staged_values(batch.column(name), kind)
            for name, kind in zip(self._names, self._types, strict=True)
        ]
        self._bytes += batch.nbytes
        self._target.bulk_copy(self._stage, zip(*columns, strict=True), self._address.chunksize)

    def _end(self) -> StagedData:
        assert self._target is not None
        assert self._tracker.schema is not None
        target = self._target
        target.describe(
            self._stage,
            [
                StagedColumn(field.name, target_type(field.name, field.type), "")
                for field in sorted(
                    self._tracker.schema, key=lambda field: self._names.index(field.name)
                )
            ],
            filled=self._tracker.filled,
        )
        return StagedData(self._stage, self._table, self._rows, self._bytes)

    def finish(self) -> OutputEntry:
        entry = super().finish()
        target, self._target = self._target or MssqlTarget(self._env), None
        try:
            check_target(target, entry, self._table)
            if entry.rows and target.attach(self._stage):
                target.fit(self._table, target.staged_columns())
        except SinkError as error:
            if error.transient:
                raise
            raise refusal_of(error) from error
        finally:
            target.close()
        return entry


class MssqlTarget(TargetDatabase):
    """A connection to the server."""

    marker = "%s"

    def __init__(self, env: SinkEnvironment) -> None:
        self._changed = 0
        self._in_transaction = False
        self._stage = ""
        self._staged: list[StagedColumn] = []
        self._server = env.mssql.server
        self._db = _connect(env)

    def attach(self, stage: str) -> bool:
        """Read a stage's description; False if it is not there."""
        rows = self._described(stage)
        if rows is None:
            return False
        self._stage = stage
        self._staged = rows
        return True

    def begin(self) -> None:
        # Any error, a duplicate fence key included, then undoes the whole transaction.
        self.execute("SET XACT_ABORT ON")
        self.execute("BEGIN TRANSACTION")
        self._in_transaction = True

    def commit(self) -> None:
        self.execute("COMMIT TRANSACTION")
        self._in_transaction = False

    def rollback(self) -> None:
        if self._in_transaction:
            self._in_transaction = False
            self.execute("IF @@TRANCOUNT > 0 ROLLBACK TRANSACTION")

    def close(self) -> None:
        self._db.close()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        library = _library()
        try:
            with self._db.cursor() as cursor:
                # Given parameters, even None, pymssql takes a % in a column's name for a marker.
                cursor.execute(sql, *((tuple(parameters),) if parameters else ()))
                rows = cursor.fetchall() if cursor.description else []
                self._changed = cursor.rowcount
        except library.Error as error:
            if _facts(error)[0] in _DUPLICATE_KEY and FENCE in sql:
                raise DuplicateFenceError from error
            raise _wrapped(error, self._server) from error
        return [tuple(row) for row in rows]

    def changed(self) -> int:
        return self._changed

    def quote(self, name: str) -> str:
        return "[" + name.replace("]", "]]") + "]"

    def quote_table(self, table: str) -> str:
        """`schema.table`, or `table` in the default schema, whatever the login's own default."""
        return f"{self.quote(_schema_of(table))}.{self.quote(_bare(table))}"

    def bulk_copy(self, table: str, rows: Iterable[tuple[Any, ...]], chunk: int) -> None:
        """Append rows, committed every `chunk` of them."""
        library = _library()
        try:
            self._db.bulk_copy(self.quote_table(table), list(rows), batch_size=chunk)
        except library.Error as error:
            raise _wrapped(error, self._server) from error

    def ensure_fence(self, table: str) -> str:
        name = f"{_schema_of(table)}.{FENCE}"
        columns = ", ".join(f"{column} {_FENCE_TYPES[kind]}" for column, kind in FENCE_COLUMNS)
        self.execute(
            f"IF OBJECT_ID(N'{self.quote_table(name)}', N'U') IS NULL "
            f"CREATE TABLE {self.quote_table(name)} ({columns})"
        )
        return self.quote_table(name)

    def fence_name(self, table: str) -> str | None:
        name = f"{_schema_of(table)}.{FENCE}"
        return self.quote_table(name) if self.columns(name) is not None else None

    def columns(self, table: str) -> Mapping[str, str] | None:
        rows = self.execute(
            "SELECT COLUMN_NAME, DATA_TYPE FROM INFORMATION_SCHEMA.COLUMNS "
            "WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s ORDER BY ORDINAL_POSITION",
            (_schema_of(table), _bare(table)),
        )
        return {str(name): str(kind) for name, kind in rows} or None

    def staged_columns(self) -> Sequence[StagedColumn]:
        return self._staged

    def staged_source(self) -> str:
        return self.quote_table(self._stage)

    def fit(self, table: str, staged: Sequence[StagedColumn]) -> list[StagedColumn]:
        """Which staged columns the table lacks, having checked those that it has.

        Raises:
            SinkError: a column's type does not take every value of the staged one.
        """
        known = self.columns(table)
        types = {name.casefold(): kind.lower() for name, kind in (known or {}).items()}
        missing = []
        for column in staged:
            actual = types.get(column.name.casefold())
            if actual is None:
                missing.append(column)
            elif actual not in _FITS[_base(column.type)] and actual != _base(column.type):
                raise SinkError(
                    f"column {column.name!r} of table {table!r} is {actual}, and these rows have "
                    f"{column.type} for it",
                    hint="Give the topic a contract that settles the type, or another table.",
                )
        return missing

    def evolve(self, table: str, staged: Sequence[StagedColumn]) -> Sequence[StagedColumn]:
        missing = self.fit(table, staged)
        if not missing:
            return staged
        definitions = ", ".join(f"{self.quote(c.name)} {c.type} NULL" for c in missing)
        if self.columns(table) is None:
            self.execute(f"CREATE TABLE {self.quote_table(table)} ({definitions})")
        else:
            self.execute(f"ALTER TABLE {self.quote_table(table)} ADD {definitions}")
        return staged

    def show_current(self, table: str) -> None:
        """No view is made on a server that others administer; docs/sinks.md has its query."""

    def describe(
        self, stage: str, columns: Sequence[StagedColumn], *, filled: AbstractSet[str]
    ) -> None:
        """Keep the columns' names and types beside the stage, for whoever publishes it.

        Columns without a value are left out: their type would be a guess.
        """
        described = [
            (position, column.name, column.type)
            for position, column in enumerate(columns)
            if column.name in filled
        ]
        table = self.quote_table(_described_table(stage))
        self.execute(
            f"CREATE TABLE {table} (position int NOT NULL, name nvarchar(128) NOT NULL, "
            "type nvarchar(60) NOT NULL)"
        )
        for row in described:
            self.execute(f"INSERT INTO {table} VALUES (%s, %s, %s)", row)  # noqa: S608

    def drop(self, stage: str) -> None:
        """Drop a stage and its description, if they are there."""
        for table in (_described_table(stage), stage):
            self.execute(
                f"IF OBJECT_ID(N'{self.quote_table(table)}', N'U') IS NOT NULL "
                f"DROP TABLE {self.quote_table(table)}"
            )

    def stage_tables(self, schema: str) -> list[str]:
        """Names of the staging tables in a schema."""
        rows = self.execute(
            "SELECT TABLE_NAME FROM INFORMATION_SCHEMA.TABLES "
            "WHERE TABLE_SCHEMA = %s AND TABLE_NAME LIKE N'[_]cf[_]stage[_]%'",
            (schema,),
        )
        return [str(row[0]) for row in rows if not str(row[0]).endswith(_DESCRIBED)]

    def _described(self, stage: str) -> list[StagedColumn] | None:
        table = _described_table(stage)
        if self.columns(table) is None:
            return None
        rows = self.execute(
            f"SELECT position, name, type FROM {self.quote_table(table)} ORDER BY position"  # noqa: S608
        )
        return [
            StagedColumn(str(name), str(kind), _source(f"c{int(position)}", str(kind)))
            for position, name, kind in rows
        ]


def staged_type(kind: pa.DataType) -> str:
    """Type of a staging column."""
    kind = plain_type(kind)
    if pt.is_boolean(kind):
        return _BIT
    if (pt.is_integer(kind) and not pt.is_uint64(kind)) or pt.is_duration(kind):
        return _INTEGER
    if pt.is_floating(kind):
        return _FLOAT
    return _BYTES if is_bytes(kind) else _TEXT


def target_type(name: str, kind: Any) -> str:
    """Type of the target's column."""
    if name == "_cf_job_id":
        return _JOB_ID  # short enough for an index
    kind = plain_type(kind)
    if pt.is_uint64(kind):
        return "decimal(20,0)"
    if pt.is_decimal(kind):
        if kind.precision > 38:
            raise pa.ArrowInvalid(f"{kind}: SQL Server's decimals have at most 38 digits")
        return f"decimal({kind.precision},{kind.scale})"
    if pt.is_date(kind):
        return "date"
    if pt.is_time(kind):
        return "time(6)"
    if pt.is_timestamp(kind):
        return "datetime2(6)" if kind.tz is None else "datetimeoffset(6)"
    return staged_type(kind)


def _source(column: str, kind: str) -> str:
    """Expression that gives a staged value back in the target's type."""
    base = _base(kind)
    if kind == _BYTES:
        return f"SUBSTRING({column}, 2, DATALENGTH({column}))"
    if base == "nvarchar":
        return f"STUFF({column}, 1, 1, N'')"
    if base in ("decimal", "date", "time", "datetime2", "datetimeoffset"):
        return f"CAST(STUFF({column}, 1, 1, N'') AS {kind})"
    return column


def _staged_values(array: Any, staged: str) -> list[Any]:
    if pt.is_dictionary(array.type) and len(array.dictionary) == 1 and not array.null_count:
        return [_PAD_TEXT + str(array.dictionary[0].as_py())] * len(array)
    values = plain(array)
    kind: Any = values.type
    if staged == _TEXT:
        return [None if text is None else _PAD_TEXT + text for text in _texts(values, kind)]
    if staged == _BYTES:
        return [None if raw is None else _PAD_BYTES + raw for raw in values.to_pylist()]
    if staged == _FLOAT:
        return [_finite(number) for number in values.to_pylist()]
    if pt.is_duration(kind):
        values = values.cast(pa.int64())
    result: list[Any] = values.to_pylist()
    return result


def _texts(values: Any, kind: Any) -> list[str | None]:
    if pt.is_timestamp(kind):
        values = values.cast(pa.timestamp("us", kind.tz))
        if kind.tz is not None:
            naive = values.cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us"))
            return [None if t is None else t + "+00:00" for t in as_text(naive).to_pylist()]
    if pt.is_time(kind):
        values = values.cast(pa.time64("us"))
    texts: list[str | None] = as_text(values).to_pylist()
    return texts


def _finite(number: float | None) -> float | None:
    if number is None or math.isnan(number):
        return None
    if math.isinf(number):
        raise pa.ArrowInvalid("SQL Server has no infinite numbers")
    return number


def _base(kind: str) -> str:
    return kind.partition("(")[0]


def _schema_of(table: str) -> str:
    schema, dot, _ = table.partition(".")
    return schema if dot else _DEFAULT_SCHEMA


def _bare(table: str) -> str:
    return table.rpartition(".")[2]


def _stage_table(path: str, token: str, n: int) -> str:
    return f"{_schema_of(path)}.{_STAGE_PREFIX}{stage_name(token, n).replace('.', '_')}"


def _described_table(stage: str) -> str:
    return stage + _DESCRIBED


def _token_of_table(name: str) -> str:
    token, underscore, n = name.removeprefix(_STAGE_PREFIX).rpartition("_")
    return token_of_stage(f"{token}.{n}") if underscore else ""


def _library() -> Any:
    try:
        import pymssql
    except ImportError as error:
        raise SinkError(
            "mssql:// needs the pymssql package, which is not installed",
            hint="Install casparian-flow[mssql] on the workers.",
        ) from error
    return pymssql


def _connect(env: SinkEnvironment) -> "pymssql.Connection":
    settings = env.mssql
    if not settings.server:
        raise SinkError(
            "mssql:// has no server",
            hint="Set [sinks.mssql] in global_config.toml, or CASPARIAN_MSSQL_SERVER, _PORT, "
            "_USER, _PASSWORD and _DATABASE for the workers.",
        )
    library = _library()
    try:
        connection: pymssql.Connection = library.connect(
            server=settings.server,
            port=str(settings.port),
            user=settings.user,
            password=settings.password,
            database=settings.database,
            login_timeout=max(1, int(settings.timeout_s)),
            timeout=0,
            charset="UTF-8",
            appname="casparian-worker",
            autocommit=True,
        )
    except library.Error as error:
        raise _wrapped(error, settings.server) from error
    return connection


def _facts(error: Exception) -> tuple[int, str]:
    """Number and text of a pymssql error; errors of connecting wrap them once more."""
    args = error.args
    if len(args) == 1 and isinstance(args[0], tuple):
        args = args[0]
    number = args[0] if args and isinstance(args[0], int) else 0
    detail = args[1] if len(args) > 1 else (args[0] if args else "")
    text = detail.decode("utf-8", "replace") if isinstance(detail, bytes) else str(detail)
    return number, text


def _wrapped(error: Exception, server: str) -> SinkError:
    number, text = _facts(error)
    message = f"SQL Server {server}, error {number}: {text.splitlines()[0] if text else '?'}"
    if number in _FULL:
        return DiskFullError(message, hint="Make room in the database; the job is retried.")
    if number == 18456:
        return SinkError(message, hint="Check CASPARIAN_MSSQL_USER and CASPARIAN_MSSQL_PASSWORD.")
    # Without a number, and with DB-Library's own from 20001 up, it is about the connection.
    lost = number == 0 or 20_000 <= number < 21_000
    return SinkError(message, transient=lost or number in _TRANSIENT)
