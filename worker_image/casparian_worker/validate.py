"""Checking rows against a topic's contract, a batch at a time, with Arrow's kernels.

Columns are judged first: a wrong set, order or type cannot be mended row by row and refuses the
output for good. Then values: each is converted to the contract's type if nothing is lost by it
(widening integers, integral floats, text that reads as a number, date, time or decimal), and the
rows with a value that cannot be, or a null where none may be, are split off for quarantine.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from casparian_flow.domain.contracts import Column, Contract, ContractMode
from casparian_flow.domain.errors import OutputRefusedError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.outputs import QuarantinePolicy
from casparian_worker.arrays import ArrowArray, as_text, compute, nulls, plain
from casparian_worker.conversion import FORMAT_MISMATCH, NULL_NOT_ALLOWED, arrow_type, convert

ROW_ID_COLUMN = "__cf_row_id"
"""A plugin that knows a row's place in its source says so in this column; it is not written."""
MAX_SAMPLES = 5
MAX_SAMPLE_CHARS = 120


@dataclass(slots=True)
class Violation:
    """One kind of fault in one column.

    Attributes:
        type: null_not_allowed, type_mismatch or format_mismatch.
        samples: the first few offending values as text.
    """

    column: str
    type: str
    count: int = 0
    samples: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return {
            "violation_type": self.type,
            "column_name": self.column,
            "count": self.count,
            "samples": list(self.samples),
        }


class Validator:
    """Checks all batches of one topic in one job.

    Attributes:
        rows: rows seen so far, good and bad.
        bad_rows: of those, the ones that break the contract.
    """

    def __init__(self, contract: Contract, policy: QuarantinePolicy, *, topic: str) -> None:
        """
        Args:
            topic: for messages.
        """
        self.contract = contract
        self.policy = policy
        self.rows = 0
        self.bad_rows = 0
        self._topic = topic
        self._violations: dict[tuple[str, str], Violation] = {}
        self._schema = pa.schema(
            [pa.field(c.name, arrow_type(c.type), c.nullable) for c in contract.columns]
        )

    @property
    def violations(self) -> list[Violation]:
        """What was wrong so far, by column and kind."""
        return list(self._violations.values())

    @property
    def hopeless(self) -> bool:
        """Whether the policy is broken whatever rows may follow."""
        over_count = self.policy.max_count is not None and self.bad_rows > self.policy.max_count
        return self.bad_rows > 0 and (not self.policy.allow or over_count)

    def check(
        self, batch: pa.RecordBatch, first_row: int
    ) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        """Split a batch.

        Args:
            batch: rows as the plugin published them, without lineage columns.
            first_row: number of the batch's first row within the topic, counted from 1; goes
                into `_source_row` unless the plugin says better (ROW_ID_COLUMN).

        Returns:
            The good rows in the contract's schema, and the bad ones for quarantine: their source
            columns as text, then `_error_msg`, `_violation_type`, `_source_row`; the lineage
            columns follow there as everywhere. None if there are none, or if the policy is broken
            already and they would be written in vain.

        Raises:
            OutputRefusedError: CONTRACT, for columns; its diagnostics hold `expected`, `actual`,
                `missing`, `extra`, `order` and `types`.
        """
        try:
            return self._checked(batch, first_row)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise OutputRefusedError(
                f"topic {self._topic!r} cannot be checked: {error}",
                reason=Reason.CONTRACT,
                hint="Convert the column in the plugin.",
            ) from error

    def _checked(
        self, batch: pa.RecordBatch, first_row: int
    ) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
        numbers, batch = _take_row_numbers(batch)
        arrays, extras = self._matched(batch)
        faults = _Faults(batch.num_rows)
        converted = self._converted(batch, arrays, faults)
        self.rows += batch.num_rows
        columns = converted + [array for _, array in extras]
        schema = pa.schema([*self._schema, *(pa.field(n, array.type) for n, array in extras)])
        if not faults.any:
            return pa.RecordBatch.from_arrays(columns, schema=schema), None
        self.bad_rows += faults.count
        kept = [array.filter(faults.good_mask()) for array in columns]
        good = pa.RecordBatch.from_arrays(kept, schema=schema)
        if self.hopeless:
            return good, None
        if numbers is None:
            numbers = pa.array(range(first_row, first_row + batch.num_rows), pa.int64())
        return good, faults.rows(batch, numbers)

    def judge(self) -> None:
        """Hold the policy against all rows seen; to be called at the end of the topic.

        Raises:
            OutputRefusedError: QUARANTINE_LIMIT, with the violations as diagnostics.
        """
        if not self.bad_rows:
            return
        share = 100.0 * self.bad_rows / self.rows
        limit = ""
        if not self.policy.allow:
            limit = "this topic allows no quarantine"
        elif self.policy.max_count is not None and self.bad_rows > self.policy.max_count:
            limit = f"at most {self.policy.max_count} are allowed"
        elif share > self.policy.max_pct:
            limit = f"at most {self.policy.max_pct:g} % are allowed"
        if limit:
            raise OutputRefusedError(
                f"topic {self._topic!r}: {self.bad_rows} of {self.rows} rows ({share:.1f} %) break "
                f"the contract; {limit}. {self._summary()}",
                reason=Reason.QUARANTINE_LIMIT,
                hint="Mend the file or the plugin, or change the contract or its quarantine "
                "policy; nothing was written.",
                diagnostics={"violations": [v.to_json() for v in self.violations]},
            )

    def _summary(self) -> str:
        worst = sorted(self.violations, key=lambda v: -v.count)[:MAX_SAMPLES]
        return "; ".join(
            f"{v.column}: {v.count} × {v.type}" + (f" ({v.samples[0]!r}, …)" if v.samples else "")
            for v in worst
        )

    # -- columns

    def _matched(
        self, batch: pa.RecordBatch
    ) -> tuple[list[ArrowArray | None], list[tuple[str, ArrowArray]]]:
        """The contract's columns in its order (None for an absent one), and the extra ones."""
        actual = list(batch.schema.names)
        expected = list(self.contract.names)
        mode = self.contract.mode
        missing = [name for name in expected if name not in actual]
        extra = [name for name in actual if name not in expected]
        optional = {c.name for c in self.contract.columns if c.nullable}
        fatal_missing = (
            [n for n in missing if n not in optional]
            if mode is ContractMode.ALLOW_MISSING_OPTIONAL
            else missing
        )
        twice = len(set(actual)) != len(actual)
        misordered = mode is ContractMode.STRICT and not missing and not extra
        misordered = misordered and actual != expected
        if twice or fatal_missing or misordered or (extra and mode is not ContractMode.ALLOW_EXTRA):
            raise self._mismatch(batch, missing, extra, misordered=misordered)
        arrays = [None if n in missing else plain(batch.column(n)) for n in expected]
        return arrays, [(n, plain(batch.column(n))) for n in extra]

    def _mismatch(
        self,
        batch: pa.RecordBatch,
        missing: Sequence[str],
        extra: Sequence[str],
        *,
        misordered: bool = False,
        types: Iterable[dict[str, str]] = (),
    ) -> OutputRefusedError:
        wrong = list(types)
        said = []
        if missing:
            said.append(f"missing {_listed(missing)}")
        if extra:
            said.append(f"unexpected {_listed(extra)}")
        if misordered:
            said.append("the columns are in another order")
        said += [f"{w['column']} is {w['actual']}, not {w['expected']}" for w in wrong]
        return OutputRefusedError(
            f"topic {self._topic!r} does not fit its contract: "
            + ("; ".join(said) or "a column name is given twice"),
            reason=Reason.CONTRACT,
            hint="Change the plugin's columns or the contract.",
            diagnostics={
                "expected": [f"{c.name}: {c.type}" for c in self.contract.columns],
                "actual": [f"{f.name}: {f.type}" for f in batch.schema],
                "missing": list(missing),
                "extra": list(extra),
                "order": misordered,
                "types": wrong,
            },
        )

    # -- values

    def _converted(
        self, batch: pa.RecordBatch, arrays: Sequence[ArrowArray | None], faults: "_Faults"
    ) -> list[ArrowArray]:
        values: list[ArrowArray] = []
        wrong: list[dict[str, str]] = []
        for column, array in zip(self.contract.columns, arrays, strict=True):
            if array is None:
                values.append(nulls(faults.length, arrow_type(column.type)))
                continue
            result = convert(array, column)
            if result is None:
                expected, actual = str(column.type), str(array.type)
                wrong.append({"column": column.name, "expected": expected, "actual": actual})
                continue
            values.append(result.values)
            if result.bad is not None:
                self._note(column, result.bad, result.violation, array, faults)
            if not column.nullable and array.null_count:
                self._note(column, array.is_null(), NULL_NOT_ALLOWED, array, faults)
        if wrong:
            raise self._mismatch(batch, [], [], types=wrong)
        return values

    def _note(
        self, column: Column, bad: ArrowArray, kind: str, array: ArrowArray, faults: "_Faults"
    ) -> None:
        faults.add(bad, kind, _message(column, kind))
        violation = self._violations.setdefault((column.name, kind), Violation(column.name, kind))
        violation.count += int(compute.sum(bad).as_py())
        room = MAX_SAMPLES - len(violation.samples)
        if room > 0 and kind != NULL_NOT_ALLOWED:
            offending = as_text(array.filter(bad).slice(0, room))
            violation.samples += [str(text)[:MAX_SAMPLE_CHARS] for text in offending.to_pylist()]


class _Faults:
    """Which rows of one batch are bad, and why."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.any = False
        self._types: ArrowArray = nulls(length, pa.string())
        self._messages: ArrowArray = self._types

    def add(self, bad: ArrowArray, kind: str, message: str) -> None:
        """Mark rows; the first fault gives a row its type, the messages are joined."""
        self.any = True
        fresh = compute.and_(bad, self._types.is_null())
        self._types = compute.if_else(fresh, kind, self._types)
        both = compute.binary_join_element_wise(self._messages, message, "; ")
        said = compute.if_else(self._messages.is_null(), message, both)
        self._messages = compute.if_else(bad, said, self._messages)

    @property
    def count(self) -> int:
        return self.length - self._types.null_count

    def good_mask(self) -> ArrowArray:
        return self._types.is_null()

    def rows(self, batch: pa.RecordBatch, numbers: ArrowArray) -> pa.RecordBatch:
        """The bad rows as the quarantine holds them.

        Source columns are text, always: a place for values that broke their types cannot have
        types of its own without refusing some of them.
        """
        bad = self._types.is_valid()
        sources = [as_text(column.filter(bad)) for column in batch.columns]
        facts = {
            "_error_msg": self._messages.filter(bad),
            "_violation_type": self._types.filter(bad),
            "_source_row": numbers.filter(bad),
        }
        names = [_free_name(name, {*facts}, batch.schema.names) for name in batch.schema.names]
        return pa.RecordBatch.from_arrays([*sources, *facts.values()], names=[*names, *facts])


def _free_name(name: str, taken: set[str], others: Sequence[str]) -> str:
    """The column's name, with underscores after it if the quarantine needs that name itself."""
    if name not in taken:
        return name
    while name in taken or name in others:
        name += "_"
    return name


def _message(column: Column, kind: str) -> str:
    if kind == NULL_NOT_ALLOWED:
        return f"schema: null not allowed in '{column.name}'"
    if kind == FORMAT_MISMATCH:
        wanted = f"format {column.format}" if column.format else f"the format of a {column.type}"
        return f"schema: value does not match {wanted} in '{column.name}'"
    return f"schema: value is no {column.type} in '{column.name}'"


def _take_row_numbers(batch: pa.RecordBatch) -> tuple[ArrowArray | None, pa.RecordBatch]:
    """The plugin's own row numbers for `_source_row`, if any, and the batch without them."""
    position = batch.schema.get_field_index(ROW_ID_COLUMN)
    if position >= 0 and pa.types.is_integer(batch.column(position).type):
        return batch.column(position).cast(pa.int64()), batch.remove_column(position)
    return None, batch


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:MAX_SAMPLES])
    return shown + (f" and {len(names) - MAX_SAMPLES} more" if len(names) > MAX_SAMPLES else "")
