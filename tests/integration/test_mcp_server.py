"""The MCP server with the SDK's own client, over both transports, beside a Sentinel and a worker.

What goes in: calls of tools, and a person's decisions by command. What is observed: answers, the
audit log, published files. `casparian mcp serve` is the real command; nothing is replaced.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pyarrow.parquet as pq
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_kit import CANARY, PEOPLE, McpPlace, mcp_place
from worker_process import wait_until, worker_process

from casparian_flow.config import load_settings, overridden
from casparian_flow.domain.clock import SystemClock
from casparian_flow.domain.errors import ConfigError
from casparian_flow.mcp_server.audit import AuditLog
from casparian_flow.mcp_server.desk import Desk
from casparian_flow.mcp_server.job_requests import PENDING_MAX
from casparian_flow.mcp_server.server import ToolServer
from casparian_flow.mcp_server.serving import check_exposure, is_loopback
from casparian_flow.mcp_server.tools import TOOLS
from casparian_flow.protocol.http_types import ApprovalStatus, HttpJobStatus, HttpJobType
from casparian_flow.sentinel.control import connect

CASPARIAN = Path(sys.executable).with_name("casparian")
TOKEN = "t0ken-of-a-test-" * 3
PATIENCE_S = 90.0
REF = {"plugin": "people"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[McpPlace]:
    with (
        mcp_place(tmp_path_factory.mktemp("mcp")) as made,
        worker_process(made.sentinel.bind_address, made.folder, "--slots", "1"),
    ):
        yield made


Talk = Callable[[Client], Awaitable[None]]


def over_stdio(place: McpPlace, talk: Talk) -> None:
    """One client that starts the server itself, as clients do."""

    async def run() -> None:
        server = StdioServerParameters(
            command=str(CASPARIAN), args=["--config", str(place.config), "mcp", "serve"]
        )
        async with Client(stdio_client(server)) as client:
            await talk(client)

    asyncio.run(run())


def over_http(address: str, talk: Talk, token: str = "") -> None:
    async def run() -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            httpx2.AsyncClient(headers=headers, timeout=PATIENCE_S) as http,
            Client(streamable_http_client(address, http_client=http)) as client,
        ):
            await talk(client)

    asyncio.run(run())


@contextmanager
def http_server(place: McpPlace, *options: str, **environment: str) -> Iterator[str]:
    """`casparian mcp serve --http` on a free port; its address."""
    process = subprocess.Popen(
        [CASPARIAN, "--config", place.config, "mcp", "serve", "--http", "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving MCP at "), line
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)


async def answer(client: Client, tool: str, **arguments: Any) -> Any:
    result = await client.call_tool(tool, arguments)
    (content,) = result.content
    assert content.type == "text"
    assert not result.is_error, content.text
    return json.loads(content.text)


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    (content,) = result.content
    assert content.type == "text"
    assert result.is_error, content.text
    return content.text


def person(place: McpPlace, *argv: str) -> str:
    """What a person's command prints."""
    done = subprocess.run(
        [CASPARIAN, "--config", place.config, *argv],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.stdout + done.stderr


async def finished(client: Client, job_id: int) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            job = await answer(client, "casparian_job_status", job_id=job_id)
            if HttpJobStatus(job["status"]).is_terminal:
                return job
            await asyncio.sleep(0.2)


def test_a_client_looks_tries_and_asks_and_a_person_decides(place: McpPlace) -> None:
    folder = str(place.inbox / "new")

    async def talk(client: Client) -> None:
        offered = {tool.name for tool in (await client.list_tools()).tools}
        assert offered == set(TOOLS)
        assert not any("approve" in name or "decide" in name for name in offered)

        (plugin,) = (await answer(client, "casparian_plugins"))["plugins"]
        assert (plugin["plugin"], plugin["version"], plugin["status"]) == (
            "people", "1.0.0", "ACTIVE"
        )  # fmt: skip
        found = await answer(client, "casparian_scan", path=str(place.inbox), pattern="*.csv")
        assert [f["path"] for f in found["files"]] == [f"new/{n}.csv" for n in "abc"]

        shown = await answer(
            client, "casparian_preview", plugin_ref=REF, input_dir=folder, files=["a.csv"], limit=5
        )
        assert shown["status"] == "completed"
        (row,) = shown["outputs"]["people"]["rows"]
        assert row["n"] == 1
        assert row["name"].startswith("[hash:")

        tried = await answer(
            client, "casparian_backtest_start", plugin_ref=REF, input_dir=folder, fail_fast=False
        )
        job = await finished(client, tried["job_id"])
        assert job["status"] == "completed"
        (violation,) = job["violations"]
        assert (violation["column_name"], violation["count"]) == ("n", 1)
        assert violation["samples"][0].startswith("[hash:")
        assert list(place.output.rglob("*.parquet")) == []

        asked = await answer(
            client,
            "casparian_run_request",
            plugin_ref=REF,
            input_dir=folder,
            output="parquet://asked",
        )
        assert asked["status"] == "pending_approval"
        assert list(place.output.rglob("*.parquet")) == []
        assert asked["approval_id"] in person(place, "mcp", "list")
        words = asked["approve_command"].split()
        assert words == [
            "casparian", "--config", str(place.config), "mcp", "approve", asked["approval_id"]
        ]  # fmt: skip
        person(place, *words[3:])
        async with asyncio.timeout(PATIENCE_S):
            while True:
                stands = await answer(
                    client, "casparian_approval_status", approval_id=asked["approval_id"]
                )
                if "job_id" in stands:
                    break
                await asyncio.sleep(0.2)
        assert (await finished(client, stands["job_id"]))["status"] == "completed"

        rows = await answer(client, "casparian_query", sql="SELECT n, name FROM people ORDER BY n")
        assert [n for n, _ in rows["rows"]] == [1, 3, 4]
        assert all(name.startswith("[hash:") for _, name in rows["rows"])

    over_stdio(place, talk)
    assert len(list((place.output / "asked").glob("*.parquet"))) == 3
    table = pq.read_table(next(iter(sorted((place.output / "asked").glob("*.parquet")))))
    assert "name" in table.column_names
    tools = [line["tool"] for line in place.audit()]
    assert {"casparian_preview", "casparian_run_request", "casparian_query"} <= set(tools)
    assert {line["transport"] for line in place.audit()} == {"stdio"}


def test_a_file_added_after_the_request_makes_it_stale_and_nothing_runs(place: McpPlace) -> None:
    folder = place.inbox / "stale"
    folder.mkdir()
    (folder / "a.csv").write_text("name,n\neve,5\n")
    place.scan()
    tools = place.tools()
    text, failed = tools.call(
        "casparian_run_request",
        {"plugin_ref": REF, "input_dir": str(folder), "output": "parquet://stale"},
    )
    assert not failed, text
    approval_id = json.loads(text)["approval_id"]
    (folder / "b.csv").write_text("name,n\nfay,6\n")
    place.scan()
    told = person(place, "mcp", "approve", approval_id)
    assert "stale" in told
    text, _ = tools.call("casparian_approval_status", {"approval_id": approval_id})
    stands = json.loads(text)
    assert stands["status"] == "stale"
    assert "number of files" in stands["stale_reason"]
    assert not (place.output / "stale").exists()


def test_a_trial_takes_contracts_and_no_plugin_by_its_path(place: McpPlace, tmp_path: Path) -> None:
    tools, folder = place.tools(), str(place.inbox / "new")
    text, failed = tools.call(
        "casparian_backtest_start",
        {
            "plugin_ref": REF,
            "input_dir": folder,
            "schemas": {"people": [{"name": "name"}, {"name": "n"}]},
        },
    )
    assert not failed, text
    job_id = json.loads(text)["job_id"]

    def shown() -> Any:
        return json.loads(tools.call("casparian_job_status", {"job_id": job_id})[0])

    wait_until(lambda: HttpJobStatus(shown()["status"]).is_terminal, PATIENCE_S)
    assert (shown()["status"], shown()["violations"]) == ("completed", [])
    assert shown()["result"]["rows_processed"] == 4

    (tmp_path / "plugin.py").write_text(PEOPLE)
    for tool in ("casparian_backtest_start", "casparian_run_request", "casparian_preview"):
        for plugin_ref in ({"path": str(tmp_path / "plugin.py")}, REF | {"path": "plugin.py"}):
            text, failed = tools.call(tool, {"plugin_ref": plugin_ref, "input_dir": folder})
            assert failed, text


def test_http_serves_on_loopback_and_with_a_token_only_who_has_it(place: McpPlace) -> None:
    async def talk(client: Client) -> None:
        assert len((await client.list_tools()).tools) == len(TOOLS)
        told = await refusal(client, "casparian_scan", path="/etc")
        assert "no folder in reach" in told
        with pytest.raises(MCPError, match="no tool"):
            await client.call_tool("casparian_approval_decide", {})
        jobs = await asyncio.gather(*(answer(client, "casparian_job_list") for _ in range(8)))
        assert all(job == jobs[0] for job in jobs)

    def status(address: str, headers: dict[str, str]) -> int:
        body = b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}'
        kind = {"Content-Type": "application/json", "Accept": "application/json"}
        asked = urllib.request.Request(address, body, kind | headers)
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE_S) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    with http_server(place, CASPARIAN_MCP__TOKEN=TOKEN) as address:
        assert address.startswith("http://127.0.0.1:")
        over_http(address, talk, TOKEN)
        for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {TOKEN}"}):
            assert status(address, wrong) == 401
        for path in ("", "/other"):
            assert status(address.removesuffix("/mcp") + path, {}) == 401
        mine = {"Authorization": f"Bearer {TOKEN}"}
        # What a page in a browser could send after it had its name point here.
        assert status(address, mine | {"Host": "evil.example"}) == 421
        assert status(address, mine | {"Origin": "https://evil.example"}) == 403


def test_http_without_a_token_is_for_this_machine_and_its_own_names(place: McpPlace) -> None:
    async def talk(client: Client) -> None:
        assert len((await client.list_tools()).tools) == len(TOOLS)

    with http_server(place, "--host", "127.0.0.2") as address:
        over_http(address, talk)
        asked = urllib.request.Request(
            address,
            b"{}",
            {"Content-Type": "application/json", "Host": "evil.example:80"},
        )
        with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(asked):
            pass
        with caught.value as error:
            assert error.code == 421
    told = person(place, "mcp", "serve", "--http", "--host", "0.0.0.0", "--port", "0")
    assert "no token" in told


def test_an_address_beyond_this_machine_wants_a_token() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="no token"):
            check_exposure(host, "")
        check_exposure(host, TOKEN)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        check_exposure(host, "")
    with pytest.raises(ConfigError, match="at least"):
        check_exposure("127.0.0.1", "short")


def test_a_run_of_somebody_else_is_not_cancelled_and_a_trial_is(place: McpPlace) -> None:
    tools = place.tools()
    with place.control() as control:
        theirs = control.api.create_job(HttpJobType.RUN, "people", None, "/data")
        trial = control.api.create_job(HttpJobType.BACKTEST, "people", None, "/data")
    text, failed = tools.call("casparian_job_cancel", {"job_id": theirs})
    assert failed
    assert "not asked for by" in text
    for expected in ("cancelled", "already_completed"):
        text, failed = tools.call("casparian_job_cancel", {"job_id": trial})
        assert json.loads(text)["status"] == expected
    text, _ = tools.call("casparian_job_cancel", {"job_id": 10**9})
    assert json.loads(text)["status"] == "not_found"
    with place.control() as control:
        job = control.api.get_job(theirs)
        assert job is not None
        assert job.status is HttpJobStatus.QUEUED
        assert control.api.cancel_job(theirs)


def test_no_more_requests_wait_than_a_person_can_look_at(place: McpPlace) -> None:
    asked = {"plugin_ref": REF, "input_dir": str(place.inbox / "new"), "output": "parquet://many"}
    tools = place.tools()
    answers = [tools.call("casparian_run_request", asked) for _ in range(PENDING_MAX + 1)]
    assert [failed for _, failed in answers].count(True) >= 1
    assert "wait for a person" in answers[-1][0]
    with place.control() as control:
        waiting = control.api.list_approvals(ApprovalStatus.PENDING)
        assert len(waiting) == PENDING_MAX
        assert all(w.expires_at - w.created_at == timedelta(hours=1) for w in waiting)
        for approval in waiting:
            assert control.api.reject(approval.approval_id)
    assert not (place.output / "many").exists()


def test_without_an_audit_log_nothing_is_answered(place: McpPlace, tmp_path: Path) -> None:
    settings = overridden(place.settings, "mcp", audit_log=tmp_path / "no" / "audit.ndjson")
    text, failed = place.tools(settings).call("casparian_plugins", {})
    assert failed
    assert "audit log" in text
    assert "people" not in text


def test_less_redaction_than_configured_is_refused_and_more_is_done(place: McpPlace) -> None:
    asked = {"sql": "SELECT path FROM cf_source_root", "redaction": "none"}
    text, failed = place.tools().call("casparian_query", asked)
    assert failed
    assert str(place.inbox) not in text
    open_settings = overridden(place.settings, "mcp", redaction="none")
    text, _ = place.tools(open_settings).call("casparian_query", asked)
    assert json.loads(text)["rows"] == [[str(place.inbox)]]


def test_without_a_sentinel_each_call_opens_the_ledger_and_leaves_it_to_others(
    tmp_path: Path,
) -> None:
    with mcp_place(tmp_path) as place:
        pass
    tools = place.tools()
    text, failed = tools.call(
        "casparian_preview", {"plugin_ref": REF, "input_dir": str(place.inbox)}
    )
    assert not failed, text
    assert json.loads(text)["status"] == "queued"
    with place.control() as control:
        assert control.status()["sentinel"] is None
    text, failed = tools.call("casparian_scan", {"path": str(place.outside)})
    assert failed
    assert CANARY not in text
    wait_until(lambda: not list(place.folder.glob("*.state/snapshots/*")), PATIENCE_S)


def test_a_call_makes_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "global_config.toml").write_text("")
    settings = load_settings(tmp_path / "global_config.toml")
    tools = ToolServer(Desk(settings, connect, SystemClock()), AuditLog(tmp_path / "log"), "test")
    for tool in ("casparian_plugins", "casparian_job_list"):
        text, failed = tools.call(tool, {})
        assert failed
        assert "no ledger" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_config.toml", "log"]
