"""Names and schemas of our kinds, as far as they show without an API server."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casparian_flow.domain.contracts import parse_contract
from casparian_flow.domain.errors import UsageError
from casparian_flow.kube import names, reasons
from casparian_flow.kube.crds import DEFINITIONS, definition_body
from casparian_flow.kube.models import TopicContract, plugin_of, to_body
from casparian_flow.trust.policy import Code

REPOSITORY = Path(__file__).parents[2]


def test_the_files_in_crds_are_what_the_models_say() -> None:
    done = subprocess.run(
        [sys.executable, "tools/crds.py", "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((REPOSITORY / "crds").glob("*.yaml"))) == len(DEFINITIONS)


def fields(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(field, f"{path}.{name}")
    if "items" in schema:
        yield from fields(schema["items"], f"{path}[]")


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda d: d.kind)
def test_every_field_is_described_and_every_rule_has_a_message(definition: Any) -> None:
    (version,) = definition_body(definition)["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    listed = dict(fields(schema, definition.kind))
    assert len(listed) > 20
    for path, field in listed.items():
        if path != f"{definition.kind}.metadata":
            assert field["description"].endswith((".", ".)")), path
        for rule in field.get("x-kubernetes-validations", ()):
            assert len(rule["message"]) > 20, path
            assert len(rule["rule"]) < 1000, path


name_parts = st.lists(st.text(max_size=80), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(name_parts, name_parts)
def test_object_names_are_dns_labels_and_two_lists_of_parts_never_share_one(
    first: list[str], second: list[str]
) -> None:
    made = names.object_name(*first)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", made)
    assert len(made) <= names.NAME_CHARS_MAX
    assert (made == names.object_name(*second)) == (first == second)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=120), st.text(max_size=120))
def test_label_values_are_fit_and_differ_where_the_texts_do(first: str, second: str) -> None:
    made = names.label_value(first)
    assert re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", made)
    assert len(made) <= 63
    assert (made == names.label_value(second)) == (first == second)


def test_every_finding_of_the_trust_policy_has_a_reason() -> None:
    assert set(reasons.VERIFIED_BY_TRUST_CODE) == set(Code)


def test_every_condition_and_reason_is_told_in_the_document() -> None:
    page = (REPOSITORY / "docs" / "crds.md").read_text("utf-8")
    enums = [e for e in vars(reasons).values() if isinstance(e, type) and issubclass(e, StrEnum)]
    for enum in enums:
        told = page.partition(f"## {enum.__name__}\n")[2].partition("\n## ")[0]
        for word in enum if enum is not StrEnum else ():
            assert f"| `{word}` | " in told, (enum, word)


def test_every_reason_is_given_by_some_part_of_the_operator() -> None:
    folder = REPOSITORY / "operator" / "casparian_flow" / "kube"
    parts = "".join(p.read_text("utf-8") for p in folder.glob("*.py") if p.stem != "crds")
    enums = [e for e in vars(reasons).values() if isinstance(e, type) and issubclass(e, StrEnum)]
    given = {f"{e.__name__}.{m.name}" for e in enums if e is not StrEnum for m in e}
    assert {name for name in given if name not in parts} == set()


def test_a_contract_in_an_object_is_one_that_workers_read() -> None:
    given = {
        "topic": "sales",
        "mode": "allow_extra",
        "columns": [
            {"name": "id", "type": "int64", "nullable": False},
            {"name": "on", "type": "date", "format": "%d.%m.%Y"},
            {"name": "price", "type": "decimal", "precision": 12, "scale": 2},
            {"name": "at", "type": "timestamp_tz", "tz": "Europe/Zurich"},
            {"name": "tags", "type": "list", "item": {"type": "string"}},
            {
                "name": "who",
                "type": "struct",
                "fields": [{"name": "sum", "type": "decimal", "precision": 9}],
            },
        ],
        "quarantine": {"allow": True, "maxPercent": 5, "maxCount": 100},
    }
    contract = parse_contract(json.dumps(TopicContract.model_validate(given).to_json()))
    assert contract.names == ("id", "on", "price", "at", "tags", "who")
    assert [str(column.type) for column in contract.columns][2:] == [
        "decimal(12,2)",
        "timestamp_tz(Europe/Zurich)",
        "list<string>",
        "struct<sum: decimal(9,0)>",
    ]
    assert contract.quarantine is not None
    assert contract.quarantine.max_count == 100


def test_what_is_no_object_of_a_kind_names_the_field_and_how_to_learn_more() -> None:
    with pytest.raises(UsageError, match=r"spec\.version") as refused:
        plugin_of({"metadata": {"name": "sales"}, "spec": {"source": {"inline": "aaaa"}}})
    assert "kubectl explain casparianplugin" in refused.value.hint


def test_a_model_is_written_as_it_is_read() -> None:
    body = {
        "metadata": {"name": "sales"},
        "spec": {"version": "1.0.0", "source": {"inline": "aaaa"}, "sourceRoots": ["inbox"]},
    }
    plugin = plugin_of(body)
    assert to_body(plugin.spec)["sourceRoots"] == ["inbox"]
    assert plugin_of({"metadata": body["metadata"], "spec": to_body(plugin.spec)}) == plugin
