"""The lineage columns: where each row came from, on every row of every output."""

from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from casparian_flow.domain.errors import OutputRefusedError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import parse_token
from casparian_flow.domain.outputs import LINEAGE_COLUMNS
from casparian_worker.arrays import CONSTANT_TEXT, constant_text

LINEAGE_FIELDS = tuple(pa.field(name, CONSTANT_TEXT, nullable=False) for name in LINEAGE_COLUMNS)


def global_job_id(token: str) -> str:
    """`{ledger id}-{job id}`: unique over all ledgers, since job ids begin at 1 in each.

    Raises:
        ValueError: the token is none that a Sentinel makes.

    >>> global_job_id("7f3ac91e-4-1042-2")
    '7f3ac91e-1042'
    """
    parts = parse_token(token)
    if parts is None:
        raise ValueError(f"not a fencing token: {token!r}")
    return f"{parts.ledger_id}-{parts.job_id}"


def rfc3339(wall_us: int) -> str:
    """Microseconds since the epoch as UTC text.

    >>> rfc3339(1_700_000_000_000_000)
    '2023-11-14T22:13:20.000000Z'
    """
    moment = datetime.fromtimestamp(wall_us // 1_000_000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{wall_us % 1_000_000:06d}Z"


@dataclass(frozen=True, slots=True)
class Lineage:
    """The four values, the same for all rows of one job.

    Attributes:
        source_hash: SHA-256 of the file version, hex.
        job_id: `global_job_id` of the attempt's token.
        processed_at: RFC 3339, UTC (`rfc3339`).
        parser_version: version of the plugin.
    """

    source_hash: str
    job_id: str
    processed_at: str
    parser_version: str

    def append(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with the four columns after its own.

        They are dictionary arrays of one entry; every sink writes them as plain text.

        Raises:
            OutputRefusedError: the plugin emitted one of them (RESERVED_COLUMN).
        """
        refuse_reserved(batch.schema)
        length = batch.num_rows
        values = (self.source_hash, self.job_id, self.processed_at, self.parser_version)
        arrays = [constant_text(value, length) for value in values]
        schema = pa.schema([*batch.schema, *LINEAGE_FIELDS])
        return pa.RecordBatch.from_arrays([*batch.columns, *arrays], schema=schema)


def refuse_reserved(schema: pa.Schema) -> None:
    """Refuse columns that only the worker may add.

    Raises:
        OutputRefusedError: RESERVED_COLUMN, with the names; letter case does not matter, since
            it does not to the SQL sinks.
    """
    taken = [name for name in schema.names if name.lower() in LINEAGE_COLUMNS]
    if taken:
        raise OutputRefusedError(
            f"the plugin emitted {', '.join(taken)}, which is reserved for lineage",
            reason=Reason.RESERVED_COLUMN,
            hint="Rename the column; lineage columns are added to every row.",
            diagnostics={"columns": taken},
        )
