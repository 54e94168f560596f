"""A docker daemon of the harness's own, where the machine has none.

It runs in a mount and a process namespace of its own, so that its mounts and processes end with it,
however it ends; what it leaves outside of them (bridges, packet filter rules, control groups, a
system setting) is noted before it starts and taken back after it has stopped. Images and the
build cache stay in the cache.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from cluster.harness import machine
from cluster.harness.cache import ROOT, locked
from cluster.harness.errors import HarnessError
from cluster.harness.progress import say, tail

RUN = ROOT / "run"
IMAGES = ROOT / "docker"
RUNTIME = Path(__file__).parent / "runtime.py"
# As `docker builder prune` reads it. Builds of one release, of both images, take about 3 GB.
BUILD_CACHE_MAX = "8GB"
START_S = 60.0
STOP_S = 60.0
_PID = RUN / "pid"
_COMMANDS = RUN / "bin"
_BEFORE = RUN / "before.json"
_SOCKET = RUN / "docker.sock"
_LOG = ROOT / "logs" / "dockerd.log"
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_GROUPS = Path("/sys/fs/cgroup")
# Folders of the system that the daemon and its containerd would write to: they see empty ones.
_OWN_FOLDERS = ("/etc/docker", "/run/docker", "/run/containerd", "/opt/containerd")
_ITS_LINKS = re.compile(r"^(docker0|br-[0-9a-f]{12}|veth[0-9a-f]{7})$")
_ITS_RULES = re.compile(r"DOCKER|docker0|br-[0-9a-f]{12}")
_ITS_GROUPS = frozenset({"docker", "kubelet", "kubelet.slice"})
# Others may change the machine meanwhile: what counts as left behind is what could be ours.
_OURS = re.compile(
    r"DOCKER|docker|br-[0-9a-f]{12}|veth|kubelet|containerd|FORWARD DROP|" + re.escape(str(ROOT))
)


def is_own() -> bool:
    """Whether a daemon of the harness's own is used (else the machine's)."""
    return _running() is not None


def environment() -> dict[str, str]:
    """What docker and kind need in their environment to talk to the daemon."""
    if not (_COMMANDS / "docker").exists():
        add_command("docker", machine.docker_client())
    own = {
        "PATH": f"{_COMMANDS}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "DOCKER_BUILDKIT": "1",
    }
    if is_own():
        # Nobody's credential helpers: nothing is pulled.
        own |= {"DOCKER_HOST": f"unix://{_SOCKET}", "DOCKER_CONFIG": str(RUN / "docker-config")}
    return own


def add_command(name: str, program: Path) -> None:
    """Have a name on that PATH mean this program."""
    _COMMANDS.mkdir(parents=True, exist_ok=True)
    # Put in place in one step: others may be looking at it.
    link = _COMMANDS / f".{name}-{os.getpid()}"
    link.symlink_to(program)
    link.replace(_COMMANDS / name)


def ensure() -> None:
    """Have a daemon that answers: the machine's, or one of our own.

    Raises:
        HarnessError: there is none and it cannot be started; the hint says why.
    """
    with locked("daemon"):
        if _running() is not None or machine.docker_answers():
            return
        machine.install_packages()
        _start()


def stop() -> None:
    """Stop our own daemon, if it runs and has no containers, and take back what it did."""
    with locked("daemon"):
        process = _running()
        if process is not None:
            if docker("ps", "-aq").strip():
                return
            tidy()
            _end(process)
        if _BEFORE.exists():
            _take_back(Facts(**json.loads(_BEFORE.read_text())))
        shutil.rmtree(RUN, ignore_errors=True)


def tidy() -> None:
    """Drop images that lost their names, and the older part of a large build cache."""
    if is_own():
        docker("image", "prune", "--force")
        docker("builder", "prune", "--force", f"--keep-storage={BUILD_CACHE_MAX}")


def docker(*arguments: str, stdin: bytes | None = None, check: bool = True) -> str:
    """Run a docker command; returns its output.

    Raises:
        HarnessError: it failed; the hint has what it said.
    """
    done = subprocess.run(
        ["docker", *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        check=False,
        env={**os.environ, **environment()},
    )
    if check and done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise HarnessError(f"docker {' '.join(arguments)} failed", said)
    return done.stdout.decode(errors="replace")


def _start() -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    _LOG.parent.mkdir(parents=True, exist_ok=True)
    if not _BEFORE.exists():  # else the last daemon was killed, and its traces are there still
        _BEFORE.write_text(json.dumps(asdict(Facts.now())))
    command = [
        "dockerd",
        f"--data-root={IMAGES}",
        f"--exec-root={RUN / 'exec'}",
        f"--pidfile={RUN / 'docker.pid'}",
        f"--host=unix://{_SOCKET}",
        f"--config-file={RUN / 'daemon.json'}",
    ]
    (RUN / "daemon.json").write_text("{}")
    if machine.lacks_capabilities():
        command += [f"--add-runtime=fitting={RUNTIME}", "--default-runtime=fitting"]
    hide = "; ".join(f"[ ! -d {f} ] || mount -t tmpfs none {f}" for f in _existing(_OWN_FOLDERS))
    with _LOG.open("wb") as log:
        process = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
                # The shell hides folders; tini, its successor, takes in orphans.
                *("sh", "-c", f'{hide}; exec "$@"', "sh", "docker-init", "-s", "--", *command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
        )
    _PID.write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")
    end = time.monotonic() + START_S
    while not machine.docker_answers(environment()):
        if process.poll() is not None or time.monotonic() > end:
            raise HarnessError("no docker daemon could be started", f"{_LOG}:\n{tail(_LOG)}")
        time.sleep(0.1)
    say(f"a docker daemon of our own listens on {_SOCKET}")


def _existing(folders: tuple[str, ...]) -> list[str]:
    return [folder for folder in folders if Path(folder).is_dir()]


def _running() -> psutil.Process | None:
    """The process that holds our daemon's namespaces, by the note that was made of it."""
    if not _PID.exists():
        return None
    pid, born = _PID.read_text().split()
    try:
        process = psutil.Process(int(pid))
        # A process of the same number may be somebody else's by now.
        alive = abs(process.create_time() - float(born)) < 1 and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def _end(process: psutil.Process) -> None:
    """Ask the daemon to stop; if it does not, end its process namespace."""
    family = process.children()
    for child in family:
        child.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([process, *family], STOP_S)
    for each in alive:
        each.kill()
    psutil.wait_procs(alive, STOP_S)


# What the daemon changes outside of its namespaces


@dataclass(frozen=True)
class Facts:
    """What of the machine the daemon and its containers may change."""

    links: list[str]
    rules: dict[str, list[str]]
    forwarding: str
    groups: list[str]
    mounts: list[str]
    folders: list[str]

    @classmethod
    def now(cls) -> "Facts":
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return cls(
            links=sorted(os.listdir("/sys/class/net")),
            rules={command: _rules(command) for command in ("iptables", "ip6tables")},
            forwarding=_FORWARDING.read_text().strip(),
            groups=sorted(str(path) for path in _top_groups()),
            mounts=sorted(line.split(" ")[1] for line in mounts),
            folders=_existing(_OWN_FOLDERS),
        )

    def beyond(self, before: "Facts") -> list[str]:
        """What is there now of ours and was not before, in words."""
        found = [f"interface {n}" for n in self.links if n not in before.links]
        for command, rules in self.rules.items():
            had = before.rules.get(command, [])
            found += [f"{command} {rule}" for rule in rules if rule not in had]
        found += [f"control group {g}" for g in self.groups if g not in before.groups]
        found += [f"mount {m}" for m in self.mounts if m not in before.mounts]
        found += [f"folder {f}" for f in self.folders if f not in before.folders]
        ours = [trace for trace in found if _OURS.search(trace)]
        if self.forwarding != before.forwarding:
            ours.append(f"{_FORWARDING} is {self.forwarding}")
        return ours + [f"process {text}" for text in _processes()]


def _take_back(before: Facts) -> None:
    """Undo what is left.

    Raises:
        HarnessError: something stays all the same; the hint lists it.
    """
    for name in Facts.now().links:
        if name not in before.links and _ITS_LINKS.match(name):
            subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)
    for command, had in before.rules.items():
        _restore_rules(command, had)
    _FORWARDING.write_text(f"{before.forwarding}\n")
    for group in _top_groups():
        if str(group) not in before.groups and group.name in _ITS_GROUPS:
            _remove_groups(group)
    for folder in _OWN_FOLDERS:
        if folder not in before.folders:
            shutil.rmtree(folder, ignore_errors=True)
    left = Facts.now().beyond(before)
    if left:
        raise HarnessError("something of the cluster is left on this machine", "\n".join(left))


def _rules(command: str) -> list[str]:
    """Rules, chains and policies but those of a fresh table, each with its table before it."""
    saved = subprocess.run(
        [f"{machine.program(command)}-save"], capture_output=True, text=True, check=False
    )
    found, table = [], ""
    for line in saved.stdout.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":") and " ACCEPT " not in line:
            found.append(f"{table} {line.split(' [')[0]}")
        elif line.startswith("-A"):
            found.append(f"{table} {line}")
    return found


def _restore_rules(command: str, had: list[str]) -> None:
    """Delete rules, then chains, that are new and the daemon's; set policies as they were."""
    new = [line.split(" ", 1) for line in _rules(command) if line not in had]
    for table, rule in new:
        if rule.startswith("-A") and _ITS_RULES.search(rule):
            _filter(command, table, f"-D{rule[2:]}")
    for table, rule in new:
        if rule.startswith(":DOCKER"):
            _filter(command, table, f"-X {rule[1:].split(' ')[0]}")
        elif rule == ":FORWARD DROP":
            _filter(command, table, "-P FORWARD ACCEPT")


def _filter(command: str, table: str, change: str) -> None:
    program = machine.program(command) or command
    subprocess.run([program, "-w", "-t", table, *change.split()], check=False, capture_output=True)


def _top_groups() -> list[Path]:
    """The control groups at the top of each hierarchy (of the one, under cgroup v2)."""
    if (_GROUPS / "cgroup.controllers").exists():
        return [path for path in _GROUPS.iterdir() if path.is_dir()]
    hierarchies = [path for path in _GROUPS.iterdir() if path.is_dir() and not path.is_symlink()]
    return [path for top in hierarchies for path in top.iterdir() if path.is_dir()]


def _remove_groups(folder: Path) -> None:
    """Remove a control group and those below it; one with processes refuses."""
    inner = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in (*inner, folder):
        try:
            path.rmdir()
        except OSError as error:
            say(f"control group {path}: {error.strerror}")


def _processes() -> list[str]:
    """Processes of our daemon and its containers."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if f"{RUN}/" in line and "unshare" not in line:
            found.append(f"{process.info['pid']} {line[:120]}")
    return found
