"""The snippets of the project's first documentation, run as they are printed there."""

import re
import shutil
import signal
import subprocess
import sys
import tomllib

import duckdb
import pytest
from acceptance_kit import REPOSITORY, SNIPPETS, Flow, make_flow, wait_for

WORKFLOW = SNIPPETS / "workflow"
UV = str(REPOSITORY / ".venv" / "bin" / "uv")


@pytest.fixture
def wired(flow: Flow) -> Flow:
    """The printed plugin is deployed; one printed file is there."""
    flow.run("source", "add", "inbox")
    flow.publish("sales", (WORKFLOW / "plugin.py").read_text())
    flow.write("inbox/data/finance.csv", "account,amount\ncash,1\n")
    return flow


def snippet(flow: Flow, name: str) -> str:
    """Run a printed Python snippet as a script; returns its output."""
    shutil.copy(WORKFLOW / name, flow.folder / name)
    return flow.run_command([sys.executable, name]).stdout


def second_version(flow: Flow) -> None:
    flow.write("inbox/data/finance.csv", "account,amount\ncash,1\nbank,2\n")


VERSION_LINE = re.compile(r"Version (\d+): Hash=([0-9a-f]{8})\.\.\., Detected=\d{4}-\d\d-\d\d")


def test_scout_versions_and_timeline_run_as_printed_without_a_sentinel(wired: Flow) -> None:
    snippet(wired, "run_scout.py")
    assert len(wired.json("jobs", "--status", "QUEUED")) == 1
    second_version(wired)
    snippet(wired, "run_scout.py")
    found = VERSION_LINE.findall(snippet(wired, "versions.py"))
    assert len(found) == 2
    assert found[0][1] != found[1][1]
    timeline = wired.run("sql", (WORKFLOW / "timeline.sql").read_text(), "-o", "csv").stdout
    assert [line.split(",")[0] for line in timeline.splitlines()[1:]] == ["data/finance.csv"] * 2
    assert [line.rsplit(",", 1)[1] for line in timeline.splitlines()[1:]] == ["1", "1"]


def test_scout_versions_and_timeline_run_as_printed_while_start_runs(wired: Flow) -> None:
    with wired.start():
        snippet(wired, "run_scout.py")
        wait_for("the first version to be done", lambda: wired.counts().get("COMPLETED") == 1)
        second_version(wired)
        wait_for("the second version to be done", lambda: wired.counts().get("COMPLETED") == 2)
        snippet(wired, "run_scout.py")
        assert len(VERSION_LINE.findall(snippet(wired, "versions.py"))) == 2
        timeline = wired.run("sql", (WORKFLOW / "timeline.sql").read_text(), "-o", "csv").stdout
        assert timeline.count("data/finance.csv") == 2


def test_the_timeline_runs_as_printed_through_sqlalchemy(wired: Flow) -> None:
    wired.run("scan")
    script = (
        "from casparian_flow.db.access import get_engine\n"
        "from casparian_flow.config import settings\n"
        "from sqlalchemy import text\n"
        "with get_engine(settings.database).connect() as connection:\n"
        f"    print(connection.execute(text({(WORKFLOW / 'timeline.sql').read_text()!r})).all())\n"
    )
    assert "data/finance.csv" in wired.run_command([sys.executable, "-c", script]).stdout


def test_the_printed_plugin_writes_what_it_read(wired: Flow) -> None:
    wired.work_off()
    rows = wired.table("sales_data").to_pylist()
    assert [(row["account"], row["amount"]) for row in rows] == [("cash", 1)]


def test_the_printed_logging_shows_debug_messages(wired: Flow) -> None:
    script = (WORKFLOW / "debug_logging.py").read_text() + (WORKFLOW / "run_scout.py").read_text()
    done = wired.run_command([sys.executable, "-c", script])
    assert "DEBUG:" in done.stderr


def test_the_printed_configuration_makes_a_duckdb_file_of_that_name(flow: Flow) -> None:
    printed = (WORKFLOW / "global_config.toml").read_text()
    assert tomllib.loads(printed)["database"]["db_location"] == "casparian_flow.sqlite3"
    flow.write("global_config.toml", printed)
    flow.environment["CASPARIAN_SENTINEL__BIND_ADDRESS"] = f"tcp://127.0.0.1:{flow.port}"
    flow.run("source", "add", "inbox")
    said = flow.work_off()
    assert "stopped" in said
    with duckdb.connect(str(flow.folder / "casparian_flow.sqlite3"), read_only=True) as ledger:
        assert ledger.execute("SELECT count(*) FROM cf_source_root").fetchall() == [(1,)]


def test_making_that_file_is_logged(flow: Flow) -> None:
    flow.write("global_config.toml", (WORKFLOW / "global_config.toml").read_text())
    done = flow.run("--debug", "jobs")
    assert "casparian_flow.sqlite3" in done.stderr
    assert "DuckDB" in done.stderr


def test_a_real_sqlite_file_of_that_name_is_refused_and_left_alone(flow: Flow) -> None:
    import sqlite3

    flow.write("global_config.toml", (WORKFLOW / "global_config.toml").read_text())
    file = flow.folder / "casparian_flow.sqlite3"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE mine (a)")
    database.close()
    before = file.read_bytes()
    for words in (["jobs"], ["start", "--bind", f"tcp://127.0.0.1:{flow.port}"]):
        done = flow.run(*words, code=6)
        assert "SQLite" in done.stderr
        assert "hint: " in done.stderr
    assert file.read_bytes() == before


def test_uv_run_starts_sentinel_and_worker_as_printed(wired: Flow) -> None:
    """`uv run -m …` in the project's folder; only the port differs from the printed one."""
    wired.environment |= {
        "CASPARIAN_CONFIG": str(wired.folder / "global_config.toml"),
        "UV_FROZEN": "1",
    }
    address = f"tcp://localhost:{wired.port}"
    main = [UV, "run", "-m", "casparian_flow.main"]
    client = [UV, "run", "-m", "casparian_flow.engine.worker_client", "--connect", address]
    with (
        wired.background(main, cwd=REPOSITORY) as sentinel,
        wired.background(client, cwd=REPOSITORY) as worker,
    ):
        wait_for("the worker", lambda: wired.run("workers", code=None).stdout.count("IDLE"))
        wired.run("scan")
        wait_for("the job", lambda: wired.counts() == {"COMPLETED": 1})
        assert worker.finish(signal.SIGINT) == 0, worker.output
        assert sentinel.finish(signal.SIGINT) == 0, sentinel.output


def test_the_sentinels_block_written_in_python_blocks_until_stopped(flow: Flow) -> None:
    """`let config = SentinelConfig { bind_address: …, .. }; Sentinel::new(config)?.run()?;`"""
    script = (
        "from casparian_flow.sentinel import Sentinel, SentinelConfig\n"
        "config = SentinelConfig(\n"
        f'    bind_address="tcp://127.0.0.1:{flow.port}",\n'
        ")\n"
        "sentinel = Sentinel(config)\n"
        "sentinel.run()  # Blocks, handling worker messages\n"
        "print('stopped')\n"
    )
    with flow.background([sys.executable, "-c", script]) as sentinel:
        wait_for("the Sentinel", lambda: flow.json("status")["sentinel"])
        assert sentinel.finish(signal.SIGTERM) == 0, sentinel.output
        assert sentinel.output.rstrip().endswith("stopped")


def test_the_job_queues_block_written_in_python() -> None:
    """`JobQueue::new(conn)`, `init`, `enqueue(&JobDetails { … })`, `dequeue`."""
    from casparian_flow.db.job_queue import DbConnection
    from casparian_flow.sentinel import JobDetails, JobQueue

    conn = DbConnection.open_duckdb_memory()
    queue = JobQueue(conn)
    queue.init()

    # Enqueue a job
    job_id = queue.enqueue(
        JobDetails(
            plugin_name="my_parser",
        )
    )

    # Dequeue next job
    job = queue.dequeue()

    assert job is not None
    assert job.job_id == job_id
    assert queue.dequeue() is None


def test_a_fresh_folder_without_any_file_works_with_defaults(flow: Flow) -> None:
    (flow.folder / "global_config.toml").unlink()
    flow.run("source", "add", "inbox")
    assert (flow.folder / "casparian_flow.duckdb").exists()
    done = flow.run("start", "--exit-when-idle", "-v", "--bind", f"tcp://127.0.0.1:{flow.port}")
    assert "every setting has its default" in done.stderr


def test_the_quick_start_of_the_readme_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its shell lines, in order; only the port is another."""
    readme = (REPOSITORY / "README.md").read_text()
    section = readme[readme.index("## Five minutes by hand") :]
    commands = section[section.index("```sh\n") + 6 : section.index("\n```\n")]
    flow = make_flow(tmp_path_factory.mktemp("readme"))
    (flow.folder / "global_config.toml").unlink()
    environment = {
        **flow.environment,
        "CASPARIAN_SENTINEL__BIND_ADDRESS": f"tcp://127.0.0.1:{flow.port}",
        "PATH": f"{REPOSITORY / '.venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=flow.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done
    assert "COMPLETED" in done.stdout
    assert len(list((flow.folder / "flow" / "output" / "sales_data").glob("*.parquet"))) == 1
