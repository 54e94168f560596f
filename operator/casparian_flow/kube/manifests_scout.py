"""The CronJob that scans a SourceRoot, and what goes with it. Pure: values in, manifests out."""

import base64
from dataclasses import dataclass, field
from typing import Any, Final

from casparian_flow.domain.scoped_names import scoped
from casparian_flow.kube import manifests_common as common
from casparian_flow.kube import names
from casparian_flow.kube.kinds import (
    CONFIG_MAP,
    CRON_JOB,
    JOB,
    NETWORK_POLICY,
    SECRET,
    SERVICE_ACCOUNT,
    Manifest,
)
from casparian_flow.kube.manifests_common import Site
from casparian_flow.kube.models import SourceRoot
from casparian_flow.protocol.curve import CLIENT_SECRET, SERVER_PUBLIC

START_DEADLINE_S: Final = 300
"""How late a scan may begin; a later one is left out, as the next will find the same files."""
SCAN_DEADLINE_S: Final = 6 * 3600
KEPT_DONE, KEPT_FAILED = 1, 2
KEPT_S: Final = 3600
"""How long a Job for one scan is kept after its end."""
RESOURCES: Final = {
    "requests": {"cpu": "100m", "memory": "128Mi"},
    "limits": {"memory": "1Gi"},
}
REQUEST: Final = f"{names.GROUP}/scan-request"
"""Annotation of a Job for one scan: the value that asked for it."""


@dataclass(frozen=True, slots=True)
class ScoutJob:
    """The scans of one SourceRoot.

    Attributes:
        client_key: the file with the Scout's CURVE key.
        single_node_claim: the claim, if its volume is one that one node only can have.
    """

    root: SourceRoot
    client_key: str = field(repr=False)
    single_node_claim: str = ""

    @property
    def object_name(self) -> str:
        return names.scout_name(self.root.metadata.name)

    @property
    def labels(self) -> dict[str, str]:
        return dict(names.labels(names.SCOUT, root=self.root.metadata.name))


def scout_objects(scout: ScoutJob, site: Site) -> list[Manifest]:
    """All of them, in the order in which they are needed."""
    made = [
        common.manifest(
            SERVICE_ACCOUNT,
            scout.object_name,
            scout.root,
            scout.labels,
            automountServiceAccountToken=False,
        ),
        _secret(scout, site),
        common.manifest(
            CONFIG_MAP,
            scout.object_name,
            scout.root,
            scout.labels,
            data={common.SETTINGS_KEY: site.settings_toml},
        ),
    ]
    if site.network_policies:
        spec = common.network_policy_spec(site, scout.labels, [names.CONTROL_PORT])
        made.append(
            common.manifest(NETWORK_POLICY, scout.object_name, scout.root, scout.labels, spec=spec)
        )
    return [*made, _cron_job(scout, site)]


def _secret(scout: ScoutJob, site: Site) -> Manifest:
    files = {CLIENT_SECRET: scout.client_key, SERVER_PUBLIC: site.server_key}
    return common.manifest(
        SECRET,
        scout.object_name,
        scout.root,
        scout.labels,
        type="Opaque",
        data={name: base64.b64encode(text.encode()).decode() for name, text in files.items()},
    )


def _cron_job(scout: ScoutJob, site: Site) -> Manifest:
    return common.manifest(
        CRON_JOB,
        scout.object_name,
        scout.root,
        scout.labels,
        spec={
            "schedule": scout.root.spec.schedule,
            "suspend": scout.root.spec.suspend,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": START_DEADLINE_S,
            "successfulJobsHistoryLimit": KEPT_DONE,
            "failedJobsHistoryLimit": KEPT_FAILED,
            "jobTemplate": {
                "metadata": {"labels": scout.labels},
                "spec": _job_spec(scout, site),
            },
        },
    )


def scan_now(scout: ScoutJob, site: Site, request: str) -> Manifest:
    """A Job for one scan at once.

    Args:
        request: what asked for it; the same request gives the same Job, never a second.
    """
    return common.manifest(
        JOB,
        names.object_name("scan", scout.root.metadata.name, scout.root.metadata.uid, request),
        scout.root,
        scout.labels,
        {REQUEST: request},
        spec={**_job_spec(scout, site), "ttlSecondsAfterFinished": KEPT_S},
    )


def _job_spec(scout: ScoutJob, site: Site) -> dict[str, Any]:
    return {
        "backoffLimit": 1,
        "activeDeadlineSeconds": SCAN_DEADLINE_S,
        "template": {
            "metadata": {"labels": {**scout.labels, **_claim(scout)}},
            "spec": _pod(scout, site),
        },
    }


def _claim(scout: ScoutJob) -> dict[str, str]:
    return common.claim_labels([scout.single_node_claim] if scout.single_node_claim else [])


def _pod(scout: ScoutJob, site: Site) -> dict[str, Any]:
    root = scout.root
    full_name = scoped(root.metadata.namespace, root.metadata.name)
    container = common.container(
        site,
        "scout",
        ["casparian", "scout-pod", "--connect", site.control, "--root", full_name],
        [
            common.mount("settings", names.SETTINGS_PATH, read_only=True),
            common.mount("curve", names.CURVE_PATH, read_only=True),
            common.mount("token", names.TOKEN_PATH, read_only=True),
            common.mount("tmp", "/tmp"),  # noqa: S108 - a volume of the pod's own
            common.mount(
                "source",
                names.source_path(root.metadata.namespace, root.metadata.name),
                read_only=True,
                sub_path=root.spec.path,
            ),
        ],
        env=[
            {"name": "CASPARIAN_CONFIG", "value": names.SETTINGS_FILE},
            {"name": "HOME", "value": "/tmp"},  # noqa: S108 - as above
            common.field_variable("POD_NAME", "metadata.name"),
        ],
        resources=RESOURCES,
    )
    volumes = [
        common.config_volume("settings", scout.object_name, common.SETTINGS_KEY),
        common.secret_volume("curve", scout.object_name),
        common.token_volume("token"),
        common.empty("tmp"),
        common.volume("source", root.spec.volume, read_only=True),
    ]
    pinned = _claim(scout)
    rest = {"affinity": common.beside({}, pinned)} if pinned else {}
    return common.pod(
        site,
        [container],
        volumes,
        account=scout.object_name,
        restartPolicy="Never",
        terminationGracePeriodSeconds=60,
        **rest,
    )
