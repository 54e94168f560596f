"""Each cause of "nothing happens" is named when it holds, with its cure, and only then."""

from typing import Any

import pytest

from casparian_flow.domain.jobs import JobStatus
from casparian_flow.sentinel.causes import Facts, explain

PLUGIN = {
    "plugin_name": "sales",
    "version": "1.0.0",
    "wired": True,
    "jobs": 3,
    "queued": 0,
    "delayed": 0,
    "completed": 3,
    "a_completed_job": 3,
    "outputs": 3,
    "uris": ["parquet://sales"],
    "paused": False,
    "pause_reason": "",
}
WORKER = {"worker_id": "w", "capabilities": ["*"]}


def facts(
    plugin: dict[str, Any] | None = None,
    counts: dict[str, int] | None = None,
    standing: dict[str, Any] | None = None,
    **changes: Any,
) -> Facts:
    """A healthy system with work under way, but for what is given."""
    jobs = {status.value: 0 for status in JobStatus} | {"RUNNING": 1, "COMPLETED": 3}
    fields: dict[str, Any] = {
        "running": True,
        "problem": None,
        "jobs": jobs | (counts or {}),
        "standing": {
            "sources": 1,
            "files": 3,
            "scans": 1,
            "dead_letters": 0,
            "plugins": [PLUGIN | (plugin or {})],
            "rejected": [],
            "staged": [],
            "last_failure": [],
        }
        | (standing or {}),
        "workers": [WORKER],
    }
    return Facts(**(fields | changes))


QUEUED = {"counts": {"QUEUED": 2}}
REJECTED = [
    {
        "plugin_name": "x",
        "version": "1",
        "validation_error": "plugin class must be named Handler; found: Loader",
    }
]
LAST = [{"job_id": 9, "plugin_name": "sales", "reason": "timeout", "error_message": "a\nslow"}]
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"problem": ("disk full", "Free some space.")}, "disk full", "Free some space."),
    ({"standing": {"sources": 0, "files": 0}}, "no source root", "casparian source add"),
    ({"standing": {"files": 0, "scans": 0}}, "not been scanned", "casparian scan"),
    ({"standing": {"files": 0}}, "no file was found", "Put files there"),
    ({"standing": {"plugins": []}}, "no plugin is deployed", "casparian publish"),
    ({"standing": {"rejected": REJECTED}}, "must be named Handler; found", "named Handler"),
    (
        {"plugin": {"jobs": 0, "completed": 0, "outputs": 0}},
        "matches its rules",
        "casparian backfill sales",
    ),
    ({**QUEUED, "running": False}, "no Sentinel runs", "casparian start"),
    ({**QUEUED, "workers": []}, "no worker is connected", "casparian worker"),
    (
        {**QUEUED, "plugin": {"queued": 2}, "workers": [{"capabilities": ["other"]}]},
        "no connected worker takes",
        "Start a worker",
    ),
    (
        {**QUEUED, "plugin": {"queued": 2, "paused": True, "pause_reason": "5 failed"}},
        "is paused: 5 failed",
        "casparian plugin resume sales",
    ),
    ({**QUEUED, "plugin": {"queued": 2, "version": None}}, "no active version", "Publish it"),
    (
        {**QUEUED, "plugin": {"queued": 2, "delayed": 2}},
        "failed and will be tried",
        "by itself",
    ),
    (
        {"plugin": {"uris": ["parquet://ok\nftp://x"]}},
        "unknown scheme 'ftp'",
        "casparian topics set sales",
    ),
    (
        {"plugin": {"paused": True, "pause_reason": "not trusted: key k was revoked"}},
        "plugin sales is paused: not trusted: key k was revoked",
        "goes on by itself",
    ),
    ({"plugin": {"outputs": 0}}, "wrote nothing", "casparian topics"),
    ({"stuck": [{"job_id": 5, "message": "no"}]}, "its sink refuses: no", "job resolve 5"),
    ({"orphans": [{"job_id": 6, "root_ids": ["r"]}]}, "output root r", "Start a worker"),
    (
        {"standing": {"dead_letters": 2, "last_failure": LAST}},
        "2 jobs failed for good; the last is job 9 of plugin sales: timeout: slow",
        "casparian replay --plugin sales",
    ),
    ({"counts": {"RUNNING": 0}}, "no job is in QUEUED status", "Workers wait"),
]


@pytest.mark.parametrize(("given", "cause", "cure"), CASES, ids=[case[1][:40] for case in CASES])
def test_the_cause_is_named_with_its_cure(given: dict[str, Any], cause: str, cure: str) -> None:
    found = explain(facts(**given))
    assert any(cause in row["cause"] and cure in row["cure"] for row in found), found


def test_nothing_is_said_while_work_goes_on() -> None:
    assert explain(facts()) == []


def test_the_most_basic_cause_comes_first() -> None:
    found = explain(facts(standing={"sources": 0, "files": 0, "plugins": []}, workers=[]))
    assert "no source root" in found[0]["cause"]
    assert "no plugin" in found[1]["cause"]
