"""What the operator does where the API server refuses it something: it tells, and goes on."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kube_kinds import install
from kube_kit import ApiServer
from kube_operator import (
    OUTPUTS,
    await_condition,
    conditions,
    install_operator,
    operator,
    operator_config,
    plugin,
    source_root,
)

from casparian_flow.kube.names import API_VERSION

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "affinity": ({"affinity": {"nodeAffinities": {}}}, "field not declared in schema"),
    "limits": (
        {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}},
        "must be less than or equal to cpu limit",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def kinds(api: ApiServer) -> None:
    install(api)


def applied(api: ApiServer, space: str, kind: str) -> Counter[str]:
    """How often each object of a kind was applied, by name."""
    return Counter(
        event["objectRef"]["name"]
        for event in api.requests(namespace=space)
        if event["verb"] == "patch" and event["objectRef"]["resource"] == kind
        and not event["objectRef"].get("subresource")
    )  # fmt: skip


def test_what_the_api_server_refuses_is_told_by_a_condition_and_corrected_by_the_next_apply(
    api: ApiServer, tmp_path: Path
) -> None:
    space = "refused"
    kubeconfig = install_operator(api, (space,))
    config = operator_config(tmp_path, "casparian", (space,), resync_seconds=2)
    with operator(api, config, kubeconfig):
        for name, (workers, _) in REFUSED.items():
            api.client.apply(plugin(space, name, workers={"outputs": OUTPUTS, **workers}))
        for name, (_, said) in REFUSED.items():
            found = await_condition(
                api, "CasparianPlugin", space, name, "Deployed", "ObjectRefused"
            )
            assert conditions(found)["Ready"] == ("False", "NotDeployed")
            assert said in str(found["status"]["conditions"])
        events = api.client.list("v1", "Event", space)
        assert sorted(e["involvedObject"]["name"] for e in events) == sorted(REFUSED)
        api.client.apply(plugin(space, "limits"))
        await_condition(api, "CasparianPlugin", space, "limits", "Ready", "Ready")


def test_what_the_ledger_refuses_is_told_once_and_not_asked_again_at_once(
    api: ApiServer, tmp_path: Path
) -> None:
    space = "ledger"
    kubeconfig = install_operator(api, (space,))
    config = operator_config(tmp_path, "casparian", (space,), resync_seconds=1)
    item = {"name": "x", "type": "list", "item": {"type": "nonsense"}}
    contract = [{"topic": "rows", "columns": [item]}]
    with operator(api, config, kubeconfig) as running:
        api.client.apply(plugin(space, contract=contract))
        api.client.apply(source_root(space, include=["[a"]))
        await_condition(api, "CasparianPlugin", space, "sales", "Verified", "ManifestRefused")
        await_condition(api, "SourceRoot", space, "inbox", "Ready", "LedgerRefused")
        assert running.control.list_plugins() == []  # no file meets it without its contract
        looks = len(api.requests(namespace=space))
        api.client.wait(lambda: len(api.requests(namespace=space)) > looks + 40, 30)
        told = Counter(e["reason"] for e in api.client.list("v1", "Event", space))
        assert told == {"ManifestRefused": 1, "LedgerRefused": 1}


def test_a_whole_number_of_processors_is_applied_once(api: ApiServer, tmp_path: Path) -> None:
    space = "whole"
    kubeconfig = install_operator(api, (space,))
    config = operator_config(tmp_path, "casparian", (space,), resync_seconds=1)
    with operator(api, config, kubeconfig):
        workers = {"outputs": OUTPUTS, "resources": {"requests": {"cpu": 2}}}
        api.client.apply(plugin(space, workers=workers))
        found = await_condition(api, "CasparianPlugin", space, "sales", "Ready", "Ready")
        looks = len(api.requests(namespace=space))
        api.client.wait(lambda: len(api.requests(namespace=space)) > looks + 30, 30)
        assert set(applied(api, space, "deployments").values()) == {1}
        assert found["status"]["activeVersion"] == "1.0.0"


def test_a_namespace_that_the_operator_may_not_look_at_holds_up_no_other(
    api: ApiServer, tmp_path: Path
) -> None:
    kubeconfig = install_operator(api, ("held-a", "held-b"))
    api.client.delete("rbac.authorization.k8s.io/v1", "RoleBinding", "casparian-operator", "held-a")
    config = operator_config(tmp_path, "casparian", ("held-a", "held-b"), resync_seconds=2)
    with operator(api, config, kubeconfig) as running:
        api.client.apply(plugin("held-b"))
        await_condition(api, "CasparianPlugin", "held-b", "sales", "Ready", "Ready")
        assert running.control.list_plugins()
        assert api.client.find(API_VERSION, "CasparianPlugin", "sales", "held-b") is not None
