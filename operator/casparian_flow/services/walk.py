"""Listing a tree of files without following symbolic links.

One thread: a directory's entries are read and statted in calls of about a microsecond each, and
two threads spend more on handing the interpreter lock to each other than they gain.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from casparian_flow.domain.paths import path_to_text
from casparian_flow.domain.signature import signed_64
from casparian_flow.services.ignore import IgnoreRules

MAX_DEPTH = 1000
"""Directories below the root; paths that long do not fit the system's limit of 4,096 bytes."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_SPECIAL = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)


@dataclass(slots=True)
class Listing:
    """The regular files of one directory that no rule leaves out.

    Attributes:
        prefix: the directory relative to the root with "/" at its end, "" for the root; text.
        names, stats: of the files, in step.
    """

    prefix: str
    names: list[str] = field(default_factory=list)
    stats: list[os.stat_result] = field(default_factory=list)


@dataclass(slots=True)
class WalkNotes:
    """What a walk could not do, or left out.

    Attributes:
        problems: one line each: unreadable directories, special files.
        unlisted: prefixes (with "/" at the end) of directories that were not listed in full, or
            whose rules left them out; nothing may be concluded about files below them.
        incomplete: something that should have been listed was not.
        empty: prefix → st_dev of directories that hold no entry at all; "" is the root.
        root_device: st_dev of the root, 0 if it could not be opened.
        root_failed: the root could not be listed.
    """

    problems: list[str] = field(default_factory=list)
    unlisted: set[str] = field(default_factory=set)
    incomplete: bool = False
    ignored: int = 0
    empty: dict[str, int] = field(default_factory=dict)
    root_device: int = 0
    root_failed: bool = False


@dataclass(frozen=True, slots=True)
class _Directory:
    path: str
    prefix: str
    depth: int
    identity: tuple[int, int] | None
    """(dev, ino) when its parent was listed; None for the root."""


def walk(root: str, rules: IgnoreRules, notes: WalkNotes) -> Iterator[Listing]:
    """List `root` and everything below it, one directory at a time.

    Symbolic links are not followed and count as ignored; the root itself may be one. Files that
    vanish meanwhile are passed over. What goes wrong is written to `notes`, and the walk goes on.
    """
    pending = [_Directory(root, "", 0, None)]
    while pending:
        directory = pending.pop()
        try:
            descriptor = _open(directory, notes)
        except OSError as error:
            _note_unlisted(directory, error, notes)
            continue
        try:
            listing, below = _list(descriptor, directory, rules, notes)
        finally:
            os.close(descriptor)
        pending.extend(reversed(below))
        yield listing


def _open(directory: _Directory, notes: WalkNotes) -> int:
    if directory.identity is None:
        descriptor = os.open(directory.path, _DIRECTORY)
        notes.root_device = signed_64(os.fstat(descriptor).st_dev)
        return descriptor
    descriptor = os.open(directory.path, _DIRECTORY | os.O_NOFOLLOW)
    found = os.fstat(descriptor)
    if (found.st_dev, found.st_ino) != directory.identity:
        os.close(descriptor)
        # A directory above it was swapped: following would leave the root.
        raise OSError(None, "it was replaced while it was scanned")
    return descriptor


def _list(
    descriptor: int, directory: _Directory, rules: IgnoreRules, notes: WalkNotes
) -> tuple[Listing, list[_Directory]]:
    listing = Listing(directory.prefix)
    below: list[_Directory] = []
    entries = 0
    try:
        with os.scandir(descriptor) as iterator:
            entries = _sort_entries(iterator, listing, below, directory, rules, notes)
    except OSError as error:
        _note_unlisted(directory, error, notes)
    else:
        if entries == 0:
            notes.empty[directory.prefix] = signed_64(os.fstat(descriptor).st_dev)
    return listing, below


def _sort_entries(
    iterator: "os._ScandirIterator[str]",
    listing: Listing,
    below: list[_Directory],
    directory: _Directory,
    rules: IgnoreRules,
    notes: WalkNotes,
) -> int:
    prefix = listing.prefix
    add_name, add_stat = listing.names.append, listing.stats.append
    suffixes, literals, slow = rules.suffixes, rules.literals, rules.slow
    is_regular = stat.S_ISREG
    entries = ignored = 0
    for entry in iterator:
        entries += 1
        name = entry.name
        if not name.isascii() or "\\" in name:
            name = path_to_text(name)
        if entry.is_dir(follow_symlinks=False):
            _add_directory(entry, name, below, directory, rules, notes)
            continue
        if (
            rules.ignores_file(prefix + name, name)
            if slow
            else name[0] == "." or name.endswith(suffixes) or name in literals
        ):
            ignored += 1
            continue
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.problems.append(f"{prefix}{name}: cannot be examined: {error.strerror}")
            notes.incomplete = True
            continue
        if is_regular(found.st_mode):
            add_name(name)
            add_stat(found)
        elif stat.S_ISLNK(found.st_mode):
            ignored += 1
        elif not stat.S_ISDIR(found.st_mode):
            notes.problems.append(f"{prefix}{name}: {_kind(found.st_mode)}, not a file; left out")
    notes.ignored += ignored
    return entries


def _add_directory(
    entry: "os.DirEntry[str]",
    name: str,
    below: list[_Directory],
    parent: _Directory,
    rules: IgnoreRules,
    notes: WalkNotes,
) -> None:
    prefix = f"{parent.prefix}{name}/"
    if rules.ignores_directory(prefix[:-1]):
        notes.ignored += 1
        notes.unlisted.add(prefix)
        return
    if parent.depth >= MAX_DEPTH:
        notes.problems.append(f"{prefix}: deeper than {MAX_DEPTH} directories; left out")
        notes.unlisted.add(prefix)
        notes.incomplete = True
        return
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.problems.append(f"{prefix}: cannot be examined: {error.strerror}")
        notes.unlisted.add(prefix)
        notes.incomplete = True
        return
    path = f"{parent.path.rstrip('/')}/{entry.name}"
    below.append(_Directory(path, prefix, parent.depth + 1, (found.st_dev, found.st_ino)))


def _note_unlisted(directory: _Directory, error: OSError, notes: WalkNotes) -> None:
    if directory.identity is None:
        notes.root_failed = True
    elif isinstance(error, FileNotFoundError):
        # It vanished after its parent was listed; whether its files did is seen next time.
        notes.unlisted.add(directory.prefix)
        return
    notes.unlisted.add(directory.prefix)
    notes.incomplete = True
    where = directory.prefix or path_to_text(directory.path)
    notes.problems.append(f"{where}: cannot be listed: {error.strerror or error}")


def _kind(mode: int) -> str:
    return next((name for test, name in _SPECIAL if test(mode)), "a special file")
