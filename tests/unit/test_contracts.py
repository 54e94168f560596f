"""Reading contracts: what is accepted, and what is refused with which words."""

import json
from typing import Any

import pytest

from casparian_flow.domain.contracts import (
    MAX_COLUMNS,
    MAX_CONTRACT_BYTES,
    ContractMode,
    parse_contract,
)
from casparian_flow.domain.errors import UsageError


def columns(*entries: dict[str, Any]) -> str:
    return json.dumps({"columns": list(entries)})


def test_a_bare_list_is_a_strict_contract() -> None:
    contract = parse_contract('[{"name": "id", "type": "int64", "nullable": false}]')
    assert contract.mode is ContractMode.STRICT
    assert contract.names == ("id",)
    assert not contract.columns[0].nullable


def test_a_column_is_nullable_text_unless_it_says_otherwise() -> None:
    (column,) = parse_contract('[{"name": "note"}]').columns
    assert (str(column.type), column.nullable, column.format) == ("string", True, "")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("date", "date"),
        ({"kind": "decimal", "precision": 12, "scale": 2}, "decimal(12,2)"),
        ({"kind": "timestamp_tz", "tz": "+00:00"}, "timestamp_tz(UTC)"),
        ({"kind": "timestamp_tz", "tz": "Europe/Paris"}, "timestamp_tz(Europe/Paris)"),
        ({"kind": "list", "item": "int64"}, "list<int64>"),
        (
            {"kind": "struct", "fields": [{"name": "x", "type": {"kind": "list", "item": "date"}}]},
            "struct<x: list<date>>",
        ),
    ],
)
def test_types_read_back_from_their_canonical_text(written: Any, read: str) -> None:
    contract = parse_contract(columns({"name": "c", "type": written}))
    assert str(contract.columns[0].type) == read
    assert parse_contract(contract.to_json()) == contract


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "'columns' is missing"),
        ("[]", "at least one column"),
        ("3", "want a JSON object"),
        ('{"columns": [{"name": "a"}], "colour": 1}', "unknown key 'colour'"),
        ('{"columns": [{"name": "a"}], "mode": "lax"}', "unknown mode 'lax'"),
        ('[{"name": "a"}, {"name": "a"}]', "given twice"),
        ('[{"name": "a", "name": "b"}]', "gives a key twice"),
        ('[{"type": "int64"}]', "'name' is missing"),
        ('[{"name": ""}]', "'name' wants text"),
        ('[{"name": "a\\nb"}]', "control characters"),
        ('[{"name": "a", "type": "int"}]', "unknown type 'int'"),
        ('[{"name": "a", "nullable": "no"}]', "true or false"),
        ('[{"name": "_cf_job_id"}]', "reserved"),
        ('[{"name": "a", "type": "int64", "format": "%d"}]', "takes no 'format'"),
        ('[{"name": "a", "type": "date", "format": "dd"}]', "strptime"),
        (
            columns({"name": "a", "type": {"kind": "timestamp_tz", "tz": "UTC"}, "format": "%d"}),
            "no %z",
        ),
        (columns({"name": "a", "type": {"kind": "timestamp_tz", "tz": "x; DROP"}}), "zone"),
        (columns({"name": "a", "type": {"kind": "decimal", "precision": 39, "scale": 0}}), "38"),
        (columns({"name": "a", "type": {"kind": "decimal", "precision": 5, "scale": 6}}), "scale"),
        (
            columns({"name": "a", "type": {"kind": "decimal", "precision": True, "scale": 0}}),
            "whole numbers",
        ),
        (columns({"name": "a", "type": {"kind": "map"}}), "unknown type"),
        (columns({"name": "a", "type": {"kind": "struct", "fields": []}}), "list of fields"),
    ],
)
def test_a_wrong_contract_is_refused_in_words_that_name_the_fault(text: str, said: str) -> None:
    with pytest.raises(UsageError, match="contract") as caught:
        parse_contract(text)
    assert said in str(caught.value)


def test_size_and_depth_are_bounded() -> None:
    with pytest.raises(UsageError, match="longer than"):
        parse_contract(" " * (MAX_CONTRACT_BYTES + 1))
    with pytest.raises(UsageError, match=f"more than {MAX_COLUMNS}"):
        parse_contract(json.dumps([{"name": f"c{n}"} for n in range(MAX_COLUMNS + 1)]))
    nested: Any = "int64"
    for _ in range(12):
        nested = {"kind": "list", "item": nested}
    with pytest.raises(UsageError, match="deep"):
        parse_contract(columns({"name": "a", "type": nested}))
    with pytest.raises(UsageError, match="not JSON"):
        parse_contract("[" + "1" * 5_000 + "]")
