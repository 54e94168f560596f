"""`casparian start` and the services by themselves: signals, deaths, collisions."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from acceptance_kit import CASPARIAN, PATIENCE_S, SALES, Flow, alive, family, wait_for

SLOW = SALES.replace('print("reading", file_path)', "import time; time.sleep({seconds})")


def prepared(flow: Flow, source: str = SALES, files: int = 1) -> None:
    flow.run("source", "add", "inbox")
    flow.publish("sales", source)
    for number in range(files):
        flow.write(f"inbox/{number}.csv", f"a\n{number}\n")


def services(running_pid: int) -> dict[str, psutil.Process]:
    """The children of `casparian start` by service name."""
    found = {}
    for process in psutil.Process(running_pid).children():
        words = process.cmdline()
        for name in ("sentinel", "worker", "scout"):
            if name in words:
                found[name] = process
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_drains_everything_and_the_exit_code_is_0(flow: Flow, number: int) -> None:
    prepared(flow, SLOW.format(seconds=5))
    with flow.start() as running:
        wait_for("the job to run", lambda: flow.counts().get("RUNNING"))
        members = family(running.process.pid)
        assert running.finish(number) == 0, running.output
        assert alive(members) == []
    assert flow.counts() == {"COMPLETED": 1}
    assert flow.run("ledger", "check").returncode == 0


def test_a_second_ctrl_c_ends_everything_at_once_and_loses_nothing(flow: Flow) -> None:
    prepared(flow, SLOW.format(seconds=15))
    with flow.start() as running:
        wait_for("the job to run", lambda: flow.counts().get("RUNNING"))
        members = family(running.process.pid)
        began = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        running.finish(signal.SIGINT)
        assert time.monotonic() - began < 10
        wait_for("everything to end", lambda: not alive(members))
    flow.publish("sales", SALES, "1.0.1")
    flow.work_off()
    assert flow.counts() == {"COMPLETED": 1}


def test_a_killed_parent_leaves_no_orphan_and_the_work_goes_on_afterwards(flow: Flow) -> None:
    prepared(flow, SLOW.format(seconds=30))
    with flow.start() as running:
        wait_for("the job to run", lambda: flow.counts().get("RUNNING"))
        members = family(running.process.pid)
        assert len(members) >= 5
        running.finish(signal.SIGKILL)
        wait_for("the children to be gone", lambda: not alive(members), 10)
    flow.publish("sales", SALES, "1.0.1")
    flow.work_off()
    assert flow.counts() == {"COMPLETED": 1}
    assert flow.table("sales_data").num_rows == 1


@pytest.mark.parametrize("victim", ["worker", "scout", "sentinel"])
def test_a_service_that_dies_is_reported_and_started_again(flow: Flow, victim: str) -> None:
    prepared(flow, SLOW.format(seconds=0.5), files=4)
    with flow.start() as running:
        wait_for("a job to be done", lambda: flow.counts().get("COMPLETED"))
        services(running.process.pid)[victim].kill()
        wait_for("the report", lambda: "ended by SIGKILL; starting it again" in running.output)
        flow.write("inbox/late.csv", "a\n99\n")
        wait_for(
            "all the work to be done",
            lambda: flow.run("status", code=None).stdout.count("5 completed"),
        )
        assert running.finish() == 0, running.output
    assert sorted(flow.table("sales_data")["a"].to_pylist()) == [0, 1, 2, 3, 99]


def test_exit_when_idle_takes_files_that_were_only_just_written(flow: Flow) -> None:
    prepared(flow, files=5)
    said = flow.work_off("--workers", "2")
    assert flow.counts() == {"COMPLETED": 5}
    assert "5 new versions" in said
    assert "stopped: 5 completed" in said


def test_exit_when_idle_ends_with_1_if_a_job_failed_and_only_then(flow: Flow) -> None:
    prepared(flow, SALES.replace("self.publish", "raise ValueError('no'); self.publish"))
    config = (flow.folder / "global_config.toml").read_text()
    flow.write("global_config.toml", config.replace("[worker]", "max_retries = 1\n\n[worker]"))
    said = flow.work_off(code=1)
    assert "FAILED: sales on 0.csv: plugin_error" in said
    assert "casparian dead-letters" in said
    flow.work_off(code=0)


def test_exit_when_idle_does_not_wait_for_a_paused_plugin(flow: Flow) -> None:
    prepared(flow)
    flow.run("scan")
    flow.run("plugin", "pause", "sales")
    said = flow.work_off(code=1)
    assert "1 job left of paused plugins" in said


def test_the_first_command_says_that_it_makes_a_ledger(flow: Flow) -> None:
    made = f"ledger: making {flow.folder / 'casparian_flow.duckdb'} (DuckDB)"
    assert made in flow.run("jobs").stderr
    assert made not in flow.run("jobs").stderr


@pytest.mark.parametrize("seconds", [0.05, 0.2, 0.6, 1.5])
def test_ctrl_c_at_any_moment_ends_without_a_traceback(flow: Flow, seconds: float) -> None:
    with flow.background([str(CASPARIAN), "start"]) as running:
        time.sleep(seconds)
        members = family(running.process.pid)
        code = running.finish(signal.SIGINT)
        assert "Traceback" not in running.output
        # Before Python runs any code of ours, the signal itself ends the process.
        assert code in {0, 130, -signal.SIGINT}, running.output
        wait_for("everything to end", lambda: not alive(members))


def test_a_second_start_is_refused_and_the_first_goes_on(flow: Flow) -> None:
    with flow.start() as running:
        second = flow.run("start", code=5)
        assert "already runs" in second.stderr
        assert "casparian stop" in second.stderr
        assert running.process.poll() is None


def test_a_taken_port_is_told_with_what_to_do(flow: Flow) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", flow.port))
        taken.listen()
        done = flow.run("start", code=None)
    assert done.returncode not in {0, 130}
    assert done.stderr.count("is in use") == 1, done.stderr
    assert f"{flow.port}" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("hint: "), done.stderr
    assert "Traceback" not in done.stderr


def test_a_ledger_held_by_another_program_is_told_and_left_alone(flow: Flow) -> None:
    flow.run("source", "add", "inbox")
    holder = (
        "import duckdb, time; c = duckdb.connect('casparian_flow.duckdb'); "
        "print('held', flush=True); time.sleep(120)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], cwd=flow.folder, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        done = flow.run("start", code=6, timeout_s=PATIENCE_S)
        assert str(other.pid) in done.stderr
        assert "Traceback" not in done.stderr
        assert flow.run("jobs", code=6).stderr.startswith("error: ")
        other.kill()


def test_stop_ends_what_start_runs(flow: Flow) -> None:
    with flow.start() as running:
        assert "is stopping" in flow.run("stop").stdout
        assert running.process.wait(timeout=PATIENCE_S) == 0, running.output
    assert "no Sentinel answers" in flow.run("stop", code=7).stderr


def test_start_says_little_and_without_colours_where_nobody_watches(flow: Flow) -> None:
    prepared(flow, files=3)
    said = flow.work_off()
    assert "\x1b" not in said
    assert len(said.splitlines()) < 15, said


def test_start_shows_a_bar_on_a_terminal(flow: Flow) -> None:
    prepared(flow, files=3)
    leader, follower = os.openpty()
    environment = {**flow.environment, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [str(CASPARIAN), "start", "--exit-when-idle", "--timeout", "60"],
        cwd=flow.folder,
        env=environment,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    ) as process:
        os.close(follower)
        screen = b""
        while True:
            try:
                chunk = os.read(leader, 65_536)
            except OSError:  # the terminal is closed at the other end
                break
            if not chunk:
                break
            screen += chunk
        os.close(leader)
    assert process.returncode == 0
    assert b"3/3" in screen
    assert "━".encode() in screen


def test_the_services_run_by_themselves_as_modules_too(flow: Flow) -> None:
    prepared(flow, files=2)
    address = f"tcp://localhost:{flow.port}"
    worker = [sys.executable, "-m", "casparian_flow.engine.worker_client", "--connect", address]
    with (
        flow.background(worker) as early,
        flow.background([sys.executable, "-m", "casparian_flow.main"]) as sentinel,
    ):
        wait_for("the worker", lambda: flow.run("workers", code=None).stdout.count("IDLE"))
        flow.run("scan")
        wait_for("the jobs", lambda: flow.counts() == {"COMPLETED": 2})
        assert early.process.poll() is None
        assert early.finish(signal.SIGTERM) == 0, early.output
        assert sentinel.finish(signal.SIGTERM) == 0, sentinel.output
    assert flow.table("sales_data").num_rows == 2


def test_casparian_worker_joins_a_running_start(flow: Flow) -> None:
    with flow.start("--workers", "0"):
        prepared(flow)
        flow.run("scan")
        command = [str(CASPARIAN), "worker", "--worker-id", "extra", "--slots", "1"]
        with flow.background(command) as worker:
            wait_for("the job", lambda: flow.counts() == {"COMPLETED": 1})
            assert [row["worker_id"] for row in flow.json("workers")] == ["extra"]
            assert worker.finish(signal.SIGTERM) == 0, worker.output


def test_metrics_are_served_on_the_asked_port(flow: Flow) -> None:
    from urllib.request import urlopen

    from acceptance_kit import free_port

    port = free_port()
    with (
        flow.start("--metrics-port", str(port)),
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer,
    ):
        text = answer.read().decode()
    assert "casparian_workers_registered_total" in text
