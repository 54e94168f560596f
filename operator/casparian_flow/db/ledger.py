"""The ledger: group commit to a journal, with the tables as its projection.

The journal is the truth about jobs. One commit appends a tick's records, inserts new jobs and
reserves granted outputs, in one transaction at a cost that does not depend on the length of the
queue. `cf_processing_queue` follows by `fold`, when idle, every FOLD_ENTRIES entries, before
any read and at open. docs/ledger.md has the reasons and the measurements.

One Ledger per file and process. Its methods may be called from any thread; a lock makes them
run one after the other. Never open the ledger's file by other means in the process that holds
it: closing any descriptor of it drops DuckDB's lock on it (POSIX locks belong to the process).
"""

import copy
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar

import duckdb
import pyarrow as pa

from casparian_flow.db import check, exchange, folding, loading, opening, shapes, snapshot
from casparian_flow.db.counters import EPOCH_LEAP, ID_LEAP, Counters, leap
from casparian_flow.db.engine_errors import (
    commit_error,
    export_error,
    is_fatal,
    open_error,
    read_error,
    side_file_error,
)
from casparian_flow.db.grants import SliceHead, advance, judge, sliced
from casparian_flow.db.guard import CODE, StatusMap
from casparian_flow.db.highwater import HighWater, check_mark, sidecar_path
from casparian_flow.db.journal import Folded, encode_data, fold_into
from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import (
    CommitFailedError,
    ConflictError,
    InvariantError,
    LedgerLockedError,
    UsageError,
    require,
)
from casparian_flow.domain.ids import Token
from casparian_flow.domain.jobs import KIND_STATUS, LEASED, JobStatus, JournalKind
from casparian_flow.domain.records import (
    BatchItem,
    GrantOutcome,
    HealthRecord,
    Job,
    LedgerState,
    Limits,
    NewJob,
    PluginSpec,
    Record,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
FOLD_ENTRIES: Final = 5_000
"""Journal entries after which a fold is due; bounds the fold at open and its memory."""
CHECKPOINT_MB: Final = 48
"""Size of the write-ahead log at which DuckDB checkpoints within a commit (a stall)."""
IDLE_CHECKPOINT_BYTES: Final = 4 << 20
"""Size above which an idle ledger checkpoints by itself, so that commits need not."""
MEMORY_LIMIT_MB: Final = 512
_STATUS_CHUNK: Final = 1 << 18
_DIGIT_VALUES: Final = bytes.maketrans(b"0123456789", bytes(range(10)))
_BULK_COLUMNS: Final = frozenset(
    {
        "plugin_name",
        "file_version_id",
        "priority",
        "generation",
        "config_overrides",
        "plugin_manifest_id",
        "retry_of",
    }
)
_QUEUE: Final = "cf_processing_queue"
_LIVE: Final = LEASED | {JobStatus.STAGED}

_open_paths: dict[Path, "weakref.ref[Ledger]"] = {}
_open_guard = threading.Lock()


class _Planned:
    """One batch, checked and taken apart, before anything is written."""

    def __init__(self) -> None:
        self.new_jobs: list[NewJob] = []
        self.records: list[tuple[Record, JobStatus]] = []
        """With the job's status before."""
        self.granted: list[tuple[Record, Token]] = []
        self.health: dict[str, HealthRecord] = {}
        self.outcomes: list[GrantOutcome] = []
        self.tokens: dict[int, Token | None] = {}
        self.slices: dict[str, SliceHead] = {}
        self.heads: dict[str, SliceHead] = {}


class Ledger:
    """See the module's text. Make one with `open` or `in_memory`.

    Attributes:
        ledger_id: eight hex digits, made once.
        epoch: number of the last `begin_epoch`.
        path: the file, None in memory.
        must_reopen: after a failure whose outcome is unknown; call `reopen`.
        epoch_floor: epochs that begin are above this one as well; its owner sets it to the highest
            that it knows of from elsewhere.
        limits: what a plugin run may use, for `plugin_specs`; the owner may set others.
        screen: says of a plugin version why it may not run, "" if it may, None if it does not
            judge; the owner sets it.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Clock,
        *,
        create: bool,
        memory_limit_mb: int = MEMORY_LIMIT_MB,
    ) -> None:
        self.path = path
        self._memory_limit_mb = memory_limit_mb
        self.ledger_id = ""
        self.epoch = 0
        self.must_reopen = False
        self.limits = Limits()
        self.epoch_floor = 0
        self.screen: Callable[[PluginSpec], str | None] = _not_judged
        self._clock = clock
        self._create = create
        self._lock = threading.RLock()
        self._closed = False
        self._in_transaction = False
        self._snapshots = 0
        self._open()

    # -- opening and closing ------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        clock: Clock,
        create: bool = True,
        memory_limit_mb: int = MEMORY_LIMIT_MB,
    ) -> "Ledger":
        """Open the ledger at `path`, making it on the first run.

        `memory_limit_mb` bounds DuckDB's memory; a million jobs fit into the default.

        Raises:
            NotFoundError: there is none and `create` is false.
            LedgerLockedError: a process has it open (its id is in the message).
            LedgerCorruptError: damaged, or older than what was acknowledged.
            SchemaMismatchError: made by another version.
            LedgerError: not a ledger, or not writable. Nothing is ever overwritten.
        """
        resolved = Path(path).resolve()
        with _open_guard:
            holder = _open_paths.get(resolved)
            if holder is not None and holder() is not None:
                raise LedgerLockedError(
                    f"ledger {resolved} is open in this process already",
                    hint="Use that one, or close it first.",
                )
            ledger = cls(resolved, clock, create=create, memory_limit_mb=memory_limit_mb)
            _open_paths[resolved] = weakref.ref(ledger)
        return ledger

    @classmethod
    def in_memory(cls, *, clock: Clock) -> "Ledger":
        """A ledger that nothing outlives, for tests and trials."""
        return cls(None, clock, create=True)

    def _open(self) -> None:
        self.must_reopen = False
        self._highwater: HighWater | None = None
        if self.path is None:
            self._connection = duckdb.connect(":memory:")
            self._settings()
            self._reload()
            return
        opened = opening.connect(self.path, create=self._create)
        self._connection = opened.connection
        sound = False
        try:
            self._settings()
            self._identify()
            check_mark(self.path, self.ledger_id, self._seq)
            opening.bring_up(self._connection, self.path)
            self._highwater = HighWater(sidecar_path(self.path), self.ledger_id)
            sound = True
            self._require_mark()
            self._read_state()
            self._checkpoint()
        except BaseException as error:
            opened.abandon(put_back=not sound)
            self._close_sidecar()
            if isinstance(error, duckdb.Error):
                raise open_error(self.path, error) from error
            if isinstance(error, OSError):
                raise side_file_error(self.path, error) from error
            raise
        self._create = False

    def _reload(self) -> None:
        """Take the whole state in memory from the tables."""
        self._identify()
        self._read_state()

    def _identify(self) -> None:
        self.ledger_id = opening.prepare(self._connection, self.path, self._clock)
        tail = opening.read_tail(self._connection)
        self.epoch, self._seq, self._folded_seq = tail.epoch, tail.seq, tail.folded_seq

    def _settings(self) -> None:
        for setting in (
            "TimeZone = 'UTC'",
            f"memory_limit = '{self._memory_limit_mb}MB'",
            f"checkpoint_threshold = '{CHECKPOINT_MB}MB'",
            # One thread: commits are small, and what DuckDB would start others for is slower
            # for it. Readers share it.
            "threads = 1",
            "preserve_insertion_order = true",
        ):
            self._connection.execute(f"SET {setting}")

    def _require_mark(self) -> None:
        """Make the mark that a ledger lacks, and be careful if it is no new one."""
        if self._highwater is None or not self._highwater.unknown:
            return
        if self._seq:
            opening.require_one_history(self._connection, self.path)
            log.warning(
                "the high-water mark of %s is missing: whether acknowledged commits are lost "
                "cannot be known; ids go on %d further, so that none is given twice",
                self.path,
                ID_LEAP,
            )
            self._begin()
            leap(self._connection)
            self._mark_transaction()
            self._end()
            self.epoch += EPOCH_LEAP
        self._highwater.write(self._seq)

    def _read_state(self) -> None:
        self._counters = Counters()
        self._counters.seed(self._connection)
        self._statuses = StatusMap()
        self._pending: dict[int, Folded] = {}
        self._unfolded = 0
        self._wal_bytes = 0
        self._pending = folding.replay(self._connection, self._folded_seq)
        self._unfolded = len(self._pending)
        if self._pending:
            self.fold()
        self._fill_statuses(1)
        self._tokens: dict[int, Token] = {
            job_id: Token(token or "")
            for job_id, token in self._connection.execute(
                f"SELECT id, lease_token FROM {_QUEUE} "
                "WHERE status IN ('DISPATCHING', 'RUNNING', 'STAGED')"
            ).fetchall()
        }

    def _fill_statuses(self, first_id: int) -> None:
        """Read the statuses of all jobs from `first_id` on, in id order, a chunk at a time."""
        cases = " ".join(f"WHEN '{status}' THEN {code}" for status, code in CODE.items())
        row = self._connection.execute(f"SELECT max(id) FROM {_QUEUE}").fetchone()
        last_id = int(row[0] or 0) if row else 0
        for low in range(first_id, last_id + 1, _STATUS_CHUNK):
            high = min(low + _STATUS_CHUNK, last_id + 1)
            # One text of a digit per id: a tuple for each job would cost ten times as much.
            digits = self._connection.execute(
                f"SELECT string_agg(coalesce(CASE q.status {cases} END, 0)::VARCHAR, '' "
                f"ORDER BY r.id) FROM range({low}, {high}) r(id) "
                f"LEFT JOIN (SELECT id, status FROM {_QUEUE} WHERE id >= {low} AND id < {high}) q "
                "ON q.id = r.id"
            ).fetchone()
            if digits:
                self._statuses.fill(low, digits[0].encode().translate(_DIGIT_VALUES))

    def reopen(self) -> None:
        """Close and open the file again, after a failure whose outcome is unknown.

        Raises:
            LedgerError: as `open`.
        """
        with self._lock:
            self._release()
            try:
                self._open()
            except BaseException:
                self.must_reopen = True
                raise

    def recover(self) -> None:
        """Make the ledger usable again after a failed commit.

        Raises:
            LedgerError: it is not usable yet.
        """
        with self._lock:
            if self.must_reopen:
                self.reopen()

    def close(self) -> None:
        """Fold, checkpoint and release the file; harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            try:
                if not self.must_reopen:
                    self.fold()
                    self._checkpoint()
            finally:
                self._closed = True
                self._release()
                self._forget()

    def _release(self) -> None:
        self._connection.close()
        self._close_sidecar()

    def _close_sidecar(self) -> None:
        if self._highwater is not None:
            self._highwater.close()

    def _forget(self) -> None:
        with _open_guard:
            holder = _open_paths.get(self.path) if self.path is not None else None
            if self.path is not None and holder is not None and holder() is self:
                del _open_paths[self.path]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _reading(self, *, folded: bool = True) -> Iterator[None]:
        """Up-to-date tables, and what damage of the file means.

        Raises:
            LedgerCorruptError, LedgerUnavailableError: they cannot be read.
        """
        with self._lock:
            if folded:
                self.fold()
            try:
                yield
            except duckdb.Error as error:
                if isinstance(error, _OWN_FAULTS):
                    raise
                raise read_error(self.path, error) from error

    # -- the broker's side --------------------------------------------------------------------

    def begin_epoch(self) -> int:
        """Raise the epoch durably; no token of an earlier Sentinel is ever made again.

        Raises:
            LedgerUnavailableError: nothing is changed.
        """
        epoch = max(self.epoch, self.epoch_floor) + 1
        with self.transaction() as connection:
            connection.execute("UPDATE cf_meta SET value = $1 WHERE key = 'epoch'", [str(epoch)])
        self.epoch = epoch
        return epoch

    def load(self, page: int, limits: Limits | None = None) -> LedgerState:
        """Everything that the broker is rebuilt from; QUEUED jobs only up to `page`."""
        with self._reading():
            active = loading.select_jobs(
                self._connection, "status IN ('DISPATCHING', 'RUNNING', 'STAGED')", []
            )
            loading.attach_manifests(self._connection, active)
            queued = loading.select_jobs(self._connection, "status = 'QUEUED'", [], page + 1)
            return LedgerState(
                ledger_id=self.ledger_id,
                epoch=self.epoch,
                next_job_id=self._counters.peek(_QUEUE),
                active=active,
                queued=queued[:page],
                more_queued=len(queued) > page,
                plugins=self.plugin_specs(limits),
                health=loading.load_health(self._connection),
                counts=loading.load_counts(self._connection),
            )

    def hydrate(self, after: tuple[int, int], limit: int) -> tuple[list[Job], bool]:
        """The next QUEUED jobs after (priority, id), and whether there are more.

        Jobs scheduled for later are among them; see their `not_before_us`.
        """
        priority, job_id = after
        with self._reading():
            jobs = loading.select_jobs(
                self._connection,
                "status = 'QUEUED' AND (priority < $1 OR (priority = $1 AND id > $2))",
                [priority, job_id],
                limit + 1,
            )
        return jobs[:limit], len(jobs) > limit

    def plugin_specs(self, limits: Limits | None = None) -> list[PluginSpec]:
        """Every ACTIVE plugin version with its wiring; `refused` says which may not run."""
        with self._lock:
            specs = loading.load_plugin_specs(self._connection, limits or self.limits)
        return [replace(spec, refused=self.screen(spec)) for spec in specs]

    def commit(self, batch: Sequence[BatchItem]) -> list[GrantOutcome]:
        """Make a tick's items durable together; nothing of a failed batch is.

        Returns:
            One outcome per GRANTED record, in order. A refused one is not in the journal.

        Raises:
            InvalidTransitionError: a record makes a move its job's state does not allow.
            LedgerUnavailableError: disk full, read-only, I/O error; `must_reopen` tells
                whether the ledger can be used again as it is.
        """
        with self._lock:
            self._require_usable()
            require(not self._in_transaction, "a commit within a transaction")
            if self._unfolded >= 2 * FOLD_ENTRIES:
                self.fold()
            taken: set[str] = set()
            while True:
                try:
                    return self._commit_once(batch, taken)
                except _OutputTakenError as error:
                    taken = error.keys

    def _commit_once(self, batch: Sequence[BatchItem], taken: set[str]) -> list[GrantOutcome]:
        seq = self._seq
        try:
            plan = self._plan(batch, taken)
            self._begin()
            self._write(plan)
            self._end()
        except BaseException as error:  # noqa: BLE001 - _fail raises it again
            self._statuses.rollback()
            self._counters.rollback()
            self._seq = seq
            self._fail(error)
        self._statuses.commit()
        self._counters.commit()
        self._remember(plan)
        self._acknowledge()
        return plan.outcomes

    def _plan(self, batch: Sequence[BatchItem], taken: set[str]) -> _Planned:
        plan = _Planned()
        grants = [i for i in batch if isinstance(i, Record) and i.kind is JournalKind.GRANTED]
        plan.slices = self._slice_heads(sliced(grants))
        taken = set(taken)
        for item in batch:
            if isinstance(item, Record):
                self._plan_record(plan, item, taken)
            elif isinstance(item, NewJob):
                self._statuses.add(item.job.job_id, item.job.status)
                self._counters.reach(_QUEUE, item.job.job_id)
                plan.new_jobs.append(item)
            else:
                plan.health[item.health.plugin] = item
        return plan

    def _plan_record(self, plan: _Planned, record: Record, taken: set[str]) -> None:
        job_id = record.job_id
        start = self._statuses.get(job_id)
        if record.kind is JournalKind.GRANTED:
            token = plan.tokens.get(job_id, self._tokens.get(job_id)) or Token("")
            outcome = judge(record, token, taken, plan.slices, self._is_staged)
            plan.outcomes.append(outcome)
            if outcome.refused:
                return
            plan.granted.append((record, token))
            advance(record, taken, plan.slices)
            for entry in record.manifest:
                if entry.slice_key in plan.slices:
                    plan.heads[entry.slice_key] = plan.slices[entry.slice_key]
        elif record.kind is JournalKind.LEASED:
            plan.tokens[job_id] = Token((record.data or {}).get("token", ""))
        finish = KIND_STATUS[record.kind]
        self._statuses.move(job_id, finish, self._history_lines)
        if finish not in _LIVE:
            plan.tokens[job_id] = None
        plan.records.append((record, start or finish))

    def _is_staged(self, job_id: int) -> bool:
        return self._statuses.get(job_id) is JobStatus.STAGED

    def _slice_heads(self, keys: list[str]) -> dict[str, SliceHead]:
        if not keys:
            return {}
        rows = self._connection.execute(
            "SELECT slice_key, order_version_seq, order_manifest_id, order_generation, "
            "output_key, job_id FROM cf_slice WHERE slice_key IN (SELECT unnest($1::VARCHAR[]))",
            [keys],
        ).fetchall()
        return {
            key: SliceHead((seq, manifest_id, generation), output_key, job_id)
            for key, seq, manifest_id, generation, output_key, job_id in rows
        }

    def _write(self, plan: _Planned) -> None:
        connection = self._connection
        shapes.QUEUE.insert(connection, [shapes.queue_row(item) for item in plan.new_jobs])
        self._mark_replayed(plan)
        if plan.granted:
            self._write_outputs(plan)
        first = self._seq + 1
        rows = [
            (seq, r.job_id, r.kind, r.attempt, r.at_us, encode_data(r.data))
            for seq, (r, _) in enumerate(plan.records, first)
        ]
        self._seq += len(rows)
        shapes.JOURNAL.insert(connection, rows)
        if not rows:
            self._mark_transaction()
        self._write_dead_letters(plan)
        self._write_health(plan)
        logs = [(r.job_id, r.attempt, r.log) for r, _ in plan.records if r.log]
        shapes.LOG.insert(connection, logs)

    def _write_outputs(self, plan: _Planned) -> None:
        rows = [row for record, token in plan.granted for row in shapes.output_rows(record, token)]
        try:
            shapes.OUTPUT.insert(self._connection, rows)
        except duckdb.ConstraintException:
            # Rare: a key is taken. DuckDB has given the transaction up, so it begins again
            # with the taken keys known; looking them up before every insert costs more.
            self._connection.execute("ROLLBACK")
            taken = self._taken_keys([row[0] for row in rows])
            if not taken:
                raise
            raise _OutputTakenError(taken) from None
        if plan.heads:
            keys = list(plan.heads)
            self._connection.execute(
                "DELETE FROM cf_slice WHERE slice_key IN (SELECT unnest($1::VARCHAR[]))", [keys]
            )
            heads = [
                (key, *head.order_no, head.output_key, head.job_id)
                for key, head in plan.heads.items()
            ]
            shapes.SLICE.insert(self._connection, heads)

    def _taken_keys(self, keys: list[str]) -> set[str]:
        rows = self._connection.execute(
            "SELECT output_key FROM cf_output WHERE output_key IN (SELECT unnest($1::VARCHAR[]))",
            [keys],
        ).fetchall()
        return {row[0] for row in rows}

    def _mark_replayed(self, plan: _Planned) -> None:
        for item in plan.new_jobs:
            if item.job.retry_of:
                self._connection.execute(
                    "UPDATE cf_dead_letter SET replayed_as = $1 WHERE original_job_id = $2",
                    [item.job.job_id, item.job.retry_of],
                )

    def _write_dead_letters(self, plan: _Planned) -> None:
        for record, start in plan.records:
            data = record.data or {}
            if record.kind is not JournalKind.FAILED:
                continue
            if start is JobStatus.STAGED:
                # Given up by an operator: its slice may be written again.
                self._connection.execute("DELETE FROM cf_slice WHERE job_id = $1", [record.job_id])
            if data.get("dead_letter"):
                pending = self._pending.get(record.job_id)
                retries = data.get("retry_count", pending.retry_count if pending else None)
                self._connection.execute(
                    f"""
                    INSERT INTO cf_dead_letter
                    SELECT id, file_version_id, plugin_name, $2, $3, coalesce($4, retry_count),
                           make_timestamp($5), NULL
                    FROM {_QUEUE} WHERE id = $1
                    """,
                    [
                        record.job_id,
                        str(data.get("reason", "")),
                        data.get("message"),
                        retries,
                        record.at_us,
                    ],
                )

    def _write_health(self, plan: _Planned) -> None:
        for item in plan.health.values():
            health = item.health
            self._connection.execute(
                "INSERT OR REPLACE INTO cf_plugin_health VALUES ($1, $2, $3, $4, "
                "make_timestamp($5))",
                [
                    health.plugin,
                    health.consecutive_failures,
                    health.paused,
                    health.reason,
                    item.at_us,
                ],
            )

    def _remember(self, plan: _Planned) -> None:
        for record, start in plan.records:
            fold_into(self._pending, record, start)
        self._unfolded += len(plan.records)
        for job_id, token in plan.tokens.items():
            if token is None:
                self._tokens.pop(job_id, None)
            else:
                self._tokens[job_id] = token

    # -- folding and checkpoints --------------------------------------------------------------

    @property
    def history_end(self) -> int:
        """Sequence number of the newest commit."""
        with self._lock:
            return self._seq

    @property
    def fold_due(self) -> bool:
        """Whether so much is unfolded that a fold should not wait for an idle moment."""
        return self._unfolded >= FOLD_ENTRIES

    def fold(self) -> int:
        """Bring cf_processing_queue up to date with the journal.

        Returns:
            How many jobs changed.

        Raises:
            InvalidTransitionError: table and journal disagree; nothing is changed.
            LedgerUnavailableError: it could not be written; to be repeated.
        """
        with self._lock:
            if not self._pending or self._in_transaction:
                return 0
            self._require_usable()
            changes = list(self._pending.values())
            try:
                self._begin()
                folding.project(self._connection, changes)
                self._connection.execute(
                    "UPDATE cf_meta SET value = $1 WHERE key = 'folded_seq'", [str(self._seq)]
                )
                self._end()
            except BaseException as error:  # noqa: BLE001 - _fail raises it again
                self._fail(error)
            self._folded_seq = self._seq
            self._pending = {}
            self._unfolded = 0
            return len(changes)

    def idle(self) -> None:
        """Use a quiet moment: fold, and checkpoint if the write-ahead log has grown."""
        with self._lock:
            self.fold()
            if self._wal_size() > IDLE_CHECKPOINT_BYTES:
                self._checkpoint()

    def _checkpoint(self) -> None:
        if self.path is None:
            return
        try:
            self._connection.execute("CHECKPOINT")
        except duckdb.Error as error:
            if not isinstance(error, duckdb.TransactionException):
                self._fail(error)
            # A reader has a transaction open; the next idle moment will do.
            log.debug("checkpoint put off: %s", error)
            return
        # DuckDB unlinks and recreates the log without syncing the folder.
        opening.sync_directory(self.path)
        self._wal_bytes = self._wal_size()

    def _wal_size(self) -> int:
        if self.path is None:
            return 0
        try:
            return opening.wal_path(self.path).stat().st_size
        except FileNotFoundError:
            return 0

    # -- other transactions and reads ---------------------------------------------------------

    @contextmanager
    def transaction(self, *, folded: bool = True) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection inside BEGIN … COMMIT, for everything that is not a job's journal.

        Ids come from `next_id`; jobs may be inserted as QUEUED under `new_job_ids`, their status
        may only be changed by records. Whatever is raised inside rolls back, ids included.

        Args:
            folded: whether the tables are brought up to date first; what neither reads nor
                changes jobs that exist can do without.

        Raises:
            LedgerUnavailableError: the commit failed; nothing is changed.
        """
        with self._lock:
            self._require_usable()
            require(not self._in_transaction, "a transaction within a transaction")
            if folded:
                self.fold()
            seq = self._seq
            try:
                self._begin()
                self._in_transaction = True
                yield self._connection
                self._mark_transaction()
                self._end()
            except BaseException as error:  # noqa: BLE001 - _fail raises it again
                self._counters.rollback()
                self._statuses.rollback()
                self._seq = seq
                self._fail(error)
            finally:
                self._in_transaction = False
            self._counters.commit()
            self._statuses.commit()
            self._acknowledge()

    def enqueue_bulk(self, jobs: pa.Table) -> range:
        """Insert many QUEUED jobs in one transaction; returns their ids, in the table's order.

        Args:
            jobs: columns plugin_name and file_version_id, and any of priority, generation,
                config_overrides, plugin_manifest_id, retry_of.

        Raises:
            UsageError: a column is missing or unknown.
            LedgerUnavailableError: nothing is inserted.
        """
        names = list(jobs.column_names)
        wrong = sorted({"plugin_name", "file_version_id"} - set(names)) + sorted(
            set(names) - _BULK_COLUMNS
        )
        if wrong:
            raise UsageError(f"jobs in bulk: column {wrong[0]!r} is missing or unknown")
        listed = ", ".join(names)
        with self.transaction() as connection:
            ids = self.new_job_ids(jobs.num_rows)
            numbered = jobs.append_column("id", pa.array(ids, pa.int64()))  # noqa: F841 - by name
            connection.execute(
                f"INSERT INTO {_QUEUE} (id, {listed}, status, created_at) "
                f"SELECT id, {listed}, 'QUEUED', make_timestamp($1) FROM numbered",
                [self._clock.now().wall_us],
            )
        return ids

    def next_id(self, table: str) -> int:
        """The next id of a table with an id column, for use in the open transaction."""
        return self.next_ids(table, 1)[0]

    def next_ids(self, table: str, count: int) -> range:
        """The next `count` ids of a table, for use in the open transaction."""
        with self._lock:
            return self._counters.take(table, count)

    def new_job_ids(self, count: int) -> range:
        """The next job ids, for rows that the open transaction inserts as QUEUED."""
        with self._lock:
            require(self._in_transaction, "new jobs outside of a transaction")
            ids = self._counters.take(_QUEUE, count)
            self._statuses.add_all(ids, JobStatus.QUEUED)
            return ids

    def keep_ids(self, *tables: str) -> None:
        """Within the open transaction, which may delete rows: never give their ids again."""
        with self._lock:
            require(self._in_transaction, "ids kept outside of a transaction")
            self._counters.keep(self._connection, tables)

    def query(
        self, sql: str, parameters: Sequence[Any] = (), *, folded: bool = True
    ) -> list[dict[str, Any]]:
        """Run one SELECT over up-to-date tables; rows as dicts by column name.

        Args:
            folded: False for what does not depend on what jobs do; a fold takes milliseconds.
        """
        with self._reading(folded=folded):
            cursor = self._connection.execute(sql, list(parameters))
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def read(self, fn: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        """Look something up that does not depend on what jobs do, without a fold."""
        with self._reading(folded=False):
            return fn(self._connection)

    def reader(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own for a reading thread; sees folded state as of each query.

        The caller closes it, and calls `fold` before reading what must be current.
        """
        with self._lock:
            self._require_usable()
            return self._connection.cursor()

    def resync(self) -> None:
        """Take note of rows that another connection of this process has written."""
        with self._lock:
            if self._closed or self.must_reopen or self._in_transaction:
                return
            first_job = self._counters.peek(_QUEUE)
            self._counters.seed(self._connection)
            if self._counters.peek(_QUEUE) > first_job:
                self._fill_statuses(first_job)

    def history(self, job_id: int) -> list[dict[str, Any]]:
        """The job's journal, oldest first: seq, kind, attempt, at (UTC), data (JSON text)."""
        return self.query(
            "SELECT seq, kind, attempt, make_timestamp(at_us) AS at, data "
            "FROM cf_journal WHERE job_id = $1 ORDER BY seq",
            [job_id],
        )

    def unfolded(self, job_id: int) -> Folded | None:
        """What has changed for a job since the last fold; None if nothing has."""
        with self._lock:
            return copy.copy(self._pending.get(job_id))

    def status_of(self, job_id: int) -> JobStatus | None:
        """The job's committed status, also when it is not folded yet; None if there is no job."""
        with self._lock:
            return self._statuses.get(job_id)

    # -- copies and checks ----------------------------------------------------------------------

    def snapshot(self, directory: str | Path) -> Path:
        """Make a consistent copy in `directory`, for `duckdb.connect(path, read_only=True)`.

        The caller deletes it, with the `.wal` beside it. Nothing commits meanwhile.

        Raises:
            LedgerUnavailableError: no space, or no `cp` command.
        """
        with self._lock:
            self.fold()
            self._snapshots += 1
            name = f"{self.ledger_id}-{os.getpid()}-{self._snapshots}.duckdb"
            target = Path(directory).resolve() / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.path is None:
                snapshot.copy_memory(self._connection, target)
            else:
                snapshot.copy_files(self.path, target)
            return target

    def check(self) -> list[str]:
        """Broken rules between tables, one line each; empty when sound."""
        with self._reading():
            return check.violations(self._connection)

    def export_to(self, directory: str | Path) -> dict[str, int]:
        """Write the whole history to a new folder, a Parquet file per table; rows by table.

        Raises:
            ConflictError: the folder is not empty.
            UsageError: there can be no such folder.
            LedgerUnavailableError: it could not be written.
        """
        with self._reading():
            try:
                return exchange.export_tables(self._connection, Path(directory), self.ledger_id)
            except (duckdb.IOException, OSError) as error:
                raise export_error(Path(directory), error) from error

    def import_from(self, directory: str | Path) -> dict[str, Any]:
        """Take over an export into this ledger, which must be new; its id becomes the export's.

        Returns:
            {"tables": rows by table, "left_behind": names of what this schema has no place for}.

        Raises:
            ConflictError: this ledger holds history already.
            NotFoundError, UsageError: there is no export, or it is damaged; nothing is changed.
        """
        with self._lock:
            self._require_usable()
            for table in ("cf_source_root", _QUEUE, "cf_journal", "cf_plugin_manifest"):
                if self._connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():
                    raise ConflictError(
                        f"this ledger holds history already ({table})",
                        hint="Import into a ledger file that does not exist yet.",
                    )
            try:
                self._begin()
                result = exchange.import_tables(self._connection, Path(directory))
                self._connection.execute(
                    """
                    UPDATE cf_meta SET value = (1 + greatest(
                        value::BIGINT, (SELECT coalesce(max(seq), 0) FROM cf_journal)))::VARCHAR
                    WHERE key = 'transaction_seq'
                    """
                )
                self._end()
            except BaseException as error:  # noqa: BLE001 - _fail raises it again
                self._fail(error)
            self._reload()
            if self.path is not None and self._highwater is not None:
                # The sidecar still belongs to the ledger that this one was.
                self._highwater.close()
                sidecar_path(self.path).unlink()
                self._highwater = HighWater(sidecar_path(self.path), self.ledger_id)
                self._highwater.write(self._seq)
            return result

    # -- small helpers ------------------------------------------------------------------------

    def _history_lines(self, job_id: int) -> list[str]:
        return folding.history(self._connection, job_id)

    def _require_usable(self) -> None:
        if self._closed:
            raise InvariantError("the ledger is closed")
        if self.must_reopen:
            raise CommitFailedError(
                "the ledger failed in a way whose outcome is unknown",
                hint="A running Sentinel opens it anew by itself; else repeat the command.",
            )

    def _begin(self) -> None:
        self._connection.execute("BEGIN")

    def _end(self) -> None:
        self._connection.execute("COMMIT")

    def _mark_transaction(self) -> None:
        self._seq += 1
        self._connection.execute(
            "UPDATE cf_meta SET value = $1 WHERE key = 'transaction_seq'", [str(self._seq)]
        )

    def _acknowledge(self) -> None:
        if self._highwater is not None:
            try:
                self._highwater.write(self._seq)
            except OSError as error:
                # The commit stands, but a later loss of it could not be noticed.
                self.must_reopen = True
                raise CommitFailedError(
                    f"the high-water mark cannot be written: {error}",
                    hint="Free space or check the disk; a running Sentinel then goes on by itself.",
                ) from error
        size = self._wal_size()
        if size < self._wal_bytes and self.path is not None:
            opening.sync_directory(self.path)  # DuckDB has checkpointed within the commit
        self._wal_bytes = size

    def _fail(self, error: BaseException) -> NoReturn:
        """Leave the open transaction and raise what the caller shall see."""
        try:
            self._connection.execute("ROLLBACK")
        except duckdb.Error as rollback_error:
            if is_fatal(rollback_error):
                self.must_reopen = True
        if not isinstance(error, duckdb.Error) or isinstance(error, _OWN_FAULTS):
            raise error
        if is_fatal(error):
            self.must_reopen = True
        raise commit_error(error, outcome_unknown=self.must_reopen) from error


_OWN_FAULTS = (
    duckdb.ProgrammingError,
    duckdb.IntegrityError,
    duckdb.DataError,
    duckdb.NotSupportedError,
)
"""Wrong SQL or data: shown as they are, for the disk has nothing to do with them."""


def _not_judged(_: PluginSpec) -> None:
    """The screen of a ledger whose owner hands no plugin to anybody."""


class _OutputTakenError(Exception):
    def __init__(self, keys: set[str]) -> None:
        super().__init__(f"{len(keys)} output keys are taken")
        self.keys = keys


def open_ledger_at(path: Path) -> Ledger | None:
    """The Ledger that this process has open at `path`, if any."""
    with _open_guard:
        holder = _open_paths.get(path.resolve())
    return holder() if holder is not None else None


__all__ = ["Ledger", "open_ledger_at"]
