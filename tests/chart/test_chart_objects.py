"""What the chart renders, judged by a real API server."""

import base64
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_kit import (
    CHART,
    NAMESPACE,
    ROOT,
    VALUES,
    Manifest,
    clean,
    find,
    pod_templates,
    rendered,
    run_helm,
)
from cryptography import x509
from kube_kit import ApiServer

from casparian_flow.kube import kinds, names

ALL = sorted(path.stem for path in VALUES.glob("*.yaml"))


def _apply(api: ApiServer, objects: Sequence[Manifest], tmp_path: Path) -> None:
    """Have the server judge them, strictly, and keep nothing."""
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(clean(objects)), "utf-8")
    api.client.kubectl(
        *("apply", "--server-side", "--force-conflicts", "--dry-run=server"),
        *("--validate=strict", "-f", str(file)),
    )


@pytest.mark.parametrize("name", ALL)
def test_the_api_server_takes_all_that_is_rendered(
    api: ApiServer, name: str, tmp_path: Path
) -> None:
    _apply(api, rendered(name), tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_every_pod_is_one_that_pod_security_restricted_allows(api: ApiServer, name: str) -> None:
    for kind, template in pod_templates(rendered(name)):
        spec = {**template["spec"], "serviceAccountName": "default"}
        # The admission of ServiceAccounts and of priorities looks for objects that are not there.
        spec.pop("priorityClassName", None)
        spec["restartPolicy"] = "Never"
        meta = {"generateName": f"{kind.lower()}-", "namespace": NAMESPACE}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
        api.client.create(pod, dry_run=True)
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"]["memory"]


def test_no_pod_but_those_that_ask_the_api_server_has_a_token() -> None:
    with_token = [
        kind
        for kind, template in pod_templates(rendered("everything"))
        if template["spec"]["automountServiceAccountToken"]
    ]
    assert sorted(with_token) == ["Deployment", "Job", "StatefulSet"]


def test_every_template_is_rendered_by_everything() -> None:
    there = {str(path.relative_to(CHART)) for path in (CHART / "templates").rglob("*.yaml")}
    assert there - {item["_template"] for item in rendered("everything")} == set()


def test_with_all_switches_off_little_is_left() -> None:
    kinds_left = sorted(item["kind"] for item in rendered("nothing"))
    assert kinds_left == [
        "ConfigMap",
        "Pod",
        "Service",
        "Service",
        "ServiceAccount",
        "StatefulSet",
    ]


def test_the_definitions_are_kept_when_the_release_goes_unless_told_otherwise() -> None:
    def policies(name: str) -> set[Any]:
        return {
            item["metadata"].get("annotations", {}).get("helm.sh/resource-policy")
            for item in rendered(name)
            if item["kind"] == "CustomResourceDefinition"
        }

    assert policies("defaults") == {"keep"}
    assert policies("everything") == {None}


def test_the_charts_files_and_versions_are_the_projects() -> None:
    subprocess.run(["python", "tools/chart.py", "--check"], cwd=ROOT, check=True)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{chart["appVersion"]}"\n' in project
    assert chart["version"] == chart["appVersion"]


def test_names_and_ports_are_those_that_the_operator_uses() -> None:
    objects = rendered("everything")
    sentinel = find(objects, "Service", names.SENTINEL_SERVICE)
    assert [port["port"] for port in sentinel["spec"]["ports"]] == [
        names.WORKER_PORT,
        names.CONTROL_PORT,
    ]
    operator = find(objects, "Service", "casparian-operator")
    assert [port["port"] for port in operator["spec"]["ports"]] == [
        names.METRICS_PORT,
        names.HEALTH_PORT,
    ]
    (container,) = find(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {names.SETTINGS_PATH, str(Path(names.LEDGER_FILE).parent)} <= mounts


def test_who_decided_is_written_by_the_newest_api_that_is_there_or_by_a_webhook() -> None:
    def served(*versions: str) -> set[str]:
        apis = tuple(
            f"admissionregistration.k8s.io/{version}/MutatingAdmissionPolicy"
            for version in versions
        )
        objects = rendered(apis=apis)
        return {o["apiVersion"] for o in objects if o["kind"] == "MutatingAdmissionPolicy"} | {
            o["kind"] for o in objects if o["kind"] == "MutatingWebhookConfiguration"
        }

    assert served("v1beta1", "v1") == {"admissionregistration.k8s.io/v1"}
    assert served("v1beta1") == {"admissionregistration.k8s.io/v1beta1"}
    assert served() == {"MutatingWebhookConfiguration"}


def test_the_webhooks_certificate_is_for_its_service_and_signed_by_whom_the_server_believes() -> (
    None
):
    objects = rendered(apis=())
    (webhook,) = find(objects, "MutatingWebhookConfiguration")["webhooks"]
    service = webhook["clientConfig"]["service"]
    data = find(objects, "Secret", "casparian-stamp")["data"]
    certificate = x509.load_pem_x509_certificate(base64.b64decode(data["tls.crt"]))
    authority = x509.load_pem_x509_certificate(
        base64.b64decode(webhook["clientConfig"]["caBundle"])
    )
    certificate.verify_directly_issued_by(authority)
    names_of = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    host = f"{service['name']}.{service['namespace']}.svc"
    assert names_of.get_values_for_type(x509.DNSName) == [host]
    ports = find(objects, "Service", service["name"])["spec"]["ports"]
    assert [port["port"] for port in ports] == [service["port"]]


def test_the_guard_of_approvals_knows_the_operator_of_this_release() -> None:
    guard = json.dumps(find(rendered(), "ValidatingAdmissionPolicy"))
    assert "system:serviceaccount:flow:casparian-operator" in guard
    assert "system:serviceaccount:casparian:" not in guard


# -- rights -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rights(api: ApiServer) -> Iterator[ApiServer]:
    """The server with the roles of `everything` applied."""
    wanted = {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "ServiceAccount"}
    objects = [item for item in clean(rendered("everything")) if item["kind"] in wanted]
    api.client.apply(*objects)
    yield api
    for item in objects:
        meta = item["metadata"]
        api.client.delete(item["apiVersion"], item["kind"], meta["name"], meta.get("namespace", ""))


def _may(
    api: ApiServer, account: str, verb: str, resource: str, namespace: str = "", name: str = ""
) -> bool:
    plural, _, group = resource.partition(".")
    plural, _, subresource = plural.partition("/")
    asked = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{NAMESPACE}:{account}",
            "groups": ["system:serviceaccounts", "system:authenticated"],
            "resourceAttributes": {
                "verb": verb,
                "group": group,
                "resource": plural,
                "subresource": subresource,
                "namespace": namespace,
                "name": name,
            },
        },
    }
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return bool(api.client.request("POST", path, asked)["status"]["allowed"])


def _resource(kind: kinds.Kind) -> str:
    group, slash, _ = kind.api_version.partition("/")
    return f"{kind.plural}.{group}" if slash else kind.plural


@pytest.mark.parametrize("namespace", [NAMESPACE, "finance"])
def test_the_operator_may_do_its_work_in_the_watched_namespaces(
    rights: ApiServer, namespace: str
) -> None:
    def lacking(resource: str, *verbs: str) -> Iterator[str]:
        for verb in verbs:
            if not _may(rights, "casparian-operator", verb, resource, namespace):
                yield f"{verb} {resource}"

    missing: list[str] = []
    for kind in kinds.OWN:
        missing += lacking(_resource(kind), "get", "list", "watch")
        missing += lacking(_resource(kind).replace(".", "/status.", 1), "patch")
    for kind in kinds.MADE:
        missing += lacking(_resource(kind), "get", "list", "watch", "create", "patch")
        if kind is not kinds.CLAIM:
            missing += lacking(_resource(kind), "delete")
    missing += lacking("pods", "get", "list", "watch", "patch")
    missing += lacking("events", "create")
    assert missing == []


def test_the_operator_holds_its_lease_and_asks_whose_a_token_is(rights: ApiServer) -> None:
    for verb in ("get", "create", "update"):
        assert _may(rights, "casparian-operator", verb, "leases.coordination.k8s.io", NAMESPACE)
    assert _may(rights, "casparian-operator", "create", "tokenreviews.authentication.k8s.io")


@pytest.mark.parametrize(
    ("verb", "resource", "namespace"),
    [
        ("get", "secrets", "default"),
        ("list", "pods", ""),
        ("list", "namespaces", ""),
        ("get", "nodes", ""),
        ("create", "pods", NAMESPACE),
        ("create", "pods/exec", NAMESPACE),
        ("delete", "persistentvolumeclaims", NAMESPACE),
        ("create", "roles.rbac.authorization.k8s.io", NAMESPACE),
        ("create", "rolebindings.rbac.authorization.k8s.io", NAMESPACE),
        ("impersonate", "users", ""),
        ("create", "serviceaccounts/token", NAMESPACE),
        ("patch", "customresourcedefinitions.apiextensions.k8s.io", ""),
        ("patch", "approvals.casparian.io", NAMESPACE),
        ("approve", "approvals.casparian.io", NAMESPACE),
        ("delete", "casparianplugins.casparian.io", NAMESPACE),
        ("create", "casparianplugins.casparian.io", NAMESPACE),
        ("patch", "casparianplugins.casparian.io", NAMESPACE),
        ("patch", "sourceroots.casparian.io", NAMESPACE),
    ],
)
def test_the_operator_may_not(rights: ApiServer, verb: str, resource: str, namespace: str) -> None:
    assert not _may(rights, "casparian-operator", verb, resource, namespace)


def test_backups_and_tests_have_no_rights_at_all(rights: ApiServer) -> None:
    bound = {
        subject["name"]
        for item in rendered("everything")
        if item["kind"] in {"RoleBinding", "ClusterRoleBinding"}
        for subject in item["subjects"]
    }
    assert bound == {"casparian-operator", "casparian-uninstall", "casparian-mcp"}


def test_the_mcp_server_may_review_tokens_and_nothing_else(rights: ApiServer) -> None:
    names = {
        item["roleRef"]["name"]
        for item in rendered("everything")
        if item["kind"] in {"RoleBinding", "ClusterRoleBinding"}
        and any(subject["name"] == "casparian-mcp" for subject in item["subjects"])
    }
    rules = [
        rule
        for item in rendered("everything")
        if item["kind"] in {"Role", "ClusterRole"} and item["metadata"]["name"] in names
        for rule in item["rules"]
    ]
    assert [(r["resources"], r["verbs"]) for r in rules] == [(["tokenreviews"], ["create"])]
    assert _may(rights, "casparian-mcp", "create", "tokenreviews.authentication.k8s.io")


def test_no_role_has_a_wildcard() -> None:
    for item in rendered("everything"):
        assert "*" not in json.dumps(item.get("rules", [])), item["metadata"]["name"]


# -- what docs/install-kubernetes.md shows ----------------------------------------------------


def _blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "install-kubernetes.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_values_shown_are_taken(tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(_blocks("yaml")[0])
    shown = run_helm("template", "casparian", CHART, "--values", values).stdout
    assert "kind: PodMonitor" in shown


def test_the_pod_that_restores_is_allowed_and_names_what_is_there(api: ApiServer) -> None:
    pod = yaml.safe_load(_blocks("yaml")[1])
    pod["metadata"]["namespace"] = NAMESPACE
    api.client.create(pod, dry_run=True)
    objects = rendered("everything")
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert find(objects, "ConfigMap", volumes["settings"]["configMap"]["name"])
    claims = [volumes[name]["persistentVolumeClaim"]["claimName"] for name in ("ledger", "backups")]
    (template,) = find(objects, "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claims[0] == f"{template['metadata']['name']}-casparian-operator-0"
    assert find(objects, "PersistentVolumeClaim", claims[1])


def test_what_an_administrator_installs_apart_is_what_is_left_out(api: ApiServer) -> None:
    text = next(block for block in _blocks("sh") if "--api-versions" in block)
    templates = set(re.findall(r"-s (\S+)", text)) | {
        f"templates/{folder}/{path.name}"
        for folder in ("operator", "uninstall")
        for path in (CHART / "templates" / folder).glob("role*.yaml")
    }
    sets = tuple(part for part in re.findall(r"(\S+=false)(?=[,\s])", text.replace(",", " ") + " "))
    assert len(sets) == 4
    left_out = {item["_template"] for item in rendered()} - {
        item["_template"] for item in rendered(sets=sets)
    }
    assert left_out == templates | {"templates/crds/crds.yaml"}
