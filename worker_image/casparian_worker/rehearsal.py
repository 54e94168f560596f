"""A sink that leads nowhere, for runs that publish nothing.

It counts rows, refuses what no sink could take, and keeps some rows for who wants to see them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from casparian_flow.domain.outputs import LINEAGE_COLUMNS, OutputEntry, OutputKind, SinkSpec
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.lineage import Lineage
from casparian_worker.sinks.base import JobRun, StageContext, topic_name
from casparian_worker.sinks.schema import SchemaTracker

CELL_CHARS_MAX: Final = 500


@dataclass(slots=True)
class Kept:
    """Good rows of one run, by topic.

    Attributes:
        rows_max: of each topic.
    """

    rows_max: int = 0
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class RehearsedOutputs(JobOutputs):
    """The outputs of a run that publishes nothing; its report shows some rows.

    Args:
        rows_max: good rows kept of each topic.
    """

    def __init__(
        self, run: JobRun, lineage: Lineage, sinks: Sequence[SinkSpec], rows_max: int
    ) -> None:
        self._kept = Kept(rows_max)
        super().__init__(run, lineage, sinks, lambda uri: NowhereSink(uri, self._kept))

    def sample(self, topic: str) -> list[dict[str, Any]]:
        return self._kept.rows.get(topic, [])


class NowhereSink:
    """See the module's text."""

    def __init__(self, uri: str, kept: Kept) -> None:
        self._uri = uri
        self._kept = kept

    def open_stage(self, ctx: StageContext) -> "NowhereWriter":
        return NowhereWriter(ctx, self._uri, self._kept)


class NowhereWriter:
    """Implements sinks.base.StageWriter."""

    def __init__(self, ctx: StageContext, uri: str, kept: Kept) -> None:
        self._ctx = ctx
        self._uri = uri
        self._rows = 0
        self._tracker = SchemaTracker(topic_name(ctx))
        # A topic with several sinks has several writers; the first one keeps the rows.
        keeps = ctx.kind is OutputKind.OUTPUT and ctx.topic not in kept.rows
        self._kept = kept.rows.setdefault(ctx.topic, []) if keeps else []
        self._keeps_max = kept.rows_max if keeps else 0

    def write(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        self._tracker.admit(batch)
        self._rows += batch.num_rows
        room = self._keeps_max - len(self._kept)
        if room > 0:
            self._kept += [_shown(row) for row in batch.slice(0, room).to_pylist()]

    def finish(self) -> OutputEntry:
        ctx = self._ctx
        return OutputEntry(
            n=ctx.n,
            topic=topic_name(ctx),
            kind=ctx.kind,
            uri=self._uri,
            mode=ctx.mode,
            root_id="",
            output_key="",
            slice_key="",
            order_no=ctx.run.order_no,
            stage="",
            final="",
            rows=self._rows,
            bytes=0,
        )

    def abort(self) -> None:
        """Nothing was staged."""


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can hold it, without lineage, long texts cut."""
    return {name: _cell(value) for name, value in row.items() if name not in LINEAGE_COLUMNS}


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    text = value if isinstance(value, str) else _text(value)
    return text if len(text) <= CELL_CHARS_MAX else text[:CELL_CHARS_MAX] + "…"


def _text(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)
