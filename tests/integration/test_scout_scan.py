"""Scout on real folders and a real ledger file, through the same calls as every client."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from signing_kit import rules, signed_bundle

from casparian_flow.domain.errors import ConflictError, UsageError
from casparian_flow.domain.paths import path_to_text
from casparian_flow.sentinel.api import FileFinding, Row, ScanReport
from casparian_flow.sentinel.control import ControlClient, connect
from casparian_flow.services import scan_hashing
from casparian_flow.services.scout import Observed, report_row, scan

SETTLE = 0.05
PLUGIN = """
from casparian_flow.sdk import BasePlugin, PluginMetadata
MANIFEST = PluginMetadata(pattern="*.csv", topic="rows", priority=70)
class Handler(BasePlugin):
    pass
"""


class Bench:
    """One source root, its ledger, and the shortest words for what the tests do with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "in"
        self.folder.mkdir()
        self.control: ControlClient = connect(folder / "ledger.duckdb", trust=rules)
        self.root = self.control.add_source(str(self.folder), settle_seconds=SETTLE)

    def write(self, name: str, content: str | bytes = "a,b\n1,2\n") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def scan(self, **options: object) -> ScanReport:
        return scan(self.root, self.control, **options)  # type: ignore[arg-type]  # test shorthand

    def files(self) -> dict[str, Row]:
        rows = self.control.list_files(limit=10_000)
        return {str(row["rel_path"]): row for row in rows}

    def present(self) -> set[str]:
        return {name for name, row in self.files().items() if row["deleted_at"] is None}

    def hashes(self, name: str) -> list[str]:
        return [str(v["content_hash"]) for v in self.control.versions(name)]

    def deploy(self, name: str = "rows", source: str = PLUGIN) -> Row:
        return self.control.deploy(signed_bundle(source, name))

    def jobs(self) -> list[tuple[str, str]]:
        return sorted((j["plugin_name"], j["rel_path"]) for j in self.control.list_jobs(limit=999))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.control.close()


def test_a_new_file_gets_a_version_and_an_unchanged_one_none(bench: Bench) -> None:
    bench.write("sub/a.csv")
    first, second = bench.scan(), bench.scan()
    assert (first.files, first.versions, first.complete) == (1, 1, True)
    assert (second.files, second.versions, second.unchanged) == (1, 0, 1)


def test_a_touch_makes_no_version_and_refreshes_the_signature(bench: Bench) -> None:
    path = bench.write("a.csv")
    bench.scan()
    os.utime(path, ns=(10**18, 10**18))
    report = bench.scan()
    assert (report.versions, report.unchanged) == (0, 1)
    assert len(bench.hashes("a.csv")) == 1


def test_other_bytes_with_equal_size_and_mtime_are_found(bench: Bench) -> None:
    path = bench.write("a.csv", "1111")
    os.utime(path, ns=(10**18, 10**18))
    bench.scan()
    path.write_text("2222")
    os.utime(path, ns=(10**18, 10**18))
    assert bench.scan().versions == 1


def test_going_back_to_former_bytes_is_a_third_version(bench: Bench) -> None:
    for content in ("A", "B", "A"):
        bench.write("a.csv", content)
        bench.scan()
    hashes = bench.hashes("a.csv")
    assert len(hashes) == 3
    assert hashes[0] == hashes[2] != hashes[1]


def test_rehash_reads_files_whose_signature_is_unchanged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("a.csv")
    bench.scan()
    time.sleep(2.1)  # beyond the racy slack, so that the next scan's record is trusted
    bench.scan()
    read: list[str] = []
    real = scan_hashing.read_file
    monkeypatch.setattr(
        scan_hashing, "read_file", lambda p, c, b: (read.append(p), real(p, c, b))[1]
    )
    assert bench.scan().unchanged == 1
    assert read == []
    assert bench.scan(rehash=True).unchanged == 1
    assert len(read) == 1


def test_a_racy_record_is_read_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("a.csv")
    bench.scan()
    read: list[str] = []
    real = scan_hashing.read_file
    monkeypatch.setattr(
        scan_hashing, "read_file", lambda p, c, b: (read.append(p), real(p, c, b))[1]
    )
    bench.scan()
    assert len(read) == 1


def test_the_same_bytes_at_two_paths_are_two_files_and_hard_links_too(bench: Bench) -> None:
    path = bench.write("a.csv")
    bench.write("b.csv")
    os.link(path, bench.folder / "c.csv")
    report = bench.scan()
    assert report.versions == 3
    os.link(path, bench.folder / "d.csv")
    later = bench.scan()
    assert (later.versions, later.renamed, later.deleted) == (1, 0, 0)


def test_a_rename_keeps_the_location_and_its_history(bench: Bench) -> None:
    bench.write("a.csv", "one")
    bench.scan()
    bench.write("a.csv", "two")
    bench.scan()
    before = bench.files()["a.csv"]["id"]
    (bench.folder / "sub").mkdir()
    (bench.folder / "a.csv").rename(bench.folder / "sub/b.csv")
    report = bench.scan()
    assert (report.renamed, report.versions, report.deleted) == (1, 0, 0)
    row = bench.files()["sub/b.csv"]
    assert (row["id"], row["renamed_from"]) == (before, "a.csv")
    assert len(bench.hashes("sub/b.csv")) == 2


def test_a_rename_is_found_in_watch_mode_although_the_new_name_is_young(bench: Bench) -> None:
    bench.write("a.csv", "one")
    bench.scan()
    (bench.folder / "a.csv").rename(bench.folder / "b.csv")
    observed: Observed = {}
    first = bench.scan(wait_for_settle=False, observed=observed)
    assert (first.renamed, first.deleted, first.unsettled) == (0, 0, 1)
    time.sleep(3 * SETTLE)
    second = bench.scan(wait_for_settle=False, observed=observed)
    assert (second.renamed, second.deleted) == (1, 0)


def test_a_rename_with_other_bytes_is_a_new_file(bench: Bench) -> None:
    path = bench.write("a.csv", "1111")
    os.utime(path, ns=(10**18, 10**18))
    bench.scan()
    path.write_text("2222")
    path.rename(bench.folder / "b.csv")
    os.utime(bench.folder / "b.csv", ns=(10**18, 10**18))
    report = bench.scan()
    assert (report.renamed, report.versions) == (0, 1)
    bench.scan()
    assert bench.present() == {"b.csv"}


def test_a_moved_job_is_not_done_again_but_a_new_taker_gets_one(bench: Bench) -> None:
    bench.deploy()
    other = PLUGIN.replace("*.csv", "done/*").replace('"rows"', '"moved"')
    bench.deploy("archive", other)
    bench.write("a.csv")
    bench.write("keep.csv")
    assert bench.scan().jobs == 2
    (bench.folder / "done").mkdir()
    (bench.folder / "a.csv").rename(bench.folder / "done/a.csv")
    report = bench.scan()
    assert (report.renamed, report.jobs) == (1, 1)
    assert ("archive", "done/a.csv") in bench.jobs()


def test_a_deleted_file_is_marked_and_its_history_stays(bench: Bench) -> None:
    bench.write("a.csv")
    bench.write("b.csv")
    bench.scan()
    (bench.folder / "a.csv").unlink()
    assert bench.scan().deleted == 1
    assert bench.present() == {"b.csv"}
    assert len(bench.hashes("a.csv")) == 1


def test_a_file_that_comes_back_unchanged_is_no_new_version(bench: Bench) -> None:
    bench.write("a.csv")
    bench.write("b.csv")
    bench.scan()
    (bench.folder / "a.csv").unlink()
    bench.scan()
    bench.write("a.csv")
    report = bench.scan()
    assert (report.versions, report.unchanged) == (0, 2)
    assert bench.present() == {"a.csv", "b.csv"}


def test_a_deleted_folder_takes_its_files_along(bench: Bench) -> None:
    bench.write("sub/deep/a.csv")
    bench.write("b.csv")
    bench.scan()
    shutil.rmtree(bench.folder / "sub")
    assert bench.scan().deleted == 1


def test_a_suddenly_empty_root_marks_nothing_deleted(bench: Bench) -> None:
    bench.write("a.csv")
    bench.write("sub/b.csv")
    bench.scan()
    shutil.rmtree(bench.folder)
    bench.folder.mkdir()
    report = bench.scan()
    assert report.deleted == 0
    assert any("suddenly empty" in line for line in report.problems)
    assert bench.present() == {"a.csv", "sub/b.csv"}


def test_a_missing_root_is_reported_and_marks_nothing_deleted(bench: Bench) -> None:
    bench.write("a.csv")
    bench.scan()
    bench.folder.rename(bench.folder.with_name("away"))
    report = bench.scan()
    assert (report.deleted, report.complete) == (0, False)
    assert any("cannot be listed" in line for line in report.problems)
    bench.folder.with_name("away").rename(bench.folder)
    assert bench.scan().complete


def test_another_device_marks_nothing_deleted_until_the_content_proves_the_tree(
    bench: Bench,
) -> None:
    bench.write("a.csv")
    bench.write("b.csv")
    bench.scan()
    elsewhere = ScanReport(int(bench.root["id"]), st_dev=12345)
    begun = bench.control.begin_scan(int(bench.root["id"]))
    bench.control.finish_scan(int(bench.root["id"]), begun["scan_id"], [], elsewhere)
    (bench.folder / "a.csv").unlink()
    report = bench.scan(rehash=True)
    assert report.deleted == 0
    assert any("another device" in line for line in report.problems)
    assert bench.scan().deleted == 1


@pytest.mark.parametrize("broken", ["sub", "sub/deep"])
def test_an_unreadable_folder_is_reported_and_its_files_stay(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    bench.write("sub/deep/a.csv")
    bench.write("b.csv")
    bench.scan()
    # Root reads every folder, so the refusal is made at the system call.
    real = os.open
    refused = str(bench.folder / broken)

    def refuse(path: str, flags: int, *args: int, **kw: int) -> int:
        if path == refused:
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *args, **kw)

    monkeypatch.setattr(os, "open", refuse)
    (bench.folder / "sub/deep/a.csv").unlink()
    report = bench.scan()
    assert (report.deleted, report.complete) == (0, False)
    assert any(broken in line and "Permission denied" in line for line in report.problems)
    monkeypatch.undo()
    assert bench.scan().deleted == 1


def test_special_files_are_reported_once_and_never_opened(bench: Bench) -> None:
    os.mkfifo(bench.folder / "pipe.csv")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bench.folder / "sock.csv"))
        bench.write("a.csv")
        report = bench.scan()
    assert report.files == 1
    assert sorted(line.split(":")[0] for line in report.problems) == ["pipe.csv", "sock.csv"]


def test_symbolic_links_are_not_followed(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.csv").write_text("x")
    (bench.folder / "folder").symlink_to(outside)
    (bench.folder / "file.csv").symlink_to(outside / "secret.csv")
    report = bench.scan()
    assert (report.files, report.ignored, report.problems) == (0, 2, [])


ODD_NAMES = [
    b"n" * 255,
    b"line\nbreak.csv",
    b"ends in newline.csv\n",
    b"caf\xc3\xa9.csv",
    b"bad\xff\xfe.csv",
    b"back\\xff.csv",
    b"back\\slash",
    b" spaces ",
    b"quote'\".csv",
    b"-rf",
    b"*.csv",
]


def test_odd_names_are_versioned_and_found_again(bench: Bench) -> None:
    for name in ODD_NAMES:
        with open(os.path.join(os.fsencode(bench.folder), name), "wb") as stream:
            stream.write(name)
    report = bench.scan()
    assert (report.versions, report.problems) == (len(ODD_NAMES), [])
    assert bench.present() == {path_to_text(name) for name in ODD_NAMES}
    again = bench.scan()
    assert (again.versions, again.unchanged, again.deleted) == (0, len(ODD_NAMES), 0)


def test_an_empty_file_has_a_version(bench: Bench) -> None:
    bench.write("empty.csv", "")
    assert bench.scan().versions == 1
    (row,) = bench.control.versions("empty.csv")
    assert row["size_bytes"] == 0


def test_timestamps_beyond_the_ledgers_range_do_no_harm(bench: Bench) -> None:
    path = bench.write("a.csv")
    os.utime(path, (2**33, 2**33))
    old = bench.write("b.csv")
    os.utime(old, (-(2**31), -(2**31)))
    assert bench.scan().versions == 2
    assert bench.scan().unchanged == 2


def test_ignored_and_hidden_files_are_left_out(bench: Bench) -> None:
    for name in ("a.tmp", ".env", ".DS_Store", ".git/config", "__pycache__/x.pyc", ".hidden/b.csv"):
        bench.write(name)
    bench.write("a.csv")
    report = bench.scan()
    assert bench.present() == {"a.csv", ".hidden/b.csv"}
    assert report.ignored == 5


def test_one_bad_ignore_pattern_disables_only_itself(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not valid gitignore"):
        bench.control.add_source(str(tmp_path / "other"), ignore=["[a-"])
    bench.control.add_source(str(bench.folder), settle_seconds=SETTLE, ignore=["*.bak", "old/"])
    for name in ("a.bak", "old/x.csv", "a.csv"):
        bench.write(name)
    assert bench.scan().ignored == 2
    assert bench.present() == {"a.csv"}


def test_a_file_that_becomes_ignored_is_not_marked_deleted(bench: Bench) -> None:
    bench.write("old/x.csv")
    bench.write("y.bak")
    bench.write("a.csv")
    bench.scan()
    bench.control.add_source(str(bench.folder), settle_seconds=SETTLE, ignore=["*.bak", "old/"])
    assert bench.scan().deleted == 0


def test_include_patterns_take_only_what_they_match(bench: Bench) -> None:
    bench.control.add_source(str(bench.folder), settle_seconds=SETTLE, include=["*.csv"])
    bench.write("sub/a.csv")
    bench.write("b.txt")
    bench.scan()
    assert bench.present() == {"sub/a.csv"}


def test_overlapping_roots_are_reported_and_both_scanned(bench: Bench) -> None:
    bench.write("sub/a.csv")
    inner = bench.control.add_source(str(bench.folder / "sub"), settle_seconds=SETTLE)
    assert "lies inside" in inner["overlaps"][0]
    assert any("lies around" in line for line in bench.scan().problems)
    report = scan(inner, bench.control)
    assert report.versions == 1
    assert any("lies inside" in line for line in report.problems)


def test_a_file_that_vanishes_between_walk_and_read_is_reported(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write("a.csv")
    bench.write("b.csv")
    time.sleep(2 * SETTLE)
    real = scan_hashing.read_file

    def vanish(path: str, *args: object) -> object:
        if path.endswith("a.csv"):
            os.unlink(path)
        return real(path, *args)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(scan_hashing, "read_file", vanish)
    report = bench.scan()
    assert report.versions == 1
    assert report.problems == ["a.csv: vanished while it was scanned"]


def _write_slowly(path: Path, stop: threading.Event, pause: float) -> None:
    with path.open("ab", buffering=0) as stream:
        while not stop.wait(pause):
            stream.write(b"x" * 10)


def test_a_file_written_all_the_time_is_left_until_it_stands_still(bench: Bench) -> None:
    bench.control.add_source(str(bench.folder), settle_seconds=0.3)
    bench.write("done.csv")
    stop = threading.Event()
    slow = bench.folder / "slow.csv"
    writer = threading.Thread(target=_write_slowly, args=(slow, stop, 0.01))
    writer.start()
    time.sleep(0.05)
    report = bench.scan()
    stop.set()
    writer.join()
    assert (report.versions, report.unsettled) == (1, 1)
    assert report.problems == ["slow.csv: still being written; left for later"]
    assert bench.scan().versions == 1
    (version,) = bench.control.versions("slow.csv")
    assert version["size_bytes"] == slow.stat().st_size


def test_pauses_shorter_than_the_settle_time_do_not_fool_it(bench: Bench) -> None:
    bench.control.add_source(str(bench.folder), settle_seconds=0.6)
    stop = threading.Event()
    writer = threading.Thread(target=_write_slowly, args=(bench.folder / "slow.csv", stop, 0.25))
    writer.start()
    time.sleep(0.3)
    reports = [bench.scan() for _ in range(2)]
    stop.set()
    writer.join()
    assert [(r.versions, r.unsettled) for r in reports] == [(0, 1), (0, 1)]


def test_pauses_longer_than_the_settle_time_give_versions_of_real_states(bench: Bench) -> None:
    path = bench.write("slow.csv", "one")
    bench.scan()
    with path.open("a") as stream:
        stream.write("two")
    bench.scan()
    sizes = [v["size_bytes"] for v in bench.control.versions("slow.csv")]
    assert sizes == [3, 6]


def test_without_waiting_a_young_file_is_taken_by_a_later_scan(bench: Bench) -> None:
    bench.write("a.csv")
    first = bench.scan(wait_for_settle=False)
    time.sleep(3 * SETTLE)
    second = bench.scan(wait_for_settle=False)
    assert (first.versions, first.unsettled) == (0, 1)
    assert (second.versions, second.unsettled) == (1, 0)


def test_a_file_that_changes_under_the_reader_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.write("a.csv", "x" * 100)
    time.sleep(2 * SETTLE)
    real = os.readv

    def append(descriptor: int, buffers: list[bytearray]) -> int:
        with path.open("a") as stream:
            stream.write("y")
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "readv", append)
    report = bench.scan()
    assert (report.versions, report.unsettled) == (0, 1)
    monkeypatch.undo()
    assert bench.scan().versions == 1


def test_versions_and_jobs_come_in_one_transaction_and_only_where_subscribed(bench: Bench) -> None:
    bench.deploy()
    bench.deploy("twin", PLUGIN.replace("priority=70", "priority=10"))
    bench.write("a.csv")
    bench.write("notes.txt")
    report = bench.scan()
    assert (report.versions, report.jobs) == (2, 2)
    assert bench.jobs() == [("rows", "a.csv"), ("twin", "a.csv")]
    priorities = {j["plugin_name"]: j["priority"] for j in bench.control.list_jobs()}
    assert priorities == {"rows": 70, "twin": 10}
    assert bench.files()["a.csv"]["applied_tags"] == "auto_rows,auto_twin"


def test_many_files_are_committed_in_chunks(bench: Bench) -> None:
    bench.deploy()
    for i in range(2_500):
        bench.write(f"d{i % 7}/{i}.csv", str(i))
    report = bench.scan()
    assert (report.versions, report.jobs) == (2_500, 2_500)
    assert bench.control.check() == []


def test_one_scan_of_a_root_at_a_time_and_a_stale_one_deletes_nothing(bench: Bench) -> None:
    bench.write("a.csv")
    bench.write("b.csv")
    bench.scan()
    root_id = int(bench.root["id"])
    begun = bench.control.begin_scan(root_id)
    with pytest.raises(ConflictError, match="under way"):
        bench.control.begin_scan(root_id)
    bench.control.finish_scan(root_id, begun["scan_id"], [], ScanReport(root_id))
    bench.control.finish_scan(root_id, begun["scan_id"], ["a.csv"], ScanReport(root_id))
    assert bench.present() == {"a.csv", "b.csv"}


def _finding(path: str, digest: str, expected: int = 0) -> FileFinding:
    return FileFinding(path, (1, 2, 3, 4, 5), digest * 64, 10**15, expected)


def test_a_finding_compared_with_an_old_version_is_refused(bench: Bench) -> None:
    root_id = int(bench.root["id"])
    scan_id = bench.control.begin_scan(root_id)["scan_id"]
    first = bench.control.commit_chunk(root_id, scan_id, [_finding("a.csv", "a")])
    assert (first.locations, first.versions) == (1, 1)
    late = bench.control.commit_chunk(
        root_id, scan_id, [_finding("a.csv", "b"), _finding("new.csv", "c")]
    )
    assert (late.versions, late.conflicts) == (1, ["a.csv"])
    current = int(bench.control.versions("a.csv")[0]["id"])
    right = bench.control.commit_chunk(root_id, scan_id, [_finding("a.csv", "b", current)])
    assert right.versions == 1


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../b", "", "a//b", "a\0b", "."])
def test_a_path_that_leaves_the_root_is_refused(bench: Bench, path: str) -> None:
    with pytest.raises(UsageError, match="no path relative"):
        bench.control.commit_chunk(int(bench.root["id"]), 1, [_finding(path, "a")])


def test_a_stopped_scan_concludes_nothing_from_absence(bench: Bench) -> None:
    bench.write("a.csv")
    bench.write("b.csv")
    bench.scan()
    (bench.folder / "a.csv").unlink()
    stop = threading.Event()
    stop.set()
    report = bench.scan(stop=stop)
    assert (report.deleted, report.complete) == (0, False)


def test_a_forced_file_is_read_although_it_looks_unchanged(bench: Bench) -> None:
    path = bench.write("a.csv", "1111")
    time.sleep(2.1)
    bench.scan()
    assert bench.scan(force=["a.csv", "unknown.csv"]).unchanged == 1
    before = path.stat()
    assert before.st_size == 4


def test_progress_ends_at_the_number_of_files(bench: Bench) -> None:
    for i in range(5):
        bench.write(f"{i}.csv", str(i))
    told: list[tuple[int, int]] = []
    bench.scan(progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (5, 5)


def test_the_report_is_kept_with_the_root(bench: Bench) -> None:
    os.mkfifo(bench.folder / "pipe")
    bench.write("a.csv")
    row = report_row(bench.scan())
    assert row["versions"] == 1
    (source,) = bench.control.list_sources()
    assert (source["files"], source["last_scan_complete"]) == (1, True)
    assert source["problems"] == ["pipe: a FIFO, not a file; left out"]
