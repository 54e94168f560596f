"""Plugins that go for their own worker: its bridge, its folders, its patience, the next job.

Each runs through a driver that does as the given file says, so that an honest file can follow in
the same warm process, or in the one that replaces it.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from gatekeeper_corpus import plugin
from hostile.driver import DRIVER
from plugin_runs import Bench, Run

from casparian_flow.domain.failures import Reason
from casparian_worker import plugin_host
from casparian_worker.arrow_ipc import HostileBatchError, decode, encode
from casparian_worker.bridge import HEADER, Kind, pack, pack_json
from casparian_worker.plugin_events import Finished
from casparian_worker.plugin_host import PluginHost
from casparian_worker.runtime import PluginRuntime, SandboxPolicy

HONEST = plugin("return [{'a': 7}]")
BRIDGE = """
import gc, socket
bridge = next(o for o in gc.get_objects() if isinstance(o, socket.socket) and o.fileno() >= 0)
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        runtime = PluginRuntime(scratch_root=f"{folder}/s", cache_root=f"{folder}/c")
        bench = Bench(runtime, Path(folder))
        yield bench
        bench.close()
        runtime.close()


@pytest.fixture(scope="module")
def host(bench: Bench) -> PluginHost:
    return bench.host(DRIVER)


def run(bench: Bench, host: PluginHost, source: str) -> Run:
    return bench.again(host, path=bench.file("given.py", source.encode()))


def is_honest(run: Run) -> bool:
    return run.rows() == [{"told": "[{'a': 7}]"}]


def forged(frame: bytes) -> str:
    """A plugin that writes this to its bridge; a job's number of 4,242 becomes its own."""
    return plugin(
        f"""
        import inspect
        frames = [f.frame.f_locals for f in inspect.stack()]
        number = next(f["frame"].job for f in frames if hasattr(f.get("frame"), "job"))
        frame = bytes.fromhex("{frame.hex()}")
        bridge.sendall(frame.replace((4242).to_bytes(4, "big"), number.to_bytes(4, "big")))
        return [{{"a": 1}}]
        """,
        BRIDGE,
    )


ROWS = bytes(encode(pa.RecordBatch.from_pydict({"n": [1]})))
OWN = 4242
FORGED = {
    "rows for another job": pack(Kind.BATCH, 9_999, name="out", body=ROWS),
    "the end of another job": pack_json(Kind.END, 9_999, {}),
    "a job that nobody gave": pack(Kind.BEGIN, 9_999),
    "its own job a second time": pack(Kind.BEGIN, OWN),
    "another sandbox report": pack_json(Kind.CONFINED, 0, {"report": {"landlock": "applied"}}),
    "that it is ready, again": pack(Kind.READY),
    "the worker's own words": pack_json(Kind.RUN, OWN, {"path": "/etc/passwd"}),
    "a kind that does not exist": HEADER.pack(77, 0, 0, 0, 0),
    "reserved bits": HEADER.pack(Kind.END, 1, 0, OWN, 0),
    "a frame without end": HEADER.pack(Kind.BATCH, 0, 3, OWN, 2**63) + b"out",
    "a topic that is a path": pack(Kind.BATCH, OWN, name="../../etc/cron.d/x", body=ROWS),
    "rows that are none": pack(Kind.BATCH, OWN, name="out", body=b"x" * 100),
    "an error of no kind": pack_json(Kind.ERROR, OWN, {"kind": "pardon", "message": "x"}),
    "an error that is no text": pack_json(
        Kind.ERROR, OWN, {"kind": "raised", "message": json.loads("[" * 900 + "]" * 900)}
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_frame_fails_its_own_job_only(bench: Bench, host: PluginHost, what: str) -> None:
    assert is_honest(run(bench, host, HONEST))
    before = host.sandbox_report
    outcome = run(bench, host, forged(FORGED[what])).failed
    assert outcome.reason is Reason.PROTOCOL, outcome
    assert host.sandbox_report == before
    assert is_honest(run(bench, host, HONEST))


def test_a_job_that_declares_its_own_end_and_goes_on_does_not_hold_up_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_host, "BEGIN_TIMEOUT_S", 1.0)
    body = forged(pack_json(Kind.END, OWN, {})).replace('return [{"a": 1}]', "while True: pass")
    own = bench.host(DRIVER)
    assert isinstance(run(bench, own, body).outcome, Finished)
    assert is_honest(run(bench, own, HONEST))
    own.stop()


def test_a_thread_that_keeps_the_interpreter_to_itself_does_not_hold_up_the_next_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_host, "BEGIN_TIMEOUT_S", 1.0)
    slow = "import re\ndef hog():\n    time.sleep(0.3)\n    re.match('(a+)+$', 'a' * 60 + 'b')\n"
    body = "threading.Thread(target=hog, daemon=True).start()\nreturn [{'a': 1}]"
    own = bench.host(DRIVER)
    assert run(bench, own, plugin(body, "import threading, time\n" + slow)).finished.rows == 1
    time.sleep(0.5)
    assert is_honest(run(bench, own, HONEST))
    own.stop()


def test_rows_of_a_thread_that_outlives_its_job_go_nowhere(bench: Bench, host: PluginHost) -> None:
    body = "threading.Thread(target=late, args=[self], daemon=True).start()\nreturn [{'a': 1}]"
    late = """
import threading, time
def late(handler):
    for _ in range(20):
        time.sleep(0.02)
        handler.publish("out", [{"late": 1}])
"""
    assert run(bench, host, plugin(body, late)).finished.rows == 1
    time.sleep(0.1)
    assert is_honest(run(bench, host, HONEST))


def test_a_process_left_behind_ends_with_its_job(bench: Bench, host: PluginHost) -> None:
    mark = f"left-{os.urandom(8).hex()}"
    body = f"""
    code = "import time; time.sleep(300)"
    subprocess.Popen([sys.executable, "-I", "-S", "-c", code, "{mark}"], start_new_session=True)
    time.sleep(0.4)
    return [{{'a': 1}}]
    """
    assert run(bench, host, plugin(body, "import subprocess, sys, time")).finished.rows == 1
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(mark.encode() in command for command in commands)
    assert is_honest(run(bench, host, HONEST))


DEEP = """
import os
def dig(depth):
    for number in range(depth):
        os.mkdir("d"); os.chdir("d")
        if number % 100 == 0:
            open("file", "w").close(); os.symlink("/", "root"); os.mkdir("shut", 0)
"""
LEFT = "import os\nreturn [{'a': 7}] if os.listdir(os.environ['HOME']) == [] else None"


@pytest.mark.parametrize("ending", ["return [{'a': 1}]", "os._exit(3)"])
def test_a_folder_deeper_than_anything_is_cleared_away(bench: Bench, ending: str) -> None:
    own = bench.host(DRIVER)
    dug = run(bench, own, plugin(f"dig(1500)\n{ending}", DEEP))
    assert isinstance(dug.outcome, Finished) or dug.failed.reason is Reason.EXITED
    assert is_honest(run(bench, own, plugin(LEFT)))
    own.stop()


NAMED = "held.append(open(f'file-{n}', 'wb'))"
NAMELESS = "held.append(tempfile.TemporaryFile())"


@pytest.mark.parametrize("way", [NAMED, NAMELESS] if os.geteuid() == 0 else [NAMED])
def test_a_plugin_that_fills_the_disk_is_ended(tmp_path: Path, way: str) -> None:
    policy = SandboxPolicy(scratch_bytes=8 << 20)
    runtime = PluginRuntime(
        scratch_root=str(tmp_path / "s"), cache_root=str(tmp_path / "c"), policy=policy
    )
    own = Bench(runtime, tmp_path)
    body = f"""
    held = []
    for n in range(4):
        {way}
        held[-1].write(bytes(4 << 20)); held[-1].flush()
    time.sleep(20)
    """
    try:
        failed = own.run(plugin(body, "import tempfile, time")).failed
    finally:
        runtime.close()
    assert failed.reason is Reason.SANDBOX
    assert "16 MiB into its scratch folder" in failed.message


def test_what_one_plugin_does_to_its_process_is_not_seen_by_another(bench: Bench) -> None:
    poison = """
    import builtins, decimal, locale, os, sys, time
    os.environ["TZ"] = "Asia/Tokyo"; time.tzset()
    sys.path.insert(0, os.getcwd()); builtins.len = lambda _: 42
    decimal.getcontext().prec = 2
    open("json.py", "w").write("raise SystemExit('poisoned')")
    os.makedirs(".local/lib/python3.11/site-packages")
    open("sitecustomize.py", "w").write("raise SystemExit('poisoned')")
    return [{'a': 1}]
    """
    check = """
    import decimal, json, os, time
    clean = len("ab") == 2 and time.tzname[0] != "JST" and decimal.getcontext().prec == 28
    clean = clean and os.listdir(os.environ["HOME"]) == []
    return [{'a': 7 if clean else 0}]
    """
    first, second = bench.host(DRIVER), bench.host(DRIVER)
    assert run(bench, first, plugin(poison)).outcome
    assert is_honest(run(bench, second, plugin(check)))
    first.stop()
    second.stop()


def _nulls(count: int) -> pa.Array:
    return pa.Array.from_buffers(pa.null(), count, [None])


def _nulls_in_a_list(count: int) -> pa.RecordBatch:
    offsets = pa.array([0, count], pa.int64())
    return pa.record_batch([pa.LargeListArray.from_arrays(offsets, _nulls(count))], ["a"])


def _nulls_in_fixed_lists(count: int) -> pa.RecordBatch:
    inner = pa.FixedSizeListArray.from_arrays(_nulls(count * 50_000), 50_000)
    return pa.record_batch([inner], ["a"])


def _empty_structs(count: int) -> pa.RecordBatch:
    empty = pa.Array.from_buffers(pa.struct([]), count, [None])
    offsets = pa.array([0, count], pa.int64())
    return pa.record_batch([pa.LargeListArray.from_arrays(offsets, empty)], ["a"])


def _null_columns(count: int) -> pa.RecordBatch:
    return pa.record_batch([_nulls(count)] * 9_999, [str(n) for n in range(9_999)])


@pytest.mark.parametrize(
    ("make", "few", "many"),
    [
        (_nulls_in_a_list, 1_000_000, 2**31 - 1),
        (_nulls_in_fixed_lists, 10, 40_000),
        (_empty_structs, 1_000_000, 2**31 - 1),
        (_null_columns, 1_000, 65_536),
    ],
)
def test_a_batch_that_stands_for_far_more_values_than_it_holds_is_refused(
    make: Callable[[int], pa.RecordBatch], few: int, many: int
) -> None:
    assert decode(bytes(encode(make(few)))).num_rows
    with pytest.raises(HostileBatchError, match="stand for"):
        decode(bytes(encode(make(many))))
