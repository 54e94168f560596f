"""Real plugins in the real sandbox: each way to go wrong has its own name, and the worker lives."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_runs import Bench, collect, handler

from casparian_flow.domain.failures import Reason
from casparian_worker.guest_family import descendants
from casparian_worker.plugin_events import Batch, Failed, RunRequest, Started
from casparian_worker.runtime import PluginRuntime


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginRuntime]:
    folder = tmp_path_factory.mktemp("runtime")
    runtime = PluginRuntime(scratch_root=str(folder / "scratch"), cache_root=str(folder / "cache"))
    yield runtime
    runtime.close()


@pytest.fixture
def others() -> set[int]:
    """Processes of this one that were there before the test."""
    return set(descendants(os.getpid()))


@pytest.fixture
def bench(runtime: PluginRuntime, tmp_path: Path, others: set[int]) -> Iterator[Bench]:
    bench = Bench(runtime, tmp_path)
    yield bench
    bench.close()
    assert set(descendants(os.getpid())) <= others, "a plugin process outlived its host"


def test_published_rows_arrive_under_their_topics(bench: Bench) -> None:
    run = bench.run(
        handler(
            """
            self.publish("a", [{"x": 1}, {"x": 2}])
            self.publish("b", [{"y": open(file_path).read()}])
            """
        )
    )
    assert run.started
    assert run.rows("a") == [{"x": 1}, {"x": 2}]
    assert run.rows("b") == [{"y": "hello\n"}]
    assert (run.finished.rows, run.finished.batches) == (3, 2)


def test_a_returned_data_frame_goes_to_the_manifest_topic(bench: Bench) -> None:
    run = bench.run(handler("import pandas as pd\nreturn pd.DataFrame({'n': [1, 2]})"))
    assert run.rows() == [{"n": 1}, {"n": 2}]


def test_consume_receives_the_version_and_its_metadata(bench: Bench) -> None:
    source = """
    from casparian_flow.sdk import *
    class Handler(BasePlugin):
        def consume(self, event):
            self.publish("t", [{"id": event.file_id, "hash": event.metadata["content_hash"]}])
    """
    host = bench.host(source)
    request = RunRequest("k", bench.file(), 999, metadata={"content_hash": "ab"})
    assert collect(host.run(request))["k"].rows("t") == [{"id": 999, "hash": "ab"}]


def test_configure_receives_the_parameters_once_per_process(bench: Bench) -> None:
    source = """
    from casparian_flow.sdk import *
    class Handler(BasePlugin):
        calls = 0
        def configure(self, ctx, config):
            self.calls += 1
            self.config = config
            self.name = ctx.plugin_name
        def execute(self, path):
            row = {"calls": self.calls, "factor": self.config["factor"], "n": self.name}
            self.publish("t", [row])
    """
    host = bench.host(source, parameters='{"factor": 3}')
    for _ in range(2):
        assert bench.again(host).rows("t") == [{"calls": 1, "factor": 3, "n": "under_test"}]


def test_a_topic_without_rows_still_arrives_with_its_columns(bench: Bench) -> None:
    run = bench.run(
        handler("import pyarrow as pa\nself.publish('t', pa.table({'a': [1]}).slice(1))")
    )
    assert run.table("t").num_rows == 0
    assert run.table("t").column_names == ["a"]


def test_many_small_publishes_arrive_as_few_batches(bench: Bench) -> None:
    run = bench.run(handler("for i in range(5000):\n    self.publish('t', [{'i': i}])"))
    assert [row["i"] for row in run.rows("t")] == list(range(5000))
    assert run.finished.batches < 5


def test_an_exception_is_a_plugin_error_with_its_line(bench: Bench) -> None:
    failed = bench.run(handler("print('reading')\nraise ValueError('no header')")).failed
    assert failed.reason is Reason.PLUGIN_ERROR
    assert failed.message == "ValueError: no header (line 7)"
    assert failed.transient is None
    assert failed.log_tail.startswith("reading\nTraceback")
    assert "raise ValueError('no header')" in failed.log_tail


@pytest.mark.parametrize(
    ("kind", "transient"), [("TransientError", True), ("PermanentError", False)]
)
def test_a_plugin_may_say_whether_trying_again_helps(
    bench: Bench, kind: str, transient: bool
) -> None:
    failed = bench.run(handler(f"raise {kind}('because')")).failed
    assert failed.reason is Reason.PLUGIN_ERROR
    assert failed.transient is transient


def test_data_of_no_accepted_kind_is_a_clear_type_error(bench: Bench) -> None:
    failed = bench.run(handler("self.publish('t', 'text')")).failed
    assert failed.message.startswith("TypeError: cannot publish str.")


def test_a_class_by_another_name_is_told_so(bench: Bench) -> None:
    source = "from casparian_flow.sdk import *\nclass Parser(BasePlugin): pass\n"
    host = bench.host(source)
    begun = time.monotonic()
    failed = bench.again(host).failed
    took = time.monotonic() - begun
    assert failed.reason is Reason.PLUGIN_INVALID
    assert failed.message == "plugin class must be named Handler (found: Parser)"
    begun = time.monotonic()
    assert bench.again(host).failed.message == failed.message
    assert time.monotonic() - begun < took / 2, "the verdict on a plugin version is remembered"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "plugin class must be named Handler (found no class)"),
        ("class Handler: pass", "Handler must derive from casparian_flow.sdk.BasePlugin"),
        (
            "from casparian_flow.sdk import *\nclass Handler(BasePlugin): pass",
            "Handler must define execute(file_path) or consume(event)",
        ),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' (line 1)"),
        ("def broken(:", "SyntaxError: invalid syntax (under_test.py, line 1)"),
    ],
)
def test_source_that_cannot_be_a_plugin_is_invalid(bench: Bench, source: str, message: str) -> None:
    failed = bench.run(source).failed
    assert failed.reason is Reason.PLUGIN_INVALID
    assert failed.message == message


def test_nothing_of_the_worker_can_be_imported(bench: Bench) -> None:
    for module in ("casparian_flow.domain", "casparian_flow.db", "casparian_worker.plugin_host"):
        failed = bench.run(f"import {module}").failed
        assert failed.message.startswith("ModuleNotFoundError")


def test_an_endless_loop_times_out(bench: Bench) -> None:
    begun = time.monotonic()
    failed = bench.run(handler("print('in')\nwhile True: pass"), timeout_s=0.5).failed
    assert failed.reason is Reason.TIMEOUT
    assert failed.message == "the plugin ran longer than 0.5 s"
    assert failed.log_tail == "in\n"
    assert time.monotonic() - begun < 5


def test_the_callers_own_time_does_not_count_towards_the_timeout(bench: Bench) -> None:
    host = bench.host(handler("self.publish('t', [{'a': 1}])\nreturn [{'b': 1}]"), timeout_s=1.5)
    for event in host.run(RunRequest("k", bench.file())):
        time.sleep(0.8)
        assert not isinstance(event, Failed), event


def test_too_much_memory_is_named(bench: Bench) -> None:
    body = "import time\nheld = [bytearray(b'x' * (8 << 20)) for _ in range(60)]\ntime.sleep(20)"
    failed = bench.run(handler(body), memory_mb=300).failed
    assert failed.reason is Reason.OUT_OF_MEMORY
    assert "more than its limit of 300 MiB" in failed.message


def test_memory_of_child_processes_counts(bench: Bench) -> None:
    body = """
    import os, time
    for _ in range(4):
        if os.fork() == 0:
            held = bytearray(b'x' * (100 << 20))
            time.sleep(20)
    time.sleep(20)
    """
    failed = bench.run(handler(body), memory_mb=300).failed
    assert failed.reason is Reason.OUT_OF_MEMORY


def test_one_huge_allocation_is_refused_at_once(bench: Bench) -> None:
    failed = bench.run(handler("held = bytearray(40 << 30)"), memory_mb=300).failed
    assert failed.reason is Reason.OUT_OF_MEMORY
    assert failed.message.startswith("MemoryError")


def test_a_segmentation_fault_is_named(bench: Bench) -> None:
    failed = bench.run(handler("import ctypes\nprint('before')\nctypes.string_at(8)")).failed
    assert failed.reason is Reason.CRASHED
    assert failed.message == "the plugin process was ended by SIGSEGV"
    assert failed.log_tail == "before\n"


def test_an_abort_and_a_suicide_are_crashes(bench: Bench) -> None:
    assert "SIGABRT" in bench.run(handler("import os\nos.abort()")).failed.message
    failed = bench.run(handler("import os\nos.kill(os.getpid(), 9)")).failed
    assert failed.reason is Reason.CRASHED
    assert "SIGKILL" in failed.message


@pytest.mark.parametrize("code", [0, 3])
def test_leaving_by_sys_exit_or_os_exit_is_no_success(bench: Bench, code: int) -> None:
    failed = bench.run(handler(f"import sys\nsys.exit({code})")).failed
    assert failed.reason is Reason.EXITED
    assert failed.message == f"the plugin called sys.exit({code})"
    failed = bench.run(handler(f"import os\nos._exit({code})")).failed
    assert failed.reason is Reason.EXITED
    assert f"exit code {code}" in failed.message


def test_a_gigabyte_of_output_leaves_a_bounded_tail(bench: Bench) -> None:
    body = """
    import os
    block = b'x' * (1 << 20)
    for _ in range(1024):
        os.write(1, block)
    print('last words')
    """
    run = bench.run(handler(body))
    assert run.finished.log_tail.endswith("last words\n")
    assert len(run.finished.log_tail) < 4096 + 100
    assert "bytes before this were not kept" in run.finished.log_tail


def test_a_fork_bomb_ends_at_its_limit(bench: Bench) -> None:
    body = "import os, time\nwhile True:\n    os.fork()"
    failed = bench.run(handler(body), pids=24).failed
    assert failed.reason is Reason.SANDBOX
    assert "limit of 24 processes" in failed.message


def test_escaped_and_orphaned_children_die_with_the_job(bench: Bench) -> None:
    body = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
        os._exit(0)
    os.wait()
    raise ValueError('leaving an orphan behind')
    """
    assert bench.run(handler(body)).failed.reason is Reason.PLUGIN_ERROR
    # The fixture asserts that no process is left.


def test_a_forked_copy_cannot_speak_for_the_plugin(bench: Bench) -> None:
    body = """
    import os
    child = os.fork()
    if child == 0:
        return [{'who': 'child'}]
    os.waitpid(child, 0)
    return [{'who': 'parent'}]
    """
    assert bench.run(handler(body)).rows() == [{"who": "parent"}]


def test_closing_the_bridge_is_a_truncation(bench: Bench) -> None:
    body = "import os, time\nos.closerange(3, 200)\ntime.sleep(30)"
    failed = bench.run(handler(body)).failed
    assert failed.reason is Reason.TRUNCATED


@pytest.mark.parametrize(
    "bytes_",
    [
        "b'\\xff' * 64",
        "struct.pack('!BBHIQ', 7, 0, 0, 99, 0)",  # END of a job that does not run
        "struct.pack('!BBHIQ', 6, 0, 1, 1, 1 << 60) + b't'",  # a batch of an exabyte
        "struct.pack('!BBHIQ', 6, 0, 1, 1, 4) + b'tabcd'",  # a batch that is no Arrow
        "struct.pack('!BBHIQ', 6, 0, 3, 1, 0) + b'../'",  # an impossible topic
        "struct.pack('!BBHIQ', 8, 0, 0, 1, 2) + b'[]'",  # an error that is no object
    ],
)
def test_nonsense_on_the_bridge_fails_the_job_alone(bench: Bench, bytes_: str) -> None:
    body = f"""
    import os, struct, stat, time
    for fd in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, {bytes_})
        except OSError:
            pass
    time.sleep(30)
    """
    failed = bench.run(handler(body)).failed
    assert failed.reason is Reason.PROTOCOL
    assert failed.message.startswith("the plugin process broke the bridge protocol")


def test_the_process_is_replaced_after_an_error_and_after_its_share_of_files(bench: Bench) -> None:
    body = """
    import os, random
    if 'bad' in file_path: raise ValueError
    return [{'process': PROCESS}]
    """
    before = "import os\nPROCESS = os.urandom(8).hex()"
    host = bench.host(handler(body, before=before), recycle_after=3)
    ids = [bench.again(host).rows()[0]["process"] for _ in range(4)]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert bench.again(host, path=bench.file("bad.txt")).failed.reason is Reason.PLUGIN_ERROR
    assert bench.again(host).rows()[0]["process"] not in ids


def test_the_process_is_replaced_when_it_has_grown(bench: Bench) -> None:
    before = "import os, time\nPROCESS = os.urandom(8).hex()\nHELD = []"
    body = "HELD.append(b'x' * (300 << 20))\ntime.sleep(0.3)\nreturn [{'process': PROCESS}]"
    host = bench.host(handler(body, before=before), memory_mb=500)
    first, second = (bench.again(host).rows()[0]["process"] for _ in range(2))
    assert first != second


def test_cancel_from_another_thread_stops_a_running_job_at_once(bench: Bench) -> None:
    host = bench.host(handler("import time\ntime.sleep(60)"))
    events = host.run(RunRequest("k", bench.file()))
    assert isinstance(next(events), Started)
    begun = time.monotonic()
    threading.Timer(0.2, host.cancel, ["k"]).start()
    outcome = list(events)[-1]
    assert isinstance(outcome, Failed)
    assert outcome.reason is Reason.CANCELLED
    assert time.monotonic() - begun < 15


def test_cancel_of_waiting_jobs_leaves_the_running_one_alone(bench: Bench) -> None:
    body = "import time\ntime.sleep(0.5)\nreturn [{'a': 1}]"
    host = bench.host(handler(body))
    for key in "abc":
        host.submit(RunRequest(key, bench.file()))
    events = []
    while host.in_flight:
        event = host.next_event()
        assert event is not None
        events.append(event)
        if isinstance(event, Started) and event.key == "a":
            host.cancel("b")
    runs = collect(events)
    assert runs["a"].rows() == runs["c"].rows() == [{"a": 1}]
    assert runs["b"].failed.reason is Reason.CANCELLED


def test_stop_from_another_thread_ends_a_run(bench: Bench) -> None:
    host = bench.host(handler("import time\ntime.sleep(60)"))
    events = host.run(RunRequest("k", bench.file()))
    next(events)
    threading.Timer(0.2, host.stop).start()
    assert list(events) == []


def test_leaving_a_run_early_ends_the_process(bench: Bench, others: set[int]) -> None:
    host = bench.host(handler("import time\nself.publish('t', [{'a': 1}])\ntime.sleep(60)"))
    events = host.run(RunRequest("k", bench.file()))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert set(descendants(os.getpid())) <= others


def test_a_crash_is_charged_to_the_file_begun_and_the_others_run(bench: Bench) -> None:
    body = """
    import os, signal
    if 'bad' in file_path:
        print('about to crash')
        os.kill(os.getpid(), signal.SIGSEGV)
    print('fine', os.path.basename(file_path))
    return [{'name': os.path.basename(file_path)}]
    """
    host = bench.host(handler(body))
    names = ["a", "b", "bad", "c", "d"]
    for name in names:
        host.submit(RunRequest(name, bench.file(name)))
    events = []
    while host.in_flight:
        event = host.next_event()
        assert event is not None
        events.append(event)
    runs = collect(events)
    assert runs["bad"].failed.reason is Reason.CRASHED
    assert runs["bad"].failed.log_tail == "about to crash\n"
    for name in ("a", "b", "c", "d"):
        assert runs[name].rows() == [{"name": name}]
        assert runs[name].finished.log_tail == f"fine {name}\n"


def test_a_kernel_out_of_memory_kill_is_told_from_a_crash(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from casparian_worker import guest_family

    counts = iter([5, 6])
    monkeypatch.setattr(guest_family, "oom_kills", lambda: next(counts))
    failed = bench.run(handler("import os\nos.kill(os.getpid(), 9)")).failed
    assert failed.reason is Reason.OUT_OF_MEMORY


def test_a_killed_launcher_takes_the_whole_family_along(bench: Bench) -> None:
    host = bench.host(handler("import time\ntime.sleep(60)"))
    events = host.run(RunRequest("k", bench.file()))
    next(events)
    assert host._warm is not None
    os.kill(host._warm.process.pid, signal.SIGKILL)
    assert isinstance(list(events)[-1], Failed)


def test_a_wide_stream_of_rows_flows_in_bounded_batches(bench: Bench) -> None:
    body = """
    import pandas as pd
    for part in range(4):
        yield pd.DataFrame({'n': range(part * 200_000, (part + 1) * 200_000)})
    """
    run = bench.run(handler(body))
    assert run.finished.rows == 800_000
    assert all(b.batch.num_rows <= 65_536 for b in run.batches)
    assert run.table()["n"].to_pylist()[::100_000] == list(range(0, 800_000, 100_000))


def test_events_hold_arrow_batches(bench: Bench) -> None:
    host = bench.host(handler("return [{'a': 1}]"))
    kinds = [type(event).__name__ for event in host.run(RunRequest("k", bench.file()))]
    assert kinds == ["Started", Batch.__name__, "Finished"]
