"""A whole worker as a pod has it: two containers, two users, probes, a drain. Scripted Sentinel."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pod_kit import ROOT, WORKER_USER, Pod, as_container, pod_folder
from scripted_sentinel import ScriptedSentinel
from worker_process import (
    ROWS_PLUGIN,
    SLOW_PLUGIN,
    WorkerProcess,
    dispatch_of,
    plugin_spec,
    wait_until,
    worker_process,
)

from casparian_flow.domain.outputs import SinkSpec
from casparian_flow.protocol import messages as m


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pod_folder() as pod:
        yield pod


def in_worker_container(pod: Pod, command: list[str]) -> list[str]:
    if not ROOT:
        return command
    parts = [pod.folder / part for part in ("output", "scratch", "cache")]
    return as_container(WORKER_USER, command, volumes=parts)


def got(port: int, page: str) -> tuple[int, str]:
    """Status and body; status 0 where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_a_pod_works_tells_its_health_and_drains_when_both_containers_are_asked_to_stop(
    pod: Pod,
) -> None:
    port = free_port()
    people, seconds = pod.folder / "people.csv", pod.folder / "seconds.txt"
    people.write_text("name,n\nAda,1\nGrace,2\n")
    seconds.write_text("3")
    pod.launch(peer=WORKER_USER if ROOT else None)
    with (
        ScriptedSentinel() as sentinel,
        worker_process(
            sentinel.address, pod.folder,
            "--launcher", pod.socket, "--metrics-port", str(port),
            within=lambda command: in_worker_container(pod, command),
            CASPARIAN_LOGGING__FORMAT="json",
            CASPARIAN_WORKER__METRICS_HOST="0.0.0.0",
            CASPARIAN_WORKER__ENVIRONMENTS_READ_ONLY="true",
        ) as process,
    ):  # fmt: skip
        worker = sentinel.wait_for_worker(60)
        report = sentinel.workers[worker].sandbox
        assert report["seccomp"] == report["no_new_privs"] == "applied"
        wait_until(lambda: got(port, "/readyz") == (200, "ok\n"), 30)
        assert got(port, "/healthz") == (200, "ok\n")
        assert "casparian_worker_jobs_received_total" in got(port, "/metrics")[1]
        assert got(port, "/other")[0] == 404

        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN, [SinkSpec("people", "parquet://people")]))
        sentinel.send(worker, 1, dispatch_of(sentinel, 1, people))
        publish(sentinel, worker, 1)
        (rows,) = process.files("people/*.parquet")
        assert pq.read_table(rows).num_rows == 2

        slow = plugin_spec(SLOW_PLUGIN, [SinkSpec("slept", "parquet://slept")], spec_id="slow")
        sentinel.send(worker, 0, slow)
        sentinel.send(worker, 2, dispatch_of(sentinel, 2, seconds, spec_id="slow"))
        sentinel.expect(m.DispatchAck, where=lambda a: a.token == sentinel.token(2))
        for popen in (process.popen, pod.launcher):
            popen.terminate()
        publish(sentinel, worker, 2)
        wait_until(lambda: ended(sentinel, process), 60)
        assert process.popen.returncode == 0
        assert pod.launcher.wait(30) == 0
        lines = [json.loads(line) for line in process.text().splitlines()]
        assert {"time", "level", "logger", "message"} <= lines[0].keys()
        assert any("connected to the Sentinel" in line["message"] for line in lines)


def publish(sentinel: ScriptedSentinel, worker: bytes, job_id: int) -> None:
    token = sentinel.token(job_id)
    stage = sentinel.expect(m.Stage, where=lambda s: s.token == token, timeout_s=60)
    sentinel.send(worker, job_id, m.Grant(stage.token))
    done = sentinel.expect(m.Conclude, where=lambda c: c.token == token, timeout_s=60)
    assert done.status == "SUCCESS", done
    sentinel.send(worker, job_id, m.ConcludeAck([token]))


def ended(sentinel: ScriptedSentinel, process: WorkerProcess) -> bool:
    while sentinel.socket.poll(0):
        sentinel._take()
    return process.popen.poll() is not None


def test_a_pod_that_has_lost_its_sentinel_lives_and_is_not_ready(tmp_path: Path) -> None:
    port = free_port()
    with worker_process(
        "tcp://127.0.0.1:9", tmp_path, "--metrics-port", str(port), name="lonely"
    ) as process:
        wait_until(lambda: got(port, "/healthz")[0] == 200, 60)
        assert got(port, "/readyz") == (503, "no Sentinel answers\n")
        process.terminate()
        assert process.popen.wait(30) == 0
