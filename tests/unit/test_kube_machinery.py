"""Store, queue, keys, Lease and the watch's judge: the operator's parts that keep state."""

import random
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import zmq

from casparian_flow.config import OperatorSettings, Settings
from casparian_flow.domain.clock import Now
from casparian_flow.kube.client import KubeError, KubeUnreachableError
from casparian_flow.kube.curve_keys import KeyRing, add_master, drop_old_masters
from casparian_flow.kube.kinds import DEPLOYMENT, PLUGIN, Ref
from casparian_flow.kube.lease import DURATION_S, EPOCH, Holder, LeaseKeeper
from casparian_flow.kube.pod_settings import pod_settings
from casparian_flow.kube.resync import SILENT_S, WatchJudge
from casparian_flow.kube.store import Store
from casparian_flow.kube.work_queue import WorkQueue


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.mono = 1000.0

    def now(self) -> Now:
        return Now(self.mono, int(self.mono * 1e6))


def body(name: str, version: int, uid: str = "u", kind: str = "CasparianPlugin") -> dict[str, Any]:
    meta = {"name": name, "namespace": "flow", "uid": uid, "resourceVersion": str(version)}
    return {"apiVersion": "casparian.io/v1alpha1", "kind": kind, "metadata": meta}


# -- store

REF = Ref("CasparianPlugin", "flow", "a")


def test_an_older_body_does_not_replace_a_newer_one() -> None:
    store = Store()
    assert store.put(body("a", 5))
    assert not store.put(body("a", 4))
    assert not store.put(body("a", 5))
    assert store.get(REF) == body("a", 5)


def test_a_list_that_is_behind_takes_nothing_away_and_brings_nothing_back() -> None:
    store = Store()
    store.put(body("new", 9))
    store.put(body("gone", 3, uid="g"))
    store.drop(body("gone", 4, uid="g"))
    news = store.replace(PLUGIN, "flow", [body("gone", 3, uid="g")], "7")
    assert news == set()
    assert [b["metadata"]["name"] for b in store.all(PLUGIN, "flow")] == ["new"]


def test_a_list_tells_what_watches_have_missed() -> None:
    store = Store()
    store.put(body("a", 1))
    store.put(body("b", 2, uid="b"))
    news = store.replace(PLUGIN, "flow", [body("a", 6)], "8")
    assert news == {REF, Ref("CasparianPlugin", "flow", "b")}
    assert store.replace(PLUGIN, "flow", [body("a", 6)], "8") == set()


def test_a_namesake_is_another_object() -> None:
    store = Store()
    store.put(body("a", 9))
    assert store.put(body("a", 3, uid="other"))
    assert store.all(DEPLOYMENT, "flow") == []


# -- queue


def test_a_key_is_worked_on_once_at_a_time_and_again_if_asked_meanwhile() -> None:
    queue: WorkQueue[str] = WorkQueue(Hands())
    for _ in range(3):
        queue.add("a")
    assert queue.take() == "a"
    queue.add("a")
    queue.add("b")
    assert queue.take() == "b"
    queue.done("a")
    assert queue.take() == "a"
    queue.done("a")
    queue.done("b")
    assert queue.idle()


def test_a_failed_key_comes_again_later_each_time() -> None:
    clock = Hands()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("a")
    for wait in (0.5, 1.0, 2.0):
        assert queue.take() == "a"
        queue.done("a", failed=True)
        clock.mono += wait - 0.1
        assert queue.idle()
        clock.mono += 0.2
        assert not queue.idle()


def test_of_two_wishes_the_earlier_counts() -> None:
    clock = Hands()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("a", 30)
    queue.add("a", 5)
    queue.add("a", 60)
    clock.mono += 6
    assert queue.take() == "a"
    queue.done("a")
    clock.mono += 100
    assert queue.idle()


def test_closing_ends_those_who_wait() -> None:
    queue: WorkQueue[str] = WorkQueue(Hands())
    taken: list[str | None] = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    queue.close()
    thread.join(5)
    assert taken == [None]


def test_many_threads_lose_no_key() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    queue: WorkQueue[int] = WorkQueue(Hands())
    seen: set[int] = set()
    busy: set[int] = set()
    lock = threading.Lock()

    def work() -> None:
        while (key := queue.take()) is not None:
            with lock:
                assert key not in busy
                busy.add(key)
                seen.add(key)
            with lock:
                busy.discard(key)
            queue.done(key)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2_000):
        queue.add(chance.randrange(200))
    for key in range(200):
        queue.add(key)
    while not queue.idle():
        threading.Event().wait(0.01)
    queue.close()
    for thread in threads:
        thread.join(5)
    assert seen == set(range(200))


# -- keys


def test_keys_are_zeromqs_and_the_same_again(tmp_path: Path) -> None:
    ring = KeyRing.open(tmp_path)
    pair = ring.issued("worker", "flow", "worker-1")
    assert zmq.curve_public(pair.secret.encode()).decode() == pair.public
    assert KeyRing.open(tmp_path).issued("worker", "flow", "worker-1") == pair
    others = [("worker", "flow", "worker-2"), ("scout", "flow", "worker-1"), ("worker", "f", "low")]
    assert pair not in [ring.issued(*whom) for whom in others]
    assert {f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {0o600}


def test_a_new_master_key_leaves_old_keys_admitted_until_it_is_dropped(tmp_path: Path) -> None:
    old = KeyRing.open(tmp_path)
    add_master(tmp_path)
    both = KeyRing.open(tmp_path)
    assert both.issued("worker", "w") != old.issued("worker", "w")
    assert set(both.admitted("worker", "w")) == {
        old.issued("worker", "w").public,
        both.issued("worker", "w").public,
    }
    assert both.server == old.server
    drop_old_masters(tmp_path)
    assert KeyRing.open(tmp_path).admitted("worker", "w") == [both.issued("worker", "w").public]


def test_the_settings_of_pods_are_settings(tmp_path: Path) -> None:
    settings = Settings(operator=OperatorSettings(worker_image="x", wheelhouse_claim="wheels"))
    text = pod_settings(settings)
    read = Settings(**tomllib.loads(text))
    assert read.worker.environments_read_only
    assert str(read.worker.wheelhouse) == "/wheelhouse"
    assert read.trust == settings.trust.model_copy(update={"keys_folder": read.trust.keys_folder})
    assert pod_settings(settings) == text


# -- the Lease


class OneLease:
    """An API server with a Lease and pods."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.pods: dict[str, str] = {}
        self.away = False
        self.version = 0

    def get(self, kind: Any, namespace: str, name: str) -> dict[str, Any] | None:
        self._ask()
        if kind.name == "Pod":
            return {"metadata": {"uid": self.pods[name]}} if name in self.pods else None
        return self.lease

    def create(self, lease: dict[str, Any]) -> dict[str, Any]:
        return self._stored(lease)

    def replace_lease(self, lease: dict[str, Any]) -> dict[str, Any]:
        assert self.lease is not None
        if lease["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise KubeError("conflict", status=409)
        return self._stored(lease)

    def _stored(self, lease: dict[str, Any]) -> dict[str, Any]:
        self._ask()
        self.version += 1
        meta = {**lease["metadata"], "resourceVersion": str(self.version)}
        self.lease = {**lease, "metadata": meta}
        return self.lease

    def _ask(self) -> None:
        if self.away:
            raise KubeUnreachableError("away")


def keeper(server: OneLease, uid: str, nonce: str = "n", clock: Hands | None = None) -> LeaseKeeper:
    keeper = LeaseKeeper(
        server,  # type: ignore[arg-type]
        "casparian",
        "casparian-operator",
        Holder("casparian-operator-0", uid, nonce),
        clock or Hands(),
        lambda why: lost.append((uid, why)),
    )
    server.pods["casparian-operator-0"] = uid
    lost.clear()
    return keeper


lost: list[tuple[str, str]] = []
GO = threading.Event()


def test_the_epoch_of_the_lease_is_a_floor_for_the_next_one() -> None:
    server = OneLease()
    first = keeper(server, "u1")
    assert first.acquire(GO)
    first.record_epoch(41)
    second = keeper(server, "u1", "restarted")
    assert second.acquire(GO)
    assert second.epoch == 41
    assert server.lease is not None
    assert server.lease["metadata"]["annotations"][EPOCH] == "41"


def test_who_sees_another_holder_ends() -> None:
    server = OneLease()
    first = keeper(server, "u1")
    assert first.acquire(GO)
    second = keeper(server, "u2")  # the pod of that name is now another: the first is gone
    assert second.acquire(GO)
    first.record_epoch(1)
    assert [uid for uid, _ in lost] == ["u1"]


def test_a_lease_that_is_renewed_is_waited_for_and_one_that_is_not_is_taken() -> None:
    server, clock = OneLease(), Hands()
    first = keeper(server, "u1", clock=clock)
    assert first.acquire(GO)
    second = keeper(server, "u2", clock=clock)
    server.pods["casparian-operator-0"] = "u1"
    stop, taken = threading.Event(), threading.Event()

    def acquire() -> None:
        if second.acquire(stop):
            taken.set()

    thread = threading.Thread(target=acquire)
    thread.start()
    assert not taken.wait(1.5)
    clock.mono += DURATION_S
    assert taken.wait(10)
    thread.join()


def test_while_the_api_server_is_away_work_goes_on() -> None:
    server = OneLease()
    first = keeper(server, "u1")
    assert first.acquire(GO)
    server.away = True
    first.record_epoch(3)
    assert lost == []
    server.away = False
    first.record_epoch(3)
    assert server.lease is not None
    assert server.lease["metadata"]["annotations"][EPOCH] == "3"


def test_a_renewal_that_no_watch_tells_of_grows_old() -> None:
    server, clock = OneLease(), Hands()
    first = keeper(server, "u1", clock=clock)
    assert first.acquire(GO)
    clock.mono += 70
    assert first.unseen_s() == 70
    assert server.lease is not None
    first.heard(server.lease)
    assert first.unseen_s() == 0


def test_a_watch_that_tells_of_another_holder_ends_this_one() -> None:
    server = OneLease()
    first = keeper(server, "u1")
    assert first.acquire(GO)
    assert keeper(server, "u2").acquire(GO)
    assert server.lease is not None
    first.heard(server.lease)
    assert len(lost) == 1


def test_while_the_api_server_is_away_no_watch_is_blamed() -> None:
    server, clock = OneLease(), Hands()
    first = keeper(server, "u1", clock=clock)
    assert first.acquire(GO)
    clock.mono += 50
    server.away = True
    first.record_epoch(1)
    clock.mono += 50
    assert first.unseen_s() == 50
    judge = WatchJudge(clock)
    judge.listed(PLUGIN, "flow", [body("a", 5)])
    clock.mono += SILENT_S - 1
    judge.excuse()
    clock.mono += SILENT_S - 1
    assert judge.silent() == ""
    clock.mono += 2
    assert judge.silent() == "CasparianPlugin flow/a"


# -- silent watches


def test_an_object_that_lists_have_and_no_watch_tells_of_is_named() -> None:
    clock = Hands()
    judge = WatchJudge(clock)
    judge.listed(PLUGIN, "flow", [body("a", 5)])
    clock.mono += SILENT_S - 1
    judge.listed(PLUGIN, "flow", [body("a", 5)])
    assert judge.silent() == ""
    clock.mono += 2
    assert judge.silent() == "CasparianPlugin flow/a"
    judge.heard(body("a", 5), gone=False)
    assert judge.silent() == ""


@pytest.mark.parametrize("gone", ["deleted", "listed no more"])
def test_what_is_gone_is_not_missed(gone: str) -> None:
    clock = Hands()
    judge = WatchJudge(clock)
    judge.listed(PLUGIN, "flow", [body("a", 5)])
    if gone == "deleted":
        judge.heard(body("a", 6), gone=True)
    else:
        judge.listed(PLUGIN, "flow", [])
    clock.mono += SILENT_S + 1
    assert judge.silent() == ""
