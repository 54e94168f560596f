"""Schema contracts: what the rows of a topic must look like.

A contract is JSON text, written by people in a topic's configuration or in a plugin's MANIFEST:

    {"mode": "strict",
     "columns": [
        {"name": "id", "type": "int64", "nullable": false},
        {"name": "sold_on", "type": "date", "format": "%d.%m.%Y"},
        {"name": "price", "type": {"kind": "decimal", "precision": 12, "scale": 2}}]}

A bare list of columns is a strict contract. `"quarantine": {"allow": true, "max_pct": 10.0,
"max_count": 100}` beside the columns sets how many bad rows are let off.

`docs/contracts.md` is the reference for users. This module only reads contracts; the worker
checks rows against them (casparian_worker/validate.py).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.outputs import LINEAGE_COLUMNS, QuarantinePolicy

MAX_CONTRACT_BYTES = 1_048_576
MAX_COLUMNS = 2_000
MAX_NAME_CHARS = 200
MAX_FORMAT_CHARS = 100
MAX_DEPTH = 8
MAX_PRECISION = 38

_TZ = re.compile(r"[A-Za-z0-9_+\-/:]{1,64}")
_UTC_ALIASES = frozenset({"utc", "z", "+00:00", "+0000", "+00", "-00:00", "etc/utc", "zulu"})
_FORMATTED_KINDS = frozenset({"date", "time", "timestamp", "timestamp_tz"})
SIMPLE_KINDS = frozenset(
    {
        "null",
        "boolean",
        "int64",
        "float64",
        "date",
        "timestamp",
        "time",
        "duration",
        "string",
        "binary",
    }
)


class ContractMode(StrEnum):
    STRICT = "strict"
    """Exactly these columns, in this order."""
    ALLOW_EXTRA = "allow_extra"
    """At least these columns, in any order; others follow them unchecked."""
    ALLOW_MISSING_OPTIONAL = "allow_missing_optional"
    """At most these columns, in any order; absent nullable ones are filled with nulls."""


@dataclass(frozen=True, slots=True)
class ColumnType:
    """A column's type.

    Attributes:
        kind: one of SIMPLE_KINDS, or decimal, timestamp_tz, list, struct.
        precision, scale: digits of a decimal, in all and after the point.
        tz: zone of a timestamp_tz; "UTC" for all of UTC's names.
        item: element type of a list.
        fields: names and types of a struct's members.
    """

    kind: str
    precision: int = 0
    scale: int = 0
    tz: str = ""
    item: "ColumnType | None" = None
    fields: tuple[tuple[str, "ColumnType"], ...] = ()

    def __str__(self) -> str:
        if self.kind == "decimal":
            return f"decimal({self.precision},{self.scale})"
        if self.kind == "timestamp_tz":
            return f"timestamp_tz({self.tz})"
        if self.kind == "list":
            return f"list<{self.item}>"
        if self.kind == "struct":
            return "struct<" + ", ".join(f"{name}: {kind}" for name, kind in self.fields) + ">"
        return self.kind

    def to_json(self) -> Any:
        """The type as `parse_contract` reads it."""
        if self.kind == "decimal":
            return {"kind": "decimal", "precision": self.precision, "scale": self.scale}
        if self.kind == "timestamp_tz":
            return {"kind": "timestamp_tz", "tz": self.tz}
        if self.kind == "list" and self.item is not None:
            return {"kind": "list", "item": self.item.to_json()}
        if self.kind == "struct":
            members = [{"name": name, "type": kind.to_json()} for name, kind in self.fields]
            return {"kind": "struct", "fields": members}
        return self.kind


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a contract.

    Attributes:
        format: strptime pattern for text that stands for a date, time or timestamp;
            "" means ISO 8601.
    """

    name: str
    type: ColumnType
    nullable: bool = True
    format: str = ""


@dataclass(frozen=True, slots=True)
class Contract:
    """What a topic's rows must look like.

    Attributes:
        quarantine: how many bad rows are let off; None leaves it to the topic's configuration.
    """

    columns: tuple[Column, ...]
    mode: ContractMode = ContractMode.STRICT
    quarantine: QuarantinePolicy | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def to_json(self) -> str:
        """Canonical text: equal contracts give equal text, and it reads back to an equal one."""
        columns: list[dict[str, Any]] = []
        for column in self.columns:
            entry: dict[str, Any] = {
                "name": column.name,
                "type": column.type.to_json(),
                "nullable": column.nullable,
            }
            if column.format:
                entry["format"] = column.format
            columns.append(entry)
        document: dict[str, Any] = {"mode": self.mode.value, "columns": columns}
        if self.quarantine is not None:
            document["quarantine"] = asdict(self.quarantine)
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def parse_contract(schema_json: str) -> Contract:
    """Read a contract.

    Raises:
        UsageError: not JSON, too large, an unknown key or type, a duplicate or reserved column;
            the message names the column.

    >>> parse_contract('[{"name": "id", "type": "int64", "nullable": false}]').names
    ('id',)
    """
    if len(schema_json) > MAX_CONTRACT_BYTES:
        raise UsageError(f"contract: longer than {MAX_CONTRACT_BYTES} characters")
    try:
        document = json.loads(schema_json, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers without end
        raise UsageError(
            f"contract: not JSON ({error})",
            hint='Write {"columns": [{"name": …, "type": …}]}.',
        ) from error
    if isinstance(document, list):
        document = {"columns": document}
    fields = _fields(document, "contract", required={"columns"}, optional={"mode", "quarantine"})
    policy = fields.get("quarantine")
    return Contract(
        _columns(fields["columns"]),
        _mode(fields.get("mode", "strict")),
        None if policy is None else _quarantine(policy),
    )


def is_utc(tz: str) -> bool:
    """Whether a time zone's name is one of UTC's."""
    return tz.lower() in _UTC_ALIASES


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise UsageError("contract: a JSON object gives a key twice")
    return fields


def _fields(value: Any, where: str, *, required: set[str], optional: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: want a JSON object, got {type(value).__name__}")
    unknown = sorted(set(value) - required - optional)
    if unknown:
        known = ", ".join(sorted(required | optional))
        raise UsageError(f"{where}: unknown key {unknown[0]!r}", hint=f"Known keys: {known}.")
    missing = sorted(required - set(value))
    if missing:
        raise UsageError(f"{where}: {missing[0]!r} is missing")
    return value


def _mode(value: Any) -> ContractMode:
    try:
        return ContractMode(value)
    except ValueError:
        known = ", ".join(ContractMode)
        raise UsageError(f"contract: unknown mode {value!r}", hint=f"Use one of {known}.") from None


def _quarantine(value: Any) -> QuarantinePolicy:
    where = "contract: 'quarantine'"
    fields = _fields(value, where, required=set(), optional={"allow", "max_pct", "max_count"})
    usual = QuarantinePolicy()
    allow = fields.get("allow", True)
    if not isinstance(allow, bool):
        raise UsageError(f"{where}: 'allow' wants true or false")
    percent = fields.get("max_pct", usual.max_pct)
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= 100:
        raise UsageError(f"{where}: 'max_pct' wants a number from 0 to 100")
    count = fields.get("max_count")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise UsageError(f"{where}: 'max_count' wants a whole number, or null for no limit")
    return QuarantinePolicy(allow, float(percent), count)


def _columns(value: Any) -> tuple[Column, ...]:
    if not isinstance(value, list) or not value:
        raise UsageError("contract: 'columns' wants a list with at least one column")
    if len(value) > MAX_COLUMNS:
        raise UsageError(f"contract: more than {MAX_COLUMNS} columns")
    columns = tuple(_column(entry, position) for position, entry in enumerate(value))
    seen: set[str] = set()
    for column in columns:
        if column.name in seen:
            raise UsageError(f"contract: column {column.name!r} is given twice")
        seen.add(column.name)
    return columns


def _column(value: Any, position: int) -> Column:
    where = f"contract: column {position + 1}"
    fields = _fields(
        value, where, required={"name"}, optional={"type", "nullable", "format", "description"}
    )
    name = _name(fields["name"], where)
    where = f"contract: column {name!r}"
    if name in LINEAGE_COLUMNS:
        raise UsageError(f"{where} is reserved: it is added to every row")
    kind = _type(fields.get("type", "string"), where, depth=0)
    nullable = fields.get("nullable", True)
    if not isinstance(nullable, bool):
        raise UsageError(f"{where}: 'nullable' wants true or false")
    return Column(name, kind, nullable, _format(fields.get("format"), kind, where))


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: 'name' wants text")
    if len(value) > MAX_NAME_CHARS or any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise UsageError(f"{where}: the name is too long or has control characters")
    return value


def _format(value: Any, kind: ColumnType, where: str) -> str:
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or len(value) > MAX_FORMAT_CHARS or "%" not in value:
        raise UsageError(f"{where}: 'format' wants a strptime pattern such as '%d.%m.%Y'")
    if kind.kind not in _FORMATTED_KINDS:
        raise UsageError(f"{where}: type {kind} takes no 'format'")
    if kind.kind == "timestamp_tz" and "%z" not in value:
        raise UsageError(
            f"{where}: the format of a timestamp_tz has no %z",
            hint="Without an offset in the text the instant would be a guess.",
        )
    return value


def _type(value: Any, where: str, depth: int) -> ColumnType:
    if depth > MAX_DEPTH:
        raise UsageError(f"{where}: types are nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        if value not in SIMPLE_KINDS:
            known = ", ".join(sorted(SIMPLE_KINDS))
            raise UsageError(f"{where}: unknown type {value!r}", hint=f"Simple types: {known}.")
        return ColumnType(value)
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "decimal":
        return _decimal(value, where)
    if kind == "timestamp_tz":
        return _timestamp_tz(value, where)
    if kind == "list":
        fields = _fields(value, where, required={"kind", "item"}, optional=set())
        return ColumnType("list", item=_type(fields["item"], where, depth + 1))
    if kind == "struct":
        return _struct(value, where, depth)
    raise UsageError(
        f"{where}: unknown type {value!r}",
        hint="Compound types are decimal, timestamp_tz, list and struct.",
    )


def _decimal(value: Any, where: str) -> ColumnType:
    fields = _fields(value, where, required={"kind", "precision", "scale"}, optional=set())
    precision, scale = fields["precision"], fields["scale"]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (precision, scale)):
        raise UsageError(f"{where}: precision and scale want whole numbers")
    if not (1 <= precision <= MAX_PRECISION and 0 <= scale <= precision):
        raise UsageError(
            f"{where}: want 1 <= precision <= {MAX_PRECISION}, 0 <= scale <= precision"
        )
    return ColumnType("decimal", precision=precision, scale=scale)


def _timestamp_tz(value: Any, where: str) -> ColumnType:
    fields = _fields(value, where, required={"kind", "tz"}, optional=set())
    tz = fields["tz"]
    if not isinstance(tz, str) or not _TZ.fullmatch(tz):
        raise UsageError(f"{where}: 'tz' wants a zone such as UTC, +02:00 or Europe/Paris")
    return ColumnType("timestamp_tz", tz="UTC" if is_utc(tz) else tz)


def _struct(value: Any, where: str, depth: int) -> ColumnType:
    fields = _fields(value, where, required={"kind", "fields"}, optional=set())
    members = fields["fields"]
    if not isinstance(members, list) or not members or len(members) > MAX_COLUMNS:
        raise UsageError(f"{where}: a struct wants a list of fields")
    parsed: list[tuple[str, ColumnType]] = []
    for member in members:
        pair = _fields(member, where, required={"name", "type"}, optional=set())
        parsed.append((_name(pair["name"], where), _type(pair["type"], where, depth + 1)))
    if len({name for name, _ in parsed}) != len(parsed):
        raise UsageError(f"{where}: a struct names a field twice")
    return ColumnType("struct", fields=tuple(parsed))
