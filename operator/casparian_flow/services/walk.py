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
    """The files of one directory that no rule leaves out.

    They were regular files when the directory was read; whoever reads one looks again.

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
    files: list[os.DirEntry[str]] = []
    others: list[os.DirEntry[str]] = []
    below: list[_Directory] = []
    listing = Listing(directory.prefix)
    try:
        with os.scandir(descriptor) as iterator:
            for entry in iterator:
                (files if entry.is_file(follow_symlinks=False) else others).append(entry)
        if not files and not others:
            notes.empty[directory.prefix] = signed_64(os.fstat(descriptor).st_dev)
        _take_files(files, listing, rules, notes)
        for entry in others:
            _take_other(entry, below, directory, rules, notes)
    except OSError as error:
        _note_unlisted(directory, error, notes)
    return listing, below


def _take_files(
    files: "list[os.DirEntry[str]]", listing: Listing, rules: IgnoreRules, notes: WalkNotes
) -> None:
    names = [entry.name for entry in files]
    joined = "\0" + "\0".join(names) + "\0"
    if not joined.isascii() or "\\" in joined:
        names = [path_to_text(name) for name in names]
    if rules.slow or rules.may_ignore(joined):
        prefix = listing.prefix
        kept = [i for i, name in enumerate(names) if not rules.ignores_file(prefix + name, name)]
        notes.ignored += len(names) - len(kept)
        names = [names[i] for i in kept]
        files = [files[i] for i in kept]
    try:
        listing.stats = [entry.stat(follow_symlinks=False) for entry in files]
        listing.names = names
    except OSError:
        # One of them vanished meanwhile; find out which.
        _stat_singly(files, names, listing, notes)


def _stat_singly(
    files: "list[os.DirEntry[str]]", names: list[str], listing: Listing, notes: WalkNotes
) -> None:
    for entry, name in zip(files, names, strict=True):
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.problems.append(
                f"{listing.prefix}{name}: cannot be examined: {error.strerror or error}"
            )
            notes.incomplete = True
            continue
        listing.names.append(name)
        listing.stats.append(found)


def _take_other(
    entry: "os.DirEntry[str]",
    below: list[_Directory],
    directory: _Directory,
    rules: IgnoreRules,
    notes: WalkNotes,
) -> None:
    name = path_to_text(entry.name)
    path = directory.prefix + name
    if entry.is_dir(follow_symlinks=False):
        _add_directory(entry, name, below, directory, rules, notes)
    elif entry.is_symlink() or rules.ignores_file(path, name):
        notes.ignored += 1
    else:
        try:
            kind = _kind(entry.stat(follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return
        notes.problems.append(f"{path}: {kind}, not a file; left out")


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
