"""A place for tests of the MCP server: a Sentinel, a plugin, a source root, and what is beside it.

outside/  canary files that no call may reach
inbox/    the source root, with three CSV files and a link to outside/
output/   where the worker, if a test starts one, publishes
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
from signing_kit import lax_rules, signed

from casparian_flow.config import Settings, load_settings
from casparian_flow.db import snapshot
from casparian_flow.domain.clock import SystemClock
from casparian_flow.mcp_server.audit import AuditLog
from casparian_flow.mcp_server.desk import Desk
from casparian_flow.mcp_server.server import ToolServer
from casparian_flow.sentinel.control import ControlClient, connect
from casparian_flow.sentinel.server import Sentinel, SentinelConfig
from casparian_flow.services.scout import scan
from casparian_flow.trust.bundle import pack

CANARY = "canary-7f3ac91e"
PATIENCE_S = 60.0
PEOPLE = """
import csv
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(subscriptions=["by_hand"], outputs={
    "people": {
        "columns": [{"name": "name"}, {"name": "n", "type": "int64"}],
        "quarantine": {"allow": True, "max_pct": 60.0},
    },
})

class Handler(BasePlugin):
    def execute(self, file_path):
        with open(file_path, newline="") as file:
            self.publish("people", list(csv.DictReader(file)))
"""
FILES = {"a.csv": "name,n\nann,1\nbob,x\n", "b.csv": "name,n\ncid,3\n", "c.csv": "name,n\ndan,4\n"}


class McpPlace:
    """See the module's text; `sentinel` runs in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inbox, self.outside, self.output = (
            folder / name for name in ("inbox", "outside", "output")
        )
        for made in (self.inbox / "new", self.outside, self.output):
            made.mkdir(parents=True)
        for name, text in FILES.items():
            (self.inbox / "new" / name).write_text(text)
        (self.outside / f"{CANARY}.csv").write_text(f"name,n\n{CANARY},1\n")
        (self.inbox / "out").symlink_to(self.outside)
        self.config = folder / "global_config.toml"
        self.config.write_text("[mcp]\nquery_timeout_seconds = 20\n")
        self.settings: Settings = load_settings(self.config)
        self.sentinel = Sentinel(
            SentinelConfig(
                bind_address="tcp://127.0.0.1:*",
                database=self.settings.database.db_location,
                drain_s=0.0,
                heartbeat_s=0.5,
                trust=lax_rules,
                trials=False,
            )
        )
        self._thread = threading.Thread(target=self.sentinel.run, daemon=True)
        self._thread.start()
        assert self.sentinel.wait_started(PATIENCE_S)
        with self.control() as control:
            self.root = int(control.add_source(str(self.inbox), settle_seconds=0.0)["id"])
            control.deploy(pack(signed(PEOPLE, "people", "1.0.0")))
        self.scan()

    def control(self) -> ControlClient:
        return connect(self.settings)

    def scan(self) -> None:
        with self.control() as control:
            scan(self.root, control)

    def stop(self) -> None:
        self.sentinel.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def tools(self, settings: Settings | None = None) -> ToolServer:
        """The tools in this process, without a transport."""
        chosen = settings or self.settings
        desk = Desk(chosen, connect, SystemClock())
        return ToolServer(desk, AuditLog(chosen.mcp.audit_log), "test")

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.settings.mcp.audit_log.read_text().splitlines()]

    def files(self) -> dict[str, str]:
        """Digest of every file that is nobody's own bookkeeping."""
        own = (self.settings.mcp.audit_log.name, self.settings.database.db_location.name)
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not path.relative_to(self.folder).parts[0].startswith(own)
        }

    def rows(self) -> dict[str, list[Any]]:
        """What the ledger holds of work and outputs; trials that publish nothing do not count."""
        with self.control() as control:
            copy = Path(control.snapshot())
        try:
            with duckdb.connect(str(copy), read_only=True) as ledger:
                return {
                    table: ledger.execute(f"SELECT * FROM {table} {where} ORDER BY ALL").fetchall()
                    for table, where in (
                        ("cf_processing_queue", "WHERE rehearsal IS NULL"),
                        ("cf_output", ""),
                        ("cf_file_version", ""),
                        ("cf_plugin_manifest", ""),
                        ("cf_topic_config", ""),
                        ("cf_routing_rule", ""),
                        ("cf_source_root", ""),
                    )
                }
        finally:
            snapshot.remove(copy)


@contextmanager
def mcp_place(folder: Path) -> Iterator[McpPlace]:
    place = McpPlace(folder)
    try:
        yield place
    finally:
        place.stop()
