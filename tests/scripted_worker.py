"""A worker that does what a test tells it: a bare DEALER, no runner, no retries.

`seed` fills a ledger with files and plugins by plain SQL, so that what is tested is the Sentinel.
"""

import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq
from signing_kit import signed

from casparian_flow.db.fanout import Wanted, enqueue
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.ids import parse_token
from casparian_flow.domain.outputs import (
    OutputEntry,
    OutputKind,
    SinkMode,
    output_key,
    parse_sink_uri,
    sink_id,
    slice_key,
)
from casparian_flow.protocol import messages as m
from casparian_flow.protocol.codec import decode_all, encode
from casparian_flow.protocol.curve import ClientKeys
from casparian_flow.protocol.frames import pack, pack_batch
from casparian_flow.services.routing import Match

ROOT_ID = "root-a"
M = TypeVar("M")


def seed(
    database: Path,
    *,
    files: int = 1,
    plugins: tuple[str, ...] = ("sales",),
    priorities: dict[str, int] | None = None,
) -> None:
    """A new ledger with one source root, its files, and a queued job for each file and plugin."""
    with Ledger.open(database, clock=SystemClock()) as ledger:
        fill(ledger, files=files, plugins=plugins, priorities=priorities or {})


def fill(
    ledger: Ledger, *, files: int, plugins: tuple[str, ...], priorities: dict[str, int]
) -> None:
    now = SystemClock().now().wall_us
    with ledger.transaction() as connection:
        root = ledger.next_id("cf_source_root")
        connection.execute("INSERT INTO cf_source_root (id, path) VALUES (?, '/data')", [root])
        manifests = {}
        for plugin in plugins:
            manifests[plugin] = ledger.next_id("cf_plugin_manifest")
            bundle = signed("code", plugin)
            connection.execute(
                "INSERT INTO cf_plugin_manifest (id, plugin_name, version, source_code, "
                "source_hash, status, created_at, deployed_at, artifact_hash, manifest_json, "
                "envelope) VALUES (?, ?, '1.0.0', ?, ?, 'ACTIVE', make_timestamp(?), "
                "make_timestamp(?), ?, ?, ?)",
                [
                    manifests[plugin],
                    plugin,
                    bundle.source,
                    plugin,
                    now,
                    now,
                    bundle.artifact_hash,
                    bundle.manifest_json,
                    bundle.envelope.decode(),
                ],
            )
            connection.execute("INSERT INTO cf_plugin_config (plugin_name) VALUES (?)", [plugin])
            connection.execute(
                "INSERT INTO cf_topic_config (id, plugin_name, topic_name, uri) "
                "VALUES (?, ?, ?, ?)",
                [ledger.next_id("cf_topic_config"), plugin, plugin, f"parquet://{plugin}"],
            )
        first_file = ledger.next_ids("cf_file_location", files).start
        first_version = ledger.next_ids("cf_file_version", files).start
        connection.execute(
            "INSERT INTO cf_file_location (id, source_root_id, rel_path, filename, "
            "current_version_id, discovered_time, last_seen_time) "
            "SELECT ? + i, ?, 'f' || i || '.csv', 'f' || i || '.csv', ? + i, make_timestamp(?), "
            "make_timestamp(?) FROM range(?) t(i)",
            [first_file, root, first_version, now, now, files],
        )
        connection.execute(
            "INSERT INTO cf_file_version (id, location_id, seq, content_hash, size_bytes, "
            "modified_time, detected_at) "
            "SELECT ? + i, ? + i, 1, 'h' || i, 9, make_timestamp(?), make_timestamp(?) "
            "FROM range(?) t(i)",
            [first_version, first_file, now, now, files],
        )
        connection.execute(
            "INSERT INTO cf_file_hash_registry SELECT 'h' || i, make_timestamp(?), 9 "
            "FROM range(?) t(i)",
            [now, files],
        )
        wanted = [
            Wanted(first_version + i, Match(plugin, manifests[plugin], priorities.get(plugin, 50)))
            for plugin in plugins
            for i in range(files)
        ]
        enqueue(ledger, connection, wanted, now)


class ScriptedWorker:
    """Sends what the test says; keeps what arrives until the test asks for it.

    Args:
        batch: whether to ask for BATCH.
        keys: for a Sentinel with CURVE.
    """

    def __init__(
        self,
        address: str,
        name: str = "w1",
        *,
        identity: bytes | None = None,
        nonce: str = "n1",
        batch: bool = False,
        capabilities: list[str] | None = None,
        slots: int = 1,
        credit: int = 1,
        keys: ClientKeys | None = None,
        token: str = "",
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = self.socket.rcvhwm = 0
        self.socket.setsockopt(zmq.IDENTITY, identity or f"id-{name}".encode())
        if keys is not None:
            self.socket.curve_publickey = keys.own.public.encode()
            self.socket.curve_secretkey = keys.own.secret.encode()
            self.socket.curve_serverkey = keys.server.encode()
        self.socket.connect(address)
        self.me = m.Identify(
            name,
            nonce,
            capabilities or ["*"],
            root_id=ROOT_ID,
            slots=slots,
            credit=credit,
            hostname="host",
            pid=4711,
            batch=batch,
            token=token,
        )
        self.welcome = m.Welcome("", 0, 0, 0, batch=False)
        self.plugins: dict[str, m.Plugin] = {}
        self._arrived: deque[tuple[int, m.Message]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        self.context.term()

    # -- out ----------------------------------------------------------------------------------

    def send(self, message: m.Message, job_id: int = 0) -> None:
        self.socket.send_multipart(list(pack(*encode(job_id, message))))

    def send_batch(self, messages: list[tuple[int, m.Message]]) -> None:
        self.socket.send_multipart(list(pack_batch(encode(j, msg) for j, msg in messages)))

    def send_raw(self, *frames: bytes) -> None:
        self.socket.send_multipart(list(frames))

    def identify(self, held: list[str] | None = None) -> m.Welcome:
        self.me.held = held or []
        self.send(self.me)
        self.welcome = self.expect(m.Welcome)
        return self.welcome

    def beat(self, held: list[str] | None = None) -> m.Heartbeat:
        self.send(m.Heartbeat("BUSY" if held else "IDLE", held or []))
        return self.expect(m.Heartbeat)

    def stage(self, job: m.Dispatch) -> OutputEntry:
        """Send STAGE with one output, as an honest worker would."""
        entry = self.entry(job)
        self.send(m.Stage(job.token, (entry,)), job_of(job.token))
        return entry

    def conclude(self, job: m.Dispatch, status: str = "SUCCESS", **more: Any) -> None:
        self.send(m.Conclude(job.token, status, **more), job_of(job.token))

    def entry(self, job: m.Dispatch) -> OutputEntry:
        plugin = self.plugins[job.spec_id]
        spec = plugin.sinks[0]
        sink = sink_id(parse_sink_uri(spec.uri), ROOT_ID, spec.mode)
        ledger_id = self.welcome.ledger_id
        key = output_key(
            ledger_id,
            job.file_version_id,
            plugin.artifact_hash,
            plugin.parameters_hash,
            spec.topic,
            sink,
            job.order_no[2],
        )
        return OutputEntry(
            n=0,
            topic=spec.topic,
            kind=OutputKind.OUTPUT,
            uri=spec.uri,
            mode=SinkMode(spec.mode),
            root_id=ROOT_ID,
            output_key=key,
            slice_key=slice_key(ledger_id, job.location_id, job.plugin_name, spec.topic, sink),
            order_no=job.order_no,
            stage=f".stage/{job.token}.0",
            final=f"{key[:32]}.parquet",
            rows=3,
            bytes=90,
            sha256="f" * 64,
        )

    # -- in -----------------------------------------------------------------------------------

    def expect(self, kind: type[M], timeout_s: float = 5.0) -> M:
        """The next message of this kind; others that come before it are kept for later."""
        deadline = time.monotonic() + timeout_s
        while True:
            for index, (_, message) in enumerate(self._arrived):
                if isinstance(message, kind):
                    del self._arrived[index]
                    return message
            left = deadline - time.monotonic()
            arrived = left > 0 and self._receive(left)
            assert arrived, f"no {kind.__name__} within {timeout_s} s; got {list(self._arrived)}"

    def dispatch(self, timeout_s: float = 5.0) -> m.Dispatch:
        return self.expect(m.Dispatch, timeout_s)

    def gets_nothing(self, kind: type[object], seconds: float = 0.3) -> bool:
        """Whether no message of this kind comes for a while."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._receive(left)
        return not any(isinstance(message, kind) for _, message in self._arrived)

    def _receive(self, seconds: float) -> bool:
        if not self.socket.poll(int(seconds * 1000) + 1):
            return False
        for job_id, message in decode_all(self.socket.recv_multipart()):
            if isinstance(message, m.Plugin):
                self.plugins[message.spec_id] = message
            self._arrived.append((job_id, message))
        return True


def job_of(token: str) -> int:
    parts = parse_token(token)
    assert parts is not None
    return parts.job_id
