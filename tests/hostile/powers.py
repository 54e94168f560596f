"""Plugins that signal, multiply, and take rights that are not theirs."""

import textwrap

from hostile.parts import LIBC, PROCESSES, SPAWN, Hostile
from hostile.world import ESCAPED, KILLED, SURVIVED


def _signals(name: str, body: str, **more: object) -> Hostile:
    held_by = more.pop("held_by", PROCESSES)
    return Hostile(name, KILLED, "G101", body, LIBC + "import signal\n", held_by=held_by, **more)  # type: ignore[arg-type]


def _gains(name: str, body: str, before: str = "", **more: object) -> Hostile:
    """Ends with `escaped` if the attempt raises no error."""
    body = textwrap.dedent(body).strip()
    text = body if "escaped(" in body else f"{body}\nreturn escaped()"
    before = LIBC + textwrap.dedent(before)
    return Hostile(name, ESCAPED, "G101", text, before, **more)  # type: ignore[arg-type]


SIGNALS = [
    _signals("kills the worker", "os.kill(W['worker'], signal.SIGKILL)"),
    _signals("kills the worker by a descriptor",
             "signal.pidfd_send_signal(os.pidfd_open(W['worker']), signal.SIGKILL)"),
    _signals("kills the worker's group", "os.killpg(os.getpgid(W['worker']), signal.SIGKILL)",
             control=False),
    _signals("kills everybody", "os.kill(-1, signal.SIGKILL)", control=False),
    _signals("kills its parent and its group",
             "os.kill(os.getppid(), signal.SIGKILL)\nos.kill(0, signal.SIGKILL)",
             control=False, fresh=True),
    _signals("queues a signal to the worker",
             "libc.sigqueue(W['worker'], 9, ctypes.c_void_p(0))"),
    Hostile("leaves a process behind", SURVIVED, "G101",
            """
            code = "import time; time.sleep(300)"
            subprocess.Popen([sys.executable, "-I", "-S", "-c", code, W["token"]],
                             start_new_session=True)
            """, SPAWN, fresh=True, held_by=()),
    Hostile("leaves a process behind that nobody waits for", SURVIVED, "G101",
            """
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.closerange(0, 100)
                    code = "import time; time.sleep(300)"
                    os.execv(sys.executable, ["x", "-I", "-S", "-c", code, W["token"]])
                os._exit(0)
            time.sleep(0.3)
            """, SPAWN + "import time", fresh=True, held_by=()),
    Hostile("leaves a shell that starts itself anew", SURVIVED, "G101",
            """
            subprocess.Popen(["sh", "-c", "trap '' TERM HUP INT; while :; do sleep 1; done",
                              W["token"]], start_new_session=True)
            time.sleep(0.3)
            """, SPAWN + "import time", fresh=True, held_by=()),
]  # fmt: skip

POWERS = [
    _gains("becomes root", "os.setuid(0)\nif capabilities(): return escaped()",
           held_by=("user", "capabilities"), privileged=True),
    _gains("takes every group", "os.setgroups([0, 4, 6])",
           held_by=("user", "capabilities"), privileged=True),
    _gains("takes capabilities back",
           """
           header = (ctypes.c_uint32 * 2)(0x20080522, 0)
           for bit in (0, 1, 6, 7, 12, 21):
               call("capset", header, (ctypes.c_uint32 * 6)(1 << bit, 1 << bit))
               if capabilities(): return escaped()
           """, held_by=("user", "capabilities"), privileged=True),
    _gains("gains rights by a setuid program",
           """
           status = subprocess.getoutput("su -s /bin/sh -c 'grep CapEff /proc/self/status'")
           if int("0" + status.split()[-1], 16): return escaped()
           """, "import subprocess", held_by=("no_new_privs",), privileged=True),
    _gains("traces the worker",
           """
           if libc.ptrace(0x4206, W["worker"], None, None) == 0:
               libc.ptrace(17, W["worker"], None, None)
               return escaped()
           """, held_by=("seccomp", "pid_namespace")),
    _gains("traces its child",
           """
           child = os.fork()
           if child == 0:
               time.sleep(5); os._exit(0)
           try:
               if libc.ptrace(0x4206, child, None, None) == 0: return escaped()
           finally:
               os.kill(child, 9); os.waitpid(child, 0)
           """, "import time"),
    _gains("mounts a file system",
           """
           if libc.mount(b"none", W["mount"].encode(), b"tmpfs", 0, None): return None
           libc.umount2(W["mount"].encode(), 2)
           return escaped()
           """, held_by=("seccomp", "capabilities"), privileged=True),
    _gains("changes its root",
           "child = os.fork()\n"
           "if child == 0:\n"
           "    try: os.chroot(W['folder'])\n"
           "    except OSError: os._exit(1)\n"
           "    os._exit(0)\n"
           "if os.waitpid(child, 0)[1] == 0: return escaped()",
           held_by=("seccomp",), privileged=True),
    _gains("makes a user namespace by unshare",
           "child = os.fork()\n"
           "if child == 0: os._exit(1 if libc.unshare(0x10000000) else 0)\n"
           "if os.waitpid(child, 0)[1] == 0: return escaped()"),
    _gains("makes a user namespace by clone",
           """
           child = call("clone", 0x10000000 | 17, 0, 0, 0, 0)
           if child == 0: os._exit(0)
           os.waitpid(child, 0)
           return escaped()
           """),
    _gains("makes a user namespace by clone3",
           """
           arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
           child = call("clone3", arguments, 88)
           if child == 0: os._exit(0)
           os.waitpid(child, 0)
           return escaped()
           """),
    _gains("joins the worker's network",
           "child = os.fork()\n"
           "if child == 0:\n"
           "    try: place = os.open(f\"/proc/{W['worker']}/ns/net\", 0)\n"
           "    except OSError: os._exit(1)\n"
           "    os._exit(1 if libc.setns(place, 0) else 0)\n"
           "if os.waitpid(child, 0)[1] == 0: return escaped()",
           held_by=("seccomp", "landlock", "capabilities"), privileged=True),
    _gains("loads a program into the kernel",
           "call('bpf', 5, (ctypes.c_char * 120)(), 120)", control=False),
    _gains("watches the kernel's events",
           "call('perf_event_open', (ctypes.c_uint32 * 28)(1, 112, 9), 0, -1, -1, 0)",
           control=False),
    _gains("handles page faults", "os.close(call('userfaultfd', 0o2000000))", control=False),
    _gains("keeps a key in the kernel",
           "call('add_key', b'user', b'casparian-test', b'x', 1, -2)", control=False),
    _gains("reads the kernel's log",
           "if libc.klogctl(3, ctypes.create_string_buffer(4096), 4096) >= 0: return escaped()",
           held_by=("seccomp",), privileged=True),
    _gains("sets the clock",
           "time.clock_settime(time.CLOCK_REALTIME, time.time() + 3600)", "import time",
           control=False, held_by=("seccomp", "capabilities")),
    _gains("names the machine", "import socket\nsocket.sethostname('mine')", control=False,
           held_by=("seccomp", "capabilities")),
    _gains("makes System V shared memory", "call('shmget', 0, 4096, 0o1600)", control=False),
    _gains("makes a message queue", "call('mq_open', b'casparian', 0o102, 0o600, 0)",
           control=False),
    _gains("watches the file system", "call('fanotify_init', 0, 0)", control=False),
    _gains("watches a folder",
           "call('inotify_add_watch', call('inotify_init1', 0), W['folder'].encode(), 0xfff)"),
    _gains("runs a program from memory",
           """
           number = call("memfd_create", b"x", 0)
           with open("/bin/true", "rb") as file: os.write(number, file.read())
           if subprocess.run([f"/proc/self/fd/{number}"], pass_fds=[number]).returncode == 0:
               return escaped()
           """, "import subprocess"),
    _gains("keeps memory that no process has mapped",
           "number = call('memfd_create', b'x', 8)\nos.write(number, b'x' * 65536)"),
    _gains("runs a program of its own",
           """
           shutil.copy("/bin/true", "tool"); os.chmod("tool", 0o700)
           if subprocess.run(["./tool"]).returncode == 0: return escaped()
           """, "import shutil, subprocess", held_by=("landlock",)),
    _gains("raises its limit of open files",
           "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))", "import resource",
           held_by=("limits",)),
    _gains("raises its limit of memory",
           "resource.setrlimit(resource.RLIMIT_DATA, (1 << 50, 1 << 50))", "import resource",
           held_by=("limits",)),
    _gains("asks for core files",
           "resource.setrlimit(resource.RLIMIT_CORE, (1, 1))", "import resource",
           held_by=("limits",)),
    _gains("raises its limit of processes",
           "resource.setrlimit(resource.RLIMIT_NPROC, (60000, 60000))", "import resource",
           held_by=("process_limit",)),
    _gains("writes a file beyond the limit",
           """
           with open("huge", "wb") as file:
               file.truncate(1 << 30); file.seek(1 << 30); file.write(b"x")
           """, held_by=("limits",)),
    _gains("asks to be spared when memory runs out",
           "with open('/proc/self/oom_score_adj', 'w') as file: file.write('0')",
           held_by=("landlock", "capabilities")),
    _gains("takes the processor for itself",
           """
           call("sched_setscheduler", 0, 1, (ctypes.c_int * 1)(1))
           call("sched_setscheduler", 0, 0, (ctypes.c_int * 1)(0))
           return escaped()
           """, held_by=("limits", "capabilities"), privileged=True),
    _gains("goes before others", "os.nice(-5)", held_by=("capabilities",), privileged=True),
    _gains("types into a terminal",
           "one, other = os.openpty()\nimport fcntl\nfcntl.ioctl(other, 0x5412, b'x')",
           held_by=("seccomp", "landlock"), privileged=True),
    _gains("reads a disk below its files", "open(disk(), 'rb').read(1)",
           """
           import stat
           def disk():
               paths = ["/dev/" + name for name in names()]
               return next(p for p in paths if stat.S_ISBLK(os.stat(p).st_mode))
           def names():
               return [f"{kind}{letter}" for kind in ("vd", "sd", "loop") for letter in "a01"
                       if os.path.exists(f"/dev/{kind}{letter}")]
           """, held_by=("landlock",), control=False),
    _gains("reads the machine's passwords", "open('/etc/shadow').read()",
           held_by=("landlock",), privileged=True),
    _gains("reads the machine's users", "open('/etc/passwd').read()", held_by=("landlock",)),
    _gains(
        "opens the permissions of what it may only read",
        """
        os.fchmod(os.open(file_path, os.O_RDONLY), 0o645)
        if os.stat(file_path).st_mode & 1: return escaped()
        """,
        held_by=("seccomp", "user"),
    ),
    _gains(
        "takes a lease on what it may only read",
        "import fcntl\nfcntl.fcntl(os.open(file_path, 0), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
        held_by=("seccomp", "user"),
        control=False,
    ),
    _gains(
        "forgets to die with its parent",
        "if libc.prctl(1, 0, 0, 0, 0) == 0: return escaped()",
    ),
    _gains("reads the kernel's messages", "open('/dev/kmsg', 'rb').read(1)",
           held_by=("landlock",), control=False),
    _gains("reads what is mounted elsewhere", "open('/proc/1/mountinfo').read()",
           held_by=("landlock",)),
    _gains("sets a kernel parameter",
           "open('/proc/sys/kernel/core_pattern', 'r+').write('x')", held_by=("landlock",),
           control=False),
    _gains("starts a hundred and twenty processes",
           """
           children = []
           try:
               while len(children) < 120:
                   child = os.fork()
                   if child == 0:
                       time.sleep(20); os._exit(0)
                   children.append(child)
               return escaped()
           finally:
               for child in children: os.kill(child, 9); os.waitpid(child, 0)
           """, "import time", held_by=("process_limit", "pid_namespace"), fresh=True),
]  # fmt: skip

CORPUS = [*SIGNALS, *POWERS]
