"""API jobs that a Sentinel carries out with a real worker: runs, backtests, previews, approvals."""

import json
import os
import pwd
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from signing_kit import lax_rules, signed
from worker_process import wait_until, worker_process

from casparian_flow.db import api_approvals, api_begin, api_runs
from casparian_flow.db.api_storage import ApiStorage
from casparian_flow.db.group_commit import transaction_of
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.retention import HistoryAges, clean_history
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.protocol.http_types import (
    Approval,
    ApprovalStatus,
    Event,
    HttpJob,
    HttpJobStatus,
    HttpJobType,
    JobSpec,
)
from casparian_flow.sentinel.control import connect
from casparian_flow.sentinel.server import Sentinel, SentinelConfig
from casparian_flow.services.scout import scan
from casparian_flow.trust.bundle import pack

ME = pwd.getpwuid(os.geteuid()).pw_name
PATIENCE_S = 90.0
PEOPLE = """
import csv
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(subscriptions=["by_hand"], outputs={
    "people": {
        "columns": [{"name": "name"}, {"name": "n", "type": "int64"}],
        "quarantine": {"allow": True, "max_pct": 60.0},
    },
})

class Handler(BasePlugin):
    def execute(self, file_path):
        with open(file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("an empty file")
        self.publish("people", rows)
"""
SLOW = """
import time
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(subscriptions=["by_hand"])

class Handler(BasePlugin):
    def execute(self, file_path):
        time.sleep(600)
"""
THREE = {"a.csv": "name,n\nann,1\nbob,2\n", "b.csv": "name,n\ncid,3\n", "c.csv": "name,n\ndan,4\n"}


class Site:
    """A Sentinel with two plugins that nothing is routed to; files are given by each test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "ledger.duckdb"
        self.inbox = folder / "inbox"
        self.inbox.mkdir()
        self._begin()
        self.root = int(self.control.add_source(str(self.inbox), settle_seconds=0.0)["id"])
        for name, text in (("people", PEOPLE), ("slow", SLOW)):
            self.control.deploy(pack(signed(text, name, "1.0.0")))

    def _begin(self) -> None:
        self.sentinel = Sentinel(
            SentinelConfig(
                bind_address="tcp://127.0.0.1:*",
                database=self.database,
                drain_s=0.0,
                heartbeat_s=0.5,
                trust=lax_rules,
                trials=False,
            )
        )
        self.thread = threading.Thread(target=self.sentinel.run, daemon=True)
        self.thread.start()
        assert self.sentinel.wait_started(PATIENCE_S)
        self.control = connect(self.database)
        self.api = self.control.api

    def stop(self) -> None:
        self.control.close()
        self.sentinel.stop()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()

    def fill(self, name: str, files: dict[str, str]) -> str:
        """A folder below the source root, with these files known to the ledger."""
        folder = self.inbox / name
        folder.mkdir(exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text)
        scan(self.root, self.control)
        return str(folder)

    def end_of(self, job_id: int) -> HttpJob:
        def over() -> bool:
            job = self.api.get_job(job_id)
            return job is not None and job.status.is_terminal

        wait_until(over, PATIENCE_S)
        job = self.api.get_job(job_id)
        assert job is not None
        return job

    def jobs(self, plugin: str = "people") -> list[dict[str, Any]]:
        return self.control.list_jobs(plugin=plugin, limit=1_000)

    def published(self, folder: str) -> list[dict[str, Any]]:
        paths = sorted((self.folder / "output" / folder).glob("*.parquet"))
        rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
        return sorted(({"name": r["name"], "n": r["n"]} for r in rows), key=lambda r: r["n"])

    def running(self, job_id: int) -> bool:
        job = self.api.get_job(job_id)
        return job is not None and job.status is HttpJobStatus.RUNNING


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"))
    try:
        with worker_process(made.sentinel.bind_address, made.folder, "--slots", "2"):
            yield made
    finally:
        made.stop()


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Site]:
    """Without a worker."""
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def kinds(events: list[Event]) -> list[str]:
    return [event.event_type for event in events]


def test_a_run_publishes_every_file_once_and_tells_what_happens(site: Site) -> None:
    folder = site.fill("run", THREE)
    job_id = site.api.start_job(HttpJobType.RUN, "people", None, folder, "parquet://ran")
    job = site.end_of(job_id)
    assert (job.status, job.plugin_version) == (HttpJobStatus.COMPLETED, "1.0.0")
    assert [row["name"] for row in site.published("ran")] == ["ann", "bob", "cid", "dan"]
    assert job.result is not None
    (output,) = job.result.outputs
    assert (output.name, output.sink_uri, output.rows) == ("people", "parquet://ran", 4)
    assert job.result.rows_processed == 4
    assert job.result.bytes_written == output.bytes
    assert job.result.metrics["files_completed"] == 3
    events = site.api.list_events(job_id)
    assert [e.event_id for e in events] == list(range(1, len(events) + 1))
    told = kinds(events)
    assert told[:3] == ["job_started", "phase", "progress"]
    assert told[3:-1] == ["output", "progress"] * 3
    assert told[-1] == "job_finished"
    assert job.progress is not None
    assert (job.progress.items_done, job.progress.items_total) == (3, 3)

    # Again: nothing is left to do, and nothing is published twice.
    again = site.end_of(
        site.api.start_job(HttpJobType.RUN, "people", None, folder, "parquet://ran")
    )
    assert again.status is HttpJobStatus.COMPLETED
    assert again.result is not None
    assert again.result.metrics["files_done_before"] == 3
    assert len(site.published("ran")) == 4

    # Unless that is asked for.
    forced = site.api.start_job(
        HttpJobType.RUN, "people", None, folder, "parquet://ran", spec=JobSpec(force=True)
    )
    assert site.end_of(forced).status is HttpJobStatus.COMPLETED
    assert len(site.published("ran")) == 8


def test_a_backtest_with_a_bad_file_fails_and_names_it(site: Site) -> None:
    folder = site.fill("bad", {"a.csv": "name,n\nann,1\n", "empty.csv": "name,n\n"})
    job = site.end_of(site.api.start_job(HttpJobType.BACKTEST, "people", None, folder))
    assert job.status is HttpJobStatus.FAILED
    assert job.error_message is not None
    assert "1 of 2 files" in job.error_message
    assert "an empty file" in job.error_message


def test_a_backtest_reports_violations_and_publishes_nothing(site: Site) -> None:
    folder = site.fill(
        "backtest", {"a.csv": "name,n\nann,1\nbob,x\ncid,3\n", "b.csv": "name,n\ndan,y\neve,5\n"}
    )
    before = sorted(site.folder.glob("output/**/*.parquet"))
    job_id = site.api.start_job(HttpJobType.BACKTEST, "people", None, folder)
    job = site.end_of(job_id)
    assert (job.status, job.error_message) == (HttpJobStatus.COMPLETED, None)
    assert job.result is not None
    assert (job.result.rows_processed, job.result.bytes_written) == (3, 0)
    assert job.result.outputs == []
    assert job.result.metrics["quarantine_rows"] == 2
    assert job.result.metrics["violations/n/type_mismatch"] == 2
    violations = [e.payload for e in site.api.list_events(job_id) if e.event_type == "violation"]
    found = {v.column_name: v.samples for p in violations for v in p.violations}  # type: ignore[attr-defined]
    assert set(found) == {"n"}
    assert found["n"] in (["x"], ["y"])
    assert sorted(site.folder.glob("output/**/*.parquet")) == before
    assert not list((site.folder / "output" / ".stage").glob("[0-9a-f]*-*"))

    # It does not stand in the way of the real run.
    run = site.api.start_job(HttpJobType.RUN, "people", None, folder, "parquet://after")
    assert site.end_of(run).status is HttpJobStatus.COMPLETED
    assert len(site.published("after")) == 3


def test_a_backtest_may_end_at_the_first_failure(site: Site) -> None:
    files = {f"{n:02}.csv": "name,n\n" for n in range(12)}
    folder = site.fill("fast", files)
    job_id = site.api.start_job(
        HttpJobType.BACKTEST, "people", None, folder, spec=JobSpec(fail_fast=True)
    )
    job = site.end_of(job_id)
    assert job.status is HttpJobStatus.FAILED
    assert job.result is not None
    assert job.result.metrics["files_failed"] >= 1
    wait_until(
        lambda: (
            not any(row["status"] in {"QUEUED", "DISPATCHING", "RUNNING"} for row in site.jobs())
        ),
        PATIENCE_S,
    )
    # Neither the breaker nor the dead letters take a rehearsal for the real thing.
    assert site.control.list_dead_letters(plugin="people") == []
    assert not any(row["paused"] for row in site.control.list_plugins())


def test_a_preview_shows_rows_and_publishes_nothing(site: Site) -> None:
    folder = site.fill("preview", THREE)
    before = sorted(site.folder.glob("output/**/*.parquet"))
    job_id = site.api.start_job(
        HttpJobType.PREVIEW, "people", None, folder, spec=JobSpec(rows_max=3)
    )
    job = site.end_of(job_id)
    assert job.status is HttpJobStatus.COMPLETED
    shown = api_runs.decode_preview(job.preview_json)
    assert [topic.topic for topic in shown] == ["people"]
    assert shown[0].rows == 4
    assert shown[0].sample == [
        {"name": "ann", "n": 1},
        {"name": "bob", "n": 2},
        {"name": "cid", "n": 3},
    ]
    assert sorted(site.folder.glob("output/**/*.parquet")) == before

    one = site.api.start_job(
        HttpJobType.PREVIEW, "people", None, folder, spec=JobSpec(files=["b.csv"])
    )
    shown = api_runs.decode_preview(site.end_of(one).preview_json)
    assert shown[0].sample == [{"name": "cid", "n": 3}]


def test_cancelling_stops_the_plugins_and_what_waits(site: Site) -> None:
    folder = site.fill("slow", {f"{n}.txt": str(n) for n in range(6)})
    job_id = site.api.start_job(HttpJobType.RUN, "slow", None, folder)
    wait_until(lambda: any(row["status"] == "RUNNING" for row in site.jobs("slow")), PATIENCE_S)
    assert site.api.cancel_job(job_id)
    wait_until(lambda: {row["status"] for row in site.jobs("slow")} == {"ABORTED"}, PATIENCE_S)
    assert kinds(site.api.list_events(job_id))[-1] == "job_finished"
    job = site.api.get_job(job_id)
    assert job is not None
    assert job.status is HttpJobStatus.CANCELLED


def test_following_tells_of_an_event_at_once(site: Site) -> None:
    folder = site.fill("follow", THREE)
    job_id = site.api.start_job(HttpJobType.RUN, "people", None, folder, "parquet://followed")
    after, lags = 0, []
    while True:
        page = site.api.wait_events(job_id, after, 20.0)
        lags += [time.time() - event.timestamp.timestamp() for event in page]
        after = page[-1].event_id if page else after
        if page and page[-1].event_type == "job_finished":
            break
    assert sorted(lags)[len(lags) // 2] < 0.5


def test_an_approved_run_runs_once_and_carries_its_approval(site: Site) -> None:
    folder = site.fill("approved", THREE)
    asked = site.api.request_run("people", None, folder, "parquet://approved")
    assert (asked.status, asked.requester) == (ApprovalStatus.PENDING, ME)
    assert asked.summary.startswith("Run people 1.0.0 on 3 files below")
    assert site.published("approved") == []
    assert site.api.approve(asked.approval_id, "somebody else")
    assert not site.api.approve(asked.approval_id)
    after = the(site, asked)
    assert (after.decided_by, after.status) == (ME, ApprovalStatus.APPROVED)
    assert after.job_id is not None
    job = site.end_of(after.job_id)
    assert (job.status, job.approval_id) == (HttpJobStatus.COMPLETED, asked.approval_id)
    assert len(site.published("approved")) == 4


def the(site: Site, approval: Approval) -> Approval:
    found = site.api.get_approval(approval.approval_id)
    assert found is not None
    return found


ANY_N = '[{"name": "name"}, {"name": "n"}]'
"""A contract under which numbers are text."""


def test_a_backtest_tries_contracts_that_the_topics_do_not_have(site: Site) -> None:
    folder = site.fill("contracts", THREE)
    dates = '[{"name": "name"}, {"name": "n", "type": "date"}]'
    for contract, rows, bad in ((ANY_N, 4, 0), (dates, 0, 4)):
        spec = JobSpec(schemas={"people": contract})
        job = site.end_of(
            site.api.start_job(HttpJobType.BACKTEST, "people", None, folder, spec=spec)
        )
        assert job.result is not None
        found = sum(n for k, n in job.result.metrics.items() if k.startswith("violations/n/"))
        assert (job.result.rows_processed, found) == (rows, bad), job


def test_a_run_asked_for_with_contracts_says_so_and_publishes_by_them(site: Site) -> None:
    folder = site.fill("by_contract", THREE)
    asked = site.api.request_run(
        "people", None, folder, "parquet://by_contract", spec=JobSpec(schemas={"people": ANY_N})
    )
    assert asked.summary.endswith(", with contracts given for people")
    assert site.api.approve(asked.approval_id)
    job_id = the(site, asked).job_id
    assert job_id is not None
    assert site.end_of(job_id).status is HttpJobStatus.COMPLETED
    assert [type(row["n"]) for row in site.published("by_contract")] == [str] * 4


@pytest.mark.parametrize(
    "change", ["added", "changed", "removed", "plugin", "sink", "contract", "quarantine"]
)
def test_a_change_between_request_and_approval_voids_it(idle: Site, change: str) -> None:
    folder = idle.fill("in", THREE)
    asked = idle.api.request_run("people", None, folder)
    match change:
        case "added":
            idle.fill("in", {"late.csv": "name,n\nzed,9\n"})
        case "changed":
            idle.fill("in", {"a.csv": "name,n\nzed,9\n"})
        case "removed":
            (idle.inbox / "in" / "a.csv").unlink()
            idle.fill("in", {})
        case "plugin":
            idle.control.deploy(pack(signed(PEOPLE + "\n# more\n", "people", "1.0.1")))
        case "sink":
            idle.control.set_topic("people", "people", uri="parquet://elsewhere")
        case "contract":
            idle.control.set_topic("people", "people", uri="parquet://people", schema_json=ANY_N)
        case "quarantine":
            schema = {"columns": [{"name": "name"}], "quarantine": {"max_pct": 99.0}}
            idle.control.set_topic(
                "people", "people", uri="parquet://people", schema_json=json.dumps(schema)
            )
    assert not idle.api.approve(asked.approval_id)
    after = the(idle, asked)
    assert after.status is ApprovalStatus.STALE
    assert after.stale_reason
    assert after.job_id is None
    assert idle.api.list_jobs() == []
    assert idle.jobs() == []


def test_a_change_between_approval_and_beginning_voids_it(tmp_path: Path) -> None:
    site = Site(tmp_path)
    folder = site.fill("in", THREE)
    asked = site.api.request_run("people", None, folder)
    site.stop()
    clock = SystemClock()
    with Ledger.open(site.database, clock=clock) as ledger:
        ledger.screen = lambda _: ""
        assert api_runs.approve(ledger, clock, asked.approval_id, "ann", allow_self=True)
        (job_id,) = api_runs.waiting_jobs(ledger)
        ledger.query("SELECT 1")
        with ledger.transaction() as connection:
            connection.execute("UPDATE cf_file_version SET content_hash = 'other' WHERE id = 1")
        began, jobs = api_begin.begin(ledger, clock, job_id)
        assert (began, jobs) == (False, [])
        (row,) = ledger.query("SELECT status, stale_reason FROM cf_api_approvals")
        assert row["status"] == "stale"
        assert "the set of file versions changed" in row["stale_reason"]
        (job,) = ledger.query("SELECT status, error_message FROM cf_api_jobs")
        assert job["status"] == "failed"
        assert "is void" in job["error_message"]


def test_an_approval_without_its_job_gets_it_once_after_a_crash(tmp_path: Path) -> None:
    site = Site(tmp_path)
    folder = site.fill("in", THREE)
    asked = site.api.request_run("people", None, folder)
    site.stop()
    clock = SystemClock()
    with Ledger.open(site.database, clock=clock) as ledger:
        # As if the process had ended between the decision and the job.
        with transaction_of(ledger, clock) as unit:
            assert api_approvals.approve(
                unit, asked.approval_id, "ann", asked.binding, allow_self=True
            )
        assert api_runs.waiting_jobs(ledger) == []
    site._begin()
    wait_until(lambda: the(site, asked).job_id is not None, PATIENCE_S)
    job_id = the(site, asked).job_id
    assert job_id is not None
    wait_until(lambda: site.running(job_id), PATIENCE_S)
    site.stop()
    # And its tasks are made once, however often a Sentinel starts.
    site._begin()
    assert [job.job_id for job in site.api.list_jobs()] == [job_id]
    assert len(site.jobs()) == 3
    site.stop()


def test_a_pinned_job_is_not_run_by_another_version(tmp_path: Path) -> None:
    site = Site(tmp_path)
    folder = site.fill("in", THREE)
    job_id = site.api.start_job(HttpJobType.RUN, "people", None, folder)
    wait_until(lambda: site.running(job_id), PATIENCE_S)
    site.control.deploy(pack(signed(PEOPLE + "\n# more\n", "people", "2.0.0")))
    with worker_process(site.sentinel.bind_address, site.folder):
        job = site.end_of(job_id)
    assert job.status is HttpJobStatus.FAILED
    assert "version 2.0.0 of people is active now" in (job.error_message or "")
    assert list(site.folder.glob("output/**/*.parquet")) == []
    site.stop()


def test_a_large_run_begins_slice_by_slice_also_across_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_begin, "SLICE", 2)
    monkeypatch.setattr("casparian_flow.sentinel.api_runner.SLICES_MAX", 1)
    site = Site(tmp_path)
    folder = site.fill("in", {f"{n}.csv": f"name,n\nann,{n}\n" for n in range(7)})
    asked = site.api.request_run("people", None, folder, "parquet://large")
    site.stop()
    clock = SystemClock()
    for expected in (2, 4):
        # The ledger is closed in between, as after a kill.
        with Ledger.open(site.database, clock=clock) as ledger:
            ledger.screen = lambda _: ""
            if expected == 2:
                assert api_runs.approve(ledger, clock, asked.approval_id, "ann", allow_self=True)
                (job_id,) = api_runs.waiting_jobs(ledger)
                began, jobs = api_begin.begin(ledger, clock, job_id)
            else:
                began, jobs = api_begin.go_on(ledger, clock, job_id)
            assert (began, len(jobs)) == (True, 2)
            assert api_begin.unfinished(ledger) == [job_id]
            assert api_runs.ended_among(ledger, [int(job.job_id) for job in jobs]) == []
            # Nothing has ended, and if it had: the job goes on while tasks are still to be made.
            assert not api_runs.collect(ledger, clock, job_id, [])
            assert ledger.check() == []
    # What changes now comes too late for what was judged; the sinks are those of the approval.
    site._begin()
    site.control.set_topic("people", "people", uri="parquet://elsewhere")
    with worker_process(site.sentinel.bind_address, site.folder):
        job = site.end_of(job_id)
    assert job.status is HttpJobStatus.COMPLETED, job
    assert job.result is not None
    assert (job.result.metrics["files"], job.result.metrics["files_completed"]) == (7, 7)
    assert job.result.metrics["files_done_before"] == 0
    assert sorted(row["n"] for row in site.published("large")) == list(range(7))
    assert len(site.jobs()) == 7
    progress = [e.payload for e in site.api.list_events(job_id) if e.event_type == "progress"]
    assert [p.items_done for p in progress] == list(range(8))
    # All of it is done before now, slice by slice.
    again = site.api.start_job(HttpJobType.RUN, "people", None, folder, "parquet://large")
    job = site.end_of(again)
    assert job.result is not None
    assert job.result.metrics["files_done_before"] == 7
    assert kinds(site.api.list_events(again)) == [
        "job_started", "phase", *["progress"] * 4, "job_finished"
    ]  # fmt: skip
    site.stop()


def test_a_job_that_is_cancelled_while_it_begins_makes_no_more_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_begin, "SLICE", 2)
    site = Site(tmp_path)
    folder = site.fill("in", THREE)
    site.stop()
    clock = SystemClock()
    with Ledger.open(site.database, clock=clock) as ledger:
        ledger.screen = lambda _: ""
        storage = ApiStorage(ledger, clock=clock)
        job_id = storage.start_job(HttpJobType.BACKTEST, "people", None, folder)
        began, jobs = api_begin.begin(ledger, clock, job_id)
        assert (began, len(jobs)) == (True, 2)
        assert storage.cancel_job(job_id)
        assert api_begin.go_on(ledger, clock, job_id) == (False, [])
        assert api_begin.unfinished(ledger) == []
        assert len(ledger.query("SELECT * FROM cf_api_tasks")) == 2


def test_a_rejected_or_expired_request_runs_nothing(idle: Site) -> None:
    folder = idle.fill("in", THREE)
    rejected = idle.api.request_run("people", None, folder)
    assert idle.api.reject(rejected.approval_id, None, "not today")
    assert the(idle, rejected).rejection_reason == "not today"
    expired = idle.api.request_run("people", None, folder, expires_in=timedelta(0))
    for asked in (rejected, expired):
        assert not idle.api.approve(asked.approval_id)
    assert idle.api.list_jobs() == []


def refused(call: Callable[[], object], kind: type[Exception], word: str) -> None:
    with pytest.raises(kind, match=word):
        call()


def test_what_cannot_be_run_is_refused_with_a_hint(idle: Site, tmp_path: Path) -> None:
    folder = idle.fill("in", THREE)
    ask = idle.api.request_run
    refused(lambda: ask("nobody", None, folder), NotFoundError, "no active version")
    refused(lambda: ask("people", "9", folder), NotFoundError, "is not active")
    refused(lambda: ask("people", None, "in"), UsageError, "absolute")
    refused(lambda: ask("people", None, "/nowhere"), UsageError, "in no source root")
    refused(lambda: ask("people", None, folder + "/b"), UsageError, "no file below")
    refused(lambda: ask("people", None, folder, "null://x"), UsageError, "unknown scheme")
    for schemas, word in (({"people": "{}"}, "is missing"), ({"a b": ANY_N}, "is no topic")):
        spec = JobSpec(schemas=schemas)
        refused(lambda s=spec: ask("people", None, folder, spec=s), UsageError, word)  # type: ignore[misc]
    start = idle.api.start_job
    refused(
        lambda: start(HttpJobType.BACKTEST, "people", None, folder, "csv://x"),
        UsageError,
        "no sink",
    )
    refused(
        lambda: start(HttpJobType.PREVIEW, "people", None, folder, spec=JobSpec(files=["../x"])),
        NotFoundError,
        "no known file",
    )
    assert idle.api.list_approvals() == []
    assert idle.api.list_jobs() == []


def test_rehearsals_go_with_their_api_job_and_its_age(tmp_path: Path) -> None:
    site = Site(tmp_path)
    folder = site.fill("in", THREE)
    job_id = site.api.start_job(HttpJobType.BACKTEST, "people", None, folder)
    wait_until(lambda: site.running(job_id), PATIENCE_S)
    assert site.api.cancel_job(job_id)
    wait_until(lambda: {row["status"] for row in site.jobs()} == {"ABORTED"}, PATIENCE_S)
    site.stop()
    clock = SystemClock()
    with Ledger.open(site.database, clock=clock) as ledger:
        now_us = clock.now().wall_us
        assert clean_history(ledger, HistoryAges(jobs=0.0), now_us).jobs == 0
        ApiStorage(ledger).cleanup_old_data(0, 0)
        assert clean_history(ledger, HistoryAges(jobs=0.0), now_us).jobs == 3
        assert ledger.check() == []
