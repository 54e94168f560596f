"""Plugins in a container of their own: a worker here, the launcher as a pod would have it.

The launcher runs as an ordinary user without rights, with a read-only root and no namespaces to be
had (pod_kit.py). Without root it runs as this user and shares this machine's folders.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_runs import Bench, collect, handler
from pod_kit import PLUGIN_USER, ROOT, Pod, pod_folder
from worker_process import wait_until

from casparian_flow.domain.failures import Reason
from casparian_worker import launch_line, remote_family
from casparian_worker.plugin_events import Failed, Finished, LaunchError, RunRequest, Started
from casparian_worker.remote_family import PluginContainer
from casparian_worker.runtime import POD_REQUIRED, PluginRuntime, SandboxPolicy


@pytest.fixture
def pod() -> Iterator[Pod]:
    with pod_folder() as pod:
        yield pod


@pytest.fixture
def runtime(pod: Pod) -> Iterator[PluginRuntime]:
    pod.launch()
    runtime = runtime_in(pod)
    yield runtime
    runtime.close()


def runtime_in(pod: Pod, container: PluginContainer | None = None) -> PluginRuntime:
    return PluginRuntime(
        scratch_root=str(pod.folder / "scratch"),
        cache_root=str(pod.folder / "cache"),
        policy=SandboxPolicy(required=POD_REQUIRED),
        container=container or pod.container(),
    )


@pytest.fixture
def bench(runtime: PluginRuntime, tmp_path: Path) -> Bench:
    return Bench(runtime, tmp_path)


def input_file(runtime: PluginRuntime, name: str, content: bytes) -> str:
    """A file as a worker gives it to the container."""
    scratch = runtime._scratch.slot(0)
    path = Path(scratch.new_input("job"), name)
    path.write_bytes(content)
    scratch.show(str(path), 0o440)
    return str(path)


def test_a_plugin_runs_there_as_it_would_here(runtime: PluginRuntime, bench: Bench) -> None:
    source = handler(
        """
        import os
        print("read", os.path.basename(file_path))
        assert not os.listdir()
        open("left-behind", "w").write("x")
        for part in range(3):
            yield {"uid": os.getuid(), "text": open(file_path).read(), "part": part}
        """
    )
    host = bench.host(source)
    for number in range(3):
        path = input_file(runtime, "räte.csv", b"hello")
        run = collect(host.run(RunRequest(f"k{number}", path)))[f"k{number}"]
        user = PLUGIN_USER if ROOT else os.getuid()
        assert run.rows() == [{"uid": user, "text": "hello", "part": n} for n in range(3)]
        assert run.finished.log_tail == "read räte.csv\n"
    report = host.sandbox_report
    assert all(report[name].startswith("applied") for name in POD_REQUIRED)
    if ROOT:
        assert report["network_namespace"].startswith("not applied"), report
    host.stop()


WANTS_OUT = """
import os, signal, socket
tried = {}

def attempt(name, action):
    try:
        tried[name] = f"did: {action()!r}"[:80]
    except BaseException as error:
        tried[name] = type(error).__name__

def connected(kind, *address):
    with socket.socket(*kind) as sock:
        sock.connect(*address)

secret, launcher, pid = open(file_path).read().split()
attempt("secret", lambda: open(secret).read())
attempt("launcher", lambda: connected((socket.AF_UNIX, socket.SOCK_SEQPACKET), launcher))
attempt("tcp", lambda: connected((socket.AF_INET, socket.SOCK_STREAM), ("127.0.0.1", 9)))
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt("kill", lambda: os.kill(int(pid), signal.SIGKILL))
attempt("kill parent", lambda: os.kill(os.getppid(), signal.SIGKILL))
attempt("environment", lambda: open(f"/proc/{pid}/environ").read())
attempt("descriptors", lambda: os.listdir(f"/proc/{pid}/fd"))
attempt("input", lambda: open(file_path, "w"))
attempt("beside", lambda: os.listdir(os.path.dirname(os.getcwd())))
return [tried]
"""


def test_a_plugin_there_reaches_neither_secrets_nor_sockets_nor_its_launcher(
    pod: Pod, runtime: PluginRuntime, bench: Bench
) -> None:
    secret = pod.folder / "run" / "secret"
    secret.write_text("the password")
    secret.chmod(0o444)
    path = input_file(runtime, "targets.txt", f"{secret} {pod.socket} {pod.launcher.pid}".encode())
    host = bench.host(handler(WANTS_OUT))
    (row,) = collect(host.run(RunRequest("k", path)))["k"].rows()
    assert set(row.values()) <= {"PermissionError", "OSError"}, row  # OSError: read-only
    host.stop()


def test_limits_are_kept_where_the_processes_are(pod: Pod, bench: Bench) -> None:
    failed = bench.run(handler(_GROWS), memory_mb=300).failed
    assert failed.reason is Reason.OUT_OF_MEMORY
    assert "more than its limit of 300 MiB" in failed.message
    body = "import threading, time\nfor _ in range(60):\n"
    body += "    threading.Thread(target=time.sleep, args=(60,)).start()\ntime.sleep(60)"
    failed = bench.run(handler(body), pids=20).failed
    assert failed.reason is Reason.SANDBOX
    assert "limit of 20 processes and threads" in failed.message
    wait_until(lambda: not pod.families() and not pod.left(), 30)


def test_all_plugins_together_stay_below_the_containers_memory(pod: Pod, tmp_path: Path) -> None:
    pod.launch("--memory-mb", "500")
    runtime = runtime_in(pod)
    hosts = [Bench(runtime, tmp_path).host(handler(body)) for body in (_HOLDS, _GROWS)]
    for number, host in enumerate(hosts):
        host.submit(RunRequest(f"k{number}", input_file(runtime, f"x{number}", b"")))
        assert isinstance(host.next_event(60), Started)
    failed = hosts[1].next_event(60)
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.OUT_OF_MEMORY
    assert "plugins of this pod used" in failed.message
    assert "more than the 404 MiB that it has" in failed.message
    assert hosts[0].next_event(0.5) is None, "the other one goes on"
    for host in hosts:
        host.stop()
    runtime.close()


_HOLDS = "import time\ndata = bytearray(100 << 20)\ntime.sleep(300)"
_GROWS = "data = []\nwhile True:\n    data.append(bytearray(8 << 20))"


def test_what_a_plugin_leaves_behind_there_ends_with_its_job(pod: Pod, bench: Bench) -> None:
    body = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        os.fork()
        time.sleep(300)
    time.sleep(0.5)
    return [{"a": 1}]
    """
    host = bench.host(handler(body))
    path = input_file(bench.runtime, "x", b"")
    assert collect(host.run(RunRequest("k", path)))["k"].rows() == [{"a": 1}]
    wait_until(lambda: not pod.families() and not pod.left(), 30)
    host.stop()


def test_a_container_that_ends_fails_its_jobs_for_now_and_serves_again_when_it_is_back(
    pod: Pod, bench: Bench
) -> None:
    host = bench.host(handler("import time\ntime.sleep(float(open(file_path).read()))"))
    host.submit(RunRequest("long", input_file(bench.runtime, "a", b"300")))
    host.submit(RunRequest("next", input_file(bench.runtime, "b", b"0")))
    assert isinstance(host.next_event(60), Started)
    families = pod.families()
    pod.launcher.kill()
    pod.launcher.wait()
    failed = host.next_event(60)
    assert isinstance(failed, Failed)
    assert (failed.key, failed.reason, failed.transient) == ("long", Reason.CRASHED, True)
    assert "container ended" in failed.message
    wait_until(lambda: not any(p.is_running() for p in families), 30)
    again = threading.Timer(0.5, pod.launch)
    again.start()
    assert isinstance(host.next_event(60), Started)
    assert isinstance(host.next_event(60), Finished)
    again.join()
    assert bench.runtime.problem() == ""
    host.stop()


def test_a_container_that_is_away_fails_a_job_for_now(pod: Pod, tmp_path: Path) -> None:
    pod.launch()
    container = pod.container()
    runtime = runtime_in(pod, container)
    container._patience_s = 0.3
    pod.launcher.kill()
    pod.launcher.wait()
    wait_until(lambda: "away" in runtime.problem(), 30)
    failed = Bench(runtime, tmp_path).run(handler("pass")).failed
    assert (failed.reason, failed.transient) == (Reason.ENVIRONMENT, True)
    assert "plugin container is not there" in failed.message
    runtime.close()


def test_a_worker_that_stops_waits_for_no_container(pod: Pod, bench: Bench) -> None:
    pod.launcher.kill()
    pod.launcher.wait()
    wait_until(lambda: "away" in bench.runtime.problem(), 30)
    host = bench.host(handler("pass"))
    host.submit(RunRequest("k", input_file(bench.runtime, "x", b"")))
    threading.Timer(0.3, bench.runtime.stop_waiting).start()
    failed = host.next_event(45)
    assert isinstance(failed, Failed)
    assert (failed.reason, failed.transient) == (Reason.ENVIRONMENT, True)
    host.stop()


def test_plugins_end_with_their_worker_and_the_next_one_is_served(pod: Pod) -> None:
    pod.launch()
    for _ in range(2):
        runtime = runtime_in(pod)
        bench = Bench(runtime, None)  # type: ignore[arg-type]
        host = bench.host(handler("import time\ntime.sleep(300)"))
        host.submit(RunRequest("k", input_file(runtime, "x", b"")))
        assert isinstance(host.next_event(60), Started)
        assert pod.families()
        runtime._container.close()  # type: ignore[union-attr]
        wait_until(lambda: not pod.families() and not pod.left(), 30)
        host.stop()
        runtime.close()
    assert pod.log().count("the worker is connected") == 2


def test_asked_to_stop_the_launcher_serves_its_worker_to_the_end(pod: Pod, bench: Bench) -> None:
    host = bench.host(handler("return [{'a': 1}]"))
    pod.launcher.send_signal(signal.SIGTERM)
    path = input_file(bench.runtime, "x", b"")
    assert collect(host.run(RunRequest("k", path)))["k"].rows() == [{"a": 1}]
    host.stop()
    assert pod.launcher.poll() is None
    bench.runtime.close()
    assert pod.launcher.wait(30) == 0
    assert not Path(pod.socket).exists()


def test_only_the_workers_user_is_let_in(pod: Pod) -> None:
    pod.launch(peer=60_999)
    wait_until(lambda: Path(pod.socket).exists(), 30)
    with pytest.raises(LaunchError, match=f"admits no worker of user {os.geteuid()}") as caught:
        pod.container(patience_s=0.1).hello()
    assert caught.value.transient is True
    assert f"a connection of user {os.geteuid()} was refused" in pod.log()


def test_a_second_worker_is_refused_and_the_first_goes_on(pod: Pod, bench: Bench) -> None:
    with pytest.raises(LaunchError, match="admits no worker"):
        pod.container(patience_s=0.1).hello()
    host = bench.host(handler("return [{'a': 1}]"))
    path = input_file(bench.runtime, "x", b"")
    assert collect(host.run(RunRequest("k", path)))["k"].rows() == [{"a": 1}]
    host.stop()


def test_a_large_file_is_copied_since_the_container_has_no_sources(
    pod: Pod, runtime: PluginRuntime, bench: Bench
) -> None:
    import hashlib

    big = pod.folder / "big.bin"
    content = bytes(65 << 20)
    big.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    with runtime.source(0, path=str(big), content_hash=digest, size=len(content)) as source:
        assert not source.in_place
        body = """
        import hashlib
        return [{'digest': hashlib.sha256(open(file_path, 'rb').read()).hexdigest()}]
        """
        host = bench.host(handler(body))
        run = collect(host.run(RunRequest("k", source.path)))["k"]
        assert run.rows() == [{"digest": digest}]
        host.stop()


def test_another_version_in_the_container_is_refused(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod.launch()
    monkeypatch.setattr(remote_family, "__version__", "9.9.9")
    with pytest.raises(LaunchError, match="another version") as caught:
        pod.container().hello()
    assert "same image" in caught.value.hint


def test_the_launcher_refuses_what_is_not_its_own_to_run(pod: Pod) -> None:
    pod.launch()
    container = pod.container()
    hello = container.hello()
    container.close()
    launch = {
        "python": hello.python, "kit": hello.kit, "site": [], "prefix": "/", "log_bytes": 1,
        "variables": {}, "confinement": {"code": [], "reads": [], "writes": [], "uid": 0},
    }  # fmt: skip

    def asked(**changes: object) -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(10)
            wait_until(lambda: sock.connect_ex(pod.socket) == 0, 30)
            if launch_line.receive(sock) is None:
                return "busy"
            lines = [os.open("/dev/null", os.O_RDWR) for _ in range(4)]
            launch_line.send_start(sock, launch_line.Start(1, launch | changes), tuple(lines))
            for line in lines:
                os.close(line)
            answer = launch_line.receive(sock)
            assert isinstance(answer, launch_line.Refused), answer
            return answer.message

    def confined(**changes: object) -> dict[str, object]:
        return launch["confinement"] | changes  # type: ignore[operator,no-any-return]

    def refusal(**changes: object) -> str:
        told = [""]

        def tried() -> bool:
            told[0] = asked(**changes)
            return told[0] != "busy"

        wait_until(tried, 30)
        return told[0]

    inside = f"{hello.scratch}/x"
    assert "another interpreter" in refusal(python="/bin/sh", confinement=confined(writes=[inside]))
    for writes in (["/tmp"], [hello.scratch], [f"{hello.scratch}/../x"], [inside, "/tmp"]):
        assert "plugins write to one folder" in refusal(confinement=confined(writes=writes))
    assert pod.launcher.poll() is None


@pytest.mark.parametrize(
    "packet",
    [b"x", b"[]", b'{"op":"start"}', b'{"op":"hello"}', b'{"op":"look","family":true}', b"{" * 9],
)
def test_a_broken_packet_cuts_the_workers_line_and_no_more(pod: Pod, packet: bytes) -> None:
    pod.launch()
    wait_until(lambda: Path(pod.socket).exists(), 30)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(pod.socket)
        assert isinstance(launch_line.receive(sock), launch_line.Hello)
        sock.send(packet)
        assert sock.recv(1) == b""
    container = pod.container()
    assert container.hello().user == (PLUGIN_USER if ROOT else os.getuid())
    container.close()


def test_a_launcher_that_breaks_the_grammar_loses_its_families(pod: Pod) -> None:
    """Whoever breaks out of the sandbox speaks with the launcher's voice."""
    pod.launch()
    container = pod.container()
    hello = container.hello()
    container.close()
    for lie in (
        launch_line.Judged(0, "cancelled", "x"), launch_line.Judged(0, "nonsense", "x"), hello,
        launch_line.Look(0),
    ):  # fmt: skip
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection = remote_family._Connection(ours, hello)
        verdicts: list[object] = []
        family = remote_family.RemoteFamily(0, connection, verdicts.append)
        connection._families[0] = family
        theirs.send(launch_line.pack(lie))  # type: ignore[arg-type]
        assert family.wait(30)
        assert [v.reason for v in verdicts] == [Reason.CRASHED]  # type: ignore[attr-defined]
        theirs.close()
