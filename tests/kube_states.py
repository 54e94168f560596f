"""States for the operator's decisions, from what matters to a test."""

from collections.abc import Mapping
from typing import Any

from casparian_flow.domain.wiring import PluginStatus as Standing
from casparian_flow.kube.manifests_common import Site
from casparian_flow.kube.models import SourceRoot, source_of
from casparian_flow.kube.names import API_VERSION
from casparian_flow.kube.reasons import VerifiedReason
from casparian_flow.kube.reconcile_plugin import LedgerVersion, LedgerView
from casparian_flow.kube.verdict import Judgement, TopicWiring

NOW = "2026-01-01T00:00:00Z"
HASH = "1" * 64
SITE = Site(
    name="casparian",
    namespace="casparian",
    image="casparian-worker:1",
    sentinel="tcp://casparian-sentinel.casparian.svc:5555",
    control="tcp://casparian-sentinel.casparian.svc:5556",
    settings_toml="[trust]\n",
    server_key="server",
)
OUTPUTS = {"persistentVolumeClaim": {"claimName": "out"}}


def plugin_body(
    name: str = "sales",
    *,
    version: str = "1.0.0",
    generation: int = 1,
    spec: Mapping[str, Any] | None = None,
    status: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A CasparianPlugin as the API server has it."""
    return {
        "apiVersion": API_VERSION,
        "kind": "CasparianPlugin",
        "metadata": {
            "name": name,
            "namespace": "flow",
            "uid": f"uid-{name}",
            "generation": generation,
            "resourceVersion": "1",
        },
        "spec": {
            "version": version,
            "source": {"inline": "AAAA"},
            "workers": {"outputs": OUTPUTS},
            **(spec or {}),
        },
        **({"status": dict(status)} if status else {}),
    }


def root_body(name: str = "inbox", **spec: Any) -> dict[str, Any]:
    """A SourceRoot as the API server has it."""
    volume = {"persistentVolumeClaim": {"claimName": "files"}}
    return {
        "apiVersion": API_VERSION,
        "kind": "SourceRoot",
        "metadata": {
            "name": name,
            "namespace": "flow",
            "uid": f"uid-{name}",
            "generation": 1,
            "resourceVersion": "1",
            "annotations": spec.pop("annotations", {}),
        },
        "spec": {"volume": volume, **spec},
    }


def root(name: str = "inbox", **spec: Any) -> SourceRoot:
    return source_of(root_body(name, **spec))


def judged(
    *,
    version: str = "1.0.0",
    artifact_hash: str = HASH,
    lock_hash: str = "",
    topics: Mapping[str, TopicWiring] | None = None,
) -> Judgement:
    """A bundle of plugin `sales` that may run."""
    return Judgement(
        VerifiedReason.VERIFIED,
        "signed by alice",
        name="sales",
        version=version,
        artifact_hash=artifact_hash,
        signer="alice",
        lock_hash=lock_hash,
        bundle=b"bundle",
        compressed=b"gz",
        topics=topics or {"rows": TopicWiring(("parquet://rows",))},
    )


def ledger(
    standing: Standing,
    *,
    version: str = "1.0.0",
    artifact_hash: str = HASH,
    paused: str | None = None,
    error: str = "",
) -> LedgerView:
    """A ledger with one version."""
    known = LedgerVersion(version, artifact_hash, standing, "alice", error)
    return LedgerView([known], paused)
