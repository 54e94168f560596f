"""Folders as people have them: several kinds of files, odd encodings, bad rows, locked plugins."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
from acceptance_kit import PLUGINS, Flow


def deploy(flow: Flow, *names: str) -> None:
    flow.run("source", "add", "inbox")
    for name in names:
        flow.run("publish", str(next(PLUGINS.rglob(f"{name}.py"))), "--version", "1.0.0")


def test_csv_files_of_all_sorts_become_tables(flow: Flow) -> None:
    deploy(flow, "csv_table")
    (flow.inbox / "quoted.csv").write_bytes(b'name,note\nx,"a, ""b""\nc"\n')
    (flow.inbox / "bom.csv").write_bytes("\ufeffname,note\nx,y\n".encode())
    (flow.inbox / "latin.csv").write_bytes("name,note\nJosé,ñ\n".encode("latin-1"))
    flow.work_off()
    tables = {
        path.name.split("-")[0]: pd.read_parquet(path)
        for path in (flow.folder / "output" / "tables").glob("*.parquet")
    }
    assert tables["quoted"]["note"].tolist() == ['a, "b"\nc']
    assert tables["bom"].columns[0] == "name"
    assert tables["latin"]["name"].tolist() == ["José"]


def test_bad_rows_go_to_quarantine_with_reason_and_place(flow: Flow) -> None:
    deploy(flow, "stock_prices")
    good = "".join(f"AAPL,Jan {day} 2010,{200 + day}\n" for day in range(1, 21))
    flow.write("inbox/stocks.csv", f"symbol,date,price\n{good}AAPL,Jan 21 2010,unknown\n")
    flow.work_off()
    assert flow.table("stock_prices").num_rows == 20
    assert flow.table("stock_prices").schema.field("date").type == pa.date32()
    (bad,) = flow.table("stock_prices_quarantine").to_pylist()
    assert "price" in bad["_error_msg"]
    assert bad["_source_row"] == 21
    assert bad["price"] == "unknown"
    (job,) = flow.json("jobs")
    assert (job["status"], job["completion_status"]) == ("COMPLETED", "PARTIAL_SUCCESS")
    assert job["quarantine_rows"] == 1


def test_too_many_bad_rows_fail_the_job_and_nothing_is_written(flow: Flow) -> None:
    deploy(flow, "stock_prices")
    flow.write("inbox/stocks.csv", "symbol,date,price\nA,Jan 1 2010,1\nA,Jan 2 2010,no\n")
    flow.work_off(code=1)
    (job,) = flow.json("jobs")
    assert (job["status"], job["reason"]) == ("FAILED", "quarantine_limit")
    assert list((flow.folder / "output").rglob("*.parquet")) == []
    assert list((flow.folder / "output").rglob("*.sqlite3")) == []


def test_json_lists_and_lines_become_sqlite_tables(flow: Flow) -> None:
    deploy(flow, "json_records")
    flow.write("inbox/list.json", json.dumps([{"a": 1}, {"a": 2, "b": "x"}]))
    flow.write("inbox/lines.json", '{"a": 1}\n{"a": 2}\n')
    flow.work_off()
    import sqlite3

    with sqlite3.connect(flow.folder / "output" / "records.sqlite3") as database:
        assert database.execute("SELECT a, b FROM list ORDER BY a").fetchall() == [
            (1, None),
            (2, "x"),
        ]
        assert database.execute("SELECT count(*) FROM lines").fetchall() == [(2,)]


def test_excel_is_read_by_a_plugin_with_a_locked_environment_of_its_own(
    flow: Flow, tmp_path: Path
) -> None:
    deploy(flow, "excel_sheets")
    with pd.ExcelWriter(flow.inbox / "book.xlsx") as writer:
        pd.DataFrame({"a": [1, 2]}).to_excel(writer, sheet_name="First", index=False)
        pd.DataFrame({"b": ["x"]}).to_excel(writer, sheet_name="Second", index=False)
    flow.environment["CASPARIAN_WORKER__CACHE_DIR"] = str(tmp_path / "cache")
    flow.work_off()
    names = {p.name.split("-")[0] for p in (flow.folder / "output" / "sheets").glob("*")}
    assert names == {"First", "Second"}


def test_odd_names_reach_the_plugin_and_the_tables(flow: Flow) -> None:
    deploy(flow, "csv_table")
    names = ["with space.csv", "new\nline.csv", "ünï.csv", "x" * 251 + ".csv"]
    for name in names:
        (flow.inbox / name).write_text("a\n1\n")
    with open(bytes(flow.inbox) + b"/not-utf8-\xff.csv", "w") as file:
        file.write("a\n1\n")
    flow.work_off()
    assert flow.counts() == {"COMPLETED": 5}
    assert len(flow.run("jobs").stdout.splitlines()) == 6
