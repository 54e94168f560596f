"""Batches of one topic need not agree on their schema; a file or table has only one.

pandas reads a column as int64 in one chunk and, with a gap in it, as float64 in the next; a column
that is empty so far has a type that means nothing. `SchemaTracker` holds the schema that all rows
so far fit, and tells when a batch widens it.
"""

from collections.abc import Sequence

import pyarrow as pa

from casparian_flow.domain.errors import OutputRefusedError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import LINEAGE_COLUMNS
from casparian_worker.arrays import (
    CONSTANT_TEXT,
    ArrowArray,
    ArrowField,
    nulls,
    plain,
    plain_type,
)


class SchemaTracker:
    """The widening schema of one topic.

    Attributes:
        topic: for messages.
        schema: what `conform` casts to; None before the first batch. Lineage columns come last.
        filled: names of the columns that have held a value so far.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.schema: pa.Schema | None = None
        self.filled: set[str] = set()

    def admit(self, batch: pa.RecordBatch) -> bool:
        """Take a batch's schema in. True if this changed the schema.

        Raises:
            OutputRefusedError: no type holds both the earlier rows and these (CONTRACT), or a
                column name is given twice.
        """
        filled = self._newly_filled(batch)
        schema = self.schema
        if schema is None or not batch.schema.equals(schema):
            schema = self._merged(batch, filled)
        self.filled |= filled
        if self.schema is not None and schema.equals(self.schema):
            return False
        self.schema = schema
        return True

    def conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch in the current schema; absent columns are null.

        Raises:
            OutputRefusedError: a value does not survive the conversion.
        """
        schema = self.schema
        if schema is None or batch.schema.equals(schema):
            return batch
        arrays = [self._column(batch, field) for field in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _newly_filled(self, batch: pa.RecordBatch) -> set[str]:
        names = set(batch.schema.names)
        if len(names) != batch.num_columns:
            twice = sorted({n for n in names if batch.schema.names.count(n) > 1})
            raise self._refusal(f"column {twice[0]!r} is given twice")
        return {
            name
            for name in names - self.filled
            if batch.column(name).null_count < batch.num_rows
            and not pa.types.is_null(batch.column(name).type)
        }

    def _merged(self, batch: pa.RecordBatch, filled: set[str]) -> pa.Schema:
        known = {} if self.schema is None else {field.name: field for field in self.schema}
        fresh = {field.name: _plain_field(field) for field in batch.schema}
        merged = [
            self._merged_field(field, fresh.get(name), filled) for name, field in known.items()
        ]
        for name, field in fresh.items():
            if name not in known:
                # Rows written before have no value for it.
                merged.append(field if self.schema is None else field.with_nullable(True))
        return pa.schema(_lineage_last(merged))

    def _merged_field(
        self, known: ArrowField, fresh: ArrowField | None, filled: set[str]
    ) -> ArrowField:
        if fresh is None:
            return known.with_nullable(True)
        nullable = known.nullable or fresh.nullable
        if known.type == fresh.type:
            return known.with_nullable(nullable)
        if known.name not in self.filled:
            return fresh.with_nullable(True)
        if known.name not in filled and pa.types.is_null(fresh.type):
            return known.with_nullable(True)
        return pa.field(known.name, self._common_type(known, fresh), nullable)

    def _common_type(self, known: ArrowField, fresh: ArrowField) -> pa.DataType:
        pair = [pa.schema([known.with_nullable(True)]), pa.schema([fresh.with_nullable(True)])]
        try:
            common: pa.DataType = pa.unify_schemas(pair, promote_options="permissive").field(0).type
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise self._refusal(
                f"column {known.name!r} is {known.type} in earlier rows and {fresh.type} in later "
                "ones, and no type holds both",
                {"column": known.name, "expected": str(known.type), "actual": str(fresh.type)},
            ) from error
        return common

    def _column(self, batch: pa.RecordBatch, field: ArrowField) -> ArrowArray:
        position = batch.schema.get_field_index(field.name)
        if position < 0:
            return nulls(batch.num_rows, field.type)
        array: ArrowArray = batch.column(position)
        if array.type == field.type:
            return array
        if array.null_count == batch.num_rows:
            return nulls(batch.num_rows, field.type)
        try:
            converted: ArrowArray = plain(array).cast(field.type)
            return converted
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self._refusal(
                f"column {field.name!r}: a {array.type} value does not fit {field.type}, the type "
                f"of earlier rows ({error})",
                {"column": field.name, "expected": str(field.type), "actual": str(array.type)},
            ) from error

    def _refusal(
        self, message: str, diagnostics: dict[str, object] | None = None
    ) -> OutputRefusedError:
        return OutputRefusedError(
            f"topic {self.topic!r}: {message}",
            reason=Reason.CONTRACT,
            hint="Convert the column in the plugin, or give the topic a contract.",
            diagnostics=diagnostics,
        )


def _plain_field(field: ArrowField) -> ArrowField:
    if field.name in LINEAGE_COLUMNS and field.type == CONSTANT_TEXT:
        return field.remove_metadata()
    return pa.field(field.name, plain_type(field.type), field.nullable)


def _lineage_last(fields: Sequence[ArrowField]) -> list[ArrowField]:
    own = [field for field in fields if field.name not in LINEAGE_COLUMNS]
    return own + [field for field in fields if field.name in LINEAGE_COLUMNS]
