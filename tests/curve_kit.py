"""A Sentinel with CURVE, and keys and tokens for those who connect to it."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zmq
from scripted_worker import ScriptedWorker
from signing_kit import lax_rules, signed

from casparian_flow.domain.errors import CasparianError
from casparian_flow.protocol.curve import (
    CLIENT_SECRET,
    SERVER_PUBLIC,
    SERVER_SECRET,
    ClientKeys,
    CurvePair,
    public_text,
    secret_text,
)
from casparian_flow.sentinel.admission import Admission, PodIdentity, Principal
from casparian_flow.sentinel.server import Sentinel, SentinelConfig

CONFIG: dict[str, Any] = {"lease_ttl_s": 30.0, "heartbeat_s": 1.0, "drain_s": 0.0}


def new_pair() -> CurvePair:
    public, secret = zmq.curve_keypair()
    return CurvePair(public.decode(), secret.decode())


def artifact_of(plugin: str) -> str:
    return signed("code", plugin).artifact_hash


def worker_of(plugin: str, artifact_hash: str = "") -> Principal:
    return Principal("worker", "team", f"sa-{plugin}", plugin, artifact_hash or artifact_of(plugin))


class Cluster:
    """A Sentinel with CURVE, and keys and tokens for its workers."""

    def __init__(self, folder: Path, stack: ExitStack, **config: Any) -> None:
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
        self.sentinel = self._start(curve, config)

    def _review(self, token: str) -> PodIdentity | None:
        self.reviews += 1
        if self.away.is_set():
            raise CasparianError("the API server is away")
        return self.tokens.get(token)

    def _start(self, curve: Path, config: dict[str, Any]) -> Sentinel:
        sentinel = Sentinel(
            SentinelConfig(
                bind_address="tcp://127.0.0.1:*",
                database=self.folder / "ledger.duckdb",
                trust=lax_rules,
                curve_dir=curve,
                admission=self.admission,
                **(CONFIG | config),
            )
        )
        thread = threading.Thread(target=sentinel.run)
        thread.start()
        self.stack.callback(thread.join, 30)
        self.stack.callback(sentinel.stop)
        assert sentinel.wait_started(20)
        return sentinel

    def admit(self, principal: Principal, token: str = "") -> ClientKeys:
        """Issue a key, and a token, which is the service account's name by default."""
        pair = new_pair()
        self.keys[pair.public] = principal
        self.tokens[token or principal.service_account] = PodIdentity(
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


def hold(folder: Path, keys: ClientKeys) -> None:
    """Put a client's files into a folder, each at once, as a Secret's volume changes."""
    folder.mkdir(exist_ok=True)
    for name, text in (
        (SERVER_PUBLIC, public_text(keys.server)),
        (CLIENT_SECRET, secret_text(keys.own)),
    ):
        (folder / f"{name}.new").write_text(text)
        (folder / f"{name}.new").rename(folder / name)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
