"""Architect: turns a plugin's source into a checked release, wired by its MANIFEST."""

import hashlib
from urllib.parse import quote

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.wiring import Declared, Release, Topic, record_release
from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.lockfile import lock_problems
from casparian_flow.domain.outputs import ANY_TOPIC, parse_sink_uri
from casparian_flow.sentinel.api import Row
from casparian_flow.services.manifest import (
    Manifest,
    plugin_name,
    plugin_version,
    read_manifest,
)
from casparian_flow.trust.artifact import artifact_hash, environment_hash, release_json

MAX_PUBLISHER_CHARS = 200
LOCAL_PUBLISHER = "local"
_TAG_CHARS = 50


def prepare(
    *,
    plugin: str,
    version: str,
    source_code: str,
    lockfile: str = "",
    expected_hash: str = "",
    publisher: str = "",
) -> Release:
    """Check everything about a plugin version that can be checked without running it.

    Args:
        expected_hash: what the publisher computed, "" for not given.

    Raises:
        UsageError: what is wrong with it; nothing of it may be deployed.
    """
    name, number = plugin_name(plugin), plugin_version(version)
    manifest = read_manifest(source_code, f"{name}.py")
    _check_lock(lockfile)
    if len(publisher) > MAX_PUBLISHER_CHARS or not (publisher or "x").isprintable():
        raise UsageError("the publisher's name is too long or has control characters")
    digest = artifact_hash(source_code, lockfile, release_json(name, number))
    if expected_hash and expected_hash != digest:
        raise UsageError(
            f"the artifact hash of {name} {number} does not match its bytes: "
            f"given {expected_hash[:16]}…, computed {digest[:16]}…",
            hint="The source or the lock file changed after the hash was made; publish again.",
        )
    return Release(
        plugin=name,
        version=number,
        source_code=source_code,
        source_hash=hashlib.sha256(source_code.encode()).hexdigest(),
        lockfile=lockfile,
        env_hash=environment_hash(lockfile),
        artifact_hash=digest,
        publisher=publisher or LOCAL_PUBLISHER,
        declared=declare(name, manifest),
    )


def _check_lock(lockfile: str) -> None:
    problems = lock_problems(lockfile) if lockfile else []
    if problems:
        raise UsageError(
            "no worker could make an environment from the lock file: " + "; ".join(problems),
            hint="Correct the plugin's pyproject.toml, run `uv lock`, and publish again.",
        )


def declare(plugin: str, manifest: Manifest) -> Declared:
    """The wiring a MANIFEST asks for: a tag of the plugin's own, and a sink for every topic."""
    return Declared(
        pattern=manifest.pattern,
        tag=auto_tag(plugin) if manifest.pattern else "",
        priority=manifest.priority,
        subscriptions=manifest.subscriptions,
        topics={topic: _topic(topic, manifest) for topic in manifest.topics()},
        parameters_json=manifest.parameters_json,
        description=manifest.description,
    )


def _topic(topic: str, manifest: Manifest) -> Topic:
    chosen = manifest.sinks.get(topic) or manifest.sinks.get(ANY_TOPIC)
    sinks = chosen or (parse_sink_uri(f"parquet://{quote(topic)}"),)
    return Topic(tuple(sink.uri for sink in sinks), manifest.outputs.get(topic, ""))


def auto_tag(plugin: str) -> str:
    """The tag by which a plugin's own rule reaches it; no other plugin's is equal.

    >>> auto_tag("sales")
    'auto_sales'
    """
    tag = f"auto_{plugin}"
    if len(tag) <= _TAG_CHARS:
        return tag
    digest = hashlib.sha256(plugin.encode()).hexdigest()[:12]
    return f"{tag[: _TAG_CHARS - 13]}-{digest}"


def deploy(
    ledger: Ledger,
    *,
    plugin_name: str,
    version: str,
    source_code: str,
    lockfile: str = "",
    artifact_hash: str = "",
    publisher: str = "",
    now_us: int,
) -> Row:
    """Check a plugin version and record it with its wiring; see `wiring.record_release`.

    Raises:
        UsageError: it cannot be deployed as it is; nothing is recorded.
        ConflictError: the version was deployed before with other bytes.
        LedgerUnavailableError: the commit failed; nothing is recorded.
    """
    release = prepare(
        plugin=plugin_name,
        version=version,
        source_code=source_code,
        lockfile=lockfile,
        expected_hash=artifact_hash,
        publisher=publisher,
    )
    return record_release(ledger, release, now_us=now_us)
