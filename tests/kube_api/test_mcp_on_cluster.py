"""The MCP server as the chart's Deployment runs it: the real command, with the account's own rights
and the key in its Secret, asked by people with tokens of their own."""

import asyncio
import base64
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from kube_kinds import OPERATOR, install
from kube_kit import ApiServer
from kube_operator import install_operator, operator, operator_config, plugin, source_root
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from casparian_flow.kube.names import API_VERSION
from casparian_flow.kube.operator import Operator
from casparian_flow.kube.token_review import caller_of
from casparian_flow.sentinel.api import ControlApi
from casparian_flow.services.scout import scan

ACCOUNT = "casparian-mcp"
AUDIENCE = "casparian-mcp"
HOME = OPERATOR[0]
CASPARIAN = Path(sys.executable).with_name("casparian")
PATIENCE_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def kinds(api: ApiServer) -> None:
    install(api)


def _let_it_review_tokens(api: ApiServer) -> Path:
    """Its account with the one right that the chart gives it; returns its kubeconfig."""
    group = "rbac.authorization.k8s.io"
    rule = {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"]}
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": HOME}
    name = {"metadata": {"name": "mcp-reviews"}}
    api.client.apply(
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRole",
            **name,
            "rules": [{**rule, "verbs": ["create"]}],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            **name,
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "mcp-reviews"},
            "subjects": [subject],
        },
    )
    return api.client_for_account(HOME, ACCOUNT).kubeconfig


def _key_files(api: ApiServer, folder: Path) -> Path:
    """Its Secret, as the pod mounts it."""
    secret = api.client.wait(lambda: api.client.find("v1", "Secret", ACCOUNT, HOME))
    folder.mkdir()
    for name, text in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(text))
    return folder


class _Mounted:
    """The control plane for a Scout whose source root is mounted at another path than the ledger
    has."""

    def __init__(self, running: Operator, folder: Path) -> None:
        self._control = running.control
        self._folder = str(folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def begin_scan(self, root_id: int) -> Any:
        return self._control.begin_scan(root_id) | {"path": self._folder}


def _files_of(api: ApiServer, running: Operator, space: str, folder: Path) -> str:
    """A source root with a file, found by a scan; the path that the ledger has."""
    api.client.apply(source_root(space, settleSeconds=0))
    folder.mkdir()
    (folder / "a.csv").write_text("n\n1\n")
    rows = api.client.wait(running.control.list_sources, PATIENCE_S)
    report = scan(int(rows[0]["id"]), cast(ControlApi, _Mounted(running, folder)))
    assert report.complete
    return str(rows[0]["path"])


@contextmanager
def _served(settings: str, kubeconfig: Path, folder: Path) -> Iterator[str]:
    """`casparian mcp serve --http`; its address."""
    config = folder / "config.toml"
    config.write_text(settings)
    process = subprocess.Popen(
        [CASPARIAN, "--config", config, "mcp", "serve", "--http", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={"KUBECONFIG": str(kubeconfig), "HOME": str(folder), "LANG": "C.UTF-8"},
    )
    assert process.stderr is not None
    rest: threading.Thread | None = None
    try:
        said = ""
        while "serving MCP at " not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        rest = threading.Thread(target=process.stderr.read)
        rest.start()
        yield said.rpartition("serving MCP at ")[2].strip().replace("0.0.0.0", "127.0.0.1")
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        if rest is not None:
            rest.join()
        process.stderr.close()


def _refused(address: str, token: str) -> int:
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(address, b"{}", headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    refused.value.close()
    return refused.value.code


def _asked(address: str, token: str, tool: str, **arguments: Any) -> Any:
    async def run() -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            httpx2.AsyncClient(headers=headers, timeout=PATIENCE_S) as http,
            Client(streamable_http_client(address, http_client=http)) as client,
        ):
            found = await client.call_tool(tool, arguments)
            text = found.content[0].text  # type: ignore[union-attr]
            assert not found.is_error, text
            return json.loads(text)

    return asyncio.run(run())


def test_people_ask_in_their_own_names_and_decide_elsewhere(
    api: ApiServer, space: str, tmp_path: Path
) -> None:
    ann = f"system:serviceaccount:{space}:ann"
    for account in ("ann", "eve"):
        api.account(space, account)
    operators = install_operator(api, (space,))
    kubeconfig = _let_it_review_tokens(api)
    config = operator_config(tmp_path, HOME, (space,), mcp_account=ACCOUNT, resync_seconds=1)
    with operator(api, config, operators) as running:
        keys = _key_files(api, tmp_path / "keys")
        api.client.apply(plugin(space))
        folder = _files_of(api, running, space, tmp_path / "inbox")
        settings = f"""
            [sentinel]
            control_address = "{running.sentinel.remote_control_address}"
            [wire]
            curve_dir = "{keys}"
            [mcp]
            host = "0.0.0.0"
            token_review = true
            allowed_users = ["{ann}"]
            audit_log = "{tmp_path / "audit.ndjson"}"
        """
        with _served(settings, kubeconfig, tmp_path) as address:
            mine = api.token(space, "ann", audiences=[AUDIENCE])
            assert _refused(address, "") == 401
            assert _refused(address, "no-token-of-anybody") == 401
            assert _refused(address, api.token(space, "ann")) == 401
            assert _refused(address, api.token(space, "eve", audiences=[AUDIENCE])) == 403

            def deployed() -> bool:
                rows = _asked(address, mine, "casparian_plugins")["plugins"]
                return any(row["plugin"] == f"{space}/sales" for row in rows)

            api.client.wait(deployed, PATIENCE_S)
            sql = "SELECT count(*) AS n FROM cf_file_version"
            assert _asked(address, mine, "casparian_query", sql=sql)["rows"] == [[1]]
            asked = _asked(
                address,
                mine,
                "casparian_run_request",
                plugin_ref={"plugin": f"{space}/sales"},
                input_dir=folder,
            )
        request = running.control.api.get_approval(asked["approval_id"])
        assert request is not None
        assert request.requester == ann
        assert asked["approve_command"].startswith("casparian --context CONTEXT mcp approve ")

        def on_object() -> str:
            found = api.client.list(API_VERSION, "Approval", space)
            return "".join(a["spec"]["requestedBy"] for a in found)

        assert api.client.wait(on_object, PATIENCE_S) == ann
    audit = [json.loads(line) for line in (tmp_path / "audit.ndjson").read_text().splitlines()]
    assert {line["caller"] for line in audit} == {ann}


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"authenticated": False, "audiences": [AUDIENCE], "user": {"username": "ann"}},
        {"authenticated": True, "audiences": ["another"], "user": {"username": "ann"}},
        {"authenticated": True, "audiences": [AUDIENCE], "user": {}},
        {"authenticated": True, "user": {"username": "ann"}},
    ],
)
def test_what_proves_nothing_is_nobodys(status: dict[str, Any]) -> None:
    assert caller_of(status, [AUDIENCE], ["ann", ""], ["people"]) is None


def test_members_of_a_group_may_call() -> None:
    user = {"username": "ann", "groups": ["people", "system:authenticated"]}
    status = {"authenticated": True, "audiences": [AUDIENCE], "user": user}
    assert caller_of(status, [AUDIENCE], [], ["people"]) == "ann"
