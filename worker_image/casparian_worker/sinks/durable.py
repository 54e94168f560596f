"""Writing files that are still there after a power cut, and telling people when they cannot be."""

import errno
import hashlib
import os
import threading
from dataclasses import dataclass
from typing import Final

from casparian_flow.domain.errors import DiskFullError, SinkError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PERMANENT: Final = frozenset({errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP})
_WRITE_BUFFER: Final = 1 << 18


def sink_error(error: OSError, action: str, path: str) -> SinkError:
    """Turn an operating system's error into one for people.

    A full disk and most I/O errors are transient: they may pass. A read-only file system or an
    impossible name will not.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        return DiskFullError(
            f"cannot {action} {path}: {reason} (file system mounted at {mount_point(path)})",
            hint="Free space there, or raise the quota or file size limit; the job is retried.",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = f"Let uid {os.geteuid()} write to {os.path.dirname(path) or '.'}."
        return SinkError(f"cannot {action} {path}: {reason}", hint=hint)
    transient = error.errno not in _PERMANENT
    return SinkError(f"cannot {action} {path}: {reason}", transient=transient)


def mount_point(path: str) -> str:
    """The mount point above `path`, which need not exist."""
    current = os.path.abspath(path)
    while not os.path.ismount(current):
        current = os.path.dirname(current)
    return current


def file_sha256(path: str) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        OSError: as opening or reading does.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(slots=True)
class _Turns:
    """fsyncs of one directory: how many began, and the last one that succeeded or failed."""

    running: bool = False
    begun: int = 0
    done: int = 0
    failed: int = 0
    waiting: int = 0


class DirectorySync:
    """fsync of directories, shared between threads.

    Whoever asks while an fsync of the same directory runs is served by the next one, together
    with everybody else who asked meanwhile: many jobs, few fsyncs.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turns: dict[str, _Turns] = {}

    def sync(self, directory: str) -> None:
        """Return once an fsync of `directory` that began after this call has succeeded.

        Raises:
            SinkError: the fsync failed; whether the entries are durable is unknown.
        """
        with self._changed:
            turns = self._turns.setdefault(directory, _Turns())
            wanted = turns.begun + 1
            turns.waiting += 1
            while turns.running and turns.done < wanted and turns.failed < wanted:
                self._changed.wait()
            turns.waiting -= 1
            if turns.failed >= wanted:
                raise SinkError(f"fsync of {directory} failed", transient=True)
            if turns.done >= wanted:
                self._forget_if_idle(directory, turns)
                return
            turns.running = True
            turns.begun += 1
            mine = turns.begun
        self._lead(directory, turns, mine)

    def _lead(self, directory: str, turns: _Turns, mine: int) -> None:
        problem: OSError | None = None
        try:
            fsync_directory(directory)
        except OSError as error:
            problem = error
        with self._changed:
            turns.running = False
            if problem is None:
                turns.done = mine
            else:
                turns.failed = mine
            self._changed.notify_all()
            self._forget_if_idle(directory, turns)
        if problem is not None:
            raise sink_error(problem, "fsync", directory) from problem

    def _forget_if_idle(self, directory: str, turns: _Turns) -> None:
        if not turns.running and not turns.waiting:
            self._turns.pop(directory, None)


def fsync_directory(directory: str) -> None:
    """fsync one directory, so that the names in it survive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashingFile:
    """A new file, written through a SHA-256; readable as a binary file object by pyarrow.

    Attributes:
        path: where it is written; it must not exist before.
        size: bytes written so far.

    Raises:
        OSError: as the operating system reports it, from every method.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = os.open(path, flags, 0o644)
        self._pending: list[bytes] = []
        self._pending_size = 0
        self.closed = False

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self.size

    def write(self, data: bytes | memoryview) -> int:
        """Take bytes; they are buffered, hashed and written in large pieces."""
        piece = bytes(data)
        self._pending.append(piece)
        self._pending_size += len(piece)
        self.size += len(piece)
        if self._pending_size >= _WRITE_BUFFER:
            self.flush()
        return len(piece)

    def flush(self) -> None:
        if not self._pending:
            return
        block = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        self._pending.clear()
        self._pending_size = 0
        self._digest.update(block)
        _write_all(self._handle, block)

    def close(self) -> None:
        """Called by format writers; the file stays open until `commit` or `discard`."""

    def commit(self) -> str:
        """Write out, fsync and close. Returns the hex SHA-256 of all bytes."""
        try:
            self.flush()
            os.fsync(self._handle)
        finally:
            self._close()
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Close without fsync; the file stays where it is. Does nothing the second time."""
        self._pending.clear()
        self._close()

    def _close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._handle)


def _write_all(handle: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(handle, view) :]


def fsync_file(path: str) -> None:
    """fsync a file written by a library.

    Raises:
        OSError: as the operating system reports it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unlink_if_present(path: str) -> bool:
    """Remove a file; False if there was none.

    Raises:
        OSError: as the operating system reports it, but for a missing file.
    """
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
