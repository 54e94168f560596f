"""What may go wrong on a cluster, done on purpose. Nodes are containers of kind."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.harness import daemon
from cluster.harness.errors import HarnessError
from kube_kit import ApiClient, ApiError

_INTERFACE = "eth0"
# Before and after everything else, so that forwarded packets (the pods') meet them too.
_HOOKS = (("PREROUTING", "-i"), ("POSTROUTING", "-o"))
RETURN_S = 90.0


class Faults:
    """Each returns when the fault is in force; what is undone is undone by its counterpart."""

    def __init__(self, client: ApiClient, control_plane: str) -> None:
        self._client = client
        self._control_plane = control_plane

    # Nodes

    def freeze(self, node: str) -> None:
        """Stop every process of a node where it is; connections stay open and silent."""
        daemon.docker("pause", node)

    def thaw(self, node: str) -> None:
        """Let a frozen node go on, unaware of the time that has passed."""
        daemon.docker("unpause", node)

    @contextmanager
    def frozen(self, node: str) -> Iterator[None]:
        """A node frozen for a while."""
        self.freeze(node)
        try:
            yield
        finally:
            self.thaw(node)

    def cut(self, node: str) -> None:
        """Drop all packets between a node, its pods and everybody else. Its pods run on."""
        for chain, direction in _HOOKS:
            self._filter(node, "-I", chain, direction, _INTERFACE)

    def heal(self, node: str) -> None:
        """Undo `cut`; connections that have survived go on."""
        for chain, direction in _HOOKS:
            self._filter(node, "-D", chain, direction, _INTERFACE)

    @contextmanager
    def isolated(self, node: str) -> Iterator[None]:
        """A node without network for a while."""
        self.cut(node)
        try:
            yield
        finally:
            self.heal(node)

    # Pods

    def kill_container(self, namespace: str, pod: str, container: str) -> None:
        """SIGKILL to a container's first process; the kubelet will start it anew."""
        found = self._client.get("v1", "Pod", pod, namespace)
        status = found["status"]
        statuses = [  # sidecars are among the former
            *status.get("initContainerStatuses", []),
            *status.get("containerStatuses", []),
        ]
        wanted = next((each for each in statuses if each["name"] == container), None)
        if wanted is None or "running" not in wanted["state"]:
            raise HarnessError(f"{namespace}/{pod} has no running {container}", str(statuses))
        self._kill(found["spec"]["nodeName"], wanted["containerID"].removeprefix("containerd://"))

    def kill_pod(self, namespace: str, pod: str) -> None:
        """Delete a pod without any time to end in order, as when its node is lost."""
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}"
        self._client.request("DELETE", path, {"gracePeriodSeconds": 0})

    def evict(self, namespace: str, pod: str) -> None:
        """Ask a pod to leave, as draining a node does; budgets may refuse it (429)."""
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": namespace},
        }
        self._client.request("POST", f"/api/v1/namespaces/{namespace}/pods/{pod}/eviction", body)

    @contextmanager
    def without_api(self, namespace: str, pod: str) -> Iterator[None]:
        """A pod from which no packet reaches the API server for a while; watches stay silent."""
        found = self._client.get("v1", "Pod", pod, namespace)
        service = self._client.get("v1", "Service", "kubernetes", "default")
        rule = ("-s", found["status"]["podIP"], "-d", service["spec"]["clusterIP"])
        node = found["spec"]["nodeName"]
        self._filter(node, "-I", "PREROUTING", *rule)
        try:
            yield
        finally:
            self._filter(node, "-D", "PREROUTING", *rule)

    # Control plane

    def restart_api_server(self) -> None:
        """Kill the API server; returns when the new one answers."""
        pods = self._client.list("v1", "Pod", "kube-system", "component=kube-apiserver")
        before = _container(pods[0])
        self._kill(self._control_plane, before)
        self._await(lambda: self._answers_as_new(before))

    def _answers_as_new(self, before: str) -> bool:
        try:
            self._client.request("GET", "/readyz")
            pods = self._client.list("v1", "Pod", "kube-system", "component=kube-apiserver")
        except (OSError, ApiError):  # it is away, or does not know anybody's rights yet
            return False
        return bool(pods) and _container(pods[0]) not in {before, ""}

    def _await(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + RETURN_S
        while not condition():
            if time.monotonic() > end:
                raise HarnessError(f"not back within {RETURN_S:.0f} s", "see the node's logs")
            time.sleep(0.2)

    def _kill(self, node: str, container: str) -> None:
        daemon.docker(
            *("exec", node, "ctr", "--namespace=k8s.io", "task", "kill", "--signal=SIGKILL"),
            container,
        )

    def _filter(self, node: str, change: str, chain: str, *match: str) -> None:
        daemon.docker(
            *("exec", node, "iptables", "-w", "-t", "mangle", change, chain, *match),
            *("-m", "comment", "--comment", "fault", "-j", "DROP"),
        )


def _container(pod: dict[str, Any]) -> str:
    """The id of a pod's only container, empty while it has none."""
    statuses = pod["status"].get("containerStatuses", [{}])
    return str(statuses[0].get("containerID", "")).removeprefix("containerd://")
