"""Landlock: which files may be opened, and how; see landlock(7).

Rules name folders or files; everything beneath is covered. Whatever no rule names is denied.
"""

import ctypes
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass

from casparian_worker.sandbox import libc

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION = 1
_PATH_BENEATH = 1

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

READ = READ_FILE | READ_DIR
CODE = READ | EXECUTE
DEVICE = READ_FILE | WRITE_FILE
SCRATCH = (
    READ
    | WRITE_FILE
    | REMOVE_DIR
    | REMOVE_FILE
    | MAKE_DIR
    | MAKE_REG
    | MAKE_FIFO
    | MAKE_SYM
    | REFER
    | TRUNCATE
)
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_TCP = 0b11  # bind and connect
_SCOPES = 0b11  # abstract UNIX sockets and signals


@dataclass(frozen=True)
class Rule:
    """What may be done at and beneath a path."""

    path: str
    rights: int


class _Attributes(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """The kernel's Landlock version.

    Raises:
        OSError: there is none, or it is switched off.
    """
    return libc.syscall(_CREATE_RULESET, None, 0, _GET_VERSION)


def handled_fs(version: int) -> int:
    """All file system rights that an ABI version can deny."""
    handled = REFER - 1
    if version >= 2:
        handled |= REFER
    if version >= 3:
        handled |= TRUNCATE
    if version >= 5:
        handled |= IOCTL_DEV
    return handled


def restrict(rules: Iterable[Rule]) -> int:
    """Confine this thread and its children for good. Needs no_new_privs.

    Rules whose path does not exist are passed over.

    Returns:
        The ABI version in force: from 4 on TCP is denied, from 6 on signals to and abstract
        sockets of processes outside are.

    Raises:
        OSError: the kernel refuses; nothing is confined then.
    """
    version = abi()
    handled = handled_fs(version)
    attributes = _Attributes(handled, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    try:
        for rule in rules:
            _add(ruleset, rule, handled)
        libc.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _add(ruleset: int, rule: Rule, handled: int) -> None:
    try:
        parent = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        rights = rule.rights & handled
        if not os.path.isdir(f"/proc/self/fd/{parent}"):
            rights &= _FILE_RIGHTS
        beneath = _PathBeneath(rights, parent)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(beneath), 0)
    except OSError as error:
        if error.errno != errno.EBADFD:  # some pseudo file systems cannot carry rules
            raise
    finally:
        os.close(parent)
