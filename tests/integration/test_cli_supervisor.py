"""The supervisor with real child processes: output, restarts, the order of draining, orphans."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from casparian_flow.cli import supervisor as module
from casparian_flow.cli.supervisor import Child, Death, Plan, State, Supervisor, told_exit
from casparian_flow.domain.clock import SystemClock

TRAP = """
import signal, sys, time
def leave(*_):
    print("leaving", flush=True)
    time.sleep({slow})
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(60)
"""


def python(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", *arguments]


class Stage:
    """A supervisor and everything its children said."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.deaths: list[Death] = []
        self.supervisor = Supervisor(
            SystemClock(),
            lambda name, line: self.lines.append((name, line)),
            make_command=python,
            first_delay_s=0.05,
        )

    def add(self, name: str, code: str, *, stage: int = 0, grace_s: float = 10.0) -> Child:
        return self.supervisor.add(Plan(name, (textwrap.dedent(code),), stage, grace_s))

    def until(self, condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, (self.lines, self.deaths)
            self.deaths += self.supervisor.poll(0.05)


@pytest.fixture
def stage() -> Iterator[Stage]:
    one = Stage()
    yield one
    for child in one.supervisor.children:
        if child.process is not None and child.process.poll() is None:
            child.process.kill()
            child.process.wait()
        if child.process is not None and child.process.stdout is not None:
            child.process.stdout.close()


def test_lines_are_passed_on_with_the_childs_name_whole_and_bounded(stage: Stage) -> None:
    stage.add("a", "import sys; sys.stdout.write('one\\ntw'); sys.stdout.flush(); print('o')")
    stage.add("b", "print('x' * 100_000); print('end', end='')")
    stage.until(lambda: len(stage.deaths) == 2)
    assert [line for name, line in stage.lines if name == "a"] == ["one", "two"]
    long = [line for name, line in stage.lines if name == "b"]
    assert long[-1] == "end"
    assert max(map(len, long)) <= module.LINE_BYTES_MAX


def test_a_child_that_dies_is_reported_and_started_again_with_growing_delay(stage: Stage) -> None:
    child = stage.add("a", "raise SystemExit(9)")
    stage.until(lambda: len(stage.deaths) == 3)
    assert [d.exit_code for d in stage.deaths] == [9, 9, 9]
    assert child.delay_s == pytest.approx(0.2)


@pytest.mark.parametrize("code", [0, 2, 6])
def test_an_orderly_end_and_a_hopeless_one_are_not_started_again(stage: Stage, code: int) -> None:
    child = stage.add("a", f"raise SystemExit({code})")
    stage.until(lambda: stage.deaths)
    assert child.state is State.ENDED


def test_draining_goes_stage_by_stage_and_waits_for_each(stage: Stage) -> None:
    for number, name in enumerate(("scout", "worker", "sentinel")):
        stage.add(name, TRAP.format(slow=0.3), stage=number)
    stage.until(lambda: [line for _, line in stage.lines] == ["ready"] * 3)
    stage.supervisor.drain(hurry=lambda: False)
    leaving = [name for name, line in stage.lines if line == "leaving"]
    assert leaving == ["scout", "worker", "sentinel"]
    assert all(c.exit_code == 0 for c in stage.supervisor.children)


def test_a_child_that_does_not_leave_within_its_grace_is_killed(stage: Stage) -> None:
    child = stage.add("deaf", TRAP.format(slow=60), grace_s=0.3)
    stage.until(lambda: stage.lines)
    stage.supervisor.drain(hurry=lambda: False)
    assert child.exit_code == -signal.SIGKILL


def test_being_in_a_hurry_kills_at_once(stage: Stage) -> None:
    child = stage.add("deaf", TRAP.format(slow=60), grace_s=60)
    stage.until(lambda: stage.lines)
    began = time.monotonic()
    stage.supervisor.drain(hurry=lambda: True)
    assert time.monotonic() - began < 5
    assert child.exit_code == -signal.SIGKILL


def test_a_flood_of_output_neither_blocks_nor_fills_memory(stage: Stage) -> None:
    flood = "import os\nfor _ in range(400): os.write(1, b'y' * 65536)"
    child = stage.add("flood", flood)
    stage.until(lambda: stage.deaths)
    assert child.exit_code == 0
    assert len(child.partial) <= module.LINE_BYTES_MAX


def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    """The parent is killed with SIGKILL; the kernel ends what it had started."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
            import os, subprocess, sys, time
            child = (
                "import os, time; from casparian_flow.cli.process import die_with_parent; "
                f"die_with_parent({os.getpid()}); print(os.getpid(), flush=True); time.sleep(60)"
            )
            subprocess.Popen([sys.executable, "-c", child], process_group=0)
            time.sleep(60)
        """)
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    code = "from casparian_flow.cli.process import die_with_parent; die_with_parent(1); print('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"")


def test_an_exit_is_told_in_words() -> None:
    assert told_exit(-signal.SIGSEGV) == "ended by SIGSEGV"
    assert told_exit(-200) == "ended by signal 200"
    assert told_exit(1) == "ended with exit code 1"
