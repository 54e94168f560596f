"""Which folders a client may look into.

A path counts by where it leads: it is compared after links are resolved, and the folder is then
opened one part at a time from an allowed root without following links, so that nothing swapped
in meanwhile leads elsewhere. What lies outside and what does not exist are told apart to nobody.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.paths import path_to_text, text_to_path

PATH_CHARS_MAX: Final = 4_096
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class OpenFolder:
    """A folder that is in reach.

    Attributes:
        path: absolute, without links, as text (domain/paths.py).
        descriptor: open for listing.
    """

    path: str
    descriptor: int


class AllowList:
    """Folders, and all beneath them.

    Args:
        roots: absolute; one that does not exist allows nothing.
    """

    def __init__(self, roots: Iterable[str | os.PathLike[str]]) -> None:
        spelled = [os.path.normpath(os.fspath(root)) for root in roots]
        self._spelled = tuple(spelled)
        self._roots = tuple(dict.fromkeys(os.path.realpath(root) for root in spelled))

    @property
    def roots(self) -> list[str]:
        """The folders, as text."""
        return [path_to_text(root) for root in self._roots]

    @contextmanager
    def open(self, text: str) -> Iterator[OpenFolder]:
        """The folder at a path, open while the block runs.

        Raises:
            UsageError: no absolute path, or not of a folder that is in reach.
        """
        path = _spelled(text)
        root, parts = self._beneath(path, text)
        descriptor = _open_beneath(root, parts)
        if descriptor is None:
            raise self._refused(text)
        try:
            yield OpenFolder(path_to_text(os.path.join(root, *parts)), descriptor)
        finally:
            os.close(descriptor)

    def named(self, text: str) -> str:
        """The path of a folder on another machine, as it is spelled.

        Raises:
            UsageError: no absolute path, or none in reach.
        """
        path = _spelled(text)
        if not any(_within(path, root) for root in self._spelled):
            raise self._refused(text)
        return path_to_text(path)

    def _beneath(self, path: str, text: str) -> tuple[str, tuple[str, ...]]:
        """The root that `path` is in, and the parts from there, no link among them."""
        # By its spelling first: what is outside is not even looked at.
        if not any(_within(path, root) for root in (*self._spelled, *self._roots)):
            raise self._refused(text)
        try:
            real = os.path.realpath(path, strict=True)
        except (OSError, ValueError):
            raise self._refused(text) from None
        for root in self._roots:
            if _within(real, root):
                return root, PurePosixPath(real).relative_to(root).parts
        raise self._refused(text)

    def _refused(self, text: str) -> UsageError:
        within = ", ".join(self.roots) or "none: no source root is known"
        return UsageError(
            f"{text[:200]!r} is no folder in reach",
            hint=f"Folders in reach: {within}. [mcp] allowed_paths changes that.",
        )


def _spelled(text: str) -> str:
    """The path that a client's text stands for.

    Raises:
        UsageError: not absolute, too long, with ".." or with characters that no path has.
    """
    if not 1 <= len(text) <= PATH_CHARS_MAX:
        raise UsageError(f"a path has 1 to {PATH_CHARS_MAX} characters")
    if any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise UsageError("the path has characters that are not allowed in one")
    path = text_to_path(text)
    if "\0" in path or not path.startswith("/"):
        raise UsageError(f"{text[:200]!r} is no absolute path")
    if ".." in path.split("/"):
        raise UsageError(f"{text[:200]!r}: '..' is not allowed in a path")
    return "/" + os.path.normpath(path).lstrip("/")


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _open_beneath(root: str, parts: Iterable[str]) -> int | None:
    """A descriptor of the folder; None if a link, a file or nothing is on the way."""
    try:
        current = os.open(root, _FOLDER)
    except OSError:
        return None
    for part in parts:
        try:
            below = os.open(part, _FOLDER, dir_fd=current)
        except OSError:
            return None
        finally:
            os.close(current)
        current = below
    return current


def open_subfolder(descriptor: int, parts: Iterable[str]) -> int | None:
    """As `AllowList.open` for parts below a folder that is open; the caller closes it."""
    return _open_beneath(f"/proc/self/fd/{descriptor}/.", parts)
