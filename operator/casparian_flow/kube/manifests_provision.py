"""The Job that makes the environment of a lock file on the shared volume, and that volume. Pure."""

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
DEADLINE_S: Final = 1800
LOCK_HASH: Final = f"{names.GROUP}/lock-hash"


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
        [provisioner(site, "provision")],
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
            "annotations": {LOCK_HASH: lock_hash},
        },
        "spec": {
            "backoffLimit": RETRIES,
            "activeDeadlineSeconds": DEADLINE_S,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
