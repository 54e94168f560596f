"""Whether the outputs that a worker staged are those of the job it was given. Stdlib only."""

from collections.abc import Sequence
from functools import lru_cache

from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.outputs import (
    OUTPUTS_MAX,
    OutputEntry,
    SinkMode,
    output_key,
    parse_sink_uri,
    sink_id,
    slice_key,
)
from casparian_flow.domain.records import Job, PluginSpec


def manifest_problem(
    ledger_id: str, job: Job, spec: PluginSpec | None, entries: Sequence[OutputEntry]
) -> str:
    """Why a manifest cannot be what this job was asked for; "" if it can.

    Args:
        spec: the plugin version the job was leased with; None if it was leased before a restart
            from a version superseded since: then its token has to vouch for the keys.
    """
    if job.rehearsal is not None:
        return "a rehearsal publishes nothing"
    if not 1 <= len(entries) <= OUTPUTS_MAX:
        return f"{len(entries)} outputs; want 1 to {OUTPUTS_MAX}"
    if [entry.n for entry in entries] != list(range(len(entries))):
        return "outputs are not numbered 0, 1, 2 …"
    if len({entry.output_key for entry in entries}) != len(entries):
        return "two outputs have one key"
    order = (job.version_seq, int(job.manifest_id), job.generation)
    for entry in entries:
        if tuple(entry.order_no) != order:
            return f"output {entry.n}: order {entry.order_no}, want {order}"
        try:
            sink = _sink_identity(entry.uri, entry.root_id, entry.mode)
        except CasparianError as error:
            return f"output {entry.n}: {error}"
        if spec is None:
            continue
        key = output_key(
            ledger_id,
            job.version_id,
            spec.artifact_hash,
            spec.parameters_hash,
            entry.topic,
            sink,
            job.generation,
        )
        if entry.output_key != key:
            return f"output {entry.n}: its key is not the one of this job, topic and sink"
        if entry.slice_key != slice_key(ledger_id, job.location_id, job.plugin, entry.topic, sink):
            return f"output {entry.n}: its slice is not the one of this file and topic"
    return ""


@lru_cache(maxsize=4096)
def _sink_identity(uri: str, root_id: str, mode: SinkMode) -> str:
    return sink_id(parse_sink_uri(uri), root_id, mode)
