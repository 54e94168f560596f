"""From `helm install` to rows, as docs/install-kubernetes.md tells it."""

import shutil
import sqlite3
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from acceptance_kit import PLUGINS, make_flow, wait_for
from cluster.line import PATIENCE_S, Line
from cluster.release import Release

STOCKS = Path(str(files("vega_datasets"))) / "_data" / "stocks.csv"
MORE = "\nAAPL,Apr 1 2010,235.97\nAAPL,May 1 2010,unknown\n"
OF_A_RUN = {"_cf_job_id", "_cf_processed_at"}
"""Columns that differ from run to run."""


def comparable(rows: list[dict[str, Any]]) -> list[str]:
    """Rows without what is a run's own, in an order of their own."""
    return sorted(str(sorted((k, v) for k, v in row.items() if k not in OF_A_RUN)) for row in rows)


def parquet_rows(table: pa.Table) -> list[str]:
    return comparable(table.to_pylist())


def sqlite_rows(file: Path, table: str) -> list[str]:
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
        connection.row_factory = sqlite3.Row
        return comparable([dict(row) for row in connection.execute(f"SELECT * FROM {table}")])


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same plugin over the same files by `casparian start`."""
    flow = make_flow(tmp_path_factory.mktemp("one-machine"))
    shutil.copy(STOCKS, flow.inbox / "stocks.csv")
    shutil.copy(STOCKS, flow.inbox / "stocks-more.csv")
    with (flow.inbox / "stocks-more.csv").open("a") as file:
        file.write(MORE)
    flow.json("source", "add", "inbox")
    flow.publish("stocks", (PLUGINS / "stock_prices.py").read_text())
    flow.work_off()
    return flow


def test_files_become_the_same_rows_as_on_one_machine(release: Release, one_machine: Any) -> None:
    line = Line(release, "stocks")
    for file in one_machine.inbox.iterdir():
        shutil.copy(file, line.inbox)
    line.watch()
    line.apply_plugin((PLUGINS / "stock_prices.py").read_text())
    ready = line.await_ready()
    assert {c["type"]: c["status"] for c in ready["status"]["conditions"]} == dict.fromkeys(
        ("Verified", "Provisioned", "Deployed", "Ready"), "True"
    )
    assert ready["status"]["signer"] == "local"
    line.scan()

    def finished() -> bool:
        database = line.outputs / "stocks.sqlite3"
        if not database.exists() or len(list((line.outputs / "stock_prices").iterdir())) < 2:
            return False
        return release.sql(
            "SELECT count(*) AS n FROM cf_processing_queue WHERE status = 'COMPLETED'"
        ) == [{"n": 2}]

    wait_for("both files", finished, PATIENCE_S)
    for topic in ("stock_prices", "stock_prices_quarantine"):
        assert parquet_rows(line.table(topic)) == parquet_rows(one_machine.table(topic))
    ours, theirs = line.outputs / "stocks.sqlite3", one_machine.folder / "output/stocks.sqlite3"
    assert sqlite_rows(ours, "stock_prices") == sqlite_rows(theirs, "stock_prices")
    assert len(sqlite_rows(ours, "stock_prices")) == 1121
    line.remove()


def test_helm_test_finds_the_installation_in_order(release: Release) -> None:
    assert "Phase:          Succeeded" in release.helm("test", "casparian")
