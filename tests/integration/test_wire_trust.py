"""CURVE, tokens and bindings on real sockets: who gets in, and who gets what."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from scripted_worker import ScriptedWorker, job_of, seed
from signing_kit import lax_rules, signed

from casparian_flow.domain.errors import CasparianError, ConfigError
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.curve import (
    SERVER_SECRET,
    ClientKeys,
    CurvePair,
    secret_text,
)
from casparian_flow.sentinel.admission import Admission, PodIdentity, Principal
from casparian_flow.sentinel.server import Sentinel, SentinelConfig

CONFIG = {"lease_ttl_s": 30.0, "heartbeat_s": 1.0, "drain_s": 0.0}


def new_pair() -> CurvePair:
    public, secret = zmq.curve_keypair()
    return CurvePair(public.decode(), secret.decode())


def artifact_of(plugin: str) -> str:
    return signed("code", plugin).artifact_hash


def worker_of(plugin: str, artifact_hash: str = "") -> Principal:
    return Principal("worker", "team", f"sa-{plugin}", plugin, artifact_hash or artifact_of(plugin))


class Cluster:
    """A Sentinel with CURVE, and keys and tokens for its workers."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.server = new_pair()
        curve = folder / "curve"
        curve.mkdir()
        (curve / SERVER_SECRET).write_text(secret_text(self.server))
        self.tokens: dict[str, PodIdentity] = {}
        self.reviews = 0
        self.away = threading.Event()
        self.admission = Admission(self._review)
        self.keys: dict[str, Principal] = {}
        self.sentinel = self._start(curve)

    def _review(self, token: str) -> PodIdentity | None:
        self.reviews += 1
        if self.away.is_set():
            raise CasparianError("the API server is away")
        return self.tokens.get(token)

    def _start(self, curve: Path) -> Sentinel:
        sentinel = Sentinel(
            SentinelConfig(
                bind_address="tcp://127.0.0.1:*",
                database=self.folder / "ledger.duckdb",
                trust=lax_rules,
                curve_dir=curve,
                admission=self.admission,
                **CONFIG,  # type: ignore[arg-type]
            )
        )
        thread = threading.Thread(target=sentinel.run)
        thread.start()
        self.stack.callback(thread.join, 30)
        self.stack.callback(sentinel.stop)
        assert sentinel.wait_started(20)
        return sentinel

    def admit(self, principal: Principal) -> ClientKeys:
        """Issue a key; the service account's name is its token."""
        pair = new_pair()
        self.keys[pair.public] = principal
        self.tokens[principal.service_account] = PodIdentity(
            principal.namespace, principal.service_account
        )
        self.admission.replace(self.keys)
        return ClientKeys(pair, self.server.public)

    def worker(self, name: str, keys: ClientKeys, **more: Any) -> ScriptedWorker:
        identity = more.pop("identity", None) or f"w{name:_<32}".encode()
        return self.stack.enter_context(
            ScriptedWorker(
                self.sentinel.bind_address, name, keys=keys, identity=identity, nonce=name, **more
            )
        )

    def counted(self, name: str) -> float:
        value = self.sentinel.metrics.registry.get_sample_value(f"casparian_{name}_total")
        return value or 0.0

    def status(self, status: str) -> int:
        return len(self.sentinel.control.list_jobs(status=status, limit=1000))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    seed(tmp_path / "ledger.duckdb", files=3, plugins=("alpha", "beta"))
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


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
    assert second.gets_nothing((m.Dispatch, m.Plugin, m.Grant, m.Abort))  # type: ignore[arg-type]


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
