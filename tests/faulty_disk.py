"""A disk that fails when a test says so, for every process that is started with its environment.

faulty_disk.c is compiled with the C compiler on PATH and preloaded; see there for what it does.
"""

import errno
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
RULE = struct.Struct("=IIIIq232s")
RULES = 4
ENDLESS = 1 << 60


class Calls(IntFlag):
    WRITE = 1
    SYNC = 2
    NAME = 4
    """Making files, folders and links, and renaming."""


class FaultyDisk:
    """Rules shared with the processes started in `environment`."""

    def __init__(self, folder: Path) -> None:
        """Compile the library into `folder`.

        Raises:
            RuntimeError: there is no C compiler.
        """
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("these tests need a C compiler: install gcc, or put cc on PATH")
        library = folder / "faulty_disk.so"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"],
            check=True,
            timeout=60,
        )
        page = folder / "faulty_disk.rules"
        page.write_bytes(bytes(RULE.size * RULES))
        with page.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), RULE.size * RULES)
        self.environment = {"LD_PRELOAD": str(library), "FAULTY_DISK": str(page)}

    @contextmanager
    def failing(
        self,
        below: Path,
        error: int = errno.ENOSPC,
        calls: Calls = Calls.WRITE | Calls.NAME,
        *,
        budget: int = 0,
        rule: int = 0,
    ) -> Iterator[None]:
        """While inside, `calls` on what lies below a path fail, writes after `budget` bytes."""
        prefix = os.fsencode(below.resolve())
        record = RULE.pack(0, error, calls, 0, budget, prefix)
        start = rule * RULE.size
        self._page[start : start + RULE.size] = record
        self._page[start] = 1
        try:
            yield
        finally:
            self._page[start] = 0

    def met(self, rule: int = 0) -> int:
        """How many calls the rule has failed since it was set."""
        values = RULE.unpack_from(self._page, rule * RULE.size)
        return int(values[3])

    def close(self) -> None:
        self._page.close()
