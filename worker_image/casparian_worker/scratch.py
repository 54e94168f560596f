"""Folders for one worker process: inputs for the plugins to read, a place for them to write.

<root>/worker-XXXX/           0711, held by a lock as long as its worker lives
    lock
    slot-0/input/             the worker writes, the slot's user reads
    slot-0/tmp/               the slot's user writes
"""

import contextlib
import fcntl
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from casparian_worker import clearing

_USERS = 400
"""How many user ids from `uid_base` on may be used."""
_LOCK_FOLDERS = ("/run/lock", "/run")


@dataclass(frozen=True, slots=True)
class SlotScratch:
    """One slot's folders.

    Attributes:
        uid: user (and group) id of the slot's plugins, 0 where they share the worker's.
        group: by which another container's plugins read the input, 0 where there is none.
        elsewhere: folder of that container in which its launcher makes and removes `tmp`.
    """

    input: str
    tmp: str
    uid: int
    group: int = 0
    elsewhere: str = ""

    def new_input(self, name: str) -> str:
        """A fresh folder for one job's input, readable by the slot's user and no other.

        Raises:
            OSError: it cannot be made.
        """
        folder = tempfile.mkdtemp(prefix=f"{name}-", dir=self.input)
        self.show(folder, 0o750)
        return folder

    def show(self, path: str | int, mode: int) -> None:
        """Let the slot's user in by its group."""
        if self.uid or self.group:
            os.chown(path, -1, self.uid or self.group)
        os.chmod(path, mode)

    def private(self, name: str) -> "SlotScratch":
        """The same with a writable folder of its own, for one of several hosts in the slot."""
        own = replace(self, tmp=os.path.join(self.elsewhere or self.tmp, name))
        if self.elsewhere:
            return own
        os.makedirs(own.tmp, exist_ok=True)
        os.chmod(own.tmp, 0o700)
        if self.uid:
            os.chown(own.tmp, self.uid, self.uid)
        return own

    def clear_tmp(self) -> None:
        """Empty the folder the plugin writes to; called when its process is gone."""
        if not self.elsewhere:
            clearing.empty(self.tmp)

    def remove_tmp(self) -> None:
        """Remove it when its host is stopped for good."""
        if not self.elsewhere:
            clearing.remove(self.tmp)


class Scratch:
    """The scratch folders of one worker process.

    Opening removes what workers that are gone left behind.
    """

    def __init__(
        self, root: str, *, uid_base: int = 0, group: int = 0, elsewhere: str = ""
    ) -> None:
        """Make them.

        Args:
            uid_base: first user id that slots may take when the worker is root, 0 for none.
            group, elsewhere: see SlotScratch; for plugins in another container.

        Raises:
            OSError: the root cannot be written.
        """
        Path(root).mkdir(parents=True, exist_ok=True)
        self.cleaned = remove_dead(root)
        self.folder = tempfile.mkdtemp(prefix="worker-", dir=root)
        os.chmod(self.folder, 0o711)  # noqa: S103 - its users pass through, they cannot list it
        # Locked before it has the name that `remove_dead` looks for.
        self._lock = _hold(os.path.join(self.folder, "lock.new"))
        os.rename(os.path.join(self.folder, "lock.new"), os.path.join(self.folder, "lock"))
        self._uid_base = uid_base if os.geteuid() == 0 and not elsewhere else 0
        self._group, self._elsewhere = group, elsewhere
        self._users: dict[int, tuple[int, int]] = {}
        self._slots: dict[int, SlotScratch] = {}

    def slot(self, number: int) -> SlotScratch:
        """The folders of a slot, made when first asked for."""
        known = self._slots.get(number)
        if known is not None:
            return known
        uid = self._user(number)
        base = os.path.join(self.folder, f"slot-{number}")
        slot = SlotScratch(
            os.path.join(base, "input"),
            os.path.join(base, "tmp"),
            uid,
            self._group,
            self._elsewhere,
        )
        for folder in (base, slot.input, slot.tmp):
            os.makedirs(folder, exist_ok=True)
            slot.show(folder, 0o750)
        self._slots[number] = slot
        return slot

    def close(self) -> None:
        """Remove everything and give the user ids back."""
        clearing.remove(self.folder)
        for _, lock in self._users.values():
            if lock >= 0:
                os.close(lock)
        self._users.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _user(self, number: int) -> int:
        """A user id that no other slot on this machine has, so that its tasks can be counted."""
        if self._uid_base == 0:
            return 0
        if number not in self._users:
            self._users[number] = _claim_user(self._uid_base, number)
        return self._users[number][0]


def _claim_user(base: int, number: int) -> tuple[int, int]:
    """(user id, lock); without any place for locks, an id by the slot's number alone."""
    for folder in (*_LOCK_FOLDERS, tempfile.gettempdir()):
        for uid in range(base, base + _USERS):
            try:
                lock = _hold(os.path.join(folder, f"casparian-uid-{uid}.lock"))
            except BlockingIOError:
                continue
            except OSError:
                break
            return uid, lock
    return base + number % _USERS, -1


def _hold(path: str, *, create: bool = True) -> int:
    """Take an exclusive lock, kept until the descriptor is closed or the process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    lock = os.open(path, flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def remove_dead(root: str) -> int:
    """Remove the folders of workers that no longer run; returns how many."""
    removed = 0
    for folder in Path(root).glob("worker-*"):
        with contextlib.suppress(OSError):
            lock = _hold(str(folder / "lock"), create=False)
            clearing.remove(str(folder))
            os.close(lock)
            removed += 1
    return removed
