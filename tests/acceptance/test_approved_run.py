"""A run that is asked for and approved, as a person at a terminal sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
from acceptance_kit import Flow, make_flow, wait_for

from casparian_flow.config import load_settings
from casparian_flow.sentinel.control import connect

PEOPLE = """\
import pyarrow.csv
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(subscriptions=["by_hand"])

class Handler(BasePlugin):
    def execute(self, file_path):
        self.publish("people", pyarrow.csv.read_csv(file_path))
"""


@pytest.fixture
def flow(tmp_path: Path) -> Flow:
    made = make_flow(tmp_path / "site")
    made.write("inbox/a.csv", "name\nann\nbob\n")
    made.write("inbox/b.csv", "name\ncid\n")
    made.json("source", "add", "inbox")
    made.publish("people", PEOPLE)
    return made


def ask(flow: Flow) -> str:
    """What an MCP server does for a model that asks for a run; returns the request's id."""
    with connect(load_settings(flow.folder / "global_config.toml")) as control:
        return control.api.request_run("people", None, str(flow.inbox)).approval_id


def waiting(flow: Flow) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = flow.json("mcp", "list")
    return found


def is_active(flow: Flow) -> bool:
    return any(row["status"] == "ACTIVE" for row in flow.json("plugins"))


def files(flow: Flow) -> int:
    return len(flow.json("files"))


def test_a_request_is_listed_approved_run_and_followed(flow: Flow) -> None:
    with flow.start():
        wait_for("the plugin's trial", lambda: is_active(flow))
        wait_for("both files", lambda: files(flow) == 2)
        approval_id = ask(flow)
        (row,) = waiting(flow)
        assert (row["approval_id"], row["file_count"]) == (approval_id, 2)
        assert row["summary"].startswith("Run people 1.0.0 on 2 files below")
        assert not list(flow.folder.glob("output/**/*.parquet"))

        approved = flow.json("mcp", "approve", approval_id[:8])
        assert approved["status"] == "approved"
        followed = flow.run("events", str(approved["job_id"]), "--follow", "-o", "json")
        events = [json.loads(line) for line in followed.stdout.splitlines()]
        assert [e["event_id"] for e in events] == list(range(1, len(events) + 1))
        assert (events[0]["type"], events[-1]["type"]) == ("job_started", "job_finished")
        assert events[-1]["status"] == "completed"
        assert sum(e["rows"] for e in events if e["type"] == "output") == 3
        assert sorted(flow.table("people")["name"].to_pylist()) == ["ann", "bob", "cid"]
        told = flow.run("events", str(approved["job_id"])).stdout
        assert "people -> parquet://people  2 rows" in told
        assert waiting(flow) == []
        assert flow.run("approvals", "approve", approval_id, code=5).stderr.startswith("error:")


def test_a_file_added_after_the_request_voids_it(flow: Flow) -> None:
    with flow.start():
        wait_for("the plugin's trial", lambda: is_active(flow))
        wait_for("both files", lambda: files(flow) == 2)
        approval_id = ask(flow)
        flow.write("inbox/late.csv", "name\nzed\n")
        wait_for("the third file", lambda: files(flow) == 3)
        refused = flow.run("mcp", "approve", approval_id, code=5)
        assert "is stale" in refused.stderr
        assert "the number of files changed from 2 to 3" in refused.stderr
        (row,) = flow.json("approvals", "list", "--all")
        assert row["status"] == "stale"
        other = ask(flow)
        flow.run("mcp", "approve", other, "--reject", "--reason", "not today")
        assert flow.json("approvals", "list", "--all")[0]["reason"] == "not today"
        assert not list(flow.folder.glob("output/**/*.parquet"))
        assert flow.json("jobs") == []


def test_a_decision_without_a_sentinel_is_carried_out_by_the_next_one(flow: Flow) -> None:
    flow.work_off()
    approval_id = ask(flow)
    assert "1 for a person to decide" in flow.run("status").stdout
    approved = flow.run("mcp", "approve", approval_id[:6])
    assert "it begins when a Sentinel with a worker runs" in approved.stderr
    assert flow.json("status")["api_jobs"] == {"queued": 1}
    flow.work_off()
    assert sorted(flow.table("people")["name"].to_pylist()) == ["ann", "bob", "cid"]
    assert flow.json("status")["api_jobs"] == {}
