"""Where benches write: one temporary folder a run, with a fresh subfolder for every round."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_VARIABLE = "CASPARIAN_BENCH_FOLDER"
"""Names a folder on the disk to be measured; the system's temporary one by default."""
_numbers = itertools.count(1)


def base() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())


@contextmanager
def workspace(name: str) -> Iterator[Path]:
    """A folder for one row, deleted at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"casparian-bench-{name}-", dir=base()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An empty subfolder for one round, deleted afterwards."""
    inner = folder / f"round{next(_numbers)}"
    inner.mkdir()
    try:
        yield inner
    finally:
        shutil.rmtree(inner, ignore_errors=True)
