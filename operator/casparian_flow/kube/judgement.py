"""What a CasparianPlugin's bundle is, and whether it may run here.

The same checks that a deploy makes, made before anything of the plugin exists in the cluster.
"""

import json
from collections.abc import Callable, Mapping
from urllib.parse import quote

from casparian_flow.domain.contracts import parse_contract
from casparian_flow.domain.errors import CasparianError, UsageError
from casparian_flow.domain.outputs import ANY_TOPIC, SinkMode, parse_mode, parse_sink_uri
from casparian_flow.kube.bundles import bundle_digest, from_inlined, zipped
from casparian_flow.kube.kinds import Body
from casparian_flow.kube.models import CasparianPlugin, Quarantine
from casparian_flow.kube.reasons import VERIFIED_BY_TRUST_CODE, VerifiedReason
from casparian_flow.kube.verdict import Judgement, TopicWiring
from casparian_flow.services import architect
from casparian_flow.services.manifest import read_manifest
from casparian_flow.trust.bundle import Bundle, unpack
from casparian_flow.trust.errors import GatekeeperError
from casparian_flow.trust.rules import TrustRules


class SourceError(CasparianError):
    """The bundle cannot be had; `reason` says which way."""

    def __init__(self, message: str, reason: VerifiedReason, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


def read_source(plugin: CasparianPlugin, config_map: Body | None) -> bytes:
    """The bundle that `spec.source` gives, as it was signed.

    Args:
        config_map: the one that it names, None if there is none.

    Raises:
        SourceError: it is not there, or not what its digest says.
        BundleError: it cannot be read.
    """
    source = plugin.spec.source
    if source.inline is not None:
        return from_inlined(source.inline)
    named = source.config_map
    if named is None:
        raise SourceError("spec.source gives no bundle", VerifiedReason.SOURCE_MISSING)
    text = None if config_map is None else config_map.get("binaryData", {}).get(named.key)
    if text is None:
        what = f"key {named.key!r} in " if config_map is not None else ""
        raise SourceError(
            f"there is no {what}ConfigMap {named.name}",
            VerifiedReason.SOURCE_MISSING,
            hint="Apply all that 'casparian publish --emit-manifest' wrote.",
        )
    bundle = from_inlined(text)
    found = bundle_digest(bundle)
    if found != named.digest:
        raise SourceError(
            f"ConfigMap {named.name} holds a bundle of digest {found[:16]}…, not "
            f"{named.digest[:16]}…",
            VerifiedReason.DIGEST_MISMATCH,
            hint="Apply the object and the ConfigMap that were written together.",
        )
    return bundle


def judge(
    plugin: CasparianPlugin,
    config_map: Body | None,
    rules: TrustRules,
    deployed_at_us: Callable[[Bundle], int],
) -> Judgement:
    """Read and check the bundle of a plugin's `spec.source`. Raises nothing for what is wrong
    with it: that is the judgement.

    Args:
        deployed_at_us: tells when the ledger recorded a bundle, or what time it is now: a version
            outlives the time of the key that signed it.
    """
    try:
        data = read_source(plugin, config_map)
        bundle = unpack(data)
    except SourceError as error:
        return Judgement(error.reason, error.with_hint())
    except CasparianError as error:
        return Judgement(VerifiedReason.BUNDLE_UNREADABLE, error.with_hint())
    if bundle.version != plugin.spec.version:
        return Judgement(
            VerifiedReason.VERSION_MISMATCH,
            f"spec.version is {plugin.spec.version}, and the bundle is of "
            f"{bundle.version[:60]!r}. Give the bundle of that version.",
        )
    return judge_bundle(plugin, data, bundle, rules, deployed_at_us=deployed_at_us(bundle))


def judge_bundle(
    plugin: CasparianPlugin, data: bytes, bundle: Bundle, rules: TrustRules, *, deployed_at_us: int
) -> Judgement:
    """Check a bundle that was read, of whatever version.

    Args:
        data: the same as bytes.
        deployed_at_us: when the ledger recorded it, or now.
    """
    verdict = rules.policy.check(bundle, deployed_at_us=deployed_at_us)
    if not verdict.ok:
        reason = VERIFIED_BY_TRUST_CODE[verdict.code.value]
        return Judgement(reason, f"{verdict.message}. {verdict.hint}".strip())
    try:
        release = architect.prepare(bundle, verdict)
        rules.require_source(bundle.source, f"{bundle.name}.py")
        topics = effective_topics(plugin, bundle)
    except GatekeeperError as error:
        return Judgement(VerifiedReason.GATEKEEPER_REFUSED, error.with_hint())
    except CasparianError as error:
        return Judgement(VerifiedReason.MANIFEST_REFUSED, error.with_hint())
    return Judgement(
        VerifiedReason.VERIFIED,
        verdict.message,
        name=bundle.name,
        version=bundle.version,
        artifact_hash=bundle.artifact_hash,
        signer=verdict.signer,
        lock_hash=release.env_hash,
        bundle=data,
        compressed=zipped(data),
        topics=topics,
    )


# -- where rows go ----------------------------------------------------------------------------


def effective_topics(plugin: CasparianPlugin, bundle: Bundle) -> Mapping[str, TopicWiring]:
    """Every topic that MANIFEST or object names, with where it goes and its contract.

    Raises:
        UsageError: a sink or contract cannot be used.
    """
    manifest = read_manifest(bundle.source, f"{bundle.name}.py")
    declared = architect.declare(bundle.name, manifest).topics
    sinks: dict[str, list[str]] = {}
    for sink in plugin.spec.sinks:
        sinks.setdefault(sink.topic, []).append(_sink_uri(sink.uri, sink.mode))
    contracts = {c.topic: json.dumps(c.to_json(), sort_keys=True) for c in plugin.spec.contract}
    wanted: dict[str, TopicWiring] = {}
    for topic in sorted({*declared, *sinks, *contracts}):
        known = declared.get(topic)
        own = tuple(sinks.get(topic, ())) or _else(topic, sinks, known.uris if known else ())
        contract = contracts.get(topic) or (known.contract if known else "")
        contract = _with_quarantine(contract, plugin.spec.quarantine)
        if contract:
            parse_contract(contract)
        wanted[topic] = TopicWiring(own, contract)
    return wanted


def _else(topic: str, sinks: Mapping[str, list[str]], declared: tuple[str, ...]) -> tuple[str, ...]:
    """Of a topic that the object names no sink for: the object's `*`, unless MANIFEST chose."""
    default = (f"parquet://{quote(topic)}",)
    if ANY_TOPIC in sinks and declared in {(), default}:
        return tuple(sinks[ANY_TOPIC])
    return declared or default


def _sink_uri(uri: str, mode: str | None) -> str:
    address = parse_sink_uri(uri)
    if mode is None or address.mode is parse_mode(mode):
        return address.uri
    if address.mode is not SinkMode.APPEND:
        raise UsageError(
            f"sink {address.identity}: the URI says mode={address.mode}, and the object {mode}",
            hint="Say it once.",
        )
    separator = "&" if "?" in address.uri else "?"
    return parse_sink_uri(f"{address.uri}{separator}mode={mode}").uri


def _with_quarantine(contract: str, quarantine: Quarantine | None) -> str:
    """A contract with the object's quarantine, unless it has one of its own."""
    if not contract or quarantine is None:
        return contract
    document = json.loads(contract)
    document.setdefault(
        "quarantine",
        {
            "allow": quarantine.allow,
            "max_pct": quarantine.max_percent,
            "max_count": quarantine.max_count,
        },
    )
    return json.dumps(document, sort_keys=True)
