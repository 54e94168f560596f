"""Our kinds on a test's API server, and small valid objects of each."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kube_kit import ApiServer

from casparian_flow.kube.names import API_VERSION

REPOSITORY = Path(__file__).parents[1]
KUBE = REPOSITORY / "operator" / "casparian_flow" / "kube"
OPERATOR = ("casparian", "casparian-operator")
"""Namespace and name of the operator's account, as the policies have it."""
DIGEST = "0" * 64

Manifest = dict[str, Any]

SPECS: Mapping[str, Manifest] = {
    "CasparianPlugin": {"version": "1.0.0", "source": {"inline": "H4sIAAAAAAAC"}},
    "SourceRoot": {"volume": {"persistentVolumeClaim": {"claimName": "inbox"}}},
    "Approval": {
        "approvalId": "0d6c1c0e-6f7f-4a53-8a5c-6b0b9d5a7f3c",
        "operation": {"type": "run", "plugin": "finance/sales", "fileCount": 3},
        "summary": "Run sales over 3 files",
        "digest": DIGEST,
        "requestedBy": "rita",
        "expiresAt": "2030-01-01T00:00:00Z",
    },
}


def install(api: ApiServer, *, stamp: bool = True) -> None:
    """Have the kinds served, with roles and admission policies.

    Args:
        stamp: also the policy that writes who decides.
    """
    api.client.apply(*sorted((REPOSITORY / "crds").glob("*.yaml")))
    api.client.apply(*sorted((KUBE / "roles").glob("*.yaml")))
    api.client.apply(KUBE / "admission" / "approval_guard.yaml")
    if stamp:
        api.client.apply(KUBE / "admission" / "approval_stamp.yaml")


def manifest(kind: str, namespace: str, name: str = "sales", **changes: Any) -> Manifest:
    """An object of a kind.

    Args:
        changes: fields of the spec by path, with `__` between the parts; None takes one away.
    """
    spec = copy.deepcopy(SPECS[kind])
    for path, value in changes.items():
        *way, last = path.split("__")
        place = spec
        for part in way:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, "spec": spec}
