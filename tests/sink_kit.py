"""Builders for tests of sinks: an output root, jobs of one file, rows with lineage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from casparian_flow.domain.outputs import OutputEntry, OutputKind, SinkMode
from casparian_worker.lineage import Lineage, global_job_id
from casparian_worker.sinks.base import JobRun, Receipt, Sink, SinkEnvironment, StageContext
from casparian_worker.sinks.registry import sink_for
from casparian_worker.sinks.root import OutputRoot

LEDGER = "7f3ac91e"


def job_run(
    job: int = 1, *, version: int = 1, attempt: int = 1, location: int = 1, manifest: int = 1
) -> JobRun:
    """Job `job` over version `version` of the file at `location`."""
    token = f"{LEDGER}-1-{job}-{attempt}"
    order = (version, manifest, 0)
    return JobRun(token, 1000 * location + version, location, "plugin", "art", "par", order)


def with_lineage(run: JobRun, rows: pa.RecordBatch) -> pa.RecordBatch:
    return Lineage("ab" * 32, global_job_id(run.token), "2026-01-01T00:00:00Z", "1.0").append(rows)


@dataclass
class Output:
    """A sink with what is done to it in most tests."""

    env: SinkEnvironment
    uri: str
    mode: SinkMode = SinkMode.APPEND

    @property
    def sink(self) -> Sink:
        return sink_for(self.uri, self.env)

    def stage(
        self,
        run: JobRun,
        *batches: pa.RecordBatch | dict[str, Any],
        topic: str = "sales",
        kind: OutputKind = OutputKind.OUTPUT,
        n: int = 0,
    ) -> OutputEntry:
        context = StageContext(run, n, topic, kind, self.mode)
        writer = self.sink.open_stage(context)
        try:
            for rows in batches:
                batch = pa.record_batch(rows) if isinstance(rows, dict) else rows
                writer.write(with_lineage(run, batch))
            return writer.finish()
        except BaseException:
            writer.abort()
            raise

    def publish(self, run: JobRun, entry: OutputEntry) -> Receipt:
        receipt = self.sink.publish(entry, run.token)
        self.sink.unstage(entry, run.token)
        return receipt

    def put(self, run: JobRun, *batches: Any, topic: str = "sales") -> OutputEntry:
        """Stage and publish."""
        entry = self.stage(run, *batches, topic=topic)
        self.publish(run, entry)
        return entry

    def path(self, entry: OutputEntry) -> Path:
        return Path(self.env.root.path) / entry.final


def output_at(folder: Path, uri: str, mode: SinkMode = SinkMode.APPEND, **settings: Any) -> Output:
    return Output(SinkEnvironment(OutputRoot.open(folder), **settings), uri, mode)


def files_of(output: Output, pattern: str = "*") -> Sequence[str]:
    """Names of the published files below the output root, without Casparian's own folders."""
    root = Path(output.env.root.path)
    found = (p for p in root.rglob(pattern) if p.is_file())
    return sorted(p.name for p in found if not str(p.relative_to(root)).startswith("."))
