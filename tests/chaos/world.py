"""One flow under test: its folder, its plugins, its files and their changes, its processes."""

import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acceptance_kit import Flow, make_flow
from chaos.processes import Service, Zygote

from casparian_flow.cli.idle import active
from casparian_flow.config import load_settings
from casparian_flow.domain.errors import SentinelUnreachableError
from casparian_flow.sentinel.control import ControlClient, remote
from casparian_flow.sentinel.paths import control_address
from casparian_flow.services.trust_file import ensure_own_key
from casparian_worker.sinks.base import token_of_stage

LEASE_S = 1.0
CONFIG = """\
[database]
db_location = "ledger.duckdb"

[sentinel]
bind_address = "tcp://127.0.0.1:{port}"
heartbeat_seconds = 0.3
lease_ttl_seconds = {lease}
retry_base_seconds = {retry}

[worker]
slots = 1
scratch = "scratch"
cache_dir = "cache"
drain_seconds = 10
{worker}

[scout]
interval_seconds = 0.5
settle_seconds = 0.1

[trust]
gatekeeper = "off"
"""
EXACT = '''\
"""The same rows for the same bytes."""
import time
import zlib
from casparian_flow.sdk import BasePlugin, PluginMetadata

TOPICS = ("files", "newest_files", "rows", "newest_rows")
MANIFEST = PluginMetadata(
    pattern="*.txt",
    sinks={{
        "files": "parquet://files",
        "newest_files": "parquet://newest_files?mode=replace",
        "rows": "sqlite://exact.sqlite3",
        "newest_rows": "sqlite://exact.sqlite3?mode=replace",
    }},
)

class Handler(BasePlugin):
    def execute(self, file_path):
        with self.open_input("r") as file:
            lines = file.read().splitlines()
        rows = [
            {{"line": n, "text": t, "crc": zlib.crc32(t.encode())}} for n, t in enumerate(lines)
        ]
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]):
            for topic in TOPICS:
                self.publish(topic, part)
            time.sleep({pause})
'''
CHANCE = '''\
"""Other rows at every run; both topics get the same ones."""
import os
import time
from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern="*.txt",
    sinks={{"dice_files": "parquet://dice", "dice_rows": "sqlite://dice.sqlite3"}},
)

class Handler(BasePlugin):
    def execute(self, file_path):
        draw = os.urandom(8).hex()
        count = 1 + os.urandom(1)[0] % 9
        rows = [{{"draw": draw, "n": n, "roll": os.urandom(4).hex()}} for n in range(count)]
        self.publish("dice_files", rows)
        time.sleep({pause})
        self.publish("dice_rows", rows)
'''
ANSWER_S = 20.0


@dataclass
class World:
    """A folder with a flow in it. Every process is started through the zygote."""

    flow: Flow
    zygote: Zygote
    rng: random.Random
    contents: dict[str, bytes] = field(default_factory=dict)
    """Everything that was ever in a file, by SHA-256."""
    written: Counter[str] = field(default_factory=Counter)
    """How often each file was written."""

    @property
    def folder(self) -> Path:
        return self.flow.folder

    # -- files ------------------------------------------------------------------------------

    def write(self, name: str, content: bytes) -> None:
        """Make or change a file, by a rename or in place."""
        self.contents[hashlib.sha256(content).hexdigest()] = content
        self.written[name] += 1
        path = self.flow.inbox / name
        if path.exists() and self.rng.random() < 0.3:
            with path.open("r+b", buffering=0) as file:
                file.truncate(0)
                file.write(content)
            return
        draft = self.folder / "draft"
        draft.write_bytes(content)
        draft.rename(path)

    def new_content(self, name: str) -> bytes:
        lines = [f"{name} {self.rng.getrandbits(64):x}" for _ in range(self.rng.randint(2, 40))]
        return "\n".join(lines).encode()

    def new_file(self) -> None:
        name = f"{len(self.written):05}.txt"
        self.write(name, self.new_content(name))

    def edit(self, times_max: int) -> None:
        """Change a file that was written fewer than `times_max` times, or only its dates."""
        names = [name for name, times in self.written.items() if times < times_max]
        if not names:
            return
        name = self.rng.choice(names)
        if self.rng.random() < 0.1:
            os.utime(self.flow.inbox / name)
        else:
            self.write(name, self.new_content(name))

    # -- processes --------------------------------------------------------------------------

    def start(self, role: str, *, point: str = "", nth: int = 1) -> Service:
        return self.zygote.start(role, [role], self.folder, point=point, nth=nth)

    def ask(self, question: Callable[[ControlClient], Any]) -> Any:
        """An answer of the Sentinel, or None while there is none."""
        address = control_address(self.folder / "ledger.duckdb", "")
        try:
            with remote(address, timeout_s=ANSWER_S) as control:
                return question(control)
        except SentinelUnreachableError:
            return None

    def counts(self) -> dict[str, int] | None:
        status = self.ask(lambda control: control.status())
        return None if status is None else dict(status["jobs"])

    def rest(self) -> bool:
        """Whether no job has anything ahead of it."""
        counts = self.counts()
        return counts is not None and active(counts) == 0

    def stages(self) -> list[str]:
        return staged(self.folder)

    def settled(self) -> bool:
        """Whether every file's bytes are known as its newest version, and all work is done."""
        newest = self.ask(_newest_hashes)
        if newest is None:
            return False
        on_disk = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.flow.inbox.glob("*.txt")
        }
        return newest == on_disk and self.rest()

    def story(self) -> str:
        """What is known, for a failed test."""
        lines = [f"jobs: {self.counts()}", f"stages: {self.stages()[:20]}"]
        for service in self.zygote.services.values():
            text = service.text.strip()
            if text and service.log.parent.parent == self.folder:
                lines.append(f"-- {service.log.name} ({service.status}):\n{text[-1500:]}")
        return "\n".join(lines[:2] + lines[2:][-20:])


def _newest_hashes(control: ControlClient) -> dict[str, str]:
    rows = control.list_files(limit=100_000)
    return {row["rel_path"]: row["content_hash"] for row in rows if not row["deleted_at"]}


def staged(folder: Path) -> list[str]:
    """Names of the stages in a world's output root."""
    place = folder / "output" / ".stage"
    names = [p.name for p in place.iterdir()] if place.is_dir() else []
    return sorted(name for name in names if token_of_stage(name))


def make_world(
    folder: Path, zygote: Zygote, seed: int, worker: str = "", retry_base_s: float = 0.1
) -> World:
    """A flow that watches its inbox.

    Args:
        worker: more lines for the section `[worker]`.
    """
    flow = make_flow(folder, "ledger.duckdb")
    config = CONFIG.format(port=flow.port, lease=LEASE_S, worker=worker, retry=retry_base_s)
    ensure_own_key(load_settings(flow.write("global_config.toml", config)))
    flow.json("source", "add", "inbox")
    return World(flow, zygote, random.Random(seed))


def publish(world: World, name: str, source: str) -> None:
    """Publish a plugin while no Sentinel runs."""
    file = world.flow.write(f"plugins/{name}.py", source)
    world.flow.json("publish", str(file), "--version", "1.0.0")


def wait_until(world: World, what: str, condition: Callable[[], object], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"in vain for {timeout_s:g} s: {what}\n{world.story()}")
        time.sleep(0.1)
