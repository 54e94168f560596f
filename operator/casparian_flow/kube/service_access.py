"""Keys of the installation's other services, backups and the MCP server: admitted, and kept in
their Secrets."""

import base64
from typing import Final, Literal

from casparian_flow.kube import names
from casparian_flow.kube.client import KubeClient
from casparian_flow.kube.curve_keys import KeyRing
from casparian_flow.kube.kinds import SECRET, Manifest
from casparian_flow.protocol.curve import (
    CLIENT_SECRET,
    SERVER_PUBLIC,
    public_text,
    secret_text,
)
from casparian_flow.sentinel.admission import Principal

Service = Literal["backup", "mcp"]
BACKUP: Final[Service] = "backup"
MCP: Final[Service] = "mcp"


def service_keys(
    service: Service, keys: KeyRing, namespace: str, account: str
) -> dict[str, Principal]:
    """The keys that a service may have; {} without an account.

    Args:
        account: the ServiceAccount of its pods, in the operator's namespace; "" for none.
    """
    if not account:
        return {}
    whom = Principal(service, namespace, account)
    return dict.fromkeys(keys.admitted(service, namespace, account), whom)


def keep_service_secret(
    client: KubeClient, service: Service, keys: KeyRing, namespace: str, account: str
) -> bool:
    """Have the Secret of the account's name hold its key; whether that had to be written.

    Raises:
        KubeError: it cannot be read or written.
    """
    wanted = _secret(service, keys, namespace, account)
    there = client.get(SECRET, namespace, account)
    if there is not None and there.get("data") == wanted["data"]:
        return False
    client.apply(wanted)
    return True


def _secret(service: Service, keys: KeyRing, namespace: str, account: str) -> Manifest:
    files = {
        CLIENT_SECRET: secret_text(keys.issued(service, namespace, account)),
        SERVER_PUBLIC: public_text(keys.server.public),
    }
    return {
        "apiVersion": SECRET.api_version,
        "kind": SECRET.name,
        "metadata": {
            "name": account,
            "namespace": namespace,
            "labels": dict(names.labels(service)),
        },
        "type": "Opaque",
        "data": {name: base64.b64encode(text.encode()).decode() for name, text in files.items()},
    }
