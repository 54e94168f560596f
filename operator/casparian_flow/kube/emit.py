"""A signed bundle as Kubernetes objects: what `casparian publish --emit-manifest` writes."""

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from casparian_flow.domain.errors import UsageError
from casparian_flow.kube.bundles import bundle_digest, inlined
from casparian_flow.kube.models import INLINE_CHARS_MAX
from casparian_flow.kube.names import (
    API_VERSION,
    BUNDLE_KEY,
    NAME_LABEL,
    PLUGIN_KIND,
    PLUGIN_LABEL,
    VERSION_LABEL,
    bundle_name,
    label_value,
    plugin_object_name,
)
from casparian_flow.trust.bundle import Bundle, pack

CONFIG_MAP_CHARS_MAX: Final = 1_300_000
"""Of base64; a ConfigMap takes 1 MiB of bytes in all."""
APPLIED_CHARS_MAX: Final = 200_000
"""`kubectl apply` keeps a copy of what it applied in an annotation, and all annotations together
may have 256 KiB; beyond this only server-side apply works."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """Objects for one plugin version.

    Attributes:
        objects: in the order in which they are to be applied; the last is the CasparianPlugin.
        server_side: whether `kubectl apply` without `--server-side` would refuse them.
    """

    objects: tuple[Mapping[str, Any], ...]
    server_side: bool

    @property
    def plugin(self) -> str:
        """Name of the CasparianPlugin object."""
        return str(self.objects[-1]["metadata"]["name"])

    @property
    def told(self) -> str:
        """The objects, for people."""
        return " and ".join(f"{o['kind']} {o['metadata']['name']}" for o in reversed(self.objects))

    def next_command(self, file: str) -> str:
        """What to type next."""
        how = "apply --server-side" if self.server_side else "apply"
        ready = f"--for=condition=Ready --timeout=5m casparianplugin/{self.plugin}"
        return f"kubectl {how} -f {shlex.quote(file)} && kubectl wait {ready}"


def objects_for(bundle: Bundle) -> Emitted:
    """The objects that deploy a signed bundle; equal bundles give equal objects.

    A bundle of more than 64 KiB as base64 goes into an immutable ConfigMap beside the plugin.

    Raises:
        BundleError: a part of the bundle is too large.
        UsageError: all of it is too large for a ConfigMap.
    """
    packed = pack(bundle)
    text = inlined(packed)
    name = plugin_object_name(bundle.name)
    labels = {
        NAME_LABEL: "casparian",
        PLUGIN_LABEL: label_value(name),
        VERSION_LABEL: label_value(bundle.version),
    }
    if len(text) <= INLINE_CHARS_MAX:
        return Emitted((_plugin(name, labels, bundle.version, {"inline": text}),), False)
    if len(text) > CONFIG_MAP_CHARS_MAX:
        raise UsageError(
            f"{bundle.name} {bundle.version} has {len(text) // 1024} KiB as an object, and "
            f"Kubernetes takes {CONFIG_MAP_CHARS_MAX // 1024} KiB",
            hint="Keep fewer packages in its lock file, or fewer and smaller samples.",
        )
    digest = bundle_digest(packed)
    holder = bundle_name(name, bundle.version, digest)
    source = {"configMap": {"name": holder, "key": BUNDLE_KEY, "digest": digest}}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": holder, "labels": labels},
        "immutable": True,
        "binaryData": {BUNDLE_KEY: text},
    }
    plugin = _plugin(name, labels, bundle.version, source)
    return Emitted((config_map, plugin), len(text) > APPLIED_CHARS_MAX)


def _plugin(
    name: str, labels: Mapping[str, str], version: str, source: Mapping[str, Any]
) -> Mapping[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": PLUGIN_KIND,
        "metadata": {"name": name, "labels": {NAME_LABEL: labels[NAME_LABEL]}},
        "spec": {"version": version, "source": source},
    }


def to_yaml(objects: Iterable[Mapping[str, Any]]) -> str:
    """Objects as one YAML file, each text in one line."""
    import yaml

    return yaml.safe_dump_all(
        map(dict, objects), sort_keys=False, explicit_start=True, width=math.inf
    )
