"""Plugins, rules and topics: what a deploy records, and what people change by hand.

A deploy changes only what earlier deploys made and people left as it was: it compares each row
with what the version before it declared. What differs, or was removed, is a person's decision
and stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import duckdb
import msgspec

from casparian_flow.db.fanout import (
    Wanted,
    enqueue,
    load_rule_set,
    manual_tags,
    merged_tags,
)
from casparian_flow.db.ledger import Ledger
from casparian_flow.db.loading import sink_specs
from casparian_flow.db.plugin_roots import chosen_roots
from casparian_flow.db.queries import rows as select
from casparian_flow.domain.contracts import parse_contract
from casparian_flow.domain.errors import NotFoundError, UsageError
from casparian_flow.domain.outputs import (
    QuarantinePolicy,
    SinkMode,
    SinkSpec,
    parse_mode,
    parse_sink_uri,
)
from casparian_flow.domain.records import Job, Sample
from casparian_flow.domain.scoped_names import check_namespace, namespace_of
from casparian_flow.domain.wiring import Origin
from casparian_flow.sentinel.api import Row
from casparian_flow.services.manifest import PRIORITIES, check_topic, scoped_plugin_name
from casparian_flow.services.routing import (
    MANUAL_PRIORITY,
    Match,
    check_tag,
    compile_route,
    format_tags,
    parse_tags,
)

Connection = duckdb.DuckDBPyConnection
BYTES_GONE_MAX = 1_000
_RULE, _TOPIC, _MANIFEST = "cf_routing_rule", "cf_topic_config", "cf_plugin_manifest"


@dataclass(frozen=True, slots=True)
class Topic:
    """Where one topic goes, as a deploy declares it.

    Attributes:
        uris: canonical, at least one.
        contract: JSON text, "" for none.
    """

    uris: tuple[str, ...]
    contract: str = ""


@dataclass(frozen=True, slots=True)
class Declared:
    """The wiring that a plugin version asks for; kept with it, for the next one to compare."""

    pattern: str = ""
    tag: str = ""
    priority: int = MANUAL_PRIORITY
    subscriptions: tuple[str, ...] = ()
    topics: Mapping[str, Topic] = field(default_factory=dict)
    parameters_json: str = "{}"
    description: str = ""

    @property
    def tags(self) -> frozenset[str]:
        """Everything the plugin subscribes to."""
        return frozenset(self.subscriptions) | ({self.tag} if self.tag else frozenset())

    def sinks(self) -> tuple[SinkSpec, ...]:
        """Where its topics go if nobody changes that."""
        return tuple(
            sink
            for name, topic in sorted(self.topics.items())
            for sink in sink_specs(
                name, "\n".join(topic.uris), SinkMode.APPEND, topic.contract, _quarantine(topic)
            )
        )


@dataclass(frozen=True, slots=True)
class Release:
    """A checked plugin version, ready to be recorded."""

    plugin: str
    version: str
    source_code: str
    source_hash: str
    lockfile: str
    env_hash: str
    artifact_hash: str
    publisher: str
    declared: Declared
    manifest_json: str = ""
    envelope: str = ""
    signer: str = ""
    key_id: str = ""
    samples: tuple[Sample, ...] = ()
    azure_oid: str = ""
    """The publisher's id in Azure AD, "" if only the key vouches for them."""
    email: str = ""


_declared = msgspec.json.Decoder(Declared)
_encode = msgspec.json.Encoder(order="sorted").encode


def declared_of(text: str | None) -> Declared:
    """What a version declared, as the ledger keeps it."""
    return _declared.decode(text) if text else Declared()


def encoded(declared: Declared) -> str:
    return _encode(declared).decode()


def wire(
    ledger: Ledger,
    connection: Connection,
    plugin: str,
    new: Declared,
    old: Declared | None,
    now_us: int,
) -> list[str]:
    """Bring a plugin's wiring from one declaration to another, within the open transaction.

    Args:
        old: what it follows now, None for nothing.

    Returns:
        What people changed and this left alone.
    """
    change = _Change(plugin, new, old)
    kept = _wire_rule(ledger, connection, change)
    kept += _wire_config(connection, change, now_us)
    kept += _wire_topics(ledger, connection, change)
    for tag in new.subscriptions:
        _add_subscription(ledger, connection, plugin, tag)
    return kept


def unwire(connection: Connection, plugin: str) -> None:
    """Forget a plugin's wiring, within the open transaction; also what people changed of it."""
    connection.execute(f"DELETE FROM {_RULE} WHERE plugin_name = $1", [plugin])
    for table in (_TOPIC, "cf_plugin_config", "cf_plugin_subscription"):
        connection.execute(f"DELETE FROM {table} WHERE plugin_name = $1", [plugin])


class _Change(NamedTuple):
    plugin: str
    new: Declared
    old: Declared | None


def _wire_rule(ledger: Ledger, connection: Connection, change: _Change) -> list[str]:
    plugin, new, old = change
    rows = connection.execute(
        f"SELECT id, pattern, tag, priority FROM {_RULE} "
        "WHERE plugin_name = $1 AND origin = 'auto'",
        [plugin],
    ).fetchall()
    was = (old.pattern, old.tag, old.priority) if old and old.pattern else None
    if was is not None and not any(tuple(row[1:]) == was for row in rows):
        # Removed or changed by hand. A new pattern is a new wish; the same one is not.
        if new.pattern == was[0]:
            return [f"routing rule for {new.pattern!r}"]
    elif was is not None:
        connection.execute(
            f"DELETE FROM {_RULE} WHERE plugin_name = $1 AND origin = 'auto' AND pattern = $2 "
            "AND tag = $3 AND priority = $4",
            [plugin, *was],
        )
    if new.pattern:
        connection.execute(
            f"INSERT INTO {_RULE} (id, pattern, tag, priority, origin, plugin_name, namespace) "
            "VALUES ($1, $2, $3, $4, 'auto', $5, $6)",
            [
                ledger.next_id(_RULE),
                new.pattern,
                new.tag,
                new.priority,
                plugin,
                namespace_of(plugin),
            ],
        )
    return []


def _wire_config(connection: Connection, change: _Change, now_us: int) -> list[str]:
    plugin, new, old = change
    declared_before = old.tags if old else frozenset()
    row = connection.execute(
        "SELECT subscription_tags, default_parameters FROM cf_plugin_config WHERE plugin_name = $1",
        [plugin],
    ).fetchone()
    if row is None:
        connection.execute(
            "INSERT INTO cf_plugin_config (plugin_name, subscription_tags, default_parameters, "
            "last_updated) VALUES ($1, $2, $3, make_timestamp($4))",
            [plugin, format_tags(new.tags), new.parameters_json, now_us],
        )
        return []
    current = parse_tags(row[0])
    tags = (current - (declared_before - new.tags)) | (new.tags - declared_before)
    own = row[1] not in {"{}", old.parameters_json if old else "{}"}
    connection.execute(
        "UPDATE cf_plugin_config SET subscription_tags = $2, default_parameters = $3, "
        "last_updated = make_timestamp($4) WHERE plugin_name = $1",
        [plugin, format_tags(tags), row[1] if own else new.parameters_json, now_us],
    )
    kept = ["default parameters"] if own and row[1] != new.parameters_json else []
    return kept + [f"subscription to {tag!r}" for tag in sorted(new.tags - tags)]


def _wire_topics(ledger: Ledger, connection: Connection, change: _Change) -> list[str]:
    plugin, new = change.plugin, change.new.topics
    before = change.old.topics if change.old else {}
    present = {
        row[0]: (row[1], row[2] or "", row[3])
        for row in connection.execute(
            f"SELECT topic_name, uri, schema_json, origin FROM {_TOPIC} WHERE plugin_name = $1",
            [plugin],
        ).fetchall()
    }
    kept = []
    for name in sorted(set(before) | set(new)):
        now, was, wish = present.get(name), before.get(name), new.get(name)
        if now is None and was is not None and wish == was:
            kept.append(f"topic {name}")  # removed by hand
        elif now is not None and (now[2] == Origin.USER or was is None or now[:2] != _stored(was)):
            if wish is not None and now[:2] != _stored(wish):
                kept.append(f"topic {name}")
        else:
            _replace_topic(ledger, connection, plugin, name, wish)
    return kept


def _stored(topic: Topic) -> tuple[str, str]:
    return "\n".join(topic.uris), topic.contract


def _replace_topic(
    ledger: Ledger, connection: Connection, plugin: str, name: str, topic: Topic | None
) -> None:
    connection.execute(
        f"DELETE FROM {_TOPIC} WHERE plugin_name = $1 AND topic_name = $2", [plugin, name]
    )
    if topic is not None:
        uris, contract = _stored(topic)
        connection.execute(
            f"INSERT INTO {_TOPIC} (id, plugin_name, topic_name, uri, mode, schema_json, origin) "
            "VALUES ($1, $2, $3, $4, 'append', $5, 'auto')",
            [ledger.next_id(_TOPIC), plugin, name, uris, contract or None],
        )
        _set_quarantine(connection, plugin, name, contract)


def _quarantine(topic: Topic) -> QuarantinePolicy:
    policy = parse_contract(topic.contract).quarantine if topic.contract else None
    return policy or QuarantinePolicy()


def _set_quarantine(connection: Connection, plugin: str, topic: str, contract: str) -> None:
    """Take over the quarantine policy that a contract carries, if it does."""
    policy = parse_contract(contract).quarantine if contract else None
    if policy is not None:
        connection.execute(
            f"UPDATE {_TOPIC} SET quarantine_allow = $3, quarantine_max_pct = $4, "
            "quarantine_max_count = $5 WHERE plugin_name = $1 AND topic_name = $2",
            [plugin, topic, policy.allow, policy.max_pct, policy.max_count],
        )


def _add_subscription(ledger: Ledger, connection: Connection, plugin: str, name: str) -> None:
    connection.execute(
        "INSERT INTO cf_plugin_subscription (id, plugin_name, topic_name) VALUES ($1, $2, $3) "
        "ON CONFLICT DO NOTHING",
        [ledger.next_id("cf_plugin_subscription"), plugin, name],
    )


def described(connection: Connection, release: Release, manifest_id: int) -> Row:
    """{plugin_id, plugin, version, artifact_hash, rule, topics, subscriptions}."""
    topics = connection.execute(
        f"SELECT topic_name, uri FROM {_TOPIC} WHERE plugin_name = $1 ORDER BY topic_name",
        [release.plugin],
    ).fetchall()
    tags = connection.execute(
        "SELECT subscription_tags FROM cf_plugin_config WHERE plugin_name = $1", [release.plugin]
    ).fetchone()
    declared = release.declared
    return {
        "plugin_id": manifest_id,
        "plugin": release.plugin,
        "version": release.version,
        "artifact_hash": release.artifact_hash,
        "rule": {"pattern": declared.pattern, "tag": declared.tag, "priority": declared.priority}
        if declared.pattern
        else None,
        "topics": {name: uris.split("\n") for name, uris in topics},
        "subscriptions": sorted(parse_tags(tags[0])) if tags else [],
    }


# -- reading ----------------------------------------------------------------------------------


def list_plugins(connection: Connection) -> list[Row]:
    """Every deployed version, newest of each plugin first, with its wiring and health."""
    return select(
        connection,
        f"""
        SELECT m.id, m.plugin_name, m.version, m.status,
               regexp_replace(m.artifact_hash, '^rejected:([0-9]+:)?', '') AS artifact_hash,
               m.env_hash,
               m.deployed_at, m.created_at, m.validation_error, p.name AS publisher,
               m.signer, m.key_id,
               c.subscription_tags, c.default_parameters, coalesce(h.paused, false) AS paused,
               coalesce(h.reason, '') AS pause_reason,
               coalesce(h.consecutive_failures, 0) AS consecutive_failures
        FROM {_MANIFEST} m
        LEFT JOIN cf_publisher p ON p.id = m.publisher_id
        LEFT JOIN cf_plugin_config c ON c.plugin_name = m.plugin_name
        LEFT JOIN cf_plugin_health h ON h.plugin_name = m.plugin_name
        ORDER BY m.plugin_name, m.id DESC
        """,
    )


def list_topics(connection: Connection) -> list[Row]:
    """Every topic configuration; several sinks stand in `uri` one a line."""
    return select(connection, f"SELECT * FROM {_TOPIC} ORDER BY plugin_name, topic_name")


def list_rules(connection: Connection) -> list[Row]:
    """Every routing rule, most urgent first."""
    return select(connection, f"SELECT * FROM {_RULE} ORDER BY priority DESC, id")


# -- changes by hand --------------------------------------------------------------------------


def set_topic(
    ledger: Ledger,
    plugin: str,
    topic: str,
    *,
    uri: str,
    mode: str = "append",
    schema_json: str = "",
) -> None:
    """Say where a plugin's topic goes; deploys leave it alone from then on.

    Args:
        uri: one sink URI, or several one a line.

    Raises:
        UsageError: a name, URI, mode or contract is not usable.
        NotFoundError: no such plugin.
    """
    check_topic(topic)
    uris = "\n".join(parse_sink_uri(line.strip()).uri for line in uri.splitlines() if line.strip())
    if not uris:
        raise UsageError("a topic needs a sink URI", hint="For example parquet://sales.")
    chosen = parse_mode(mode)
    if schema_json:
        parse_contract(schema_json)
    with ledger.transaction() as connection:
        _require_plugin(connection, plugin)
        connection.execute(
            f"""
            INSERT INTO {_TOPIC} (id, plugin_name, topic_name, uri, mode, schema_json, origin)
            VALUES ($1, $2, $3, $4, $5, $6, 'user')
            ON CONFLICT (plugin_name, topic_name) DO UPDATE SET
                uri = excluded.uri, mode = excluded.mode, origin = 'user',
                schema_json = coalesce(excluded.schema_json, schema_json)
            """,
            [ledger.next_id(_TOPIC), plugin, topic, uris, chosen.value, schema_json or None],
        )
        _set_quarantine(connection, plugin, topic, schema_json)


def add_rule(
    ledger: Ledger, pattern: str, tag: str, *, priority: int = 50, namespace: str = ""
) -> int:
    """Add a routing rule; the same one again only changes its priority. Returns its id.

    Args:
        namespace: of the source roots whose files it matches.

    Raises:
        UsageError: the pattern, tag, priority or namespace is not usable.
    """
    check_namespace(namespace)
    compile_route(pattern)
    check_tag(tag)
    if priority not in PRIORITIES:
        raise UsageError(f"priority wants {PRIORITIES.start} to {PRIORITIES.stop - 1}")
    with ledger.transaction() as connection:
        row = connection.execute(
            f"SELECT id FROM {_RULE} WHERE pattern = $1 AND tag = $2 AND origin = 'user' "
            "AND namespace = $3",
            [pattern, tag, namespace],
        ).fetchone()
        if row is not None:
            connection.execute(
                f"UPDATE {_RULE} SET priority = $2 WHERE id = $1", [row[0], priority]
            )
            return int(row[0])
        rule_id = ledger.next_id(_RULE)
        connection.execute(
            f"INSERT INTO {_RULE} (id, pattern, tag, priority, namespace) "
            "VALUES ($1, $2, $3, $4, $5)",
            [rule_id, pattern, tag, priority, namespace],
        )
    return rule_id


def remove_rule(ledger: Ledger, rule_id: int) -> None:
    """Remove a routing rule, also one that a deploy made.

    Raises:
        NotFoundError: there is none with this id.
    """
    with ledger.transaction() as connection:
        count = connection.execute(f"DELETE FROM {_RULE} WHERE id = $1", [rule_id]).fetchone()
        if not count or not count[0]:
            raise NotFoundError(f"no routing rule {rule_id}", hint="'casparian rules' lists them.")


def _require_plugin(connection: Connection, plugin: str) -> tuple[int, str]:
    """Manifest id and version of the plugin's active version, or of its first, still staged."""
    row = connection.execute(
        f"""
        SELECT id, version FROM {_MANIFEST}
        WHERE plugin_name = $1 AND status IN ('ACTIVE', 'STAGING')
        ORDER BY status, CASE status WHEN 'ACTIVE' THEN -id ELSE id END LIMIT 1
        """,
        [scoped_plugin_name(plugin)],
    ).fetchone()
    if row is None:
        raise NotFoundError(
            f"no active plugin {plugin!r}",
            hint="'casparian plugins' lists them; 'casparian publish FILE' deploys one.",
        )
    return int(row[0]), str(row[1])


# -- backfill ---------------------------------------------------------------------------------


def backfill(
    ledger: Ledger, plugin: str, *, execute: bool, force: bool = False, now_us: int
) -> tuple[Row, list[Job]]:
    """Jobs of a plugin's active version for file versions that were there before it.

    Only a file's current version can be processed: the ledger records versions, it does not keep
    their bytes.

    Args:
        execute: False only counts.
        force: also versions that have such a job already, under a new generation.

    Returns:
        {plugin, version, jobs, executed, bytes_gone, bytes_gone_total}, and the new jobs.
        `bytes_gone` has at most BYTES_GONE_MAX lines.

    Raises:
        NotFoundError: no such active plugin.
    """
    ledger.fold()
    with ledger.transaction() as connection:
        manifest_id, version = _require_plugin(connection, plugin)
        wanted, gone = _missing(connection, plugin, manifest_id, force=force)
        jobs = enqueue(ledger, connection, wanted, now_us) if execute else []
    row = {
        "plugin": plugin,
        "version": version,
        "jobs": len(wanted),
        "executed": execute,
        "bytes_gone": gone[:BYTES_GONE_MAX],
        "bytes_gone_total": len(gone),
    }
    return row, jobs


def _missing(
    connection: Connection, plugin: str, manifest_id: int, *, force: bool
) -> tuple[list[Wanted], list[str]]:
    rules = load_rule_set(connection, namespace_of(plugin))
    manual = manual_tags(connection)
    wanted, gone = [], []
    for row in _versions_of(connection, plugin, manifest_id):
        version_id, location_id, path, seq, current, deleted, jobs, generation = row
        if jobs and not force:
            continue
        takers = rules.takers(merged_tags(rules.tags(path), manual.get(location_id)))
        match = next((m for m in takers if m.plugin == plugin), None)
        if match is None:
            continue
        if current and not deleted:
            # Without `force` there is no job to outdo, so the generation is the first.
            wanted.append(
                Wanted(
                    version_id,
                    Match(plugin, manifest_id, match.priority),
                    generation + 1 if jobs else 0,
                )
            )
        elif not jobs:
            why = "deleted" if deleted else "changed since"
            gone.append(f"{path} (version {seq}: {why})")
    return wanted, gone


def _versions_of(
    connection: Connection, plugin: str, manifest_id: int
) -> Sequence[tuple[int, int, str, int, bool, bool, int, int]]:
    """Versions in active roots that it takes; jobs of this plugin version that were not skipped
    for lack of bytes count, and so do queued ones of an earlier one, which will run with this."""
    chosen = chosen_roots(connection).get(plugin)
    return connection.execute(
        """
        SELECT v.id, l.id, l.rel_path, v.seq, l.current_version_id = v.id,
               l.deleted_at IS NOT NULL, coalesce(j.jobs, 0), coalesce(j.generation, 0)
        FROM cf_file_version v
        JOIN cf_file_location l ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id AND r.active = 1 AND r.namespace = $3
            AND ($4 OR r.name IN (SELECT unnest($5::VARCHAR[])))
        LEFT JOIN (
            SELECT file_version_id, count(*) FILTER (status <> 'SKIPPED') AS jobs,
                   max(generation) AS generation
            FROM cf_processing_queue
            WHERE plugin_name = $1 AND (plugin_manifest_id = $2 OR status = 'QUEUED')
              AND rehearsal IS NULL
            GROUP BY file_version_id
        ) j ON j.file_version_id = v.id
        ORDER BY v.id
        """,
        [plugin, manifest_id, namespace_of(plugin), chosen is None, sorted(chosen or ())],
    ).fetchall()
