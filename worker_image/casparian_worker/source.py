"""The input: exactly the bytes of one file version, or a named reason why not.

A plugin opens its input by path, so that a hash taken before or after proves nothing about what it
read. Files up to COPY_BYTES_MAX are therefore copied while they are hashed, and the plugin gets
the copy under the same base name. Larger ones are hashed, used in place, and compared afterwards
by `verify`; what remains is a file changed and restored within the same clock tick.
"""

import errno
import hashlib
import os
import shutil
import stat
from typing import Self

from casparian_flow.domain.clock import Clock
from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.records import Sample
from casparian_flow.domain.signature import Signature, is_racy, signature_of
from casparian_worker.sandbox import reachable
from casparian_worker.scratch import SlotScratch

COPY_BYTES_MAX = 64 * 1024 * 1024
_CHUNK = 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class SourceError(CasparianError):
    """The file version cannot be given to a plugin.

    Attributes:
        reason: SOURCE_CHANGED, SOURCE_MISSING, SOURCE_UNREADABLE or DISK_FULL.
    """

    def __init__(self, reason: Reason, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class Source:
    """An input in place. Close it when the job is over.

    Attributes:
        path: what the plugin opens.
        in_place: whether that is the source itself and not a copy.
    """

    def __init__(self, path: str, *, folder: str = "", original: "_Original | None" = None) -> None:
        self.path = path
        self.in_place = original is not None
        self._folder = folder
        self._original = original

    def verify(self) -> None:
        """Make sure, after the plugin has run, that the file was the same all along.

        Raises:
            SourceError: it was not, or that can no longer be told.
        """
        if self._original is not None:
            self._original.verify()

    def close(self) -> None:
        """Remove the copy."""
        if self._folder:
            try:
                # Cheaper than a walk, and enough: the plugin cannot write here.
                os.unlink(self.path)
                os.rmdir(self._folder)
            except OSError:
                shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(
    path: str,
    *,
    content_hash: str,
    size: int,
    scratch: SlotScratch,
    clock: Clock,
    copy_limit: int = COPY_BYTES_MAX,
) -> Source:
    """Make a file version's bytes available to a slot's plugin.

    Args:
        path: as Python's os functions take it (domain/paths.text_to_path).
        content_hash: SHA-256, hex, that the bytes must have.
        size: bytes the version has; another size is told without reading.
        copy_limit: largest file that is copied though it could be read in place.

    Raises:
        SourceError: changed, missing, unreadable, or no space for the copy.
    """
    hashed_at_us = clock.now().wall_us
    descriptor = _open(path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(Reason.SOURCE_CHANGED, "it is no regular file any more")
        if status.st_size != size:
            raise _changed(f"its size is {status.st_size} bytes, not {size}")
        copy = size <= copy_limit or (scratch.uid and not reachable(path))
        if copy:
            return _copied(path, descriptor, content_hash, size, scratch)
        if _hash(descriptor) != content_hash:
            raise _changed("its bytes are not this version's")
        original = _Original(path, content_hash, signature_of(status), hashed_at_us)
        original.check_signature()
        return Source(path, original=original)
    finally:
        os.close(descriptor)


def sample_source(sample: Sample, scratch: SlotScratch) -> Source:
    """A plugin's own sample as its input.

    Raises:
        SourceError: it cannot be written.
    """
    folder = ""
    try:
        folder = scratch.new_input("sample")
        target = os.path.join(folder, sample.name)
        with open(os.open(target, _NEW_FILE, 0o640), "wb", buffering=0) as file:
            file.write(sample.content)
            scratch.show(file.fileno(), 0o440)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if error.errno in _FULL:
            raise SourceError(
                Reason.DISK_FULL, "no space left for a sample", hint="Free scratch space."
            ) from error
        raise _unreadable(error) from error
    return Source(target, folder=folder)


class _Original:
    """A file used in place, with what is needed to tell whether it changed."""

    def __init__(
        self, path: str, content_hash: str, signature: Signature, hashed_at_us: int
    ) -> None:
        self._path = path
        self._hash = content_hash
        self._signature = signature
        self._hashed_at_us = hashed_at_us

    def check_signature(self) -> None:
        try:
            status = os.lstat(self._path)
        except OSError as error:
            raise _changed("it was removed while it was read") from error
        if signature_of(status) != self._signature:
            raise _changed("it changed while it was read")

    def verify(self) -> None:
        self.check_signature()
        if is_racy(self._signature, self._hashed_at_us):
            descriptor = _open(self._path)
            try:
                if _hash(descriptor) != self._hash:
                    raise _changed("it changed while it was read")
            finally:
                os.close(descriptor)
            self.check_signature()


def _open(path: str) -> int:
    try:
        # Not following links and not waiting for a FIFO's writer.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceError(Reason.SOURCE_MISSING, "the file is no longer at its path") from error
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise _changed("it is no regular file any more") from error
        raise _unreadable(error) from error


def _copied(path: str, source: int, content_hash: str, size: int, scratch: SlotScratch) -> Source:
    folder = ""
    try:
        folder = scratch.new_input("job")
        target = os.path.join(folder, os.path.basename(path))
        with open(os.open(target, _NEW_FILE, 0o640), "wb", buffering=0) as file:
            found = _copy(source, file.fileno(), size)
            scratch.show(file.fileno(), 0o440)
        if found != content_hash:
            raise _changed("its bytes are not this version's")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if error.errno in _FULL:
            raise SourceError(
                Reason.DISK_FULL, "no space left for the input's copy", hint="Free scratch space."
            ) from error
        raise _unreadable(error) from error
    except SourceError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Source(target, folder=folder)


def _copy(source: int, target: int, size: int) -> str:
    """Copy and hash; stops one byte beyond `size`, where the file has grown."""
    digest = hashlib.sha256()
    left = size + 1
    while left > 0 and (chunk := os.read(source, min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
    return digest.hexdigest()


def _hash(descriptor: int) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        while count := os.readv(descriptor, [view]):
            digest.update(view[:count])
    except OSError as error:
        raise _unreadable(error) from error
    return digest.hexdigest()


def _changed(what: str) -> SourceError:
    return SourceError(Reason.SOURCE_CHANGED, what)


def _unreadable(error: OSError) -> SourceError:
    return SourceError(
        Reason.SOURCE_UNREADABLE,
        f"the file could not be read: {error.strerror or error}",
        hint="Check the file's permissions and its disk.",
    )
