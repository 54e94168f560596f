"""The four troubles that users have first: `casparian status` names the cause and the cure."""

from acceptance_kit import SALES, Flow, wait_for


def causes(flow: Flow) -> str:
    """What `casparian status` says to people about why nothing happens."""
    said = flow.run("status").stdout
    assert all(
        row["cause"] in said and row["cure"] in said for row in flow.json("status")["causes"]
    )
    return said


# 1. "No jobs queued: Ensure source root is configured and routing rules match"


def test_no_job_because_there_is_no_source_root(flow: Flow) -> None:
    flow.publish("sales", SALES)
    said = causes(flow)
    assert "no source root is configured" in said
    assert "casparian source add" in said


def test_no_job_because_nothing_was_scanned_yet(flow: Flow) -> None:
    flow.run("source", "add", "inbox")
    assert "casparian scan" in causes(flow)


def test_no_job_because_no_rule_matches(flow: Flow) -> None:
    flow.run("source", "add", "inbox")
    flow.publish("sales", SALES)
    flow.write("inbox/data.tsv", "a\tb\n")
    flow.run("scan")
    said = causes(flow)
    assert "plugin sales has no job: no file seen since its deploy matches its rules" in said
    assert "casparian rules" in said


def test_no_job_because_no_plugin_is_deployed(flow: Flow) -> None:
    flow.run("source", "add", "inbox")
    flow.write("inbox/a.csv", "a\n")
    flow.run("scan")
    said = causes(flow)
    assert "no plugin is deployed" in said
    assert "casparian publish" in said


# 2. "Plugin not found: Verify plugin class is named `Handler`"


def test_a_plugin_whose_class_has_another_name_is_refused_with_the_classes_it_has(
    flow: Flow,
) -> None:
    file = flow.write("plugins/sales.py", SALES.replace("class Handler", "class SalesPlugin"))
    done = flow.run("publish", str(file), "--version", "1.0.0", code=2)
    assert "plugin class must be named Handler" in done.stderr
    assert "SalesPlugin" in done.stderr
    assert "no plugin is deployed" in causes(flow)


# 3. "No output files: Check `TopicConfig` for correct sink URI"


def test_no_output_because_the_plugin_published_nothing(flow: Flow) -> None:
    flow.run("source", "add", "inbox")
    flow.publish("sales", SALES.replace("self.publish", "if 0: self.publish"))
    flow.write("inbox/a.csv", "a\n1\n")
    flow.work_off()
    said = causes(flow)
    assert "completed 1 job and wrote nothing" in said
    assert "casparian topics" in said


def test_a_wrong_sink_is_refused_when_it_is_set_not_when_it_is_used(flow: Flow) -> None:
    flow.publish("sales", SALES)
    for uri in ("s3://bucket", "parquet://../outside", "sqlite://user:secret@host/x"):
        done = flow.run("topics", "set", "sales", "sales_data", uri, code=2)
        assert "error: " in done.stderr
    file = flow.write(
        "plugins/wrong.py", SALES.replace("subscriptions=", 'sinks={"sales_data": "s3://x"}, tags=')
    )
    done = flow.run("publish", str(file), "--version", "1.0.0", code=2)
    assert "error: " in done.stderr


def test_a_sink_that_cannot_be_written_is_named_with_the_job(flow: Flow) -> None:
    flow.run("source", "add", "inbox")
    flow.publish("sales", SALES)
    obstacle = flow.write("obstacle", "a file where a folder is wanted")
    flow.run("topics", "set", "sales", "sales_data", f"sqlite://{obstacle}/sales.sqlite3")
    flow.write("inbox/a.csv", "a\n1\n")
    flow.work_off(code=1)
    said = causes(flow)
    assert "job 1" in said
    assert "obstacle" in said


# 4. "Worker exits immediately: Ensure there are jobs in `QUEUED` status"


def test_a_worker_without_jobs_waits_and_status_says_that_there_is_nothing_to_do(
    flow: Flow,
) -> None:
    flow.run("source", "add", "inbox")
    flow.publish("sales", SALES)
    flow.write("inbox/a.csv", "a\n1\n")
    with flow.start():
        wait_for("the job", lambda: flow.counts() == {"COMPLETED": 1})
        said = causes(flow)
        assert "no job is in QUEUED status" in said
        assert [row["status"] for row in flow.json("workers")] == ["IDLE"]


def test_queued_jobs_without_a_sentinel_or_a_worker_are_explained(flow: Flow) -> None:
    flow.run("source", "add", "inbox")
    flow.publish("sales", SALES)
    flow.write("inbox/a.csv", "a\n1\n")
    flow.run("scan")
    assert "no Sentinel runs" in causes(flow)
    with flow.start("--workers", "0"):
        said = causes(flow)
        assert "no worker is connected" in said
        assert "casparian worker" in said


def test_a_plugin_that_paused_itself_is_explained(flow: Flow) -> None:
    flow.run("source", "add", "inbox")
    config = (flow.folder / "global_config.toml").read_text()
    flow.write(
        "global_config.toml",
        config.replace("[worker]", "max_retries = 0\nbreaker_failures = 2\n\n[worker]"),
    )
    flow.publish("sales", SALES.replace("self.publish", "raise ValueError('bad'); self.publish"))
    for number in range(4):
        flow.write(f"inbox/{number}.csv", f"a\n{number}\n")
    flow.work_off(code=1)
    flow.write("inbox/one-more.csv", "a\n5\n")
    with flow.start():
        # How many had been sent ahead when the pause came is the machine's affair.
        wait_for("the last file's job", lambda: sum(flow.counts().values()) == 5)
        wait_for("a worker", lambda: flow.json("workers"))
        said = causes(flow)
    assert "plugin sales is paused" in said
    assert "casparian plugin resume sales" in said
