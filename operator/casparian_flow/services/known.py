"""What the ledger knows of one source root's files, laid out for comparing many at once."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from casparian_flow.domain.signature import RACY_SLACK_US, Signature

NO_ROW = -1


@dataclass(slots=True)
class Known:
    """The inventory as columns; a row number stands for a file.

    Plain lists of numbers rather than a tuple per file: half the memory, and nothing for the
    garbage collector to walk while 200,000 files are compared. Each of the lists of numbers ends
    with a None that no file's number equals, so that NO_ROW may be looked up.

    Attributes:
        unseen: rel_path → row of every file that the walk has not come across yet.
    """

    paths: list[str]
    version_ids: list[int]
    devs: list[int]
    inos: list[int]
    sizes: list[int]
    mtimes: list[int]
    ctimes: list[int]
    hashed_at: list[int]
    unseen: dict[str, int] = field(init=False)
    _by_inode: dict[int, list[int]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.unseen = dict(zip(self.paths, range(len(self.paths)), strict=True))
        never: Any = None
        for column in (self.devs, self.inos, self.sizes, self.mtimes, self.ctimes):
            column.append(never)

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def read(cls, stream: bytes) -> "Known":
        """Decode `ControlApi.inventory`."""
        with pa.ipc.open_stream(pa.py_buffer(stream)) as reader:
            table = reader.read_all()
        columns: list[Any] = [table.column(name).to_pylist() for name in _COLUMNS]
        return cls(*columns)

    def signature(self, row: int) -> Signature:
        """Of the file's last reading."""
        return (
            self.devs[row],
            self.inos[row],
            self.sizes[row],
            self.mtimes[row],
            self.ctimes[row],
        )

    def trustworthy_mtimes(self, now_us: int) -> list[int | None]:
        """`mtimes`, with None for files whose unchanged signature would prove nothing.

        Those are files never read, racy records, and timestamps in the future.
        """
        newest_ns = (now_us + RACY_SLACK_US) * 1_000
        slack = RACY_SLACK_US
        trusted: list[int | None] = [
            mtime
            if version
            and mtime < newest_ns
            and ctime < newest_ns
            and (ctime if ctime > mtime else mtime) // 1_000 < hashed - slack
            else None
            for version, mtime, ctime, hashed in zip(
                self.version_ids, self.mtimes, self.ctimes, self.hashed_at, strict=False
            )
        ]
        trusted.append(None)
        return trusted

    def moved_from(self, signature: Signature) -> list[int]:
        """Unseen rows that a new file with this signature may have been renamed from.

        The change time is not compared: renaming sets it.
        """
        if self._by_inode is None:
            self._by_inode = {}
            for row, ino in enumerate(self.inos[:-1]):
                self._by_inode.setdefault(ino, []).append(row)
        return [
            row
            for row in self._by_inode.get(signature[1], ())
            if self.version_ids[row]
            and self.signature(row)[:4] == signature[:4]
            and self.paths[row] in self.unseen
        ]


_COLUMNS = (
    "rel_path",
    "version_id",
    "dev",
    "ino",
    "size",
    "mtime_ns",
    "ctime_ns",
    "hashed_at_us",
)
