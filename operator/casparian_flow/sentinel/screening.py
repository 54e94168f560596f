"""Whether a recorded plugin version may still run: asked at each load of the specs."""

import logging

from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.records import PluginSpec
from casparian_flow.domain.scoped_names import plain
from casparian_flow.trust.bundle import Bundle
from casparian_flow.trust.rules import TrustSource

log = logging.getLogger(__name__)


def refusal(trust: TrustSource, spec: PluginSpec) -> str:
    """Why the version may not run by the rules as they now are, "" if it may.

    Signature, hash and source are checked over the bytes that the ledger holds.
    """
    try:
        trust().require(bundle_of(spec), deployed_at_us=spec.deployed_at_us)
    except CasparianError as error:
        log.error("plugin %s %s does not run: %s", spec.plugin, spec.plugin_version, error)
        return str(error)
    return ""


def bundle_of(spec: PluginSpec) -> Bundle:
    """The bundle that was deployed, of what the ledger holds of it."""
    return Bundle(
        name=plain(spec.plugin),
        version=spec.plugin_version,
        source=spec.source_code,
        lockfile=spec.lockfile,
        manifest_json=spec.manifest_json,
        artifact_hash=spec.artifact_hash,
        envelope=spec.envelope.encode("utf-8", "surrogatepass"),
    )
