"""Jobs through a real worker process with real plugins and sinks; the Sentinel is scripted.

One worker with two slots serves all tests, as it would in life: what one test leaves behind would
show in the next.
"""

import sqlite3
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scripted_sentinel import LEDGER, ScriptedSentinel
from worker_process import (
    ROWS_PLUGIN,
    SLOW_PLUGIN,
    WorkerProcess,
    dispatch_of,
    plugin_spec,
    wait_until,
    worker_process,
)

from casparian_flow.domain.outputs import QuarantinePolicy, SinkMode, SinkSpec
from casparian_flow.domain.records import Limits
from casparian_flow.protocol import messages as m

PEOPLE = "name,n\nAda,1\nGrace,2\n"
CONTRACT = """{"columns": [{"name": "name", "type": "string", "nullable": false},
                           {"name": "n", "type": "int64"}]}"""
GAPS_PLUGIN = ROWS_PLUGIN.replace('"name": r["name"]', '"name": r["name"] or None')


@dataclass
class Line:
    """The one worker and what tests do with it; ids are never used twice."""

    sentinel: ScriptedSentinel
    worker: bytes
    process: WorkerProcess
    folder: Path
    metrics_port: int
    ids: "count[int]"

    def plugin(
        self, source: str, sinks: Sequence[SinkSpec] = (), limits: Limits | None = None
    ) -> str:
        spec_id = f"spec-{next(self.ids)}"
        spec = plugin_spec(source, sinks, spec_id=spec_id, limits=limits)
        self.sentinel.send(self.worker, 0, spec)
        return spec_id

    def file(self, text: str) -> Path:
        path = self.folder / f"file-{next(self.ids)}.csv"
        path.write_text(text)
        return path

    def prepare(self, spec_id: str, path: Path) -> tuple[int, m.Dispatch]:
        job_id = next(self.ids)
        return job_id, dispatch_of(self.sentinel, job_id, path, spec_id=spec_id)

    def start(self, spec_id: str, text: str) -> tuple[int, m.Dispatch]:
        job_id, dispatch = self.prepare(spec_id, self.file(text))
        self.sentinel.send(self.worker, job_id, dispatch)
        return job_id, dispatch

    def staged(self, job_id: int) -> m.Stage:
        token = self.sentinel.token(job_id)
        return self.sentinel.expect(m.Stage, where=lambda s: s.token == token)

    def finish(self, job_id: int) -> m.Conclude:
        """Grant what is staged and acknowledge the conclusion."""
        self.sentinel.send(self.worker, job_id, m.Grant(self.staged(job_id).token))
        return self.conclude(job_id)

    def conclude(self, job_id: int) -> m.Conclude:
        token = self.sentinel.token(job_id)
        conclusion = self.sentinel.expect(m.Conclude, where=lambda c: c.token == token)
        self.sentinel.send(self.worker, job_id, m.ConcludeAck([token]))
        return conclusion


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("line")
    with ScriptedSentinel() as other:
        port = other.port  # free again once closed
    options = ("--slots", "2", "--metrics-port", str(port))
    with (
        ScriptedSentinel() as sentinel,
        worker_process(sentinel.address, folder, *options) as process,
    ):
        yield Line(sentinel, sentinel.wait_for_worker(), process, folder, port, count(1))


def test_a_file_goes_to_parquet_and_sqlite_with_its_lineage(line: Line) -> None:
    sinks = [SinkSpec("people", "parquet://both"), SinkSpec("people", "sqlite://db/p.sqlite3")]
    job_id, dispatch = line.start(line.plugin(ROWS_PLUGIN, sinks), PEOPLE)
    assert line.sentinel.expect(m.DispatchAck).token == dispatch.token
    stage = line.staged(job_id)
    assert [(e.n, e.topic, e.rows) for e in stage.entries] == [(0, "people", 2), (1, "people", 2)]
    assert line.process.files("both/*.parquet") == []
    line.sentinel.send(line.worker, job_id, m.Grant(stage.token))
    conclusion = line.conclude(job_id)
    assert (conclusion.status, conclusion.metrics["rows"]) == ("SUCCESS", 4)
    assert "read 2 rows" in conclusion.log
    (parquet,) = line.process.files("both/*.parquet")
    table = pq.read_table(parquet).to_pylist()
    assert [(r["name"], r["n"]) for r in table] == [("Ada", 1), ("Grace", 2)]
    assert {r["_cf_source_hash"] for r in table} == {dispatch.content_hash}
    assert {r["_cf_job_id"] for r in table} == {f"{LEDGER}-{job_id}"}
    assert {r["_cf_parser_version"] for r in table} == {"1.2.3"}
    with closing(sqlite3.connect(line.process.output / "db" / "p.sqlite3")) as db:
        rows = db.execute("SELECT name, n FROM people ORDER BY n").fetchall()
    assert rows == [("Ada", 1), ("Grace", 2)]
    assert line.process.stages() == []


def test_a_job_without_outputs_concludes_without_a_stage(line: Line) -> None:
    silent = ROWS_PLUGIN.replace('self.publish("people", rows)', "pass")
    job_id, dispatch = line.start(line.plugin(silent), PEOPLE)
    assert line.conclude(job_id).status == "SUCCESS"
    stages = [x for _, _, x in line.sentinel.seen if isinstance(x, m.Stage)]
    assert dispatch.token not in {stage.token for stage in stages}


def test_a_topic_without_a_sink_goes_to_the_wildcard_or_to_parquet(line: Line) -> None:
    wildcard = line.plugin(ROWS_PLUGIN, [SinkSpec("*", "csv://all")])
    line.finish(line.start(wildcard, PEOPLE)[0])
    assert len(line.process.files("all/people-*.csv")) == 1
    line.finish(line.start(line.plugin(ROWS_PLUGIN), PEOPLE)[0])
    assert len(line.process.files("people/*.parquet")) == 1


def test_a_refused_job_leaves_nothing(line: Line) -> None:
    sinks = [SinkSpec("people", "parquet://refused"), SinkSpec("people", "sqlite://no.sqlite3")]
    job_id, _ = line.start(line.plugin(ROWS_PLUGIN, sinks), PEOPLE)
    token = line.staged(job_id).token
    assert len(line.process.stages()) == 2
    line.sentinel.send(line.worker, job_id, m.Refuse(token, "superseded"))
    wait_until(lambda: line.process.stages() == [])
    assert line.process.files("refused/*.parquet") == []


def test_an_abort_stops_the_plugin_at_once_and_the_worker_goes_on(line: Line) -> None:
    spec_id = line.plugin(SLOW_PLUGIN)
    long_jobs = [line.start(spec_id, "60")[0] for _ in range(2)]
    tokens = {line.sentinel.token(job_id) for job_id in long_jobs}
    begun: set[str] = set()
    while begun != tokens:
        ack = line.sentinel.expect(m.DispatchAck, where=lambda ack: ack.token in tokens)
        begun.add(ack.token)
    before = time.monotonic()
    for job_id in long_jobs:
        line.sentinel.send(line.worker, job_id, m.Abort(line.sentinel.token(job_id), "cancelled"))
    job_id, _ = line.start(spec_id, "0")
    assert line.finish(job_id).status == "SUCCESS"
    assert time.monotonic() - before < 15
    assert line.process.stages() == []


def test_heartbeats_go_on_while_a_plugin_computes(line: Line) -> None:
    busy = ROWS_PLUGIN.replace("print(", "\n        while True: pass\n        print(")
    spec_id = line.plugin(busy, limits=Limits(timeout_s=2.0))
    job_id, dispatch = line.start(spec_id, PEOPLE)
    line.sentinel.expect(m.DispatchAck, where=lambda ack: ack.token == dispatch.token)
    seen = len(line.sentinel.seen)
    line.sentinel.serve(1.5)
    beats = [x for _, _, x in line.sentinel.seen[seen:] if isinstance(x, m.Heartbeat)]
    assert len(beats) >= 3
    assert beats[-1] == m.Heartbeat("BUSY", [dispatch.token])
    conclusion = line.conclude(job_id)
    assert (conclusion.status, conclusion.reason) == ("FAILED", "timeout")


def test_a_plugin_that_fails_is_told_with_its_log_and_leaves_no_stage(line: Line) -> None:
    failing = ROWS_PLUGIN + '        raise ValueError("no such luck")\n'
    job_id, _ = line.start(line.plugin(failing), PEOPLE)
    conclusion = line.conclude(job_id)
    assert (conclusion.status, conclusion.reason) == ("FAILED", "plugin_error")
    assert "no such luck" in conclusion.error_message
    assert "read 2 rows" in conclusion.log
    assert line.process.stages() == []


def test_a_plugin_without_a_handler_is_named_as_such(line: Line) -> None:
    job_id, _ = line.start(line.plugin("class Parser: ..."), PEOPLE)
    conclusion = line.conclude(job_id)
    assert (conclusion.status, conclusion.reason) == ("FAILED", "plugin_invalid")
    assert "must be named Handler" in conclusion.error_message


def test_a_reserved_column_fails_the_job(line: Line) -> None:
    lying = ROWS_PLUGIN.replace('"name":', '"_cf_job_id": "mine", "name":')
    job_id, _ = line.start(line.plugin(lying), PEOPLE)
    conclusion = line.conclude(job_id)
    assert (conclusion.status, conclusion.reason) == ("FAILED", "reserved_column")
    assert line.process.stages() == []


def test_parameters_that_are_no_json_fail_the_job_and_not_the_slot(line: Line) -> None:
    spec = plugin_spec(ROWS_PLUGIN, spec_id="spec-parameters")
    spec.parameters_json = "nonsense"
    line.sentinel.send(line.worker, 0, spec)
    job_id, _ = line.start("spec-parameters", PEOPLE)
    conclusion = line.conclude(job_id)
    assert (conclusion.status, conclusion.reason) == ("FAILED", "plugin_invalid")


def test_a_changed_or_missing_source_is_skipped(line: Line) -> None:
    spec_id = line.plugin(ROWS_PLUGIN)
    path = line.file(PEOPLE)
    changed, missing = line.prepare(spec_id, path), line.prepare(spec_id, path)
    path.write_text(PEOPLE.replace("2", "3"))
    line.sentinel.send(line.worker, *changed)
    skipped = line.conclude(changed[0])
    assert (skipped.status, skipped.reason) == ("SKIPPED", "source_changed")
    path.unlink()
    line.sentinel.send(line.worker, *missing)
    skipped = line.conclude(missing[0])
    assert (skipped.status, skipped.reason) == ("SKIPPED", "source_missing")


def contract_sink(uri: str) -> SinkSpec:
    return SinkSpec("people", uri, SinkMode.APPEND, CONTRACT, QuarantinePolicy(True, 50.0))


def test_bad_rows_go_to_quarantine_and_make_the_success_partial(line: Line) -> None:
    spec_id = line.plugin(GAPS_PLUGIN, [contract_sink("parquet://gaps")])
    job_id, _ = line.start(spec_id, "name,n\nAda,1\n,2\nGrace,3\n")
    conclusion = line.finish(job_id)
    assert conclusion.status == "PARTIAL_SUCCESS"
    assert conclusion.metrics["rows"] == 2
    assert conclusion.metrics["quarantine_rows"] == 1
    (bad,) = line.process.files("gaps_quarantine/*.parquet")
    (row,) = pq.read_table(bad).to_pylist()
    assert (row["_source_row"], row["n"]) == (2, "2")
    assert row["_cf_job_id"] == f"{LEDGER}-{job_id}"


def test_more_bad_rows_than_allowed_fail_the_job_and_nothing_is_written(line: Line) -> None:
    spec_id = line.plugin(GAPS_PLUGIN, [contract_sink("parquet://many_gaps")])
    job_id, _ = line.start(spec_id, "name,n\nAda,1\n,2\n,3\n")
    conclusion = line.conclude(job_id)
    assert (conclusion.status, conclusion.reason) == ("FAILED", "quarantine_limit")
    assert line.process.stages() == []
    assert line.process.files("many_gaps*/*.parquet") == []


def test_other_bytes_under_the_outputs_name_are_not_overwritten(line: Line) -> None:
    spec_id = line.plugin(ROWS_PLUGIN, [SinkSpec("people", "parquet://taken")])
    job_id, _ = line.start(spec_id, PEOPLE)
    stage = line.staged(job_id)
    final = line.process.output / stage.entries[0].final
    final.write_bytes(b"somebody else's")
    line.sentinel.send(line.worker, job_id, m.Grant(stage.token))
    conclusion = line.conclude(job_id)
    assert (conclusion.status, conclusion.reason) == ("FAILED", "sink_conflict")
    assert final.read_bytes() == b"somebody else's"
    # An operator moves it away and says `job resolve --forward`.
    final.unlink()
    line.sentinel.send(line.worker, job_id, m.Recover(stage.token, stage.entries))
    assert line.conclude(job_id).status == "SUCCESS"
    assert pq.read_table(final).num_rows == 2


def test_a_forged_manifest_publishes_nothing(line: Line) -> None:
    spec_id = line.plugin(ROWS_PLUGIN, [SinkSpec("people", "parquet://forged")])
    job_id, _ = line.start(spec_id, PEOPLE)
    stage = line.staged(job_id)
    line.sentinel.send(line.worker, job_id, m.Refuse(stage.token, "superseded"))
    entry = stage.entries[0]
    forged = replace(entry, final="../../escape.parquet")
    other = next(line.ids)
    line.sentinel.send(line.worker, other, m.Recover(line.sentinel.token(other), (forged,)))
    assert line.conclude(other).status == "FAILED"
    assert not (line.folder / "escape.parquet").exists()


def test_many_small_files_stay_apart_although_several_are_under_way(line: Line) -> None:
    number = 60
    spec_id = line.plugin(ROWS_PLUGIN, [SinkSpec("people", "parquet://many")])
    jobs = {}
    for n in range(1, number + 1):
        job_id, dispatch = line.prepare(spec_id, line.file("name,n\n" + f"p{n},{n}\n" * n))
        jobs[job_id] = (n, dispatch)
    line.sentinel.send_batch(line.worker, [(job_id, d) for job_id, (_, d) in jobs.items()])
    rows = {}
    while len(rows) < number:
        _, job_id, message = line.sentinel.next()
        if isinstance(message, m.Stage):
            line.sentinel.send(line.worker, job_id, m.Grant(message.token))
        elif isinstance(message, m.Conclude):
            line.sentinel.send(line.worker, 0, m.ConcludeAck([message.token]))
            assert message.status in {"SUCCESS", "REJECTED"}
            if message.status == "SUCCESS":
                rows[job_id] = message.metrics["rows"]
                continue
            # A slow start of the plugin: the job was given back, and comes again.
            assert message.reason == "busy"
            n, dispatch = jobs[job_id]
            token = line.sentinel.token(job_id, dispatch.attempt + 1)
            again = replace(dispatch, token=token, attempt=dispatch.attempt + 1)
            jobs[job_id] = (n, again)
            line.sentinel.send(line.worker, job_id, again)
    assert rows == {job_id: n for job_id, (n, _) in jobs.items()}
    for path in line.process.files("many/*.parquet"):
        table = pq.read_table(path).to_pylist()
        (job_text,) = {r["_cf_job_id"] for r in table}
        expected, _ = jobs[int(job_text.split("-")[1])]
        assert [r["n"] for r in table] == [expected] * expected
    assert line.process.stages() == []


def test_two_plugins_in_turn_keep_a_warm_process_each(line: Line) -> None:
    first, second = line.plugin(ROWS_PLUGIN), line.plugin(ROWS_PLUGIN)
    for spec_id in (first, second) * 3:
        assert line.finish(line.start(spec_id, PEOPLE)[0]).status == "SUCCESS"


def test_metrics_tell_what_the_worker_did(line: Line) -> None:
    line.finish(line.start(line.plugin(ROWS_PLUGIN), PEOPLE)[0])
    url = f"http://127.0.0.1:{line.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    values = dict(row.rsplit(" ", 1) for row in text.splitlines() if row[0] != "#")
    for name in (
        "jobs_received", "jobs_completed", "bridge_executions", "parquet_files_written",
        "parquet_rows_written",
    ):  # fmt: skip
        assert float(values[f"casparian_worker_{name}_total"]) >= 1
    assert float(values['casparian_worker_rows_published_total{scheme="parquet"}']) >= 2
