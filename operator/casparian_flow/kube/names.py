"""Names on Kubernetes: of our kinds, of the objects that the operator makes, labels, paths in pods.

A name that is made from several parts ends with eight digits of a SHA-256 over exactly these
parts, so that `a-b` and `a_b` never meet, however much of each was left out for readability.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from casparian_flow.domain.outputs import framed_digest

GROUP: Final = "casparian.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
CATEGORY: Final = "casparian"

PLUGIN_KIND: Final = "CasparianPlugin"
PLUGINS: Final = "casparianplugins"
SOURCE_KIND: Final = "SourceRoot"
SOURCES: Final = "sourceroots"
APPROVAL_KIND: Final = "Approval"
APPROVALS: Final = "approvals"

FIELD_MANAGER: Final = "casparian-operator"
NAME_CHARS_MAX: Final = 52
"""Of the objects made here: a CronJob's name may have no more, for its Jobs' names add to it."""
LABEL_CHARS_MAX: Final = 63
DIGEST_CHARS: Final = 8

NAME_LABEL: Final = "app.kubernetes.io/name"
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"
PLUGIN_LABEL: Final = f"{GROUP}/plugin"
"""Name of the CasparianPlugin object."""
VERSION_LABEL: Final = f"{GROUP}/version"
ROOT_LABEL: Final = f"{GROUP}/root"
"""Name of the SourceRoot object."""
ARTIFACT_HASH: Final = f"{GROUP}/artifact-hash"
SIGNER: Final = f"{GROUP}/signer"
PLUGIN_NAME: Final = f"{GROUP}/plugin-name"
"""Annotation: the plugin's own name, as its bundle has it."""
SCAN: Final = f"{GROUP}/scan"
"""Annotation on a SourceRoot: any new value asks for a scan at once."""

WORKER: Final = "worker"
SCOUT: Final = "scout"
PROVISION: Final = "provision"
SENTINEL: Final = "sentinel"

SOURCES_PATH: Final = "/sources"
OUTPUTS_PATH: Final = "/outputs"
ENVIRONMENTS_PATH: Final = "/environments"
BUNDLE_PATH: Final = "/bundle"
SCRATCH_PATH: Final = "/scratch"
LAUNCHER_PATH: Final = "/run/casparian"
LAUNCHER_SOCKET: Final = f"{LAUNCHER_PATH}/launcher.sock"
SETTINGS_PATH: Final = "/etc/casparian"
SETTINGS_FILE: Final = f"{SETTINGS_PATH}/config.toml"
CURVE_PATH: Final = "/var/run/casparian/curve"
TOKEN_PATH: Final = "/var/run/secrets/casparian"
TOKEN_FILE: Final = f"{TOKEN_PATH}/token"
TOKEN_AUDIENCE: Final = "casparian-sentinel"
LEDGER_FILE: Final = "/var/lib/casparian/ledger.duckdb"
SENTINEL_SERVICE: Final = "casparian-sentinel"
WORKER_PORT: Final = 5555
CONTROL_PORT: Final = 5556
LOOPBACK_PORT: Final = 5557
"""Of the operator's control socket that only forwarded connections reach."""
METRICS_PORT: Final = 9090
HEALTH_PORT: Final = 8080

BUNDLE_KEY: Final = "bundle.casparian.gz"
"""Key of the ConfigMap that `casparian publish --emit-manifest` writes."""

_DNS_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?")


def object_name(prefix: str, *parts: str, exact: Iterable[str] = ()) -> str:
    """A DNS-1123 name of at most 52 characters for the object of a kind that the parts identify.

    Args:
        prefix: what is read first, such as "worker"; made fit, too.
        exact: further parts that nobody needs to read, such as hashes.

    >>> object_name("worker", "sales", "1.0.0")
    'worker-sales-1-0-0-5c779493'
    >>> object_name("worker", "a-b") == object_name("worker", "a_b")
    False
    """
    readable = "-".join(filter(None, (_dns(text) for text in (prefix, *parts)))) or "x"
    if not readable[0].isalpha():  # a Service's name has to begin with a letter
        readable = f"x{readable}"
    kept = readable[: NAME_CHARS_MAX - DIGEST_CHARS - 1].rstrip("-")
    return f"{kept}-{framed_digest(prefix, *parts, *exact)[:DIGEST_CHARS]}"


def _dns(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plugin_object_name(plugin: str) -> str:
    """Of the CasparianPlugin object that is written for a plugin: the plugin's own name if it can.

    >>> plugin_object_name("sales"), plugin_object_name("my_sales")
    ('sales', 'my-sales-0f6c68c9')
    """
    if len(plugin) <= NAME_CHARS_MAX and _DNS_NAME.fullmatch(plugin):
        return plugin
    return object_name(plugin)


def deployment_name(plugin: str, version: str, artifact_hash: str) -> str:
    """Of the workers of one plugin version; `plugin` is the CasparianPlugin object's name."""
    return object_name(WORKER, plugin, version, exact=(artifact_hash,))


def bundle_name(plugin: str, version: str, digest: str) -> str:
    """Of the immutable ConfigMap that holds a bundle.

    Args:
        digest: SHA-256 of the bundle, hex.
    """
    return object_name("bundle", plugin, version, exact=(digest,))


def provision_name(lock_hash: str) -> str:
    """Of the Job that makes the environment of a lock file."""
    return object_name(PROVISION, lock_hash[:12], exact=(lock_hash,))


def scout_name(root: str) -> str:
    """Of the CronJob that scans a SourceRoot object, and of what goes with it."""
    return object_name(SCOUT, root)


def approval_name(operation: str, plugin: str, approval_id: str) -> str:
    """Of the Approval object for a request in the ledger.

    >>> approval_name("run", "sales", "0d6c1c0e-6f7f-4a53-8a5c-6b0b9d5a7f3c")
    'run-sales-811fc29a'
    """
    return object_name(operation, plugin, exact=(approval_id,))


def label_value(text: str) -> str:
    """A label's value for a text: itself where it is fit, else what is left of it and a digest.

    >>> label_value("1.0.0"), label_value("")
    ('1.0.0', '')
    >>> label_value("1.0.0+local/build")
    '1.0.0-local-build-1ef777ba'
    """
    if len(text) <= LABEL_CHARS_MAX and _LABEL_VALUE.fullmatch(text):
        return text
    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-_.")
    kept = readable[: LABEL_CHARS_MAX - DIGEST_CHARS - 1].rstrip("-_.")
    digest = framed_digest(text)[:DIGEST_CHARS]
    return f"{kept}-{digest}" if kept else digest


def labels(
    component: str, *, plugin: str = "", version: str = "", root: str = ""
) -> Mapping[str, str]:
    """Labels of an object that the operator makes."""
    found = {
        NAME_LABEL: "casparian",
        COMPONENT_LABEL: component,
        MANAGED_BY_LABEL: FIELD_MANAGER,
        PLUGIN_LABEL: plugin,
        VERSION_LABEL: version,
        ROOT_LABEL: root,
    }
    return {key: label_value(value) for key, value in found.items() if value}


def source_path(namespace: str, root: str) -> str:
    """Where Scout and workers mount a SourceRoot.

    >>> source_path("finance", "inbox")
    '/sources/finance/inbox'
    """
    return f"{SOURCES_PATH}/{namespace}/{root}"
