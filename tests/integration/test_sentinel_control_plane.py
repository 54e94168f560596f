"""Every control call on a real ledger: asked of a running Sentinel, and carried out here."""

import hashlib
import inspect
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from scripted_worker import ScriptedWorker, job_of, seed
from signing_kit import lax_rules, rules, signed_bundle

from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.errors import (
    ConflictError,
    LedgerLockedError,
    LedgerUnavailableError,
    NotFoundError,
    SentinelUnreachableError,
    UsageError,
)
from casparian_flow.protocol import messages as m
from casparian_flow.sentinel import control as control_module
from casparian_flow.sentinel.api import ControlApi, FileFinding, ScanReport
from casparian_flow.sentinel.control import ControlClient, RemoteControl, connect
from casparian_flow.sentinel.local import LocalControl
from casparian_flow.sentinel.server import Sentinel, SentinelConfig

PLUGIN = '''
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.csv", topic="sales_data", priority=70, subscriptions=["csv"])


class Handler(BasePlugin):
    def execute(self, file_path):
        """Publishes nothing."""
'''


def running(database: Path, **config: Any) -> Iterator[Sentinel]:
    settings: dict[str, Any] = {
        "bind_address": "tcp://127.0.0.1:*",
        "drain_s": 0.0,
        "trust": lax_rules,
    }
    sentinel = Sentinel(SentinelConfig(database=database, **(settings | config)))
    thread = threading.Thread(target=sentinel.run)
    thread.start()
    assert sentinel.wait_started(20)
    yield sentinel
    sentinel.stop()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "ledger.duckdb"


@pytest.fixture(params=["remote", "local"])
def control(request: pytest.FixtureRequest, database: Path) -> Iterator[ControlClient]:
    """The same calls, by both ways."""
    if request.param == "remote":
        for _ in running(database):
            with connect(database) as client:
                assert isinstance(client, RemoteControl)
                yield client
        return
    with connect(database, trust=rules) as client:
        assert isinstance(client, LocalControl)
        yield client


def finding(name: str, content: str = "x") -> FileFinding:
    digest = hashlib.sha256(content.encode()).hexdigest()
    return FileFinding(name, (1, 2, 3, 4, 5), digest, 10)


def scan(control: ControlApi, root_id: int, *findings: FileFinding) -> int:
    begun = control.begin_scan(root_id)
    result = control.commit_chunk(root_id, begun["scan_id"], findings)
    assert result.conflicts == []
    control.finish_scan(root_id, begun["scan_id"], [], ScanReport(root_id, files=len(findings)))
    return result.jobs


def deploy(control: ControlApi, version: str = "1.0.0", source: str = PLUGIN) -> dict[str, Any]:
    return control.deploy(signed_bundle(source, "sales", version))


def test_a_file_found_after_a_deploy_becomes_a_job(control: ControlClient, tmp_path: Path) -> None:
    deployed = deploy(control)
    assert not deployed["unchanged"]
    root = control.add_source(str(tmp_path), settle_seconds=0.0)
    assert scan(control, root["id"], finding("a.csv"), finding("b.txt")) == 1
    (job,) = control.list_jobs()
    assert (job["plugin_name"], job["rel_path"], job["status"]) == ("sales", "a.csv", "QUEUED")
    assert job["priority"] == 70
    assert control.list_jobs(path="*.csv") == [job]
    assert control.list_jobs(path=f"{tmp_path}/*") == [job]
    assert control.list_jobs(status="FAILED") == []
    assert {f["rel_path"] for f in control.list_files()} == {"a.csv", "b.txt"}
    assert [v["seq"] for v in control.versions(f"{tmp_path}/a.csv")] == [1]
    assert control.inventory(root["id"]).startswith(b"\xff\xff\xff\xff")
    assert control.check() == []


def test_a_plugin_deployed_later_gets_earlier_files_by_backfill(
    control: ControlClient, tmp_path: Path
) -> None:
    root = control.add_source(str(tmp_path))
    assert scan(control, root["id"], finding("a.csv")) == 0
    deploy(control)
    causes = [row["cause"] for row in control.status()["causes"]]
    assert any("plugin sales 1.0.0" in c and "worker" in c for c in causes)
    assert control.backfill("sales", execute=False)["jobs"] == 1
    assert control.list_jobs() == []
    assert control.backfill("sales", execute=True)["jobs"] == 1
    assert control.backfill("sales", execute=True)["jobs"] == 0


def test_wiring_can_be_looked_at_and_changed(control: ControlClient) -> None:
    deploy(control)
    control.set_topic("sales", "sales_data", uri="sqlite:///tmp/x.db", mode="replace")
    (topic,) = control.list_topics()
    assert (topic["uri"], topic["mode"]) == ("sqlite:///tmp/x.db", "replace")
    with pytest.raises(UsageError, match="unknown scheme"):
        control.set_topic("sales", "sales_data", uri="ftp://x")
    rule = control.add_rule("*.tsv", "csv", priority=3)
    assert {r["pattern"] for r in control.list_rules()} == {"*.csv", "*.tsv"}
    control.remove_rule(rule)
    with pytest.raises(NotFoundError):
        control.remove_rule(rule)
    assert deploy(control)["unchanged"]
    with pytest.raises(ConflictError):
        deploy(control, source=PLUGIN + "\n# changed\n")
    assert [p["plugin_name"] for p in control.list_plugins()] == ["sales"]
    control.pause_plugin("sales", reason="why")
    assert control.list_plugins()[0]["paused"]
    control.resume_plugin("sales")
    with pytest.raises(NotFoundError):
        control.pause_plugin("nope", reason="")


def test_a_refused_deploy_is_named_by_status_until_a_good_one_follows(
    control: ControlClient,
) -> None:
    bad = PLUGIN.replace("class Handler", "class Loader")
    for _ in range(2):
        with pytest.raises(UsageError, match="must be named Handler"):
            deploy(control, source=bad)
    (cause,) = [c for c in control.status()["causes"] if "rejected" in c["cause"]]
    assert "plugin sales 1.0.0 was rejected" in cause["cause"]
    assert "must be named Handler" in cause["cause"]
    deploy(control)
    assert not [c for c in control.status()["causes"] if "rejected" in c["cause"]]


def test_a_queued_job_can_be_cancelled_and_retried(control: ControlClient, tmp_path: Path) -> None:
    deploy(control)
    root = control.add_source(str(tmp_path))
    scan(control, root["id"], finding("a.csv"))
    with pytest.raises(ConflictError, match="is QUEUED"):
        control.retry_job(1)
    assert control.cancel_job(1)["outcome"] == "cancelled"
    assert control.cancel_job(1) == {"outcome": "already", "status": "ABORTED"}
    new = control.retry_job(1)
    with pytest.raises(ConflictError, match=f"job {new} retries job 1 already"):
        control.retry_job(1)
    assert control.show_job(new)["retry_of"] == 1
    assert control.cancel_job(new)["outcome"] == "cancelled"
    with pytest.raises(ConflictError, match="not STAGED"):
        control.resolve_job(new, forward=True)


def test_what_is_not_there_is_said(control: ControlClient) -> None:
    for call in (
        lambda: control.show_job(99),
        lambda: control.cancel_job(99),
        lambda: control.retry_job(99),
        lambda: control.resolve_job(99, forward=True),
        lambda: control.job_log(99),
        lambda: control.replay(job_ids=[99]),
        lambda: control.begin_scan(99),
        lambda: control.backfill("nope", execute=True),
        lambda: control.submit(version_id=99, plugin="x", priority=None, force=False),
    ):
        with pytest.raises(NotFoundError) as caught:
            call()
        assert caught.value.hint
    for wrong in (
        lambda: control.show_job(-1),
        lambda: control.show_job(2**63),
        lambda: control.list_jobs(limit=0),
        lambda: control.list_jobs(offset=-1),
        lambda: control.list_jobs(status="DONE"),
        lambda: control.export("relative"),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_a_snapshot_and_an_export_hold_what_is_committed(
    control: ControlClient, tmp_path: Path
) -> None:
    deploy(control)
    path = Path(control.snapshot())
    with duckdb.connect(str(path), read_only=True) as copy:
        assert copy.execute("SELECT plugin_name FROM cf_plugin_manifest").fetchall() == [("sales",)]
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.unlink()
    tables = control.export(str(tmp_path / "out"))["tables"]
    assert tables["cf_plugin_manifest"] == 1


def test_status_of_an_empty_ledger_names_the_first_steps(control: ControlClient) -> None:
    found = control.status()
    assert found["ledger"]["state"] == "ok"
    assert set(found["jobs"].values()) == {0}
    cures = " ".join(row["cure"] for row in found["causes"])
    assert "casparian source add" in cures
    assert "casparian publish" in cures
    assert control.list_workers() == []
    assert control.next_rescans() == []


# -- only one of the two ways ---------------------------------------------------------------------


def test_both_controls_have_exactly_the_interface_s_signatures() -> None:
    for name, method in vars(ControlApi).items():
        if name.startswith("_"):
            continue
        assert inspect.signature(getattr(LocalControl, name)) == inspect.signature(method), name


def test_there_is_no_sentinel_to_stop_in_a_local_control(database: Path) -> None:
    with connect(database) as control:
        assert control.status()["sentinel"] is None
        with pytest.raises(SentinelUnreachableError, match="no Sentinel runs"):
            control.stop()
        assert control.ping()["pid"] == os.getpid()


def test_a_ledger_that_somebody_holds_silently_is_waited_for_then_named(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "START_WAIT_S", 0.3)
    holder = connect(database)
    with pytest.raises(LedgerLockedError):
        connect(database)
    threading.Timer(0.2, holder.close).start()
    monkeypatch.setattr(control_module, "START_WAIT_S", 10.0)
    with connect(database) as control:
        assert control.ping()["ledger_id"]


def test_a_changed_file_is_handed_to_scout_once(database: Path) -> None:
    seed(database)
    for sentinel in running(database):
        with connect(database) as control, ScriptedWorker(sentinel.bind_address) as worker:
            worker.identify()
            worker.conclude(worker.dispatch(), "SKIPPED", reason="source_changed")
            worker.expect(m.ConcludeAck)
            assert control.next_rescans() == [{"root_id": 1, "rel_path": "f0.csv"}]
            assert control.next_rescans() == []
            assert control.show_job(1)["status"] == "SKIPPED"


def test_a_topic_s_new_sink_reaches_workers_with_the_next_job(database: Path) -> None:
    seed(database, files=2)
    for sentinel in running(database):
        with connect(database) as control, ScriptedWorker(sentinel.bind_address) as worker:
            worker.identify()
            first = worker.dispatch()
            control.set_topic("sales", "sales", uri="csv://elsewhere")
            worker.conclude(first)
            second = worker.dispatch()
            assert worker.plugins[first.spec_id].sinks[0].uri == "parquet://sales"
            assert worker.plugins[second.spec_id].sinks[0].uri == "csv://elsewhere"


def test_deploy_and_reload_are_taken_from_the_wire_on_loopback(database: Path) -> None:
    for sentinel in running(database):
        with ScriptedWorker(sentinel.bind_address) as client:
            client.send(m.Deploy(signed_bundle(PLUGIN, "sales")))
            ack = client.expect(m.Ack)
            assert (ack.success, ack.plugin_id) == (True, 1)
            client.send(m.Deploy(signed_bundle("import os", "sales")))
            assert not client.expect(m.Ack).success
            client.send(m.Deploy(b"no bundle"))
            assert "no plugin bundle" in client.expect(m.Ack).message
            client.send(m.Reload())
            assert client.expect(m.Ack).success
        with connect(database) as control:
            assert control.list_plugins()[0]["version"] == "1.0.0"


def test_deploy_from_the_wire_is_refused_where_it_is_not_allowed(database: Path) -> None:
    for sentinel in running(database, wire_deploy=False):
        with ScriptedWorker(sentinel.bind_address) as client:
            client.send(m.Deploy(signed_bundle(PLUGIN, "sales")))
            error = client.expect(m.Err)
            assert (error.code, "control socket" in error.message) == ("refused", True)
        with connect(database) as control:
            assert control.list_plugins() == []


def test_a_failed_commit_stops_admission_and_work_goes_on_afterwards(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that depends on the commit is sent; the workers' repetitions bring it about."""
    seed(database)
    broken = threading.Event()
    commit, begin = Ledger.commit, Ledger.begin_epoch

    def failing_commit(self: Ledger, batch: Any) -> Any:
        if broken.is_set():
            raise LedgerUnavailableError("no space left on device", hint="Free some space.")
        return commit(self, batch)

    def failing_begin(self: Ledger) -> int:
        if broken.is_set():
            raise LedgerUnavailableError("no space left on device", hint="Free some space.")
        return begin(self)

    monkeypatch.setattr(Ledger, "commit", failing_commit)
    monkeypatch.setattr(Ledger, "begin_epoch", failing_begin)
    for sentinel in running(database):
        with connect(database) as control, ScriptedWorker(sentinel.bind_address) as worker:
            worker.identify()
            job = worker.dispatch()
            broken.set()
            worker.stage(job)
            assert worker.gets_nothing(m.Grant)
            found = control.status()
            assert found["ledger"]["state"].startswith("no space left on device")
            assert found["causes"][0]["cure"] == "Free some space."
            with pytest.raises(LedgerUnavailableError):
                control.cancel_job(1)
            broken.clear()
            while True:
                worker.send(m.Heartbeat("BUSY", [job.token]))
                try:
                    assert worker.expect(m.Err, 0.3).code == "unknown_worker"
                    break
                except AssertionError:
                    continue
            worker.identify([job.token])
            worker.stage(job)
            assert worker.expect(m.Grant).token == job.token
            worker.conclude(job)
            worker.expect(m.ConcludeAck)
            assert control.show_job(job_of(job.token))["attempt"] == 1
            assert sentinel.metrics._own["db_errors"] >= 1


def test_a_long_queue_is_read_behind_and_a_deep_job_can_be_cancelled(database: Path) -> None:
    seed(database, files=3000)
    for sentinel in running(database):
        with connect(database) as control, ScriptedWorker(sentinel.bind_address) as worker:
            assert control.cancel_job(3000)["outcome"] == "cancelled"
            worker.identify()
            assert job_of(worker.dispatch().token) == 1


def test_a_request_under_way_is_answered_when_the_sentinel_stops(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release = threading.Event(), threading.Event()

    def slow_check(_: Ledger) -> list[str]:
        begun.set()
        release.wait(10)
        return ["late but there"]

    monkeypatch.setattr(Ledger, "check", slow_check)
    answers: list[Any] = []
    for sentinel in running(database):
        with connect(database) as control:
            thread = threading.Thread(target=lambda: answers.append(control.check()))
            thread.start()
            assert begun.wait(5)
            sentinel.stop()
            threading.Timer(0.3, release.set).start()
            thread.join(10)
    assert answers == [["late but there"]]


def test_old_snapshots_are_removed_at_start(database: Path) -> None:
    with connect(database) as control:
        old, new = Path(control.snapshot()), Path(control.snapshot())
    os.utime(old, (1, 1))
    for _ in running(database):
        assert not old.exists()
        assert new.exists()


def test_ledger_threads_and_sockets_do_not_pile_up_over_many_connections(database: Path) -> None:
    def count() -> int:
        return threading.active_count() + len(os.listdir("/proc/self/fd"))

    for _ in running(database):
        for _ in range(3):
            with connect(database) as control:
                control.ping()
        before = count()
        for _ in range(20):
            with connect(database) as control:
                control.ping()
        assert count() <= before + 2
