"""The control socket over real ipc and tcp sockets, with a made-up control plane behind it."""

import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from casparian_flow.domain.errors import (
    CasparianError,
    ConfigError,
    ConflictError,
    LedgerLockedError,
    NotFoundError,
    SentinelUnreachableError,
    UsageError,
)
from casparian_flow.sentinel import control_server, paths
from casparian_flow.sentinel.api import ChunkResult, FileFinding, ScanReport
from casparian_flow.sentinel.control import ControlClient, remote
from casparian_flow.sentinel.control_codec import CONTROL_OPERATIONS, Operation
from casparian_flow.sentinel.control_server import Caller, ControlServer


class Plane:
    """Answers as told; remembers what it was asked and by whom."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any], Caller]] = []

    def __call__(self, operation: Operation, arguments: dict[str, Any], caller: Caller) -> object:
        self.asked.append((operation.name, arguments, caller))
        answer = self.answers.get(operation.name)
        if isinstance(answer, BaseException):
            raise answer
        return answer(**arguments) if callable(answer) else answer


@pytest.fixture
def address(tmp_path: Path) -> str:
    return paths.control_address(tmp_path / "ledger.duckdb")


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
def server(address: str, plane: Plane) -> Iterator[ControlServer]:
    running = ControlServer(address, plane)
    yield running
    running.close()


@pytest.fixture
def control(server: ControlServer) -> Iterator[ControlClient]:
    with remote(server.address) as client:
        yield client


def socket_file(address: str) -> Path:
    return Path(address.removeprefix("ipc://"))


def test_a_call_carries_arguments_and_brings_the_result_back(
    control: ControlClient, plane: Plane
) -> None:
    plane.answers["list_jobs"] = [{"id": 7, "status": "QUEUED", "name": "é\x00"}]
    assert control.list_jobs(status="QUEUED", limit=3) == [
        {"id": 7, "status": "QUEUED", "name": "é\x00"}
    ]
    ((name, arguments, caller),) = plane.asked
    assert name == "list_jobs"
    assert arguments == {
        "status": "QUEUED",
        "plugin": None,
        "path": None,
        "limit": 3,
        "offset": 0,
    }
    assert (caller.uid, caller.pid) == (os.getuid(), os.getpid())


def test_findings_and_reports_arrive_as_their_own_types(
    control: ControlClient, plane: Plane
) -> None:
    plane.answers["commit_chunk"] = lambda **a: ChunkResult(jobs=len(a["findings"]))
    finding = FileFinding("a/b.csv", (1, 2, 3, 4, 5), "f" * 64, 99, 3, "old.csv")
    assert control.commit_chunk(1, 2, [finding] * 2000) == ChunkResult(jobs=2000)
    assert plane.asked[0][1]["findings"][1999] == finding
    control.finish_scan(1, 2, ["gone.csv"], ScanReport(1, files=3))
    assert plane.asked[1][1]["report"] == ScanReport(1, files=3)


def test_bytes_come_back_untouched(control: ControlClient, plane: Plane) -> None:
    data = os.urandom(3_000_000)
    plane.answers["inventory"] = data
    assert control.inventory(1) == data


@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("no job 7", hint="see `casparian jobs`"),
        ConflictError("busy"),
        LedgerLockedError("locked by 4711", hint="stop it"),
        UsageError("wrong"),
    ],
)
def test_errors_are_raised_again_as_the_class_they_were(
    control: ControlClient, plane: Plane, error: CasparianError
) -> None:
    plane.answers["show_job"] = error
    with pytest.raises(type(error)) as caught:
        control.show_job(7)
    assert (str(caught.value), caught.value.hint) == (str(error), error.hint)
    assert caught.value.exit_code == error.exit_code


def test_a_bug_behind_the_socket_is_told_and_the_server_lives_on(
    control: ControlClient, plane: Plane
) -> None:
    plane.answers["show_job"] = ZeroDivisionError("by zero")
    with pytest.raises(CasparianError, match="failed at show_job: ZeroDivisionError: by zero"):
        control.show_job(7)
    plane.answers["ping"] = {"pid": 1}
    assert control.ping() == {"pid": 1}


def test_a_call_that_takes_long_holds_up_no_other(control: ControlClient, plane: Plane) -> None:
    release = threading.Event()
    plane.answers["check"] = lambda: release.wait(10) and []
    plane.answers["ping"] = {"pid": 1}
    threads = [threading.Thread(target=control.check) for _ in range(6)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    assert control.ping() == {"pid": 1}
    assert time.monotonic() - started < 8
    release.set()
    for thread in threads:
        thread.join()


def test_many_threads_may_share_one_client(control: ControlClient, plane: Plane) -> None:
    plane.answers["show_job"] = lambda job_id: {"id": job_id}
    wrong: list[int] = []

    def ask(start: int) -> None:
        wrong.extend(i for i in range(start, start + 100) if control.show_job(i) != {"id": i})

    threads = [threading.Thread(target=ask, args=(n * 100,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(plane.asked) == 800


def test_no_sentinel_is_said_at_once_with_what_to_do(address: str) -> None:
    started = time.monotonic()
    with remote(address) as client, pytest.raises(SentinelUnreachableError) as caught:
        client.ping()
    assert time.monotonic() - started < 4
    assert "casparian start" in caught.value.hint


def test_a_listener_that_is_no_sentinel_is_given_up(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr("casparian_flow.sentinel.control.CONNECT_TIMEOUT_S", 0.3)
    path = socket_file(address)
    paths.private_folder(path.parent)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        with remote(address) as client, pytest.raises(SentinelUnreachableError):
            client.ping()


def test_an_answer_that_does_not_come_is_given_up_with_what_to_do(
    server: ControlServer, plane: Plane
) -> None:
    release = threading.Event()
    plane.answers["check"] = lambda: release.wait(10) and []
    plane.answers["show_job"] = {"id": 7}
    with remote(server.address, timeout_s=0.2) as client:
        with pytest.raises(SentinelUnreachableError, match="did not answer check") as caught:
            client.check()
        assert "casparian status" in caught.value.hint
        release.set()
        # The late answer must not be taken for the next one.
        assert client.show_job(7) == {"id": 7}


def test_a_client_learns_at_once_that_the_sentinel_was_killed(tmp_path: Path) -> None:
    address = paths.control_address(tmp_path / "ledger.duckdb")
    code = """
        import sys, time
        from casparian_flow.sentinel.control_server import ControlServer
        ControlServer(sys.argv[1], lambda *a: time.sleep(60))
        print("up", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), address], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"up\n"
        threading.Timer(0.3, process.kill).start()
        with remote(address) as client, pytest.raises(SentinelUnreachableError, match="went away"):
            client.check()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    # Its socket file is left; the next Sentinel takes its place.
    assert socket_file(address).is_socket()
    ControlServer(address, Plane()).close()
    assert not socket_file(address).exists()


def test_a_client_outlives_a_restart_of_the_sentinel(address: str, plane: Plane) -> None:
    plane.answers["ping"] = {"pid": 1}
    with remote(address) as client:
        first = ControlServer(address, plane)
        assert client.ping() == {"pid": 1}
        first.close()
        with pytest.raises(SentinelUnreachableError):
            client.ping()
        second = ControlServer(address, plane)
        assert client.ping() == {"pid": 1}
        second.close()


def test_only_this_user_can_reach_the_socket(server: ControlServer) -> None:
    path = socket_file(server.address)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_another_user_is_refused_even_where_the_socket_is_open_to_all(
    server: ControlServer, control: ControlClient, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        control_server, "_property", lambda *_: f"localhost:{os.getuid() + 4711}:0:99"
    )
    with pytest.raises(UsageError, match=r"uid \d+ \(pid 99\) may not command"):
        control.status()
    monkeypatch.setattr(control_server, "_property", lambda *_: "")
    with pytest.raises(UsageError, match="an unknown caller"):
        control.status()
    assert plane.asked == []


def test_a_second_server_on_a_live_socket_is_refused(server: ControlServer, plane: Plane) -> None:
    with pytest.raises(ConflictError, match="another process answers"):
        ControlServer(server.address, plane)
    assert socket_file(server.address).is_socket()


def test_a_file_in_the_socket_s_place_is_left_alone(address: str, plane: Plane) -> None:
    path = socket_file(address)
    paths.private_folder(path.parent)
    path.write_text("precious")
    with pytest.raises(ConflictError, match="is no socket"):
        ControlServer(address, plane)
    assert path.read_text() == "precious"


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="does not belong to this user"):
        paths.private_folder(tmp_path / "link")


def test_a_long_ledger_path_gets_a_short_socket_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane: Plane
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    deep = tmp_path / ("d" * 120) / "ledger.duckdb"
    address = paths.control_address(deep)
    assert len(socket_file(address).name) == 16 + len(".sock")
    assert address != paths.control_address(tmp_path / ("d" * 121) / "ledger.duckdb")
    server = ControlServer(address, plane)
    plane.answers["ping"] = {}
    with remote(address) as client:
        assert client.ping() == {}
    server.close()


def test_a_ledger_reached_by_a_link_has_the_same_socket(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert paths.control_address(tmp_path / "link" / "x.db") == paths.control_address(
        tmp_path / "real" / "x.db"
    )


def test_tcp_is_served_where_it_is_configured(plane: Plane) -> None:
    plane.answers["ping"] = {"pid": 1}
    server = ControlServer("tcp://127.0.0.1:*", plane)
    with remote(server.address) as client:
        assert client.ping() == {"pid": 1}
    with pytest.raises(ConflictError, match="is in use"):
        ControlServer(server.address, plane)
    server.close()
    with pytest.raises(ConfigError, match="cannot bind"):
        ControlServer("tcp://not an address", plane)
    with remote("nonsense") as client, pytest.raises(UsageError, match="no address"):
        client.ping()


@pytest.fixture
def raw(server: ControlServer) -> Iterator[Callable[[list[bytes]], bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(server.address)

    def ask(frames: list[bytes]) -> bytes:
        dealer.send_multipart(frames)
        assert dealer.poll(5000)
        return b"".join(dealer.recv_multipart())

    yield ask
    dealer.close()
    context.term()


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b""], b"request: "),
        ([b"{"], b"request: "),
        ([b"[]"], b"request: "),
        ([b"\xff\xff"], b"request: "),
        ([b"{}", b"{}"], b"a request is 1 frame, got 2"),
        ([b'{"id":1,"op":"nope"}'], b"no operation 'nope'"),
        ([b'{"id":1,"op":"__init__"}'], b"no operation"),
        ([b'{"id":1,"op":"show_job"}'], b"job_id"),
        ([b'{"id":1,"op":"show_job","args":{"job_id":"7"}}'], b"job_id"),
        ([b'{"id":1,"op":"show_job","args":{"job_id":7,"x":1}}'], b"unknown field"),
        ([b'{"id":1,"op":"show_job","args":[' + b"[" * 100_000], b"request: "),
    ],
)
def test_malformed_requests_are_answered_and_end_nothing(
    raw: Callable[[list[bytes]], bytes], plane: Plane, frames: list[bytes], words: bytes
) -> None:
    assert words in raw(frames)
    assert plane.asked == []
    plane.answers["ping"] = {"pid": 42}
    assert b'"pid":42' in raw([b'{"id":1,"op":"ping"}'])


def test_too_many_requests_at_once_are_refused_not_piled_up(
    control: ControlClient, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "PENDING_MAX", 2)
    release = threading.Event()
    plane.answers["check"] = lambda: release.wait(10) and []
    threads = [threading.Thread(target=control.check) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(plane.asked) < 2:
        time.sleep(0.01)
    with pytest.raises(CasparianError, match="busy with 2 requests"):
        control.status()
    release.set()
    for thread in threads:
        thread.join()


def test_every_method_of_the_interface_has_an_operation_and_a_stub() -> None:
    from casparian_flow.sentinel.api import ControlApi
    from casparian_flow.sentinel.control import RemoteControl

    methods = {name for name in vars(ControlApi) if not name.startswith("_")}
    assert set(CONTROL_OPERATIONS) == methods
    assert all(callable(getattr(RemoteControl, name)) for name in methods)
