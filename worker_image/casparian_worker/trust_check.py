"""The worker's own look at a plugin before its process starts: signature, hash and source.

It is asked at each start of a process, over the very text that the process is then handed.
"""

from casparian_flow.domain.errors import CasparianError
from casparian_flow.domain.failures import Reason
from casparian_flow.domain.scoped_names import plain
from casparian_flow.protocol.messages import Plugin
from casparian_flow.trust.bundle import Bundle
from casparian_flow.trust.rules import TrustSource
from casparian_worker.plugin_events import LaunchError


def require_trusted(trust: TrustSource, plugin: Plugin) -> None:
    """Raises:
    LaunchError: these rules do not let the plugin run; the message names what does not match.
    """
    bundle = Bundle(
        # Its namespace is of who deployed it, not of who signed it.
        name=plain(plugin.plugin_name),
        version=plugin.plugin_version,
        source=plugin.source_code,
        lockfile=plugin.lockfile,
        manifest_json=plugin.manifest_json,
        artifact_hash=plugin.artifact_hash,
        envelope=plugin.envelope.encode("utf-8", "surrogatepass"),
    )
    try:
        trust().require(bundle, deployed_at_us=plugin.deployed_at_us)
    except CasparianError as error:
        raise LaunchError(str(error), reason=Reason.UNTRUSTED, hint=error.hint) from error
