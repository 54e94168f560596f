"""Rows made to break whoever takes them in: they end as rows or as a named refusal."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from sink_kit import job_run, output_at

from casparian_flow.domain.contracts import parse_contract
from casparian_flow.domain.errors import CasparianError, OutputRefusedError
from casparian_flow.domain.outputs import QuarantinePolicy, SinkSpec
from casparian_worker.arrow_ipc import HostileBatchError, decode, encode
from casparian_worker.job_outputs import JobOutputs
from casparian_worker.lineage import LINEAGE_COLUMNS, Lineage
from casparian_worker.sinks.registry import sink_for
from casparian_worker.validate import Validator

FAR = 2**62


def raw(kind: pa.DataType, values: Sequence[int], code: str) -> Any:
    """An array of two values of these bytes, whatever its type makes of them."""
    data = struct.pack(f"={len(values)}{code}", *values)
    return pa.Array.from_buffers(kind, 2, [None, pa.py_buffer(data)])


def within(array: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), array)


COLUMNS = {
    "times beyond the calendar": raw(pa.timestamp("s"), [FAR, -FAR], "q"),
    "times of no known zone": raw(pa.timestamp("us", "Mars/Phobos"), [1, 2], "q"),
    "times of a zone that is a path": raw(pa.timestamp("us", "../../etc/passwd"), [1, 2], "q"),
    "dates beyond the calendar": raw(pa.date32(), [2**31 - 1, -(2**31)], "i"),
    "times of day beyond the day": raw(pa.time64("ns"), [FAR, -FAR], "q"),
    "spans beyond Python's, in lists": within(raw(pa.duration("s"), [FAR, -FAR], "q")),
    "times beyond the calendar, in lists": within(raw(pa.timestamp("s"), [FAR, -FAR], "q")),
    "decimals beyond their digits": raw(pa.decimal128(5, 2), [FAR] * 4, "q"),
    "numbers that are none": raw(pa.float16(), [0x7FFF, 0x7C00], "H"),
    "months, days and nanoseconds": raw(pa.month_day_nano_interval(), [FAR] * 4, "q"),
    "values without a width": pa.array([b"", b""], pa.binary(0)),
    "structs without fields": pa.Array.from_buffers(pa.struct([]), 2, [None]),
    "structs with a field twice": pa.StructArray.from_arrays([pa.array([1, 2])] * 2, ["a", "a"]),
    "unions": pa.UnionArray.from_sparse(
        pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]
    ),
    "text that steers a terminal": pa.array(["\x1b[2J", "a\0b"]),
}
NAMES = ["a\0b", "\x1b[2J", "a" * 10_000, 'x"; DROP TABLE t; --', "", "../../x"]
SINKS = ["parquet://p", "csv://c", "sqlite:///s.db", "duckdb:///d.duckdb"]


def rows_taken(folder: Path, uri: str, n: int, batch: pa.RecordBatch) -> int | None:
    """Rows that a sink published, None if it refused them by name."""
    try:
        return output_at(folder, uri).put(job_run(n + 1, location=n + 1), batch, topic=f"t{n}").rows
    except CasparianError:
        return None


@pytest.mark.parametrize("what", COLUMNS)
def test_odd_values_become_rows_or_a_named_refusal(tmp_path: Path, what: str) -> None:
    try:
        batch = decode(bytes(encode(pa.record_batch([COLUMNS[what]], ["x"]))))
    except HostileBatchError:
        return
    for n, uri in enumerate(SINKS):
        assert rows_taken(tmp_path, uri, n, batch) in {2, None}
    contract = parse_contract(
        '{"mode": "allow_extra", "columns": [{"name": "n", "type": "int64", "nullable": false}]}'
    )
    policy = QuarantinePolicy(allow=True, max_pct=100.0)
    bad = pa.record_batch([pa.array(["no number", None]), batch.column(0)], ["n", "x"])
    try:
        _, quarantined = Validator(contract, policy, topic="t").check(bad, 1)
    except OutputRefusedError:
        return
    assert quarantined is not None
    assert quarantined.num_rows == 2


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_odd_column_names_become_columns_or_a_named_refusal(tmp_path: Path, name: str) -> None:
    batch = pa.record_batch([pa.array([1, 2])], [name])
    for n, uri in enumerate(SINKS):
        assert rows_taken(tmp_path, uri, n, batch) in {2, None}


@pytest.mark.parametrize("name", [*LINEAGE_COLUMNS, *map(str.upper, LINEAGE_COLUMNS)])
def test_lineage_of_ones_own_making_is_refused(tmp_path: Path, name: str) -> None:
    env = output_at(tmp_path, "parquet://p").env
    outputs = JobOutputs(
        job_run(),
        Lineage("ab" * 32, "7f3ac91e-1", "2026-01-01T00:00:00Z", "1.0"),
        [SinkSpec("*", "parquet://p")],
        lambda uri: sink_for(uri, env),
    )
    forged = pa.record_batch([pa.array(["c0ffee"])], [name])
    with pytest.raises(OutputRefusedError, match="lineage"):
        outputs.write("t", forged)
    outputs.abort()
    assert list(tmp_path.rglob("*.parquet")) == []
