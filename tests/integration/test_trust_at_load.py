"""Trust is asked at every load: by the Sentinel over its ledger, by the worker over its bytes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from publish_kit import Desk
from scripted_sentinel import ScriptedSentinel
from scripted_worker import ScriptedWorker
from signing_kit import signed
from worker_process import ROWS_PLUGIN, dispatch_of, plugin_spec, wait_until, worker_process

from casparian_flow.config import load_settings
from casparian_flow.domain.errors import ConflictError
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel.api import FileFinding, ScanReport
from casparian_flow.sentinel.control import ControlClient, connect
from casparian_flow.sentinel.server import Sentinel, config_of


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@contextmanager
def sentinel_of(desk: Desk) -> Iterator[tuple[Sentinel, ControlClient]]:
    """A Sentinel in a thread, as the folder's configuration describes it, but for its port."""
    config = replace(
        config_of(load_settings(desk.config)),
        bind_address="tcp://127.0.0.1:*",
        drain_s=0.0,
        trials=False,
    )
    sentinel = Sentinel(config)
    thread = threading.Thread(target=sentinel.run)
    thread.start()
    assert sentinel.wait_started(30)
    try:
        with connect(desk.database) as control:
            yield sentinel, control
    finally:
        sentinel.stop()
        thread.join(30)


def state(control: ControlClient) -> tuple[bool, str]:
    (row,) = control.list_plugins()
    return bool(row["paused"]), str(row["pause_reason"])


def add_file(control: ControlClient, folder: Path) -> None:
    root = control.add_source(str(folder))["id"]
    scan_id = control.begin_scan(root)["scan_id"]
    control.commit_chunk(root, scan_id, [FileFinding("a.csv", (1, 2, 3, 4, 5), "a" * 64, 10)])
    control.finish_scan(root, scan_id, [], ScanReport(root, files=1))


def test_a_revoked_key_pauses_its_plugins_at_once_and_they_run_again_when_it_is_trusted(
    desk: Desk,
) -> None:
    with sentinel_of(desk) as (sentinel, control):
        desk.publish()
        trusted = desk.config.read_text()
        desk.run("keys", "revoke", "local", "--reason", "laptop lost", code=0)
        wait_until(lambda: state(control)[0])
        assert "was revoked: laptop lost" in state(control)[1]
        with pytest.raises(ConflictError, match="stays paused"):
            control.resume_plugin("sales")
        add_file(control, desk.folder / "inbox")
        assert any("laptop lost" in c["cause"] for c in control.status()["causes"])
        with ScriptedWorker(sentinel.bind_address) as worker:
            worker.identify()
            assert worker.gets_nothing(m.Dispatch)
            desk.config.write_text(trusted)
            control.reload()
            wait_until(lambda: not state(control)[0])
            assert worker.dispatch().plugin_name == "sales"


def test_what_an_operator_paused_stays_paused_when_trust_returns(desk: Desk) -> None:
    with sentinel_of(desk) as (_, control):
        desk.publish()
        trusted = desk.config.read_text()
        control.pause_plugin("sales", reason="of mine")
        desk.run("keys", "revoke", "local", code=0)
        desk.config.write_text(trusted)
        control.reload()
        assert state(control) == (True, "of mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("source_code = replace(source_code, 'read_csv', 'read_tsv')", "the source does not match"),
        ("version = '1.0.1'", "the version does not match"),
        ("envelope = NULL", "it is not signed"),
        ("artifact_hash = repeat('a', 64)", "the recorded hash does not match"),
        ("manifest_json = manifest_json || ' '", "the manifest does not match"),
    ],
)
def test_a_version_changed_in_the_ledger_does_not_run_and_the_reason_is_shown(
    desk: Desk, change: str, message: str
) -> None:
    with sentinel_of(desk) as (_, control):
        desk.publish()
        add_file(control, desk.folder / "inbox")
    desk.tamper(f"UPDATE cf_plugin_manifest SET {change}")
    with (
        sentinel_of(desk) as (sentinel, control),
        ScriptedWorker(sentinel.bind_address) as worker,
    ):
        worker.identify()
        assert worker.gets_nothing(m.Plugin)
        paused, reason = state(control)
        assert paused
        assert message in reason
    with connect(load_settings(desk.config)) as control:
        # Opened without a Sentinel: nobody judges, so what was judged before stands.
        assert state(control) == (True, reason)
        assert any(reason in cause["cause"] for cause in control.status()["causes"])


def test_a_configuration_that_cannot_be_read_trusts_nobody(desk: Desk) -> None:
    with sentinel_of(desk) as (_, control):
        desk.publish()
        desk.config.write_text("[trust")
        control.reload()
        wait_until(lambda: state(control)[0])
        assert "is not valid TOML" in state(control)[1]


def test_a_library_is_allowed_by_the_configuration_and_listed_in_the_ledger(desk: Desk) -> None:
    desk.write("sales.py", "import dateutil\n" + desk.plugin.read_text())
    assert "import of dateutil" in desk.publish(code=2).err
    text = desk.config.read_text().replace("[trust]", '[trust]\nlibraries = ["dateutil"]')
    desk.config.write_text(text)
    with sentinel_of(desk) as (_, control):
        desk.publish()
        assert not state(control)[0]
    listed = desk.run("sql", "SELECT library_name FROM cf_library_whitelist", "-o", "json").json
    assert {"dateutil", "pandas"} < {row["library_name"] for row in listed}
    desk.config.write_text(text.replace('["dateutil"]', "[]"))
    with sentinel_of(desk) as (_, control):
        assert "import of dateutil" in state(control)[1]


# -- the worker ----------------------------------------------------------------------------------


def spoiled() -> dict[str, tuple[m.Plugin, str]]:
    good = plugin_spec(ROWS_PLUGIN)
    other = signed(ROWS_PLUGIN, "other")
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "source": ({"source_code": good.source_code + " "}, "the source does not match"),
        "lock": ({"lockfile": "version = 1\n"}, "the lock file does not match"),
        "unsigned": ({"envelope": ""}, "it is not signed"),
        "foreign": ({"envelope": other.envelope.decode()}, "the name does not match"),
        "garbage": ({"envelope": "{"}, "malformed"),
    }
    return {
        name: (replace(good, spec_id=f"spec-{name}", **change), message)
        for name, (change, message) in changes.items()
    }


def test_a_worker_runs_nothing_that_its_own_rules_refuse_and_names_what_does_not_match(
    tmp_path: Path,
) -> None:
    people = tmp_path / "people.csv"
    people.write_text("name,n\nAda,1\n")
    with (
        ScriptedSentinel() as sentinel,
        worker_process(sentinel.address, tmp_path) as process,
    ):
        worker = sentinel.wait_for_worker()
        for job_id, (spec, message) in enumerate(spoiled().values(), 1):
            sentinel.send(worker, 0, spec)
            dispatch = dispatch_of(sentinel, job_id, people, spec_id=spec.spec_id)
            sentinel.send(worker, job_id, dispatch)
            token = dispatch.token
            conclusion = sentinel.expect(m.Conclude, where=lambda c, t=token: c.token == t)
            assert (conclusion.status, conclusion.reason) == ("FAILED", "untrusted")
            assert message in conclusion.error_message
            sentinel.send(worker, job_id, m.ConcludeAck([token]))
        sentinel.send(worker, 0, plugin_spec(ROWS_PLUGIN))
        sentinel.send(worker, 99, dispatch_of(sentinel, 99, people))
        assert sentinel.expect(m.Stage).token == sentinel.token(99)
        assert "trusts nobody" not in process.text()
