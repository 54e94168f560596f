"""The life of a plugin version in the ledger: staged, tried, active, superseded; or rejected.

    record_release    a checked version becomes STAGING (without trials: ACTIVE at once)
    conclude_trial    STAGING becomes ACTIVE, and the version before it SUPERSEDED; or REJECTED
    rollback          a SUPERSEDED version becomes ACTIVE again
    retire            the plugin has no active and no staged version any more, and no wiring

Each is one transaction that changes the version's status and the wiring together. A plugin's
wiring is that of its active version. While it has none, it is that of the first staged one, so
that jobs are queued for it from its deploy on.
"""

from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import duckdb
import msgspec

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.loading import identified, load_staged_specs
from casparian_flow.db.wiring import (
    Declared,
    Release,
    declared_of,
    described,
    encoded,
    unwire,
    wire,
)
from casparian_flow.domain.errors import ConflictError, NotFoundError, require
from casparian_flow.domain.ids import ManifestId
from casparian_flow.domain.outputs import parameters_hash
from casparian_flow.domain.records import PluginSpec, Sample, StagedVersion
from casparian_flow.domain.scoped_names import plain
from casparian_flow.domain.wiring import PluginStatus, check_step
from casparian_flow.sentinel.api import Row
from casparian_flow.services.manifest import plugin_version, scoped_plugin_name
from casparian_flow.trust.bundle import Bundle

Connection = duckdb.DuckDBPyConnection
ERROR_CHARS_MAX = 4_000
_MANIFEST = "cf_plugin_manifest"


class Version(NamedTuple):
    """A plugin version as the ledger has it."""

    manifest_id: int
    plugin: str
    version: str
    status: PluginStatus
    declared: Declared

    def __str__(self) -> str:
        return f"{self.plugin} {self.version}"


# -- deploy -----------------------------------------------------------------------------------


def record_release(ledger: Ledger, release: Release, *, now_us: int, trial: bool = False) -> Row:
    """Record a checked version; the same one again changes nothing.

    Args:
        trial: whether a worker has to try it first; otherwise it is active at once.

    Returns:
        {plugin_id, plugin, version, status, message, unchanged, rule, topics, subscriptions,
        kept}; `kept` names what people changed and the deploy left alone.

    Raises:
        ConflictError: the version was deployed before with other bytes.
        LedgerUnavailableError: nothing is recorded.
    """
    with ledger.transaction() as connection:
        existing = _same_version(connection, release)
        if existing is not None:
            return _unchanged(connection, release, existing)
        before = wired(connection, release.plugin)
        status = PluginStatus.STAGING if trial else PluginStatus.ACTIVE
        kept: list[str] = []
        if not trial:
            _withdraw_staged(connection, release.plugin, f"{release.version} took its place")
            if before is not None and before.status is PluginStatus.ACTIVE:
                _move(connection, before, PluginStatus.SUPERSEDED)
        manifest_id = _insert(ledger, connection, release, status, now_us)
        if not trial or before is None or before.status is PluginStatus.SUPERSEDED:
            old = before.declared if before else None
            kept = wire(ledger, connection, release.plugin, release.declared, old, now_us)
        row = described(connection, release, manifest_id)
    return {
        **row,
        "status": status.value,
        "message": _told(release, status, before),
        "unchanged": False,
        "kept": kept,
    }


def _told(release: Release, status: PluginStatus, before: Version | None) -> str:
    name = f"{release.plugin} {release.version}"
    active = before if before is not None and before.status is PluginStatus.ACTIVE else None
    if status is PluginStatus.ACTIVE:
        return f"deployed {name}" + (f", which supersedes {active.version}" if active else "")
    after = f", then it supersedes {active.version}" if active else ""
    return f"deployed {name}; a worker tries it first{after}"


def _same_version(connection: Connection, release: Release) -> tuple[int, PluginStatus] | None:
    row = connection.execute(
        f"SELECT id, artifact_hash, status FROM {_MANIFEST} "
        "WHERE plugin_name = $1 AND version = $2 AND status <> 'REJECTED' ORDER BY id DESC LIMIT 1",
        [release.plugin, release.version],
    ).fetchone()
    if row is None:
        return None
    if row[1] != release.artifact_hash:
        raise ConflictError(
            f"{release.plugin} {release.version} was deployed before with other bytes; "
            "versions are immutable",
            hint=f"Publish it as {_next_version(connection, release)}.",
        )
    return int(row[0]), PluginStatus(row[2])


def _next_version(connection: Connection, release: Release) -> str:
    from packaging.version import Version as Number

    rows = connection.execute(
        # What was refused may call itself anything.
        f"SELECT version FROM {_MANIFEST} WHERE plugin_name = $1 AND status <> 'REJECTED'",
        [release.plugin],
    ).fetchall()
    newest = max(Number(row[0]) for row in rows)
    return f"{newest.major}.{newest.minor}.{newest.micro + 1}"


def _unchanged(connection: Connection, release: Release, existing: tuple[int, PluginStatus]) -> Row:
    manifest_id, status = existing
    name = f"{release.plugin} {release.version}"
    state = "" if status is PluginStatus.ACTIVE else f" ({status.lower()})"
    told = f"{name} is already deployed{state}, with the same bytes: nothing to do"
    if status is PluginStatus.SUPERSEDED:
        told += (
            f"; 'casparian plugin rollback {release.plugin} --to {release.version}' makes it "
            "active again"
        )
    return {
        **described(connection, release, manifest_id),
        "status": status.value,
        "message": told,
        "unchanged": True,
        "kept": [],
    }


def _insert(
    ledger: Ledger, connection: Connection, release: Release, status: PluginStatus, now_us: int
) -> int:
    publisher_id = _publisher(ledger, connection, release, now_us)
    if release.lockfile:
        connection.execute(
            "INSERT INTO cf_plugin_environment (hash, lockfile_content, last_used, created_at) "
            "VALUES ($1, $2, make_timestamp($3), make_timestamp($3)) ON CONFLICT DO NOTHING",
            [release.env_hash, release.lockfile, now_us],
        )
    manifest_id = ledger.next_id(_MANIFEST)
    connection.execute(
        f"""
        INSERT INTO {_MANIFEST} (id, plugin_name, version, source_code, source_hash, status,
            created_at, deployed_at, env_hash, artifact_hash, publisher_id, wiring_json,
            manifest_json, envelope, signer, key_id, samples_json)
        VALUES ($1, $2, $3, $4, $5, $15, make_timestamp($6), make_timestamp($6), $7, $8, $9,
            $10, $11, $12, $13, $14, $16)
        """,
        [
            manifest_id,
            release.plugin,
            release.version,
            release.source_code,
            release.source_hash,
            now_us,
            release.env_hash or None,
            release.artifact_hash,
            publisher_id,
            encoded(release.declared),
            release.manifest_json,
            release.envelope or None,
            release.signer or None,
            release.key_id or None,
            status.value,
            _encode_samples(release.samples),
        ],
    )
    return manifest_id


def _publisher(ledger: Ledger, connection: Connection, release: Release, now_us: int) -> int:
    """The row of whoever published; a directory's id tells people apart better than their names."""
    oid = release.azure_oid or None
    row = connection.execute(
        "SELECT id FROM cf_publisher WHERE azure_oid IS NOT DISTINCT FROM $1 "
        "AND ($1 IS NOT NULL OR name = $2)",
        [oid, release.publisher],
    ).fetchone()
    if row is not None:
        connection.execute(
            "UPDATE cf_publisher SET last_active = make_timestamp($2), name = $3, "
            "email = coalesce($4, email) WHERE id = $1",
            [row[0], now_us, release.publisher, release.email or None],
        )
        return int(row[0])
    publisher_id = ledger.next_id("cf_publisher")
    connection.execute(
        "INSERT INTO cf_publisher (id, azure_oid, name, email, created_at, last_active) "
        "VALUES ($1, $2, $3, $4, make_timestamp($5), make_timestamp($5))",
        [publisher_id, oid, release.publisher, release.email or None, now_us],
    )
    return publisher_id


# -- trials -----------------------------------------------------------------------------------


def staged_versions(ledger: Ledger) -> list[StagedVersion]:
    """Every STAGING version, with the sinks and parameters that it would have if active."""
    with closing(ledger.reader()) as connection:
        return [_staged(connection, spec) for spec in load_staged_specs(connection, ledger.limits)]


def _staged(connection: Connection, spec: PluginSpec) -> StagedVersion:
    row = connection.execute(
        f"SELECT wiring_json, samples_json FROM {_MANIFEST} WHERE id = $1", [spec.manifest_id]
    ).fetchone()
    declared, samples = declared_of(row[0] if row else None), row[1] if row else None
    before = wired(connection, spec.plugin)
    parameters = spec.parameters_json
    if before is not None and parameters in {"{}", before.declared.parameters_json}:
        parameters = declared.parameters_json  # nobody has changed them
    spec = replace(
        spec,
        sinks=declared.sinks(),
        parameters_json=parameters,
        parameters_hash=parameters_hash(parameters),
    )
    return StagedVersion(identified(spec), _samples.decode(samples) if samples else ())


def conclude_trial(
    ledger: Ledger, manifest_id: ManifestId, *, passed: bool, message: str, now_us: int
) -> str:
    """Record how a version's trial ended; one that is not staged any more stays as it is.

    Returns:
        What has become of it, for the log.

    Raises:
        LedgerUnavailableError: nothing is recorded.
    """
    with ledger.transaction() as connection:
        version = _by_id(connection, manifest_id)
        if version is None or version.status is not PluginStatus.STAGING:
            return f"plugin version {manifest_id} is not staged any more"
        if passed:
            return _activate_tried(ledger, connection, version, now_us)
        reject_staged(ledger, connection, version, message, now_us)
        return f"{version} was rejected: {message}"


def _activate_tried(ledger: Ledger, connection: Connection, version: Version, now_us: int) -> str:
    before = wired(connection, version.plugin)
    if before is not None and before.status is PluginStatus.ACTIVE:
        if before.manifest_id > version.manifest_id:
            _move(connection, version, PluginStatus.SUPERSEDED)
            return f"{version} passed its trial after {before.version} had taken over"
        _move(connection, before, PluginStatus.SUPERSEDED)
    _move(connection, version, PluginStatus.ACTIVE)
    old = before.declared if before else None
    wire(ledger, connection, version.plugin, version.declared, old, now_us)
    return f"{version} is active"


def reject_staged(
    ledger: Ledger, connection: Connection, version: Version, message: str, now_us: int
) -> None:
    """A staged version is refused; what it had wired goes, or becomes that of the next one."""
    before = wired(connection, version.plugin)
    _reject(connection, version, message)
    if before is None or before.manifest_id != version.manifest_id:
        return
    following = wired(connection, version.plugin)
    new = (
        following.declared
        if following is not None and following.status is PluginStatus.STAGING
        else Declared()
    )
    wire(ledger, connection, version.plugin, new, version.declared, now_us)


def _reject(connection: Connection, version: Version, message: str) -> None:
    check_step(version.status, PluginStatus.REJECTED)
    connection.execute(
        # Only what is accepted fixes a version's bytes: the same ones may be published again.
        f"UPDATE {_MANIFEST} SET status = 'REJECTED', validation_error = $2, "
        "artifact_hash = 'rejected:' || id || ':' || artifact_hash WHERE id = $1",
        [version.manifest_id, message[:ERROR_CHARS_MAX]],
    )


def _withdraw_staged(connection: Connection, plugin: str, why: str) -> list[str]:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM {_MANIFEST} WHERE plugin_name = $1 AND status = 'STAGING'",
        [plugin],
    ).fetchall()
    withdrawn = [_version(row) for row in rows]
    for version in withdrawn:
        _reject(connection, version, f"withdrawn before its trial ended: {why}")
    return [version.version for version in withdrawn]


# -- rollback ---------------------------------------------------------------------------------


def rollback(ledger: Ledger, plugin: str, version: str, *, now_us: int) -> Row:
    """Make an earlier version the active one again; staged ones are withdrawn.

    Returns:
        {plugin, version, superseded, withdrawn, kept, message}.

    Raises:
        NotFoundError: there is no such plugin or version.
        ConflictError: the version has not passed its trial.
        LedgerUnavailableError: nothing is changed.
    """
    name, number = scoped_plugin_name(plugin), plugin_version(version)
    with ledger.transaction() as connection:
        target = _by_name(connection, name, number)
        if target.status not in (PluginStatus.SUPERSEDED, PluginStatus.ACTIVE):
            raise ConflictError(
                f"{target} has not passed its trial",
                hint=f"'casparian plugin show {name}' lists the versions and how they stand.",
            )
        withdrawn = _withdraw_staged(connection, name, f"rolled back to {number}")
        row: Row = {"plugin": name, "version": number, "withdrawn": withdrawn, "kept": []}
        if target.status is PluginStatus.ACTIVE:
            told = f"{target} is the active version already"
            return {**row, "superseded": "", "message": told + _and_withdrawn(withdrawn)}
        before = wired(connection, name)
        if before is not None and before.status is PluginStatus.ACTIVE:
            _move(connection, before, PluginStatus.SUPERSEDED)
        _move(connection, target, PluginStatus.ACTIVE)
        old = before.declared if before else None
        row["kept"] = wire(ledger, connection, name, target.declared, old, now_us)
    superseded = before.version if before else ""
    told = f"{target} is active again" + (f" in place of {superseded}" if superseded else "")
    return {**row, "superseded": superseded, "message": told + _and_withdrawn(withdrawn)}


def _and_withdrawn(versions: list[str]) -> str:
    return f"; withdrawn before its trial ended: {', '.join(versions)}" if versions else ""


# -- retirement -------------------------------------------------------------------------------


def retire(ledger: Ledger, plugin: str) -> Row:
    """Take a plugin out of service: it gets no job any more until it is deployed anew.

    Its history stays, and so do its queued jobs, which wait. What people changed of its wiring goes
    with the rest of it: a later deploy or rollback begins from what the version declares.

    Returns:
        {plugin, superseded, withdrawn}; both empty if there was nothing to retire.

    Raises:
        LedgerUnavailableError: nothing is changed.
    """
    name = scoped_plugin_name(plugin)
    with ledger.transaction() as connection:
        before = wired(connection, name)
        withdrawn = _withdraw_staged(connection, name, "the plugin was retired")
        active = before if before is not None and before.status is PluginStatus.ACTIVE else None
        if active is not None:
            _move(connection, active, PluginStatus.SUPERSEDED)
        unwire(connection, name)
    return {
        "plugin": name,
        "superseded": active.version if active is not None else "",
        "withdrawn": withdrawn,
    }


# -- versions ---------------------------------------------------------------------------------

_COLUMNS = "id, plugin_name, version, status, wiring_json"


def _version(row: tuple[int, str, str, str, str | None]) -> Version:
    return Version(row[0], row[1], row[2], PluginStatus(row[3]), declared_of(row[4]))


def wired(connection: Connection, plugin: str) -> Version | None:
    """The version whose declaration the plugin's wiring follows now; None if it has no wiring."""
    row = connection.execute(
        f"""
        SELECT {_COLUMNS} FROM {_MANIFEST}
        WHERE plugin_name = $1 AND status IN ('ACTIVE', 'STAGING', 'SUPERSEDED')
          AND plugin_name IN (SELECT plugin_name FROM cf_plugin_config)
        ORDER BY CASE status WHEN 'ACTIVE' THEN 0 WHEN 'STAGING' THEN 1 ELSE 2 END,
                 CASE status WHEN 'STAGING' THEN id ELSE -id END
        LIMIT 1
        """,
        [plugin],
    ).fetchone()
    return None if row is None else _version(row)


def _by_id(connection: Connection, manifest_id: int) -> Version | None:
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM {_MANIFEST} WHERE id = $1", [manifest_id]
    ).fetchone()
    return None if row is None else _version(row)


def _by_name(connection: Connection, plugin: str, number: str) -> Version:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM {_MANIFEST} "
        "WHERE plugin_name = $1 AND status <> 'REJECTED' ORDER BY id DESC",
        [plugin],
    ).fetchall()
    versions = [_version(row) for row in rows]
    if not versions:
        raise NotFoundError(f"no plugin {plugin!r}", hint="'casparian plugins' lists them.")
    found = next((v for v in versions if v.version == number), None)
    if found is None:
        listed = ", ".join(v.version for v in versions[:10])
        raise NotFoundError(f"{plugin} has no version {number}", hint=f"It has: {listed}.")
    return found


def _move(connection: Connection, version: Version, status: PluginStatus) -> None:
    check_step(version.status, status)
    connection.execute(
        f"UPDATE {_MANIFEST} SET status = $2 WHERE id = $1", [version.manifest_id, status.value]
    )


def bundle_of(connection: Connection, plugin: str, number: str = "") -> tuple[Bundle, int]:
    """A version as it was deployed, of what the ledger holds of it, and when that was.

    Args:
        number: "" takes the active version, or else the newest.

    Returns:
        The bundle, and microseconds since the epoch (0 if the version was never recorded as
        deployed).

    Raises:
        NotFoundError: there is no such version.
    """
    newest = wired(connection, plugin) if not number else None
    version = newest or _by_name(connection, plugin, number)
    row = connection.execute(
        f"""
        SELECT m.plugin_name, m.version, m.source_code, coalesce(e.lockfile_content, ''),
               coalesce(m.manifest_json, ''), m.artifact_hash, coalesce(m.envelope, ''),
               m.samples_json, coalesce(epoch_us(m.deployed_at), 0)
        FROM {_MANIFEST} m LEFT JOIN cf_plugin_environment e ON e.hash = m.env_hash
        WHERE m.id = $1
        """,
        [version.manifest_id],
    ).fetchone()
    require(row is not None, "a version vanished within one look")
    assert row is not None
    name, stored, source, lockfile, manifest_json, digest, envelope, samples, deployed_at = row
    return (
        Bundle(
            plain(name),
            stored,
            source,
            lockfile,
            manifest_json,
            digest,
            envelope.encode("utf-8", "surrogatepass"),
            _samples.decode(samples) if samples else (),
        ),
        int(deployed_at),
    )


# -- samples ----------------------------------------------------------------------------------

_samples = msgspec.json.Decoder(tuple[Sample, ...])


def _encode_samples(samples: tuple[Sample, ...]) -> str | None:
    return msgspec.json.encode(samples).decode() if samples else None
