"""What a plugin cannot do, tried from inside; and what it still can."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_runs import Bench, handler

from casparian_flow.domain.failures import Reason
from casparian_worker import sandbox
from casparian_worker.plugin_events import LaunchError
from casparian_worker.runtime import PluginRuntime, SandboxPolicy
from casparian_worker.sandbox import seccomp


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginRuntime]:
    folder = tmp_path_factory.mktemp("runtime")
    runtime = PluginRuntime(scratch_root=str(folder / "scratch"), cache_root=str(folder / "cache"))
    yield runtime
    runtime.close()


@pytest.fixture
def bench(runtime: PluginRuntime, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(runtime, tmp_path)
    yield bench
    bench.close()


ATTEMPTS = """
import ctypes, os, signal, socket, sys

libc = ctypes.CDLL(None, use_errno=True)

def call(function, *arguments):
    if function(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))

def tcp():
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(("127.0.0.1", PORT))
def udp(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def unix(): socket.socket(socket.AF_UNIX)
def raw_socket(): call(libc.syscall, 41 if os.uname().machine == "x86_64" else 198, 2, 1, 0)
def foreign_socketpair(): call(libc.socketpair, 2, 1, 0, (ctypes.c_int * 2)())
def io_uring(): call(libc.syscall, 425, 1, ctypes.create_string_buffer(120))
def read_secret(): open(SECRET).read()
def read_passwd(): open("/etc/shadow").read()
def list_root(): os.listdir("/")
def write_outside(): open(os.path.dirname(SECRET) + "/new", "w")
def overwrite_input(): open(INPUT, "w")
def write_kit(): open(sys.modules["casparian_flow.sdk"].__file__, "a")
def worker_environment(): open(f"/proc/{WORKER}/environ").read()
def worker_memory(): open(f"/proc/{WORKER}/mem", "rb").read(1)
def parent_environment(): open(f"/proc/{os.getppid()}/environ").read()
def kill_worker(): os.kill(WORKER, signal.SIGTERM)
def kill_init(): os.kill(1, signal.SIGKILL)
def ptrace(): call(libc.ptrace, 16, 1, 0, 0)
def mount(): call(libc.mount, b"none", b"/tmp", b"tmpfs", 0, None)
def unshare(): call(libc.unshare, 0x10000000)
def setuid(): os.setuid(0)
def chown(): os.chown(SECRET, os.getuid(), os.getgid())
def chmod_worker_file(): os.chmod(SECRET, 0o777)
def run_own_binary():
    open("tool", "w").write("#!/bin/sh\\nexit 0\\n"); os.chmod("tool", 0o755)
    os.execv("./tool", ["./tool"])
def core():
    import resource; resource.setrlimit(resource.RLIMIT_CORE, (1, 1))

NAMES = [name for name, value in list(globals().items())
         if callable(value) and getattr(value, "__module__", "") == __name__ and name != "call"]
"""
TRY_ALL = """
    def execute(self, path):
        globals()["INPUT"] = path
        rows = []
        for name in NAMES:
            try:
                globals()[name]()
            except OSError as error:
                rows.append({"name": name, "result": type(error).__name__})
            except ValueError as error:
                rows.append({"name": name, "result": "ValueError"})
            else:
                rows.append({"name": name, "result": "succeeded"})
        self.publish("t", rows)
"""


def test_whatever_leads_outside_is_refused(bench: Bench, tmp_path: Path) -> None:
    os.environ["WORKER_SECRET"] = "hunter2"
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    tmp_path.chmod(0o755)
    listener = socket.create_server(("127.0.0.1", 0))
    globals_ = f"PORT={listener.getsockname()[1]}\nSECRET={str(secret)!r}\nWORKER={os.getpid()}\n"
    source = (
        "from casparian_flow.sdk import *\n"
        + globals_
        + ATTEMPTS
        + "class Handler(BasePlugin):"
        + TRY_ALL
    )
    try:
        run = bench.run(source)
    finally:
        listener.close()
        del os.environ["WORKER_SECRET"]
    results = {str(row["name"]): row["result"] for row in run.rows("t")}
    assert len(results) >= 25
    escaped = {name for name, result in results.items() if result == "succeeded"}
    assert escaped == set(), escaped
    assert secret.read_text() == "hunter2"
    assert not (tmp_path / "new").exists()


def test_the_environment_holds_nothing_of_the_workers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_CLIENT_SECRET", "hunter2")
    run = bench.run(
        handler(
            "import os\nreturn [{'names': ' '.join(os.environ), 'raw': "
            "open('/proc/self/environ').read() if os.getuid() == 0 else ''}]"
        )
    )
    row = run.rows()[0]
    assert "AZURE" not in str(row)
    assert "PATH" in str(row["names"])


def test_ordinary_work_goes_on_inside(bench: Bench) -> None:
    body = """
    import concurrent.futures, csv, io, json, os, shutil, sqlite3, tarfile, tempfile, zoneinfo
    import duckdb
    import numpy as np, pandas as pd, polars as pl, pyarrow as pa
    import pyarrow.compute as pc, pyarrow.csv as pcsv, pyarrow.parquet as pq, openpyxl

    assert len(pd.read_csv(file_path)) == 3
    assert duckdb.sql("SELECT count(*) FROM range(3)").fetchall() == [(3,)]
    assert pcsv.read_csv(file_path).num_rows == 3
    assert pl.read_csv(file_path).height == 3
    with pa.memory_map(file_path) as mapped:
        assert mapped.read().startswith(b"a,b")
    book = openpyxl.Workbook(); book.active.append([1, "x"]); book.save("t.xlsx")
    assert len(pd.read_excel("t.xlsx", header=None)) == 1
    shutil.copy2(file_path, "copy.csv"); shutil.copytree(os.path.dirname(file_path), "copies")
    with tarfile.open("all.tar", "w") as tar:
        tar.add("copy.csv")
    with tarfile.open("all.tar") as tar:
        tar.extractall("unpacked", filter="data")
    assert len(pd.read_csv("unpacked/copy.csv")) == 3
    db = sqlite3.connect(":memory:"); db.execute("create table t(a)")
    on_disk = sqlite3.connect("scratch.db"); on_disk.execute("create table t(a)"); on_disk.close()
    assert np.linalg.inv(np.random.rand(300, 300)).shape == (300, 300)
    pq.write_table(pa.table({"a": range(200_000)}), "t.parquet")
    assert pc.sum(pq.read_table("t.parquet", use_threads=True)["a"]).as_py() > 0
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(len, ["a", "bb"])) == [1, 2]
    pd.Timestamp("2024-01-01", tz="Europe/Berlin")
    assert os.path.realpath(os.getcwd()) == os.path.realpath(os.environ["HOME"])
    return pd.DataFrame({"ok": [True]})
    """
    path = bench.file("data.csv", b"a,b\n1,x\n2,y\n3,z\n")
    run = bench.run(handler(body), path=path, memory_mb=2048)
    assert run.rows() == [{"ok": True}], run.outcome


def test_what_a_job_leaves_in_scratch_is_gone_for_the_next(bench: Bench) -> None:
    body = """
    import os
    before = len(os.listdir('.'))
    open('left', 'w').write('x'); os.makedirs('folder/deep')
    return [{'before': before}]
    """
    host = bench.host(handler(body))
    assert [bench.again(host).rows()[0]["before"] for _ in range(2)] == [0, 0]


def test_several_hosts_of_one_slot_do_not_disturb_each_other(bench: Bench) -> None:
    body = "open('own', 'w').write('x')\nreturn [{'a': open('own').read()}]"
    first, second = bench.host(handler(body)), bench.host(handler(body + "  # other"))
    assert bench.again(first).rows() == bench.again(second).rows() == [{"a": "x"}]
    second.stop()
    assert bench.again(first).rows() == [{"a": "x"}]


def test_a_file_in_place_is_readable_for_its_own_job_only(bench: Bench, tmp_path: Path) -> None:
    from plugin_runs import collect

    from casparian_worker.plugin_events import RunRequest

    big = tmp_path / "big.csv"
    big.write_text("a\n1\n")
    body = f"""
    try:
        text = open({str(big)!r}).read()
    except PermissionError:
        text = "refused"
    return [{{"text": text}}]
    """
    host = bench.host(handler(body))
    assert bench.again(host).rows() == [{"text": "refused"}]
    run = collect(host.run(RunRequest("k", str(big), in_place=True)))["k"]
    assert run.rows() == [{"text": "a\n1\n"}]
    assert bench.again(host).rows() == [{"text": "refused"}]


def test_the_probe_reports_every_measure(runtime: PluginRuntime) -> None:
    report = runtime.probe()
    assert set(report) == set(sandbox.MEASURES)
    assert all(text.startswith(("applied", "not applied: ")) for text in report.values())


def test_a_required_measure_that_does_not_apply_keeps_plugins_from_running(tmp_path: Path) -> None:
    policy = SandboxPolicy(required=("user",), uid_base=0)
    runtime = PluginRuntime(
        scratch_root=str(tmp_path / "s"), cache_root=str(tmp_path / "c"), policy=policy
    )
    bench = Bench(runtime, tmp_path)
    try:
        failed = bench.run(handler("return []")).failed
        assert failed.reason is Reason.SANDBOX
        assert "user: not applied" in failed.message
        with pytest.raises(LaunchError, match="not as strict as required"):
            runtime.probe()
    finally:
        runtime.close()


def test_an_unknown_required_measure_is_a_clear_error() -> None:
    with pytest.raises(LaunchError, match="unknown sandbox measure 'selinux'"):
        SandboxPolicy(required=("selinux",))


def test_slots_have_users_of_their_own(runtime: PluginRuntime) -> None:
    users = {runtime._scratch.slot(number).uid for number in range(3)}
    if os.geteuid() == 0:
        assert len(users) == 3
        assert 0 not in users
    else:
        assert users == {0}


def test_plugins_die_with_their_worker(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from plugin_runs import *
runtime = PluginRuntime(scratch_root={str(tmp_path / "s")!r}, cache_root={str(tmp_path / "c")!r})
bench = Bench(runtime, None)
host = bench.host(handler("import time; time.sleep(100)"))
for event in host.run(RunRequest("k", bench.file())):
    print(host._warm.process.pid, flush=True)
"""
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    launcher = int(worker.stdout.readline())
    gone = threading.Event()
    pidfd = os.pidfd_open(launcher)
    worker.kill()
    worker.wait()
    worker.stdout.close()

    def wait() -> None:
        import select

        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(5000):
            gone.set()

    wait()
    os.close(pidfd)
    assert gone.is_set(), "the launcher outlived its worker"


def test_without_namespaces_orphans_are_ended_all_the_same(tmp_path: Path) -> None:
    inner = f"""
import sys
sys.path[:0] = {sys.path!r}
import os
from plugin_runs import *
from casparian_worker.guest_family import descendants
runtime = PluginRuntime(scratch_root={str(tmp_path / "s")!r}, cache_root={str(tmp_path / "c")!r})
bench = Bench(runtime, None)
run = bench.run(handler("import os, time\\nif os.fork() == 0:\\n    os.setsid()\\n"
                        "    os.fork()\\n    time.sleep(60)\\nreturn [{{'a': 1}}]"))
print(run.rows(), descendants(os.getpid()), bench.hosts[0].sandbox_report["pid_namespace"])
runtime.close()
"""
    cap_sys_admin = 21
    outer = f"""
import sys
sys.path[:0] = {sys.path!r}
import os
from casparian_worker.sandbox import libc
if os.geteuid() == 0:
    libc.prctl(libc.PR_CAPBSET_DROP, {cap_sys_admin})
os.execv(sys.executable, [sys.executable, "-c", {inner!r}])
"""
    done = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[{'a': 1}] [] "), done.stdout
    if os.geteuid() == 0:
        assert "not applied: unshare: Operation not permitted" in done.stdout


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("shared_user", [False, True])
def test_the_filter_is_well_formed_for_each_machine(machine: str, shared_user: bool) -> None:
    import struct

    code = seccomp.program(machine, shared_user=shared_user)
    steps = list(struct.iter_unpack("=HBBI", code))
    assert len(steps) < 4096
    assert steps[-1][0] == 0x06, "ends with a return"
    for place, (opcode, if_true, if_false, _) in enumerate(steps):
        if opcode & 0x07 == 0x05:
            assert place + 1 + max(if_true, if_false) < len(steps)
