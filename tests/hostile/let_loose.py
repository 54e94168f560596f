"""Runs hostile sources without any sandbox, each in a forked process: the controls.

    python let_loose.py        one JSON line in {"source", "folder"}, one out {"output"}

A test whose attack fails even here proves nothing about the sandbox.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 20.0


def run(source: str, folder: str) -> str:
    """All that the source says: its rows, its prints and its error."""
    path = os.path.join(folder, "hostile.py")
    Path(path).write_text(source)
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            _be_plugin(path, folder)
        _wait(child)
        told.seek(0)
        return told.read().decode("utf-8", "replace")


def _be_plugin(path: str, folder: str) -> None:
    from hostile.driver import rows_of

    try:
        os.setsid()
        os.chdir(folder)
        print(rows_of(path))
        sys.stdout.flush()
    finally:
        os._exit(0)


def _wait(child: int) -> None:
    until = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.002)


def main() -> None:
    for library in ("numpy", "pandas", "pyarrow"):  # what most sources import, once for all
        importlib.import_module(library)

    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryDirectory(dir=order["folder"]) as folder:
            output = run(order["source"], folder)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"output": output}), flush=True)


if __name__ == "__main__":
    main()
