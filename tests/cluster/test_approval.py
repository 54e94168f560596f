"""A run waits for a person, who decides by `kubectl patch` and nowhere else."""

import json
from typing import Any

from acceptance_kit import wait_for
from cluster.line import PATIENCE_S, Line
from cluster.release import API_VERSION, FLOW, Release, condition

BY_HAND = """\
import pyarrow as pa
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(subscriptions=["by_hand"])

class Handler(BasePlugin):
    def execute(self, file_path):
        with self.open_input() as file:
            self.publish("words", pa.table({"word": file.read().decode().split()}))
"""
ASK = """\
import json, sys
from casparian_flow.config import load_settings
from casparian_flow.sentinel.control import connect
with connect(load_settings()) as control:
    print(json.dumps(control.api.request_run(sys.argv[1], None, sys.argv[2]).approval_id))
"""
APPROVE = '{"spec":{"decision":"approved"}}'


def test_a_run_starts_once_somebody_who_may_has_patched_its_approval(release: Release) -> None:
    line = Line(release, "asked")
    line.watch()
    line.apply_plugin(BY_HAND)
    line.await_ready()
    line.write_files(2)
    line.scan()
    request = json.loads(
        release.execute("python", "-c", ASK, f"{FLOW}/{line.name}", f"/sources/{FLOW}/{line.name}")
    )
    let_approve(release, "ann")

    def asked() -> dict[str, Any] | None:
        found = release.kube.list(API_VERSION, "Approval", FLOW)
        return next((a for a in found if a["metadata"]["name"] == name_of(request, found)), None)

    approval = wait_for("the Approval", asked, PATIENCE_S)
    name = approval["metadata"]["name"]
    assert "2 files" in approval["spec"]["summary"]
    assert line.published() == 0

    patch = ("patch", "approval", name, "-n", FLOW, "--type=merge", "-p", APPROVE)
    refused = release.kube.kubectl(*patch, "--as=mallory", check=False)
    assert "forbidden" in refused.stderr
    release.kube.kubectl(*patch, "--as=ann")

    def started() -> dict[str, Any] | None:
        found = release.kube.get(API_VERSION, "Approval", name, FLOW)
        return found if condition(found, "Started").get("status") == "True" else None

    decided = wait_for("its job", started, PATIENCE_S)
    assert decided["spec"]["decidedBy"] == "ann"
    assert decided["status"]["phase"] == "Approved"
    assert decided["status"]["jobId"]
    line.await_published(2)
    line.check_nothing_lost_or_doubled()
    line.remove()


def name_of(request: str, approvals: list[dict[str, Any]]) -> str:
    """Of the object for a request of the ledger."""
    found = [a["metadata"]["name"] for a in approvals if request in json.dumps(a)]
    return found[0] if found else ""


def let_approve(release: Release, user: str) -> None:
    """As examples/k8s/approver.yaml does for a group."""
    group = "rbac.authorization.k8s.io"
    release.kube.apply(
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": f"{user}-approves", "namespace": FLOW},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "casparian-approver"},
            "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
        }
    )
