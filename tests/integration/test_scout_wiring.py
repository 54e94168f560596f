"""Deploys, hand-made wiring, backfill and publishing on a real ledger."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from signing_kit import KEY, policy, rules, signed

from casparian_flow.db import rejections, wiring
from casparian_flow.db.inventory import begin_scan, finish_scan, record_chunk
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.sources import add_source
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import ConflictError, NotFoundError, UsageError
from casparian_flow.domain.jobs import JobStatus, JournalKind
from casparian_flow.domain.records import Record
from casparian_flow.sentinel.api import ControlApi, FileFinding, Row, ScanReport
from casparian_flow.sentinel.control import connect
from casparian_flow.services import architect
from casparian_flow.services.publisher import bundled, locked, read_plugin
from casparian_flow.services.publisher import signed as signed_by
from casparian_flow.trust.bundle import pack

HANDLER = "class Handler(BasePlugin):\n    pass\n"
LOCK = (Path(__file__).parent.parent / "data" / "excel_reader.uv.lock").read_text()
T0 = 1_800_000_000_000_000


def source(arguments: str) -> str:
    return (
        "from casparian_flow.sdk import BasePlugin, PluginMetadata\n"
        f"MANIFEST = PluginMetadata({arguments})\n{HANDLER}"
    )


class Wires:
    """A ledger in memory and the shortest words for changing it."""

    def __init__(self) -> None:
        self.ledger = Ledger.in_memory(clock=SystemClock())
        self.root = int(add_source(self.ledger, "/data", now_us=T0)["id"])

    def deploy(self, arguments: str, version: str = "1.0.0", name: str = "p", **more: str) -> Row:
        bundle = signed(source(arguments), name, version, **more)
        verdict = policy().check(bundle, deployed_at_us=T0)
        return architect.deploy(self.ledger, bundle, verdict, now_us=T0)

    def rules(self) -> list[tuple[str, str, int, str]]:
        return [
            (r["pattern"], r["tag"], r["priority"], r["origin"])
            for r in self.ledger.query("SELECT * FROM cf_routing_rule ORDER BY id")
        ]

    def topics(self) -> dict[str, str]:
        rows = self.ledger.query("SELECT topic_name, uri FROM cf_topic_config")
        return {row["topic_name"]: row["uri"] for row in rows}

    def tags(self, plugin: str = "p") -> str:
        (row,) = self.ledger.query(
            "SELECT subscription_tags FROM cf_plugin_config WHERE plugin_name = $1", [plugin]
        )
        return str(row["subscription_tags"])

    def statuses(self) -> list[tuple[str, str]]:
        rows = self.ledger.query("SELECT version, status FROM cf_plugin_manifest ORDER BY id")
        return [(row["version"], row["status"]) for row in rows]

    def see(self, *files: tuple[str, str], at_us: int = T0) -> list[int]:
        """Record files as (path, hash letter); returns the ids of the new jobs."""
        current = {
            row["rel_path"]: row["current_version_id"]
            for row in self.ledger.query(
                "SELECT rel_path, current_version_id FROM cf_file_location"
            )
        }
        begun = begin_scan(self.ledger, self.root, now_us=at_us)
        findings = [
            FileFinding(path, (1, i + 1, 1, 1, 1), letter * 64, at_us, current.get(path, 0))
            for i, (path, letter) in enumerate(files)
        ]
        result, jobs = record_chunk(
            self.ledger, self.root, begun["scan_id"], findings, now_us=at_us
        )
        assert result.conflicts == []
        self.finish(begun["scan_id"], at_us=at_us)
        return [int(job.job_id) for job in jobs]

    def finish(self, scan_id: int, *deleted: str, at_us: int = T0) -> list[int]:
        _, jobs = finish_scan(
            self.ledger, self.root, scan_id, deleted, ScanReport(self.root), now_us=at_us
        )
        return [int(job.job_id) for job in jobs]

    def rescan(self, *deleted: str, at_us: int = T0) -> list[int]:
        scan_id = begin_scan(self.ledger, self.root, now_us=at_us)["scan_id"]
        return self.finish(scan_id, *deleted, at_us=at_us)

    def skip(self, job_id: int, reason: str, at_us: int) -> None:
        data = {"reason": reason, "message": ""}
        self.ledger.commit([Record(job_id, JournalKind.SKIPPED, 0, at_us, data)])  # type: ignore[arg-type]  # an id is an int


@pytest.fixture
def wires() -> Iterator[Wires]:
    made = Wires()
    yield made
    assert made.ledger.check() == []
    made.ledger.close()


def test_a_deploy_wires_the_plugin_whole(wires: Wires) -> None:
    row = wires.deploy(
        'pattern="*.csv", topic="sales", priority=70, subscriptions=["csv"], parameters={"a": 1}',
        lockfile=LOCK,
    )
    assert (row["plugin_id"], row["unchanged"]) == (1, False)
    assert row["message"] == "deployed p 1.0.0"
    assert row["rule"] == {"pattern": "*.csv", "tag": "auto_p", "priority": 70}
    assert row["topics"] == {"sales": ["parquet://sales"]}
    assert row["subscriptions"] == ["auto_p", "csv"]
    assert wires.rules() == [("*.csv", "auto_p", 70, "auto")]
    (spec,) = wires.ledger.plugin_specs()
    assert (spec.parameters_json, spec.lockfile) == ('{"a":1}', LOCK)
    assert spec.env_hash
    assert [s.uri for s in spec.sinks] == ["parquet://sales"]
    assert [p["name"] for p in wires.ledger.query("SELECT name FROM cf_publisher")] == ["tests"]


def test_a_failed_deploy_records_nothing(wires: Wires) -> None:
    with pytest.raises(UsageError, match="unknown scheme"):
        wires.deploy('pattern="*", topic="t", sinks={"t": "nosuch://x"}')
    for table in ("cf_plugin_manifest", "cf_routing_rule", "cf_publisher", "cf_plugin_config"):
        assert wires.ledger.query(f"SELECT * FROM {table}") == []


def test_the_same_version_again_is_a_no_op_that_says_so(wires: Wires) -> None:
    first = wires.deploy('pattern="*"')
    again = wires.deploy('pattern="*"')
    assert again["unchanged"]
    assert again["plugin_id"] == first["plugin_id"]
    assert "already deployed" in again["message"]
    assert len(wires.statuses()) == 1


def test_the_same_version_with_other_bytes_is_refused(wires: Wires) -> None:
    wires.deploy('pattern="*"')
    with pytest.raises(ConflictError, match="versions are immutable") as caught:
        wires.deploy('pattern="*.csv"')
    assert caught.value.hint == "Publish it as 1.0.1."
    with pytest.raises(ConflictError):
        wires.deploy('pattern="*"', lockfile=LOCK)
    assert wires.rules() == [("*", "auto_p", 50, "auto")]


def test_a_refused_version_of_any_name_does_not_hide_the_next_free_one(wires: Wires) -> None:
    wires.deploy('pattern="*"')
    rejections.record(
        wires.ledger, plugin="p", version="abc", source_code="", error="no version", now_us=T0
    )
    with pytest.raises(ConflictError, match="versions are immutable") as caught:
        wires.deploy('pattern="*.csv"')
    assert caught.value.hint == "Publish it as 1.0.1."


def test_a_lock_that_no_worker_could_use_is_refused_at_deploy(wires: Wires) -> None:
    with pytest.raises(UsageError, match="the lock lacks pyarrow") as caught:
        wires.deploy('pattern="*"', lockfile=LOCK[: LOCK.index('[[package]]\nname = "pyarrow"')])
    assert "uv lock" in caught.value.hint
    assert wires.statuses() == []


def test_a_new_version_supersedes_the_old_also_with_the_same_source(wires: Wires) -> None:
    wires.deploy('pattern="*"')
    row = wires.deploy('pattern="*"', "1.1.0")
    assert row["message"] == "deployed p 1.1.0, which supersedes 1.0.0"
    assert wires.statuses() == [("1.0.0", "SUPERSEDED"), ("1.1.0", "ACTIVE")]
    assert "superseded" in wires.deploy('pattern="*"')["message"]


def test_a_new_version_moves_what_the_old_one_declared(wires: Wires) -> None:
    wires.deploy('pattern="*.csv", topic="a", subscriptions=["x"], parameters={"k": 1}')
    wires.deploy(
        'pattern="*.tsv", topic="b", priority=9, subscriptions=["y"], parameters={"k": 2}', "2.0.0"
    )
    assert wires.rules() == [("*.tsv", "auto_p", 9, "auto")]
    assert wires.topics() == {"b": "parquet://b"}
    assert wires.tags() == "auto_p,y"
    assert wires.ledger.plugin_specs()[0].parameters_json == '{"k":2}'


def test_two_plugins_with_an_equal_pattern_keep_their_rules_and_both_get_jobs(wires: Wires) -> None:
    wires.deploy('pattern="*.csv"', name="one")
    wires.deploy('pattern="*.csv"', name="two")
    assert len(wires.rules()) == 2
    assert len(wires.see(("a.csv", "a"))) == 2


def test_edits_by_hand_outlive_a_deploy(wires: Wires) -> None:
    wires.deploy('pattern="*.csv", topic="a", sinks={"b": "csv://b"}, subscriptions=["x"]')
    wiring.set_topic(wires.ledger, "p", "a", uri="sqlite:///db/x.sqlite3", mode="replace")
    own = wiring.add_rule(wires.ledger, "in/*", "x", priority=3)
    with wires.ledger.transaction() as connection:
        connection.execute("UPDATE cf_routing_rule SET priority = 99 WHERE origin = 'auto'")
        connection.execute("DELETE FROM cf_topic_config WHERE topic_name = 'b'")
        connection.execute(
            "UPDATE cf_plugin_config SET subscription_tags = 'auto_p,mine', "
            "default_parameters = '{\"own\":1}'"
        )
    row = wires.deploy(
        'pattern="*.csv", topic="a", sinks={"b": "csv://b"}, subscriptions=["x"], '
        'parameters={"k": 1}',
        "1.1.0",
    )
    assert wires.rules() == [("*.csv", "auto_p", 99, "auto"), ("in/*", "x", 3, "user")]
    assert wires.topics() == {"a": "sqlite:///db/x.sqlite3"}
    assert wires.tags() == "auto_p,mine"
    assert set(row["kept"]) == {
        "routing rule for '*.csv'",
        "default parameters",
        "subscription to 'x'",
        "topic a",
        "topic b",
    }
    wiring.remove_rule(wires.ledger, own)
    with pytest.raises(NotFoundError):
        wiring.remove_rule(wires.ledger, own)


def test_a_removed_automatic_rule_stays_removed_until_the_pattern_changes(wires: Wires) -> None:
    wires.deploy('pattern="*.csv"')
    (rule,) = wires.ledger.query("SELECT id FROM cf_routing_rule")
    wiring.remove_rule(wires.ledger, rule["id"])
    wires.deploy('pattern="*.csv"', "1.1.0")
    assert wires.rules() == []
    wires.deploy('pattern="*.tsv"', "1.2.0")
    assert wires.rules() == [("*.tsv", "auto_p", 50, "auto")]


def test_hand_made_wiring_is_checked(wires: Wires) -> None:
    wires.deploy('pattern="*"')
    with pytest.raises(UsageError):
        wiring.set_topic(wires.ledger, "p", "a", uri="ftp://x")
    with pytest.raises(UsageError):
        wiring.set_topic(wires.ledger, "p", "a", uri="csv://x", mode="sometimes")
    with pytest.raises(UsageError):
        wiring.set_topic(wires.ledger, "p", "../a", uri="csv://x")
    with pytest.raises(NotFoundError):
        wiring.set_topic(wires.ledger, "other", "a", uri="csv://x")
    with pytest.raises(UsageError):
        wiring.add_rule(wires.ledger, "[", "x")
    with pytest.raises(UsageError):
        wiring.add_rule(wires.ledger, "*", "a,b")
    assert wiring.add_rule(wires.ledger, "*", "x", priority=1) == wiring.add_rule(
        wires.ledger, "*", "x", priority=2
    )


def test_manual_tags_route_too(wires: Wires) -> None:
    wires.deploy('subscriptions=["special"]')
    assert wires.see(("a.csv", "a")) == []
    (location,) = wires.ledger.query("SELECT id FROM cf_file_location")
    with wires.ledger.transaction() as connection:
        connection.execute("INSERT INTO cf_file_tag VALUES ($1, 'special')", [location["id"]])
    assert len(wires.see(("a.csv", "b"))) == 1


def test_backfill_counts_first_and_lists_what_is_gone(wires: Wires) -> None:
    wires.see(("a.csv", "a"), ("b.csv", "b"), ("gone.csv", "c"), ("x.txt", "d"))
    wires.see(("a.csv", "e"))
    wires.rescan("gone.csv")
    wires.deploy('pattern="*.csv"')
    row, jobs = wiring.backfill(wires.ledger, "p", execute=False, now_us=T0)
    assert (row["jobs"], jobs) == (2, [])
    assert row["bytes_gone"] == [
        "a.csv (version 1: changed since)",
        "gone.csv (version 1: deleted)",
    ]
    row, jobs = wiring.backfill(wires.ledger, "p", execute=True, now_us=T0)
    assert sorted(job.rel_path for job in jobs) == ["a.csv", "b.csv"]
    assert wiring.backfill(wires.ledger, "p", execute=True, now_us=T0)[0]["jobs"] == 0


def test_backfill_is_per_plugin_version_and_force_raises_the_generation(wires: Wires) -> None:
    wires.deploy('pattern="*.csv"')
    (first,) = wires.see(("a.csv", "a"))
    assert wiring.backfill(wires.ledger, "p", execute=False, now_us=T0)[0]["jobs"] == 0
    _, forced = wiring.backfill(wires.ledger, "p", execute=True, force=True, now_us=T0)
    assert [job.generation for job in forced] == [1]
    wires.deploy('pattern="*.csv"', "2.0.0")
    # The queued jobs will run with the new version.
    assert wiring.backfill(wires.ledger, "p", execute=False, now_us=T0)[0]["jobs"] == 0
    for job_id in (first, int(forced[0].job_id)):
        wires.skip(job_id, "superseded", T0)
    _, jobs = wiring.backfill(wires.ledger, "p", execute=True, now_us=T0)
    assert [(job.generation, job.manifest_id) for job in jobs] == [(0, 2)]
    with pytest.raises(NotFoundError):
        wiring.backfill(wires.ledger, "nobody", execute=True, now_us=T0)


def test_a_job_skipped_for_a_changed_file_is_repeated_once_it_was_read_again(wires: Wires) -> None:
    wires.deploy('pattern="*.csv"')
    (job,) = wires.see(("a.csv", "a"))
    wires.skip(job, "source_changed", T0 + 10)
    assert wires.rescan(at_us=T0 + 20) == []
    begun = begin_scan(wires.ledger, wires.root, now_us=T0 + 30)
    found = FileFinding("a.csv", (1, 1, 1, 2, 2), "a" * 64, T0 + 30, 1)
    result, _ = record_chunk(wires.ledger, wires.root, begun["scan_id"], [found], now_us=T0 + 30)
    assert (result.unchanged, result.versions) == (1, 0)
    (again,) = wires.finish(begun["scan_id"], at_us=T0 + 40)
    (row,) = wires.ledger.query("SELECT * FROM cf_processing_queue WHERE id = $1", [again])
    assert (row["retry_of"], row["status"], row["file_version_id"]) == (job, "QUEUED", 1)
    assert wires.rescan(at_us=T0 + 50) == []


def test_a_job_skipped_for_a_changed_file_is_not_repeated_if_the_bytes_differ(
    wires: Wires,
) -> None:
    wires.deploy('pattern="*.csv"')
    (job,) = wires.see(("a.csv", "a"))
    wires.skip(job, "source_changed", T0 + 10)
    (new,) = wires.see(("a.csv", "b"), at_us=T0 + 30)
    assert wires.ledger.status_of(new) is JobStatus.QUEUED
    assert wires.rescan(at_us=T0 + 40) == []


def test_a_job_that_missed_its_file_because_of_a_rename_is_repeated(wires: Wires) -> None:
    wires.deploy('pattern="*.csv"')
    (job,) = wires.see(("a.csv", "a"))
    begun = begin_scan(wires.ledger, wires.root, now_us=T0 + 10)
    moved = FileFinding("b.csv", (1, 1, 1, 1, 2), "a" * 64, T0 + 10, 1, renamed_from="a.csv")
    result, jobs = record_chunk(wires.ledger, wires.root, begun["scan_id"], [moved], now_us=T0 + 10)
    assert (result.renamed, result.versions, jobs) == (1, 0, [])
    wires.finish(begun["scan_id"], at_us=T0 + 10)
    wires.skip(job, "source_missing", T0 + 20)
    (again,) = wires.rescan(at_us=T0 + 30)
    (row,) = wires.ledger.query(
        "SELECT l.rel_path FROM cf_processing_queue q "
        "JOIN cf_file_version v ON v.id = q.file_version_id "
        "JOIN cf_file_location l ON l.id = v.location_id WHERE q.id = $1",
        [again],
    )
    assert row["rel_path"] == "b.csv"
    assert wires.rescan(at_us=T0 + 40) == []


def test_a_silent_scan_gives_way_and_then_deletes_nothing(wires: Wires) -> None:
    wires.see(("a.csv", "a"))
    old = begin_scan(wires.ledger, wires.root, now_us=T0)["scan_id"]
    with pytest.raises(ConflictError):
        begin_scan(wires.ledger, wires.root, now_us=T0 + 1_000_000)
    new = begin_scan(wires.ledger, wires.root, now_us=T0 + 31_000_000)["scan_id"]
    wires.finish(old, "a.csv", at_us=T0 + 32_000_000)
    rows = wires.ledger.query("SELECT deleted_at FROM cf_file_location")
    assert rows == [{"deleted_at": None}]
    wires.finish(new, "a.csv", at_us=T0 + 33_000_000)
    (row,) = wires.ledger.query("SELECT deleted_at FROM cf_file_location")
    assert row["deleted_at"] is not None


def test_a_chunk_is_recorded_whole_or_not_at_all(
    wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    wires.deploy('pattern="*.csv"')
    from casparian_flow.db import chunks

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(chunks, "enqueue", fail)
    begun = begin_scan(wires.ledger, wires.root, now_us=T0)
    found = FileFinding("a.csv", (1, 1, 1, 1, 1), "a" * 64, T0)
    with pytest.raises(OSError, match="disk"):
        record_chunk(wires.ledger, wires.root, begun["scan_id"], [found], now_us=T0)
    monkeypatch.undo()
    for table in ("cf_file_location", "cf_file_version", "cf_file_hash_registry"):
        assert wires.ledger.query(f"SELECT * FROM {table}") == []
    record_chunk(wires.ledger, wires.root, begun["scan_id"], [found], now_us=T0)
    assert wires.ledger.query("SELECT id, seq FROM cf_file_version") == [{"id": 1, "seq": 1}]


def test_publishing_takes_name_version_and_lock_from_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my_plugin.py"
    file.write_bytes(source('pattern="*.csv", topic="t", version="1.2"').encode() + b"# \r\n")
    (tmp_path / "uv.lock").write_text(LOCK)

    def publish(control: ControlApi, **given: str) -> Row:
        draft = read_plugin(file, **given)
        unsigned = bundled(draft, locked(draft).text)
        bundle = signed_by(unsigned, KEY, publisher="ann", now_us=T0)
        return control.deploy(pack(bundle))

    with connect(tmp_path / "ledger.duckdb", trust=rules) as control:
        row = publish(control)
        assert (row["plugin"], row["version"]) == ("my_plugin", "1.2")
        assert publish(control)["unchanged"]
        assert publish(control, version="1.3", name="other")["plugin"] == "other"
        versions = {(r["plugin_name"], r["version"]) for r in control.list_plugins()}
    assert versions == {("my_plugin", "1.2"), ("other", "1.3")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "no Python file"),
        ("p.py", b"\xff\xfe", "p.py:1: is not UTF-8"),
        ("p.py", b"#" * (1 << 21), "larger than 1024 KiB"),
        ("p.py", b"", "must be named Handler"),
        ("a b.py", source('pattern="*"').encode(), "plugin name 'a b'"),
    ],
)
def test_publishing_refuses_what_cannot_be_deployed(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_plugin(tmp_path / name)
    with pytest.raises(UsageError, match="no file"):
        read_plugin(tmp_path / "missing.py")
