"""How worker processes begin, end and are succeeded; the Sentinel is scripted."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from scripted_sentinel import ScriptedSentinel
from worker_process import (
    ROWS_PLUGIN,
    SLOW_PLUGIN,
    dispatch_of,
    plugin_spec,
    wait_until,
    worker_process,
)

from casparian_flow.domain.outputs import SinkSpec
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


def test_another_worker_publishes_what_a_killed_one_was_granted_and_deletes_the_rest_when_told(
    sentinel: ScriptedSentinel, tmp_path: Path, people: Path
) -> None:
    with worker_process(sentinel.address, tmp_path) as first:
        worker = sentinel.wait_for_worker()
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [PARQUET, SQLITE]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        granted = sentinel.expect(m.Stage)
        sentinel.send(worker, 2, dispatch_of(sentinel, 2, people))
        garbage = sentinel.expect(m.Stage, where=lambda s: s.token == sentinel.token(2)).token
        root_id = sentinel.workers[worker].root_id
        first.kill()
    with worker_process(sentinel.address, tmp_path, name="w2") as second:
        other = sentinel.wait_for_worker()
        assert sentinel.workers[other].root_id == root_id
        assert sorted(sentinel.expect(m.Stages).tokens) == [granted.token, garbage]
        assert len(second.stages()) == 4
        sentinel.send(other, 1, m.Recover(granted.token, granted.entries))
        assert conclude(sentinel, other, 1).status == "SUCCESS"
        sentinel.send(other, 0, m.Discard([garbage]))
        (parquet,) = second.files("people/*.parquet")
        assert pq.read_table(parquet).num_rows == 2
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
    assert list((tmp_path / "scratch").glob("worker-*")) == []


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


def test_an_output_folder_that_cannot_be_made_is_a_clear_error(
    sentinel: ScriptedSentinel, tmp_path: Path
) -> None:
    (tmp_path / "output").write_text("in the way")
    with worker_process(sentinel.address, tmp_path) as process:
        assert process.popen.wait(20) != 0
        assert "output" in process.text()
        assert "Traceback" not in process.text()
