"""Watch mode, and `Scout(db).scan_source(root)`."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from casparian_flow.domain.errors import LedgerUnavailableError, SentinelUnreachableError
from casparian_flow.sentinel.api import Row
from casparian_flow.sentinel.control import ControlClient, connect
from casparian_flow.services import watch as watching
from casparian_flow.services.watch import run_scout


class Watched:
    """A scout running in a thread over one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "in"
        self.folder.mkdir()
        self.control: ControlClient = connect(folder / "ledger.duckdb")
        self.root = self.control.add_source(str(self.folder), settle_seconds=0.1)
        self.stop = threading.Event()
        self.reports: list[Row] = []
        self.thread: threading.Thread | None = None

    def start(self, **options: Any) -> None:
        settings = {"interval_s": 0.2, "hints": False, **options}
        self.thread = threading.Thread(
            target=run_scout,
            args=(self.control,),
            kwargs={"stop": self.stop, "on_report": self.reports.append, **settings},
        )
        self.thread.start()

    def until(self, reached: Callable[[], object], within: float = 15.0) -> None:
        deadline = time.monotonic() + within
        while not reached():
            assert time.monotonic() < deadline, self.reports
            time.sleep(0.02)

    def seen(self) -> set[str]:
        return {r["rel_path"] for r in self.control.list_files() if r["deleted_at"] is None}

    def close(self) -> None:
        self.stop.set()
        if self.thread is not None:
            self.thread.join(10)
            assert not self.thread.is_alive()
        self.control.close()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.close()


def test_new_changed_and_deleted_files_are_found_round_by_round(watched: Watched) -> None:
    watched.start()
    path = watched.folder / "a.csv"
    path.write_text("1")
    (watched.folder / "b.csv").write_text("1")
    watched.until(lambda: watched.seen() == {"a.csv", "b.csv"})
    path.write_text("22")
    watched.until(lambda: len(watched.control.versions("a.csv")) == 2)
    path.unlink()
    watched.until(lambda: watched.seen() == {"b.csv"})


def test_roots_added_and_removed_meanwhile_are_taken_up(watched: Watched, tmp_path: Path) -> None:
    watched.start()
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.csv").write_text("1")
    watched.control.add_source(str(other), settle_seconds=0.1)
    watched.until(lambda: watched.seen() == {"x.csv"})
    watched.control.remove_source(str(other))
    watched.until(lambda: all(r["path"] != str(other) for r in watched.reports[-3:]))


def test_events_make_the_next_scan_sooner(watched: Watched) -> None:
    watched.start(interval_s=3600.0, hints=True)
    watched.until(lambda: len(watched.reports) >= 1)
    time.sleep(1.0)  # until the watches stand
    (watched.folder / "a.csv").write_text("1")
    watched.until(lambda: watched.seen() == {"a.csv"})


def test_a_file_found_changed_by_a_job_is_read_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    (watched.folder / "a.csv").write_text("1")
    asked: list[Row] = []
    monkeypatch.setattr(watched.control, "next_rescans", lambda: [asked.pop()] if asked else [])
    forced: list[set[str]] = []
    real = watching.scan

    def remember(*args: Any, **options: Any) -> Any:
        forced.append(set(options["force"]))
        return real(*args, **options)

    monkeypatch.setattr(watching, "scan", remember)
    watched.start(interval_s=3600.0)
    watched.until(lambda: watched.seen() == {"a.csv"})
    asked.append({"root_id": watched.root["id"], "rel_path": "a.csv"})
    watched.until(lambda: {"a.csv"} in forced)


def test_a_file_that_keeps_changing_is_rescanned_at_a_bounded_rate(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        watched.control,
        "next_rescans",
        lambda: [{"root_id": watched.root["id"], "rel_path": "a.csv"}],
    )
    watched.start(interval_s=3600.0)
    time.sleep(2.0)
    assert 1 <= len(watched.reports) <= 2.0 / watching.SOONEST_S + 1


def test_a_failed_scan_is_reported_and_the_loop_goes_on(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = watching.scan, [LedgerUnavailableError("disk full")]

    def fail_once(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **options)

    monkeypatch.setattr(watching, "scan", fail_once)
    (watched.folder / "a.csv").write_text("1")
    watched.start()
    watched.until(lambda: watched.seen() == {"a.csv"})
    assert watched.reports[0]["problems"] == ["scan failed: disk full"]
    assert watched.reports[0]["complete"] is False


def test_a_sentinel_that_is_gone_ends_the_loop(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> list[Row]:
        raise SentinelUnreachableError("nobody answers")

    monkeypatch.setattr(watched.control, "next_rescans", gone)
    with pytest.raises(SentinelUnreachableError):
        run_scout(watched.control, interval_s=1.0, stop=watched.stop, hints=False)
