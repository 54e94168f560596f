"""CURVE, tokens and bindings on real sockets: who gets in, and who gets what."""

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from curve_kit import Cluster, artifact_of, hold, new_pair, until, worker_of
from scripted_worker import ScriptedWorker, job_of, seed

from casparian_flow.config import load_settings
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import (
    CasparianError,
    ConfigError,
    NotFoundError,
    NotPermittedError,
    SentinelUnreachableError,
)
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.curve import (
    CLIENT_SECRET,
    SERVER_PUBLIC,
    ClientKeys,
    client_keys,
    public_text,
)
from casparian_flow.protocol.http_types import HttpJobType
from casparian_flow.sentinel.admission import PodIdentity, Principal
from casparian_flow.sentinel.api import FileFinding, ScanReport
from casparian_flow.sentinel.control import ControlClient, connect, remote
from casparian_flow.sentinel.server import Sentinel, SentinelConfig
from casparian_worker.mailbox import Mailbox
from casparian_worker.noop_runner import NoopRunner
from casparian_worker.wire import Wire, WireFiles
from casparian_worker.worker_events import DrainRequested, StartJob, WorkerConfig
from casparian_worker.worker_state import WorkerState


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    seed(tmp_path / "ledger.duckdb", files=3, plugins=("alpha", "beta"))
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def test_an_unknown_key_and_a_client_without_one_do_not_get_in(cluster: Cluster) -> None:
    stranger = cluster.worker("stranger", ClientKeys(new_pair(), cluster.server.public))
    stranger.send(stranger.me)
    bare = cluster.stack.enter_context(ScriptedWorker(cluster.sentinel.bind_address, "bare"))
    bare.send(bare.me)
    until(lambda: cluster.counted("connections_refused") >= 1)
    assert stranger.gets_nothing(object)
    assert bare.gets_nothing(object, 0.1)
    assert cluster.sentinel.control.list_workers() == []


def test_a_worker_gets_the_jobs_of_its_own_plugin_version_whatever_it_claims(
    cluster: Cluster,
) -> None:
    keys = cluster.admit(worker_of("beta"))
    beta = cluster.worker(
        "beta", keys, token="sa-beta", capabilities=["*", "alpha"], slots=9, credit=9
    )
    beta.identify()
    jobs = [beta.dispatch() for _ in range(3)]
    assert {job.plugin_name for job in jobs} == {"beta"}
    assert beta.gets_nothing(m.Dispatch)
    (row,) = cluster.sentinel.control.list_workers()
    assert (row["capabilities"], row["bound_to"]) == (["beta"], artifact_of("beta"))
    counted = {row["plugin_name"]: row for row in cluster.sentinel.control.plugin_counts()}
    told = [counted["beta"][name] for name in ("queued", "running", "workers", "idle")]
    assert told == [0, 3, 1, 0]
    assert (counted["alpha"]["queued"], counted["alpha"]["workers"]) == (3, 0)
    other = cluster.admit(worker_of("alpha", "another version"))
    old = cluster.worker("old", other, token="sa-alpha", slots=9, credit=9)
    old.identify()
    assert old.gets_nothing(m.Dispatch)


def test_a_worker_cannot_speak_of_another_plugin_s_jobs(cluster: Cluster) -> None:
    alpha = cluster.worker("alpha", cluster.admit(worker_of("alpha")), token="sa-alpha")
    alpha.identify()
    job = alpha.dispatch()
    beta = cluster.worker("beta", cluster.admit(worker_of("beta")), token="sa-beta")
    beta.plugins = alpha.plugins
    beta.identify(held=[job.token])
    assert beta.expect(m.Abort).token == job.token
    beta.beat([job.token])
    beta.stage(job)
    assert beta.expect(m.Refuse).reason == "stale_token"
    beta.conclude(job)
    assert beta.expect(m.ConcludeAck).tokens == [job.token]
    assert cluster.sentinel.control.show_job(job_of(job.token))["status"] == "DISPATCHING"
    alpha.stage(job)
    alpha.expect(m.Grant)
    alpha.conclude(job)
    alpha.expect(m.ConcludeAck)
    assert cluster.sentinel.control.show_job(job_of(job.token))["status"] == "COMPLETED"
    until(lambda: cluster.counted("foreign_tokens") >= 4)


def test_another_worker_s_routing_id_brings_nothing_of_it(cluster: Cluster) -> None:
    keys = cluster.admit(worker_of("alpha"))
    alpha = cluster.worker("alpha", keys, token="sa-alpha", slots=3, credit=3)
    alpha.identify()
    thief = cluster.worker(
        "thief",
        cluster.admit(worker_of("beta")),
        token="sa-beta",
        identity=b"walpha" + b"_" * 27,
    )
    thief.send(thief.me)
    jobs = [alpha.dispatch() for _ in range(3)]
    assert {job.plugin_name for job in jobs} == {"alpha"}
    assert thief.gets_nothing(object)
    # Alpha's connection ends, and the thief takes its place before anybody else.
    alpha.close()
    second = cluster.worker(
        "second",
        cluster.admit(worker_of("beta")),
        token="sa-beta",
        identity=b"walpha" + b"_" * 27,
    )
    foreign = cluster.counted("messages_foreign")

    def speaks() -> bool:
        second.send(m.Heartbeat("IDLE", [job.token for job in jobs]))
        return cluster.counted("messages_foreign") > foreign

    until(speaks)
    assert second.gets_nothing(m.Dispatch | m.Plugin | m.Grant | m.Abort)


def test_keys_of_others_and_routing_ids_that_can_be_guessed_do_no_work(cluster: Cluster) -> None:
    scout = cluster.worker("scout", cluster.admit(Principal("scout", "team", "s", root="team/in")))
    scout.send(scout.me)
    assert scout.expect(m.Err).code == "refused"
    keys = cluster.admit(worker_of("alpha"))
    short = cluster.worker("short", keys, token="sa-alpha", identity=b"w" + b"1" * 15)
    short.send(short.me)
    until(lambda: cluster.counted("messages_foreign") >= 1)
    assert short.gets_nothing(object, 0.1)
    alpha = cluster.worker("alpha", keys, token="sa-alpha")
    alpha.send_raw(b"nonsense")
    assert alpha.gets_nothing(object, 0.1)
    alpha.identify()
    alpha.send_raw(b"nonsense")
    assert alpha.expect(m.Err).code == "malformed"
    alpha.send(m.Deploy(b""))
    assert alpha.expect(m.Err).code == "refused"
    assert cluster.sentinel.control.list_plugins()[0]["plugin_name"] == "alpha"


def test_a_wrong_token_is_refused_and_a_right_one_is_taken(cluster: Cluster) -> None:
    keys = cluster.admit(worker_of("alpha"))
    cluster.admit(worker_of("beta"))
    for number, token in enumerate(("", "forged", "sa-beta")):
        worker = cluster.worker(f"w{number}", keys, token=token)
        worker.send(worker.me)
        assert worker.expect(m.Err).code == "refused"
        assert worker.gets_nothing(m.Welcome, 0.1)
    assert cluster.sentinel.control.list_workers() == []
    reviews = cluster.reviews
    worker = cluster.worker("again", keys, token="sa-beta")
    worker.send(worker.me)
    assert worker.expect(m.Err).code == "refused"
    assert cluster.reviews == reviews  # what was refused is not asked again at once
    worker.me.token = "sa-alpha"
    worker.identify()
    worker.dispatch()


def test_a_worker_waits_while_tokens_cannot_be_reviewed_and_the_loop_does_not(
    cluster: Cluster,
) -> None:
    alpha = cluster.worker("alpha", cluster.admit(worker_of("alpha")), token="sa-alpha")
    alpha.identify()
    cluster.away.set()
    beta = cluster.worker("beta", cluster.admit(worker_of("beta")), token="sa-beta")
    beta.send(beta.me)
    until(lambda: cluster.reviews >= 2)
    alpha.beat()
    alpha.identify()  # its token was found good before
    assert beta.gets_nothing(object)
    cluster.away.clear()
    beta.identify()
    beta.dispatch()


def test_a_review_under_way_holds_up_nobody(cluster: Cluster) -> None:
    alpha = cluster.worker("alpha", cluster.admit(worker_of("alpha")), token="sa-alpha")
    alpha.identify()
    release = threading.Event()
    review = cluster.admission.review
    assert review is not None

    def slow(token: str) -> PodIdentity | None:
        assert release.wait(30)
        return cluster.tokens.get(token)

    cluster.admission.review = slow
    beta = cluster.worker("beta", cluster.admit(worker_of("beta")), token="sa-beta")
    beta.send(beta.me)
    for _ in range(5):
        alpha.beat()
    assert beta.gets_nothing(object, 0.1)
    release.set()
    beta.expect(m.Welcome)


def test_a_withdrawn_key_ends_its_job_and_gets_no_other(cluster: Cluster) -> None:
    old_keys = cluster.admit(worker_of("alpha"))
    old = cluster.worker("old", old_keys, token="sa-alpha")
    old.identify()
    job = old.dispatch()
    new_keys = cluster.admit(worker_of("alpha"))
    cluster.admission.replace({new_keys.own.public: worker_of("alpha")})
    until(lambda: all(row["leaving"] for row in cluster.sentinel.control.list_workers()))
    old.beat([job.token])
    old.stage(job)
    old.expect(m.Grant)
    old.conclude(job)
    old.expect(m.ConcludeAck)
    assert old.gets_nothing(m.Dispatch)
    old.send(old.me)
    assert old.expect(m.Err).code == "refused"
    new = cluster.worker("new", new_keys, token="sa-alpha")
    new.identify()
    new.dispatch()


def test_keys_without_anybody_who_admits_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CURVE"):
        Sentinel(
            SentinelConfig(
                bind_address="tcp://127.0.0.1:*",
                database=tmp_path / "ledger.duckdb",
                curve_dir=tmp_path,
            )
        ).run()


# -- rotation -----------------------------------------------------------------------------------


class PatientRunner(NoopRunner):
    """Ends jobs once it may."""

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__(mailbox)
        self.begun: list[StartJob] = []
        self._lock = threading.Lock()
        self._may = False

    def start_job(self, job: StartJob) -> None:
        with self._lock:
            self.begun.append(job)
            if self._may:
                super().start_job(job)

    def release(self) -> None:
        with self._lock:
            for job in () if self._may else self.begun:
                super().start_job(job)
            self._may = True


class RealWorker:
    """A worker's wire in a thread of its own, with its files, and a runner that does nothing."""

    def __init__(self, cluster: Cluster, folder: Path, keys: ClientKeys, token: str) -> None:
        self.folder = folder
        hold(folder, keys)
        (folder / "token").write_text(token)
        self.mailbox = Mailbox()
        self.runner = PatientRunner(self.mailbox)
        self.state = WorkerState(WorkerConfig("w1", secrets.token_hex(8), "root-1", credit=4))
        self.wire = Wire(
            cluster.sentinel.bind_address,
            self.state,
            self.runner,
            self.mailbox,
            SystemClock(),
            secrets.token_bytes,
            WireFiles(folder, folder / "token"),
        )
        self.thread = threading.Thread(target=self.wire.run)
        self.thread.start()

    def stop(self) -> None:
        self.runner.release()
        self.mailbox.post(DrainRequested())
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.mailbox.close()


def test_a_key_is_rotated_under_load_and_no_job_is_lost_or_done_twice(tmp_path: Path) -> None:
    count = 100
    seed(tmp_path / "ledger.duckdb", files=count, plugins=("alpha",))
    with ExitStack() as stack:
        cluster = Cluster(tmp_path, stack)
        principal = worker_of("alpha")
        first = cluster.admit(principal)
        worker = RealWorker(cluster, tmp_path / "worker", first, "sa-alpha")
        stack.callback(worker.stop)
        until(lambda: len(worker.runner.begun) >= 2)
        second = cluster.admit(principal)
        hold(worker.folder, second)
        until(lambda: cluster.counted("workers_registered") >= 2)
        cluster.admission.replace({second.own.public: principal})
        worker.runner.release()
        until(lambda: cluster.status("COMPLETED") == count, 60)
        assert {job["attempt"] for job in cluster.sentinel.control.list_jobs(limit=count)} == {1}
        (row,) = cluster.sentinel.control.list_workers()
        assert not row["leaving"]
        assert cluster.sentinel.control.list_dead_letters() == []
        assert cluster.sentinel.control.check() == []


def test_a_worker_whose_key_comes_late_is_not_ready_until_it_gets_in_without_a_restart(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ClientKeys(new_pair(), cluster.server.public)
    cluster.tokens["sa-alpha"] = PodIdentity("team", "sa-alpha")
    worker = RealWorker(cluster, tmp_path / "worker", keys, "not yet written")
    cluster.stack.callback(worker.stop)
    worker.runner.release()
    counts = worker.wire.counts
    until(lambda: cluster.counted("connections_refused") >= 1)
    until(lambda: counts.refusal == "its key is not admitted")
    cluster.admission.replace({keys.own.public: worker_of("alpha")})
    until(lambda: cluster.counted("workers_refused") >= 2)
    until(lambda: counts.refusal == "its token is not valid")
    (worker.folder / "token").write_text("sa-alpha\n")
    until(lambda: cluster.status("COMPLETED") == 3)
    assert counts.refusal == ""
    # Each reason once, however often it was refused.
    assert [r.message for r in caplog.records if "refuses this worker" in r.message] == [
        f"the Sentinel at {cluster.sentinel.bind_address} refuses this worker: {why}"
        for why in ("its key is not admitted", "its token is not valid")
    ]


def test_a_worker_without_its_files_says_which(tmp_path: Path) -> None:
    (tmp_path / SERVER_PUBLIC).write_text("public-key = nonsense")
    with pytest.raises(ConfigError, match=r"server\.key holds no public-key"):
        client_keys(tmp_path)
    (tmp_path / SERVER_PUBLIC).write_text(public_text(new_pair().public))
    with pytest.raises(ConfigError, match=r"client\.key_secret cannot be read"):
        client_keys(tmp_path)
    pair = new_pair()
    (tmp_path / CLIENT_SECRET).write_text(public_text(pair.public) + 'secret-key = "short"')
    with pytest.raises(ConfigError) as caught:
        client_keys(tmp_path)
    assert "short" not in str(caught.value)


# -- the control socket for other pods ----------------------------------------------------------


@pytest.fixture
def other_pods(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(
            tmp_path,
            stack,
            remote_control_address="tcp://127.0.0.1:*",
            loopback_control_address="tcp://127.0.0.1:*",
        )


def client(cluster: Cluster, keys: ClientKeys, name: str) -> ControlClient:
    folder = cluster.folder / name
    hold(folder, keys)
    control = remote(cluster.sentinel.remote_control_address, curve_dir=folder)
    cluster.stack.callback(control.close)
    return control


def test_a_scout_scans_its_own_root_and_does_nothing_else(other_pods: Cluster) -> None:
    own = other_pods.sentinel.control
    root = own.add_source("/sources/team/in", name="in", namespace="team")["id"]
    other = own.add_source("/sources/team/other", name="other", namespace="team")["id"]
    keys = other_pods.admit(Principal("scout", "team", "scout", root="team/in"))
    scout = client(other_pods, keys, "scout")
    assert [row["id"] for row in scout.list_sources()] == [root]
    begun = scout.begin_scan(root)
    found = FileFinding("a.csv", (1, 2, 3, 4, 5), "ab" * 32, 10)
    assert scout.commit_chunk(root, begun["scan_id"], [found]).versions == 1
    scout.finish_scan(root, begun["scan_id"], [], ScanReport(root, files=1))
    assert scout.inventory(root)
    assert scout.next_rescans() == []
    refused: list[Callable[[], object]] = [
        lambda: scout.begin_scan(other),
        lambda: scout.inventory(other),
        lambda: scout.commit_chunk(other, 1, [found]),
        lambda: scout.finish_scan(other, 1, ["a.csv"], ScanReport(other)),
        lambda: scout.add_source("/etc"),
        scout.list_jobs,
        lambda: scout.deploy(b""),
        scout.stop,
        scout.snapshot,
        scout.api.list_jobs,
    ]
    for call in refused:
        with pytest.raises(NotPermittedError):
            call()
    own.retire_source("team/in")
    with pytest.raises(NotFoundError, match="team/in"):
        scout.begin_scan(root)
    other_pods.admission.replace({})
    with pytest.raises(NotPermittedError, match="not admitted"):
        scout.ping()


def test_a_backup_reads_a_whole_copy_and_nothing_else(other_pods: Cluster) -> None:
    other_pods.sentinel.control.add_source("/sources/team/in", name="in", namespace="team")
    keys = other_pods.admit(Principal("backup", "casparian", "backup"))
    backup = client(other_pods, keys, "backup")
    name = Path(backup.snapshot()).name
    copy = other_pods.folder / "copy.duckdb"
    for part_of, target in ((name, copy), (f"{name}.wal", copy.with_name("copy.duckdb.wal"))):
        content = bytearray()
        while part := backup.snapshot_part(part_of, len(content)):
            content += part
        if content:
            target.write_bytes(content)
    backup.remove_snapshot(name)
    with pytest.raises(NotFoundError):
        backup.snapshot_part(name, 0)
    for evil in ("../ledger.duckdb", "ledger.duckdb", "/etc/passwd", f"{name}/..", ""):
        with pytest.raises(NotFoundError, match="no snapshot"):
            backup.snapshot_part(evil, 0)
    with Ledger.open(copy, clock=SystemClock()) as ledger:
        assert ledger.query("SELECT name FROM cf_source_root") == [{"name": "in"}]
    for call in (backup.list_jobs, backup.status, backup.stop):
        with pytest.raises(NotPermittedError):
            call()


def test_an_mcp_server_asks_and_looks_but_neither_decides_nor_runs(other_pods: Cluster) -> None:
    keys = other_pods.admit(Principal("mcp", "casparian", "mcp"))
    mcp = client(other_pods, keys, "mcp")
    assert mcp.api.list_approvals() == []
    assert mcp.list_plugins() == []
    assert mcp.status()["sentinel"]
    refused: list[Callable[[], object]] = [
        lambda: mcp.api.approve("x"),
        lambda: mcp.api.reject("x"),
        lambda: mcp.api.start_approved("x"),
        lambda: mcp.api.start_job(HttpJobType.RUN, "p", None, "/data"),
        lambda: mcp.api.create_job(HttpJobType.RUN, "p", None, "/data"),
        lambda: mcp.retire_plugin("p"),
        lambda: mcp.submit(version_id=1, plugin="p", priority=None, force=True),
    ]
    for call in refused:
        with pytest.raises(NotPermittedError):
            call()
    with pytest.raises(NotFoundError):
        mcp.api.start_job(HttpJobType.PREVIEW, "p", None, "/data")


def test_strangers_and_workers_reach_nothing_of_the_control_socket(other_pods: Cluster) -> None:
    stranger = client(other_pods, ClientKeys(new_pair(), other_pods.server.public), "stranger")
    with pytest.raises(SentinelUnreachableError, match="does not admit"):
        stranger.ping()
    wrong = client(other_pods, ClientKeys(new_pair(), new_pair().public), "wrong")
    with pytest.raises(SentinelUnreachableError):
        wrong.ping()
    bare = remote(other_pods.sentinel.remote_control_address)
    with bare, pytest.raises(SentinelUnreachableError):
        bare.ping()
    worker = client(other_pods, other_pods.admit(worker_of("alpha")), "worker")
    with pytest.raises(NotPermittedError):
        worker.list_jobs()
    # Forwarded ports end at loopback, where everything but a decision is served.
    with remote(other_pods.sentinel.loopback_control_address) as forwarded:
        assert forwarded.list_jobs() == []
        with pytest.raises(NotPermittedError):
            forwarded.api.approve("x")


def test_settings_lead_to_the_sentinel_elsewhere_and_open_no_ledger_here(
    other_pods: Cluster, tmp_path: Path
) -> None:
    keys = other_pods.admit(Principal("mcp", "casparian", "mcp"))
    client(other_pods, keys, "pod")
    config = tmp_path / "config.toml"
    config.write_text(
        f'[database]\ndb_location = "{tmp_path}/none.duckdb"\n'
        f'[sentinel]\ncontrol_address = "{other_pods.sentinel.remote_control_address}"\n'
        f'[wire]\ncurve_dir = "{other_pods.folder}/pod"\n'
    )
    settings = load_settings(config)
    with connect(settings) as control:
        assert control.list_plugins() == []
    other_pods.admission.replace({})
    with pytest.raises(CasparianError):
        connect(settings)
    assert not (tmp_path / "none.duckdb").exists()
    config.write_text('[wire]\ntoken_file = "/token"\n')
    with pytest.raises(ConfigError, match="token_file wants curve_dir"):
        load_settings(config)


# -- in one process -----------------------------------------------------------------------------


def test_the_operator_calls_a_sentinel_of_its_own_process_above_a_known_epoch(
    tmp_path: Path,
) -> None:
    sentinel = Sentinel(
        SentinelConfig(
            bind_address="tcp://127.0.0.1:*",
            database=tmp_path / "ledger.duckdb",
            epoch_floor=41,
            drain_s=0.0,
        )
    )
    with pytest.raises(SentinelUnreachableError):
        _ = sentinel.control
    thread = threading.Thread(target=sentinel.run)
    thread.start()
    try:
        assert sentinel.wait_started(20)
        assert sentinel.epoch == 42
        assert sentinel.control.ping()["epoch"] == 42
        assert sentinel.control.plugin_counts() == []
    finally:
        sentinel.stop()
        thread.join(30)
    with pytest.raises(SentinelUnreachableError):
        _ = sentinel.control
    with Ledger.open(tmp_path / "ledger.duckdb", clock=SystemClock()) as ledger:
        assert ledger.epoch == 42
