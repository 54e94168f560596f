"""The demo, as `make demo` runs it, in a folder of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from acceptance_kit import REPOSITORY


@pytest.mark.timeout(240)
def test_the_demo_shows_versions_jobs_rows_and_places_and_begins_afresh(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "global_config.toml").write_text("# of an earlier run")
    (folder / "leftover.txt").write_text("of an earlier run")
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "demo.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done
    said = done.stdout
    assert said.count("COMPLETED") == 11
    assert "stock_prices_quarantine" in said
    assert "airports" in said
    assert "stocks.sqlite3  stock_prices: 1,121 rows" in said
    timeline = [line for line in said.splitlines() if line.startswith("stocks.csv")]
    assert len(timeline) == 2
    assert not (folder / "leftover.txt").exists()


def test_the_demo_deletes_no_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "precious.txt").write_text("x")
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "demo.py"), str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert (tmp_path / "demo" / "precious.txt").exists()
