"""Rows against a contract: what passes, what is quarantined, what refuses the whole output."""

import json
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.domain.contracts import parse_contract
from casparian_flow.domain.errors import OutputRefusedError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import QuarantinePolicy
from casparian_worker.validate import MAX_SAMPLES, ROW_ID_COLUMN, Validator

LENIENT = QuarantinePolicy(allow=True, max_pct=100.0)


def validator(
    columns: list[dict[str, Any]], policy: QuarantinePolicy = LENIENT, mode: str = "strict"
) -> Validator:
    contract = parse_contract(json.dumps({"columns": columns, "mode": mode}))
    return Validator(contract, policy, topic="sales")


def one(kind: Any, values: Any, **column: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Good values of a single column `c`, and the bad rows."""
    rows = pa.record_batch({"c": values})
    good, bad = validator([{"name": "c", "type": kind, **column}]).check(rows, 1)
    good.validate(full=True)
    return good.column("c").to_pylist(), [] if bad is None else bad.to_pylist()


LEAP_DAY = datetime.fromisoformat("2024-02-29")
NOON = datetime.fromisoformat("2024-02-29T12:00:00")
DECIMAL = {"kind": "decimal", "precision": 5, "scale": 2}
STAMP = {"kind": "timestamp_tz", "tz": "UTC"}


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("int64", pa.array([1, None], pa.int8()), [1, None]),
        ("int64", pa.array([1.0, 2.0]), [1, 2]),
        ("int64", ["12", "-3", "+4"], [12, -3, 4]),
        ("float64", pa.array([1, 2], pa.uint16()), [1.0, 2.0]),
        ("float64", ["1.5", ".5", "1e3"], [1.5, 0.5, 1000.0]),
        ("boolean", ["true", "FALSE"], [True, False]),
        ("date", ["2024-02-29"], [date(2024, 2, 29)]),
        ("date", pa.array([LEAP_DAY], pa.timestamp("ns")), [date(2024, 2, 29)]),
        ("time", ["10:00", "10:00:01.5"], [time(10), time(10, 0, 1, 500_000)]),
        ("timestamp", ["2024-02-29T12:00:00"], [NOON]),
        (STAMP, ["2024-01-02T03:04:05+02:00"], [datetime(2024, 1, 2, 1, 4, 5, tzinfo=UTC)]),
        (
            STAMP,
            pa.array([datetime(2024, 1, 2, tzinfo=UTC)], pa.timestamp("ms", "+00:00")),
            [datetime(2024, 1, 2, tzinfo=UTC)],
        ),
        (DECIMAL, ["1.5", "+2", "3.100"], [Decimal("1.50"), Decimal("2.00"), Decimal("3.10")]),
        (DECIMAL, pa.array([1, 2]), [Decimal("1.00"), Decimal("2.00")]),
        ("string", pa.array(["a", None]).dictionary_encode(), ["a", None]),
        ("string", pa.array([None, None], pa.float64()), [None, None]),
        ("binary", pa.array([b"\xff"], pa.large_binary()), [b"\xff"]),
        ({"kind": "list", "item": "float64"}, pa.array([[1, 2]]), [[1.0, 2.0]]),
        ("duration", pa.array([1], pa.duration("s")), None),
    ],
)
def test_values_that_lose_nothing_are_converted(kind: Any, values: Any, expected: Any) -> None:
    good, bad = one(kind, values)
    assert not bad
    assert expected is None or good == expected


@pytest.mark.parametrize(
    ("kind", "values", "violation"),
    [
        ("int64", ["1", "x"], "type_mismatch"),
        ("int64", ["1", "0x1f"], "type_mismatch"),
        ("int64", ["1", "99999999999999999999"], "type_mismatch"),
        ("int64", pa.array([1.0, 1.5]), "type_mismatch"),
        ("int64", pa.array([1, 2**63], pa.uint64()), "type_mismatch"),
        ("float64", ["1", "1,5"], "type_mismatch"),
        ("boolean", ["true", "1"], "type_mismatch"),
        ("date", ["2024-01-01", "2023-02-29"], "format_mismatch"),
        ("date", pa.array([LEAP_DAY, NOON]), "type_mismatch"),
        ("time", ["10:00", "25:00"], "format_mismatch"),
        ("timestamp", ["2024-01-01", "2024-01-01T00:00:00Z"], "format_mismatch"),
        (STAMP, ["2024-01-01T00:00:00Z", "2024-01-01T00:00:00"], "format_mismatch"),
        (DECIMAL, ["1.5", "1.555"], "type_mismatch"),
        (DECIMAL, ["1.5", "1234.5"], "type_mismatch"),
    ],
)
def test_a_value_that_does_not_fit_puts_its_row_into_quarantine(
    kind: Any, values: Any, violation: str
) -> None:
    good, bad = one(kind, values)
    assert len(good) == 1
    (row,) = bad
    assert row["_violation_type"] == violation
    assert row["_source_row"] == 2
    assert "'c'" in row["_error_msg"]
    assert isinstance(row["c"], str)


def test_a_date_format_is_held_to_exactly() -> None:
    good, bad = one("date", ["31.01.2024", "31.02.2024", "1.2.2024"], format="%d.%m.%Y")
    assert good == [date(2024, 1, 31), date(2024, 2, 1)]
    assert [row["c"] for row in bad] == ["31.02.2024"]


def test_formats_that_only_python_knows_work_too() -> None:
    good, bad = one(STAMP, ["Jan 02 2024 +0200", "Foo 02 2024 +0200"], format="%b %d %Y %z")
    assert good == [datetime(2024, 1, 1, 22, tzinfo=UTC)]
    assert len(bad) == 1


def test_a_null_is_refused_only_where_it_is_not_allowed() -> None:
    good, bad = one("int64", [1, None])
    assert (good, bad) == ([1, None], [])
    good, bad = one("int64", [1, None], nullable=False)
    assert good == [1]
    assert bad[0]["_violation_type"] == "null_not_allowed"
    assert bad[0]["_error_msg"] == "schema: null not allowed in 'c'"


def test_a_row_with_several_faults_lists_them_all() -> None:
    check = validator(
        [{"name": "a", "type": "int64", "nullable": False}, {"name": "b", "type": "date"}]
    )
    _, bad = check.check(pa.record_batch({"a": [None, 1], "b": ["nope", "2024-01-01"]}), 1)
    assert bad is not None
    (row,) = bad.to_pylist()
    assert row["_violation_type"] == "null_not_allowed"
    assert row["_error_msg"].count("schema:") == 2


def test_row_numbers_go_on_from_batch_to_batch_unless_the_plugin_gives_them() -> None:
    check = validator([{"name": "c", "type": "int64"}])
    _, bad = check.check(pa.record_batch({"c": ["1", "x"]}), 101)
    assert bad is not None
    assert bad["_source_row"].to_pylist() == [102]
    good, bad = check.check(pa.record_batch({"c": ["1", "x"], ROW_ID_COLUMN: [70, 80]}), 103)
    assert bad is not None
    assert bad["_source_row"].to_pylist() == [80]
    assert good.schema.names == ["c"]


@pytest.mark.parametrize(
    ("batch", "missing", "extra", "order"),
    [
        ({"a": [1]}, ["b"], [], False),
        ({"a": [1], "b": [1], "x": [1]}, [], ["x"], False),
        ({"b": [1], "a": [1]}, [], [], True),
    ],
)
def test_wrong_columns_refuse_the_output_with_diagnostics(
    batch: dict[str, list[int]], missing: list[str], extra: list[str], order: bool
) -> None:
    check = validator([{"name": "a", "type": "int64"}, {"name": "b", "type": "int64"}])
    with pytest.raises(OutputRefusedError) as caught:
        check.check(pa.record_batch(batch), 1)
    found = caught.value
    assert found.reason == Reason.CONTRACT
    assert found.diagnostics["missing"] == missing
    assert found.diagnostics["extra"] == extra
    assert found.diagnostics["order"] is order
    assert found.diagnostics["expected"] == ["a: int64", "b: int64"]


def test_every_column_of_a_wrong_type_is_named() -> None:
    check = validator([{"name": "a", "type": "date"}, {"name": "b", "type": "binary"}])
    with pytest.raises(OutputRefusedError, match=r"a is int64, not date; b is double, not bin"):
        check.check(pa.record_batch({"a": [1], "b": [1.5]}), 1)


def test_a_zone_that_is_not_the_contracts_is_a_wrong_type() -> None:
    stamps = pa.array([0], pa.timestamp("us", "Europe/Paris"))
    with pytest.raises(OutputRefusedError, match="Europe/Paris"):
        one(STAMP, stamps)


def test_the_modes_allow_what_they_say() -> None:
    columns = [{"name": "a", "type": "int64", "nullable": False}, {"name": "b", "type": "date"}]
    extra = validator(columns, mode="allow_extra")
    good, _ = extra.check(pa.record_batch({"x": ["?"], "b": ["2024-01-01"], "a": [1]}), 1)
    assert good.schema.names == ["a", "b", "x"]
    optional = validator(columns, mode="allow_missing_optional")
    good, _ = optional.check(pa.record_batch({"a": [1]}), 1)
    assert good.to_pylist() == [{"a": 1, "b": None}]
    with pytest.raises(OutputRefusedError, match="missing 'a'"):
        optional.check(pa.record_batch({"b": ["2024-01-01"]}), 1)
    with pytest.raises(OutputRefusedError, match="unexpected 'x'"):
        optional.check(pa.record_batch({"a": [1], "x": [1]}), 1)


def judged(policy: QuarantinePolicy, bad: int, rows: int) -> Validator:
    check = validator([{"name": "c", "type": "int64"}], policy)
    check.check(pa.record_batch({"c": ["x"] * bad + ["1"] * (rows - bad)}), 1)
    return check


@pytest.mark.parametrize(
    ("policy", "bad", "passes"),
    [
        (QuarantinePolicy(), 0, True),
        (QuarantinePolicy(), 1, False),
        (QuarantinePolicy(allow=True, max_pct=10.0), 10, True),
        (QuarantinePolicy(allow=True, max_pct=10.0), 11, False),
        (QuarantinePolicy(allow=True, max_pct=100.0, max_count=5), 5, True),
        (QuarantinePolicy(allow=True, max_pct=100.0, max_count=5), 6, False),
    ],
)
def test_the_policy_is_judged_over_all_rows(
    policy: QuarantinePolicy, bad: int, passes: bool
) -> None:
    check = judged(policy, bad, 100)
    if passes:
        check.judge()
        return
    with pytest.raises(OutputRefusedError, match=f"{bad} of 100 rows") as caught:
        check.judge()
    assert caught.value.reason == Reason.QUARANTINE_LIMIT


def test_rows_are_not_kept_for_a_quarantine_that_cannot_be() -> None:
    check = validator([{"name": "c", "type": "int64"}], QuarantinePolicy())
    _, bad = check.check(pa.record_batch({"c": ["x"]}), 1)
    assert bad is None
    assert check.hopeless


def test_violations_are_counted_by_column_with_a_few_samples() -> None:
    check = validator([{"name": "c", "type": "int64"}])
    for start in range(0, 100, 10):
        check.check(pa.record_batch({"c": [f"x{start + n}" for n in range(10)]}), start + 1)
    (violation,) = check.violations
    assert (violation.column, violation.type, violation.count) == ("c", "type_mismatch", 100)
    assert violation.samples == [f"x{n}" for n in range(MAX_SAMPLES)]


def test_a_source_column_that_bears_a_quarantine_column_s_name_keeps_its_values() -> None:
    check = validator([{"name": "_error_msg", "type": "int64"}])
    _, bad = check.check(pa.record_batch({"_error_msg": ["x"]}), 1)
    assert bad is not None
    assert bad["_error_msg_"].to_pylist() == ["x"]


def test_a_column_of_nothing_but_distinct_garbage_is_checked_quickly() -> None:
    check = validator([{"name": "c", "type": "timestamp"}])
    garbage = [f"2024-13-{n % 90 + 10}T{n % 24:02d}:00:{n % 60:02d}" for n in range(20_000)]
    good, bad = check.check(pa.record_batch({"c": garbage}), 1)
    assert good.num_rows == 0
    assert bad is not None
    assert bad.num_rows == 20_000
