"""What the manifests of all pods share: their site, their guards, their volumes. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from casparian_flow.kube import names
from casparian_flow.kube.kinds import Body, Kind, Manifest
from casparian_flow.kube.models import Resource
from casparian_flow.kube.names import object_name
from casparian_flow.kube.schema_parts import Volume

USER_ID: Final = 10001
"""Of every container, so that containers of a pod can open each other's socket and scratch."""
TOKEN_SECONDS: Final = 3600
WORKER_METRICS_PORT: Final = 9464
SCRATCH_VOLUME: Final = "scratch"
INDEX_CA_PATH: Final = "/etc/casparian-index"
WHEELHOUSE_PATH: Final = "/wheelhouse"
SETTINGS_KEY: Final = "config.toml"


@dataclass(frozen=True, slots=True)
class Site:
    """What the pods of one installation share; from the operator's settings.

    Attributes:
        name: first part of the names of the installation's own objects.
        namespace: where the operator runs.
        image: of workers, provisioning and Scouts.
        sentinel, control: addresses for workers and for other pods, `tcp://HOST:PORT`.
        settings_toml: the settings file of every pod.
        server_key: content of the file with the Sentinel's public CURVE key.
        job_timeout_s: longest that a job may run; pods that end are given that time.
        log_level, log_format: as in [logging].
        storage_class: of volumes for environments that many nodes mount; "" for none, so that
            each pod makes its own.
        worker_resources: of plugin containers whose object names none.
        slots: plugins that one worker runs at a time.
        memory_mb: mebibytes that one plugin with its children may use.
        scratch_size: of the volume for copies of inputs, and of the plugins' own temporary one.
        log_level, log_format: of containers that have no settings file.
    """

    name: str
    namespace: str
    image: str
    sentinel: str
    control: str
    settings_toml: str
    server_key: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    job_timeout_s: float = 300.0
    network_policies: bool = True
    storage_class: str = ""
    environments_size: str = "10Gi"
    index_ca_config_map: str = ""
    wheelhouse_claim: str = ""
    worker_resources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    slots: int = 1
    memory_mb: int = 2048
    scratch_size: str = "10Gi"
    log_level: str = "INFO"
    log_format: str = "text"

    @property
    def environments_claim(self) -> str:
        """The claim on the shared volume for environments, one in each namespace."""
        return object_name("environments", self.name)


# -- metadata ---------------------------------------------------------------------------------


def manifest(
    kind: Kind,
    name: str,
    owner: Resource,
    labels: Mapping[str, str],
    annotations: Mapping[str, str] | None = None,
    **rest: Any,
) -> Manifest:
    """An object that belongs to another, and is collected with it."""
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": {
            "name": name,
            "namespace": owner.metadata.namespace,
            "labels": dict(labels),
            "annotations": dict(annotations or {}),
            "ownerReferences": [owner_reference(owner)],
        },
        **rest,
    }


def owner_reference(owner: Resource) -> dict[str, Any]:
    """Says whose object it is. It does not block the owner's deletion: that would need a right of
    its own, and hold up a `kubectl delete`."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": type(owner).__name__,
        "name": owner.metadata.name,
        "uid": owner.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


# -- guards -----------------------------------------------------------------------------------


def pod_guard() -> dict[str, Any]:
    """Pod Security `restricted`, for a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_guard() -> dict[str, Any]:
    """Pod Security `restricted`, for a container, and nothing written outside its volumes."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def container(
    site: Site,
    name: str,
    command: Sequence[str],
    mounts: Sequence[Mapping[str, Any]],
    **rest: Any,
) -> dict[str, Any]:
    """A container of this project's image."""
    return {
        "name": name,
        "image": site.image,
        "imagePullPolicy": site.pull_policy,
        "command": list(command),
        "securityContext": container_guard(),
        "volumeMounts": [dict(m) for m in mounts],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **rest,
    }


def pod(
    site: Site,
    containers: Sequence[Mapping[str, Any]],
    volumes: Sequence[Mapping[str, Any]],
    *,
    account: str,
    **rest: Any,
) -> dict[str, Any]:
    """A pod's spec. No token is mounted but by a volume that asks for one."""
    spec: dict[str, Any] = {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_guard(),
        "containers": list(containers),
        "volumes": list(volumes),
        **rest,
    }
    if site.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in site.pull_secrets]
    return spec


# -- volumes ----------------------------------------------------------------------------------


def volume(name: str, given: Volume, *, read_only: bool) -> dict[str, Any]:
    """A volume that a person has named."""
    if given.persistent_volume_claim is not None:
        claim = {"claimName": given.persistent_volume_claim.claim_name, "readOnly": read_only}
        return {"name": name, "persistentVolumeClaim": claim}
    assert given.csi is not None  # the API server sees to it that it is one of the two
    csi = given.csi.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"name": name, "csi": {**csi, "readOnly": read_only}}


def empty(name: str, *, medium: Literal["", "Memory"] = "", size: str = "") -> dict[str, Any]:
    """A folder that lives as long as its pod."""
    settings = {k: v for k, v in (("medium", medium), ("sizeLimit", size)) if v}
    return {"name": name, "emptyDir": settings}


def mount(name: str, path: str, *, read_only: bool = False, sub_path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "mountPath": path}
    if read_only:
        found["readOnly"] = True
    if sub_path:
        found["subPath"] = sub_path
    return found


def token_volume(name: str) -> dict[str, Any]:
    """The proof which pod this is, for the Sentinel alone: the API server does not take it."""
    token = {
        "audience": names.TOKEN_AUDIENCE,
        "expirationSeconds": TOKEN_SECONDS,
        "path": names.TOKEN_FILE.rpartition("/")[2],
    }
    return {"name": name, "projected": {"sources": [{"serviceAccountToken": token}]}}


def secret_volume(name: str, secret: str) -> dict[str, Any]:
    """A Secret's keys as files for the pod's own user and group."""
    return {"name": name, "secret": {"secretName": secret, "defaultMode": 0o440}}


def config_volume(name: str, config_map: str, *keys: str) -> dict[str, Any]:
    """Some keys of a ConfigMap as files."""
    items = [{"key": key, "path": key} for key in keys]
    return {"name": name, "configMap": {"name": config_map, "items": items}}


def field_variable(name: str, path: str) -> dict[str, Any]:
    """A variable with a fact about the pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


# -- one node for those who share a volume that one node can mount -----------------------------

HOSTNAME: Final = "kubernetes.io/hostname"
_MANY = frozenset({"ReadWriteMany", "ReadOnlyMany"})


def claim_of(given: Volume | None) -> str:
    """The claim that a volume is of, "" for another kind."""
    found = given.persistent_volume_claim if given is not None else None
    return found.claim_name if found is not None else ""


def single_node(claim: Body | None) -> bool:
    """Whether one node only can mount a claim's volume at a time."""
    if claim is None:
        return False
    modes = claim.get("spec", {}).get("accessModes", ())
    return bool(modes) and not _MANY.intersection(modes)


def claim_labels(claims: Iterable[str]) -> dict[str, str]:
    """Labels of pods that mount these claims, by which they find each other."""
    return {f"claim.{names.GROUP}/{names.label_value(claim)}": "mounted" for claim in claims}


def beside(affinity: Mapping[str, Any], *selectors: Mapping[str, str]) -> dict[str, Any]:
    """An affinity that also holds the pod to the node of the pods with these labels, where there
    are any: a pod that asks for a volume which is mounted elsewhere would hang."""
    if not selectors:
        return dict(affinity)
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    pods: dict[str, Any] = dict(affinity.get("podAffinity") or {})
    pods[required] = [
        *pods.get(required, ()),
        *(
            {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": HOSTNAME}
            for labels in selectors
        ),
    ]
    return {**affinity, "podAffinity": pods}


# -- network ----------------------------------------------------------------------------------


def network_policy_spec(
    site: Site, selected: Mapping[str, str], ports: Sequence[int], *, metrics: int = 0
) -> dict[str, Any]:
    """Out: the Sentinel's ports and name resolution, and servers of sinks. In: metrics alone.

    A sink's or index's address may be anywhere, so only what must not be reached is left out:
    nothing inside this policy can say "all but the API server" by name. Pods that need no server
    beside the Sentinel reach none.
    """
    sentinel = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": site.namespace}},
        "podSelector": {
            "matchLabels": {names.NAME_LABEL: "casparian", names.COMPONENT_LABEL: "operator"}
        },
    }
    dns = [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]
    spec: dict[str, Any] = {
        "podSelector": {"matchLabels": dict(selected)},
        "policyTypes": ["Ingress", "Egress"],
        "egress": [
            {"to": [sentinel], "ports": [{"protocol": "TCP", "port": p} for p in ports]},
            {"ports": dns},
        ],
    }
    if metrics:
        spec["ingress"] = [{"ports": [{"protocol": "TCP", "port": metrics}]}]
    return spec
