"""The key with which backups fetch copies of the ledger: admitted, and kept in its Secret."""

import base64
from typing import Final

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

BACKUP: Final = "backup"


def backup_keys(keys: KeyRing, namespace: str, account: str) -> dict[str, Principal]:
    """The keys that backups may have; {} without an account.

    Args:
        account: the ServiceAccount of their pods, in the operator's namespace; "" for none.
    """
    if not account:
        return {}
    whom = Principal("backup", namespace, account)
    return dict.fromkeys(keys.admitted(BACKUP, namespace, account), whom)


def keep_backup_secret(client: KubeClient, keys: KeyRing, namespace: str, account: str) -> bool:
    """Have the Secret of the account's name hold its key; whether that had to be written.

    Raises:
        KubeError: it cannot be read or written.
    """
    wanted = _secret(keys, namespace, account)
    there = client.get(SECRET, namespace, account)
    if there is not None and there.get("data") == wanted["data"]:
        return False
    client.apply(wanted)
    return True


def _secret(keys: KeyRing, namespace: str, account: str) -> Manifest:
    files = {
        CLIENT_SECRET: secret_text(keys.issued(BACKUP, namespace, account)),
        SERVER_PUBLIC: public_text(keys.server.public),
    }
    return {
        "apiVersion": SECRET.api_version,
        "kind": SECRET.name,
        "metadata": {
            "name": account,
            "namespace": namespace,
            "labels": dict(names.labels(BACKUP)),
        },
        "type": "Opaque",
        "data": {name: base64.b64encode(text.encode()).decode() for name, text in files.items()},
    }
