"""The operator's own life on a real API server: how much it writes, restarts, its Lease."""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kube_kinds import install
from kube_kit import ApiServer
from kube_operator import (
    await_condition,
    conditions,
    install_operator,
    operator,
    operator_config,
    plugin,
    source_root,
)

from casparian_flow.kube.names import API_VERSION
from casparian_flow.kube.operator import EXIT_LOST

WRITES = ("create", "update", "patch", "delete")
MANY = int(os.environ.get("CASPARIAN_PLUGINS", "40"))
"""200 in `make soak`."""


@pytest.fixture(scope="module", autouse=True)
def kinds(api: ApiServer) -> None:
    install(api)


def writes(api: ApiServer, space: str, user: str) -> Counter[tuple[str, str]]:
    """Requests that write, by verb and resource with its subresource."""
    found: Counter[tuple[str, str]] = Counter()
    for event in api.requests(namespace=space):
        reference = event["objectRef"]
        if event["verb"] in WRITES and event["user"]["username"].endswith(user):
            part = reference.get("subresource", "")
            found[event["verb"], f"{reference['resource']}/{part}".rstrip("/")] += 1
    return found


def test_many_plugins_cost_one_write_for_each_object_and_none_once_they_are_there(
    api: ApiServer, tmp_path: Path
) -> None:
    space = "many"
    kubeconfig = install_operator(api, (space,))
    config = operator_config(tmp_path, "casparian", (space,), resync_seconds=2)
    with operator(api, config, kubeconfig) as running:
        began = time.monotonic()
        api.client.apply(*(plugin(space, f"plugin-{n}") for n in range(MANY)))

        def all_ready() -> bool:
            found = api.client.list(API_VERSION, "CasparianPlugin", space)
            return len(found) == MANY and all(
                conditions(body).get("Ready") == ("True", "Ready") for body in found
            )

        end = began + max(110, 2 * MANY)
        while not all_ready():
            assert time.monotonic() < end
            time.sleep(1)
        print(f"{MANY} plugins in {time.monotonic() - began:.1f} s")
        api.client.wait(running.queue.idle)
        done = writes(api, space, "casparian-operator")
        for kind in (
            "deployments", "secrets", "configmaps", "serviceaccounts", "networkpolicies"
        ):  # fmt: skip
            assert done["patch", kind] == MANY
        assert done["patch", "casparianplugins/status"] <= 2 * MANY
        assert done["create", "events"] <= MANY
        assert set(done) == {
            ("patch", "deployments"),
            ("patch", "secrets"),
            ("patch", "configmaps"),
            ("patch", "serviceaccounts"),
            ("patch", "networkpolicies"),
            ("patch", "casparianplugins/status"),
            ("create", "events"),
        }
        looks = running.looks.last.taken_at
        time.sleep(2 * config.settings.operator.resync_seconds + 1)
        api.client.wait(lambda: running.looks.last.taken_at > looks and running.queue.idle())
        assert writes(api, space, "casparian-operator") == done


def test_a_restart_retires_what_went_while_nobody_looked_and_keeps_the_rest(
    api: ApiServer, tmp_path: Path
) -> None:
    space = "restart"
    kubeconfig = install_operator(api, (space,))
    with operator(api, operator_config(tmp_path, "casparian", (space,)), kubeconfig) as running:
        api.client.apply(plugin(space, "stays"), plugin(space, "goes"), source_root(space))
        for name in ("stays", "goes"):
            await_condition(api, "CasparianPlugin", space, name, "Ready", "Ready")
        api.client.wait(lambda: len(running.control.list_sources()) == 1)
        first = running.sentinel.epoch
    # The operator is away: deleting hangs on nothing.
    api.client.delete(API_VERSION, "CasparianPlugin", "goes", space, gone=True)
    api.client.delete(API_VERSION, "SourceRoot", "inbox", space, gone=True)
    config = operator_config(tmp_path, "casparian", (space,), nonce="b")
    with operator(api, config, kubeconfig) as running:
        api.client.wait(lambda: _standing(running) == {"stays": "ACTIVE", "goes": "SUPERSEDED"})
        api.client.wait(lambda: not any(r["active"] for r in running.control.list_sources()))
        assert running.sentinel.epoch == first + 1
        lease = api.client.get("coordination.k8s.io/v1", "Lease", "casparian-operator", "casparian")
        annotations = lease["metadata"]["annotations"]
        assert annotations["casparian.io/epoch"] == str(running.sentinel.epoch)


def _standing(running: Any) -> dict[str, str]:
    rows = running.control.list_plugins()
    return {r["plugin_name"].partition("/")[2]: r["status"] for r in rows}


def test_a_ledger_from_a_backup_begins_above_the_epoch_that_the_lease_knows(
    api: ApiServer, tmp_path: Path
) -> None:
    space = "fresh"
    kubeconfig = install_operator(api, (space,))
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    with operator(api, operator_config(old, "casparian", (space,)), kubeconfig) as running:
        before = running.sentinel.epoch
    assert before >= 1
    with operator(api, operator_config(new, "casparian", (space,)), kubeconfig) as running:
        api.client.wait(lambda: running.sentinel.epoch > before, 30)


def test_an_operator_ends_when_another_takes_the_lease_and_bears_an_api_server_that_is_away(
    tmp_path: Path,
) -> None:
    from kube_kit import api_server

    with api_server() as api:
        install(api)
        kubeconfig = install_operator(api, ("lease",))
        config = operator_config(tmp_path, "casparian", ("lease",), resync_seconds=2)
        with operator(api, config, kubeconfig) as running:
            api.client.apply(plugin("lease"))
            await_condition(api, "CasparianPlugin", "lease", "sales", "Ready", "Ready")
            api.stop()
            time.sleep(3)
            # Jobs go on meanwhile: the ledger answers, and takes commits.
            assert running.control.ping()["epoch"] == running.sentinel.epoch
            running.control.add_source("/elsewhere")
            api.start()
            api.client.apply(plugin("lease", "second"))
            await_condition(api, "CasparianPlugin", "lease", "second", "Ready", "Ready")

            def taken() -> bool:
                lease = api.client.get(
                    "coordination.k8s.io/v1", "Lease", "casparian-operator", "casparian"
                )
                lease["spec"]["holderIdentity"] = "another"
                api.client.replace(lease)
                return True

            api.client.wait(taken)
            api.client.wait(running.stopped, 30)
            assert running.exit_code == EXIT_LOST
