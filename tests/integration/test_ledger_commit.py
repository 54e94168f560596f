"""The ledger on a real file: folds, failures, snapshots, what is left when a process is killed."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from ledger_kit import (
    ManualClock,
    completed,
    failed,
    granted,
    insert_jobs,
    leased,
    record,
    retried,
    run_to_grant,
    started,
    token_of,
)

from casparian_flow.db import ledger as ledger_module
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import (
    InvalidTransitionError,
    LedgerUnavailableError,
    UsageError,
)
from casparian_flow.domain.ids import JobId
from casparian_flow.domain.jobs import JobStatus, JournalKind
from casparian_flow.domain.records import Limits, NewJob, Record


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.open(tmp_path / "ledger.duckdb", clock=ManualClock())
    made.begin_epoch()
    yield made
    made.close()


def rows(ledger: Ledger) -> list[dict[str, Any]]:
    return ledger.query("SELECT * FROM cf_processing_queue ORDER BY id")


# -- the projection -------------------------------------------------------------------------------


def random_step(ledger: Ledger, job_id: int, attempt: int, rng: random.Random) -> list[Record]:
    """A legal next step of a job, or none."""
    match ledger.status_of(job_id):
        case JobStatus.QUEUED:
            if rng.random() < 0.05:
                return [record(job_id, JournalKind.ABORTED, attempt, reason="cancelled")]
            return [leased(ledger, job_id, attempt + 1)]
        case JobStatus.DISPATCHING:
            if rng.random() < 0.2:
                return [record(job_id, JournalKind.RETURNED, attempt, reason="busy")]
            return [started(job_id, attempt)]
        case JobStatus.RUNNING:
            choice = rng.random()
            if choice < 0.3:
                return [retried(job_id, attempt, attempt)]
            if choice < 0.4:
                return [failed(job_id, attempt)]
            if choice < 0.5:
                return [completed(job_id, attempt)]
            return [granted(job_id, attempt=attempt)]
        case JobStatus.STAGED:
            return [completed(job_id, attempt)]
    return []


def recomputed(ledger: Ledger, job_id: int) -> dict[str, Any]:
    """What the whole journal says of a job, worked out apart from the ledger's own fold."""
    row: dict[str, Any] = {
        "status": "QUEUED",
        "attempt": 0,
        "lease_token": None,
        "retry_count": 0,
        "error_message": None,
        "completion_status": None,
        "quarantine_rows": 0,
        "ended": False,
    }
    statuses = {"LEASED": "DISPATCHING", "STARTED": "RUNNING", "GRANTED": "STAGED"}
    for entry in ledger.history(job_id):
        kind = entry["kind"]
        row["attempt"] = entry["attempt"]
        row["status"] = statuses.get(
            kind, kind if kind not in ("RETURNED", "RETRIED") else "QUEUED"
        )
        if kind == "LEASED":
            row["lease_token"] = token_of(ledger, job_id, entry["attempt"])
        if kind in ("RETURNED", "RETRIED", "FAILED", "ABORTED"):
            row["lease_token"] = None
            texts = {"RETRIED": "too slow", "FAILED": "no such column"}
            row["error_message"] = texts.get(kind)
        if kind == "RETRIED":
            row["retry_count"] = entry["attempt"]
        if kind in ("FAILED", "ABORTED", "COMPLETED"):
            row["ended"] = True
            row["completion_status"] = "SUCCESS" if kind == "COMPLETED" else kind
        if kind == "COMPLETED":
            row["error_message"] = None
            row["quarantine_rows"] = 1
    return row


@pytest.mark.parametrize("scattered", [False, True], ids=["adjacent", "scattered"])
def test_the_table_is_the_fold_of_the_journal(
    ledger: Ledger, scattered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    if scattered:
        monkeypatch.setattr("casparian_flow.db.folding._VECTORS_MAX", 0)
    insert_jobs(ledger, 40)
    attempts = dict.fromkeys(range(1, 41), 0)
    for _ in range(60):
        batch: list[Record] = []
        for job_id in rng.sample(range(1, 41), rng.randrange(1, 40)):
            steps = random_step(ledger, job_id, attempts[job_id], rng)
            if steps and steps[0].kind is JournalKind.LEASED:
                attempts[job_id] += 1
            batch += steps
        ledger.commit(batch)
        if rng.random() < 0.3:
            ledger.fold()
        if rng.random() < 0.05:
            ledger.reopen()
    for row in rows(ledger):
        expected = recomputed(ledger, row["id"])
        assert (row["end_time"] is not None) == expected.pop("ended")
        assert {name: row[name] for name in expected} == expected
    assert ledger.check() == []


def test_a_fold_refuses_a_row_that_was_changed_behind_its_back(ledger: Ledger) -> None:
    insert_jobs(ledger, 3)
    ledger.commit([leased(ledger, 1), leased(ledger, 2)])
    with ledger.reader() as other:
        other.execute("UPDATE cf_processing_queue SET status = 'SKIPPED' WHERE id = 2")
    with pytest.raises(InvalidTransitionError, match="table says SKIPPED") as caught:
        ledger.fold()
    assert caught.value.job_id == 2
    with ledger.reader() as other:
        (one,) = other.execute("SELECT status FROM cf_processing_queue WHERE id = 1").fetchall()
        assert one == ("QUEUED",)
        other.execute("UPDATE cf_processing_queue SET status = 'QUEUED' WHERE id = 2")
    assert ledger.fold() == 2


def test_commits_fold_by_themselves_before_too_much_gathers(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "FOLD_ENTRIES", 4)
    insert_jobs(ledger, 9)
    for job_id in range(1, 10):
        ledger.commit([leased(ledger, job_id)])
    assert ledger.fold_due is False
    with ledger.reader() as other:
        (n,) = other.execute(
            "SELECT count(*) FROM cf_processing_queue WHERE status = 'DISPATCHING'"
        ).fetchone() or (0,)
    assert n == 8


def test_large_and_small_batches_write_the_same(ledger: Ledger) -> None:
    insert_jobs(ledger, 100)
    ledger.commit([leased(ledger, job_id) for job_id in range(1, 51)])
    for job_id in range(51, 101):
        ledger.commit([leased(ledger, job_id)])
    entries = ledger.query("SELECT job_id, kind, attempt, at_us, data FROM cf_journal ORDER BY seq")
    assert [e["job_id"] for e in entries] == list(range(1, 101))
    assert {e["data"].replace(token_of(ledger, e["job_id"]), "T") for e in entries} == {
        '{"token":"T","owner":"aabb","manifest_id":7}'
    }


def test_logs_and_dead_letters_are_kept(ledger: Ledger) -> None:
    (job, *_) = insert_jobs(ledger, 2)
    fatal = failed(1)
    fatal.log = "Traceback …"
    ledger.commit([leased(ledger, 1), started(1), fatal])
    assert ledger.query("SELECT * FROM cf_job_log") == [
        {"job_id": 1, "attempt": 1, "log": "Traceback …"}
    ]
    (letter,) = ledger.query("SELECT * FROM cf_dead_letter")
    assert (letter["plugin_name"], letter["reason"], letter["replayed_as"]) == (
        job.plugin,
        "plugin_error",
        None,
    )
    job.job_id, job.retry_of = JobId(3), JobId(1)
    ledger.commit([NewJob(job)])
    (letter,) = ledger.query("SELECT replayed_as FROM cf_dead_letter")
    assert letter["replayed_as"] == 3


def test_outputs_are_published_or_abandoned_with_their_job(ledger: Ledger) -> None:
    insert_jobs(ledger, 3)
    for job_id in (1, 2, 3):
        run_to_grant(ledger, job_id)
    ledger.commit([completed(1), failed(2)])
    states = ledger.query("SELECT job_id, state FROM cf_output ORDER BY job_id")
    assert [s["state"] for s in states] == ["PUBLISHED", "ABANDONED", "GRANTED"]
    assert ledger.check() == []


# -- transactions, ids, bulk ----------------------------------------------------------------------


def test_a_failed_transaction_gives_its_ids_back(ledger: Ledger) -> None:
    def fail_halfway() -> None:
        with ledger.transaction() as connection:
            assert ledger.next_id("cf_source_root") == 1
            connection.execute("INSERT INTO cf_source_root (id, path) VALUES (1, '/a')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert ledger.query("SELECT * FROM cf_source_root") == []
    assert ledger.next_id("cf_source_root") == 1


def test_ids_go_on_after_a_restart(ledger: Ledger) -> None:
    insert_jobs(ledger, 3)
    ledger.reopen()
    assert insert_jobs(ledger, 1)[0].job_id == 4


def test_bulk_jobs_are_ordinary_jobs(ledger: Ledger) -> None:
    (first,) = insert_jobs(ledger, 1)
    jobs = pa.table(
        {
            "plugin_name": ["p"] * 5,
            "file_version_id": pa.array([first.version_id] * 5, pa.int64()),
            "priority": pa.array([9, 8, 7, 6, 5], pa.int32()),
        }
    )
    assert ledger.enqueue_bulk(jobs) == range(2, 7)
    ledger.commit([leased(ledger, 4)])
    assert [j.job_id for j in ledger.load(9).queued] == [1, 2, 3, 5, 6]
    with pytest.raises(UsageError, match="colour"):
        ledger.enqueue_bulk(jobs.append_column("colour", pa.array(["red"] * 5)))


def test_queries_see_what_was_just_committed(ledger: Ledger) -> None:
    insert_jobs(ledger, 1)
    ledger.commit([leased(ledger, 1)])
    assert rows(ledger)[0]["status"] == "DISPATCHING"
    with ledger.transaction():
        assert ledger.query("SELECT status FROM cf_processing_queue") == [{"status": "DISPATCHING"}]


def test_plugin_specs_carry_their_wiring(ledger: Ledger) -> None:
    with ledger.transaction() as connection:
        connection.execute(
            """
            INSERT INTO cf_plugin_manifest (id, plugin_name, version, source_code, source_hash,
                status, created_at, artifact_hash, env_hash)
            VALUES (1, 'p', '1.0', 'old', 'x', 'SUPERSEDED', make_timestamp(0), 'a', NULL),
                   (2, 'p', '2.0', 'code', 'y', 'ACTIVE', make_timestamp(0), 'b', 'lock')
            """
        )
        connection.execute(
            "INSERT INTO cf_plugin_environment (hash, lockfile_content) VALUES ('lock', 'text')"
        )
        connection.execute(
            "INSERT INTO cf_plugin_config (plugin_name, default_parameters) "
            """VALUES ('p', '{"b": 1, "a": 2}')"""
        )
        connection.execute(
            """
            INSERT INTO cf_topic_config (id, plugin_name, topic_name, uri, mode, quarantine_allow)
            VALUES (1, 'p', 't', E'parquet://t\\nsqlite:///x.db?mode=error', 'replace', true),
                   (2, 'p', 'u', 'ftp://nowhere', 'append', false)
            """
        )
    (spec,) = ledger.plugin_specs(Limits(timeout_s=5))
    assert (spec.plugin_version, spec.source_code, spec.lockfile) == ("2.0", "code", "text")
    assert spec.parameters_json == '{"a":2,"b":1}'
    assert [(s.topic, s.uri, s.mode) for s in spec.sinks] == [
        ("t", "parquet://t", "replace"),
        ("t", "sqlite:///x.db?mode=error", "error"),
        ("u", "ftp://nowhere", "append"),
    ]
    assert spec.sinks[0].quarantine.allow
    assert ledger.plugin_specs(Limits(timeout_s=5)) == [spec]
    assert ledger.plugin_specs(Limits(timeout_s=6))[0].spec_id != spec.spec_id


def test_a_job_with_unreadable_overrides_never_writes_to_the_default_sinks(ledger: Ledger) -> None:
    insert_jobs(ledger, 2)
    with ledger.transaction() as connection:
        connection.execute(
            "UPDATE cf_processing_queue SET config_overrides = "
            """CASE id WHEN 1 THEN '{"t": ["csv://a", {"uri": "csv://b"}]}' ELSE '{"t"' END"""
        )
    good, bad = ledger.load(5).queued
    assert [(s.topic, s.uri) for s in good.overrides or ()] == [("t", "csv://a"), ("t", "csv://b")]
    assert [s.uri for s in bad.overrides or ()] == ["invalid://config_overrides"]


# -- failures -------------------------------------------------------------------------------------


class Failing:
    """A connection that fails at a statement, as DuckDB does."""

    def __init__(self, real: duckdb.DuckDBPyConnection, at: str, error: duckdb.Error) -> None:
        self._real, self._at, self._error = real, at, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql.startswith(self._at):
            raise self._error
        return self._real.execute(sql, *arguments)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('IO Error: Could not write file "x": No space left on device', "disk is full"),
        ('IO Error: Could not write file "x": Read-only file system', "read-only"),
        ('IO Error: Could not write file "x": Input/output error', "I/O error"),
        ('IO Error: Could not write file "x": File too large', "may not grow"),
    ],
)
def test_a_failed_commit_changes_nothing_and_names_its_cause(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, text: str, cause: str
) -> None:
    insert_jobs(ledger, 1)
    broken = Failing(ledger._connection, "COMMIT", duckdb.IOException(text))
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_connection", broken)
        with pytest.raises(LedgerUnavailableError, match=cause) as caught:
            ledger.commit([leased(ledger, 1)])
    assert caught.value.hint
    assert not ledger.must_reopen
    assert ledger.status_of(1) is JobStatus.QUEUED
    ledger.recover()
    ledger.commit([leased(ledger, 1)])
    assert [e["seq"] for e in ledger.history(1)] == [3]


def test_after_an_fsync_error_the_ledger_insists_on_being_reopened(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert_jobs(ledger, 1)
    error = duckdb.FatalException('FATAL Error: fsync failed for "x": Input/output error')
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_connection", Failing(ledger._connection, "COMMIT", error))
        with pytest.raises(LedgerUnavailableError, match="unknown"):
            ledger.commit([leased(ledger, 1)])
    assert ledger.must_reopen
    for use in (ledger.begin_epoch, lambda: ledger.commit([leased(ledger, 1)])):
        with pytest.raises(LedgerUnavailableError, match="unknown"):
            use()
    ledger.recover()
    assert not ledger.must_reopen
    ledger.commit([leased(ledger, 1)])


FILE_LIMIT = """
import resource, signal, sys
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import LedgerUnavailableError
from ledger_kit import ManualClock, insert_jobs, leased, record
from casparian_flow.domain.jobs import JournalKind
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger.open(sys.argv[1], clock=ManualClock())
ledger.begin_epoch()
insert_jobs(ledger, 50)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
wal = ledger.path.with_name(ledger.path.name + ".wal").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (wal + 20_000, hard))
done = 0
try:
    for job_id in range(1, 51):
        big = leased(ledger, job_id)
        big.data["padding"] = "x" * 2_000
        ledger.commit([big])
        done = job_id
except LedgerUnavailableError as error:
    print(error)
assert 0 < done < 50, done
assert ledger.status_of(done + 1).value == "QUEUED"
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
ledger.recover()
ledger.commit([leased(ledger, done + 1)])
assert ledger.check() == []
ledger.close()
print(done + 1)
"""


def test_a_full_disk_fails_the_commit_and_the_next_one_works_when_there_is_space(
    tmp_path: Path,
) -> None:
    path = tmp_path / "full.duckdb"
    done = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    message, last = done.stdout.strip().splitlines()
    assert "may not grow" in message
    with Ledger.open(path, clock=ManualClock()) as ledger:
        for job_id in range(1, int(last) + 1):
            assert ledger.status_of(job_id) is JobStatus.DISPATCHING
        assert ledger.status_of(int(last) + 1) is JobStatus.QUEUED


# -- copies ---------------------------------------------------------------------------------------


def test_a_snapshot_is_whole_and_does_not_move(ledger: Ledger, tmp_path: Path) -> None:
    insert_jobs(ledger, 5)
    ledger.commit([leased(ledger, 1)])
    path = ledger.snapshot(tmp_path / "snapshots")
    ledger.commit([leased(ledger, 2)])
    with duckdb.connect(str(path), read_only=True) as copy:
        assert copy.execute(
            "SELECT id FROM cf_processing_queue WHERE status = 'DISPATCHING'"
        ).fetchall() == [(1,)]
        with pytest.raises(duckdb.InvalidInputException):
            copy.execute("DELETE FROM cf_journal")


def test_a_ledger_in_memory_makes_snapshots_too(tmp_path: Path) -> None:
    with Ledger.in_memory(clock=ManualClock()) as ledger:
        insert_jobs(ledger, 5)
        path = ledger.snapshot(tmp_path)
    with duckdb.connect(str(path), read_only=True) as copy:
        assert copy.execute("SELECT count(*) FROM cf_processing_queue").fetchone() == (5,)


def test_readers_in_other_threads_do_not_disturb_commits(ledger: Ledger) -> None:
    insert_jobs(ledger, 200)
    stop = threading.Event()
    problems: list[duckdb.Error] = []

    def read() -> None:
        try:
            with ledger.reader() as connection:
                while not stop.is_set():
                    connection.execute(
                        "SELECT status, count(*) FROM cf_processing_queue GROUP BY 1"
                    )
                    connection.fetchall()
        except duckdb.Error as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for job_id in range(1, 101):
        ledger.commit([leased(ledger, job_id), started(job_id)])
        if job_id % 10 == 0:
            ledger.idle()
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert ledger.check() == []


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            "UPDATE cf_file_location SET current_version_id = 99 WHERE id = 1",
            "points to version 99",
        ),
        ("DELETE FROM cf_file_version WHERE id = 1", "job 1 is for version 1"),
        ("UPDATE cf_processing_queue SET status = 'RUNNING' WHERE id = 2", "has no journal"),
        ("UPDATE cf_output SET state = 'PUBLISHED'", "is PUBLISHED, but its job 1 is STAGED"),
        ("DELETE FROM cf_output", "job 1 is STAGED without outputs"),
        ("DELETE FROM cf_file_hash_registry", "is not in the registry"),
        ("INSERT INTO cf_journal VALUES (99, 77, 'LEASED', 1, 1, NULL)", "tells of job 77"),
    ],
)
def test_check_finds_what_does_not_fit_together(ledger: Ledger, damage: str, line: str) -> None:
    insert_jobs(ledger, 2)
    run_to_grant(ledger, 1)
    assert ledger.check() == []
    with ledger.transaction() as connection:
        connection.execute(damage)
    assert any(line in found for found in ledger.check())
