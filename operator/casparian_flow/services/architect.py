"""Architect: turns a plugin's source into a checked release, wired by its MANIFEST."""

import hashlib
from urllib.parse import quote

from casparian_flow.db.ledger import Ledger
from casparian_flow.db.releases import record_release
from casparian_flow.db.wiring import Declared, Release, Topic
from casparian_flow.domain.errors import UsageError
from casparian_flow.domain.lockfile import check_lock
from casparian_flow.domain.outputs import ANY_TOPIC, parse_sink_uri
from casparian_flow.domain.scoped_names import check_namespace, scoped
from casparian_flow.sentinel.api import Row
from casparian_flow.services.manifest import (
    Manifest,
    plugin_name,
    plugin_version,
    read_manifest,
)
from casparian_flow.trust.artifact import environment_hash
from casparian_flow.trust.bundle import Bundle
from casparian_flow.trust.policy import Verdict

MAX_PUBLISHER_CHARS = 200
LOCAL_PUBLISHER = "local"
_TAG_CHARS = 50


def prepare(bundle: Bundle, verdict: Verdict, namespace: str = "") -> Release:
    """Check everything about a plugin version that can be checked without running it.

    Args:
        verdict: what the trust policy said of this bundle; it must be favourable.
        namespace: in which it is deployed; what is signed is the plain name.

    Raises:
        UntrustedError: the verdict is none that lets it pass.
        UsageError: what is wrong with it; nothing of it may be deployed.
    """
    verdict.require()
    name = plugin_name(bundle.name)
    if plugin_version(bundle.version) != bundle.version:
        raise UsageError(
            f"version {bundle.version!r} is not in its normal form",
            hint=f"Publish it as {plugin_version(bundle.version)}.",
        )
    manifest = read_manifest(bundle.source, f"{name}.py")
    check_lock(bundle.lockfile)
    publisher = verdict.publisher
    if len(publisher) > MAX_PUBLISHER_CHARS or not (publisher or "x").isprintable():
        raise UsageError("the publisher's name is too long or has control characters")
    return Release(
        plugin=scoped(check_namespace(namespace), name),
        version=bundle.version,
        source_code=bundle.source,
        source_hash=hashlib.sha256(bundle.source.encode()).hexdigest(),
        lockfile=bundle.lockfile,
        env_hash=environment_hash(bundle.lockfile),
        artifact_hash=bundle.artifact_hash,
        publisher=publisher or LOCAL_PUBLISHER,
        declared=declare(name, manifest),
        manifest_json=bundle.manifest_json,
        envelope=bundle.envelope.decode("utf-8"),
        signer=verdict.signer,
        key_id=verdict.key_id,
        samples=bundle.samples,
        azure_oid=verdict.identity.subject if verdict.identity else "",
        email=verdict.identity.email if verdict.identity else "",
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
    bundle: Bundle,
    verdict: Verdict,
    *,
    now_us: int,
    trial: bool = False,
    namespace: str = "",
) -> Row:
    """Check a plugin version and record it with its wiring; see `releases.record_release`.

    Raises:
        UntrustedError: the verdict is none that lets it pass.
        UsageError: it cannot be deployed as it is; nothing is recorded.
        ConflictError: the version was deployed before with other bytes.
        LedgerUnavailableError: the commit failed; nothing is recorded.
    """
    release = prepare(bundle, verdict, namespace)
    return record_release(ledger, release, now_us=now_us, trial=trial)
