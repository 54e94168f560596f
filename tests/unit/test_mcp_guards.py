"""What an MCP client's calls must not get past: folders, redaction, budget, audit.

What goes in: paths, values and answers as a hostile client would choose them, real folders and
links below a temporary one. What is observed: refusals, descriptors, files on disk.
"""

import datetime as dt
import decimal
import json
import os
import stat
from pathlib import Path

import pytest

from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import NotPermittedError, UsageError
from casparian_flow.mcp_server.allow_list import AllowList
from casparian_flow.mcp_server.audit import LINE_BYTES_MAX, AuditError, AuditLog
from casparian_flow.mcp_server.budget import ANSWER_BYTES_MAX, ROWS_MAX, fitted, fitting
from casparian_flow.mcp_server.redaction import RedactionMode, Redactor, stricter
from casparian_flow.mcp_server.scan import scan

KEY = b"k" * 32


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """allowed/ with files and links out of it, beside secret/ and allowed-too/."""
    allowed = tmp_path / "allowed"
    (allowed / "below").mkdir(parents=True)
    (allowed / "below" / "a.csv").write_text("a\n1\n")
    (allowed / "b.txt").write_text("b")
    for other in ("secret", "allowed-too"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "hidden.csv").write_text("hidden")
    (allowed / "out").symlink_to(tmp_path / "secret")
    (allowed / "up").symlink_to("..")
    (allowed / "inside").symlink_to("below")
    (allowed / "passwd.csv").symlink_to("/etc/passwd")
    (tmp_path / "door").symlink_to(allowed)
    return tmp_path


HOSTILE = (
    "/",
    "/etc",
    "/proc/self/root/etc",
    "/proc/self/fd",
    "{0}",
    "{0}/secret",
    "{0}/allowed-too",
    "{0}/allowed/../secret",
    "{0}/allowed/below/../../secret",
    "{0}/allowed/..",
    "{0}/allowed/out",
    "{0}/allowed/up",
    "{0}/allowed/up/secret",
    "{0}/allowed/inside/../..",
    "{0}/allowed/b.txt",
    "{0}/allowed/passwd.csv",
    "{0}/allowed/missing",
    "{0}/ALLOWED",
    "{0}/Allowed/below",
    "allowed",
    "./allowed",
    "~",
    "file://{0}/allowed",
    "{0}/allowed\0/etc",
    "{0}/allowed\n",
    "\\x2e\\x2e",
    "{0}/allowed/\\x2e\\x2e/secret",
    "{0}/allowed/" + "x/" * 2_000,
    "\ud800",
    "",
    " ",
    "C:\\Windows",
    "{0}/allowed/．．/secret",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_path_that_leads_out_of_the_allowed_folders_is_refused(place: Path, text: str) -> None:
    allowed = AllowList([place / "allowed"])
    with pytest.raises(UsageError), allowed.open(text.replace("{0}", str(place))):
        pytest.fail("it was opened")


@pytest.mark.parametrize("text", ["allowed", "allowed/below", "allowed//below/.", "allowed/inside"])
def test_a_path_that_leads_into_an_allowed_folder_is_opened_under_its_real_name(
    place: Path, text: str
) -> None:
    with AllowList([place / "allowed"]).open(f"{place}/{text}") as folder:
        assert folder.path == os.path.realpath(f"{place}/{text}")
        assert os.path.realpath(f"/proc/self/fd/{folder.descriptor}") == folder.path


def test_what_is_outside_and_what_is_missing_are_not_told_apart(place: Path) -> None:
    def told(text: str) -> str:
        allowed = AllowList([place / "allowed"])
        with pytest.raises(UsageError) as caught, allowed.open(f"{place}/{text}"):
            pass
        return caught.value.with_hint().replace(text, "X")

    assert told("secret") == told("no such folder")
    assert told("allowed/out") == told("allowed/no")


def test_a_root_may_be_named_by_a_link_and_no_root_allows_nothing(place: Path) -> None:
    with AllowList([place / "door"]).open(f"{place}/door/below") as folder:
        assert folder.path == str(place / "allowed" / "below")
    for roots in ([], [place / "missing"]):
        with pytest.raises(UsageError), AllowList(roots).open(str(place / "allowed")):
            pass


def test_a_folder_swapped_for_a_link_after_it_was_judged_is_not_followed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judgement is by name; the folder is swapped at the moment after it."""
    real = os.path.realpath

    def swap(path: str, *, strict: bool = False) -> str:
        found = real(path, strict=strict)
        if found.endswith("/below"):
            Path(found).rename(place / "allowed" / "moved")
            Path(found).symlink_to(place / "secret")
        return found

    allowed = AllowList([place / "allowed"])
    monkeypatch.setattr(os.path, "realpath", swap)
    with pytest.raises(UsageError), allowed.open(str(place / "allowed" / "below")):
        pytest.fail("the link was followed")


def test_a_scan_stays_with_the_folder_that_was_opened_and_passes_over_links(place: Path) -> None:
    with AllowList([place / "allowed"]).open(str(place / "allowed")) as folder:
        (place / "allowed").rename(place / "elsewhere")
        (place / "allowed").symlink_to(place / "secret")
        found = scan(
            folder, pattern=None, recursive=True, hash_mode="sha256", limit=10, clock=SystemClock()
        )
    assert [row["path"] for row in found["files"]] == ["b.txt", "below/a.csv"]
    assert all(len(row["hash"]) == 64 for row in found["files"])


def test_a_scan_follows_pattern_depth_and_limit(place: Path) -> None:
    def paths(pattern: str | None, *, recursive: bool = True, limit: int = 10) -> list[str]:
        with AllowList([place / "allowed"]).open(str(place / "allowed")) as folder:
            found = scan(
                folder,
                pattern=pattern,
                recursive=recursive,
                hash_mode="fast",
                limit=limit,
                clock=SystemClock(),
            )
        assert found["truncated"] == (len(found["files"]) < found["file_count"])
        return [row["path"] for row in found["files"]]

    assert paths("*.csv") == ["below/a.csv"]
    assert paths(None, recursive=False) == ["b.txt"]
    assert paths(None, limit=1) == ["b.txt"]
    with pytest.raises(UsageError):
        paths("[")


def test_values_are_hashed_with_a_key_and_numbers_and_times_are_not() -> None:
    redactor = Redactor(RedactionMode.HASH, KEY)
    row = redactor.row([None, True, 3, 1.5, decimal.Decimal("1.10"), dt.date(2026, 1, 2), "Ann"])
    assert row[:6] == [None, True, 3, 1.5, "1.10", "2026-01-02"]
    assert row[6].startswith("[hash:")
    assert len(row[6]) == len("[hash:12345678]")
    assert redactor.value("Ann") == row[6] != Redactor(RedactionMode.HASH, b"other").value("Ann")
    for nested in (b"Ann", ["Ann"], {"name": "Ann"}, ("Ann", {"a": [b"Ann"]})):
        assert "Ann" not in json.dumps(redactor.value(nested))
    assert redactor.value(float("nan")) == "nan"
    assert Redactor(RedactionMode.HASH, KEY, frozenset({"FAILED"})).value("FAILED") == "FAILED"


def test_messages_lose_what_they_quote() -> None:
    text = "could not convert string 'Ann Smith' (\"x\") in row 12345678 to float"
    hashed = Redactor(RedactionMode.HASH, KEY).message(text)
    assert "Ann" not in hashed
    assert "12345678" not in hashed
    assert hashed.startswith("could not convert string [hash:")
    assert Redactor(RedactionMode.NONE, KEY).message(text) == text


def test_a_call_may_ask_for_more_redaction_and_never_for_less() -> None:
    assert stricter(RedactionMode.TRUNCATE, None) is RedactionMode.TRUNCATE
    assert stricter(RedactionMode.TRUNCATE, RedactionMode.HASH) is RedactionMode.HASH
    for asked in (RedactionMode.NONE, RedactionMode.TRUNCATE):
        with pytest.raises(NotPermittedError):
            stricter(RedactionMode.HASH, asked)
    cut = Redactor(RedactionMode.TRUNCATE, KEY).value("é" * 500)
    assert cut == "é" * 100 + "…"


def test_an_answer_holds_no_more_than_its_rows_and_bytes() -> None:
    assert fitting(range(ROWS_MAX + 5), limit=10**9) == (list(range(ROWS_MAX)), True)
    assert fitting([1, 2], limit=2) == ([1, 2], False)
    for fill in ("x", "\n", "é", "\U0001f600", '"'):
        kept, cut = fitting(fill * 1_000 for _ in range(5_000))
        assert cut
        assert len(fitted({"rows": kept}, ["rows"]).encode()) <= ANSWER_BYTES_MAX
    whole = fitted({"rows": ["x" * ANSWER_BYTES_MAX], "truncated": False}, ["rows"])
    assert json.loads(whole) == {"rows": [], "truncated": True}


def test_the_audit_log_is_its_owners_alone_and_a_line_stays_a_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.ndjson")
    log.require()
    log.write({"tool": "x\ny\u2028", "arguments": {"sql": "a\nb"}})
    log.write({"tool": "big", "arguments": {"sql": "\n\u2028\ud800" * 100_000}})
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    lines = log.path.read_bytes().splitlines()
    assert [json.loads(line)["tool"] for line in lines] == ["x\ny\u2028", "big"]
    assert all(len(line) <= LINE_BYTES_MAX for line in lines)


def test_no_audit_line_is_written_where_others_could_read_it(tmp_path: Path) -> None:
    shared = tmp_path / "shared.ndjson"
    shared.write_text("")
    shared.chmod(0o644)
    linked = tmp_path / "link.ndjson"
    linked.symlink_to(tmp_path / "private.ndjson")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    for path in (shared, linked, fifo, tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(AuditError):
            AuditLog(path).write({"tool": "x"})
    assert not (tmp_path / "private.ndjson").exists()
    assert shared.read_text() == ""
