"""docs/protocol.md and the code say the same."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from casparian_flow.domain.outputs import OutputEntry, QuarantinePolicy, SinkSpec
from casparian_flow.domain.records import Limits, Sample
from casparian_flow.protocol import frames, limits
from casparian_flow.protocol.codec import MESSAGE_OF
from casparian_flow.protocol.frames import Op

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text("utf-8")
KINDS: dict[str, type[Any]] = {op.name: kind for op, kind in MESSAGE_OF.items()} | {
    kind.__name__: kind for kind in (OutputEntry, SinkSpec, QuarantinePolicy, Limits, Sample)
}


def rows_under(heading: str) -> list[list[str]]:
    section = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", DOCUMENT, re.M | re.S)
    assert section, f"docs/protocol.md has no section {heading}"
    lines = [line for line in section[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def default_of(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return dataclasses.MISSING


def test_the_op_table_lists_every_op_with_its_number() -> None:
    documented = {row[1]: int(row[0]) for row in rows_under("Ops")}
    assert documented == {op.name: op.value for op in Op}


def test_every_direction_is_one_of_the_known_ones() -> None:
    for _, name, direction, _ in rows_under("Ops"):
        assert set(direction.split(", ")) <= {"W→S", "S→W", "C→S", "S→C"}, name


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_field_table_lists_every_field_with_its_default(name: str) -> None:
    fields = {spec.name: default_of(spec) for spec in dataclasses.fields(KINDS[name])}
    rows = rows_under(name)
    assert [row[0] for row in rows] == list(fields)
    for field, _, default, _ in rows:
        expected = fields[field]
        if expected is dataclasses.MISSING:
            assert default == "required", field
        elif isinstance(expected, QuarantinePolicy):
            assert default == "all defaults", field
        else:
            listed = list(expected) if isinstance(expected, tuple) else expected
            assert json.loads(default.strip("`")) == listed, field


def test_the_table_of_bounds_is_the_code_s() -> None:
    documented = {row[0]: int(re.sub(r"[^0-9]", "", row[1])) for row in rows_under("Bounds")}

    assert documented == {
        "payload of a message or BATCH": frames.PAYLOAD_BYTES_MAX,
        "messages in a BATCH": frames.BATCH_ITEMS_MAX,
        "name": limits.NAME_CHARS_MAX,
        "text": limits.TEXT_CHARS_MAX,
        "outputs of one job": limits.ENTRIES_MAX,
        "jobs outstanding at one worker": limits.CREDIT_MAX,
    }
