"""Small conversions of Arrow arrays that checking and writing share."""

import json
import struct
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pyarrow as pa
import pyarrow.compute
import pyarrow.types as pt

if TYPE_CHECKING:
    ArrowArray: TypeAlias = pa.Array[Any]
    ArrowField: TypeAlias = pa.Field[Any]
else:
    ArrowArray = pa.Array
    ArrowField = pa.Field

compute: Final[Any] = pyarrow.compute
"""Arrow's kernels, untyped: the published stubs know fewer of their signatures than exist."""


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that the same values have without an encoding that only exists in memory."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pt.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pt.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pt.is_string_view(kind):
        return pa.string()
    if pt.is_binary_view(kind):
        return pa.binary()
    return kind


def plain(array: Any) -> ArrowArray:
    """The array in its `plain_type`."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage)
    if pt.is_dictionary(kind):
        return plain(array.dictionary_decode())
    if pt.is_run_end_encoded(kind):
        return plain(compute.run_end_decode(array))
    target = plain_type(kind)
    result: ArrowArray = array if target == kind else array.cast(target)
    return result


def is_text(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    return bool(
        pt.is_binary(kind)
        or pt.is_large_binary(kind)
        or pt.is_fixed_size_binary(kind)
        or pt.is_binary_view(kind)
    )


def as_text(array: ArrowArray) -> ArrowArray:
    """Any array as text: bytes as hex, lists and structs as JSON, the rest as Arrow prints it.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: there is no text for a value or the type.
    """
    values = plain(array)
    kind = values.type
    if pt.is_string(kind):
        return values
    if is_bytes(kind):
        texts = [None if raw is None else raw.hex() for raw in values.to_pylist()]
        return pa.array(texts, pa.string())
    if pt.is_nested(kind):
        try:
            documents = [None if v is None else _json(v) for v in values.to_pylist()]
        except (ValueError, OverflowError) as error:  # a time beyond Python's, a name given twice
            raise pa.ArrowInvalid(f"a value of type {kind} has no text: {error}") from error
        return pa.array(documents, pa.string())
    return values.cast(pa.string())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_json_leaf)


def _json_leaf(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def constant_text(text: str, length: int) -> ArrowArray:
    """`text` repeated, as a dictionary array of one entry: one byte a row, made at once."""
    indices = pa.Array.from_buffers(pa.int8(), length, [None, pa.py_buffer(bytes(length))])
    raw = text.encode()
    offsets = struct.pack("=ii", 0, len(raw))
    # From buffers: pa.array() of a list imports pandas, half a second and 50 MB for nothing.
    value = pa.StringArray.from_buffers(1, pa.py_buffer(offsets), pa.py_buffer(raw))
    return pa.DictionaryArray.from_arrays(indices, value)


CONSTANT_TEXT = pa.dictionary(pa.int8(), pa.string())
"""Type of `constant_text`."""


def nulls(length: int, kind: Any) -> ArrowArray:
    """An array of nothing but nulls."""
    array: ArrowArray = pa.nulls(length, kind)
    return array
