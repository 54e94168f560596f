"""The kinds of objects that the operator reads and writes, and where the API server has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from casparian_flow.kube import names

Body = Mapping[str, Any]
"""An object as the API server has it."""
Manifest = dict[str, Any]
"""An object as it is applied."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Where objects of one kind are.

    >>> DEPLOYMENT.path("finance", "worker-sales")
    '/apis/apps/v1/namespaces/finance/deployments/worker-sales'
    >>> POD.path("finance")
    '/api/v1/namespaces/finance/pods'
    """

    api_version: str
    name: str
    plural: str

    def path(self, namespace: str, name: str = "") -> str:
        root = "/apis/" if "/" in self.api_version else "/api/"
        place = f"{root}{self.api_version}/namespaces/{namespace}/{self.plural}"
        return f"{place}/{name}" if name else place


PLUGIN: Final = Kind(names.API_VERSION, names.PLUGIN_KIND, names.PLUGINS)
SOURCE: Final = Kind(names.API_VERSION, names.SOURCE_KIND, names.SOURCES)
APPROVAL: Final = Kind(names.API_VERSION, names.APPROVAL_KIND, names.APPROVALS)
DEPLOYMENT: Final = Kind("apps/v1", "Deployment", "deployments")
JOB: Final = Kind("batch/v1", "Job", "jobs")
CRON_JOB: Final = Kind("batch/v1", "CronJob", "cronjobs")
CONFIG_MAP: Final = Kind("v1", "ConfigMap", "configmaps")
SECRET: Final = Kind("v1", "Secret", "secrets")
SERVICE_ACCOUNT: Final = Kind("v1", "ServiceAccount", "serviceaccounts")
CLAIM: Final = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
NETWORK_POLICY: Final = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
POD: Final = Kind("v1", "Pod", "pods")
EVENT: Final = Kind("v1", "Event", "events")
LEASE: Final = Kind("coordination.k8s.io/v1", "Lease", "leases")

OWN: Final = (PLUGIN, SOURCE, APPROVAL)
"""Of ours: what people write."""
MADE: Final = (
    SERVICE_ACCOUNT,
    SECRET,
    CONFIG_MAP,
    CLAIM,
    NETWORK_POLICY,
    JOB,
    DEPLOYMENT,
    CRON_JOB,
)
"""What the operator makes of it, in the order in which it is applied."""
_BY_NAME: Final = {(k.api_version, k.name): k for k in (*OWN, *MADE, POD, EVENT, LEASE)}


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """One object."""

    kind: str
    """As in `Kind.name`; all kinds here differ in it."""
    namespace: str
    name: str


def kind_of(body: Body) -> Kind:
    """Raises KeyError for a kind that is none of these."""
    return _BY_NAME[body["apiVersion"], body["kind"]]


def named(kind: str) -> Kind:
    """The kind of that name; raises KeyError."""
    return next((k for k in _BY_NAME.values() if k.name == kind), None) or _unknown(kind)


def ref_of(body: Body) -> Ref:
    """Which object this is."""
    meta = body["metadata"]
    return Ref(body["kind"], meta["namespace"], meta["name"])


def _unknown(kind: str) -> Kind:
    raise KeyError(kind)
