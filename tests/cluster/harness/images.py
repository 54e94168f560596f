"""Images made where none can be pulled: a node for kind, and a base for the project's own.

All come from Debian's packages and the programs of `tools`, and stay in the docker daemon under a
tag that is a digest of what went in; an image that is there is not made again.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.harness import daemon
from cluster.harness.cache import ROOT, digest, locked
from cluster.harness.errors import HarnessError
from cluster.harness.machine import program
from cluster.harness.progress import run_logged, step
from cluster.harness.tools import tools, version_of

HERE = Path(__file__).parent
REPOSITORY = "casparian.local"
SUITE = "bookworm"
COMPONENTS = HERE / "images" / "components.Dockerfile"
PYTHON = HERE / "images" / "python.Dockerfile"
NODE = HERE / "node"
# In the node's own file system; the rest runs in containers.
_ON_THE_NODE = ("kubeadm", "kubectl", "kubelet")
# Those of the second archive are imported where the control plane runs (images.service).
_ARCHIVES = {
    "every-node.tar": ("pause", "kube-proxy", "coredns", "local-path-provisioner"),
    "control-plane.tar": ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"),
}
_STAGES = tuple(stage for stages in _ARCHIVES.values() for stage in stages)
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def system_image() -> str:
    """A minimal Debian."""
    tag = f"{REPOSITORY}/debian:{digest(SUITE, os.uname().machine)}"
    return _made(tag, lambda: _import_system(tag))


def python_image() -> str:
    """Debian with its Python: a base image for `--build-arg BASE_IMAGE`."""
    system = system_image()
    tag = f"{REPOSITORY}/python:{digest(PYTHON, _CERTIFICATES, system)}"

    def make() -> None:
        with _context({"certificates.crt": _CERTIFICATES}) as context:
            build(PYTHON, tag, context, {"SYSTEM": system})

    return _made(tag, make)


def node_image() -> str:
    """A node, as `kind create cluster --image` takes it."""
    system = system_image()
    programs = tools((*_ON_THE_NODE, *_STAGES))
    made_of = [path.name for path in programs.values()]
    tag = f"{REPOSITORY}/node:{digest(NODE, COMPONENTS, Path(__file__), system, *made_of)}"
    return _made(tag, lambda: _build_node(tag, system, programs))


def build(
    dockerfile: Path,
    tag: str,
    context: Path,
    arguments: Mapping[str, str] | None = None,
    *,
    target: str | None = None,
) -> str:
    """Build an image, with the host's network; returns its tag.

    Raises:
        HarnessError: the build failed; the hint has the end of its output.
    """
    options = [f"--build-arg={name}={value}" for name, value in (arguments or {}).items()]
    options += [f"--target={target}"] if target else []
    name = tag.removeprefix(f"{REPOSITORY}/").replace("/", "_").replace(":", "-")
    log = ROOT / "logs" / f"image-{name}.log"
    log.unlink(missing_ok=True)
    run_logged(
        [
            *("docker", "build", "--network=host", "--progress=plain", *options),
            *("--file", dockerfile, "--tag", tag, context),
        ],
        f"building the image {tag}",
        log,
        environment=daemon.environment(),
    )
    return tag


def size_bytes(tag: str) -> int:
    """What an image takes on disk, unpacked."""
    return int(daemon.docker("image", "inspect", "--format", "{{.Size}}", tag))


def exists(tag: str) -> bool:
    """Whether the daemon has an image."""
    return daemon.docker("image", "ls", "--quiet", tag).strip() != ""


def _made(tag: str, make: Callable[[], object]) -> str:
    """Make an image unless it is there; older ones under its name are dropped."""
    if exists(tag):
        return tag
    name = tag.split(":", maxsplit=1)[0]
    with locked(f"image-{name.replace('/', '-')}"):
        if not exists(tag):
            with step(f"making the image {tag}"):
                make()
            _drop_older(name, keep=tag)
    return tag


def _drop_older(name: str, keep: str) -> None:
    listed = daemon.docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}", name).split()
    for old in listed:
        if old != keep:
            daemon.docker("image", "rm", old, check=False)  # one that is in use stays
    daemon.tidy()


@contextmanager
def _context(files: Mapping[str, Path]) -> Iterator[Path]:
    """A folder with these files under these names, to build from."""
    with tempfile.TemporaryDirectory(prefix=".context-", dir=ROOT) as folder:
        for name, source in files.items():
            target = Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy2(source, target)
        yield Path(folder)


def _import_system(tag: str) -> None:
    with tempfile.TemporaryDirectory(prefix=".debian-", dir=ROOT) as folder:
        # A mount namespace of its own: what it mounts is gone with it, however it ends.
        run_logged(
            [
                *("unshare", "--mount", program("debootstrap") or "debootstrap"),
                *("--variant=minbase", SUITE, folder),
            ],
            f"debootstrap {SUITE}",
            ROOT / "logs" / "debootstrap.log",
        )
        for archive in Path(folder, "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as packed:
            done = subprocess.run(
                ["docker", "import", "-", tag],
                stdin=packed.stdout,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, **daemon.environment()},
            )
        if done.returncode != 0 or packed.returncode != 0:
            raise HarnessError(f"docker import {tag} failed", done.stderr)


def _build_node(tag: str, system: str, programs: Mapping[str, Path]) -> None:
    names = _component_names(programs["kubeadm"])
    with _context({name: programs[name] for name in _STAGES}) as context:
        for stage in _STAGES:
            build(COMPONENTS, names[stage], context, {"SYSTEM": system}, target=stage)
    files = {path.name: path for path in NODE.iterdir()}
    with _context(files | {name: programs[name] for name in _ON_THE_NODE}) as context:
        _fill_in(
            context,
            PAUSE=names["pause"],
            HELPER=names["kube-proxy"],
            PROVISIONER=names["local-path-provisioner"],
        )
        (context / "version").write_text(version_of("kubernetes"))
        (context / "images").mkdir()
        for archive, stages in _ARCHIVES.items():
            file = os.fspath(context / "images" / archive)
            daemon.docker("save", "--output", file, *(names[stage] for stage in stages))
        build(context / "Dockerfile", tag, context, {"SYSTEM": system})


def _component_names(kubeadm: Path) -> dict[str, str]:
    """The names under which kubeadm looks for the control plane's images."""
    listed = subprocess.run(
        [
            *(os.fspath(kubeadm), "config", "images", "list"),
            f"--image-repository={REPOSITORY}",
            f"--kubernetes-version={version_of('kubernetes')}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.split("/")[-1].split(":")[0]: line for line in listed.stdout.split()}
    provisioner = "local-path-provisioner"
    return names | {provisioner: f"{REPOSITORY}/{provisioner}:{version_of('local-path')}"}


def _fill_in(context: Path, **names: str) -> None:
    """Put image names in place of `@NAME@`."""
    for file in (context / "containerd.toml", context / "default-storage.yaml"):
        text = file.read_text()
        for name, value in names.items():
            text = text.replace(f"@{name}@", value)
        file.write_text(text)
