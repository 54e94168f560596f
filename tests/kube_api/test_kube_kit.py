"""The API server that the other tests stand on does what a cluster's would."""

import base64
import json
from pathlib import Path

import psutil
import pytest
from kube_kit import ApiClient, ApiError, ApiServer, Manifest, api_server

GROUP = "kit.casparian.io"
RBAC = {"apiGroup": "rbac.authorization.k8s.io"}
BOXES = f"""
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {{name: boxes.{GROUP}}}
spec:
  group: {GROUP}
  scope: Namespaced
  names: {{kind: Box, plural: boxes, singular: box}}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            x-kubernetes-validations:
            - rule: self.least <= self.most
              message: least is above most; write a smaller least
            properties:
              least: {{type: integer}}
              most: {{type: integer}}
              sealedBy: {{type: string}}
            required: [least, most]
"""
SEALS = f"""
apiVersion: admissionregistration.k8s.io/v1beta1
kind: MutatingAdmissionPolicy
metadata: {{name: seals}}
spec:
  failurePolicy: Fail
  reinvocationPolicy: Never
  matchConstraints:
    resourceRules:
    - {{apiGroups: [{GROUP}], apiVersions: ["*"], operations: [CREATE], resources: [boxes]}}
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration:
      expression: "Object{{spec: Object.spec{{sealedBy: request.userInfo.username}}}}"
---
apiVersion: admissionregistration.k8s.io/v1beta1
kind: MutatingAdmissionPolicyBinding
metadata: {{name: seals}}
spec: {{policyName: seals}}
"""


def box(namespace: str, name: str, least: int, most: int) -> Manifest:
    return {
        "apiVersion": f"{GROUP}/v1",
        "kind": "Box",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"least": least, "most": most},
    }


def may(api: ApiServer, namespace: str, subject: Manifest, *verbs: str) -> None:
    """Let somebody do something to boxes."""
    rules = [{"apiGroups": [GROUP], "resources": ["boxes"], "verbs": list(verbs)}]
    meta = {"name": "boxes", "namespace": namespace}
    rbac = "rbac.authorization.k8s.io"
    api.client.apply(
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": meta, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "boxes"},
            "subjects": [subject],
        },
    )


@pytest.fixture(scope="module")
def boxes(api: ApiServer) -> ApiClient:
    """The administrator, once boxes are known."""
    api.client.apply(BOXES)
    return api.client


def test_a_rule_of_a_crd_refuses_what_breaks_it_with_its_own_words(
    boxes: ApiClient, space: str
) -> None:
    boxes.apply(box(space, "good", 1, 2))
    with pytest.raises(ApiError, match="least is above most; write a smaller least") as refused:
        boxes.apply(box(space, "bad", 3, 2))
    assert (refused.value.code, refused.value.reason) == (422, "Invalid")
    assert [each["metadata"]["name"] for each in boxes.list(f"{GROUP}/v1", "Box", space)] == [
        "good"
    ]


def test_a_user_may_do_what_the_roles_of_its_groups_say(
    api: ApiServer, boxes: ApiClient, space: str
) -> None:
    may(api, space, {"kind": "Group", "name": "packers"} | RBAC, "create", "get")
    packer = api.client_for("ann", groups=["packers"])
    packer.create(box(space, "a", 1, 2))
    with pytest.raises(ApiError, match='User "ann" cannot delete resource "boxes"') as refused:
        packer.delete(f"{GROUP}/v1", "Box", "a", space)
    assert refused.value.reason == "Forbidden"
    with pytest.raises(ApiError, match="Forbidden"):
        api.client_for("bob").get(f"{GROUP}/v1", "Box", "a", space)
    assert "forbidden" in packer.kubectl("get", "secrets", "-n", space, check=False).stderr


def test_a_service_account_is_known_by_its_token(
    api: ApiServer, boxes: ApiClient, space: str
) -> None:
    may(api, space, {"kind": "ServiceAccount", "name": "bot", "namespace": space}, "create")
    bot = api.client_for_account(space, "bot")
    assert bot.create(box(space, "a", 1, 1))["spec"]["least"] == 1
    assert api.requests(verb="create", resource="boxes", user=f"system:serviceaccount:{space}:bot")


def test_a_token_for_an_audience_is_bound_to_its_pod(api: ApiServer, space: str) -> None:
    pod = api.client.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "p", "namespace": space},
            "spec": {"containers": [{"name": "c", "image": "none.invalid/none"}]},
        }
    )
    token = api.token(space, "default", audiences=["casparian-sentinel"], pod=pod)
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert claims["aud"] == ["casparian-sentinel"]
    path = "/apis/authentication.k8s.io/v1/tokenreviews"
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}
    asked = {**review, "spec": {"token": token, "audiences": ["casparian-sentinel"]}}
    status = api.client.request("POST", path, asked)["status"]
    assert status["authenticated"]
    assert status["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["p"]
    elsewhere = api.client.request("POST", path, {**review, "spec": {"token": token}})["status"]
    assert not elsewhere.get("authenticated")


def test_a_mutating_policy_writes_down_who_asked(
    api: ApiServer, boxes: ApiClient, space: str
) -> None:
    boxes.apply(SEALS)
    names = iter(range(1000))

    def sealed() -> bool:
        made = boxes.create(box(space, f"b{next(names)}", 1, 2), dry_run=True)
        return "sealedBy" in made["spec"]

    boxes.wait(sealed)  # policies are known a moment later
    may(api, space, {"kind": "User", "name": "ann"} | RBAC, "create")
    made = api.client_for("ann").create(box(space, "a", 1, 2))
    assert made["spec"]["sealedBy"] == "ann"
    boxes.delete("admissionregistration.k8s.io/v1beta1", "MutatingAdmissionPolicyBinding", "seals")


def test_a_namespace_that_is_restricted_refuses_a_root_pod(api: ApiServer) -> None:
    space = api.namespace("strict", {"pod-security.kubernetes.io/enforce": "restricted"})
    with pytest.raises(ApiError, match='violates PodSecurity "restricted'):
        api.client.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "p", "namespace": space},
                "spec": {"containers": [{"name": "c", "image": "none.invalid/none"}]},
            }
        )


def test_data_survive_the_server_and_nothing_survives_the_end() -> None:
    with api_server(controllers=True, mutating_policies=False) as api:
        with pytest.raises(ApiError, match="404"):  # as on clusters before 1.34
            api.client.apply(SEALS)
        space = api.namespace("kept")
        owner = api.client.apply(config_map(space, "owner"))[0]
        owned = config_map(space, "owned")
        reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner"}
        reference["uid"] = owner["metadata"]["uid"]
        owned["metadata"]["ownerReferences"] = [reference]
        api.client.apply(owned)
        api.stop(hard=True)
        with pytest.raises(OSError, match="refused"):
            api.client.get("v1", "ConfigMap", "owner", space)
        api.start()
        assert api.client.get("v1", "ConfigMap", "owner", space)["metadata"] == owner["metadata"]
        api.client.delete("v1", "ConfigMap", "owner", space)
        api.client.wait(lambda: api.client.find("v1", "ConfigMap", "owned", space) is None)
        assert 100_000 < api.etcd_bytes() < 10_000_000
        folder, children = api.folder, psutil.Process().children()
        mine = [child for child in children if f"{folder}" in " ".join(child.cmdline())]
        assert len(mine) == 3
    assert not folder.exists()
    assert not any(child.is_running() for child in mine)


def config_map(namespace: str, name: str) -> Manifest:
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}


def test_manifests_are_read_from_files_and_lists(
    api: ApiServer, space: str, tmp_path: Path
) -> None:
    file = tmp_path / "maps.yaml"
    file.write_text("\n---\n".join(json.dumps(config_map(space, name)) for name in "ab"))
    rest = {"kind": "List", "apiVersion": "v1", "items": [config_map(space, "c")]}
    api.client.apply(file, rest)
    api.client.apply([config_map(space, "d")], json.dumps(config_map(space, "e")))
    found = api.client.list("v1", "ConfigMap", space)
    assert {each["metadata"]["name"] for each in found} >= set("abcde")
