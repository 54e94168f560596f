"""A model gone astray: random and hostile calls of every tool change nothing and reach nothing.

What goes in: calls that are sound, nearly sound or nonsense, from a seed. What is observed: every
call's answer, the digests of all files, the ledger's rows of work and outputs, and every absolute
path that this process opened or listed meanwhile. No worker runs: what a call might start would
stay in the queue, where it would be seen.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Fuzz
from mcp.shared.exceptions import MCPError
from mcp_kit import CANARY, McpPlace, mcp_place

from casparian_flow.mcp_server import job_requests
from casparian_flow.mcp_server.budget import ANSWER_BYTES_MAX
from casparian_flow.mcp_server.job_requests import PENDING_MAX, TRIALS_MAX
from casparian_flow.mcp_server.tools import TOOLS

CALLS = int(os.environ.get("CASPARIAN_FUZZ_MCP_CALLS", "1000"))
QUERY_SHARE = 0.03
"""Of all calls: each takes a process and a copy of the ledger."""
SQL = (
    "SELECT * FROM cf_output",
    "SELECT path FROM cf_source_root",
    "DELETE FROM cf_processing_queue",
    "COPY (SELECT 1) TO '{0}/output/x.parquet'",
    "SELECT * FROM read_csv('{0}/outside/{1}.csv')",
    "SELECT * FROM '{0}/outside/{1}.csv'",
    "SELECT * FROM read_text('{0}/inbox/out/{1}.csv')",
    "SELECT * FROM glob('{0}/outside/*')",
    "ATTACH '{0}/outside/new.duckdb'",
    "SET enable_external_access = true; SELECT 1",
    "SELECT repeat('x', 100000000)",
    "EXPORT DATABASE '{0}/outside'",
)
PATHS = (
    "{0}/inbox",
    "{0}/inbox/new",
    "{0}/outside",
    "{0}/inbox/out",
    "{0}/inbox/../outside",
    "{0}/inbox/out/../../outside",
    "{0}",
    "/",
    "/etc",
    "/proc/self/cwd",
    "{0}/inbox/new/../../outside",
    "{0}/inbox/\\x2e\\x2e/outside",
)


class OpenedPaths:
    """Absolute paths that this process opens or lists, while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.seen: set[str] = set()
        sys.addaudithook(self._hook)  # for good: hooks cannot be taken away

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in {"open", "os.listdir", "os.scandir", "os.chdir", "os.remove"}:
            path = arguments[0]
            if isinstance(path, str | bytes):
                self.seen.add(os.fsdecode(path))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[McpPlace]:
    with mcp_place(tmp_path_factory.mktemp("astray")) as made:
        yield made


def sound(fuzz: Fuzz, tool: str, folder: Path) -> dict[str, Any]:
    """Arguments as the tool's schema wants them, with hostile values for those that matter."""
    rng = fuzz.rng
    path = rng.choice(PATHS).replace("{0}", str(folder))
    sql = rng.choice(SQL).replace("{0}", str(folder)).replace("{1}", CANARY)
    known: dict[str, Any] = {
        "path": path, "input_dir": path, "sql": sql, "pattern": rng.choice(("*.csv", "**/*", "[")),
        "recursive": rng.random() < 0.8, "hash_mode": rng.choice(("none", "fast", "sha256")),
        "limit": rng.choice((1, 20, 100)), "redaction": rng.choice((None, "hash", "none")),
        "plugin_ref": {"plugin": rng.choice(("people", "people", "x")), "version": None},
        "files": rng.choice(([], ["a.csv"], ["../../outside/x.csv"], [str(folder / "outside")])),
        "output": rng.choice(
            (None, "parquet://x", f"sqlite://{folder}/outside/x.db", "parquet://../outside")
        ),
        "schemas": rng.choice(
            ({}, {"people": [{"name": "n"}]}, {"../x": [{"name": "n"}]}, {"people": {"mode": sql}})
        ),
        "fail_fast": False, "job_id": rng.choice((0, 1, 2, 2**62)), "include_dev": True,
        "status": rng.choice(("pending", "queued", "all")), "approval_id": rng.choice(("x", "1")),
    }  # fmt: skip
    wanted = TOOLS[tool].schema()["properties"]
    return {name: value for name, value in known.items() if name in wanted}


def drawn(fuzz: Fuzz, folder: Path) -> tuple[str, dict[str, Any]]:
    rng = fuzz.rng
    names = [name for name in TOOLS if name != "casparian_query"]
    tool = "casparian_query" if rng.random() < QUERY_SHARE else rng.choice(names)
    arguments = sound(fuzz, tool, folder)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        if arguments and rng.random() < 0.8:
            arguments[rng.choice(list(arguments))] = fuzz.value()
        else:
            arguments[rng.choice(("approve", "decision", "force", ""))] = fuzz.value()
    if rng.random() < 0.02:
        tool = rng.choice(("casparian_approval_decide", "approve", "\0", "x" * 9_000))
    return tool, arguments


@pytest.mark.timeout(300 + CALLS / 5)
def test_no_call_changes_or_reaches_what_it_must_not(
    place: McpPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a worker no preview ends; its caller need not wait here.
    monkeypatch.setattr(job_requests, "PREVIEW_WAIT_S", 0.0)
    fuzz = Fuzz("mcp calls")
    tools, opened = place.tools(), OpenedPaths()
    files, rows = place.files(), place.rows()
    outcomes: Counter[str] = Counter()
    for _ in range(CALLS):
        tool, arguments = drawn(fuzz, place.folder)
        opened.on = True
        try:
            text, failed = tools.call(tool, arguments)
        except MCPError as error:
            text, failed = str(error), True
        finally:
            opened.on = False
        outcomes["failed" if failed else "answered"] += 1
        assert "unexpectedly" not in text, (tool, arguments, text)
        assert len(text.encode(errors="replace")) <= ANSWER_BYTES_MAX
        if str(place.outside) not in str(arguments):
            assert CANARY not in text, (tool, arguments)
    print(dict(outcomes))
    assert min(outcomes["failed"], outcomes["answered"]) > CALLS / 20
    assert place.files() == files
    assert place.rows() == rows
    assert not {path for path in opened.seen if path.startswith((str(place.outside), "/etc"))}
    assert len(place.audit()) == CALLS
    with place.control() as control:
        assert len(control.api.list_approvals()) <= PENDING_MAX
        assert all(approval.status == "pending" for approval in control.api.list_approvals())
        assert len(control.api.list_jobs()) <= TRIALS_MAX + outcomes["answered"]
        assert control.check() == []
