"""Schemas that drift between the batches of one topic."""

from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.domain.errors import OutputRefusedError
from casparian_flow.domain.failures import Reason
from casparian_worker.lineage import Lineage, global_job_id, refuse_reserved, rfc3339
from casparian_worker.sinks.schema import SchemaTracker


def batch(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch(columns)


def merged(*batches: pa.RecordBatch) -> pa.Schema:
    tracker = SchemaTracker("sales")
    for rows in batches:
        tracker.admit(rows)
    assert tracker.schema is not None
    for rows in batches:
        tracker.conform(rows).validate(full=True)
    return tracker.schema


def test_integers_with_a_gap_later_become_floats() -> None:
    assert merged(batch(a=[1, 2]), batch(a=[1.5])).field("a").type == pa.float64()


def test_a_column_that_was_empty_takes_the_type_of_its_first_value() -> None:
    empty = pa.array([None, None], pa.float64())
    assert merged(batch(a=empty), batch(a=["x"])).field("a").type == pa.string()
    assert merged(batch(a=["x"]), batch(a=pa.nulls(2))).field("a").type == pa.string()


def test_a_batch_whose_column_is_empty_keeps_the_type_of_earlier_values() -> None:
    tracker = SchemaTracker("sales")
    tracker.admit(batch(a=["x"]))
    assert not tracker.admit(batch(a=pa.array(["y"], pa.string())))
    with pytest.raises(OutputRefusedError):
        tracker.admit(batch(a=[1]))


def test_new_columns_come_before_the_lineage_columns_and_may_be_null() -> None:
    lineage = Lineage("ab" * 32, "7f3ac91e-1", "now", "1.0")
    schema = merged(lineage.append(batch(a=[1])), lineage.append(batch(a=[2], b=[True])))
    assert schema.names[:2] == ["a", "b"]
    assert schema.field("b").nullable


def test_categories_become_what_they_stand_for() -> None:
    coded = pa.array(["x", "y"]).dictionary_encode()
    assert merged(batch(a=coded)).field("a").type == pa.string()


def test_types_that_nothing_holds_are_refused_by_column() -> None:
    with pytest.raises(OutputRefusedError, match=r"column 'a' is int64 .* and string") as caught:
        merged(batch(a=[1]), batch(a=["x"]))
    assert caught.value.reason == Reason.CONTRACT
    assert caught.value.diagnostics["column"] == "a"


def test_an_integer_that_a_float_cannot_hold_is_refused_not_rounded() -> None:
    with pytest.raises(OutputRefusedError, match="does not fit"):
        merged(batch(a=[1.5]), batch(a=[2**53 + 1]))


def test_a_column_given_twice_is_refused() -> None:
    twice = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(OutputRefusedError, match="'a' is given twice"):
        merged(twice)


@pytest.mark.parametrize("name", ["_cf_job_id", "_CF_JOB_ID", "_cf_parser_version"])
def test_a_plugin_may_not_emit_a_lineage_column(name: str) -> None:
    with pytest.raises(OutputRefusedError, match=name) as caught:
        refuse_reserved(pa.schema([(name, pa.string())]))
    assert caught.value.reason == Reason.RESERVED_COLUMN


def test_lineage_says_which_ledger_s_job_made_a_row() -> None:
    token = "7f3ac91e-4-1042-2"
    lineage = Lineage("ab" * 32, global_job_id(token), rfc3339(1_700_000_000_123_456), "2.1")
    (row,) = lineage.append(batch(a=[1])).to_pylist()
    assert row == {
        "a": 1,
        "_cf_source_hash": "ab" * 32,
        "_cf_job_id": "7f3ac91e-1042",
        "_cf_processed_at": "2023-11-14T22:13:20.123456Z",
        "_cf_parser_version": "2.1",
    }


def test_no_job_id_is_made_from_what_is_no_token() -> None:
    with pytest.raises(ValueError, match="not a fencing token"):
        global_job_id("../../etc/passwd")
