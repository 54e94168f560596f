"""The life of a plugin version: staged, tried by a worker, active, superseded, rolled back."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from signing_kit import lax_rules, policy, signed
from worker_process import wait_until, worker_process

from casparian_flow.db import releases, wiring
from casparian_flow.db.fanout import load_rule_set
from casparian_flow.db.ledger import Ledger
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import ConflictError, NotFoundError
from casparian_flow.domain.ids import ManifestId
from casparian_flow.domain.records import Sample
from casparian_flow.sentinel.api import Row
from casparian_flow.sentinel.control import connect
from casparian_flow.sentinel.local import LocalControl
from casparian_flow.sentinel.server import Sentinel, SentinelConfig
from casparian_flow.services import architect
from casparian_flow.services.scout import scan
from casparian_flow.trust.bundle import pack

T0 = 1_800_000_000_000_000
PLUGIN = """\
from casparian_flow.sdk import BasePlugin, PluginMetadata
MANIFEST = PluginMetadata({arguments})
class Handler(BasePlugin):
    def execute(self, file_path):
        {body}
"""
ROWS = 'self.publish("sales", [{"version": "VERSION", "text": open(file_path).read()}])'


def source(arguments: str = 'pattern="*.csv", topic="sales"', body: str = "pass") -> str:
    return PLUGIN.replace("{arguments}", arguments).replace("{body}", body)


class Life:
    """A ledger in memory, with deploys and trials by hand."""

    def __init__(self) -> None:
        self.ledger = Ledger.in_memory(clock=SystemClock())

    def deploy(self, arguments: str, version: str, **more: Any) -> Row:
        bundle = signed(source(arguments), "p", version, **more)
        verdict = policy().check(bundle, deployed_at_us=T0)
        return architect.deploy(self.ledger, bundle, verdict, now_us=T0, trial=True)

    def conclude(self, number: int, *, passed: bool = True, message: str = "") -> str:
        return releases.conclude_trial(
            self.ledger, ManifestId(number), passed=passed, message=message, now_us=T0
        )

    def rollback(self, version: str) -> Row:
        return releases.rollback(self.ledger, "p", version, now_us=T0)

    @property
    def statuses(self) -> list[str]:
        rows = self.ledger.query("SELECT status FROM cf_plugin_manifest ORDER BY id")
        return [row["status"] for row in rows]

    @property
    def patterns(self) -> list[str]:
        rows = self.ledger.query("SELECT pattern FROM cf_routing_rule ORDER BY id")
        return [row["pattern"] for row in rows]

    def takers(self, path: str) -> list[tuple[str, int]]:
        rules = load_rule_set(self.ledger.reader(), "")
        return [(m.plugin, m.manifest_id) for m in rules.takers(rules.tags(path))]


@pytest.fixture
def life() -> Iterator[Life]:
    made = Life()
    yield made
    assert made.ledger.check() == []
    made.ledger.close()


def test_a_first_version_gets_jobs_while_it_is_staged_but_is_not_run(life: Life) -> None:
    row = life.deploy('pattern="*.csv"', "1.0")
    assert row["status"] == "STAGING"
    assert "a worker tries it first" in row["message"]
    assert life.takers("a.csv") == [("p", 1)]
    assert life.ledger.plugin_specs() == []
    (staged,) = releases.staged_versions(life.ledger)
    assert [sink.uri for sink in staged.spec.sinks] == []
    assert life.conclude(1) == "p 1.0 is active"
    assert [spec.plugin_version for spec in life.ledger.plugin_specs()] == ["1.0"]
    assert life.patterns == ["*.csv"]


def test_a_new_version_changes_the_wiring_only_once_it_has_passed(life: Life) -> None:
    life.deploy('pattern="*.csv", topic="a", parameters={"k": 1}', "1.0")
    life.conclude(1)
    row = life.deploy('pattern="*.tsv", topic="b", parameters={"k": 2}', "2.0")
    assert "then it supersedes 1.0" in row["message"]
    assert (life.statuses, life.patterns) == (["ACTIVE", "STAGING"], ["*.csv"])
    (staged,) = releases.staged_versions(life.ledger)
    assert [sink.topic for sink in staged.spec.sinks] == ["b"]
    assert staged.spec.parameters_json == '{"k":2}'

    life.conclude(2)

    assert (life.statuses, life.patterns) == (["SUPERSEDED", "ACTIVE"], ["*.tsv"])
    (spec,) = life.ledger.plugin_specs()
    assert ([sink.topic for sink in spec.sinks], spec.parameters_json) == (["b"], '{"k":2}')
    assert life.conclude(2) == "plugin version 2 is not staged any more"


def test_a_rejected_version_leaves_no_wiring_and_may_be_published_again(life: Life) -> None:
    life.deploy('pattern="*.csv", topic="a", subscriptions=["x"]', "1.0")
    life.conclude(1, passed=False, message="no module named foo")
    assert (life.statuses, life.patterns, life.takers("a.csv")) == (["REJECTED"], [], [])
    assert wiring.list_topics(life.ledger.reader()) == []
    (row,) = wiring.list_plugins(life.ledger.reader())
    assert row["validation_error"] == "no module named foo"

    assert not life.deploy('pattern="*.csv", topic="a", subscriptions=["x"]', "1.0")["unchanged"]
    assert life.statuses == ["REJECTED", "STAGING"]


def test_after_a_rejected_first_version_the_next_staged_one_is_wired(life: Life) -> None:
    life.deploy('pattern="*.csv"', "1.0")
    life.deploy('pattern="*.tsv"', "1.1")
    assert life.patterns == ["*.csv"]
    life.conclude(1, passed=False)
    assert (life.patterns, life.takers("a.tsv")) == (["*.tsv"], [("p", 2)])


def test_a_rejected_update_leaves_the_active_version_as_it_was(life: Life) -> None:
    life.deploy('pattern="*.csv"', "1.0")
    life.conclude(1)
    life.deploy('pattern="*.tsv"', "2.0")
    life.conclude(2, passed=False)
    assert (life.statuses, life.patterns) == (["ACTIVE", "REJECTED"], ["*.csv"])


def test_the_same_bytes_change_nothing_and_other_bytes_are_refused(life: Life) -> None:
    life.deploy('pattern="*"', "1.0")
    assert "already deployed (staging)" in life.deploy('pattern="*"', "1.0")["message"]
    with pytest.raises(ConflictError, match="versions are immutable") as refused:
        life.deploy('pattern="*.x"', "1.0")
    assert "1.0.1" in refused.value.hint
    assert life.statuses == ["STAGING"]


def test_a_rollback_brings_back_version_and_wiring_and_withdraws_what_is_staged(life: Life) -> None:
    for number, pattern in enumerate(("*.csv", "*.tsv", "*.txt"), start=1):
        life.deploy(f'pattern="{pattern}"', f"{number}.0")
        if number < 3:
            life.conclude(number)
    row = life.rollback("1.0")
    assert (row["superseded"], row["withdrawn"]) == ("2.0", ["3.0"])
    assert life.statuses == ["ACTIVE", "SUPERSEDED", "REJECTED"]
    assert life.patterns == ["*.csv"]
    assert "already" in life.rollback("1.0")["message"]
    told = life.deploy('pattern="*.tsv"', "2.0")["message"]
    assert "casparian plugin rollback p --to 2.0" in told
    with pytest.raises(NotFoundError, match="has no version 9") as missing:
        life.rollback("9")
    assert "2.0, 1.0" in missing.value.hint


def test_a_staged_version_cannot_be_rolled_back_to(life: Life) -> None:
    life.deploy('pattern="*"', "1.0")
    with pytest.raises(ConflictError, match="has not passed its trial"):
        life.rollback("1.0")


def test_an_edit_by_hand_while_a_version_is_staged_survives_its_activation(life: Life) -> None:
    life.deploy('pattern="*.csv", topic="a"', "1.0")
    wiring.set_topic(life.ledger, "p", "a", uri="csv://mine")
    (rule,) = wiring.list_rules(life.ledger.reader())
    wiring.remove_rule(life.ledger, rule["id"])
    life.conclude(1)
    (topic,) = wiring.list_topics(life.ledger.reader())
    assert (topic["uri"], life.patterns) == ("csv://mine", [])


def test_samples_reach_the_trial_as_they_were_deployed(life: Life) -> None:
    samples = (Sample("a.csv", b"\x00\xff"),)
    life.deploy('pattern="*"', "1.0", samples=samples)
    (staged,) = releases.staged_versions(life.ledger)
    assert staged.samples == samples


# -- with a Sentinel and a worker -------------------------------------------------------------


class Site:
    """A Sentinel with a real worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "ledger.duckdb"
        self.inbox = folder / "inbox"
        self.inbox.mkdir()
        with LocalControl.open(self.database, trust=lax_rules) as control:
            self.root = int(control.add_source(str(self.inbox), settle_seconds=0.0)["id"])
        self.sentinel = Sentinel(
            SentinelConfig(
                bind_address="tcp://127.0.0.1:*",
                database=self.database,
                drain_s=0.0,
                heartbeat_s=0.5,
                trust=lax_rules,
            )
        )
        self.thread = threading.Thread(target=self.sentinel.run)

    def __enter__(self) -> Self:
        self.thread.start()
        assert self.sentinel.wait_started(20)
        self.control = connect(self.database)
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()
        self.sentinel.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def publish(self, version: str, body: str = ROWS, samples: tuple[Sample, ...] = ()) -> Row:
        text = source(body=body.replace("VERSION", version))
        return self.control.deploy(pack(signed(text, "sales", version, samples=samples)))

    def drop(self, name: str) -> None:
        (self.inbox / name).write_text(name)
        scan(self.root, self.control)

    def statuses(self) -> dict[str, str]:
        return {row["version"]: row["status"] for row in self.control.list_plugins()}

    def wait(self, **expected: str) -> None:
        wanted = {version.strip("v").replace("_", "."): s for version, s in expected.items()}
        wait_until(lambda: wanted.items() <= self.statuses().items(), 60.0)

    def wait_for_jobs(self, count: int) -> None:
        wait_until(lambda: len(self.control.list_jobs(status="COMPLETED")) == count, 60.0)


def test_a_worker_tries_each_version_before_it_gets_its_jobs(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        assert site.publish("1.0")["status"] == "STAGING"
        site.drop("a.csv")
        causes = [row["cause"] for row in site.control.status()["causes"]]
        assert any("waits for a worker that tries it" in cause for cause in causes)
        with worker_process(site.sentinel.bind_address, tmp_path) as worker:
            site.wait(v1_0="ACTIVE")
            site.wait_for_jobs(1)

            site.publish("2.0", "pass\nimport nowhere")
            site.publish("2.1", "raise ValueError(open(file_path).read())", (sample("boom"),))
            site.publish("2.2", ROWS, (sample("fine"),))
            site.wait(v2_0="REJECTED", v2_1="REJECTED", v2_2="ACTIVE")
            site.drop("b.csv")
            site.wait_for_jobs(2)
            refused = {r["version"]: r["validation_error"] for r in site.control.list_plugins()}
            assert "No module named 'nowhere'" in refused["2.0"]
            assert "sample a.csv: ValueError: boom" in refused["2.1"]
            # What a trial published went nowhere.
            assert len(worker.files("**/*.parquet")) == 2
            assert worker.stages() == []

            site.control.rollback_plugin("sales", "1.0")
            site.drop("c.csv")
            site.wait_for_jobs(3)
            versions = [
                site.control.show_job(job["id"])["plugin_manifest_id"]
                for job in sorted(site.control.list_jobs(), key=lambda job: job["id"])
            ]
            assert versions == [1, 4, 1]


def test_queued_jobs_move_to_a_new_version_and_running_ones_finish_on_theirs(
    tmp_path: Path,
) -> None:
    with Site(tmp_path) as site, worker_process(site.sentinel.bind_address, tmp_path):
        site.publish("1.0", "import time; time.sleep(2)")
        site.wait(v1_0="ACTIVE")
        for number in range(5):
            (site.inbox / f"{number}.csv").write_text(str(number))
        scan(site.root, site.control)
        wait_until(lambda: site.control.list_jobs(status="RUNNING"), 30.0)
        site.publish("2.0", "pass")
        site.wait(v1_0="SUPERSEDED", v2_0="ACTIVE")
        site.wait_for_jobs(5)
        ran_with = [
            site.control.show_job(job["id"])["plugin_manifest_id"]
            for job in sorted(site.control.list_jobs(), key=lambda job: job["id"])
        ]
        # How many were sent ahead to the worker is its speed's matter.
        assert ran_with[0] == 1
        assert ran_with[-1] == 2
        assert ran_with == sorted(ran_with)


def sample(text: str) -> Sample:
    return Sample("a.csv", text.encode())
