"""What is made once and kept outside the tree, under a hash of all that goes into it.

An entry appears whole or not at all: it is made under another name, under a lock, and renamed.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cluster.harness.progress import say

# Read once at import, since tests run without variables of ours in their environment.
ROOT = Path(
    os.environ.get("CASPARIAN_CLUSTER_CACHE") or Path.home() / ".cache" / "casparian-cluster"
)
UNUSED_DAYS_MAX = 14
_DIGEST_CHARS = 12


def digest(*parts: str | Path) -> str:
    """A hash over texts and files (their content; a folder counts with all files below it)."""
    whole = hashlib.sha256()
    for part in parts:
        for name, content in _contents(part):
            whole.update(f"{name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:_DIGEST_CHARS]


def _contents(part: str | Path) -> Iterator[tuple[str, bytes]]:
    if isinstance(part, str):
        yield "", part.encode()
    elif part.is_dir():
        for path in sorted(path for path in part.rglob("*") if path.is_file()):
            mode = "x" if os.access(path, os.X_OK) else ""
            yield f"{path.relative_to(part)}{mode}", path.read_bytes()
    else:
        yield part.name, part.read_bytes()


def is_cached(name: str, inputs: str) -> bool:
    """Whether `cached` would find the entry there."""
    return (ROOT / f"{name}-{inputs}").exists()


def cached(name: str, inputs: str, make: Callable[[Path], None]) -> Path:
    """The entry `name` for these inputs (a digest), made now if it is not there.

    Args:
        make: Makes it, a file or a folder, at the path that it is given.
    """
    target = ROOT / f"{name}-{inputs}"
    if not target.exists():
        with locked(target.name):
            if not target.exists():
                scratch = ROOT / f".{target.name}.part"
                _remove(scratch)
                make(scratch)
                scratch.rename(target)
                _prune(ROOT.glob(f"{name}-{'?' * _DIGEST_CHARS}"), keep=target)
    os.utime(target)
    return target


@contextmanager
def locked(name: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of that name against other processes; tells if it has to wait.

    Args:
        shared: Hold it beside others that share it, against those that do not.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with _lock_file(name) as lock:
        if not _taken(lock, mode):
            say(f"waiting for another process that holds {name}")
            fcntl.flock(lock, mode)
        yield


@contextmanager
def locked_if_free(name: str) -> Iterator[bool]:
    """Hold the lock of that name if nobody holds or shares it; says whether that is so."""
    with _lock_file(name) as lock:
        yield _taken(lock, fcntl.LOCK_EX)


def _lock_file(name: str) -> IO[str]:
    ROOT.mkdir(parents=True, exist_ok=True)
    return (ROOT / f".{name}.lock").open("a")


def _taken(lock: IO[str], mode: int) -> bool:
    try:
        fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prune(entries: Iterable[Path], keep: Path) -> None:
    """Remove what other inputs have made, once it is long unused."""
    oldest = time.time() - UNUSED_DAYS_MAX * 86_400
    for entry in entries:
        if entry != keep and entry.lstat().st_mtime < oldest:
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
