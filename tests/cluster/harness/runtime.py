#!/usr/bin/python3 -ES
"""runc for machines on which root lacks some capability.

A privileged container asks for all of them, and a lower oom score than root may set there; runc
fails on both. This takes what cannot be had out of the request, and calls runc.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

RUNC = ("/usr/sbin/runc", "/usr/bin/runc")
# By their numbers, from 0.
CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE "
    "NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO "
    "SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME "
    "SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG "
    "WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)


def denied() -> set[str]:
    """Capabilities outside this process's bounding set."""
    status = Path("/proc/self/status").read_text()
    bounding = next(line for line in status.splitlines() if line.startswith("CapBnd:"))
    had = int(bounding.split()[1], 16)
    return {f"CAP_{name}" for bit, name in enumerate(CAPABILITIES.split()) if not had >> bit & 1}


def request_file(arguments: list[str]) -> Path | None:
    """The file with the process that runc is to start, if it is to start one."""
    for option, within in (("--bundle", "config.json"), ("--process", "")):
        if option in arguments:
            return Path(arguments[arguments.index(option) + 1]) / within
    return None


def without(process: dict[str, Any], capabilities: set[str]) -> dict[str, Any]:
    """The same process, asking for less."""
    sets = process.get("capabilities") or {}
    less = {name: [c for c in had or [] if c not in capabilities] for name, had in sets.items()}
    return {**process, "capabilities": less, "oomScoreAdj": max(0, process.get("oomScoreAdj", 0))}


def main() -> None:
    """Rewrite the request, then become runc."""
    file = request_file(sys.argv[1:])
    if file is not None:
        request = json.loads(file.read_text())
        if "process" in request:
            request["process"] = without(request["process"], denied())
        else:
            request = without(request, denied())
        file.write_text(json.dumps(request))
    os.execv(next(path for path in RUNC if os.path.exists(path)), ["runc", *sys.argv[1:]])


if __name__ == "__main__":
    main()
