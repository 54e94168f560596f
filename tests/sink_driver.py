"""Run as a script by test_sinks_crash.py: dies at every step of staging and publishing in turn.

It imports everything once and forks a child per kill point, so that a run costs milliseconds.
For each point a first child stages and publishes until it kills itself with SIGKILL; a second one
does what the Sentinel would have another worker do; a third reads the target. One JSON line each.
"""

import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from casparian_flow.domain.outputs import OutputEntry, OutputKind, SinkMode
from casparian_worker.lineage import Lineage, global_job_id
from casparian_worker.sinks import durable
from casparian_worker.sinks.base import JobRun, Sink, SinkEnvironment, StageContext
from casparian_worker.sinks.duckdb import DuckDbTarget
from casparian_worker.sinks.registry import sink_for
from casparian_worker.sinks.root import OutputRoot
from casparian_worker.sinks.sqlite import SqliteTarget

ROWS = 5


def job(version: int, attempt: int) -> JobRun:
    token = f"7f3ac91e-1-{version}-{attempt}"
    return JobRun(token, version, 1, "plugin", "artifact", "parameters", (version, 1, 0))


def batch(run: JobRun) -> pa.RecordBatch:
    rows = pa.record_batch({"id": list(range(ROWS)), "version": [run.version_id] * ROWS})
    return Lineage("ab" * 32, global_job_id(run.token), "now", "1.0").append(rows)


def stage(sink: Sink, run: JobRun, mode: SinkMode) -> OutputEntry:
    writer = sink.open_stage(StageContext(run, 0, "sales", mode=mode))
    writer.write(batch(run))
    return writer.finish()


def publish(sink: Sink, entry: OutputEntry, token: str) -> None:
    sink.publish(entry, token)
    sink.unstage(entry, token)


def save(entry: OutputEntry, path: Path) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(entry)))
    draft.rename(path)


def load(path: Path) -> OutputEntry:
    fields = json.loads(path.read_text())
    fields["kind"] = OutputKind(fields["kind"])
    fields["mode"] = SinkMode(fields["mode"])
    fields["order_no"] = tuple(fields["order_no"])
    return OutputEntry(**fields)


def die_at(point: int) -> None:
    """Make the `point`th step of this process its last one."""
    steps = iter(range(point))

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return step

    for name in ("link", "unlink", "fsync", "mkdir", "replace", "write", "open"):
        setattr(os, name, counted(getattr(os, name)))
    for target in (SqliteTarget, DuckDbTarget):
        target.execute = counted(target.execute)  # type: ignore[method-assign]
    durable.fsync_directory = counted(durable.fsync_directory)


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child; its exit status as os.waitpid gives it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the child's last words
            print(json.dumps({"error": repr(error)}), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def attempt_of(env: SinkEnvironment, uri: str, mode: SinkMode, granted: Path, point: int) -> None:
    sink = sink_for(uri, env)
    run = job(2, 1)
    die_at(point)
    entry = stage(sink, run, mode)
    save(entry, granted)
    publish(sink, entry, run.token)


def recover(env: SinkEnvironment, uri: str, mode: SinkMode, granted: Path) -> None:
    sink = sink_for(uri, env)
    if granted.exists():
        entry, token = load(granted), job(2, 1).token
        sink.publish(entry, token)
    else:
        sink.delete_stages({job(2, 1).token})
        token = job(2, 2).token
        entry = stage(sink, job(2, 2), mode)
        sink.publish(entry, token)
    publish(sink, entry, token)
    sink.publish(entry, token)


def rows_at(uri: str, root: Path) -> list[tuple[int, int]]:
    scheme, _, rest = uri.partition("://")
    path = root / rest
    if scheme == "sqlite":
        with sqlite3.connect(path) as db:
            return db.execute("SELECT version, id FROM sales ORDER BY 1, 2").fetchall()
    if scheme == "duckdb":
        with duckdb.connect(str(path)) as db:
            return db.execute("SELECT version, id FROM sales ORDER BY 1, 2").fetchall()
    read = pyarrow.parquet.read_table if scheme == "parquet" else pyarrow.csv.read_csv
    rows: list[tuple[int, int]] = []
    for file in path.glob("*." + scheme):
        table = read(str(file))
        rows += zip(table["version"].to_pylist(), table["id"].to_pylist(), strict=True)
    return sorted(rows)


def report(env: SinkEnvironment, uri: str, point: int, root: Path) -> None:
    line = {
        "point": point,
        "rows": rows_at(uri, root),
        "stages": sorted(sink_for(uri, env).list_stages()),
        "strays": [
            p.name for p in root.rglob("*") if "probe" in p.name and p.parent.name[0] != "."
        ],
    }
    print(json.dumps(line), flush=True)


def trial(uri: str, mode: SinkMode, point: int) -> bool:
    """One kill point; False once the first child got through to its end."""
    root = Path(tempfile.mkdtemp(prefix="sinks-"))
    granted = root / "granted.json"
    env = SinkEnvironment(OutputRoot.open(root))

    def before() -> None:
        sink = sink_for(uri, env)
        publish(sink, stage(sink, job(1, 1), mode), job(1, 1).token)

    try:
        if mode is not SinkMode.ERROR:
            forked(before)
        status = forked(lambda: attempt_of(env, uri, mode, granted, point))
        forked(lambda: recover(env, uri, mode, granted))
        forked(lambda: report(env, uri, point, root))
    finally:
        shutil.rmtree(root)
    return os.WIFSIGNALED(status)


def main(uri: str, mode: str, step: str) -> None:
    batch(job(1, 1))  # imports what Arrow imports late, once for all children
    point = 0
    while trial(uri, SinkMode(mode), point):
        point += int(step)


if __name__ == "__main__":
    main(*sys.argv[1:4])
