"""Child processes that never outlive the bench, and the files they say things to."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PYTHON = sys.executable
PATIENCE_S = 120.0
_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
_libc = ctypes.CDLL(None)


def start(
    arguments: Sequence[str], log: Path, *, variables: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a process in the repository's folder; it dies with this one."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        return subprocess.Popen(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd=REPOSITORY,
            env={**os.environ, **(variables or {})},
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - it makes one system call
        )


def stop(process: "subprocess.Popen[bytes]", timeout_s: float = 30.0) -> None:
    """Ask a process to end, and end it if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait(10)


@contextmanager
def running(
    arguments: Sequence[str], log: Path, *, variables: Mapping[str, str] | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    process = start(arguments, log, variables=variables)
    try:
        yield process
    finally:
        stop(process)


def wait_for(
    what: str, condition: Callable[[], bool], *, poll_s: float = 0.01, timeout_s: float = PATIENCE_S
) -> None:
    """Poll until `condition` is true.

    Raises:
        TimeoutError: it never was.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(poll_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    # Nothing but one system call: other threads may hold any lock at the moment of the fork.
    _libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
