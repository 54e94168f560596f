"""Versions of a plugin, as a user meets them: tried, switched, rejected, rolled back."""

from acceptance_kit import SALES, Flow, wait_for

BROKEN = SALES.replace("class Handler", "RATE = 1 / 0\n\nclass Handler")
SECOND = SALES.replace("reading", "now reading")


def versions(flow: Flow) -> dict[str, str]:
    return {row["version"]: row["status"] for row in flow.json("plugins")}


def test_versions_are_tried_switched_rejected_and_rolled_back(flow: Flow) -> None:
    flow.json("source", "add", "inbox")
    first = flow.write("plugins/sales.py", SALES)
    alone = flow.run("publish", str(first), "--version", "1.0.0")
    assert "once 'casparian start' runs" in alone.stderr
    assert versions(flow) == {"1.0.0": "STAGING"}
    assert any("a worker has to try it" in row["cause"] for row in flow.json("status")["causes"])
    flow.write("inbox/monday.csv", "item,price\nbread,1\n")
    with flow.start() as running:
        wait_for("the first job", lambda: flow.counts() == {"COMPLETED": 1})
        assert versions(flow) == {"1.0.0": "ACTIVE"}

        flow.write("plugins/sales.py", BROKEN)
        refused = flow.run("publish", str(first), "--version", "1.1.0", code=2)
        assert "division by zero" in refused.stderr
        assert versions(flow) == {"1.1.0": "REJECTED", "1.0.0": "ACTIVE"}
        shown = flow.json("plugin", "show", "sales")["versions"]
        assert "division by zero" in shown[0]["validation_error"]

        flow.write("plugins/sales.py", SECOND)
        flow.write("plugins/examples/sample.csv", "item,price\nmilk,2\n")
        flow.write("plugins/examples/other.txt", "not for this plugin")
        switched = flow.json("publish", str(first), "--version", "1.1.0")
        assert switched["message"] == "sales 1.1.0 is active"
        assert versions(flow)["1.0.0"] == "SUPERSEDED"
        assert flow.table("sales_data").num_rows == 1, "a trial writes nothing"

        back = flow.json("plugin", "rollback", "sales", "--to", "1.0.0")
        assert back["message"] == "sales 1.0.0 is active again in place of 1.1.0"
        flow.write("inbox/tuesday.csv", "item,price\nmilk,2\n")
        wait_for("the second job", lambda: flow.counts() == {"COMPLETED": 2})
        assert running.finish() == 0
    parsers = flow.table("sales_data").column("_cf_parser_version").to_pylist()
    assert parsers == ["1.0.0", "1.0.0"]


def test_a_run_until_idle_ends_when_a_version_is_rejected(flow: Flow) -> None:
    flow.json("source", "add", "inbox")
    flow.write("plugins/sales.py", BROKEN)
    flow.json("publish", "plugins/sales.py", "--version", "1.0.0")
    flow.write("inbox/monday.csv", "item,price\nbread,1\n")
    said = flow.work_off(code=1)
    assert "sales 1.0.0 is rejected" in said
    flow.write("plugins/sales.py", SALES)
    flow.json("publish", "plugins/sales.py", "--version", "1.0.0")
    flow.work_off()
    assert flow.counts() == {"COMPLETED": 1}
