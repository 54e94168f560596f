"""The output root: the folder under which relative sinks write, and its identity.

Two workers may call different folders `output`. A file `.casparian-root` in the folder holds a
random id, made once; the id is part of every sink's identity, so that only a worker that sees the
same folder is asked to publish what another one staged there.

    <root>/.casparian-root     the id
    <root>/.stage/             everything staged and not yet published: {token}.{n}
    <root>/.slices/            files in place per slice, for `replace` and `error` sinks

Only Casparian's own processes write here (plugins are sandboxed away from it), so paths are
checked when they are used, not against a racing attacker with write access to the root.
"""

import os
import re
import stat
from typing import Final

from casparian_flow.domain.clock import system_random
from casparian_flow.domain.errors import SinkError
from casparian_worker.sinks.durable import DirectorySync, fsync_directory, fsync_file, sink_error

_ID_FILE: Final = ".casparian-root"
_ID: Final = re.compile(r"[0-9a-f]{16}")
STAGE_FOLDER: Final = ".stage"
SLICE_FOLDER: Final = ".slices"


class OutputRoot:
    """An open output root.

    Attributes:
        path: absolute, without symbolic links.
        root_id: 16 hex digits.
        directories: shared fsync of directories, for all sinks of this process.
    """

    def __init__(self, path: str, root_id: str) -> None:
        self.path = path
        self.root_id = root_id
        self.directories = DirectorySync()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "OutputRoot":
        """Open the folder, making it and its id if it has none yet.

        Raises:
            SinkError: it cannot be made or written to, or its id file is damaged.
        """
        real = os.path.realpath(path)
        try:
            os.makedirs(os.path.join(real, STAGE_FOLDER), exist_ok=True)
            return cls(real, _read_id(real) or _make_id(real))
        except OSError as error:
            raise sink_error(error, "use the output root", real) from error

    @property
    def stage_folder(self) -> str:
        return os.path.join(self.path, STAGE_FOLDER)

    def resolve(self, relative: str) -> str:
        """Absolute path of something below the root, of which nothing need exist yet.

        Raises:
            SinkError: the path leaves the root, or a part of it is a symbolic link.
        """
        parts = _parts(relative)
        current = self.path
        for part in parts:
            current = os.path.join(current, part)
            self._refuse_link(current, relative)
        return current

    def folder(self, relative: str) -> str:
        """Like `resolve`, and make the folder, durably, where it is missing.

        Raises:
            SinkError: as `resolve`, or it cannot be made.
        """
        current = self.path
        for part in _parts(relative):
            parent, current = current, os.path.join(current, part)
            self._refuse_link(current, relative)
            try:
                os.mkdir(current)
            except FileExistsError:
                if not os.path.isdir(current):
                    raise SinkError(f"{current} is in the way: it is no folder") from None
                continue
            except OSError as error:
                raise sink_error(error, "make the folder", current) from error
            self.directories.sync(parent)
        return current

    def relative(self, absolute: str) -> str:
        """The path below the root, as the manifest records it."""
        return os.path.relpath(absolute, self.path)

    def _refuse_link(self, path: str, relative: str) -> None:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        except OSError as error:
            raise sink_error(error, "look at", path) from error
        if stat.S_ISLNK(mode):
            raise SinkError(
                f"output path {relative!r}: {path} is a symbolic link",
                hint="Symbolic links below the output root are not followed; mount or move "
                "the target there, or make it the output root.",
            )


def _parts(relative: str) -> list[str]:
    parts = [part for part in relative.split("/") if part]
    if relative.startswith("/") or "\0" in relative or any(part in (".", "..") for part in parts):
        raise SinkError(f"output path {relative!r} leaves the output root")
    return parts


def _read_id(root: str) -> str:
    path = os.path.join(root, _ID_FILE)
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(64).strip()
    except FileNotFoundError:
        return ""
    if not _ID.fullmatch(text):
        raise SinkError(
            f"{path} is damaged: it should hold 16 hex digits",
            hint="Restore it from a backup; a new id would orphan what was staged under the old.",
        )
    return text


def _make_id(root: str) -> str:
    """Write a fresh id under a name of its own and link it into place; the first one wins."""
    rng = system_random()
    fresh = f"{rng.getrandbits(64):016x}"
    draft = os.path.join(root, STAGE_FOLDER, f"root-id.{rng.getrandbits(64):016x}")
    with open(draft, "x", encoding="ascii") as file:
        file.write(fresh + "\n")
    try:
        fsync_file(draft)
        os.link(draft, os.path.join(root, _ID_FILE))
    except FileExistsError:
        return _read_id(root)
    finally:
        os.unlink(draft)
    fsync_directory(root)
    return fresh
