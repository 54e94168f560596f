"""A control client that talks nonsense: every request is answered by a named error or a result."""

import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from fuzzing import FRAMES, Fuzz, rss_mb
from scripted_worker import seed
from signing_kit import lax_rules

from casparian_flow.sentinel.control import connect
from casparian_flow.sentinel.control_codec import ERROR_CLASSES, OPERATIONS
from casparian_flow.sentinel.server import Sentinel, SentinelConfig

REQUESTS = max(300, FRAMES // 60)
GROWTH_MB = 250.0
UNHARMED = sorted(set(OPERATIONS) - {"stop"})
WAIT_MS = 30_000


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Sentinel]:
    database = tmp_path / "ledger.duckdb"
    seed(database, files=5)
    sentinel = Sentinel(SentinelConfig("tcp://127.0.0.1:*", database, drain_s=0.0, trust=lax_rules))
    thread = threading.Thread(target=sentinel.run)
    thread.start()
    assert sentinel.wait_started(30)
    yield sentinel
    sentinel.stop()
    thread.join(30)
    assert not thread.is_alive()


def request(name: str, folder: Path) -> dict[str, Any]:
    known: dict[str, Any] = {
        "version_id": 1, "plugin": "sales", "priority": 5, "force": True, "job_id": 1, "limit": 5,
        "offset": 0, "path": "/data", "root_id": 1, "scan_id": 1, "execute": False,
        "pattern": "*.csv", "tag": "csv", "rule_id": 1, "topic": "t", "uri": "csv://x",
        "directory": str(folder / "export"), "forward": True, "reason": "r", "deleted": ["f1.csv"],
        "findings": [{"rel_path": "f1.csv", "signature": [1, 2, 3, 4, 5], "content_hash": "ab"}],
        "report": {"root_id": 1}, "plugin_name": "p", "version": "1.0.0", "job_ids": [1],
        "source_code": "MANIFEST = PluginMetadata(pattern='*')\nclass Handler: pass\n",
        "status": "QUEUED", "mode": "append", "settle_seconds": 1.0, "include": ["*"],
    }  # fmt: skip
    wanted = OPERATIONS[name].signature.parameters
    return {"id": 1, "op": name, "args": {k: v for k, v in known.items() if k in wanted}}


@pytest.mark.timeout(300 + FRAMES / 100)
def test_every_request_is_answered_and_the_sentinel_goes_on(
    sentinel: Sentinel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Some requests name folders to write to; those that are relative shall stay in here.
    deep = tmp_path / "a/b/c/d"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    fuzz = Fuzz("control requests")
    caplog.set_level("ERROR")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(sentinel.control_address)
    answers: Counter[str] = Counter()
    before = rss_mb()
    for _ in range(REQUESTS):
        value: Any = request(fuzz.rng.choice(UNHARMED), tmp_path)
        for _ in range(fuzz.rng.choice((0, 1, 1, 2))):
            value = fuzz.json_of(value)
        raw = fuzz.json_bytes(value)
        frames = [fuzz.bytes_of(raw) if fuzz.rng.random() < 0.1 else raw]
        if fuzz.rng.random() < 0.02:
            frames.append(b"more")
        if b'"stop"' in frames[0]:
            continue
        socket.send_multipart(frames)
        assert socket.poll(WAIT_MS), f"no answer to {frames}"
        reply = msgspec.json.decode(socket.recv_multipart()[0])
        if reply["ok"]:
            answers["ok"] += 1
        else:
            error = reply["error"]
            answers[error["kind"]] += 1
            assert error["kind"] in ERROR_CLASSES
            assert "this is a bug" not in error.get("hint", "").lower(), (frames, error)
    print(dict(answers))
    socket.close()
    context.term()
    assert answers["ok"]
    assert answers["UsageError"] + answers["ProtocolError"]
    assert rss_mb() - before < GROWTH_MB
    assert not [r for r in caplog.records if r.levelname in {"ERROR", "CRITICAL"}]
    with connect(tmp_path / "ledger.duckdb") as control:
        assert control.ping()["pid"] == os.getpid()
        assert control.check() == []
