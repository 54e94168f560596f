"""The demo, as `make demo` runs it, in a folder of its own."""

import subprocess
import sys
from pathlib import Path

from acceptance_kit import REPOSITORY


def run_demo(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "demo.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=115,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


def test_the_demo_shows_versions_jobs_rows_and_places_and_can_be_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    said = run_demo(folder)
    assert said.count("COMPLETED") == 11
    assert "stock_prices_quarantine" in said or "quarantine" in said
    assert "airports" in said
    assert "stocks.sqlite3  stock_prices:" in said
    timeline = [line for line in said.splitlines() if line.startswith("stocks.csv")]
    assert len(timeline) == 2
    (folder / "mine.txt").write_text("gone after the next run, as the demo says")
    run_demo(folder)
    assert not (folder / "mine.txt").exists()


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
