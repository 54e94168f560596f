"""Equal names in two namespaces: nothing of one is ever the other's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from signing_kit import lax_rules, signed_bundle

from casparian_flow.domain.errors import ConflictError, NotFoundError, UsageError
from casparian_flow.protocol.http_types import HttpJobType
from casparian_flow.sentinel.api import ControlApi, FileFinding, Row, ScanReport
from casparian_flow.sentinel.local import LocalControl

PLUGIN = """
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.csv", topic="sales_data", subscriptions=["csv"])


class Handler(BasePlugin):
    def execute(self, file_path):
        pass
"""
FINDING = FileFinding("a.csv", (1, 2, 3, 4, 5), "ab" * 32, 10)


@pytest.fixture
def control(tmp_path: Path) -> Iterator[LocalControl]:
    with LocalControl.open(tmp_path / "ledger.duckdb", trust=lax_rules, trials=False) as control:
        yield control


def bundle(version: str = "1.0.0") -> bytes:
    return signed_bundle(PLUGIN, "sales", version)


def add_root(control: ControlApi, namespace: str, name: str = "inbox") -> int:
    row = control.add_source(f"/sources/{namespace}/{name}", name=name, namespace=namespace)
    return int(row["id"])


def scan(control: ControlApi, root_id: int, finding: FileFinding = FINDING) -> int:
    begun = control.begin_scan(root_id)
    jobs = control.commit_chunk(root_id, begun["scan_id"], [finding]).jobs
    control.finish_scan(root_id, begun["scan_id"], [], ScanReport(root_id, files=1))
    return jobs


def counts(control: ControlApi, plugin: str) -> Row:
    (row,) = [row for row in control.plugin_counts() if row["plugin_name"] == plugin]
    return row


def test_one_bundle_in_two_namespaces_sees_the_files_of_its_own_only(
    control: LocalControl,
) -> None:
    assert control.deploy(bundle(), "a")["plugin"] == "a/sales"
    assert control.deploy(bundle(), "b")["plugin"] == "b/sales"
    control.deploy(bundle())
    assert scan(control, add_root(control, "a")) == 1
    assert [job["plugin_name"] for job in control.list_jobs()] == ["a/sales"]
    assert scan(control, add_root(control, "b")) == 1
    plain = control.add_source("/sources/plain")["id"]
    assert scan(control, plain) == 1
    jobs = {job["plugin_name"]: job for job in control.list_jobs()}
    assert {name: job["source_root"] for name, job in jobs.items()} == {
        "a/sales": "/sources/a/inbox",
        "b/sales": "/sources/b/inbox",
        "sales": "/sources/plain",
    }
    assert len({job["file_version_id"] for job in jobs.values()}) == 3
    assert counts(control, "a/sales")["queued"] == 1
    for name in ("a/sales", "b/sales", "sales"):
        assert control.backfill(name, execute=False)["jobs"] == 0
        assert control.backfill(name, execute=False, force=True)["jobs"] == 1
    other = jobs["b/sales"]["file_version_id"]
    with pytest.raises(UsageError, match="namespaces differ"):
        control.submit(version_id=other, plugin="a/sales", priority=None, force=True)
    with pytest.raises(UsageError, match="in no source root"):
        control.api.start_job(HttpJobType.PREVIEW, "a/sales", None, "/sources/b/inbox")
    assert control.check() == []


def test_rules_and_topics_of_one_namespace_leave_the_other_alone(control: LocalControl) -> None:
    control.deploy(bundle(), "a")
    control.deploy(bundle(), "b")
    control.add_rule("*.tsv", "csv", namespace="a")
    assert control.add_rule("*.tsv", "csv", namespace="b") != control.add_rule(
        "*.tsv", "csv", namespace="a"
    )
    control.set_topic("a/sales", "sales_data", uri="parquet://of_a")
    uris = {row["plugin_name"]: row["uri"] for row in control.list_topics()}
    assert uris == {"a/sales": "parquet://of_a", "b/sales": "parquet://sales_data"}
    for rule in control.list_rules():
        if rule["namespace"] == "b":
            control.remove_rule(rule["id"])
    assert scan(control, add_root(control, "b")) == 0
    tsv = FileFinding("a.tsv", (1, 2, 3, 4, 5), "cd" * 32, 10)
    assert scan(control, add_root(control, "a"), tsv) == 1


def test_versions_and_pauses_belong_to_one_namespace(control: LocalControl) -> None:
    control.deploy(bundle(), "a")
    control.deploy(bundle("2.0.0"), "a")
    control.deploy(bundle(), "b")
    control.rollback_plugin("a/sales", "1.0.0")
    control.pause_plugin("a/sales", reason="test")
    standing = {(r["plugin_name"], r["version"]): r for r in control.list_plugins()}
    assert standing["a/sales", "2.0.0"]["status"] == "SUPERSEDED"
    assert standing["b/sales", "1.0.0"]["status"] == "ACTIVE"
    assert not standing["b/sales", "1.0.0"]["paused"]
    with pytest.raises(NotFoundError):
        control.pause_plugin("sales", reason="test")
    with pytest.raises(NotFoundError):
        control.plugin_bundle("c/sales")


def test_names_that_are_none_are_refused(control: LocalControl) -> None:
    for namespace in ("A", "a/b", "-a", "a" * 64, "..", "a\n"):
        with pytest.raises(UsageError):
            control.deploy(bundle(), namespace)
        with pytest.raises(UsageError):
            control.add_source("/x", name="in", namespace=namespace)
        with pytest.raises(UsageError):
            control.add_rule("*", "t", namespace=namespace)
    for name in ("", "a/b", ".", "a b"):
        with pytest.raises(UsageError):
            control.add_source("/x", name=name, namespace="a")
    assert control.list_plugins() == []
    assert control.list_sources() == []


def test_a_folder_belongs_to_one_namespace_and_a_name_to_one_folder(control: LocalControl) -> None:
    first = add_root(control, "a")
    assert add_root(control, "a") == first
    with pytest.raises(ConflictError, match="source root of a already"):
        control.add_source("/sources/a/inbox", name="inbox", namespace="b")
    with pytest.raises(ConflictError, match="source root of a already"):
        control.add_source("/sources/a/inbox")
    with pytest.raises(ConflictError, match="is the folder"):
        control.add_source("/sources/a/elsewhere", name="inbox", namespace="a")
    with pytest.raises(ConflictError, match="is the source root a/inbox already"):
        control.add_source("/sources/a/inbox", name="other", namespace="a")
    add_root(control, "b")
    assert control.retire_source("a/inbox")
    assert not control.retire_source("a/inbox")
    assert not control.retire_source("inbox")
    assert {r["name"]: r["active"] for r in control.list_sources()} == {
        "a/inbox": False,
        "b/inbox": True,
    }
    assert add_root(control, "a") == first  # history goes on where it ended


def test_a_retired_plugin_gets_no_jobs_until_it_is_deployed_again(control: LocalControl) -> None:
    control.deploy(bundle(), "a")
    root = add_root(control, "a")
    assert scan(control, root) == 1
    control.set_topic("a/sales", "sales_data", uri="parquet://mine")
    assert control.retire_plugin("a/sales")["superseded"] == "1.0.0"
    assert control.retire_plugin("a/sales") == {
        "plugin": "a/sales",
        "superseded": "",
        "withdrawn": [],
    }
    assert control.retire_plugin("never/seen")["superseded"] == ""
    assert control.plugin_counts() == []
    assert scan(control, root, FileFinding("b.csv", (1, 3, 3, 4, 5), "cd" * 32, 10)) == 0
    assert [job["status"] for job in control.list_jobs()] == ["QUEUED"]
    assert control.list_rules() == []
    again = control.deploy(bundle(), "a")
    assert (again["unchanged"], again["status"]) == (True, "SUPERSEDED")
    assert control.rollback_plugin("a/sales", "1.0.0")["kept"] == []
    assert counts(control, "a/sales")["queued"] == 1
    assert control.backfill("a/sales", execute=True)["jobs"] == 1
    assert [row["uri"] for row in control.list_topics()] == ["parquet://sales_data"]
    control.retire_plugin("a/sales")
    assert control.deploy(bundle("1.1.0"), "a")["kept"] == []
    assert len(control.list_rules()) == 1
    assert control.check() == []


def test_counts_tell_versions_apart(control: LocalControl) -> None:
    control.deploy(bundle(), "a")
    scan(control, add_root(control, "a"))
    control.deploy(bundle("2.0.0"), "a")
    row = counts(control, "a/sales")
    assert (row["version"], row["status"], row["queued"]) == ("2.0.0", "ACTIVE", 1)
    zeros = ("running", "failed", "workers", "idle")
    assert [row[name] for name in zeros] == [0, 0, 0, 0]
    assert row["trial"] == ""
