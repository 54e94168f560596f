"""Turning an Arrow array into a contract's type, value by value, without losing anything.

A batch is converted as a whole first, which is the common case and one kernel call. Only if that
fails are its distinct values halved until the ones at fault stand alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.types as pt

from casparian_flow.domain.contracts import Column, ColumnType, is_utc
from casparian_worker.arrays import ArrowArray, compute, is_bytes, is_text, nulls

NULL_NOT_ALLOWED: Final = "null_not_allowed"
TYPE_MISMATCH: Final = "type_mismatch"
FORMAT_MISMATCH: Final = "format_mismatch"

_MICROSECOND: Final = "us"
_INTEGER_DIGITS: Final = 20
_HALVE_ABOVE: Final = 16
"""Shorter runs are tried value by value: where one value is at fault, its neighbours often are."""
_EPOCH_DAY: Final = "1970-01-01 "
_NUMBER: Final = r"[0-9]+\.?[0-9]*|\.[0-9]+"
_CLOCK: Final = r"[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?"
_DAY: Final = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_OFFSET: Final = r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)"
# Arrow's own parsers take more than this (hexadecimal numbers, "1" for true).
_TEXT_PATTERNS: Final = {
    "boolean": r"(?i)^(true|false)$",
    "int64": r"^[+-]?[0-9]{1,19}$",
    "float64": rf"^[+-]?({_NUMBER})([eE][+-]?[0-9]{{1,3}})?$",
    "date": rf"^{_DAY}$",
    "time": rf"^{_CLOCK}$",
    "timestamp": rf"^{_DAY}([ T]{_CLOCK})?$",
    "timestamp_tz": rf"^{_DAY}[ T]{_CLOCK}{_OFFSET}$",
}
_NUMERIC_KINDS: Final = frozenset({"int64", "float64", "decimal", "boolean"})
_KERNEL_DIRECTIVES: Final = re.compile(r"(?:[^%]|%[YmdHMS])*")

Convert = Callable[[ArrowArray], ArrowArray]
"""Converts a whole array, or raises pa.ArrowInvalid if one value cannot be."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What became of a column.

    Attributes:
        values: in the contract's type, null where a value could not be converted.
        bad: true for those values; None if there are none.
        violation: what is wrong with them.
    """

    values: ArrowArray
    bad: ArrowArray | None = None
    violation: str = TYPE_MISMATCH


def arrow_type(kind: ColumnType) -> pa.DataType:
    """The Arrow type of a contract's type."""
    if kind.kind == "decimal":
        return pa.decimal128(kind.precision, kind.scale)
    if kind.kind == "timestamp_tz":
        return pa.timestamp(_MICROSECOND, kind.tz)
    if kind.kind == "list" and kind.item is not None:
        return pa.list_(arrow_type(kind.item))
    if kind.kind == "struct":
        return pa.struct([(name, arrow_type(member)) for name, member in kind.fields])
    return _SIMPLE[kind.kind]


_SIMPLE: Final[dict[str, pa.DataType]] = {
    "null": pa.null(),
    "boolean": pa.bool_(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "date": pa.date32(),
    "timestamp": pa.timestamp(_MICROSECOND),
    "time": pa.time64(_MICROSECOND),
    "duration": pa.duration(_MICROSECOND),
    "string": pa.string(),
    "binary": pa.binary(),
}


def convert(array: ArrowArray, column: Column) -> Conversion | None:
    """Convert a column; None if its type cannot stand for the contract's at all.

    Args:
        array: in its plain type (arrays.plain).
    """
    target = arrow_type(column.type)
    if array.type == target:
        return Conversion(array)
    if array.null_count == len(array) or pt.is_null(array.type):
        # A column without values has whatever type its reader guessed.
        return Conversion(nulls(len(array), target))
    if is_text(array.type) and column.type.kind != "string":
        return _from_text(array, column, target)
    if not _may_widen(array.type, column.type):
        return None
    if column.type.kind == "date":
        return _salvaged(array, _to_date, TYPE_MISMATCH)
    if column.type.kind == "decimal" and pt.is_integer(array.type):
        # Arrow wants room for every integer there could be, not only for those that are there.
        array = _cast(array, pa.decimal256(_INTEGER_DIGITS + column.type.scale, column.type.scale))
    return _salvaged(array, lambda piece: _cast(piece, target), TYPE_MISMATCH)


def _may_widen(source: pa.DataType, kind: ColumnType) -> bool:
    """Whether some values of the source type are values of the contract's type."""
    naive = pt.is_timestamp(source) and source.tz is None
    numeric = pt.is_integer(source) or pt.is_floating(source)
    allowed = {
        "boolean": pt.is_boolean(source),
        "int64": numeric,
        "float64": numeric,
        "decimal": pt.is_decimal(source) or pt.is_integer(source),
        "date": pt.is_date(source) or naive,
        "timestamp": pt.is_date(source) or naive,
        "timestamp_tz": pt.is_timestamp(source) and _same_zone(source.tz, kind.tz),
        "time": pt.is_time(source),
        "duration": pt.is_duration(source),
        "string": is_text(source),
        "binary": is_bytes(source),
        "list": pt.is_list(source) or pt.is_large_list(source) or pt.is_fixed_size_list(source),
        "struct": pt.is_struct(source) and _same_members(source, kind),
    }
    return allowed.get(kind.kind, False)


def _same_zone(source: str | None, target: str) -> bool:
    if source is None:
        return False
    return source == target or (is_utc(source) and is_utc(target))


def _same_members(source: pa.DataType, kind: ColumnType) -> bool:
    return [source.field(i).name for i in range(source.num_fields)] == [n for n, _ in kind.fields]


def _from_text(array: ArrowArray, column: Column, target: pa.DataType) -> Conversion | None:
    kind = column.type.kind
    pattern = _decimal_pattern(column.type) if kind == "decimal" else _TEXT_PATTERNS.get(kind)
    if pattern is None:
        return None
    violation = TYPE_MISMATCH if kind in _NUMERIC_KINDS else FORMAT_MISMATCH
    text = array.cast(pa.string())
    if column.format:
        return _salvaged(text, lambda piece: _by_format(piece, column.format, target), violation)
    candidates = compute.match_substring_regex(text, pattern)
    plausible = compute.if_else(candidates, text, pa.scalar(None, pa.string()))
    result = _salvaged(plausible, lambda piece: _parse(piece, kind, target), violation)
    return _with_faults_of(text, result.values, violation)


def _decimal_pattern(kind: ColumnType) -> str:
    """Numbers that fit the precision and scale without rounding."""
    digits = f"0*[0-9]{{1,{max(kind.precision - kind.scale, 1)}}}"
    fraction = f"[0-9]{{0,{kind.scale}}}0*"
    return rf"^[+-]?({digits}(\.{fraction})?|\.[0-9]{fraction})$"


def _parse(text: ArrowArray, kind: str, target: pa.DataType) -> ArrowArray:
    if kind in ("int64", "float64", "decimal"):
        return _cast(compute.utf8_ltrim(text, "+"), target)
    if kind == "boolean":
        return _cast(compute.utf8_lower(text), target)
    if kind == "time":
        dated = compute.binary_join_element_wise(_EPOCH_DAY, text, "")
        return _cast(_cast(dated, pa.timestamp(_MICROSECOND)), target)
    return _cast(text, target)


def _salvaged(array: ArrowArray, change: Convert, violation: str) -> Conversion:
    """Convert what can be; values that cannot become null and are marked."""
    try:
        return Conversion(change(array))
    except pa.ArrowInvalid:
        if pt.is_nested(array.type):
            values = _halved(array, change)
        else:
            distinct = compute.dictionary_encode(array)
            values = _halved(distinct.dictionary, change).take(distinct.indices)
        return _with_faults_of(array, values, violation)


def _with_faults_of(source: ArrowArray, values: ArrowArray, violation: str) -> Conversion:
    """Mark what had a value before and has none now."""
    if values.null_count == source.null_count:
        return Conversion(values)
    bad = compute.and_(source.is_valid(), values.is_null())
    return Conversion(values, bad, violation)


def _halved(array: ArrowArray, change: Convert) -> ArrowArray:
    """`change` applied to each value that it can be applied to, the others null."""
    try:
        return change(array)
    except pa.ArrowInvalid:
        if len(array) == 1:
            return nulls(1, change(array.slice(0, 0)).type)
    step = (len(array) + 1) // 2 if len(array) > _HALVE_ABOVE else 1
    pieces = [_halved(array.slice(at, step), change) for at in range(0, len(array), step)]
    joined: ArrowArray = pa.concat_arrays(pieces)
    return joined


def _to_date(array: ArrowArray) -> ArrowArray:
    """Timestamps at midnight as dates; Arrow's own cast would drop the time of day silently."""
    dates = _cast(array, pa.date32())
    if not _cast(dates, array.type).equals(array):
        raise pa.ArrowInvalid("a time of day would be lost")
    return dates


def _by_format(text: ArrowArray, pattern: str, target: Any) -> ArrowArray:
    """Parse with a strptime pattern.

    Arrow's kernel is quick but takes 31 February for 2 March, so its answer counts only where it
    prints back to the same text; Python decides the rest.
    """
    if len(text) > 1 and _KERNEL_DIRECTIVES.fullmatch(pattern) and not pt.is_time(target):
        stamps = compute.strptime(text, format=pattern, unit=_MICROSECOND, error_is_null=True)
        if stamps.null_count == text.null_count and _prints_back(stamps, pattern, text):
            return _cast(stamps, target)
    values = [None if raw is None else _strptime(raw, pattern, target) for raw in text.to_pylist()]
    parsed: ArrowArray = pa.array(values, target)
    return parsed


def _prints_back(stamps: ArrowArray, pattern: str, text: ArrowArray) -> bool:
    # Arrow's %S prints fractions, so whole seconds are printed from a coarser unit.
    printed = compute.strftime(_cast(stamps, pa.timestamp("s")), format=pattern)
    return bool(printed.equals(text))


def _strptime(raw: str, pattern: str, target: Any) -> object:
    try:
        moment = datetime.strptime(raw, pattern)  # noqa: DTZ007 - naive text stays naive
    except ValueError as error:
        raise pa.ArrowInvalid(f"{raw!r} does not match {pattern!r}") from error
    if pt.is_time(target):
        return moment.time()
    if pt.is_date(target):
        return moment.date()
    if target.tz is None:
        return moment.replace(tzinfo=None)
    return moment.astimezone(UTC)


def _cast(array: ArrowArray, target: pa.DataType) -> ArrowArray:
    result: ArrowArray = array.cast(target)
    return result
