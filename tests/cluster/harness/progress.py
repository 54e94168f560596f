"""Steps that take minutes: told when they begin, while they last and when they end."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.harness.errors import HarnessError

HEARTBEAT_S = 30.0
TAIL_LINES = 25


def say(text: str) -> None:
    """Print a line of progress, to stderr, so that stdout stays for results."""
    print(f"   {text}", file=sys.stderr, flush=True)


@contextmanager
def step(label: str) -> Iterator[None]:
    """Tell of a step, and of the seconds it took."""
    began = time.monotonic()
    say(f"{label} ...")
    yield
    say(f"{label}: {time.monotonic() - began:.1f} s")


def run_logged(
    argv: Sequence[str | Path],
    label: str,
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> None:
    """Run a command with its output in `log`; say every 30 s that it is still at work.

    Raises:
        HarnessError: it is not installed, or ended with another status than 0; the hint has the
            end of its output.
    """
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                [os.fspath(part) for part in argv],
                cwd=cwd,
                env=None if environment is None else {**os.environ, **environment},
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError as error:
            raise HarnessError(f"{label}: {argv[0]} is not installed", "install it") from error
        with process:
            try:
                if stdin is not None and process.stdin is not None:
                    process.stdin.write(stdin)
                    process.stdin.close()
                _wait(process, label, began)
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        raise HarnessError(
            f"{label} failed with status {process.returncode}",
            f"the end of {log}:\n{tail(log)}",
        )


def _wait(process: subprocess.Popen[bytes], label: str, began: float) -> None:
    while True:
        try:
            process.wait(HEARTBEAT_S)
            return
        except subprocess.TimeoutExpired:
            say(f"{label} ... {time.monotonic() - began:.0f} s")


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file, which may be missing."""
    if not log.exists():
        return "(no output)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
