"""The system call filter: a deny list, answered with EPERM, compiled to classic BPF.

A deny list and not an allow list, because plugins bring compiled libraries of every kind; what is
denied is what they never need and an escape would: new sockets, other processes' memory, mounts,
namespaces, kernel keys, io_uring (which would carry out denied calls unseen) and the like.
See seccomp(2) and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

import ctypes
import errno
import struct

from casparian_worker.sandbox import libc

_LD_W_ABS = 0x20
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
_AF_UNIX = 1
_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP = {"x86_64": 317, "aarch64": 277}

# Numbers by name: (x86_64, aarch64), None where an architecture lacks the call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
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
# Landlock does not cover these, so they are denied too where the plugin shares the worker's uid.
# utimensat stays allowed on descriptors (a null path), which Landlock has confined already.
_METADATA: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_IOCTL = {"x86_64": 16, "aarch64": 29}
_UTIMENSAT = {"x86_64": 280, "aarch64": 88}


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def program(machine: str, *, deny_metadata: bool) -> bytes:
    """The filter for a machine ("x86_64" or "aarch64") as BPF instructions of 8 bytes each.

    Args:
        deny_metadata: whether chmod, chown, utime and setxattr by path are denied as well.

    Raises:
        KeyError: no filter is known for the machine.
    """
    column = 0 if machine == "x86_64" else 1
    deny = _op(_RET, _ERRNO | errno.EPERM)
    allow = _op(_RET, _ALLOW)
    code = [
        _op(_LD_W_ABS, _ARCH),
        _op(_JEQ, _ARCHES[machine], if_true=1),
        _op(_RET, _KILL_PROCESS),  # another architecture's numbers would slip through
        _op(_LD_W_ABS, _NR),
    ]
    if machine == "x86_64":
        code += [_op(_JGE, _X32_BIT, if_false=1), deny]
    names = _DENIED | (_METADATA if deny_metadata else {})
    for numbers in names.values():
        number = numbers[column]
        if number is not None:
            code += [_op(_JEQ, number, if_false=1), deny]
    # glibc falls back from clone3, whose flags a filter cannot see, to clone.
    code += [_op(_JEQ, _CLONE3, if_false=1), _op(_RET, _ERRNO | errno.ENOSYS)]
    code += [
        _op(_JEQ, _CLONE[machine], if_false=4),
        _op(_LD_W_ABS, _ARGS),
        _op(_JSET, _NAMESPACES, if_false=1),
        deny,
        allow,
        _op(_JEQ, _SOCKETPAIR[machine], if_false=4),
        _op(_LD_W_ABS, _ARGS),
        _op(_JEQ, _AF_UNIX, if_true=1),
        deny,
        allow,
        _op(_JEQ, _IOCTL[machine], if_false=5),
        _op(_LD_W_ABS, _ARGS + 8),
        _op(_JEQ, _TIOCSTI, if_true=1),
        _op(_JEQ, _TIOCLINUX, if_false=1),
        deny,
        allow,
    ]
    if deny_metadata:
        code += [
            _op(_JEQ, _UTIMENSAT[machine], if_false=6),
            _op(_LD_W_ABS, _ARGS + 8),
            _op(_JEQ, 0, if_false=2),
            _op(_LD_W_ABS, _ARGS + 12),
            _op(_JEQ, 0, if_true=1),
            deny,
            allow,
        ]
    return b"".join([*code, allow])


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(*, deny_metadata: bool) -> None:
    """Put the filter in force for all threads of this process. Needs no_new_privs.

    Raises:
        OSError: the kernel refuses, or there is no filter for this machine.
    """
    machine = libc.MACHINE
    if machine not in _ARCHES:
        raise OSError(errno.ENOSYS, f"no system call filter for {machine}")
    code = program(machine, deny_metadata=deny_metadata)
    buffer = ctypes.create_string_buffer(code, len(code))
    prog = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    result = libc.syscall(_SECCOMP[machine], _SET_MODE_FILTER, _TSYNC, ctypes.byref(prog))
    if result:
        raise OSError(errno.EBUSY, f"thread {result} could not be confined")
