"""Every command as a user types it: without a Sentinel, and while `casparian start` runs."""

import csv
import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from acceptance_kit import SALES, Flow, make_flow, wait_for

CSV_MONDAY = 'item,price\nbread,3.20\n"milk, fresh",1.10\n'


@pytest.fixture(scope="module", params=["alone", "with a Sentinel"])
def flow(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Flow]:
    """A folder in which two files have been processed."""
    flow = make_flow(tmp_path_factory.mktemp("session"))
    flow.run("source", "add", "inbox")
    flow.publish("sales", SALES)
    flow.write("inbox/monday.csv", CSV_MONDAY)
    flow.write("inbox/tuesday.csv", "item,price\nbread,3.30\n")
    flow.write("inbox/readme.txt", "no plugin takes this")
    flow.work_off()
    if request.param == "alone":
        yield flow
    else:
        with flow.start():
            yield flow


def test_the_rows_are_in_the_sink_with_their_lineage(flow: Flow) -> None:
    rows = flow.table("sales_data").to_pylist()
    assert sorted(row["price"] for row in rows) == [1.1, 3.2, 3.3]
    versions = flow.json("versions", "inbox/monday.csv")
    monday = [row for row in rows if row["item"] == "milk, fresh"]
    assert monday[0]["_cf_source_hash"] == versions[0]["content_hash"]
    assert monday[0]["_cf_parser_version"] == "1.0.0"
    assert monday[0]["_cf_job_id"].count("-") == 1


def test_jobs_are_listed_filtered_and_shown(flow: Flow) -> None:
    jobs = flow.json("jobs")
    assert [job["status"] for job in jobs] == ["COMPLETED"] * 2
    assert {job["rel_path"] for job in jobs} == {"monday.csv", "tuesday.csv"}
    assert flow.json("jobs", "--status", "FAILED") == []
    assert len(flow.json("jobs", "--plugin", "sales", "--path", "mon*")) == 1
    shown = flow.json("job", "show", str(jobs[0]["id"]))
    assert [entry["kind"] for entry in shown["history"]][-2:] == ["GRANTED", "COMPLETED"]
    assert shown["outputs"][0]["state"] == "PUBLISHED"
    assert "parquet://sales_data" in flow.run("job", "show", str(jobs[0]["id"])).stdout


def test_what_the_plugin_printed_can_be_read(flow: Flow) -> None:
    job = flow.json("jobs")[0]["id"]
    assert "reading" in flow.run("job", "logs", str(job)).stdout


@pytest.mark.parametrize(
    "words", ["job show 999", "job logs 999", "job cancel 999", "job retry 999", "versions no.csv"]
)
def test_what_is_not_there_is_exit_code_4(flow: Flow, words: str) -> None:
    done = flow.run(*words.split(), code=4)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_files_and_versions_are_listed(flow: Flow) -> None:
    names = {row["rel_path"] for row in flow.json("files")}
    assert names == {"monday.csv", "tuesday.csv", "readme.txt"}
    assert [row["rel_path"] for row in flow.json("files", "*.txt")] == ["readme.txt"]
    assert "monday.csv" in flow.run("files", "--source", "inbox").stdout
    for path in ("inbox/monday.csv", "monday.csv", str(flow.inbox / "monday.csv")):
        assert [row["seq"] for row in flow.json("versions", path)] == [1]


def test_wiring_is_listed(flow: Flow) -> None:
    assert flow.json("plugins")[0]["plugin_name"] == "sales"
    assert flow.json("topics")[0]["uri"] == "parquet://sales_data"
    rules = flow.json("rules")
    assert (rules[0]["pattern"], rules[0]["tag"]) == ("*.csv", "auto_sales")
    assert flow.json("plugin", "show", "sales")["versions"][0]["version"] == "1.0.0"
    assert flow.json("source", "list")[0]["path"] == str(flow.inbox)
    for words in ("plugins", "topics", "rules", "plugin show sales", "source list"):
        assert "sales" in flow.run(*words.split()).stdout or words == "source list"


def test_status_in_both_forms(flow: Flow) -> None:
    status = flow.json("status")
    assert status["jobs"]["COMPLETED"] == 2
    assert "2 completed" in flow.run("status").stdout


def test_sql_reads_and_only_reads(flow: Flow) -> None:
    query = "SELECT status, count(*) AS n FROM cf_processing_queue GROUP BY status"
    assert json.loads(flow.run("sql", query, "-o", "json").stdout) == [
        {"status": "COMPLETED", "n": 2}
    ]
    assert list(csv.reader(io.StringIO(flow.run("sql", query, "-o", "csv").stdout))) == [
        ["status", "n"],
        ["COMPLETED", "2"],
    ]
    refused = flow.run("sql", "DELETE FROM cf_processing_queue", code=2)
    assert "one SELECT is wanted" in refused.stderr
    assert flow.json("status")["jobs"]["COMPLETED"] == 2
    cut = flow.run("sql", "SELECT * FROM cf_journal", "--limit", "1")
    assert "--limit 0" in cut.stderr
    assert list((flow.folder).rglob("snapshots/*")) == []


def test_the_ledger_is_sound_and_travels(flow: Flow, tmp_path: Path) -> None:
    assert "sound" in flow.run("ledger", "check").stdout
    exported = flow.json("ledger", "export", str(tmp_path / "dump"))
    assert exported["tables"]["cf_processing_queue"] == 2
    other = make_flow(tmp_path / "other")
    other.run("ledger", "import", str(tmp_path / "dump"))
    assert [job["rel_path"] for job in other.json("jobs")] == [
        job["rel_path"] for job in flow.json("jobs")
    ]
    assert "exists already" in other.run("ledger", "import", str(tmp_path / "dump"), code=5).stderr


def test_a_finished_job_cannot_be_cancelled(flow: Flow) -> None:
    job = flow.json("jobs")[0]["id"]
    assert "ended already (COMPLETED)" in flow.run("job", "cancel", str(job)).stdout


def test_a_scan_without_news_makes_nothing(flow: Flow) -> None:
    (flow.inbox / "monday.csv").touch()
    report = flow.json("scan")[0]
    assert (report["files"], report["versions"], report["jobs"]) == (3, 0, 0)
    assert flow.run("scan", "inbox", "--rehash").stdout.splitlines()[0].startswith("SOURCE")
    assert "casparian source add" in flow.run("scan", "elsewhere", code=4).stderr


def test_wiring_can_be_changed(flow: Flow) -> None:
    rule = flow.json("rules", "add", "*.txt", "text")["id"]
    assert "text" in {row["tag"] for row in flow.json("rules")}
    flow.run("rules", "remove", str(rule))
    assert "text" not in {row["tag"] for row in flow.json("rules")}
    assert flow.run("topics", "set", "sales", "sales_data", "ftp://x", code=2).stderr.count("ftp")
    flow.run("plugin", "pause", "sales", "--reason", "holiday")
    assert flow.json("plugins")[0]["paused"]
    flow.run("plugin", "resume", "sales")
    assert not flow.json("plugins")[0]["paused"]
    assert flow.json("backfill", "sales")["jobs"] == 0


def test_publishing_the_same_again_changes_nothing_and_other_bytes_need_a_new_version(
    flow: Flow,
) -> None:
    again = flow.json("publish", "plugins/sales.py", "--version", "1.0.0")
    assert again["unchanged"]
    changed = flow.write("plugins/changed/sales.py", SALES.replace("reading", "seeing"))
    refused = flow.run("publish", str(changed), "--version", "1.0.0", code=5)
    assert "1.0.0" in refused.stderr
    assert flow.run("publish", "nowhere.py", "--version", "1.0.0", code=2).stderr


def test_small_commands(flow: Flow) -> None:
    assert flow.run("version").stdout.startswith("casparian 0.")
    assert flow.json("config", "show")["settings"]["scout"]["settle_seconds"] == 0.2
    assert flow.json("dead-letters") == []
    assert flow.json("replay", "--all") == {"jobs": []}
    assert isinstance(flow.json("workers"), list)


def test_a_topic_can_go_to_sqlite_and_replace_its_rows(tmp_path: Path) -> None:
    flow = make_flow(tmp_path)
    flow.run("source", "add", "inbox")
    flow.publish("sales", SALES)
    target = tmp_path / "sales.sqlite3"
    flow.run("topics", "set", "sales", "sales_data", f"sqlite://{target}", "--mode", "replace")
    flow.write("inbox/monday.csv", "item,price\nbread,1\nmilk,2\n")
    flow.work_off()
    flow.write("inbox/monday.csv", "item,price\nbread,9\n")
    flow.work_off()
    assert [row["seq"] for row in flow.json("versions", "monday.csv")] == [1, 2]
    with sqlite3.connect(target) as database:
        found: list[Any] = database.execute("SELECT item, price FROM sales_data").fetchall()
    assert found == [("bread", 9)]


def test_dead_letters_are_replayed_after_the_cause_is_mended(tmp_path: Path) -> None:
    flow = make_flow(tmp_path)
    flow.run("source", "add", "inbox")
    flow.publish("sales", SALES)
    flow.write("inbox/bad.csv", "")
    said = flow.work_off(code=1)
    assert "1 job failed" in said
    assert "sales on bad.csv" in said
    dead = flow.json("dead-letters")
    assert dead[0]["rel_path"] == "bad.csv"
    flow.publish("sales", SALES.replace("self.publish", "if 0: self.publish"), "1.0.1")
    (new,) = flow.json("replay", str(dead[0]["job_id"]))["jobs"]
    flow.work_off()
    assert flow.json("job", "show", str(new))["status"] == "COMPLETED"
    assert flow.json("dead-letters") == []


def test_files_seen_before_a_plugin_are_backfilled(tmp_path: Path) -> None:
    flow = make_flow(tmp_path)
    flow.run("source", "add", "inbox")
    flow.write("inbox/old.csv", "a\n1\n")
    flow.run("scan")
    flow.publish("sales", SALES)
    assert flow.json("backfill", "sales")["jobs"] == 1
    assert flow.json("jobs") == []
    assert flow.json("backfill", "sales", "--execute")["jobs"] == 1
    flow.work_off()
    assert flow.json("backfill", "sales", "--execute")["jobs"] == 0
    assert flow.counts() == {"COMPLETED": 1}


def test_a_running_job_is_cancelled_and_nothing_of_it_appears(tmp_path: Path) -> None:
    flow = make_flow(tmp_path)
    flow.run("source", "add", "inbox")
    slow = SALES.replace('print("reading", file_path)', "import time; time.sleep(60)")
    flow.publish("sales", slow)
    flow.write("inbox/a.csv", "a\n1\n")
    with flow.start():
        (job,) = wait_for("the job to run", lambda: flow.json("jobs", "--status", "RUNNING"))
        assert "cancelled" in flow.run("job", "cancel", str(job["id"])).stdout
        wait_for("the slot to be free", lambda: not flow.json("workers")[0]["held"])
    assert flow.counts() == {"ABORTED": 1}
    assert list((flow.folder / "output").rglob("*.parquet")) == []
