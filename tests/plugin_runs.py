"""Run a plugin's source text in the real host and look at what it did."""

import hashlib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from casparian_flow.domain.records import Limits
from casparian_flow.protocol.messages import Plugin
from casparian_worker.plugin_events import (
    Batch,
    Event,
    Failed,
    Finished,
    RunRequest,
    Started,
)
from casparian_worker.plugin_host import PluginHost
from casparian_worker.runtime import PluginRuntime


def make_plugin(
    source: str, *, parameters: str = "{}", lockfile: str = "", **limits: object
) -> Plugin:
    """A plugin's spec; `limits` replace those of a small test plugin."""
    text = textwrap.dedent(source)
    given: dict[str, object] = {"timeout_s": 30.0, "memory_mb": 1024, "log_bytes": 4096}
    return Plugin(
        spec_id=hashlib.sha256(text.encode()).hexdigest(),
        plugin_name="under_test",
        plugin_version="1.0.0",
        artifact_hash="",
        source_code=text,
        lockfile=lockfile,
        env_hash="",
        sinks=(),
        parameters_json=parameters,
        parameters_hash="",
        limits=Limits(**(given | limits)),  # type: ignore[arg-type]
    )


def handler(body: str, *, before: str = "", topic: str = "out") -> str:
    """A module whose `execute` has this body."""
    return (
        "from casparian_flow.sdk import *\n"
        f"MANIFEST = PluginMetadata(pattern='*', topic={topic!r})\n"
        + textwrap.dedent(before)
        + "\nclass Handler(BasePlugin):\n    def execute(self, file_path):\n"
        + textwrap.indent(textwrap.dedent(body).strip() or "pass", "        ")
        + "\n"
    )


@dataclass
class Run:
    """All that one job led to."""

    outcome: Finished | Failed
    batches: list[Batch] = field(default_factory=list)
    started: bool = False

    @property
    def failed(self) -> Failed:
        assert isinstance(self.outcome, Failed), self.outcome
        return self.outcome

    @property
    def finished(self) -> Finished:
        assert isinstance(self.outcome, Finished), self.outcome
        return self.outcome

    def table(self, topic: str = "out") -> pa.Table:
        self.finished  # noqa: B018 - shows the failure instead
        return pa.Table.from_batches([b.batch for b in self.batches if b.topic == topic])

    def rows(self, topic: str = "out") -> list[dict[str, object]]:
        rows: list[dict[str, object]] = self.table(topic).to_pylist()
        return rows


def collect(events: Iterable[Event]) -> dict[str, Run]:
    """Events by job; every job must have exactly one outcome, its last event."""
    runs: dict[str, Run] = {}
    batches: dict[str, list[Batch]] = {}
    started: set[str] = set()
    for event in events:
        assert event.key not in runs, f"an event after the outcome: {event}"
        if isinstance(event, Started):
            started.add(event.key)
        elif isinstance(event, Batch):
            assert event.key in started
            batches.setdefault(event.key, []).append(event)
        else:
            runs[event.key] = Run(event, batches.get(event.key, []), event.key in started)
    return runs


class Bench:
    """A worker's plugin machinery with one slot."""

    def __init__(self, runtime: PluginRuntime, folder: Path) -> None:
        self.runtime = runtime
        self.folder = folder
        self.hosts: list[PluginHost] = []

    def host(self, source: str, **options: object) -> PluginHost:
        host = self.runtime.host(make_plugin(source, **options), slot=0)  # type: ignore[arg-type]
        self.hosts.append(host)
        return host

    def file(self, name: str = "input.txt", content: bytes = b"hello\n") -> str:
        """A file where the slot's plugin may read it."""
        folder = self.runtime._scratch.slot(0).new_input("job")
        path = Path(folder, name)
        path.write_bytes(content)
        path.chmod(0o444)
        return str(path)

    def run(self, source: str, *, path: str = "", **options: object) -> Run:
        """Run one job in a process of its own."""
        host = self.host(source, **options)
        try:
            return self.again(host, path=path)
        finally:
            host.stop()

    def again(self, host: PluginHost, *, path: str = "", key: str = "job") -> Run:
        """Run one job in a host's warm process."""
        request = RunRequest(key, path or self.file())
        return collect(host.run(request))[key]

    def close(self) -> None:
        for host in self.hosts:
            host.stop()
