"""The Job that makes the environment of a lock file on the shared volume, and that volume. Pure."""

import hashlib
from typing import Final

from casparian_flow.kube import manifests_common as common
from casparian_flow.kube import names
from casparian_flow.kube.kinds import CLAIM, JOB, Manifest
from casparian_flow.kube.manifests_common import Site
from casparian_flow.kube.manifests_worker import (
    environments_volume,
    provisioner,
    provisioner_volumes,
)

RETRIES: Final = 2
FINAL_CODES: Final = (1, 2, 8)
"""Exit codes of provisioning that another try would end with as well: uv refuses, settings or
bundle cannot be used, not trusted. Any other is tried again, 75 and the kernel's above all."""
DEADLINE_S: Final = 1800
LOCK_HASH: Final = f"{names.GROUP}/lock-hash"
SETTINGS_HASH: Final = f"{names.GROUP}/settings-hash"
"""Annotation of a Job: by which settings it was tried."""
CONTAINER: Final = "provision"


_FAILURES: Final = (
    {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": CONTAINER,
            "operator": "In",
            "values": list(FINAL_CODES),
        },
    },
    # An eviction says nothing about the lock file.
    {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    },
)


def environments_claim(site: Site, namespace: str) -> Manifest:
    """The claim on a namespace's volume of environments. It is nobody's, so that plugins may come
    and go without another installation of the same libraries."""
    return {
        "apiVersion": CLAIM.api_version,
        "kind": CLAIM.name,
        "metadata": {
            "name": site.environments_claim,
            "namespace": namespace,
            "labels": dict(names.labels(names.PROVISION)),
        },
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": site.storage_class,
            "resources": {"requests": {"storage": site.environments_size}},
        },
    }


def provision_job(site: Site, namespace: str, lock_hash: str, config_map: str) -> Manifest:
    """The Job of one lock file; several plugins may share its environment.

    Args:
        config_map: with settings and bundle, of any plugin with this lock file.
    """
    pod = common.pod(
        site,
        [provisioner(site, CONTAINER)],
        provisioner_volumes(site, config_map, environments_volume(site, read_only=False)),
        account="default",
        restartPolicy="Never",
    )
    labels = dict(names.labels(names.PROVISION))
    return {
        "apiVersion": JOB.api_version,
        "kind": JOB.name,
        "metadata": {
            "name": names.provision_name(lock_hash),
            "namespace": namespace,
            "labels": labels,
            "annotations": {LOCK_HASH: lock_hash, SETTINGS_HASH: settings_hash(site)},
        },
        "spec": {
            "backoffLimit": RETRIES,
            "activeDeadlineSeconds": DEADLINE_S,
            "podFailurePolicy": {"rules": _FAILURES},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def settings_hash(site: Site) -> str:
    """Stands for all settings that provisioning depends on."""
    return hashlib.sha256(site.settings_toml.encode()).hexdigest()[:16]
