"""A real worker process with real plugins and sinks, against a scripted Sentinel."""

import sqlite3
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from scripted_sentinel import LEDGER, ScriptedSentinel
from worker_process import (
    ROWS_PLUGIN,
    SLOW_PLUGIN,
    dispatch_of,
    plugin_spec,
    wait_until,
    worker_process,
)

from casparian_flow.domain.outputs import QuarantinePolicy, SinkMode, SinkSpec
from casparian_flow.domain.records import Limits
from casparian_flow.protocol import messages as m

PARQUET = SinkSpec("people", "parquet://people")
SQLITE = SinkSpec("people", "sqlite://db/people.sqlite3")


@pytest.fixture
def sentinel() -> Iterator[ScriptedSentinel]:
    with ScriptedSentinel() as scripted:
        yield scripted


@pytest.fixture
def people(tmp_path: Path) -> Path:
    path = tmp_path / "people.csv"
    path.write_text("name,n\nAda,1\nGrace,2\n")
    return path


def seconds_file(folder: Path, name: str, seconds: float) -> Path:
    path = folder / name
    path.write_text(str(seconds))
    return path


def finish(sentinel: ScriptedSentinel, worker: bytes, job_id: int) -> m.Conclude:
    """Grant what is staged and acknowledge the conclusion."""
    stage = sentinel.expect(m.Stage, where=lambda s: s.token == sentinel.token(job_id))
    sentinel.send(worker, job_id, m.Grant(stage.token))
    return conclude(sentinel, worker, job_id)


def conclude(sentinel: ScriptedSentinel, worker: bytes, job_id: int) -> m.Conclude:
    token = sentinel.token(job_id)
    conclusion = sentinel.expect(m.Conclude, where=lambda c: c.token == token)
    sentinel.send(worker, job_id, m.ConcludeAck([token]))
    return conclusion


def test_a_file_goes_to_parquet_and_sqlite_with_its_lineage(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET, SQLITE]))
        dispatch = dispatch_of(sentinel, 7, people)
        sentinel.send(worker, 7, dispatch)
        assert sentinel.expect(m.DispatchAck).token == dispatch.token
        stage = sentinel.expect(m.Stage)
        assert [(e.n, e.topic, e.rows) for e in stage.entries] == [
            (0, "people", 2),
            (1, "people", 2),
        ]
        assert process.files("people/*.parquet") == []
        sentinel.send(worker, 7, m.Grant(stage.token))
        conclusion = conclude(sentinel, worker, 7)
        assert (conclusion.status, conclusion.metrics["rows"]) == ("SUCCESS", 4)
        assert "read 2 rows" in conclusion.log
        (parquet,) = process.files("people/*.parquet")
        table = pq.read_table(parquet).to_pylist()
        assert [(r["name"], r["n"]) for r in table] == [("Ada", 1), ("Grace", 2)]
        assert {r["_cf_source_hash"] for r in table} == {dispatch.content_hash}
        assert {r["_cf_job_id"] for r in table} == {f"{LEDGER}-7"}
        assert {r["_cf_parser_version"] for r in table} == {"1.2.3"}
        with sqlite3.connect(process.output / "db" / "people.sqlite3") as db:
            rows = db.execute("SELECT name, n FROM people ORDER BY n").fetchall()
        db.close()
        assert rows == [("Ada", 1), ("Grace", 2)]
        assert process.stages() == []


def test_a_job_without_outputs_concludes_without_a_stage(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    silent = ROWS_PLUGIN.replace('self.publish("people", rows)', "pass")
    with worker_process(sentinel.address, tmp_path):
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(silent))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        conclusion = conclude(sentinel, worker, 1)
        assert conclusion.status == "SUCCESS"
        assert not any(isinstance(message, m.Stage) for _, _, message in sentinel.seen)


def test_a_topic_without_a_sink_goes_to_the_wildcard_or_to_parquet(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [SinkSpec("*", "csv://all")]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        finish(sentinel, worker, 1)
        assert len(process.files("all/people-*.csv")) == 1
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [], spec_id="spec-2"))
        sentinel.send(worker, 2, dispatch_of(sentinel, 2, people, spec_id="spec-2"))
        finish(sentinel, worker, 2)
        assert len(process.files("people/*.parquet")) == 1


def test_a_refused_job_leaves_nothing(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET, SQLITE]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        token = sentinel.expect(m.Stage).token
        assert len(process.stages()) == 2
        sentinel.send(worker, 1, m.Refuse(token, "superseded"))
        wait_until(lambda: process.stages() == [])
        assert process.files("people/*.parquet") == []


def test_an_abort_stops_the_plugin_at_once_and_the_worker_goes_on(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(SLOW_PLUGIN))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, seconds_file(tmp_path, "a", 60)))
        sentinel.expect(m.DispatchAck)
        before = time.monotonic()
        sentinel.send(worker, 1, m.Abort(sentinel.token(1), "cancelled"))
        sentinel.send(worker, 2, dispatch_of(sentinel, 2, seconds_file(tmp_path, "b", 0)))
        assert finish(sentinel, worker, 2).status == "SUCCESS"
        assert time.monotonic() - before < 10
        assert process.stages() == []


def test_another_worker_publishes_what_a_killed_one_had_staged(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as first:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET, SQLITE]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        stage = sentinel.expect(m.Stage)
        root_id = sentinel.workers[worker].root_id
        first.kill()
    with worker_process(sentinel.address, tmp_path, name="w2") as second:
        other = sentinel.wait_for_worker()
        assert sentinel.workers[other].root_id == root_id
        assert len(second.stages()) == 2
        sentinel.send(other, 1, m.Recover(stage.token, stage.entries))
        assert conclude(sentinel, other, 1).status == "SUCCESS"
        (parquet,) = second.files("people/*.parquet")
        assert pq.read_table(parquet).num_rows == 2
        assert second.stages() == []


def test_stages_of_a_killed_worker_are_reported_and_deleted_when_told(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as first:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        token = sentinel.expect(m.Stage).token
        first.kill()
    with worker_process(sentinel.address, tmp_path, name="w2") as second:
        other = sentinel.wait_for_worker()
        assert sentinel.expect(m.Stages).tokens == [token]
        sentinel.send(other, 0, m.Discard([token]))
        wait_until(lambda: second.stages() == [])


def test_a_sentinel_that_comes_back_hears_of_the_stage_again(tmp_path: Path, people: Path) -> None:
    with ScriptedSentinel() as first, worker_process(first.address, tmp_path) as process:
        worker = first.wait_for_worker()
        first.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET]))
        first.send(worker, 1, dispatch_of(first, 1, people))
        token = first.expect(m.Stage).token
        first.close()
        time.sleep(1.0)
        with ScriptedSentinel(first.port, epoch=2) as second:
            worker = second.wait_for_worker()
            assert second.workers[worker].held == [token]
            assert second.expect(m.Stage).token == token
            second.send(worker, 1, m.Grant(token))
            conclusion = second.expect(m.Conclude)
            assert (conclusion.token, conclusion.status) == (token, "SUCCESS")
            second.send(worker, 1, m.ConcludeAck([token]))
            assert len(process.files("people/*.parquet")) == 1


def test_sigterm_lets_the_running_job_end_and_gives_the_others_back(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(SLOW_PLUGIN))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, seconds_file(tmp_path, "a", 1.0)))
        sentinel.expect(m.DispatchAck)
        sentinel.send(worker, 2, dispatch_of(sentinel, 2, seconds_file(tmp_path, "b", 1.0)))
        sentinel.serve(0.2)
        process.terminate()
        rejected = conclude(sentinel, worker, 2)
        assert (rejected.status, rejected.reason) == ("REJECTED", "draining")
        assert finish(sentinel, worker, 1).status == "SUCCESS"
        assert process.popen.wait(10) == 0
        beats = [x for _, _, x in sentinel.seen if isinstance(x, m.Heartbeat)]
        assert beats[-1].status == "DRAINING"
        assert "Traceback" not in process.text()


def test_an_idle_worker_waits_and_ends_with_zero_on_sigterm(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        sentinel.wait_for_worker()
        sentinel.serve(1.0)
        assert process.popen.poll() is None
        process.terminate()
        assert process.popen.wait(10) == 0


def test_a_second_signal_ends_the_worker_at_once_and_its_plugins_with_it(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(SLOW_PLUGIN))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, seconds_file(tmp_path, "a", 60)))
        sentinel.expect(m.DispatchAck)
        plugins = process.plugin_processes()
        process.terminate()
        sentinel.serve(0.5)
        process.terminate()
        assert process.popen.wait(5) != 0
        wait_until(lambda: not any(alive(p) for p in plugins))


def test_kill_minus_nine_leaves_no_plugin_process_behind(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(SLOW_PLUGIN))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, seconds_file(tmp_path, "a", 60)))
        sentinel.expect(m.DispatchAck)
        plugins = process.plugin_processes()
        assert plugins
        process.kill()
        wait_until(lambda: not any(alive(p) for p in plugins))


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_heartbeats_go_on_while_a_plugin_computes(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    busy = ROWS_PLUGIN.replace("print(", "\n        while True: pass\n        print(")
    with worker_process(sentinel.address, tmp_path):
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(busy, limits=Limits(timeout_s=2.0)))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        sentinel.expect(m.DispatchAck)
        seen = len(sentinel.seen)
        sentinel.serve(1.5)
        beats = [x for _, _, x in sentinel.seen[seen:] if isinstance(x, m.Heartbeat)]
        assert len(beats) >= 3
        assert beats[-1] == m.Heartbeat("BUSY", [sentinel.token(1)])
        conclusion = conclude(sentinel, worker, 1)
        assert (conclusion.status, conclusion.reason) == ("FAILED", "timeout")


def test_a_plugin_that_fails_is_told_with_its_log_and_leaves_no_stage(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    failing = ROWS_PLUGIN + '        raise ValueError("no such luck")\n'
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(failing, [PARQUET]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        conclusion = conclude(sentinel, worker, 1)
        assert (conclusion.status, conclusion.reason) == ("FAILED", "plugin_error")
        assert "no such luck" in conclusion.error_message
        assert "read 2 rows" in conclusion.log
        assert process.stages() == []


def test_a_changed_source_is_skipped(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with worker_process(sentinel.address, tmp_path):
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET]))
        changed, missing = dispatch_of(sentinel, 1, people), dispatch_of(sentinel, 2, people)
        people.write_text("name,n\nAda,1\nGrace,3\n")
        sentinel.send(worker, 1, changed)
        skipped = conclude(sentinel, worker, 1)
        assert (skipped.status, skipped.reason) == ("SKIPPED", "source_changed")
        people.unlink()
        sentinel.send(worker, 2, missing)
        skipped = conclude(sentinel, worker, 2)
        assert (skipped.status, skipped.reason) == ("SKIPPED", "source_missing")


CONTRACT = """{"columns": [{"name": "name", "type": "string", "nullable": false},
                           {"name": "n", "type": "int64"}]}"""
GAPS_PLUGIN = ROWS_PLUGIN.replace('"name": r["name"]', '"name": r["name"] or None')


def test_bad_rows_go_to_quarantine_and_make_the_success_partial(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    path = tmp_path / "gaps.csv"
    path.write_text("name,n\nAda,1\n,2\nGrace,3\n")
    sink = SinkSpec(
        "people", "parquet://people", SinkMode.APPEND, CONTRACT, QuarantinePolicy(True, 50.0)
    )
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(GAPS_PLUGIN, [sink]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, path))
        conclusion = finish(sentinel, worker, 1)
        assert conclusion.status == "PARTIAL_SUCCESS"
        assert conclusion.metrics["rows"] == 2
        assert conclusion.metrics["quarantine_rows"] == 1
        (bad,) = process.files("people_quarantine/*.parquet")
        (row,) = pq.read_table(bad).to_pylist()
        assert (row["_source_row"], row["n"]) == (2, "2")


def test_more_bad_rows_than_allowed_fail_the_job_and_nothing_is_written(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    path = tmp_path / "gaps.csv"
    path.write_text("name,n\nAda,1\n,2\n,3\n")
    sink = SinkSpec(
        "people", "parquet://people", SinkMode.APPEND, CONTRACT, QuarantinePolicy(True, 50.0)
    )
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(GAPS_PLUGIN, [sink]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, path))
        conclusion = conclude(sentinel, worker, 1)
        assert (conclusion.status, conclusion.reason) == ("FAILED", "quarantine_limit")
        assert process.stages() == []
        assert process.files("people*/*.parquet") == []


def test_many_small_files_stay_apart_although_several_are_under_way(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    count = 60
    with worker_process(sentinel.address, tmp_path, "--slots", "2") as process:
        worker = sentinel.wait_for_worker()
        jobs: list[tuple[int, m.Message]] = [(0, plugin_spec(ROWS_PLUGIN, [PARQUET]))]
        for job_id in range(1, count + 1):
            path = tmp_path / f"{job_id}.csv"
            path.write_text("name,n\n" + f"p{job_id},{job_id}\n" * job_id)
            jobs.append((job_id, dispatch_of(sentinel, job_id, path)))
        sentinel.send_batch(worker, jobs)
        rows = {}
        while len(rows) < count:
            _, job_id, message = sentinel.next()
            if isinstance(message, m.Stage):
                sentinel.send(worker, job_id, m.Grant(message.token))
            elif isinstance(message, m.Conclude):
                assert message.status == "SUCCESS"
                rows[job_id] = message.metrics["rows"]
                sentinel.send(worker, 0, m.ConcludeAck([message.token]))
        assert rows == {n: n for n in range(1, count + 1)}
        for path in process.files("people/*.parquet"):
            table = pq.read_table(path).to_pylist()
            assert {r["_cf_job_id"] for r in table} == {f"{LEDGER}-{len(table)}"}
            assert {r["n"] for r in table} == {len(table)}
        assert process.stages() == []


def test_metrics_tell_what_the_worker_did(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with ScriptedSentinel() as other:
        port = other.port  # free again once closed
    with worker_process(sentinel.address, tmp_path, "--metrics-port", str(port)):
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        finish(sentinel, worker, 1)
        sentinel.serve(0.3)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        assert lines["casparian_worker_jobs_received_total"] == "1.0"
        assert lines["casparian_worker_jobs_completed_total"] == "1.0"
        assert lines["casparian_worker_bridge_executions_total"] == "1.0"
        assert lines["casparian_worker_parquet_files_written_total"] == "1.0"
        assert lines["casparian_worker_parquet_rows_written_total"] == "2.0"


def test_an_output_folder_that_cannot_be_made_is_a_clear_error(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    (tmp_path / "output").write_text("in the way")
    with worker_process(sentinel.address, tmp_path) as process:
        assert process.popen.wait(20) != 0
        assert "output" in process.text()
        assert "Traceback" not in process.text()


def test_the_worker_leaves_no_scratch_behind(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as process:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        finish(sentinel, worker, 1)
        process.terminate()
        assert process.popen.wait(10) == 0
    assert list((tmp_path / "scratch").glob("worker-*")) == []
