"""Pods for tests that Pod Security's `restricted` lets through, and what they say."""

from collections.abc import Mapping, Sequence

from kube_kit.client import ApiClient, ApiError, Manifest

NOBODY = 65532


def restricted_pod(
    namespace: str,
    name: str,
    image: str,
    command: Sequence[str],
    *,
    node: str | None = None,
    claims: Mapping[str, str] | None = None,
    restart: str = "Never",
) -> Manifest:
    """A pod with one container, `main`.

    Args:
        node: Where it has to run.
        claims: PersistentVolumeClaims by the path at which each is mounted.
        restart: Its restart policy.
    """
    mounts = dict(claims or {})
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": claim, "mountPath": path} for path, claim in mounts.items()],
    }
    spec = {
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": NOBODY,
            "runAsGroup": NOBODY,
            "fsGroup": NOBODY,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": claim, "persistentVolumeClaim": {"claimName": claim}}
            for claim in mounts.values()
        ],
        # On the control plane's node too, and not moved away from a node that is lost.
        "tolerations": [{"operator": "Exists"}],
    }
    if node is not None:
        # Not by nodeName, which would pass over the scheduler, and with it the binding of volumes.
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    meta = {"name": name, "namespace": namespace, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def await_ready(kube: ApiClient, namespace: str, name: str, seconds: float = 90.0) -> Manifest:
    """Wait until a pod is Ready; returns it."""

    def ready() -> Manifest | None:
        pod = kube.get("v1", "Pod", name, namespace)
        conditions = pod["status"].get("conditions", [])
        met = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
        return pod if met else None

    found: Manifest = kube.wait(ready, seconds)
    return found


def await_end(kube: ApiClient, namespace: str, name: str, seconds: float = 90.0) -> str:
    """Wait until a pod has succeeded; returns what it has said.

    Raises:
        AssertionError: it failed.
    """

    def ended() -> str | None:
        phase = kube.get("v1", "Pod", name, namespace)["status"].get("phase")
        return phase if phase in {"Succeeded", "Failed"} else None

    phase = kube.wait(ended, seconds)
    said = log(kube, namespace, name)
    assert phase == "Succeeded", f"{namespace}/{name} failed: {said}"
    return said


def log(kube: ApiClient, namespace: str, name: str, container: str = "main") -> str:
    """What a container has said so far; empty before it has started."""
    path = f"/api/v1/namespaces/{namespace}/pods/{name}/log"
    try:
        return str(kube.request("GET", path, query={"container": container}))
    except ApiError as error:
        # Its node has not heard of the pod yet, or has not started the container.
        if "pods/log" not in error.message and error.reason != "BadRequest":
            raise
        return ""
