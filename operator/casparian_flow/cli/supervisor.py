"""One process tree: start children, pass on what they say, restart what dies, drain in order.

    starting --> running --> draining --> ended
                  |   ^
                  v   |  after a delay that doubles, 1 s to 30 s
                waiting

Children have process groups of their own, so that a Ctrl-C on the terminal reaches only this
process, which then stops them one stage after the other. If it is killed, the kernel kills them
(`cli.process.die_with_parent`).
"""

import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from casparian_flow.domain.clock import Clock

FIRST_DELAY_S = 1.0
LAST_DELAY_S = 30.0
HEALTHY_S = 30.0
"""A child that ran for so long starts again with the first delay."""
LINE_BYTES_MAX = 8_192
TAIL_LINES = 20
FINAL_EXIT_CODES = frozenset({2, 6})
"""Wrong configuration and an unusable ledger do not heal by another try."""


class State(Enum):
    NEW = "new"
    RUNNING = "running"
    WAITING = "waiting"
    """Died; will be started again."""
    ENDED = "ended"


@dataclass(frozen=True)
class Plan:
    """What is needed to run one child.

    Attributes:
        stage: children stop in the order of their stages.
        grace_s: seconds between SIGTERM and SIGKILL.
        pass_fds: descriptors that the child inherits.
    """

    name: str
    arguments: tuple[str, ...]
    stage: int
    grace_s: float
    pass_fds: tuple[int, ...] = ()


@dataclass
class Child:
    plan: Plan
    state: State = State.NEW
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = 0.0
    delay_s: float = FIRST_DELAY_S
    """Seconds between its last death and its next start."""
    deaths: int = 0
    """In a row, without a healthy life in between."""
    exit_code: int | None = None
    partial: bytes = b""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))


@dataclass(frozen=True)
class Death:
    """A child ended that was not asked to."""

    child: Child
    exit_code: int
    """As a shell sees it: negative numbers are signals."""


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of a child: this program, bound to this process's life."""
    return [sys.executable, "-m", "casparian_flow.cli", "--die-with", str(os.getpid()), *arguments]


class Supervisor:
    """Runs children until told to drain. Not thread-safe: the thread that starts children must be
    the one that lives longest, because the kernel ties them to it.

    Args:
        say: receives (child's name, line) for everything that children print.
    """

    def __init__(
        self,
        clock: Clock,
        say: Callable[[str, str], None],
        *,
        make_command: Callable[[Sequence[str]], list[str]] = command,
        environment: dict[str, str] | None = None,
        first_delay_s: float = FIRST_DELAY_S,
    ) -> None:
        self._first_delay_s = first_delay_s
        self._clock = clock
        self._say = say
        self._make_command = make_command
        self._environment = environment
        self._selector = selectors.DefaultSelector()
        self.children: list[Child] = []

    def add(self, plan: Plan) -> Child:
        """Start a child."""
        child = Child(plan)
        self.children.append(child)
        self._spawn(child)
        return child

    def poll(self, timeout_s: float, *, restart: bool = True) -> list[Death]:
        """Pass lines on for up to `timeout_s`, reap the dead, start again what is due.

        Returns:
            The deaths since the last call. Those of FINAL_EXIT_CODES, or with `restart` False,
            are not started again.
        """
        self._read(timeout_s)
        now = self._clock.now().mono
        deaths = []
        for child in self.children:
            if child.state is State.RUNNING and child.process is not None:
                code = child.process.poll()
                if code is not None:
                    self._buried(child, code)
                    final = not restart or code in FINAL_EXIT_CODES or code == 0
                    child.state = State.ENDED if final else State.WAITING
                    deaths.append(Death(child, code))
            elif child.state is State.WAITING and restart and now >= child.restart_at:
                self._spawn(child)
        return deaths

    def drain(self, *, hurry: Callable[[], bool]) -> None:
        """Stop all children, stage by stage; each has its grace. `hurry` True: kill the rest."""
        for stage in sorted({c.plan.stage for c in self.children}):
            members = [c for c in self.children if c.plan.stage == stage]
            for child in members:
                if child.state is State.WAITING:
                    child.state = State.ENDED
                self._signal(child, signal.SIGTERM)
            end = self._clock.now().mono + max(c.plan.grace_s for c in members)
            while any(c.state is State.RUNNING for c in members):
                if hurry() or self._clock.now().mono > end:
                    self._kill(members)
                self.poll(0.1, restart=False)
        self.close()

    def kill(self) -> None:
        """End everything at once."""
        self._kill(self.children)
        while any(c.state is State.RUNNING for c in self.children):
            self.poll(0.1, restart=False)
        self.close()

    def close(self) -> None:
        self._selector.close()

    def _spawn(self, child: Child) -> None:
        child.process = subprocess.Popen(
            self._make_command(child.plan.arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment,
            pass_fds=child.plan.pass_fds,
            process_group=0,
        )
        child.started = self._clock.now().mono
        child.tail.clear()
        child.state, child.exit_code, child.partial = State.RUNNING, None, b""
        output = child.process.stdout
        if output is not None:
            os.set_blocking(output.fileno(), False)
            self._selector.register(output, selectors.EVENT_READ, child)

    def _read(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            self._drain_pipe(key.data)

    def _drain_pipe(self, child: Child) -> None:
        output = child.process.stdout if child.process else None
        if output is None or output.closed:
            return
        while chunk := output.read(65_536):
            *lines, child.partial = (child.partial + chunk).split(b"\n")
            for line in lines:
                self._line(child, line)
            if len(child.partial) > LINE_BYTES_MAX:
                self._line(child, child.partial)
                child.partial = b""
        if chunk == b"":
            self._forget_pipe(child)

    def _forget_pipe(self, child: Child) -> None:
        output = child.process.stdout if child.process else None
        if output is not None and not output.closed:
            self._selector.unregister(output)
            output.close()

    def _line(self, child: Child, raw: bytes) -> None:
        text = raw[:LINE_BYTES_MAX].decode("utf-8", "replace").rstrip()
        if text:
            child.tail.append(text)
            self._say(child.plan.name, text)

    def _buried(self, child: Child, code: int) -> None:
        self._drain_pipe(child)
        if child.partial:
            self._line(child, child.partial)
            child.partial = b""
        self._forget_pipe(child)
        child.exit_code = code
        now = self._clock.now().mono
        child.deaths = 1 if now - child.started > HEALTHY_S else child.deaths + 1
        child.delay_s = min(self._first_delay_s * 2.0 ** min(child.deaths - 1, 10), LAST_DELAY_S)
        child.restart_at = now + child.delay_s

    def _signal(self, child: Child, number: signal.Signals) -> None:
        if child.state is State.RUNNING and child.process is not None:
            child.process.send_signal(number)

    def _kill(self, children: Sequence[Child]) -> None:
        for child in children:
            self._signal(child, signal.SIGKILL)


def told_exit(code: int) -> str:
    """How a process ended, for people.

    >>> told_exit(-9)
    'ended by SIGKILL'
    >>> told_exit(3)
    'ended with exit code 3'
    """
    if code < 0:
        try:
            return f"ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"ended by signal {-code}"
    return f"ended with exit code {code}"
