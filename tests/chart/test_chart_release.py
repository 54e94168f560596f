"""A release on a real API server: installed, upgraded, uninstalled, with what people made."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chart_kit import CHART, NAMESPACE, VALUES, clean, find, rendered, run_helm, settings_text
from kube_kit import ApiServer

from casparian_flow.kube import names


def _release(api: ApiServer, *arguments: str | Path, check: bool = True) -> str:
    done = run_helm(
        *arguments, "--namespace", NAMESPACE, "--kubeconfig", api.kubeconfig, check=check
    )
    return done.stdout


def test_a_release_is_installed_upgraded_and_uninstalled_and_what_people_made_stays(
    api: ApiServer,
) -> None:
    apply = ("--values", VALUES / "namespaces.yaml")
    told = _release(api, "install", "casparian", CHART, *apply)
    assert "rollout status statefulset/casparian-operator" in told
    assert "casparian-approver" in told
    assert "No signer is trusted yet" in told
    root = {
        "apiVersion": names.API_VERSION,
        "kind": names.SOURCE_KIND,
        "metadata": {"name": "inbox", "namespace": "finance"},
        "spec": {"volume": {"persistentVolumeClaim": {"claimName": "files"}}},
    }
    api.client.apply(root)
    told = _release(api, "upgrade", "casparian", CHART, *apply, "--set", "trust.allowUnsigned=true")
    assert "No signer is trusted yet" not in told

    second = run_helm(
        *("install", "other", CHART, "--namespace", "finance", "--kubeconfig", api.kubeconfig),
        check=False,
    )
    assert second.returncode != 0
    assert 'is of release "casparian" in namespace "flow"' in second.stderr
    assert "watchNamespaces" in second.stderr

    def finish_hook() -> None:
        job = api.client.wait(
            lambda: api.client.find("batch/v1", "Job", "casparian-uninstall", NAMESPACE)
        )
        began = job["metadata"]["creationTimestamp"]
        status = {
            "succeeded": 1,
            "startTime": began,
            "completionTime": began,
            "conditions": [
                {"type": kind, "status": "True"} for kind in ("SuccessCriteriaMet", "Complete")
            ],
        }
        patch = {"status": status}
        api.client.patch(
            "batch/v1", "Job", "casparian-uninstall", patch, NAMESPACE, subresource="status"
        )

    # There is no node to run the hook's pod.
    hook = threading.Thread(target=finish_hook)
    hook.start()
    _release(api, "uninstall", "casparian", "--timeout", "60s")
    hook.join(60)
    assert api.client.find("apps/v1", "StatefulSet", "casparian-operator", NAMESPACE) is None
    assert api.client.get(names.API_VERSION, names.SOURCE_KIND, "inbox", "finance")
    assert api.client.list("v1", "ServiceAccount", NAMESPACE)


# -- before helm uninstall ----------------------------------------------------------------------


def _workload(kind: str, name: str, namespace: str, managed: bool, **spec: Any) -> dict[str, Any]:
    labels = {names.MANAGED_BY_LABEL: names.FIELD_MANAGER} if managed else {}
    api_version = "batch/v1" if kind == "CronJob" else "apps/v1"
    meta = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": api_version, "kind": kind, "metadata": meta, "spec": spec}


def _template(app: str) -> dict[str, Any]:
    container = {
        "name": "c",
        "image": "none",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    spec = {"containers": [container], "restartPolicy": "Always"}
    return {"metadata": {"labels": {"app": app}}, "spec": spec}


def _deployment(name: str, namespace: str, *, managed: bool) -> dict[str, Any]:
    selector = {"matchLabels": {"app": name}}
    more = {"replicas": 3, "selector": selector, "template": _template(name)}
    return _workload("Deployment", name, namespace, managed, **more)


def _cron_job(name: str, namespace: str, *, managed: bool) -> dict[str, Any]:
    pod = _template(name)
    pod["spec"]["restartPolicy"] = "Never"
    job = {"spec": {"template": pod}}
    return _workload("CronJob", name, namespace, managed, schedule="* * * * *", jobTemplate=job)


@pytest.fixture
def workloads(api: ApiServer) -> ApiServer:
    """A chart's operator, with a worker Deployment and a Scout beside others' in each namespace."""
    wanted = {"Role", "RoleBinding", "ServiceAccount", "StatefulSet"}
    objects = [o for o in clean(rendered("everything")) if o["kind"] in wanted]
    for namespace in (NAMESPACE, "finance"):
        for managed in (True, False):
            name = "ours" if managed else "theirs"
            objects.append(_deployment(name, namespace, managed=managed))
            objects.append(_cron_job(name, namespace, managed=managed))
    api.client.apply(*objects)
    return api


def _quiesce(api: ApiServer, tmp_path: Path, timeout_s: float) -> tuple[str, float]:
    config = tmp_path / "config.toml"
    config.write_text(settings_text(rendered("everything")))
    account = api.client_for_account(NAMESPACE, "casparian-uninstall")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "casparian_flow.kube.uninstall", "--timeout", str(timeout_s)],
        env={**os.environ, "KUBECONFIG": str(account.kubeconfig), "CASPARIAN_CONFIG": str(config)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, time.monotonic() - began


def test_the_operator_stops_before_workers_and_scouts_and_nothing_else_is_touched(
    workloads: ApiServer, tmp_path: Path
) -> None:
    said, _ = _quiesce(workloads, tmp_path, 60)
    assert "WARNING" not in said
    client = workloads.client
    operator = client.get("apps/v1", "StatefulSet", "casparian-operator", NAMESPACE)
    assert operator["spec"]["replicas"] == 0
    for namespace in (NAMESPACE, "finance"):
        for name, replicas, suspended in (("ours", 0, True), ("theirs", 3, False)):
            deployment = client.get("apps/v1", "Deployment", name, namespace)
            cron_job = client.get("batch/v1", "CronJob", name, namespace)
            assert deployment["spec"]["replicas"] == replicas
            assert cron_job["spec"]["suspend"] is suspended


def test_a_worker_that_does_not_end_does_not_hold_up_an_uninstall(
    workloads: ApiServer, tmp_path: Path
) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "stuck",
            "namespace": "finance",
            "labels": {
                names.MANAGED_BY_LABEL: names.FIELD_MANAGER,
                names.COMPONENT_LABEL: names.WORKER,
            },
        },
        "spec": _template("stuck")["spec"],
    }
    workloads.client.apply(pod)
    said, seconds = _quiesce(workloads, tmp_path, 2)
    workloads.client.delete("v1", "Pod", "stuck", "finance")
    assert "workers had not ended after 2 s" in said
    assert seconds < 30
    assert find(rendered("everything"), "Job")["spec"]["activeDeadlineSeconds"] == 30 + 60


def test_without_rights_it_says_so_and_still_ends_well(api: ApiServer, tmp_path: Path) -> None:
    for namespace in (NAMESPACE, "finance"):
        for name in ("casparian-uninstall", "casparian-uninstall-own"):
            if api.client.find("rbac.authorization.k8s.io/v1", "RoleBinding", name, namespace):
                api.client.delete("rbac.authorization.k8s.io/v1", "RoleBinding", name, namespace)
    said, _ = _quiesce(api, tmp_path, 5)
    assert "scaling StatefulSet casparian-operator" in said
    assert "forbidden" in said
