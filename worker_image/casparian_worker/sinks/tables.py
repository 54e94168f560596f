"""Sinks that write into tables: publishing as one transaction with a fence row.

    BEGIN
    INSERT the fence row (primary key: output_key)      a second publisher fails here
    make the table, or add the columns it lacks
    for replace: DELETE the slice's earlier rows
    INSERT the staged rows
    COMMIT

The fence row is never deleted, so whoever publishes late finds it. It also says which rows belong
to which output: those of its table whose `_cf_job_id` is its job's. `live` turns 0 when `replace`
removes them.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from casparian_flow.domain.errors import (
    OutputLostError,
    OutputRefusedError,
    SinkConflictError,
    SinkError,
    require,
)
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import (
    QUARANTINE_SUFFIX,
    OutputEntry,
    OutputKind,
    SinkAddress,
    SinkMode,
)
from casparian_worker.lineage import global_job_id
from casparian_worker.sinks.base import Receipt, StageContext, topic_name

FENCE: Final = "_cf_fence"
VIEW_SUFFIX: Final = "_current"
_JOB_COLUMN: Final = "_cf_job_id"

FENCE_COLUMNS: Final = (
    ("output_key", "TEXT NOT NULL PRIMARY KEY"),
    ("slice_key", "TEXT NOT NULL"),
    ("target", "TEXT NOT NULL"),
    ("version_seq", "BIGINT NOT NULL"),
    ("manifest_id", "BIGINT NOT NULL"),
    ("generation", "BIGINT NOT NULL"),
    ("cf_job_id", "TEXT NOT NULL"),
    ("token", "TEXT NOT NULL"),
    ("row_count", "BIGINT NOT NULL"),
    ("live", "INTEGER NOT NULL"),
    ("published_at", "TEXT NOT NULL"),
)
"""Of `_cf_fence`; `target` is the table's name in lower case."""


class DuplicateFenceError(Exception):
    """The fence row's key is taken."""


@dataclass(frozen=True, slots=True)
class StagedColumn:
    """A column of a stage.

    Attributes:
        type: in the target's dialect.
        source: SQL expression for it in the query that reads the stage.
    """

    name: str
    type: str
    source: str


class TargetDatabase(abc.ABC):
    """One connection to a target, in its dialect. Errors come out as SinkError.

    Attributes:
        marker: how the driver writes a parameter.
    """

    marker: str = "?"

    @abc.abstractmethod
    def begin(self) -> None:
        """Start a transaction that may write."""

    @abc.abstractmethod
    def commit(self) -> None: ...

    @abc.abstractmethod
    def rollback(self) -> None:
        """Undo; does nothing where there is no transaction."""

    @abc.abstractmethod
    def close(self) -> None: ...

    @abc.abstractmethod
    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement; the rows it returns.

        Raises:
            DuplicateFenceError: a primary key was violated.
            SinkError: anything else, wrapped.
        """

    @abc.abstractmethod
    def changed(self) -> int:
        """Rows that the last statement changed."""

    @abc.abstractmethod
    def quote(self, name: str) -> str: ...

    def quote_table(self, table: str) -> str:
        """A table's name as statements write it, with its schema where there are several."""
        return self.quote(table)

    @abc.abstractmethod
    def ensure_fence(self, table: str) -> str:
        """Make the fence table that serves `table` if it is missing; its quoted name."""

    @abc.abstractmethod
    def fence_name(self, table: str) -> str | None:
        """Quoted name of that fence table, None if there is none yet."""

    @abc.abstractmethod
    def columns(self, table: str) -> Mapping[str, str] | None:
        """Name → declared type of a table's columns; None if there is no such table."""

    @abc.abstractmethod
    def staged_columns(self) -> Sequence[StagedColumn]:
        """The stage's columns; only while a stage is attached."""

    @abc.abstractmethod
    def staged_source(self) -> str:
        """What to SELECT the stage's rows FROM."""

    @abc.abstractmethod
    def evolve(self, table: str, staged: Sequence[StagedColumn]) -> Sequence[StagedColumn]:
        """Make the table, or fit it to the staged columns; the columns to insert.

        Raises:
            SinkError: a column cannot hold the staged values without changing them.
        """

    @abc.abstractmethod
    def show_current(self, table: str) -> None:
        """Make or refresh the view of the newest versions' rows, where the sink offers one."""


class Publication:
    """Publishing one entry through one connection."""

    def __init__(self, db: TargetDatabase, entry: OutputEntry, token: str) -> None:
        self._db = db
        self._entry = entry
        self._token = token
        self._fence = ""
        self._target = entry.final.casefold()

    def run(self, table: str, published_at: str, *, staged: bool) -> Receipt:
        """The transaction.

        Args:
            table: where the rows go.
            staged: whether the stage is there and attached.

        Raises:
            SinkConflictError, OutputLostError, SinkError: see `Sink.publish`.
        """
        self._target = table.casefold()
        db = self._db
        db.begin()
        try:
            self._fence = db.ensure_fence(table)
            self._claim(published_at)
            if self._entry.rows and not staged:
                raise OutputLostError(
                    f"the stage {self._entry.stage} is gone, and {table!r} does not hold its rows",
                    hint="Restore it from a backup, or give the output up with "
                    "`casparian job resolve --abandon` and run the job again.",
                )
            replaces = self._check_slice(table)
            # The table changes before its rows do: DuckDB cannot alter what it has written to.
            columns = db.evolve(table, db.staged_columns()) if self._entry.rows else ()
            removed = self._remove_slice(table) if replaces else 0
            if self._entry.rows:
                self._insert(table, columns)
            db.commit()
        except DuplicateFenceError:
            db.rollback()
            return self._already()
        except BaseException:
            db.rollback()
            raise
        return Receipt(self._entry.output_key, already=False, removed=removed)

    def _claim(self, published_at: str) -> None:
        entry = self._entry
        names = ", ".join(name for name, _ in FENCE_COLUMNS)
        markers = ", ".join([self._db.marker] * len(FENCE_COLUMNS))
        self._db.execute(
            f"INSERT INTO {self._fence} ({names}) VALUES ({markers})",  # noqa: S608
            (
                entry.output_key,
                entry.slice_key,
                self._target,
                *entry.order_no,
                global_job_id(self._token),
                self._token,
                entry.rows,
                1,
                published_at,
            ),
        )

    def _already(self) -> Receipt:
        marker, key = self._db.marker, self._entry.output_key
        rows = self._db.execute(
            f"SELECT token FROM {self._fence} WHERE output_key = {marker}",  # noqa: S608
            (key,),
        )
        if rows and rows[0][0] == self._token:
            return Receipt(key, already=True)
        raise SinkConflictError(
            f"{self._entry.final!r} already holds this output, published under "
            f"{rows[0][0] if rows else 'another token'}, not {self._token}",
            hint="Nothing was changed. If the rows there are right, give this job up with "
            "`casparian job resolve --abandon`.",
        )

    def _check_slice(self, table: str) -> bool:
        """Ask what the mode asks; True if earlier rows of the slice have to go."""
        if self._entry.mode is SinkMode.APPEND:
            return False
        others = slice_outputs(self._db, self._fence, self._entry)
        if self._entry.mode is SinkMode.ERROR:
            refuse_present(others, table)
            return False
        if any(order > self._entry.order_no for order, _ in others):
            raise SinkConflictError(f"{table!r} already holds a newer version of these rows")
        if others:
            refuse_shared(self._db, self._fence, self._entry, self._target)
        return bool(others)

    def _remove_slice(self, table: str) -> int:
        db, m = self._db, self._db.marker
        mine = (self._entry.slice_key, self._entry.output_key)
        removed = 0
        if db.columns(table) is not None:
            db.execute(
                f"DELETE FROM {db.quote_table(table)} WHERE {_JOB_COLUMN} IN ("  # noqa: S608
                f"SELECT cf_job_id FROM {self._fence} "
                f"WHERE slice_key = {m} AND live = 1 AND output_key <> {m})",
                mine,
            )
            removed = db.changed()
        db.execute(
            f"UPDATE {self._fence} SET live = 0 "  # noqa: S608
            f"WHERE slice_key = {m} AND live = 1 AND output_key <> {m}",
            mine,
        )
        return removed

    def _insert(self, table: str, columns: Sequence[StagedColumn]) -> None:
        db = self._db
        names = ", ".join(db.quote(column.name) for column in columns)
        sources = ", ".join(column.source for column in columns)
        db.execute(
            f"INSERT INTO {db.quote_table(table)} ({names}) "  # noqa: S608
            f"SELECT {sources} FROM {db.staged_source()}"
        )
        if db.changed() != self._entry.rows:
            raise SinkError(
                f"the stage {self._entry.stage} holds {db.changed()} rows, not {self._entry.rows}"
            )
        if self._entry.mode is SinkMode.APPEND:
            db.show_current(table)


def slice_outputs(
    db: TargetDatabase, fence: str, entry: OutputEntry
) -> list[tuple[tuple[int, int, int], int]]:
    """(order, rows) of the slice's other outputs whose rows are in the table."""
    rows = db.execute(
        f"SELECT version_seq, manifest_id, generation, row_count FROM {fence} "  # noqa: S608
        f"WHERE slice_key = {db.marker} AND live = 1 AND output_key <> {db.marker}",
        (entry.slice_key, entry.output_key),
    )
    return [((int(r[0]), int(r[1]), int(r[2])), int(r[3])) for r in rows]


def refuse_present(others: Sequence[tuple[tuple[int, int, int], int]], table: str) -> None:
    """For mode=error.

    Raises:
        SinkConflictError: the table holds rows of this file and topic.
    """
    rows = sum(count for _, count in others)
    if rows:
        raise SinkConflictError(
            f"mode=error: table {table!r} already holds {rows} rows of this file and topic",
            hint="Use mode=replace or mode=append.",
        )


def refuse_shared(db: TargetDatabase, fence: str, entry: OutputEntry, target: str) -> None:
    """For mode=replace: rows are told apart by their job, so two topics may not share a table.

    Raises:
        SinkConflictError: the jobs whose rows are to go have put other topics' rows there too.
    """
    m = db.marker
    rows = db.execute(
        f"SELECT COUNT(*) FROM {fence} WHERE target = {m} AND slice_key <> {m} "  # noqa: S608
        f"AND live = 1 AND row_count > 0 AND cf_job_id IN (SELECT cf_job_id FROM {fence} "
        f"WHERE slice_key = {m} AND live = 1 AND output_key <> {m})",
        (target, entry.slice_key, entry.slice_key, entry.output_key),
    )
    if rows[0][0]:
        raise SinkConflictError(
            f"mode=replace: several topics write to table {target!r}, so the rows of one cannot "
            "be taken out alone",
            hint="Give each topic a table of its own.",
        )


def check_target(db: TargetDatabase, entry: OutputEntry, table: str) -> None:
    """Look, before the grant, for what would make publishing fail for good.

    Raises:
        SinkConflictError: see `refuse_present` and `refuse_shared`.
    """
    fence = db.fence_name(table)
    if fence is None or entry.mode is SinkMode.APPEND:
        return
    others = slice_outputs(db, fence, entry)
    if entry.mode is SinkMode.ERROR:
        refuse_present(others, table)
    elif others:
        refuse_shared(db, fence, entry, table.casefold())


def table_of(address: SinkAddress, ctx: StageContext) -> str:
    """The table that an output goes to: the URI's, else the topic; with the quarantine's suffix.

    Raises:
        OutputRefusedError: the name is one that the sink needs for itself.
    """
    table = _table_name(address, topic_name(ctx), ctx.kind)
    if table.rpartition(".")[2].casefold().startswith(("_cf_", "sqlite_")):
        raise OutputRefusedError(
            f"table name {table!r} is reserved",
            reason=Reason.SINK,
            hint="Rename the topic, or give the sink URI a table of another name.",
        )
    return table


def entry_table(address: SinkAddress, entry: OutputEntry) -> str:
    """The table of a manifest's entry; insists that the manifest says the same."""
    table = _table_name(address, entry.topic, entry.kind)
    require(entry.final in ("", table), f"manifest names table {entry.final!r}, not {table!r}")
    return table


def _table_name(address: SinkAddress, topic: str, kind: OutputKind) -> str:
    named = address.path if address.scheme == "mssql" else address.table
    if not named:
        return topic
    return named + (QUARANTINE_SUFFIX if kind is OutputKind.QUARANTINE else "")


def refusal_of(error: SinkError) -> OutputRefusedError:
    """What would fail for good after the grant, said before it."""
    conflict = isinstance(error, SinkConflictError)
    reason = Reason.SINK_CONFLICT if conflict else Reason.CONTRACT
    return OutputRefusedError(str(error), reason=reason, hint=error.hint)


def check_columns(schema: pa.Schema, address: SinkAddress, *, longest: int) -> None:
    """Refuse column names that a table cannot have.

    Raises:
        OutputRefusedError: two names that differ in letter case only, an empty one, one with a
            NUL character, or one longer than `longest` characters.
    """
    seen: dict[str, str] = {}
    problem = ""
    for name in schema.names:
        twin = seen.setdefault(name.casefold(), name)
        if twin != name:
            problem = f"columns {twin!r} and {name!r} differ in letter case only"
        elif not name.strip() or "\0" in name or len(name) > longest:
            problem = f"{name[:60]!r} is no column name (1 to {longest} characters)"
        if problem:
            raise OutputRefusedError(
                f"{address.uri}: {problem}",
                reason=Reason.CONTRACT,
                hint="Rename the column in the plugin.",
            )


def current_view_sql(db: TargetDatabase, table: str, fence: str) -> str:
    """SELECT of the rows that belong to the newest output of each slice.

    A newest output without rows hides the older ones of its file, as it should.
    """
    target = table.casefold().replace("'", "''")
    newer = (
        "(g.version_seq > f.version_seq OR (g.version_seq = f.version_seq AND "
        "(g.manifest_id > f.manifest_id OR (g.manifest_id = f.manifest_id AND "
        "(g.generation > f.generation OR (g.generation = f.generation AND "
        "g.published_at > f.published_at))))))"
    )
    return (
        f"SELECT t.* FROM {db.quote_table(table)} AS t WHERE t.{_JOB_COLUMN} IN ("  # noqa: S608
        f"SELECT f.cf_job_id FROM {fence} AS f WHERE f.target = '{target}' AND NOT EXISTS ("
        f"SELECT 1 FROM {fence} AS g WHERE g.slice_key = f.slice_key AND {newer}))"
    )
