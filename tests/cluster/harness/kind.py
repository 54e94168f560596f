"""Two-node clusters of kind: made, described, torn down."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cluster.harness import daemon, images, machine, network
from cluster.harness.cache import ROOT, locked, locked_if_free
from cluster.harness.errors import HarnessError
from cluster.harness.faults import Faults
from cluster.harness.progress import run_logged, say, step
from cluster.harness.tools import tool, tools
from kube_kit import ApiClient, ApiError

DEFAULT_NAME = "casparian"
# What kind's own version takes; pulled where that can be done.
PULLED_NODE = "kindest/node:v1.34.0"
PULL_S = 600
READY_S = 180.0
SHARED = "/shared"
_STATE = ROOT / "clusters"
_NOTE = "state.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Cluster:
    """A cluster of two nodes, of which the first also has the control plane.

    Attributes:
        folder: Its kubeconfig, and what its nodes share.
        own_image: Its nodes were made here; their network enforces no NetworkPolicies.
    """

    name: str
    folder: Path
    own_image: bool

    @property
    def kubeconfig(self) -> Path:
        """Of the administrator."""
        return self.folder / "kubeconfig"

    @property
    def shared(self) -> Path:
        """A folder of this machine that is `/shared` on every node."""
        return self.folder / "shared"

    @property
    def control_plane(self) -> str:
        """The first node."""
        return f"{self.name}-control-plane"

    @property
    def worker(self) -> str:
        """The second node."""
        return f"{self.name}-worker"

    @property
    def nodes(self) -> tuple[str, str]:
        """Both."""
        return (self.control_plane, self.worker)

    @cached_property
    def client(self) -> ApiClient:
        """The administrator's, with kubectl of the cluster's version."""
        return ApiClient(self.kubeconfig, tool("kubectl"))

    @cached_property
    def faults(self) -> Faults:
        """What can be made to go wrong."""
        return Faults(self.client, self.control_plane)

    def shared_claim(self, namespace: str, name: str) -> Path:
        """A claim that any number of pods on both nodes may mount, to read and write.

        Returns:
            The folder of this machine that it is; anybody may write there.
        """
        volume = f"{namespace}-{name}"
        folder = self.shared / volume
        folder.mkdir()
        folder.chmod(0o777)
        spec = {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
        }
        self.client.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": volume},
                "spec": spec
                | {
                    "capacity": {"storage": "1Gi"},
                    "hostPath": {"path": f"{SHARED}/{volume}"},
                    "claimRef": {"namespace": namespace, "name": name},
                    "persistentVolumeReclaimPolicy": "Retain",
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"namespace": namespace, "name": name},
                "spec": spec
                | {"volumeName": volume, "resources": {"requests": {"storage": "1Gi"}}},
            },
        )
        return folder

    def load_image(self, *tags: str) -> None:
        """Put images of the docker daemon onto both nodes."""
        size = sum(map(images.size_bytes, tags)) / 1e6
        # Together: what they share is packed once.
        with step(f"loading {', '.join(tags)} ({size:.0f} MB)"):
            _kind("load", "docker-image", *tags, "--name", self.name)

    def save_logs(self, folder: Path) -> None:
        """Everything that helps to understand a failure: nodes' and pods' logs, all objects."""
        folder.mkdir(parents=True, exist_ok=True)
        _export_logs(self, folder)
        for file, arguments in {
            "pods.txt": ("get", "pods", "-A", "-o", "wide"),
            "events.txt": ("get", "events", "-A", "--sort-by=.lastTimestamp"),
            "objects.txt": ("get", "all,pvc,pv,configmaps,leases", "-A", "-o", "yaml"),
            "casparian.txt": ("get", "casparian", "-A", "-o", "yaml"),
            "nodes.txt": ("describe", "nodes"),
        }.items():
            said = self.client.kubectl(*arguments, check=False)
            (folder / file).write_text(said.stdout + said.stderr)


def prepare() -> tuple[str, bool]:
    """Programs and the node's image; returns the image, and whether it was made here.

    Raises:
        HarnessError: something is missing; the hint says what to install.
    """
    why_not = machine.why_not()
    if why_not:
        raise HarnessError("no cluster can be made on this machine", why_not)
    tools(("kind", "kubectl"))
    daemon.ensure()
    if not daemon.is_own() and _pulls():
        return PULLED_NODE, False
    return images.node_image(), True


def up(name: str = DEFAULT_NAME, *, stays: bool = True) -> Cluster:
    """Make a cluster, or find the one of that name that is there.

    Args:
        stays: It stays until `down`; else it goes with the last that is `using` it.

    Raises:
        HarnessError: it could not be made; what there was of it is gone, its logs are kept.
    """
    with locked(f"cluster-{name}"):
        cluster = find(name)
        if cluster is None:
            cluster = _make(name)
            _note(cluster, stays=stays)
        elif stays:
            _note(cluster, stays=True)
        return cluster


@contextmanager
def using(name: str = DEFAULT_NAME) -> Iterator[Cluster]:
    """A cluster for a while; it goes with its last user, unless `up` has made it to stay."""
    try:
        with locked(f"cluster-{name}-users", shared=True):
            yield up(name, stays=False)
    finally:
        with locked_if_free(f"cluster-{name}-users") as last:
            if last and not _noted(name).get("stays", True):
                down(name)


def _make(name: str) -> Cluster:
    image, own = prepare()
    cluster = Cluster(name, _STATE / name, own)
    began = time.monotonic()
    try:
        _create(cluster, image)
    except BaseException:
        _keep_logs_of_failure(cluster)
        _delete(cluster)
        raise
    say(f"the cluster {name} is up after {time.monotonic() - began:.1f} s")
    return cluster


def _note(cluster: Cluster, *, stays: bool) -> None:
    """Only what is noted counts as made."""
    noted = json.dumps({"own_image": cluster.own_image, "stays": stays})
    (cluster.folder / _NOTE).write_text(noted)


def _noted(name: str) -> dict[str, bool]:
    """What `_note` wrote; empty if there is no such cluster."""
    note = _STATE / name / _NOTE
    found: dict[str, bool] = json.loads(note.read_text()) if note.exists() else {}
    return found


def find(name: str = DEFAULT_NAME) -> Cluster | None:
    """The cluster of that name, if it is up.

    Raises:
        HarnessError: its nodes run but it does not answer.
    """
    noted = _noted(name)
    if not noted:
        return None
    cluster = Cluster(name, _STATE / name, noted["own_image"])
    if _are_running(cluster.nodes):
        # An answer may take a while on a machine that is busy.
        _await(lambda: _answers(cluster), f"an answer of the cluster {name}")
        return cluster
    say(f"nodes of the cluster {name} are gone: what is left of it is removed")
    _delete(cluster)
    return None


def _are_running(nodes: Iterable[str]) -> bool:
    """Frozen ones count too."""
    if not daemon.is_own() and not machine.docker_answers():
        return False
    return set(nodes) <= set(daemon.docker("ps", "--format", "{{.Names}}").split())


def _answers(cluster: Cluster) -> bool:
    try:
        cluster.client.request("GET", "/readyz")
    except (OSError, ApiError):
        return False
    return True


def down(name: str = DEFAULT_NAME) -> None:
    """Remove a cluster, and our own docker daemon if it was the last; fine if there is none."""
    with locked(f"cluster-{name}"):
        _delete(Cluster(name, _STATE / name, own_image=True))
    daemon.stop()


def _create(cluster: Cluster, image: str) -> None:
    _delete(cluster)
    cluster.folder.mkdir(parents=True)
    cluster.shared.mkdir()
    cluster.shared.chmod(0o777)
    configuration = cluster.folder / "kind.json"
    configuration.write_text(json.dumps(_configuration(cluster)))
    with step(f"kind create cluster {cluster.name}"):
        _kind(
            *("create", "cluster", "--name", cluster.name, "--image", image, "--retain"),
            *("--config", str(configuration), "--kubeconfig", str(cluster.kubeconfig)),
        )
    if cluster.own_image:
        nodes = _await(lambda: _with_ranges(cluster), "the nodes' ranges of addresses")
        # Before nodes are Ready, so that no DNS server starts with another configuration.
        cluster.client.apply(network.name_service(machine.name_servers()))
        network.connect(network.addresses(nodes))
    with step("waiting for nodes, DNS and storage"):
        _await(lambda: _ready(cluster), "nodes, DNS and storage to be ready")


def _configuration(cluster: Cluster) -> dict[str, Any]:
    mounts = [{"hostPath": str(cluster.shared), "containerPath": SHARED}]
    kubelet: dict[str, Any] = {"nodeStatusUpdateFrequency": "4s"}
    plane: dict[str, Any] = {
        # Nodes that are lost are noticed soon, pods on them replaced soon.
        "controllerManager": {"extraArgs": {"node-monitor-grace-period": "16s"}},
        "apiServer": {"extraArgs": {"default-unreachable-toleration-seconds": "20"}},
    }
    if cluster.own_image:
        kubelet |= {"cgroupDriver": "cgroupfs", "localStorageCapacityIsolation": False}
        plane |= {"imageRepository": images.REPOSITORY}
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": {
            "disableDefaultCNI": cluster.own_image,
            "ipFamily": "ipv4",
            "podSubnet": network.PODS,
        },
        "featureGates": {"MutatingAdmissionPolicy": True},
        "runtimeConfig": {"admissionregistration.k8s.io/v1beta1": "true"},
        "kubeadmConfigPatches": [
            json.dumps({"kind": "ClusterConfiguration", **plane}),
            json.dumps({"kind": "KubeletConfiguration", "failSwapOn": False, **kubelet}),
        ],
        "nodes": [{"role": role, "extraMounts": mounts} for role in ("control-plane", "worker")],
    }


def _with_ranges(cluster: Cluster) -> list[dict[str, Any]] | None:
    nodes = cluster.client.list("v1", "Node")
    ready = len(nodes) == len(cluster.nodes) and all("podCIDR" in n["spec"] for n in nodes)
    return nodes if ready else None


def _ready(cluster: Cluster) -> bool:
    client = cluster.client
    nodes = client.list("v1", "Node")
    deployments = [
        *client.list("apps/v1", "Deployment", "kube-system"),
        *client.list("apps/v1", "Deployment", "local-path-storage"),
    ]
    # Two of them: CoreDNS, and the provisioner of volumes.
    return (
        len(nodes) == len(cluster.nodes)
        and len(deployments) >= 2
        and all(_has(node, "Ready") for node in nodes)
        and all(_has(deployment, "Available") for deployment in deployments)
    )


def _has(thing: dict[str, Any], condition: str) -> bool:
    found = thing.get("status", {}).get("conditions", [])
    return any(c["type"] == condition and c["status"] == "True" for c in found)


def _await(ask: Callable[[], T | None], what: str) -> T:
    end = time.monotonic() + READY_S
    while not (answer := ask()):
        if time.monotonic() > end:
            raise HarnessError(f"waited {READY_S:.0f} s in vain for {what}", "see the nodes' logs")
        time.sleep(0.2)
    return answer


def _delete(cluster: Cluster) -> None:
    if cluster.folder.exists():
        if daemon.is_own() or machine.docker_answers():
            _thaw_all(cluster)
            _kind("delete", "cluster", "--name", cluster.name)
            daemon.docker("network", "rm", "kind", check=False)  # refused while others use it
        shutil.rmtree(cluster.folder)


def _thaw_all(cluster: Cluster) -> None:
    """A frozen container cannot be removed."""
    for node in cluster.nodes:
        daemon.docker("unpause", node, check=False)


def _keep_logs_of_failure(cluster: Cluster) -> None:
    folder = ROOT / "logs" / f"cluster-{cluster.name}"
    shutil.rmtree(folder, ignore_errors=True)
    _export_logs(cluster, folder)
    say(f"logs of the nodes are in {folder}")


def _export_logs(cluster: Cluster, folder: Path) -> None:
    """As much as there is: what cannot be had must not hide the failure that is looked into."""
    try:
        _kind("export", "logs", str(folder), "--name", cluster.name)
    except HarnessError as error:
        say(f"not all logs of the nodes could be had: {error.message}")


def _kind(*arguments: str) -> None:
    log = ROOT / "logs" / "kind.log"
    run_logged(
        [tool("kind"), *arguments],
        f"kind {' '.join(arguments[:2])}",
        log,
        environment=daemon.environment(),
    )


def _pulls() -> bool:
    if images.exists(PULLED_NODE):
        return True
    say(f"pulling {PULLED_NODE}")
    try:
        done = subprocess.run(
            ["docker", "pull", "--quiet", PULLED_NODE],
            capture_output=True,
            check=False,
            timeout=PULL_S,
            env={**os.environ, **daemon.environment()},
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
