"""What every hostile plugin is made of."""

import json
import textwrap
from dataclasses import dataclass

from gatekeeper_corpus import plugin


@dataclass(frozen=True)
class Hostile:
    """One plugin.

    Attributes:
        name: what it tries.
        effect: what would be seen.
        rule: the Gatekeeper's rule that finds it, "" where it passes.
        body: of `execute`.
        before: the module's text before the class.
        fresh: it needs a process of its own, or would spoil the warm one.
        control: whether it may run without a sandbox, to prove that the effect can be seen.
        privileged: that takes root, even without a sandbox.
        held_by: measures of which one must be in force for the effect to be kept away.
    """

    name: str
    effect: str
    rule: str
    body: str
    before: str = ""
    fresh: bool = False
    control: bool = True
    privileged: bool = False
    held_by: tuple[str, ...] = ("seccomp",)

    def source(self, places: dict[str, object]) -> str:
        """The complete plugin."""
        hidden = json.dumps(places).encode().hex()
        world = f"import json\nW = json.loads(bytes.fromhex('{hidden}').decode())\n"
        return plugin(self.body, world + textwrap.dedent(self.before))


FILES = ("landlock",)
NET = ("seccomp", "network_namespace", "landlock_network")
PROCESSES = ("pid_namespace", "landlock_scope")

LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def call(name, *arguments):
    typed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(W["nr"][name]), *typed)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result

def escaped(what=""):
    return [{"a": W["escaped"] + str(what)}]

def capabilities():
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("CapEff"))
    return int(line.split()[1], 16) & ~(1 << 2)
"""
SPAWN = "import os, subprocess, sys\n"
