"""The system call filter: a deny list, compiled to classic BPF.

A deny list and not an allow list, because plugins bring compiled libraries of every kind; what is
denied is what they never need and an escape would: new sockets, other processes' memory, mounts,
namespaces, kernel keys, io_uring (which would carry out denied calls unseen) and the like.

Times, and modes and owners where the plugin shares the worker's user, are neither set nor refused:
Landlock does not guard them, and libraries that copy a file into scratch fail if they are told so.
See seccomp(2) and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

import ctypes
import errno
import struct

from casparian_worker.sandbox import libc

_LD_W_ABS = 0x20
_AND = 0x54
_JEQ = 0x15
_JGE = 0x35
_JSET = 0x45
_RET = 0x06
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_KILL_PROCESS = 0x80000000
_NR, _ARCH, _ARGS = 0, 4, 16
_SET_MODE_FILTER = 1
_TSYNC = 1
_X32_BIT = 0x40000000

_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP = {"x86_64": 317, "aarch64": 277}

Numbers = dict[str, tuple[int | None, int | None]]
"""By name: (x86_64, aarch64), None where an architecture lacks the call."""

DENIED: Numbers = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "open_tree_attr": (467, 467),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "fanotify_init": (300, 262),
    "inotify_add_watch": (254, 27),
    "memfd_create": (319, 279),  # programs without a file, memory that nobody has mapped
    "memfd_secret": (447, 447),
    "file_setattr": (469, 469),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "create_module": (174, None),
    "nfsservctl": (180, 42),
    "_sysctl": (156, None),
    "ustat": (136, None),
    "sysfs": (139, None),
}
_ABSENT: Numbers = {
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "getxattr": (191, 8),
    "lgetxattr": (192, 9),
    "fgetxattr": (193, 10),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "getxattrat": (464, 464),
    "listxattrat": (465, 465),
    "removexattrat": (466, 466),
}
"""Answered as on a file system without extended attributes."""
_IGNORED: Numbers = {
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
}
"""Answered as if done, and not done."""
_IGNORED_OF_SHARED_USER: Numbers = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
}
"""Likewise, where the plugin's user owns more than its scratch."""

_CLONE = (56, 220)
_CLONE3 = 435
_SOCKETPAIR = (53, 199)
_IOCTL = (16, 29)
_FCNTL = (72, 25)
_PRCTL = (157, 167)
_WITH_FLAGS = {(44, 206): 3, (45, 207): 3, (46, 211): 2, (47, 212): 2, (307, 269): 3, (299, 243): 3}
"""sendto, recvfrom, sendmsg, recvmsg, sendmmsg, recvmmsg: which argument holds the flags."""
_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
_AF_UNIX, _STREAM, _SEQPACKET, _TYPE_MASK = 1, 1, 5, 0xF
_MSG_OOB = 1
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_FILE_FLAGS = (0x40086602, 0x40046602, 0x401C5820)  # FS_IOC_SETFLAGS in two sizes, FSSETXATTR
_INTERFACES = 0x8900  # SIOC…: the bridge belongs to the machine's network, not the plugin's
_F_SETLEASE, _F_NOTIFY = 1024, 1026
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _answer(error: int) -> bytes:
    return _op(_RET, _ERRNO | error)


_DENY = _answer(errno.EPERM)
_PASS = _op(_RET, _ALLOW)


def _when(number: int, steps: list[bytes]) -> list[bytes]:
    """Steps for one call; the last of them returns."""
    return [_op(_JEQ, number, if_false=len(steps)), *steps]


def _argument(index: int) -> bytes:
    """Look at an argument's lower half, which is all that the kernel takes of an int."""
    return _op(_LD_W_ABS, _ARGS + 8 * index)


def _deny(test: int, *values: int) -> list[bytes]:
    return [step for value in values for step in (_op(test, value, if_false=1), _DENY)]


def program(machine: str, *, shared_user: bool) -> bytes:
    """The filter for a machine ("x86_64" or "aarch64") as BPF instructions of 8 bytes each.

    Args:
        shared_user: whether the plugin's user owns files of others, its worker's for instance.

    Raises:
        KeyError: no filter is known for the machine.
    """
    column = 0 if machine == "x86_64" else 1
    code = [
        _op(_LD_W_ABS, _ARCH),
        _op(_JEQ, _ARCHES[machine], if_true=1),
        _op(_RET, _KILL_PROCESS),  # another architecture's numbers would slip through
        _op(_LD_W_ABS, _NR),
    ]
    if machine == "x86_64":
        code += _deny(_JGE, _X32_BIT)
    ignored = _IGNORED | (_IGNORED_OF_SHARED_USER if shared_user else {})
    for names, answer in (
        (DENIED, _DENY),
        (_ABSENT, _answer(errno.ENOTSUP)),
        (ignored, _answer(0)),
    ):
        for numbers in names.values():
            number = numbers[column]
            if number is not None:
                code += _when(number, [answer])
    # glibc falls back from clone3, whose flags a filter cannot see, to clone.
    code += _when(_CLONE3, [_answer(errno.ENOSYS)])
    for call, steps in _looked_into().items():
        code += _when(call[column], [*steps, _PASS])
    return b"".join([*code, _PASS])


def _looked_into() -> dict[tuple[int, int], list[bytes]]:
    """Calls that depend on their arguments: what denies them."""
    # A pair of datagram sockets could send to any socket file on the machine.
    pairs = [
        _argument(0),
        *_deny_unless(_AF_UNIX),
        _argument(1),
        _op(_AND, _TYPE_MASK),
        _op(_JEQ, _STREAM, if_true=2),
        *_deny_unless(_SEQPACKET),
    ]
    ioctl = [
        _argument(1),
        *_deny(_JEQ, *_TERMINAL_INPUT, *_FILE_FLAGS),
        _op(_AND, 0xFFFFFF00),
        *_deny(_JEQ, _INTERFACES),
    ]
    flags = {
        call: [_argument(place), *_deny(_JSET, _MSG_OOB)] for call, place in _WITH_FLAGS.items()
    }
    return {
        _CLONE: [_argument(0), *_deny(_JSET, _NAMESPACES)],
        _SOCKETPAIR: pairs,
        _IOCTL: ioctl,
        _FCNTL: [_argument(1), *_deny(_JEQ, _F_SETLEASE, _F_NOTIFY)],
        _PRCTL: [_argument(0), *_deny(_JEQ, _PR_SET_PDEATHSIG, _PR_SET_DUMPABLE)],
        **flags,
    }


def _deny_unless(value: int) -> list[bytes]:
    return [_op(_JEQ, value, if_true=1), _DENY]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(*, shared_user: bool) -> None:
    """Put the filter in force for all threads of this process. Needs no_new_privs.

    Raises:
        OSError: the kernel refuses, or there is no filter for this machine.
    """
    machine = libc.MACHINE
    if machine not in _ARCHES:
        raise OSError(errno.ENOSYS, f"no system call filter for {machine}")
    code = program(machine, shared_user=shared_user)
    buffer = ctypes.create_string_buffer(code, len(code))
    prog = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    result = libc.syscall(_SECCOMP[machine], _SET_MODE_FILTER, _TSYNC, ctypes.byref(prog))
    if result:
        raise OSError(errno.EBUSY, f"thread {result} could not be confined")
