"""From the journal to cf_processing_queue: the SQL half of the fold.

Rows close together are updated in place. An update touches every 2,048-row vector that holds a
changed row, in every column, and DuckDB's undo buffer for it grows until the commit turns into
a checkpoint of more than a second; so rows scattered over many vectors are deleted and inserted
instead (measurements: docs/ledger.md).
"""

from collections.abc import Sequence
from typing import Any, Final

import duckdb
import pyarrow as pa

from casparian_flow.db.journal import COLUMNS, OUTPUT_STATES, Folded, decode_data, describe
from casparian_flow.domain.errors import InvalidTransitionError, InvariantError
from casparian_flow.domain.jobs import TRANSITIONS, JobStatus, JournalKind

_VECTOR_ROWS: Final = 2048
_VECTORS_MAX: Final = 32
"""With all columns about 20 MB of undo, well below the checkpoint threshold."""
_ARROW = {
    "VARCHAR": pa.string(),
    "TIMESTAMP": pa.timestamp("us"),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
}


def project(connection: duckdb.DuckDBPyConnection, changes: Sequence[Folded]) -> None:
    """Bring the rows of the changed jobs up to date, inside the caller's transaction.

    Raises:
        InvalidTransitionError: a row's status is not the one the journal started from.
    """
    ordered = sorted(changes, key=lambda f: f.job_id)
    if not ordered:
        return
    sets, batch = _assignments(ordered)
    vectors = {f.job_id // _VECTOR_ROWS for f in ordered}
    move = _update if len(vectors) <= _VECTORS_MAX else _reinsert
    count = move(connection, sets, batch)
    if count != len(ordered):
        _explain(connection, ordered)
    _settle_outputs(connection, ordered)


def _assignments(ordered: Sequence[Folded]) -> tuple[dict[str, str], pa.RecordBatch]:
    """SQL per changed column, and the values; columns that nothing changes are left out."""
    arrays: dict[str, pa.Array[Any]] = {
        "id": pa.array([f.job_id for f in ordered], pa.int64()),
        "start": pa.array([f.start for f in ordered], pa.string()),
        "status": pa.array([f.status for f in ordered], pa.string()),
        "attempt": pa.array([f.attempt for f in ordered], pa.int32()),
    }
    sets = {"status": "f.status", "attempt": "f.attempt"}
    for column, sql_type, attribute, group in COLUMNS:
        if group:
            flags = [getattr(f, group) for f in ordered]
            if not any(flags):
                continue
            arrays.setdefault(group, pa.array(flags, pa.bool_()))
            sets[column] = f"CASE WHEN f.{group} THEN f.{column} ELSE q.{column} END"
        values = [getattr(f, attribute) for f in ordered]
        if not group:
            if all(value is None for value in values):
                continue
            sets[column] = f"coalesce(f.{column}, q.{column})"
        arrays[column] = pa.array(values, _ARROW[sql_type])
    return sets, pa.RecordBatch.from_pydict(arrays)


def _update(
    connection: duckdb.DuckDBPyConnection, sets: dict[str, str], changes: pa.RecordBatch
) -> int:
    assigned = ", ".join(f"{column} = {value}" for column, value in sets.items())
    row = connection.execute(
        f"UPDATE cf_processing_queue q SET {assigned} FROM changes f "
        "WHERE q.id = f.id AND q.status = f.start"
    ).fetchone()
    return int(row[0]) if row else 0


def _reinsert(
    connection: duckdb.DuckDBPyConnection, sets: dict[str, str], changes: pa.RecordBatch
) -> int:
    assigned = ", ".join(f"{value} AS {column}" for column, value in sets.items())
    row = connection.execute(
        f"CREATE OR REPLACE TEMP TABLE folded_rows AS SELECT q.* REPLACE ({assigned}) "
        "FROM cf_processing_queue q JOIN changes f ON q.id = f.id AND q.status = f.start"
    ).fetchone()
    count = int(row[0]) if row else 0
    connection.execute(
        "DELETE FROM cf_processing_queue USING folded_rows f WHERE cf_processing_queue.id = f.id"
    )
    connection.execute("INSERT INTO cf_processing_queue SELECT * FROM folded_rows")
    connection.execute("DROP TABLE temp.folded_rows")
    return count


def _settle_outputs(connection: duckdb.DuckDBPyConnection, ordered: Sequence[Folded]) -> None:
    for status, state in OUTPUT_STATES.items():
        jobs = [f.job_id for f in ordered if f.granted and f.status is status]
        if jobs:
            connection.execute(
                "UPDATE cf_output SET state = $1 WHERE state = 'GRANTED' "
                "AND job_id IN (SELECT unnest($2::BIGINT[]))",
                [state, jobs],
            )


def _explain(connection: duckdb.DuckDBPyConnection, ordered: Sequence[Folded]) -> None:
    """Find the job whose row is not where the journal says, and tell its story."""
    # A second connection sees the rows as they were before this transaction touched them.
    with connection.cursor() as before:
        found = dict(
            before.execute(
                "SELECT id, status FROM cf_processing_queue "
                "WHERE id IN (SELECT unnest($1::BIGINT[]))",
                [[f.job_id for f in ordered]],
            ).fetchall()
        )
        for folded in ordered:
            actual = found.get(folded.job_id, "no such row")
            if actual != folded.start:
                raise InvalidTransitionError(
                    folded.job_id,
                    f"{folded.start} (the table says {actual})",
                    folded.status,
                    history(before, folded.job_id),
                )
    raise InvariantError("a fold changed another number of rows than it has jobs")


def history(connection: duckdb.DuckDBPyConnection, job_id: int) -> list[str]:
    """The job's journal, one line an entry, oldest first."""
    rows = connection.execute(
        "SELECT seq, kind, attempt, make_timestamp(at_us), data FROM cf_journal "
        "WHERE job_id = $1 ORDER BY seq",
        [job_id],
    ).fetchall()
    return [describe(seq, kind, attempt, at, data) for seq, kind, attempt, at, data in rows]


def replay(connection: duckdb.DuckDBPyConnection, after_seq: int) -> dict[int, Folded]:
    """What the journal says beyond what is folded, by job.

    Raises:
        InvalidTransitionError: an entry makes an illegal move.
    """
    rows: list[tuple[Any, ...]] = connection.execute(
        "SELECT job_id, kind, attempt, at_us, data FROM cf_journal WHERE seq > $1 ORDER BY seq",
        [after_seq],
    ).fetchall()
    starts = dict(
        connection.execute(
            "SELECT id, status FROM cf_processing_queue WHERE id IN (SELECT unnest($1::BIGINT[]))",
            [list({row[0] for row in rows})],
        ).fetchall()
        if rows
        else []
    )
    pending: dict[int, Folded] = {}
    for job_id, kind_text, attempt, at_us, data in rows:
        kind = JournalKind(kind_text)
        folded = pending.get(job_id)
        if folded is None:
            if job_id not in starts:
                raise InvalidTransitionError(job_id, "(no such row)", kind)
            start = JobStatus(starts[job_id])
            folded = pending[job_id] = Folded(job_id, start, start)
            folded.granted = start is JobStatus.STAGED
        before = folded.status
        folded.apply(kind, attempt, at_us, decode_data(data))
        if folded.status not in TRANSITIONS[before]:
            raise InvalidTransitionError(job_id, before, folded.status, history(connection, job_id))
    return pending
