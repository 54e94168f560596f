"""The operator's walk from objects to objects, on a real API server without nodes.

It runs in this process with the rights that the chart gives it, and looks after a namespace for
each test. Nothing is mocked but the time: versions become active without a worker's trial.
"""

import base64
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from kube_kinds import install
from kube_kit import ApiError, ApiServer
from kube_operator import (
    SOURCE,
    await_condition,
    conditions,
    install_operator,
    operator,
    operator_config,
    plugin,
    source_root,
)
from signing_kit import signed

from casparian_flow.kube.bundles import bundle_digest, zipped
from casparian_flow.kube.kinds import Ref
from casparian_flow.kube.names import API_VERSION, BUNDLE_KEY
from casparian_flow.kube.operator import Operator
from casparian_flow.protocol.http_types import ApprovalOperation, ApprovalStatus
from casparian_flow.trust.bundle import pack

SPACES = tuple(f"op{n}" for n in range(1, 13))
VERSIONS = {
    "Deployment": "apps/v1",
    "CronJob": "batch/v1",
    "Job": "batch/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}
MADE = "app.kubernetes.io/managed-by=casparian-operator"


@pytest.fixture(scope="module")
def running(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    install(api)
    folder = tmp_path_factory.mktemp("operator")
    kubeconfig = install_operator(api, SPACES)
    config = operator_config(folder, "casparian", SPACES, resync_seconds=3)
    with operator(api, config, kubeconfig) as started:
        yield started


@pytest.fixture(scope="module")
def spaces() -> Iterator[str]:
    return iter(SPACES)


@pytest.fixture
def space(running: Operator, spaces: Iterator[str]) -> str:
    """A namespace of the test's own, that the operator looks after."""
    return next(spaces)


def made(api: ApiServer, kind: str, space: str) -> list[dict[str, Any]]:
    return api.client.list(VERSIONS.get(kind, "v1"), kind, space, MADE)


def standing(running: Operator, space: str) -> dict[str, str]:
    """Versions of the namespace's plugins in the ledger, with their status."""
    rows = running.control.list_plugins()
    return {r["version"]: r["status"] for r in rows if r["plugin_name"].startswith(f"{space}/")}


def ready(api: ApiServer, space: str, name: str = "sales") -> dict[str, Any]:
    return await_condition(api, "CasparianPlugin", space, name, "Ready", "Ready")


def until(api: ApiServer, condition: Callable[[], Any]) -> Any:
    return api.client.wait(condition, 30)


def test_a_plugin_becomes_a_deployment_and_goes_without_a_trace(
    api: ApiServer, running: Operator, space: str
) -> None:
    api.client.apply(plugin(space))
    found = ready(api, space)
    (deployment,) = made(api, "Deployment", space)
    assert deployment["metadata"]["ownerReferences"][0]["uid"] == found["metadata"]["uid"]
    assert deployment["metadata"]["annotations"]["casparian.io/signer"] == "tests"
    assert found["status"]["activeVersion"] == "1.0.0"
    # Nothing of kopf's: neither a finalizer nor a copy of the spec.
    assert "finalizers" not in found["metadata"]
    assert "annotations" not in found["metadata"]
    assert standing(running, space) == {"1.0.0": "ACTIVE"}
    events = [e["reason"] for e in api.client.list("v1", "Event", space)]
    assert events == ["Ready"]

    api.client.delete(API_VERSION, "CasparianPlugin", "sales", space, gone=True)
    until(api, lambda: standing(running, space) == {"1.0.0": "SUPERSEDED"})
    assert not [p for p in running.controller.principals() if p.namespace == space]


def test_of_a_plugin_that_nobody_trusts_nothing_is_made(api: ApiServer, space: str) -> None:
    body = plugin(space)
    bundle = signed(SOURCE, "sales").with_envelope(b"")
    body["spec"]["source"]["inline"] = base64.b64encode(zipped(pack(bundle))).decode()
    api.client.apply(body)
    await_condition(api, "CasparianPlugin", space, "sales", "Verified", "Unsigned")
    for kind in ("Deployment", "Secret", "ConfigMap", "ServiceAccount"):
        assert made(api, kind, space) == []


def test_a_bundle_in_a_config_map_is_awaited_and_compared_with_its_digest(
    api: ApiServer, space: str
) -> None:
    data = pack(signed(SOURCE, "sales"))
    source = {"configMap": {"name": "bundle", "key": BUNDLE_KEY, "digest": bundle_digest(data)}}
    api.client.apply(plugin(space, source=source))
    await_condition(api, "CasparianPlugin", space, "sales", "Verified", "SourceMissing")
    wrong = base64.b64encode(zipped(pack(signed(SOURCE, "other")))).decode()
    right = base64.b64encode(zipped(data)).decode()
    held = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "bundle"}}
    held["metadata"] = {"name": "bundle", "namespace": space}
    api.client.apply({**held, "binaryData": {BUNDLE_KEY: wrong}})
    await_condition(api, "CasparianPlugin", space, "sales", "Verified", "DigestMismatch")
    api.client.apply({**held, "binaryData": {BUNDLE_KEY: right}})
    ready(api, space)


def test_what_was_deleted_or_edited_is_put_right(
    api: ApiServer, running: Operator, space: str
) -> None:
    api.client.apply(plugin(space))
    ready(api, space)
    (deployment,) = made(api, "Deployment", space)
    (secret,) = made(api, "Secret", space)
    name, uid = deployment["metadata"]["name"], deployment["metadata"]["uid"]
    api.client.delete("apps/v1", "Deployment", name, space)
    api.client.patch("v1", "Secret", name, {"data": {"client.key_secret": "eA=="}}, space)
    api.client.delete("v1", "ServiceAccount", name, space)

    def right() -> bool:
        there = api.client.find("apps/v1", "Deployment", name, space)
        keys = api.client.get("v1", "Secret", name, space)["data"]
        account = api.client.find("v1", "ServiceAccount", name, space)
        fresh = there is not None and there["metadata"]["uid"] != uid
        return fresh and keys == secret["data"] and account is not None

    until(api, right)


def test_versions_follow_one_another_and_back(
    api: ApiServer, running: Operator, space: str
) -> None:
    api.client.apply(plugin(space, workers={"minReplicas": 2, "maxReplicas": 2, "outputs": OUT}))
    ready(api, space)
    until(api, lambda: replicas(api, space) == {"1.0.0": 2})
    changed = SOURCE + "\n    # changed\n"
    second = plugin(space, version="2.0.0", code=changed, workers={"outputs": OUT})
    api.client.apply(second)
    until(api, lambda: replicas(api, space) == {"1.0.0": 0, "2.0.0": 0})
    found = ready(api, space)
    assert found["status"]["activeVersion"] == "2.0.0"
    assert [v["version"] for v in found["status"]["versions"]] == ["2.0.0", "1.0.0"]
    api.client.apply(plugin(space, workers={"minReplicas": 1, "outputs": OUT}))
    until(api, lambda: replicas(api, space) == {"1.0.0": 1, "2.0.0": 0})
    assert standing(running, space) == {"1.0.0": "ACTIVE", "2.0.0": "SUPERSEDED"}


OUT = {"persistentVolumeClaim": {"claimName": "out"}}


def replicas(api: ApiServer, space: str) -> dict[str, int]:
    return {
        d["metadata"]["labels"]["casparian.io/version"]: d["spec"]["replicas"]
        for d in made(api, "Deployment", space)
    }


def test_the_same_version_with_other_bytes_changes_nothing(api: ApiServer, space: str) -> None:
    api.client.apply(plugin(space))
    ready(api, space)
    before = made(api, "Deployment", space)
    api.client.apply(plugin(space, code=SOURCE + "\n    # other bytes\n"))
    await_condition(api, "CasparianPlugin", space, "sales", "Verified", "VersionReused")
    assert [d["metadata"] for d in made(api, "Deployment", space)] == [
        d["metadata"] for d in before
    ]


def test_external_scaling_is_kubectls(api: ApiServer, space: str) -> None:
    workers = {"scaling": "external", "replicas": 1, "outputs": OUT}
    api.client.apply(plugin(space, workers=workers))
    ready(api, space)
    until(api, lambda: replicas(api, space) == {"1.0.0": 1})
    api.client.kubectl("scale", "casparianplugin/sales", "--replicas=3", "-n", space)
    until(api, lambda: replicas(api, space) == {"1.0.0": 3})


def test_two_objects_with_one_plugin_do_not_share_it(api: ApiServer, space: str) -> None:
    api.client.apply(plugin(space, "first", plugin="sales"))
    ready(api, space, "first")
    api.client.apply(plugin(space, "second", plugin="sales"))
    await_condition(api, "CasparianPlugin", space, "second", "Verified", "NameTaken")
    api.client.delete(API_VERSION, "CasparianPlugin", "first", space, gone=True)
    ready(api, space, "second")


def test_a_source_root_becomes_a_cron_job_and_scans_at_once_when_asked(
    api: ApiServer, running: Operator, space: str
) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "files", "namespace": space},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    api.client.apply(source_root(space, schedule="*/7 * * * *", ignore=["*.tmp"]))
    await_condition(api, "SourceRoot", space, "inbox", "Ready", "VolumeMissing")
    api.client.apply(claim)
    await_condition(api, "SourceRoot", space, "inbox", "Ready", "Pinned")
    (cron,) = made(api, "CronJob", space)
    assert cron["spec"]["schedule"] == "*/7 * * * *"
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    (row,) = [r for r in running.control.list_sources() if r["name"] == f"{space}/inbox"]
    assert (row["path"], row["ignore"]) == (f"/sources/{space}/inbox", ["*.tmp"])
    for _ in range(2):
        api.client.kubectl(
            "annotate", "sourceroot/inbox", "casparian.io/scan=now", "--overwrite", "-n", space
        )
        until(api, lambda: len(made(api, "Job", space)) == 1)
    api.client.delete(API_VERSION, "SourceRoot", "inbox", space, gone=True)

    def retired() -> bool:
        rows = running.control.list_sources()
        return not [r for r in rows if r["name"] == f"{space}/inbox" and r["active"]]

    until(api, retired)


def test_a_request_is_decided_on_its_object(api: ApiServer, running: Operator, space: str) -> None:
    asked = ApprovalOperation.Run(
        plugin_name=f"{space}/sales", input_dir=f"/sources/{space}/inbox", file_count=3
    )
    store = running.control.api
    for number in (1, 2):
        store.create_approval(
            f"{space}-{number}", asked, "Run it", timedelta(hours=1), requester="rita"
        )
    objects = until(
        api,
        lambda: (
            (found := api.client.list(API_VERSION, "Approval", space))
            and len(found) == 2
            and all(conditions(f).get("Decided") == ("False", "Pending") for f in found)
            and {f["spec"]["approvalId"]: f["metadata"]["name"] for f in found}
        ),
    )
    decision = {"spec": {"decision": "approved"}}
    api.client.patch(API_VERSION, "Approval", objects[f"{space}-1"], decision, space)
    found = await_condition(api, "Approval", space, objects[f"{space}-1"], "Decided", "Approved")
    assert found["status"]["phase"] == "Approved"
    known = store.get_approval(f"{space}-1")
    assert known is not None
    assert (known.status, known.decided_by) == (ApprovalStatus.APPROVED, "admin")
    rejection = {"spec": {"decision": "rejected", "reason": "too early"}}
    api.client.patch(API_VERSION, "Approval", objects[f"{space}-2"], rejection, space)
    await_condition(api, "Approval", space, objects[f"{space}-2"], "Decided", "Rejected")
    with pytest.raises(ApiError, match="final"):
        api.client.patch(API_VERSION, "Approval", objects[f"{space}-1"], rejection, space)


def test_a_slow_commit_never_delays_a_watch(api: ApiServer, running: Operator, space: str) -> None:
    """The ledger's thread is held for seconds; what the watches tell arrives all the same."""
    release, held = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        release.wait(20)

    blocked = threading.Thread(target=lambda: running.control.on_ledger(hold))
    blocked.start()
    try:
        assert held.wait(10)
        for number in range(5):
            api.client.apply(plugin(space, f"late-{number}"))
            ref = Ref("CasparianPlugin", space, f"late-{number}")
            api.client.wait(lambda ref=ref: running.store.get(ref) is not None, 2.0)
        assert running.lease.unseen_s() < 10
    finally:
        release.set()
        blocked.join()
    for number in range(5):
        ready(api, space, f"late-{number}")


def test_health_tells_of_a_watch_that_is_silent(running: Operator) -> None:
    checks = running.live_checks()
    assert {name: check() for name, check in checks.items()} == {"threads": "", "watch": ""}
