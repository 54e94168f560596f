"""What one job publishes, on its way into the sinks' stages.

    batch of a topic ─ contract ─┬─ good rows ─ lineage columns ─ every sink of the topic
                                 └─ bad rows ─ lineage columns ─ the quarantine of every sink

A topic without rows still makes an output, so that the ledger knows it was there and `replace`
can take earlier rows away. Sinks of one topic that ask for different contracts each get theirs.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa

from casparian_flow.domain.contracts import Contract, parse_contract
from casparian_flow.domain.errors import OutputRefusedError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import (
    OUTPUTS_MAX,
    TOPIC_PATTERN,
    OutputEntry,
    OutputKind,
    QuarantinePolicy,
    SinkSpec,
    sinks_for,
)
from casparian_flow.protocol.http_types import TopicReport, ViolationSummary
from casparian_worker.lineage import Lineage, refuse_reserved
from casparian_worker.reports import encode_report, violations_report
from casparian_worker.sinks.base import JobRun, StageContext, StageWriter
from casparian_worker.validate import ROW_ID_COLUMN, Validator


@lru_cache(maxsize=256)
def _contract(schema_json: str) -> Contract:
    return parse_contract(schema_json)


class Opens(Protocol):
    """The part of a sink that is used here."""

    def open_stage(self, ctx: StageContext) -> StageWriter: ...


class JobOutputs:
    """All outputs of one attempt. Used by one thread at a time.

    Args:
        run: what the outputs share.
        lineage: the columns added to every row.
        sinks: the plugin's, or those that replace them for this job.
        open_sink: the sink of a canonical URI.
    """

    def __init__(
        self,
        run: JobRun,
        lineage: Lineage,
        sinks: Sequence[SinkSpec],
        open_sink: Callable[[str], Opens],
    ) -> None:
        self._run = run
        self._lineage = lineage
        self._sinks = sinks
        self._open_sink = open_sink
        self._topics: dict[str, list[_Branch]] = {}
        self._writers: list[StageWriter] = []

    def write(self, topic: str, batch: pa.RecordBatch) -> None:
        """Take rows that the plugin published.

        Raises:
            OutputRefusedError: these rows cannot become an output, however often tried.
            SinkError: a sink failed.
        """
        branches = self._topics.get(topic)
        if branches is None:
            branches = self._topics[topic] = self._open_topic(topic)
        refuse_reserved(batch.schema)
        for branch in branches:
            branch.write(batch)

    def finish(self) -> tuple[OutputEntry, ...]:
        """Make every stage durable; empty if the plugin published nothing.

        Raises:
            OutputRefusedError, SinkError: as `write`; nothing of the job must be published then.
        """
        for branches in self._topics.values():
            for branch in branches:
                branch.judge()
        return tuple(writer.finish() for writer in self._writers)

    def report(self) -> str:
        """What the rows were like, as a conclusion tells it; to be called after `finish`."""
        return encode_report(
            TopicReport(
                topic=topic,
                rows=branches[0].rows,
                bad_rows=max(branch.bad_rows for branch in branches),
                violations=[v for branch in branches for v in branch.violations],
                sample=self.sample(topic),
            )
            for topic, branches in self._topics.items()
        )

    def sample(self, topic: str) -> list[dict[str, Any]]:
        """Some good rows to show; none are kept of what is published."""
        return []

    def abort(self) -> None:
        """Delete every stage of this attempt. May be called at any time, more than once."""
        for writer in self._writers:
            writer.abort()

    def _open_topic(self, topic: str) -> "list[_Branch]":
        if not TOPIC_PATTERN.fullmatch(topic):
            raise OutputRefusedError(
                f"{topic[:100]!r} is no name for a topic",
                reason=Reason.PLUGIN_ERROR,
                hint="Use letters, digits, '_', '-' and '.', at most 100 of them.",
            )
        groups: dict[tuple[str, QuarantinePolicy], list[SinkSpec]] = {}
        for spec in sinks_for(topic, self._sinks):
            groups.setdefault((spec.schema_json, spec.quarantine), []).append(spec)
        return [
            _Branch(self, topic, schema_json, policy, specs)
            for (schema_json, policy), specs in groups.items()
        ]

    def open_writer(self, topic: str, spec: SinkSpec, kind: OutputKind) -> StageWriter:
        """Begin the next output of the manifest."""
        n = len(self._writers)
        if n >= OUTPUTS_MAX:
            raise OutputRefusedError(
                f"the plugin publishes to more than {OUTPUTS_MAX} outputs in one job",
                reason=Reason.PLUGIN_ERROR,
                hint="Put what distinguishes the topics into a column instead.",
            )
        context = StageContext(self._run, n, topic, kind, spec.mode)
        writer = self._open_sink(spec.uri).open_stage(context)
        self._writers.append(writer)
        return writer

    def with_lineage(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return self._lineage.append(batch)


class _Branch:
    """One topic towards the sinks that share a contract."""

    def __init__(
        self,
        outputs: JobOutputs,
        topic: str,
        schema_json: str,
        policy: QuarantinePolicy,
        specs: Sequence[SinkSpec],
    ) -> None:
        self._outputs = outputs
        self._topic = topic
        self._specs = specs
        self._rows = 0
        self._validator: Validator | None = None
        if schema_json:
            contract = _contract(schema_json)
            self._validator = Validator(contract, policy, topic=topic)
        self._good = [outputs.open_writer(topic, spec, OutputKind.OUTPUT) for spec in specs]
        self._quarantine: list[StageWriter] = []

    def write(self, batch: pa.RecordBatch) -> None:
        good, bad = self._checked(batch)
        self._rows += batch.num_rows
        good = self._outputs.with_lineage(good)
        for writer in self._good:
            writer.write(good)
        if bad is None:
            return
        if not self._quarantine:
            self._quarantine = [
                self._outputs.open_writer(self._topic, spec, OutputKind.QUARANTINE)
                for spec in self._specs
            ]
        bad = self._outputs.with_lineage(bad)
        for writer in self._quarantine:
            writer.write(bad)

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def bad_rows(self) -> int:
        return 0 if self._validator is None else self._validator.bad_rows

    @property
    def violations(self) -> list[ViolationSummary]:
        found = () if self._validator is None else self._validator.violations
        return violations_report(v.to_json() for v in found)

    def judge(self) -> None:
        if self._validator is not None:
            self._validator.judge()

    def _checked(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        if self._validator is not None:
            return self._validator.check(batch, self._rows + 1)
        if ROW_ID_COLUMN in batch.schema.names:
            batch = batch.drop_columns([ROW_ID_COLUMN])
        return batch, None
