"""Rows as the objects that the broker works with."""

import hashlib
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import duckdb
import msgspec

from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.domain.ids import (
    JobId,
    LocationId,
    ManifestId,
    RootId,
    Token,
    VersionId,
)
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.outputs import (
    ANY_TOPIC,
    OutputEntry,
    OutputKind,
    QuarantinePolicy,
    SinkMode,
    SinkSpec,
    parameters_hash,
    parse_mode,
    parse_sink_uri,
)
from casparian_flow.domain.records import Health, Job, Limits, PluginSpec

log = logging.getLogger(__name__)

_JOB_COLUMNS = """
    q.id, q.plugin_name, q.file_version_id, v.location_id, l.source_root_id, r.path, l.rel_path,
    v.content_hash, v.size_bytes, v.dev, v.ino, v.mtime_ns, v.ctime_ns, v.seq, q.priority,
    q.generation, q.config_overrides, epoch_us(q.scheduled_at), q.status, q.attempt,
    q.retry_count, q.lease_token, q.lease_owner, q.plugin_manifest_id, q.retry_of,
    epoch_us(q.created_at), q.pin, q.rehearsal
"""
_JOB_JOINS = """
    JOIN cf_file_version v ON v.id = q.file_version_id
    JOIN cf_file_location l ON l.id = v.location_id
    JOIN cf_source_root r ON r.id = l.source_root_id
"""


def select_jobs(
    connection: duckdb.DuckDBPyConnection, where: str, parameters: Sequence[Any], limit: int = 0
) -> list[Job]:
    """Jobs with their file, by priority then id; those without a file version are left out.

    Args:
        where: condition on `q`, the queue's row.
        limit: 0 for all.
    """
    cut = f"LIMIT {limit:d}" if limit else ""
    rows = connection.execute(
        f"""
        WITH q AS (
            SELECT * FROM cf_processing_queue q
            WHERE file_version_id IS NOT NULL AND ({where})
            ORDER BY priority DESC, id {cut}
        )
        SELECT {_JOB_COLUMNS} FROM q {_JOB_JOINS} ORDER BY q.priority DESC, q.id
        """,
        parameters,
    ).fetchall()
    return [_job(row) for row in rows]


class FileFacts(NamedTuple):
    """A file version with its place, as a job carries it."""

    version_id: VersionId
    location_id: LocationId
    root_id: RootId
    root_path: str
    rel_path: str
    content_hash: str
    signature: tuple[int, int, int, int, int]
    """dev, ino, size, mtime_ns, ctime_ns"""
    seq: int


def file_of(connection: duckdb.DuckDBPyConnection, version_id: int) -> FileFacts | None:
    """One file version; None if there is none.

    Three lookups by key take DuckDB half the time of planning one join.
    """
    version = connection.execute(
        "SELECT location_id, content_hash, dev, ino, size_bytes, mtime_ns, ctime_ns, seq "
        "FROM cf_file_version WHERE id = $1",
        [version_id],
    ).fetchone()
    if version is None:
        return None
    location_id, content_hash, dev, ino, size, mtime_ns, ctime_ns, seq = version
    place = connection.execute(
        "SELECT source_root_id, rel_path FROM cf_file_location WHERE id = $1", [location_id]
    ).fetchone()
    root = connection.execute(
        "SELECT path FROM cf_source_root WHERE id = $1", [place[0] if place else None]
    ).fetchone()
    if place is None or root is None:
        return None
    return FileFacts(
        VersionId(version_id),
        LocationId(location_id),
        RootId(place[0]),
        root[0],
        place[1],
        content_hash,
        (dev, ino, size, mtime_ns, ctime_ns),
        seq,
    )


def _job(row: tuple[Any, ...]) -> Job:
    (
        job_id, plugin, version, location, root, root_path, rel_path, digest, size, dev, ino,
        mtime_ns, ctime_ns, seq, priority, generation, overrides, not_before_us, status, attempt,
        retry_count, token, owner, manifest_id, retry_of, created_us, pin, rehearsal,
    ) = row  # fmt: skip
    return Job(
        job_id=JobId(job_id),
        # What many jobs share is kept once: the Sentinel holds its whole queue in memory.
        plugin=sys.intern(plugin),
        version_id=VersionId(version),
        location_id=LocationId(location),
        root_id=RootId(root),
        root_path=sys.intern(root_path),
        rel_path=rel_path,
        content_hash=digest,
        size=size,
        signature=(dev, ino, size, mtime_ns, ctime_ns),
        version_seq=seq,
        priority=priority,
        generation=generation,
        overrides=_overrides(job_id, overrides) if overrides else None,
        not_before_us=not_before_us or 0,
        status=JobStatus(status),
        attempt=attempt,
        retry_count=retry_count,
        token=Token(token or ""),
        owner=owner or "",
        manifest_id=ManifestId(manifest_id or 0),
        retry_of=JobId(retry_of) if retry_of else None,
        created_us=created_us,
        pin=pin or "",
        rehearsal=rehearsal,
    )


def _overrides(job_id: int, text: str) -> tuple[SinkSpec, ...]:
    try:
        return parse_overrides(text)
    except UsageError as error:
        # The job must neither stop the Sentinel nor write to the default sinks instead.
        log.error("job %d: %s", job_id, error)
        return (SinkSpec(ANY_TOPIC, "invalid://config_overrides"),)


def attach_manifests(connection: duckdb.DuckDBPyConnection, jobs: Iterable[Job]) -> None:
    """Give every STAGED job its granted outputs."""
    staged = {int(job.job_id): job for job in jobs if job.status is JobStatus.STAGED}
    if not staged:
        return
    rows = connection.execute(
        """
        SELECT job_id, n, topic, kind, sink_uri, mode, root_id, output_key, slice_key,
               order_version_seq, order_manifest_id, order_generation, stage, final, "rows",
               bytes, sha256
        FROM cf_output WHERE job_id IN (SELECT unnest($1::BIGINT[])) ORDER BY job_id, n
        """,
        [list(staged)],
    ).fetchall()
    manifests: defaultdict[int, list[OutputEntry]] = defaultdict(list)
    for row in rows:
        manifests[row[0]].append(_output_entry(row))
    for job_id, entries in manifests.items():
        staged[job_id].manifest = tuple(entries)


def _output_entry(row: tuple[Any, ...]) -> OutputEntry:
    (
        _, n, topic, kind, uri, mode, root_id, key, slice_key, seq, manifest_id, generation,
        stage, final, rows, size, sha256,
    ) = row  # fmt: skip
    return OutputEntry(
        n=n,
        topic=topic,
        kind=OutputKind(kind),
        uri=uri,
        mode=SinkMode(mode),
        root_id=root_id,
        output_key=key,
        slice_key=slice_key,
        order_no=(seq, manifest_id, generation),
        stage=stage,
        final=final,
        rows=rows,
        bytes=size,
        sha256=sha256,
    )


# -- sinks and plugins --------------------------------------------------------------------------


@lru_cache(maxsize=256)
def parse_overrides(text: str) -> tuple[SinkSpec, ...]:
    """Sinks of one job: JSON `{topic: sink or [sinks]}`, a sink being a URI or `{uri, mode, …}`.

    Raises:
        UsageError: the text has another shape.
    """
    try:
        tree = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"config_overrides is no JSON object of topics: {error}") from error
    specs = []
    for topic, given in tree.items():
        for sink in given if isinstance(given, list) else [given]:
            if isinstance(sink, str):
                specs.append(_sink(topic, sink, SinkMode.APPEND))
            elif isinstance(sink, dict) and isinstance(sink.get("uri"), str):
                mode = parse_mode(str(sink.get("mode") or "append"))
                schema = str(sink.get("schema_json") or "")
                specs.append(_sink(topic, sink["uri"], mode, schema, _policy(sink)))
            else:
                raise UsageError(f"config_overrides: topic {topic!r} wants a URI, got {sink!r:.80}")
    return tuple(specs)


def _policy(sink: Mapping[str, Any]) -> QuarantinePolicy:
    if sink.get("quarantine") is None:
        return QuarantinePolicy()
    try:
        return msgspec.convert(sink["quarantine"], QuarantinePolicy)
    except msgspec.ValidationError as error:
        raise UsageError(f"config_overrides: quarantine: {error}") from error


def encode_overrides(sinks: Iterable[SinkSpec]) -> str:
    """JSON that `parse_overrides` reads back to these sinks."""
    tree: dict[str, list[dict[str, Any]]] = {}
    for sink in sinks:
        told = {
            "uri": sink.uri,
            "mode": sink.mode,
            "schema_json": sink.schema_json,
            "quarantine": sink.quarantine,
        }
        tree.setdefault(sink.topic, []).append(told)
    return msgspec.json.encode(tree).decode()


def sink_specs(
    topic: str,
    uris: str,
    mode: str,
    schema_json: str | None,
    quarantine: QuarantinePolicy,
) -> list[SinkSpec]:
    """The sinks of one topic configuration; `uris` holds one URI a line.

    A mode given in a URI goes before the configuration's.
    """
    return [
        _sink(topic, uri, SinkMode(mode), schema_json or "", quarantine)
        for uri in (line.strip() for line in uris.splitlines())
        if uri
    ]


def _sink(
    topic: str,
    uri: str,
    mode: SinkMode,
    schema_json: str = "",
    quarantine: QuarantinePolicy | None = None,
) -> SinkSpec:
    policy = quarantine or QuarantinePolicy()
    try:
        address = parse_sink_uri(uri)
    except CasparianError as error:
        # Kept as it is: the worker refuses it by name, instead of the output silently going
        # to a default place or the Sentinel not starting.
        log.error("sink of topic %s cannot be used: %s", topic, error)
        return SinkSpec(topic, uri, mode, schema_json, policy)
    chosen = mode if address.mode is SinkMode.APPEND else address.mode
    return SinkSpec(topic, address.uri, chosen, schema_json, policy)


def load_plugin_specs(connection: duckdb.DuckDBPyConnection, limits: Limits) -> list[PluginSpec]:
    """Every ACTIVE plugin version with its sinks, parameters and lockfile, by name."""
    rows = connection.execute(
        f"""
        {_SPEC_ROWS} WHERE m.status = 'ACTIVE'
        QUALIFY row_number() OVER (PARTITION BY m.plugin_name ORDER BY m.id DESC) = 1
        ORDER BY m.plugin_name
        """
    ).fetchall()
    sinks = _topic_sinks(connection)
    specs = [_plugin_spec(row, limits) for row in rows]
    return [identified(replace(s, sinks=tuple(sinks[s.plugin]))) for s in specs if s is not None]


def load_staged_specs(connection: duckdb.DuckDBPyConnection, limits: Limits) -> list[PluginSpec]:
    """Every STAGING plugin version, in the order of the deploys; without sinks."""
    rows = connection.execute(f"{_SPEC_ROWS} WHERE m.status = 'STAGING' ORDER BY m.id").fetchall()
    specs = [_plugin_spec(row, limits) for row in rows]
    return [spec for spec in specs if spec is not None]


def identified(spec: PluginSpec) -> PluginSpec:
    """The spec under the id that follows from all else in it."""
    digest = hashlib.sha256(msgspec.json.encode(replace(spec, spec_id=""), order="sorted"))
    return replace(spec, spec_id=digest.hexdigest())


_SPEC_ROWS = """
    SELECT m.id, m.plugin_name, m.version, m.artifact_hash, m.source_code,
           coalesce(m.env_hash, ''), coalesce(e.lockfile_content, ''),
           coalesce(c.default_parameters, '{}'), coalesce(m.manifest_json, ''),
           coalesce(m.envelope, ''), coalesce(epoch_us(m.deployed_at), 0)
    FROM cf_plugin_manifest m
    LEFT JOIN cf_plugin_environment e ON e.hash = m.env_hash
    LEFT JOIN cf_plugin_config c ON c.plugin_name = m.plugin_name
"""


def _plugin_spec(row: tuple[Any, ...], limits: Limits) -> PluginSpec | None:
    manifest_id, plugin, version, artifact, source, env_hash, lockfile, given = row[:8]
    parameters = _canonical_object(given)
    if parameters is None:
        log.error("plugin %s is left out: its default_parameters are no JSON object", plugin)
        return None
    return PluginSpec(
        spec_id="",
        plugin=plugin,
        plugin_version=version,
        manifest_id=ManifestId(manifest_id),
        artifact_hash=artifact,
        source_code=source,
        lockfile=lockfile,
        env_hash=env_hash,
        sinks=(),
        parameters_json=parameters,
        parameters_hash=parameters_hash(parameters),
        limits=limits,
        manifest_json=row[8],
        envelope=row[9],
        deployed_at_us=row[10],
    )


def _topic_sinks(connection: duckdb.DuckDBPyConnection) -> defaultdict[str, list[SinkSpec]]:
    sinks: defaultdict[str, list[SinkSpec]] = defaultdict(list)
    rows = connection.execute(
        """
        SELECT plugin_name, topic_name, uri, mode, schema_json, quarantine_allow,
               quarantine_max_pct, quarantine_max_count
        FROM cf_topic_config ORDER BY plugin_name, topic_name
        """
    ).fetchall()
    for plugin, topic, uris, mode, schema_json, allow, max_pct, max_count in rows:
        policy = QuarantinePolicy(allow, max_pct, max_count)
        sinks[plugin].extend(sink_specs(topic, uris, mode, schema_json, policy))
    return sinks


def _canonical_object(text: str) -> str | None:
    try:
        tree = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None
    return msgspec.json.encode(tree, order="sorted").decode()


def load_health(connection: duckdb.DuckDBPyConnection) -> list[Health]:
    rows = connection.execute(
        """
        SELECT plugin_name, consecutive_failures, paused, reason
        FROM cf_plugin_health ORDER BY plugin_name
        """
    ).fetchall()
    return [Health(*row) for row in rows]


def load_counts(connection: duckdb.DuckDBPyConnection) -> dict[JobStatus, int]:
    """How many jobs are in each status; every status is there."""
    counts = dict.fromkeys(JobStatus, 0)
    rows = connection.execute("SELECT status, count(*) FROM cf_processing_queue GROUP BY status")
    counts.update((JobStatus(status), n) for status, n in rows.fetchall())
    return counts
