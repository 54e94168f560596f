"""The objects of the workers of one plugin version. Pure: values in, manifests out.

Pod: container `worker` speaks with the Sentinel and writes to the sinks; container `plugin` runs
the plugin's code and has neither key nor token nor Secret. `plugin` is a sidecar in Kubernetes'
sense (an init container that goes on), so that it is there before the worker and ends after it: a
worker that is asked to stop lets running jobs finish.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from casparian_flow.kube import manifests_common as common
from casparian_flow.kube import names
from casparian_flow.kube.kinds import (
    CONFIG_MAP,
    DEPLOYMENT,
    NETWORK_POLICY,
    SECRET,
    SERVICE_ACCOUNT,
    Manifest,
)
from casparian_flow.kube.manifests_common import Site
from casparian_flow.kube.models import CasparianPlugin, SourceRoot
from casparian_flow.kube.plan import amount_of
from casparian_flow.kube.schema_parts import Volume
from casparian_flow.logs import FORMAT_VARIABLE, LEVEL_VARIABLE
from casparian_flow.protocol.curve import CLIENT_SECRET, SERVER_PUBLIC

GRACE_S: Final = 30.0
"""Beside the longest job, for handing back what has not begun."""
PROGRESS_S: Final = 600
"""After which a Deployment that does not come up says so."""
WORKER_RESOURCES: Final = {
    "requests": {"cpu": "100m", "memory": "192Mi"},
    "limits": {"memory": "1Gi"},
}
PLUGIN_REQUESTS: Final = {"cpu": "200m", "memory": "512Mi"}
"""Of containers for which neither the object nor the settings name any."""
HEADROOM_MB_MIN: Final = 96
"""The launcher keeps all plugins together a tenth below the container's limit, and this at
least."""
_SETTINGS, _BUNDLE, _CURVE, _TOKEN = "settings", "bundle", "curve", "token"
_LAUNCHER, _ENVIRONMENTS, _OUTPUTS, _TMP = "launcher", "environments", "outputs", "tmp"
_PLUGIN_TMP = "plugin-tmp"
"""What plugins write to; the worker does not look into it."""


@dataclass(frozen=True, slots=True)
class WorkerSet:
    """The workers of one plugin version.

    Attributes:
        plugin: whose they are.
        name: the plugin's own name.
        bundle: the signed bundle, gzipped.
        lock_hash: of the environment; "" for none.
        roots: SourceRoots that they read.
        client_key: the file with their CURVE key.
        deployed_at_us: when the ledger recorded the version, 0 if it has not.
        one_node: whether all of them have to run on the same node.
        single_node_claims: mounted claims whose volume one node only can have.
        open_egress: whether a sink is a server somewhere.
    """

    plugin: CasparianPlugin
    name: str
    version: str
    artifact_hash: str
    signer: str
    bundle: bytes = field(repr=False)
    lock_hash: str
    roots: Sequence[SourceRoot]
    client_key: str = field(repr=False)
    replicas: int
    deployed_at_us: int = 0
    one_node: bool = False
    single_node_claims: tuple[str, ...] = ()
    open_egress: bool = False

    @property
    def object_name(self) -> str:
        """Of the Deployment and of all that goes with it."""
        return names.deployment_name(self.plugin.metadata.name, self.version, self.artifact_hash)

    @property
    def selector(self) -> dict[str, str]:
        """Labels that these pods have and no others."""
        return {
            names.PLUGIN_LABEL: names.label_value(self.plugin.metadata.name),
            names.COMPONENT_LABEL: names.WORKER,
            names.ARTIFACT_HASH: self.artifact_hash[:12],
        }

    @property
    def labels(self) -> dict[str, str]:
        return {
            **names.labels(names.WORKER, plugin=self.plugin.metadata.name, version=self.version),
            **self.selector,
        }

    @property
    def annotations(self) -> dict[str, str]:
        return {
            names.ARTIFACT_HASH: self.artifact_hash,
            names.SIGNER: self.signer,
            names.PLUGIN_NAME: self.name,
        }


def worker_objects(workers: WorkerSet, site: Site) -> list[Manifest]:
    """All of them, in the order in which they are needed."""
    made = [_account(workers), _secret(workers, site), _config_map(workers, site)]
    if site.network_policies:
        made.append(_network_policy(workers, site))
    return [*made, deployment(workers, site)]


def _account(workers: WorkerSet) -> Manifest:
    """One for each Deployment: its token tells the Sentinel which plugin version a pod is of."""
    return common.manifest(
        SERVICE_ACCOUNT,
        workers.object_name,
        workers.plugin,
        workers.labels,
        automountServiceAccountToken=False,
    )


def _secret(workers: WorkerSet, site: Site) -> Manifest:
    files = {CLIENT_SECRET: workers.client_key, SERVER_PUBLIC: site.server_key}
    return common.manifest(
        SECRET,
        workers.object_name,
        workers.plugin,
        workers.labels,
        type="Opaque",
        data={name: base64.b64encode(text.encode()).decode() for name, text in files.items()},
    )


def _config_map(workers: WorkerSet, site: Site) -> Manifest:
    """Settings, which pods read anew when they change, and the bundle for provisioning."""
    return common.manifest(
        CONFIG_MAP,
        workers.object_name,
        workers.plugin,
        workers.labels,
        workers.annotations,
        data={common.SETTINGS_KEY: site.settings_toml},
        binaryData={names.BUNDLE_KEY: base64.b64encode(workers.bundle).decode()},
    )


def _network_policy(workers: WorkerSet, site: Site) -> Manifest:
    spec = common.network_policy_spec(
        site, workers.selector, [names.WORKER_PORT], metrics=common.WORKER_METRICS_PORT
    )
    if workers.open_egress or _provisions_in_pod(workers, site):
        spec["egress"] = [{}]
    return common.manifest(
        NETWORK_POLICY, workers.object_name, workers.plugin, workers.labels, spec=spec
    )


def deployment(workers: WorkerSet, site: Site) -> Manifest:
    """The Deployment alone."""
    template = {
        "metadata": {
            "labels": {**workers.labels, **common.claim_labels(workers.single_node_claims)},
            "annotations": workers.annotations,
        },
        "spec": _pod(workers, site),
    }
    return common.manifest(
        DEPLOYMENT,
        workers.object_name,
        workers.plugin,
        workers.labels,
        workers.annotations,
        spec={
            "replicas": workers.replicas,
            "revisionHistoryLimit": 1,
            "progressDeadlineSeconds": PROGRESS_S,
            "selector": {"matchLabels": workers.selector},
            # Of one version's own pods, as after an upgrade of the image: the old one goes first
            # where two at a time would write one file.
            "strategy": {"type": "Recreate" if workers.one_node else "RollingUpdate"},
            "template": template,
        },
    )


def _pod(workers: WorkerSet, site: Site) -> dict[str, Any]:
    settings = workers.plugin.spec.workers
    inits: list[dict[str, Any]] = []
    if _provisions_in_pod(workers, site):
        inits.append(provisioner(site, "provision", workers.deployed_at_us))
    inits.append(_plugin_container(workers, site))
    rest: dict[str, Any] = {
        "initContainers": inits,
        "terminationGracePeriodSeconds": math.ceil(site.job_timeout_s + GRACE_S),
        "nodeSelector": dict(settings.node_selector),
        "tolerations": [
            t.model_dump(mode="json", by_alias=True, exclude_none=True)
            for t in settings.tolerations
        ],
    }
    affinity = _affinity(workers)
    if affinity:
        rest["affinity"] = affinity
    return common.pod(
        site,
        [_worker_container(workers, site)],
        _volumes(workers, site),
        account=workers.object_name,
        **rest,
    )


def _affinity(workers: WorkerSet) -> dict[str, Any]:
    given = workers.plugin.spec.workers.affinity or {}
    selectors: list[Mapping[str, str]] = [
        common.claim_labels([claim]) for claim in workers.single_node_claims
    ]
    if workers.one_node:
        # Beside each other, also while one version takes over from another.
        plugin = names.label_value(workers.plugin.metadata.name)
        selectors.append({names.PLUGIN_LABEL: plugin, names.COMPONENT_LABEL: names.WORKER})
    return common.beside(given, *selectors)


def _worker_container(workers: WorkerSet, site: Site) -> dict[str, Any]:
    command = [
        "casparian", "worker",
        "--connect", site.sentinel,
        "--launcher", names.LAUNCHER_SOCKET,
        "--output", names.OUTPUTS_PATH,
    ]  # fmt: skip
    mounts = [
        common.mount(_SETTINGS, names.SETTINGS_PATH, read_only=True),
        common.mount(_CURVE, names.CURVE_PATH, read_only=True),
        common.mount(_TOKEN, names.TOKEN_PATH, read_only=True),
        *_shared_mounts(workers, inputs_read_only=False),
        common.mount(_TMP, "/tmp"),  # noqa: S108 - a volume of the pod's own
        *_source_mounts(workers),
        _outputs_mount(workers),
    ]
    return common.container(
        site,
        "worker",
        command,
        mounts,
        env=_environment(workers),
        ports=[{"name": "metrics", "containerPort": common.WORKER_METRICS_PORT, "protocol": "TCP"}],
        resources=WORKER_RESOURCES,
        readinessProbe=_probe("/readyz", period_s=2, failures=3),
        livenessProbe=_probe("/healthz", period_s=20, failures=6),
    )


def _probe(path: str, *, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": common.WORKER_METRICS_PORT},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _environment(workers: WorkerSet) -> list[dict[str, Any]]:
    given = [
        e.model_dump(mode="json", by_alias=True, exclude_none=True)
        for e in workers.plugin.spec.workers.env
    ]
    return [
        {"name": "CASPARIAN_CONFIG", "value": names.SETTINGS_FILE},
        {"name": "HOME", "value": "/tmp"},  # noqa: S108 - a volume of the pod's own
        common.field_variable("POD_NAME", "metadata.name"),
        common.field_variable("POD_NAMESPACE", "metadata.namespace"),
        common.field_variable("NODE_NAME", "spec.nodeName"),
        *given,
    ]


def _plugin_container(workers: WorkerSet, site: Site) -> dict[str, Any]:
    command = ["python", "-m", "casparian_worker.launcher", "--socket", names.LAUNCHER_SOCKET]
    return common.container(
        site,
        "plugin",
        command,
        [
            *_shared_mounts(workers, inputs_read_only=True),
            common.mount(_PLUGIN_TMP, "/tmp"),  # noqa: S108 - as above
        ],
        restartPolicy="Always",
        env=[
            {"name": "HOME", "value": "/tmp"},  # noqa: S108 - as above
            {"name": LEVEL_VARIABLE, "value": site.log_level},
            {"name": FORMAT_VARIABLE, "value": site.log_format},
        ],
        resources=plugin_resources(workers.plugin, site),
    )


def plugin_resources(plugin: CasparianPlugin, site: Site) -> dict[str, dict[str, Any]]:
    """What the container with the plugin's code is given: as the object says, else as the settings
    say. Its memory is always limited; where nobody says how far, there is room for a full slot each
    and a trial beside them.
    """
    said = plugin.spec.workers.resources.model_dump(mode="json", exclude_defaults=True)
    chosen: Mapping[str, Mapping[str, Any]] = said or site.worker_resources
    requests = dict(chosen.get("requests") or ({} if chosen else PLUGIN_REQUESTS))
    limits = dict(chosen.get("limits") or {})
    if "memory" not in limits:
        limits["memory"] = _memory_limit(site, str(requests.get("memory", "0")))
    return {"requests": requests, "limits": limits} if requests else {"limits": limits}


def _memory_limit(site: Site, requested: str) -> str:
    """Never below what is set aside: the API server refuses that."""
    plugins = (site.slots + 1) * site.memory_mb
    mebibytes = plugins + max(math.ceil(plugins / 9), HEADROOM_MB_MIN)
    least = amount_of(requested)
    return requested if least is None or least > mebibytes * 1024**2 else f"{mebibytes}Mi"


def provisioner(site: Site, name: str, deployed_at_us: int = 0) -> dict[str, Any]:
    """The container that makes an environment, in a Job or before a worker."""
    variables = [
        {"name": "CASPARIAN_CONFIG", "value": names.SETTINGS_FILE},
        {"name": "HOME", "value": "/tmp"},  # noqa: S108 - as above
    ]
    mounts = [
        common.mount(_SETTINGS, names.SETTINGS_PATH, read_only=True),
        common.mount(_BUNDLE, names.BUNDLE_PATH, read_only=True),
        common.mount(_ENVIRONMENTS, names.ENVIRONMENTS_PATH),
        common.mount(_TMP, "/tmp"),  # noqa: S108 - as above
    ]
    if site.index_ca_config_map:
        mounts.append(common.mount("index-ca", common.INDEX_CA_PATH, read_only=True))
    if site.wheelhouse_claim:
        mounts.append(common.mount("wheelhouse", common.WHEELHOUSE_PATH, read_only=True))
    command = [
        "python", "-m", "casparian_worker.provision",
        "--bundle", f"{names.BUNDLE_PATH}/{names.BUNDLE_KEY}",
        "--environments", names.ENVIRONMENTS_PATH,
    ]  # fmt: skip
    if deployed_at_us:
        # For keys that count for a time only.
        command += ["--deployed-at-us", str(deployed_at_us)]
    return common.container(
        site,
        name,
        command,
        mounts,
        env=variables,
        resources={"requests": {"cpu": "200m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
    )


def provisioner_volumes(
    site: Site, config_map: str, environments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What `provisioner` mounts.

    Args:
        config_map: with settings and bundle.
        environments: the volume that the environment is made on, named "environments".
    """
    volumes = [
        common.config_volume(_SETTINGS, config_map, common.SETTINGS_KEY),
        common.config_volume(_BUNDLE, config_map, names.BUNDLE_KEY),
        dict(environments),
        common.empty(_TMP),
    ]
    return [*volumes, *_index_volumes(site)]


def _index_volumes(site: Site) -> list[dict[str, Any]]:
    volumes = []
    if site.index_ca_config_map:
        volumes.append(common.config_volume("index-ca", site.index_ca_config_map, "ca.crt"))
    if site.wheelhouse_claim:
        claim = {"claimName": site.wheelhouse_claim, "readOnly": True}
        volumes.append({"name": "wheelhouse", "persistentVolumeClaim": claim})
    return volumes


def environments_volume(site: Site, *, read_only: bool) -> dict[str, Any]:
    """The shared volume of environments, or a pod's own where there is none."""
    if not site.storage_class:
        return common.empty(_ENVIRONMENTS)
    claim = {"claimName": site.environments_claim, "readOnly": read_only}
    return {"name": _ENVIRONMENTS, "persistentVolumeClaim": claim}


def _provisions_in_pod(workers: WorkerSet, site: Site) -> bool:
    return bool(workers.lock_hash) and not site.storage_class


def _shared_mounts(workers: WorkerSet, *, inputs_read_only: bool) -> list[dict[str, Any]]:
    """What both containers see of each other: the launcher's socket, and the copies of inputs that
    the worker makes in the scratch folder."""
    mounts = [
        common.mount(_LAUNCHER, names.LAUNCHER_PATH),
        common.mount(common.SCRATCH_VOLUME, names.SCRATCH_PATH, read_only=inputs_read_only),
    ]
    if workers.lock_hash:
        mounts.append(common.mount(_ENVIRONMENTS, names.ENVIRONMENTS_PATH, read_only=True))
    return mounts


def _source_mounts(workers: WorkerSet) -> list[dict[str, Any]]:
    return [
        common.mount(
            _root_volume(root),
            names.source_path(root.metadata.namespace, root.metadata.name),
            read_only=True,
            sub_path=root.spec.path,
        )
        for root in workers.roots
    ]


def _root_volume(root: SourceRoot) -> str:
    return names.object_name("root", root.metadata.name)


def _outputs_mount(workers: WorkerSet) -> dict[str, Any]:
    outputs = workers.plugin.spec.workers.outputs
    return common.mount(
        _OUTPUTS, names.OUTPUTS_PATH, sub_path="" if outputs is None else outputs.sub_path
    )


def _volumes(workers: WorkerSet, site: Site) -> list[dict[str, Any]]:
    outputs: Volume | None = workers.plugin.spec.workers.outputs
    volumes = [
        common.config_volume(_SETTINGS, workers.object_name, common.SETTINGS_KEY),
        common.secret_volume(_CURVE, workers.object_name),
        common.token_volume(_TOKEN),
        common.empty(_LAUNCHER, medium="Memory", size="1Mi"),
        common.empty(common.SCRATCH_VOLUME, size=site.scratch_size),
        common.empty(_TMP),
        common.empty(_PLUGIN_TMP, size=site.scratch_size),
        *(common.volume(_root_volume(r), r.spec.volume, read_only=True) for r in workers.roots),
        common.empty(_OUTPUTS)
        if outputs is None
        else common.volume(_OUTPUTS, outputs, read_only=False),
    ]
    if workers.lock_hash:
        volumes.append(environments_volume(site, read_only=True))
    if _provisions_in_pod(workers, site):
        volumes.append(common.config_volume(_BUNDLE, workers.object_name, names.BUNDLE_KEY))
        volumes += _index_volumes(site)
    return volumes
