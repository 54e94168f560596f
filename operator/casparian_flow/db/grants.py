"""Whether a granted manifest may stand: the ledger's half of step 5 of the commit protocol.

Pure, so that the ledger and its in-memory twin decide alike.
"""

from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping
from dataclasses import dataclass

from casparian_flow.domain.failures import Reason
from casparian_flow.domain.ids import Token
from casparian_flow.domain.outputs import OutputEntry, SinkMode
from casparian_flow.domain.records import GrantOutcome, Record


@dataclass(frozen=True, slots=True)
class SliceHead:
    """The newest output granted to a slice."""

    order_no: tuple[int, int, int]
    output_key: str
    job_id: int


def judge(
    record: Record,
    token: Token,
    taken: Container[str],
    slices: Mapping[str, SliceHead],
    is_staged: Callable[[int], bool],
) -> GrantOutcome:
    """Grant or refuse one GRANTED record, as a whole.

    Args:
        token: the job's current token, "" if it has none.
        taken: output keys reserved by any job.
        slices: heads of the slices that the record's outputs belong to.
        is_staged: whether a job is granted and not yet completed.
    """
    # The last part of a token is its attempt (domain/ids.py).
    if token.rpartition("-")[2] != str(record.attempt):
        message = f"attempt {record.attempt} is not the job's current one"
        return GrantOutcome(record.job_id, token, Reason.STALE_TOKEN, message)
    for entry in record.manifest:
        refusal = _refusal(entry, taken, slices.get(entry.slice_key), is_staged)
        if refusal is not None:
            reason, why = refusal
            message = f"output {entry.n} (topic {entry.topic}, {entry.uri}): {why}"
            return GrantOutcome(record.job_id, token, reason, message)
    return GrantOutcome(record.job_id, token)


def advance(record: Record, taken: set[str], slices: MutableMapping[str, SliceHead]) -> None:
    """Take a granted record's outputs into account for the records after it."""
    for entry in record.manifest:
        taken.add(entry.output_key)
        if entry.mode is not SinkMode.APPEND:
            slices[entry.slice_key] = SliceHead(entry.order_no, entry.output_key, record.job_id)


def sliced(records: Iterable[Record]) -> list[str]:
    """Keys of the slices whose heads `judge` has to know."""
    return sorted(
        {
            entry.slice_key
            for record in records
            for entry in record.manifest
            if entry.mode is not SinkMode.APPEND
        }
    )


def _refusal(
    entry: OutputEntry,
    taken: Container[str],
    head: SliceHead | None,
    is_staged: Callable[[int], bool],
) -> tuple[Reason, str] | None:
    if entry.output_key in taken:
        return Reason.DUPLICATE_OUTPUT, "this output key is taken by an earlier grant"
    if head is None or entry.mode is SinkMode.APPEND:
        return None
    if entry.mode is SinkMode.ERROR:
        return Reason.SINK_CONFLICT, f"job {head.job_id} wrote this file's rows (mode error)"
    if entry.order_no < head.order_no:
        return Reason.SUPERSEDED, f"job {head.job_id} holds a newer result {head.order_no}"
    if is_staged(head.job_id):
        # One granted job per slice at a time: sinks could otherwise publish them in either order.
        return Reason.BUSY, f"job {head.job_id} is still publishing this slice"
    return None
