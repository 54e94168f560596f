"""`casparian scout-pod`: a process of its own, a real Sentinel, CURVE between them."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq
from signing_kit import lax_rules

from casparian_flow.cli import scout_pod
from casparian_flow.domain.errors import NotFoundError, SentinelUnreachableError
from casparian_flow.protocol.curve import (
    CLIENT_SECRET,
    SERVER_PUBLIC,
    SERVER_SECRET,
    CurvePair,
    public_text,
    secret_text,
)
from casparian_flow.sentinel.admission import Admission, Principal
from casparian_flow.sentinel.control import remote
from casparian_flow.sentinel.server import Sentinel, SentinelConfig

FILES = 4_500
"""Three chunks."""


def pair() -> CurvePair:
    public, secret = zmq.curve_keypair()
    return CurvePair(public.decode(), secret.decode())


@dataclass
class Pod:
    """A Sentinel, a folder, and what a Scout's pod for `team/inbox` has."""

    folder: Path
    sentinel: Sentinel

    @property
    def inbox(self) -> Path:
        return self.folder / "inbox"

    def run(self, name: str = "team/inbox") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [
                sys.executable, "-m", "casparian_flow.cli", "scout-pod",
                "--connect", self.sentinel.remote_control_address, "--root", name,
            ],
            env=os.environ
            | {
                "CASPARIAN_WIRE__CURVE_DIR": str(self.folder / "client"),
                "CASPARIAN_SCOUT__SETTLE_SECONDS": "0",
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip

    def recorded(self) -> dict[str, object]:
        (row,) = self.sentinel.control.list_sources()
        return {name: row[name] for name in ("files", "last_scan_complete", "problems")}


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    server, client = pair(), pair()
    for folder, name, text in (
        ("server", SERVER_SECRET, secret_text(server)),
        ("client", CLIENT_SECRET, secret_text(client)),
        ("client", SERVER_PUBLIC, public_text(server.public)),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    admission = Admission()
    admission.replace({client.public: Principal("scout", "team", "scout", root="team/inbox")})
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    with ExitStack() as stack:
        sentinel = Sentinel(
            SentinelConfig(
                bind_address="tcp://127.0.0.1:*",
                remote_control_address="tcp://127.0.0.1:*",
                database=tmp_path / "ledger.duckdb",
                trust=lax_rules,
                curve_dir=tmp_path / "server",
                admission=admission,
                drain_s=0.0,
            )
        )
        thread = threading.Thread(target=sentinel.run)
        thread.start()
        stack.callback(thread.join, 30)
        stack.callback(sentinel.stop)
        assert sentinel.wait_started(20)
        sentinel.control.add_source(str(inbox), name="inbox", namespace="team")
        yield Pod(tmp_path, sentinel)


def test_one_scan_of_its_own_root_is_streamed_and_its_counts_are_recorded(pod: Pod) -> None:
    for number in range(FILES):
        (pod.inbox / f"{number}.csv").touch()
    done = pod.run()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["root"], told["files"], told["versions"]) == ("team/inbox", FILES, FILES)
    assert pod.recorded() == {"files": FILES, "last_scan_complete": True, "problems": []}
    (pod.inbox / "0.csv").unlink()
    (pod.inbox / "1.csv").write_text("changed")
    told = json.loads(pod.run().stdout)
    assert (told["deleted"], told["versions"]) == (1, 1)


def test_a_root_that_is_not_mounted_is_an_incomplete_scan(pod: Pod) -> None:
    (pod.inbox / "a.csv").touch()
    assert pod.run().returncode == 0
    (pod.inbox / "a.csv").unlink()
    pod.inbox.rmdir()
    done = pod.run()
    assert done.returncode == 1
    assert json.loads(done.stdout)["complete"] is False
    assert "inbox" in done.stderr
    assert pod.recorded()["files"] == 1, "nothing is concluded from an absent volume"


def test_another_root_than_its_own_is_not_there_for_it(pod: Pod) -> None:
    done = pod.run("team/another")
    assert done.returncode == 4
    assert "no source root is named 'team/another'" in done.stderr


def test_a_sentinel_that_is_not_there_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from casparian_flow.domain.clock import SystemClock

    monkeypatch.setattr(scout_pod, "PATIENCE_S", 0.2)
    monkeypatch.setattr(scout_pod, "RETRY_S", 0.05)
    with remote("tcp://127.0.0.1:9") as nobody, pytest.raises(SentinelUnreachableError):
        scout_pod._root(nobody, "team/inbox", threading.Event(), SystemClock())


def test_a_root_that_was_retired_is_not_found(pod: Pod) -> None:
    control = pod.sentinel.control
    control.remove_source(str(pod.inbox))
    with pytest.raises(NotFoundError):
        scout_pod._named(control, "team/inbox")
