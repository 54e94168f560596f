"""The quarantine policy that a contract carries."""

import json
from typing import Any

import pytest

from casparian_flow.domain.contracts import Contract, parse_contract
from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.outputs import QuarantinePolicy


def contract(quarantine: Any) -> Contract:
    return parse_contract(json.dumps({"columns": [{"name": "a"}], "quarantine": quarantine}))


def test_a_contract_without_a_policy_leaves_it_to_the_topic() -> None:
    assert parse_contract('[{"name": "a"}]').quarantine is None


def test_a_policy_allows_within_the_usual_limits_unless_it_says_otherwise() -> None:
    assert contract({}).quarantine == QuarantinePolicy(True, 10.0, None)
    assert contract({"allow": False}).quarantine == QuarantinePolicy(False, 10.0, None)
    assert contract({"max_pct": 2, "max_count": 7}).quarantine == QuarantinePolicy(True, 2.0, 7)


def test_a_policy_survives_its_canonical_text() -> None:
    found = contract({"max_count": 3})
    assert parse_contract(found.to_json()) == found


@pytest.mark.parametrize(
    ("policy", "part"),
    [
        ([], "want a JSON object"),
        ({"allow": 1}, "'allow'"),
        ({"max_pct": True}, "'max_pct'"),
        ({"max_pct": 101}, "'max_pct'"),
        ({"max_count": -1}, "'max_count'"),
        ({"max_rows": 1}, "unknown key 'max_rows'"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policy: Any, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        contract(policy)
