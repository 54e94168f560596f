"""Empties a plugin's scratch folder, however the plugin left it.

A tree may be deeper than recursion, paths or open descriptors go, and its folders may be shut. So
each folder found is first moved up to the top, where it is emptied in its turn: two descriptors
are enough for any depth. Names are resolved below open folders only, so that no symbolic link
leads elsewhere. Standard library only, since it also runs beside the plugin.
"""

import contextlib
import errno
import os

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ROUNDS_MAX = 4
"""Times a folder is gone through again because it was not empty afterwards."""


def empty(folder: str) -> None:
    """Remove all that is in a folder, as far as this process may; a missing one is empty."""
    try:
        top = os.open(folder, _FOLDER)
    except OSError:
        return
    try:
        todo = dict.fromkeys(_clear(top, top), 0)
        while todo:
            name, rounds = todo.popitem()
            todo |= dict.fromkeys(_clear_below(name, top), 0)
            if not _removed(name, top) and rounds < _ROUNDS_MAX:
                # To the front: what was moved up goes first.
                todo = {name: rounds + 1, **todo}
    finally:
        os.close(top)


def remove(folder: str) -> None:
    """Remove a folder and all that is in it, as far as this process may."""
    empty(folder)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _clear_below(name: str, top: int) -> list[str]:
    """Clear a folder in `top`; see `_clear`."""
    try:
        folder = _open(name, top)
    except OSError:
        return []
    try:
        return _clear(folder, top)
    finally:
        os.close(folder)


def _open(name: str, parent: int) -> int:
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)
        folder = os.open(name, _FOLDER, dir_fd=parent)
    with contextlib.suppress(OSError):
        os.fchmod(folder, 0o700)
    return folder


def _clear(folder: int, top: int) -> list[str]:
    """Unlink a folder's files and move its folders to `top`.

    Returns:
        The names that these have there.
    """
    folders: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=folder)
                elif folder == top:
                    folders.append(entry.name)
                elif not _removed(entry.name, folder):
                    folders.append(_moved_up(entry.name, folder, top))
    return folders


def _moved_up(name: str, folder: int, top: int) -> str:
    new = f".gone-{os.urandom(8).hex()}"
    try:
        os.rename(name, new, src_dir_fd=folder, dst_dir_fd=top)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=folder)  # moving it writes to it, for its ".."
        os.rename(name, new, src_dir_fd=folder, dst_dir_fd=top)
    return new


def _removed(name: str, parent: int) -> bool:
    """Remove a folder; False if something is in it."""
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        return error.errno not in {errno.ENOTEMPTY, errno.EEXIST}
    return True
