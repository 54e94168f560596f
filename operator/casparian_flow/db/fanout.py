"""From a file version to jobs: one per plugin version that wants it."""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import duckdb

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.loading import FileFacts, select_jobs
from casparian_flow.db.plugin_roots import chosen_roots
from casparian_flow.db.shapes import QUEUE
from casparian_flow.domain.ids import JobId, ManifestId
from casparian_flow.domain.jobs import JobStatus
from casparian_flow.domain.records import Job
from casparian_flow.domain.scoped_names import SEPARATOR
from casparian_flow.services.routing import (
    MANUAL_PRIORITY,
    Match,
    Rule,
    RuleSet,
    Subscriber,
    compile_rule_set,
    parse_tags,
)

QUEUE_TABLE = "cf_processing_queue"
_NAMESPACE_OF_PLUGIN = (
    f"CASE WHEN contains(c.plugin_name, '{SEPARATOR}') "
    f"THEN split_part(c.plugin_name, '{SEPARATOR}', 1) ELSE '' END"
)


class Wanted(NamedTuple):
    """A job to be made."""

    version_id: int
    match: Match
    generation: int = 0
    retry_of: int | None = None
    overrides: str = ""
    """JSON as `loading.parse_overrides` reads it, "" for the plugin's own sinks."""
    pin: str = ""
    rehearsal: int | None = None


def load_rule_set(connection: duckdb.DuckDBPyConnection, namespace: str, root: str = "") -> RuleSet:
    """The routing rules and subscriptions of one namespace as they are now, compiled.

    A plugin whose first version is still to be tried has subscriptions: its jobs wait.

    The rows are read every time, since anybody may have changed them, and compiled once.

    Args:
        namespace: that of the source root whose files are routed.
        root: its name, for plugins that take the files of some roots only; "" leaves that open.
    """
    rules = connection.execute(
        "SELECT pattern, tag, priority FROM cf_routing_rule WHERE namespace = $1 "
        "ORDER BY priority DESC, id",
        [namespace],
    ).fetchall()
    subscribers = connection.execute(
        f"""
        SELECT c.plugin_name, coalesce(max(m.id) FILTER (m.status = 'ACTIVE'), min(m.id)),
               c.subscription_tags
        FROM cf_plugin_config c
        JOIN cf_plugin_manifest m
            ON m.plugin_name = c.plugin_name AND m.status IN ('ACTIVE', 'STAGING')
        WHERE {_NAMESPACE_OF_PLUGIN} = $1
        GROUP BY c.plugin_name, c.subscription_tags ORDER BY c.plugin_name
        """,
        [namespace],
    ).fetchall()
    if root:
        chosen = chosen_roots(connection)
        subscribers = [row for row in subscribers if root in chosen.get(row[0], {root})]
    return _compiled(tuple(rules), tuple(subscribers))


def rules_of_root(connection: duckdb.DuckDBPyConnection, root_id: int) -> RuleSet:
    """The rules by which the files of a source root are routed."""
    row = connection.execute(
        "SELECT namespace, name FROM cf_source_root WHERE id = $1", [root_id]
    ).fetchone()
    return load_rule_set(connection, *(row or ("", "")))


@lru_cache(maxsize=64)
def _compiled(
    rules: tuple[tuple[str, str, int], ...], subscribers: tuple[tuple[str, int, str], ...]
) -> RuleSet:
    return compile_rule_set(
        (Rule(*row) for row in rules),
        (Subscriber(plugin, manifest, parse_tags(tags)) for plugin, manifest, tags in subscribers),
    )


def manual_tags(
    connection: duckdb.DuckDBPyConnection, location_ids: Collection[int] | None = None
) -> dict[int, dict[str, int]]:
    """Tags that people gave to these locations (None: to any), as `RuleSet.tags` has them."""
    if location_ids is not None and not location_ids:
        return {}
    tags: dict[int, dict[str, int]] = {}
    rows = connection.execute(
        "SELECT file_id, tag FROM cf_file_tag "
        "WHERE $1::BIGINT[] IS NULL OR file_id IN (SELECT unnest($1::BIGINT[]))",
        [None if location_ids is None else list(location_ids)],
    ).fetchall()
    for location_id, tag in rows:
        tags.setdefault(location_id, {})[tag] = MANUAL_PRIORITY
    return tags


def merged_tags(ruled: dict[str, int], manual: dict[str, int] | None) -> dict[str, int]:
    """Tags from rules and from people; a rule's priority goes before the manual one."""
    return {**manual, **ruled} if manual else ruled


def existing_jobs(
    connection: duckdb.DuckDBPyConnection, version_ids: Collection[int]
) -> set[tuple[int, str, int]]:
    """(version, plugin, manifest) of every job that these versions have, but rehearsals."""
    if not version_ids:
        return set()
    rows = connection.execute(
        f"""
        SELECT DISTINCT file_version_id, plugin_name, coalesce(plugin_manifest_id, 0)
        FROM {QUEUE_TABLE} WHERE file_version_id IN (SELECT unnest($1::BIGINT[]))
          AND rehearsal IS NULL
        """,
        [list(version_ids)],
    ).fetchall()
    return {(version, plugin, manifest) for version, plugin, manifest in rows}


def enqueue(
    ledger: Ledger,
    connection: duckdb.DuckDBPyConnection,
    wanted: Sequence[Wanted],
    now_us: int,
) -> list[Job]:
    """Insert QUEUED jobs within the open transaction; returns them as the broker wants them."""
    if not wanted:
        return []
    ids = _insert(ledger, connection, wanted, now_us)
    return select_jobs(connection, "id >= $1 AND id < $2", [ids.start, ids.stop])


def enqueue_one(
    ledger: Ledger,
    connection: duckdb.DuckDBPyConnection,
    wanted: Wanted,
    file: FileFacts,
    now_us: int,
) -> Job:
    """`enqueue` for one job of the plugin's own sinks whose file is known already, without reading
    it back."""
    (job_id,) = _insert(ledger, connection, [wanted], now_us)
    return Job(
        job_id=JobId(job_id),
        plugin=wanted.match.plugin,
        version_id=file.version_id,
        location_id=file.location_id,
        root_id=file.root_id,
        root_path=file.root_path,
        rel_path=file.rel_path,
        content_hash=file.content_hash,
        size=file.signature[2],
        signature=file.signature,
        version_seq=file.seq,
        priority=wanted.match.priority,
        generation=wanted.generation,
        manifest_id=ManifestId(wanted.match.manifest_id),
        retry_of=JobId(wanted.retry_of) if wanted.retry_of else None,
        created_us=now_us,
    )


def _insert(
    ledger: Ledger,
    connection: duckdb.DuckDBPyConnection,
    wanted: Sequence[Wanted],
    now_us: int,
) -> range:
    ids = ledger.new_job_ids(len(wanted))
    rows = [
        (
            job_id,
            item.version_id,
            item.match.plugin,
            item.overrides or None,
            JobStatus.QUEUED.value,
            item.match.priority,
            item.generation,
            item.retry_of,
            item.match.manifest_id or None,
            None,
            now_us,
            None,
            item.pin or None,
            item.rehearsal,
        )
        for job_id, item in zip(ids, wanted, strict=True)
    ]
    QUEUE.insert(connection, rows)
    return ids
