"""What this machine has, and Debian packages for what it lacks."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.harness.cache import ROOT, locked
from cluster.harness.errors import HarnessError
from cluster.harness.progress import run_logged, say

# A program of each, and the package that has it.
PACKAGES = {
    "dockerd": "docker.io",
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "ip": "iproute2",
    "debootstrap": "debootstrap",
    "unshare": "util-linux",
}
_SERVICE_POLICY = Path("/usr/sbin/policy-rc.d")
_CAPABILITIES_LAST = 40


def why_not() -> str | None:
    """Why no cluster can be made here, or None if one can."""
    if sys.platform != "linux":
        return "a cluster of our own needs Linux"
    if docker_answers():
        return None
    if os.geteuid() != 0:
        return "a cluster of our own needs a docker daemon that answers, or root to start one"
    lacking = [name for name in PACKAGES if program(name) is None]
    if lacking and shutil.which("apt-get") is None:
        return f"{', '.join(lacking)} missing, and no apt-get to install Debian's packages"
    if shutil.which("go") is None:
        return "no `go` to build Kubernetes with: install Go 1.24 or newer"
    return None


def program(name: str) -> str | None:
    """A program's path; also where only root looks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def install_packages() -> None:
    """Install what is missing of `PACKAGES`, with its services not started.

    Raises:
        HarnessError: it is missing and cannot be installed here.
    """
    missing = [package for name, package in PACKAGES.items() if program(name) is None]
    if not missing:
        return
    command = f"apt-get install --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise HarnessError(f"{', '.join(missing)} missing", f"as root: {command}")
    with locked("packages"), _no_services():
        say(f"as root: {command}")
        log = ROOT / "logs" / "packages.log"
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run_logged(["apt-get", "update"], "apt-get update", log, environment=quiet)
        run_logged(
            ["apt-get", "install", "-y", "--no-install-recommends", *missing],
            command,
            log,
            environment=quiet,
        )


@contextmanager
def _no_services() -> Iterator[None]:
    """Have packages not start their daemons, unless the machine has a policy of its own."""
    if _SERVICE_POLICY.exists():
        yield
        return
    _SERVICE_POLICY.write_text("#!/bin/sh\nexit 101\n")
    _SERVICE_POLICY.chmod(0o755)
    try:
        yield
    finally:
        _SERVICE_POLICY.unlink()


def docker_client() -> Path:
    """A docker command that can build images; some newer ones have no builder with them.

    Raises:
        HarnessError: there is none.
    """
    folders = [*os.environ.get("PATH", "").split(":"), "/usr/bin"]
    for folder in folders:
        candidate = Path(folder) / "docker"
        if os.access(candidate, os.X_OK) and _builds(candidate):
            return candidate
    raise HarnessError("no docker command that can build images", "install docker.io or buildx")


def _builds(docker: Path) -> bool:
    said = _output([docker, "--version"])  # Docker version 20.10.24+dfsg1, build 297e128
    major = said.removeprefix("Docker version ").split(".")[0]
    if major.isdigit() and int(major) < 23:
        return True
    return _output([docker, "buildx", "version"]) != ""


def docker_answers(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a docker daemon answers, the one that the environment names."""
    docker = shutil.which("docker")
    if docker is None:
        return False
    return _output([docker, "version", "--format", "{{.Server.Version}}"], environment) != ""


def _output(argv: list[str | Path], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=None if environment is None else {**os.environ, **environment},
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def lacks_capabilities() -> bool:
    """Whether root is denied some capability here, as within some containers and small VMs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            every = (1 << (_CAPABILITIES_LAST + 1)) - 1
            return int(line.split()[1], 16) & every != every
    return False


def name_servers() -> list[str]:
    """Name servers that a container can ask too: none of loopback."""
    found: list[str] = []
    for file in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        if not found and Path(file).exists():
            lines = Path(file).read_text().splitlines()
            named = [line.split()[1] for line in lines if line.startswith("nameserver ")]
            found = [each for each in named if not each.startswith("127.") and each != "::1"]
    return found
